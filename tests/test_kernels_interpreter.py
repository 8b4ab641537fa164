"""The Triton kernels themselves, run by Triton's interpreter on CPU tensors, against float64.

TRITON_INTERPRET must be set before Triton is imported and must not reach the other tests, so the
ordinary test session starts a second one with the variable set, whose report is shown if it fails;
everything else in this file is only collected there. By hand:

    cd tests; TRITON_INTERPRET=1 python -m pytest \\
        test_kernels_{interpreter,fused,fields,forms,gradients,diffusers,minisd}.py

Not tested here: TF32, which the interpreter does not model (test_kernels_compiled.py). Its bfloat16
is mended first: its tl.dot multiplies the bit patterns, and its conversions cut off instead of
rounding.
"""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernel_cases import (
    DTYPES,
    FORMS,
    HEAD_DIMS,
    KEYS,
    NAN,
    QUERIES,
    B,
    S,
    check,
    edit_tensors,
    run_cross,
    sampled_cross_cases,
    tensors,
)
from minisd_kernels import dispatch, ops, reference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if not INTERPRETED:

    def test_the_kernels_in_the_interpreter():
        names = "interpreter", "fused", "fields", "forms", "gradients", "diffusers", "minisd"
        files = [str(Path(__file__).with_name(f"test_kernels_{name}.py")) for name in names]
        command = [sys.executable, "-m", "pytest", "-q", "-x", "--no-header"]
        env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        command += ["-p", "no:cacheprovider", *files]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-25000:] + done.stderr[-5000:]
        print(done.stdout)

else:
    import numpy as np
    import triton.language
    from minisd_kernels import attention, cross_attention

    @pytest.fixture(autouse=True, scope="session")
    def quick_interpreter():
        """Half the time, and still the kernels.

        Every call of a jit function inside a kernel patches triton.language anew, 2 ms; once will
        do. And every sum and product of integers is computed again in 64 bits to see whether it
        overflows, which at these sizes none does; a compiled kernel has no such check either.
        """
        from triton.runtime import interpreter
        from triton.runtime.interpreter import InterpretedFunction

        builder = interpreter.interpreter_builder
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
        call, seen = InterpretedFunction.__call__, set()

        def quick_call(self, *args, **kwargs):
            if id(self.fn.__globals__) in seen:
                return self.rewrite()(*args, **kwargs)
            seen.add(id(self.fn.__globals__))
            return call(self, *args, **kwargs)

        InterpretedFunction.__call__ = quick_call
        yield
        InterpretedFunction.__call__ = call


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """NaN in every output, and in what lies between two launches: a number that no kernel wrote
    shows."""
    dispatch.KNOWN.clear()  # another test may have chosen other tiles
    for name in ("new_empty", "new_empty_strided"):

        def poison(*args, allocate=getattr(torch.Tensor, name), **kwargs):
            x = allocate(*args, **kwargs)
            return x.fill_(NAN) if x.is_floating_point() and x.device.type == "cpu" else x

        monkeypatch.setattr(torch.Tensor, name, poison)


if INTERPRETED:
    CASES = list(sampled_cross_cases())

    @pytest.mark.parametrize(
        "source, mix, saves, dtype, batch, heads, n, keys, d, layout, arch, seed", CASES
    )
    def test_cross_attention(
        monkeypatch, source, mix, saves, dtype, batch, heads, n, keys, d, layout, arch, seed
    ):
        monkeypatch.setattr(cross_attention, "arch", lambda: arch)  # the tiles of both kinds
        q, k, v = tensors(batch, heads, n, keys, d, dtype, seed, layout)
        edit = edit_tensors(source, mix, heads, n, keys, dtype, seed)
        run_cross(q, k, v, edit, saves)

    def test_the_sample_holds_every_size():
        """Each in float16 and in float32, but 97 and 256 queries in float32, too many programs: see
        the next test."""
        seen = {
            dtype: [case.values for case in CASES if case.values[3] == dtype] for dtype in DTYPES
        }
        for dtype, cases in seen.items():
            assert {case[8] for case in cases} == set(HEAD_DIMS) and {
                case[7] for case in cases
            } == set(KEYS)
            assert {case[6] for case in cases} == set(QUERIES) - (
                {97, 256} if dtype == torch.float32 else set()
            )
            assert {(*case[:3],) for case in cases} == set(FORMS)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("n", QUERIES)
    def test_every_number_of_queries(n, dtype):
        q, k, v = tensors(1, 1, n, 40, 40, dtype, seed=n)
        exact, eager = (
            reference.attention(q.double(), k.double(), v.double()),
            reference.attention(q, k, v),
        )
        check(ops.attention(q, k, v), eager, exact, dtype, "attention", 40)
        q, k, v = tensors(1, 1, n, 77, 8, dtype, seed=n)
        exact, eager = (
            reference.attention(q.double(), k.double(), v.double()),
            reference.attention(q, k, v),
        )
        check(ops.cross_attention(q, k, v), eager, exact, dtype, "cross_attention", 77)

    @pytest.fixture
    def bfloat16(monkeypatch):
        """Give the interpreter a bfloat16 that works: products of the numbers, conversions that
        round to even."""
        from triton.language import bfloat16 as bf16
        from triton.runtime import interpreter

        dot, convert = interpreter.InterpreterBuilder.create_dot, interpreter._convert_float

        def widen(bits):
            return (bits.view(np.uint16).astype(np.uint32) << 16).view(np.float32)

        def mended_dot(self, a, b, *args):
            a, b = (
                interpreter.TensorHandle(widen(x.data), triton.language.float32)
                if x.dtype.scalar == bf16
                else x
                for x in (a, b)
            )
            return dot(self, a, b, *args)

        def mended_convert(x, from_dtype, to_dtype, rounding):
            if from_dtype.scalar == bf16 and to_dtype.scalar == triton.language.float32:
                return widen(x)
            if to_dtype.scalar == bf16 and from_dtype.scalar == triton.language.float32:
                bits = np.ascontiguousarray(x).view(np.uint32)
                return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
            return convert(x, from_dtype, to_dtype, rounding)

        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", mended_dot)
        monkeypatch.setattr(interpreter, "_convert_float", mended_convert)

    @pytest.mark.parametrize(
        "source, mix, saves",
        [
            ("none", (), ()),
            ("none", ("reweight",), ("save_mean",)),
            ("source_row", (), ()),
            ("source_row", ("token_map", "blend", "reweight"), ()),
            ("source_row", ("token_map", "blend"), ("save", "save_mean")),
            ("inject", (), ("save",)),
            ("inject", ("token_map", "blend", "reweight"), ()),
        ],
        ids=str,
    )
    def test_bfloat16(bfloat16, source, mix, saves):
        q, k, v = tensors(B, 1, 7, 77, 40, torch.bfloat16, seed=1)
        run_cross(q, k, v, edit_tensors(source, mix, 1, 7, 77, torch.bfloat16, 1), saves)

    def test_attention_in_bfloat16(bfloat16):
        q, k, v = tensors(B, 1, 17, 100, 80, torch.bfloat16, seed=0)
        row = torch.tensor([1, 0])
        exact = reference.attention(q.double(), k.double(), v.double(), row)
        check(
            ops.attention(q, k, v, row),
            reference.attention(q, k, v, row),
            exact,
            torch.bfloat16,
            "out",
        )

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("keys", KEYS)
    @pytest.mark.parametrize("d", HEAD_DIMS)
    def test_cross_attention_of_every_size(d, keys, dtype):
        n = {8: 97, 40: 64, 80: 7}.get(d, 1)
        q, k, v = tensors(1, 1, n, keys, d, dtype, seed=d + keys)
        check(
            ops.cross_attention(q, k, v),
            reference.attention(q, k, v),
            reference.attention(q.double(), k.double(), v.double()),
            dtype,
            "out",
            max(keys, d),
        )

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("routed", [False, True], ids=["plain", "routed"])
    @pytest.mark.parametrize(
        "n, keys, d, layout",
        [
            (1, 1, 8, "plain"),
            (7, 5, 16, "heads inside"),
            (64, 64, 40, "heads inside"),
            (97, 97, 40, "gaps"),
            (33, 256, 48, "transposed"),
            (64, 130, 64, "heads inside"),
            (17, 200, 80, "heads inside"),
            (7, 97, 96, "plain"),
            (31, 96, 160, "heads inside"),
            (16, 63, 256, "gaps"),
        ],
    )
    def test_attention(monkeypatch, n, keys, d, layout, routed, dtype):
        monkeypatch.setattr(attention, "arch", lambda: 80 if routed else 90)
        q, k, v = tensors(B, 1, n, keys, d, dtype, seed=n + d, layout=layout)
        row = torch.tensor([1, 0], dtype=torch.int32) if routed else None
        got = ops.attention(q, k, v, row)
        exact = reference.attention(q.double(), k.double(), v.double(), row)
        check(got, reference.attention(q, k, v, row), exact, dtype, "out", max(keys, d))
        assert torch.equal(got[:1], ops.attention(q[:1], k[:1], v[:1]))

    @pytest.mark.parametrize(
        "rows",
        [[0, 0], [1, 1], [0, 1], [1, 0], [0, 0, 0], [0, 0, 2, 2], [2, 2, 1, 2, 3], [0]],
        ids=str,
    )
    def test_a_routed_row_has_the_bits_of_the_plain_op(rows):
        """Pairs, chains, takers of a row that takes itself, nobody: the plain op on the routed q
        and k."""
        q, k, v = tensors(len(rows) + 1, 1, 7, 70, 40, torch.float16, seed=len(rows))
        row = torch.tensor(rows)
        want = ops.attention(*(reference.routed(x, row) for x in (q, k)), v)
        assert torch.equal(ops.attention(q, k, v, row), want)

    def extreme(keys, dtype):
        """q, k, v whose scores after the scale are exactly +-1e4, and for every third key something
        between."""
        q, k, v = tensors(B, 1, 16, keys, 16, dtype, seed=0)
        towards = (
            torch.ones(keys)
            .bernoulli_(0.5, generator=torch.Generator().manual_seed(0))
            .mul_(100)
            .sub_(50)
        )
        u = q[:1, :, :1].sign()  # 50 * 50 * 16 / sqrt(16) = 1e4
        q = u * 50 * q[..., :1].sign()
        k = torch.where(
            (torch.arange(keys) % 3 > 0)[:, None], u * towards[:, None].to(dtype), k * 50
        )
        scores = q.double() @ k.double().mT / 4
        assert scores.min() == -1e4 and scores.max() == 1e4 and (scores.abs() < 9e3).any()
        return q, k, v

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_extreme_logits(dtype):
        """Scores of +-1e4 after the scale: nothing overflows, nothing is -inf - -inf."""
        q, k, v = extreme(150, dtype)
        for row in (None, torch.tensor([1, 0])):
            exact = reference.attention(q.double(), k.double(), v.double(), row)
            check(
                ops.attention(q, k, v, row),
                reference.attention(q, k, v, row),
                exact,
                dtype,
                "attention",
                150,
            )
        q, k, v = extreme(77, dtype)
        everything, both = ("token_map", "blend", "reweight"), ("save", "save_mean")
        for form in (
            ("none", ("reweight",), ()),
            ("source_row", everything, ()),
            ("source_row", everything, both),
        ):
            run_cross(q, k, v, edit_tensors(*form[:2], 1, 16, 77, dtype, 0), form[2])

    @pytest.mark.parametrize("keys", [77, 150])
    def test_identical_keys_give_the_mean_of_the_values(keys):
        q, k, v = tensors(1, 1, 16, keys, 40, torch.float32, seed=0)
        k = k[:, :, :1].expand(-1, -1, keys, -1) * 100
        got = ops.cross_attention(q, k, v) if keys <= 128 else ops.attention(q, k, v)
        want = v.double().mean(2, keepdim=True).expand_as(got)
        torch.testing.assert_close(got.double(), want, atol=5e-6, rtol=0)

    def test_save_takes_any_strides_and_float32():
        q, k, v = tensors(B, 2, 7, 77, 16, torch.float16, seed=0)
        save = torch.full((S, 2, 7, 80), NAN)[..., :77]
        mean = torch.ones(S, 77, 7).mT
        exact = torch.empty(S, 2, 7, 77, dtype=torch.float64)
        ops.cross_attention(q, k, v, save=save, save_mean=mean)
        reference.cross_attention(q.double(), k.double(), v.double(), save=exact)
        torch.testing.assert_close(save.double(), exact, atol=1e-5, rtol=0)
        torch.testing.assert_close(mean.double(), 1 + exact.mean(1), atol=1e-5, rtol=0)

    def test_save_mean_accumulates():
        q, k, v = tensors(B, 2, 7, 5, 16, torch.float32, seed=0)
        once, twice = torch.zeros(S, 7, 5), torch.zeros(S, 7, 5)
        ops.cross_attention(q, k, v, save_mean=once)
        for _ in range(2):
            ops.cross_attention(q, k, v, save_mean=twice)
        torch.testing.assert_close(twice, 2 * once, atol=1e-6, rtol=0)

    @pytest.mark.parametrize("source", ["source_row", "inject"])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_the_gate_is_a_value(source, dtype):
        """A row that takes nothing of a source comes out as without an edit, and one that takes all
        without a blend, to the last bit; what is not used may be anything."""
        q, k, v = tensors(B, 1, 7, 77, 40, dtype, seed=0)
        edit = edit_tensors(source, ("token_map",), 1, 7, 77, dtype, 0)
        plain, all_of_it = ops.cross_attention(q, k, v), ops.cross_attention(q, k, v, **edit)
        gate = torch.stack([torch.zeros(77), torch.ones(77)])
        out = ops.cross_attention(q, k, v, **edit, blend=gate)
        assert torch.equal(out[:-1], plain[:-1]) and torch.equal(out[-1], all_of_it[-1])
        edit["token_map"] = edit["token_map"].clone()
        edit["token_map"][0] = NAN
        assert torch.equal(ops.cross_attention(q, k, v, **edit, blend=gate), out)
        gate[0, -1] = 1e-3  # the last key of the second block of 64
        assert ops.cross_attention(q, k, v, **edit, blend=gate)[-2].isnan().all()

    # torch.library: schema, fake kernel, graph

    def test_opcheck():
        q, k, v = tensors(B, 1, 7, 5, 16, torch.float32, seed=0)
        edit = edit_tensors(
            "source_row", ("token_map", "blend", "reweight"), 1, 7, 5, torch.float32, 0
        )
        op = torch.ops.minisd_kernels
        torch.library.opcheck(
            op.attention.default, (q, k, v, edit["source_row"], *[None] * 4, False)
        )
        tables = tuple(edit[name] for name in ("token_map", "blend", "reweight"))
        args = (q, k, v, edit["source_row"], None, *tables)
        torch.library.opcheck(op.cross_attention.default, (*args, None, None))
        torch.library.opcheck(op.cross_attention.default, (q, k, v, *[None] * 7))
        save, mean = torch.zeros(S, 1, 7, 5), torch.zeros(S, 7, 5)
        nothing = [None] * 6
        torch.library.opcheck(
            op.cross_attention_save.default, (q, k, v, *nothing, save, None, None)
        )
        torch.library.opcheck(op.cross_attention_save.default, (*args, None, save, mean, None))
        values = v, torch.randn_like(v[-S:])
        backward = (torch.randn_like(q), q, k, *values, edit["source_row"], None, None, None, False)
        torch.library.opcheck(op.attention_backward.default, backward)

    @pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
    @pytest.mark.parametrize("save", [False, True], ids=["edit", "edit and save"])
    def test_compiles_to_one_graph_for_all_steps(backend, save):
        """A block with an edited self and an edited cross site: no break, no recompile when the
        values change."""
        from minisd.models.attention import Attention, AttentionEdit

        torch.manual_seed(0)
        own, cross = Attention(32, 2), Attention(32, 2, 24)
        own.impl = cross.impl = "triton"
        x, context = torch.randn(B, 130, 32), torch.randn(B, 5, 24)

        @torch.no_grad()
        def block(x, context, self_edit, cross_edit):
            x = x + own(x, None, self_edit)
            return x + cross(x, cross.project(context), cross_edit)

        def edits(step, save_map):
            g = torch.Generator().manual_seed(step)
            mean = torch.zeros(S, 130, 5) if save else None
            return AttentionEdit(
                source_row=torch.tensor([0, 0]) if step % 2 else torch.arange(S)
            ), AttentionEdit(
                source_row=torch.tensor([0, 0]),
                token_map=torch.rand(S, 5, 5, generator=g),
                blend=torch.rand(S, 5, generator=g),
                reweight=torch.rand(S, 5, generator=g),
                save=save_map,
                save_mean=mean,
            )

        torch._dynamo.reset()
        graphs = []

        def counting(graph, inputs):
            graphs.append(graph)
            return torch._dynamo.lookup_backend(backend)(graph, inputs)

        compiled = torch.compile(block, backend=counting, fullgraph=True)
        kept = torch.empty(S, 2, 130, 5) if save else None
        for step in range(3):
            a, b = edits(step, kept), edits(step, torch.empty_like(kept) if save else None)
            got, want = compiled(x, context, *a), block(x, context, *b)
            torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
            if save:
                torch.testing.assert_close(a[1].save, b[1].save, atol=1e-6, rtol=0)
                torch.testing.assert_close(a[1].save_mean, b[1].save_mean, atol=1e-6, rtol=0)
        assert len(graphs) == 1

    @pytest.mark.parametrize("name", ["source_row", "inject"])
    def test_minisd_attention_by_triton(name):
        """Every kind of edit of minisd.models.attention reaches the right kernel: equal to the
        reference in float32."""
        from minisd.models.attention import AttentionEdit, attention as attend

        for keys in (5, 140):
            q, k, v = tensors(B, 1, 9, keys, 16, torch.float32, seed=keys)
            stored = q[1:].flip(2).contiguous(), k[1:].flip(2).contiguous()
            everything = ("token_map", "blend", "reweight")
            for source, mix in (
                ("none", ()),
                ("none", ("reweight",)),
                (name, ()),
                (name, ("blend",)),
                ("inject_qk", ()),
                ("inject_qk", everything),
            ):
                edit = AttentionEdit(**edit_tensors(source, mix, 1, 9, keys, torch.float32, 0))
                if source == "inject_qk":
                    edit = edit._replace(inject_qk=stored)
                got, want = (attend(q, k, v, edit, impl) for impl in ("triton", "reference"))
                torch.testing.assert_close(got, want, atol=5e-6, rtol=0)
            got = attend(q, k, v, None, "triton")
            torch.testing.assert_close(got, reference.attention(q, k, v), atol=5e-6, rtol=0)

    def test_the_benchmark_checks_what_it_times(monkeypatch):
        """bench.attention with our kernels among the contenders, every form; all taking one
        millisecond."""
        from bench import attention as bench

        def one_ms(functions, *args, **kwargs):
            return dict.fromkeys(functions, {"ms": 1.0, "low": 1.0, "high": 1.0})

        rivals = bench.rivals
        monkeypatch.setattr(bench, "rivals", lambda *args, triton: rivals(*args, triton=True))
        monkeypatch.setattr(bench.harness, "interleave", one_ms)
        monkeypatch.setattr(bench.harness, "peak_memory", lambda *args: 0)
        rows = bench.bench_shape(
            4, 1, 7, 5, 8, torch.float32, "cpu", ("plain", *bench.CROSS_EDITS), 1, 1e12
        )
        rows += bench.bench_shape(
            4, 1, 7, 7, 8, torch.float32, "cpu", ("plain", *bench.SELF_EDITS), 1, 1e12
        )
        assert len(rows) == 10 and all(row["error_over_budget"] <= 1 for row in rows)
        # as quick as the others: too slow beside SDPA and eager (4 forms)
        assert [text[:4] for text in bench.misses(rows)] == ["SLOW"] * 5
        rows[0]["error_over_budget"] = 1.1
        assert [text[:5] for text in bench.misses(rows)].count("WRONG") == 1
        provenance = dict.fromkeys(("device", "torch", "triton", "commit", "command"), "x")
        assert len(bench.table(provenance | {"rows": rows}).splitlines()) == 4 + 10
