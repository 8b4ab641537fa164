"""Fewer key heads than query heads, causal attention, and the softmax's denominators.

The reference against PyTorch's own attention; the kernels and their gradients against float64, in
the interpreter's session, which test_kernels_interpreter.py starts.
"""

import os

import pytest
import torch
from kernel_cases import NAN, S, check, scattered, tensors
from minisd_kernels import ops, reference
from torch.nn.functional import scaled_dot_product_attention

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
R = 3


def grouped(heads, key_heads, n, keys, d, dtype, seed, layout="heads inside"):
    """q with `heads`, k and v with `key_heads`."""
    q, _, _ = tensors(R, heads, n, keys, d, dtype, seed, layout)
    _, k, v = tensors(R, key_heads, n, keys, d, dtype, seed + 1, layout)
    return q, k, v


def tables(names, heads, n, keys, dtype, seed, per_head=False):
    g = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.rand(shape, generator=g)

    of = (heads, keys) if per_head else (keys,)
    every = {
        "source_row": torch.tensor([1, 0]),
        "inject": torch.softmax(rand(S, heads, n, keys), -1).to(dtype),
        "token_map": rand(S, keys, keys) / keys,
        "blend": rand(S, *of),
        "reweight": 2 * rand(S, *of),
        "bias": rand(S, heads, 1, keys).log().to(dtype),
    }
    return {name: every[name] for name in names}


if not INTERPRETED:

    @pytest.mark.parametrize("is_causal", [False, True])
    @pytest.mark.parametrize("key_heads, n, keys", [(4, 5, 5), (2, 3, 7), (1, 7, 3)])
    def test_the_reference_is_sdpa(key_heads, n, keys, is_causal):
        q, k, v = grouped(4, key_heads, n, keys, 3, torch.float64, 0)
        got, lse = reference.attention(q, k, v, is_causal=is_causal, return_lse=True)
        want = scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=True)
        torch.testing.assert_close(got, want, atol=1e-14, rtol=0)
        for b, h, i in ((0, 0, 0), (2, 3, n - 1), (1, 2, n // 2)):
            seen = k[b, h * key_heads // 4, : i + 1 if is_causal else keys]
            denominator = sum(torch.exp(q[b, h, i] @ key / 3**0.5) for key in seen)
            torch.testing.assert_close(lse[b, h, i], denominator.log(), atol=1e-14, rtol=0)

    def test_the_denominators_of_edited_rows():
        """Those of the map that a row uses: of its source row, and of joined keys."""
        q, k, v = grouped(2, 2, 4, 4, 8, torch.float64, 0)
        _, own = reference.attention(q, k, v, return_lse=True)
        _, routed = reference.attention(q, k, v, torch.tensor([1, 1]), return_lse=True)
        assert torch.equal(routed, own[[0, 2, 2]])
        rows = torch.tensor([[0, 1], [1, 1]])
        _, joined = reference.attention(q, k, v, kv_row=rows, return_lse=True)
        twice = own[2] + torch.log(torch.tensor(2.0, dtype=torch.float64))
        torch.testing.assert_close(joined[2], twice, atol=1e-14, rtol=0)
        hidden = torch.full((1, 1, 1, 4), -torch.inf)
        assert (
            reference.attention(q, k, v, bias=hidden, return_lse=True)[1][2] == -torch.inf
        ).all()

    def test_folding_gives_each_head_of_a_table_its_values():
        _, _, v = grouped(4, 2, 4, 5, 8, torch.float64, 0)
        edit = tables(("token_map", "blend", "reweight"), 4, 4, 5, torch.float64, 0, per_head=True)
        all_heads = v[1:].repeat_interleave(2, 1)
        for got, want in zip(ops.fold(v[1:], True, **edit), ops.fold(all_heads, True, **edit)):
            assert torch.equal(got, want) and got.shape == (S, 4, 5, 8)

    @pytest.mark.parametrize(
        "fields, match",
        [
            (
                {"is_causal": True, "kv_row": torch.zeros(2, 1, dtype=torch.int64)},
                "is_causal: .*kv",
            ),
            ({"return_lse": True, "own_value": torch.ones(2)}, "return_lse: expected no own_value"),
        ],
    )
    def test_what_does_not_go_together_is_refused(fields, match):
        q, k, v = (x.to("meta") for x in grouped(2, 2, 4, 4, 8, torch.float32, 0))
        fields = {n: x.to("meta") if torch.is_tensor(x) else x for n, x in fields.items()}
        for tracked in (q, q.clone().requires_grad_()):
            with pytest.raises(ValueError, match=match):
                ops.attention(tracked, k, v, **fields)

    def test_heads_that_do_not_divide_are_refused():
        q, k, v = (x.to("meta") for x in grouped(4, 3, 4, 4, 8, torch.float32, 0))
        for op in (ops.attention, ops.cross_attention):
            with pytest.raises(ValueError, match=r"with K a divisor of H, got \(3, 4, 4, 8\)"):
                op(q, k, v)

else:
    from test_kernels_interpreter import poisoned, quick_interpreter  # noqa: F401, fixtures

    def exactly(edit):
        return {n: x.double() if n in ("bias", "inject") else x for n, x in edit.items()}

    def compare(op, formula, q, k, v, edit, **others):
        """The op within the error budget of the formula; both may return several tensors."""
        got, eager = op(q, k, v, **edit, **others), formula(q, k, v, **edit, **others)
        want = formula(q.double(), k.double(), v.double(), **exactly(edit), **others)
        several = [x if isinstance(x, tuple) else (x,) for x in (got, eager, want)]
        for name, mine, theirs, exact in zip(("out", "lse"), *several):
            check(mine, theirs, exact, q.dtype, name, max(k.shape[2], q.shape[3]))
        return got

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    @pytest.mark.parametrize(
        "names, key_heads, n, keys, d",
        [
            ((), 1, 70, 70, 16),  # whole blocks, the diagonal, a last block of a few keys
            ((), 2, 33, 70, 40),  # more keys than queries
            (("source_row",), 1, 70, 35, 8),  # fewer
            (("source_row", "bias"), 2, 19, 19, 24),
        ],
    )
    def test_attention(names, key_heads, n, keys, d, dtype):
        q, k, v = grouped(2, key_heads, n, keys, d, dtype, n, ("heads inside", "gaps")[n % 2])
        edit = tables(names, 2, n, keys, dtype, 0)
        for is_causal in (False, True):
            both = {"is_causal": is_causal, "return_lse": True}
            out, _ = compare(ops.attention, reference.attention, q, k, v, edit, **both)
            assert torch.equal(out, ops.attention(q, k, v, **edit, is_causal=is_causal))

    def test_attention_hides_keys_after_a_query_to_the_bit():
        """What stands there does not matter, be it NaN."""
        q, k, v = grouped(1, 1, 40, 40, 16, torch.float32, 0)
        want = ops.attention(q, k, v, is_causal=True)
        k[:, :, 20:], v[:, :, 20:] = 100.0, 1e6
        got = ops.attention(q, k, v, is_causal=True)
        assert torch.equal(got[:, :, :20], want[:, :, :20])
        assert not torch.equal(got[:, :, 20:], want[:, :, 20:])

    def test_a_query_that_attends_to_nothing_has_no_denominator():
        q, k, v = grouped(1, 1, 3, 5, 16, torch.float32, 0)
        bias = torch.zeros(S, 1, 3, 5)
        bias[:, :, 1] = -torch.inf
        out, lse = ops.attention(q, k, v, bias=bias, return_lse=True)
        assert (lse[1:, :, 1] == -torch.inf).all() and lse[0].isfinite().all()
        assert (out[1:, :, 1] == 0).all()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    @pytest.mark.parametrize("per_head", [False, True], ids=["one table", "table per head"])
    @pytest.mark.parametrize("saves", [(), ("save", "save_mean")], ids=["edit", "save"])
    @pytest.mark.parametrize(
        "names",
        [
            (),
            ("source_row",),
            ("reweight",),
            ("inject", "token_map", "reweight"),
            ("source_row", "token_map", "blend", "reweight", "bias"),
        ],
        ids="+".join,
    )
    def test_cross_attention_with_fewer_key_heads(names, saves, per_head, dtype):
        q, k, v = grouped(4, 2, 7, 5, 16, dtype, 3)
        edit = tables(names, 4, 7, 5, dtype, 1, per_head)

        def run(op, dtype):
            both = {"save": torch.full((S, 4, 7, 5), NAN, dtype=dtype)}
            both["save_mean"] = torch.zeros(S, 7, 5)
            buffers = {name: both[name] for name in saves}
            exact = exactly(edit) if dtype == torch.float64 else edit
            out = op(q.to(dtype), k.to(dtype), v.to(dtype), **exact, **buffers)
            return {"out": out} | buffers

        got, eager = run(ops.cross_attention, dtype), run(reference.cross_attention, dtype)
        for name, want in run(reference.cross_attention, torch.float64).items():
            check(got[name], eager[name], want.double(), dtype, name, 16)

    def gradients(op, q, k, v, edit, **others):
        """(everything the op returns, gradients of q, k, v and the edit's tables)."""
        named = {n: x for n, x in edit.items() if n in ("blend", "reweight", "token_map")}
        leaves = [x.detach().requires_grad_() for x in (q, k, v, *named.values())]
        out = op(*leaves[:3], **edit | dict(zip(named, leaves[3:])), **others)
        out = out if isinstance(out, tuple) else (out,)
        g = torch.Generator().manual_seed(0)
        upstream = [torch.randn(x.shape, generator=g).to(q.dtype).to(x.dtype) for x in out]
        return *(x.detach() for x in out), *torch.autograd.grad(out, leaves, upstream)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    @pytest.mark.parametrize(
        "op, names, others",
        [
            ("attention", (), {"is_causal": True}),
            ("attention", ("source_row",), {"is_causal": True, "return_lse": True}),
            ("attention", ("source_row", "bias"), {"return_lse": True}),
            ("cross_attention", ("source_row", "token_map", "blend", "reweight"), {}),
        ],
    )
    def test_gradients(op, names, others, dtype):
        """Of lse too; key heads gather over the heads that they serve."""
        q, k, v = grouped(4, 2, 20, 37 if op == "attention" else 9, 16, dtype, 0)
        edit = tables(names, 4, 20, k.shape[2], dtype, 2, per_head=True)
        mine, formula = getattr(ops, op), getattr(reference, op)
        got, eager = (gradients(each, q, k, v, edit, **others) for each in (mine, formula))
        exact = [x.double() for x in (q, k, v)]
        for i, want in enumerate(gradients(formula, *exact, exactly(edit), **others)):
            check(got[i], eager[i], want.double(), dtype, f"result {i}", 4 * 37)

    def test_opcheck():
        q, k, v = grouped(4, 2, 7, 7, 16, torch.float32, 0)
        row, opcheck = torch.tensor([1, 0]), torch.library.opcheck
        op = torch.ops.minisd_kernels
        opcheck(op.attention_lse.default, (q, scattered(k), v, row, *[None] * 3, 0.5, True))
        edit = tables(("blend", "reweight"), 4, 7, 7, torch.float32, 0, per_head=True)
        opcheck(op.cross_attention.default, (q, k, v, row, None, None, *edit.values(), None, 0.5))
        lse = torch.randn(R, 4, 7)
        k, v = (x.repeat_interleave(2, 1) for x in (k, v))
        opcheck(op.attention_backward.default, (q, q, k, v, None, row, None, lse, 0.5, True))

    def test_compiles_to_one_graph():
        q, k, v = grouped(4, 2, 7, 7, 16, torch.float32, 0)

        def block(q, row):
            out, lse = ops.attention(q, k, v, row, is_causal=True, return_lse=True)
            return out + lse[..., None] + ops.cross_attention(q, k, v, source_row=row)

        torch._dynamo.reset()
        compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
        for tracked in (False, True):
            x, row = q.clone().requires_grad_(tracked), torch.tensor([1, 0])
            got, want = compiled(x, row), block(x, row)
            torch.testing.assert_close(got, want, atol=1e-6, rtol=0)
            if tracked:
                got, want = (torch.autograd.grad(y.square().sum(), x)[0] for y in (got, want))
                torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
