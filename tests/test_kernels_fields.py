"""bias, kv_row, own_value, tables for single heads, scale, folded values.

The reference against the formula written row by row, head by head; the kernels against the
reference, in the interpreter's session, which test_kernels_interpreter.py starts.
"""

import itertools
import os

import pytest
import torch
from kernel_cases import NAN, S, check, edit_tensors, run_cross, scattered, tensors
from minisd_kernels import ops, reference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
R, H = 3, 2
HIDDEN = float("-inf")


def with_fields(names, heads, n, keys, dtype, seed, joined=2):
    """Random tensors of the fields that are named, and the number of keys that a map then has."""
    g = torch.Generator().manual_seed(seed)
    edit, total = {}, keys * (joined if "kv_row" in names else 1)
    if (
        "bias" in names
    ):  # everything hidden from one query, most from another; for all heads or all queries
        shape = [(1, n), (heads, 1), (heads, n), (1, 1)][seed % 4]
        edit["bias"] = (3 * torch.randn(S, *shape, total, generator=g)).to(dtype)
        edit["bias"][:, :, -1, total // 3 :] = HIDDEN
        if shape[1] > 1:
            edit["bias"][0, :, 0] = HIDDEN
    if "kv_row" in names:
        edit["kv_row"] = torch.randint(
            S, (S, joined), generator=g, dtype=(torch.int64, torch.int32)[seed % 2]
        )
    if "own_value" in names:
        edit["own_value"] = torch.tensor([1.0, 0.0]) if seed % 2 else torch.tensor([False, True])
    for name in ("blend", "reweight"):
        if name in names:
            edit[name] = torch.rand(S, heads, total, generator=g)
    if "source_row" in names:
        edit["source_row"] = torch.randint(S, (S,), generator=g)
    if "token_map" in names:
        edit["token_map"] = torch.rand(S, total, total, generator=g) / total
    return {
        name: scattered(x) if seed % 3 == 0 and x.ndim > 1 else x for name, x in edit.items()
    }, total


def oracle(q, k, v, edit, scale):
    """The formulas for one row and one head at a time, one query at a time, in float64 numbers of
    Python's."""
    first, maps = R - S, {}
    out = torch.empty(q.shape, dtype=torch.float64)

    def softmax_row(query, keys, bias):
        logits = [float(query @ key) * scale + float(b) for key, b in zip(keys, bias)]
        if max(logits) == HIDDEN:
            return torch.zeros(len(logits), dtype=torch.float64)
        weights = torch.tensor(logits, dtype=torch.float64).sub(max(logits)).exp()
        return weights / weights.sum()

    def keys_of(x, row, h):
        if row < first or "kv_row" not in edit:
            return x[row, h]
        return torch.cat([x[first + int(other), h] for other in edit["kv_row"][row - first]])

    for b, h in itertools.product(range(R), range(q.shape[1])):
        keys, rows = keys_of(k, b, h), []
        for n in range(q.shape[2]):
            bias = torch.zeros(len(keys))
            if b >= first and "bias" in edit:
                bias = edit["bias"].expand(S, q.shape[1], q.shape[2], -1)[b - first, h, n]
            rows.append(softmax_row(q[b, h, n], keys, bias))
        maps[b, h] = torch.stack(rows)
    for (b, h), own in maps.items():
        p, s = own, b - first
        if s >= 0:
            if "source_row" in edit:
                p = maps[first + int(edit["source_row"][s]), h]
                if "token_map" in edit:
                    p = p @ edit["token_map"][s].double()
                if "blend" in edit:
                    p = edit["blend"][s, h] * p + (1 - edit["blend"][s, h]) * own
            if "reweight" in edit:
                p = edit["reweight"][s, h] * p
        out[b, h] = p @ keys_of(v, b, h)
        if s >= 0 and "own_value" in edit and edit["own_value"][s]:
            out[b, h] = v[b, h]
    return out


FIELDS = [
    ("bias",),
    ("kv_row",),
    ("own_value",),
    ("bias", "kv_row"),
    ("bias", "source_row"),
    ("kv_row", "source_row"),
    ("bias", "kv_row", "own_value", "source_row"),
    ("bias", "source_row", "token_map", "blend", "reweight"),
    ("source_row", "blend"),
    ("reweight",),
    ("bias", "kv_row", "own_value", "source_row", "token_map", "blend", "reweight"),
]

if not INTERPRETED:

    @pytest.mark.parametrize("seed", range(4))
    @pytest.mark.parametrize("names", FIELDS, ids="+".join)
    def test_the_reference_is_the_formula(names, seed):
        n = 4
        q, k, v = tensors(R, H, n, n, 3, torch.float64, seed)
        edit, _ = with_fields(names, H, n, n, torch.float64, seed)
        got = reference.cross_attention(q, k, v, **edit, scale=0.7)
        torch.testing.assert_close(got, oracle(q, k, v, edit, 0.7), atol=1e-12, rtol=0)
        if not {"token_map", "blend", "reweight"} & set(names):
            assert torch.equal(got, reference.attention(q, k, v, **edit, scale=0.7))

    def test_own_value_is_chosen_not_multiplied():
        """Rows with a NaN in their map, saves included: 0 times NaN would be NaN."""
        q, k, v = tensors(R, H, 4, 4, 3, torch.float64, 0)
        k[1:] = NAN
        save = torch.empty(S, H, 4, 4, dtype=torch.float64)
        out = reference.cross_attention(q, k, v, own_value=torch.ones(S), save=save)
        assert torch.equal(out[1:], v[1:]) and torch.equal(
            save, torch.eye(4).double().expand_as(save)
        )

    def test_the_reference_agrees_with_sdpa_on_a_mask():
        """A query from which every key is hidden too."""
        q, k, v = tensors(S, H, 5, 7, 8, torch.float64, 0)
        bias = torch.randn(S, 1, 5, 7, dtype=torch.float64)
        bias[:, :, 2] = HIDDEN
        want = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=0.3)
        assert (want[:, :, 2] == 0).all()
        torch.testing.assert_close(
            reference.attention(q, k, v, bias=bias, scale=0.3), want, atol=1e-12, rtol=0
        )

else:
    from test_kernels_interpreter import poisoned, quick_interpreter  # noqa: F401, fixtures

    def compare(op, formula, q, k, v, edit, length, **others):
        exact = {name: x.double() if name == "bias" else x for name, x in edit.items()}
        got, eager = op(q, k, v, **edit, **others), formula(q, k, v, **edit, **others)
        want = formula(q.double(), k.double(), v.double(), **exact, **others)
        check(got, eager, want, q.dtype, "out", length)
        return got

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    @pytest.mark.parametrize("seed", range(2))
    @pytest.mark.parametrize("names", FIELDS[:7], ids="+".join)
    def test_attention(names, seed, dtype):
        n, d, scale = ((19, 24, None), (70, 40, 0.05))[seed]
        q, k, v = tensors(R, 1, n, n, d, dtype, seed)
        edit, total = with_fields(names, 1, n, n, dtype, seed)
        got = compare(ops.attention, reference.attention, q, k, v, edit, total, scale=scale)
        assert torch.equal(got[:1], ops.attention(q[:1], k[:1], v[:1], scale=scale)), (
            "a row that is not edited changes"
        )

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    @pytest.mark.parametrize("saves", [(), ("save", "save_mean")], ids=["edit", "save"])
    @pytest.mark.parametrize("seed", range(3))
    @pytest.mark.parametrize(
        "names", [f for f in FIELDS if not {"kv_row", "own_value"} & set(f)], ids="+".join
    )
    def test_cross_attention(names, seed, saves, dtype):
        heads, n, keys, d, scale = ((2, 7, 5, 16, None), (1, 19, 77, 40, 0.05), (2, 3, 33, 8, 1.0))[
            seed
        ]
        q, k, v = tensors(R, heads, n, keys, d, dtype, seed)
        edit, _ = with_fields(names, heads, n, keys, dtype, seed)

        def buffers(dtype):
            both = {
                "save": torch.full((S, heads, n, keys), NAN, dtype=dtype),
                "save_mean": torch.ones(S, n, keys),
            }
            return {name: both[name] for name in saves}

        mine, eager, exact = buffers(dtype), buffers(dtype), buffers(torch.float64)
        out = ops.cross_attention(q, k, v, **edit, **mine, scale=scale)
        want_eager = reference.cross_attention(q, k, v, **edit, **eager, scale=scale)
        double = {name: x.double() if name == "bias" else x for name, x in edit.items()}
        want = reference.cross_attention(
            q.double(), k.double(), v.double(), **double, **exact, scale=scale
        )
        check(out, want_eager, want, dtype, "out", max(keys, d))
        for name in saves:
            check(mine[name], eager[name], exact[name].double(), dtype, name, max(keys, d))

    def write_down_launches(monkeypatch, launched):
        """Append the name of every kernel that is launched to a list."""
        from minisd_kernels.launch import Launch

        call = Launch.__call__

        def counted(self, *tensors):
            launched.append(self.kernel.fn.__name__)
            return call(self, *tensors)

        monkeypatch.setattr(Launch, "__call__", counted)

    def test_launches_are_few(monkeypatch):
        """One for every edit, at the first step and at all others; a mean over heads is another."""
        launched = []
        write_down_launches(monkeypatch, launched)
        q, k, v = tensors(R, 2, 140, 140, 8, torch.float32, 0)
        ops.attention(q, k, v, torch.tensor([0, 0]))
        assert launched == ["attention_kernel"]
        q, k, v = tensors(R, 2, 7, 5, 16, torch.float32, 0)
        refine = edit_tensors(
            "source_row", ("token_map", "blend", "reweight"), 2, 7, 5, torch.float32, 0
        )
        kinds = [{"reweight": refine["reweight"]}, {"source_row": refine["source_row"]}, refine]
        for edit in (*kinds, {**refine, "save": torch.empty(S, 2, 7, 5)}):
            for _ in range(2):
                launched.clear()
                ops.cross_attention(q, k, v, **edit)
                assert launched == ["cross_attention_kernel"]
        launched.clear()
        ops.cross_attention(q, k, v, **refine, save_mean=torch.zeros(S, 7, 5))
        assert launched == ["cross_attention_kernel", "mean_kernel"]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    @pytest.mark.parametrize("names", [(), ("source_row",), FIELDS[7]], ids="+".join)
    def test_long_prompts(names, dtype):
        """Up to 256 keys, two and three prompts one after the other."""
        for keys, saves in ((154, ()), (231, ("save", "save_mean")), (256, ())):
            q, k, v = tensors(R, 1, 9, keys, 16, dtype, keys)
            edit, _ = with_fields(names, 1, 9, keys, dtype, seed=2)
            run_cross(q, k, v, edit, saves)

    def test_what_is_written_by_pointer_counts_up_its_version(monkeypatch):
        """Whoever keeps something by the version of a tensor has to see that a save has changed
        it."""
        q, k, v = tensors(R, 1, 7, 5, 16, torch.float32, 0)
        save, mean = torch.zeros(S, 1, 7, 5), torch.zeros(S, 7, 5)
        read = [x._version for x in (q, k, v)]
        for step in range(1, 3):
            ops.cross_attention(q, k, v, save=save, save_mean=mean)
            assert save._version >= step and mean._version >= step
        assert [x._version for x in (q, k, v)] == read
        with torch.inference_mode():  # such tensors count nothing
            ops.cross_attention(q, k, v, save=torch.zeros(S, 1, 7, 5))
        compiled = torch.compile(
            lambda: ops.cross_attention(q, k, v, save_mean=mean), backend="aot_eager"
        )
        before = mean._version
        compiled()
        assert mean._version > before

    def test_opcheck():
        q, k, v = tensors(R, 1, 7, 7, 16, torch.float32, 0)
        edit, _ = with_fields(
            ("bias", "kv_row", "own_value", "source_row"), 1, 7, 7, torch.float32, 1
        )
        names = ("source_row", "bias", "kv_row", "own_value")
        args = (q, k, v, *(edit[name] for name in names), 0.5, False)
        torch.library.opcheck(torch.ops.minisd_kernels.attention.default, args)
        names = ("source_row", "inject", "token_map", "blend", "reweight", "bias")
        edit, _ = with_fields(names, 1, 7, 7, torch.float32, 1)
        args = (q, k, v, *(edit.get(name) for name in names), 0.5)
        torch.library.opcheck(torch.ops.minisd_kernels.cross_attention.default, args)
        save = torch.zeros(S, 1, 7, 7)
        args = (*args[:-1], save, None, 0.5)
        torch.library.opcheck(torch.ops.minisd_kernels.cross_attention_save.default, args)

    def test_compiles_to_one_graph():
        """Every field, no break, and no recompile when the values change."""
        q, k, v = tensors(R, 1, 9, 9, 16, torch.float32, 0)
        graphs = []

        def counting(graph, inputs):
            graphs.append(graph)
            return graph.forward

        def block(own, cross):
            x = ops.attention(q, k, v, **own, scale=0.5)
            return x + ops.cross_attention(q, k, v, **cross)

        torch._dynamo.reset()
        compiled = torch.compile(block, backend=counting, fullgraph=True)
        for seed in (1, 5):
            own, _ = with_fields(
                ("bias", "kv_row", "own_value", "source_row"), 1, 9, 9, torch.float32, seed
            )
            cross, _ = with_fields(FIELDS[7], 1, 9, 9, torch.float32, seed)
            torch.testing.assert_close(compiled(own, cross), block(own, cross), atol=1e-6, rtol=0)
        assert len(graphs) == 1
