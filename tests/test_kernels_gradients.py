"""Gradients: the written-out formulas by finite differences in float64, and the kernels by float64.

The kernels run in the interpreter's session, which test_kernels_interpreter.py starts.
"""

import os

import pytest
import torch
from kernel_cases import FORMS, NAN, check, edit_tensors, tensors
from minisd_kernels import dispatch, ops, reference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

B, S, H, N, L, D = 3, 2, 2, 3, 4, 2  # of the formulas


class WrittenOut(torch.autograd.Function):
    """reference.cross_attention whose backward is reference.cross_attention_gradients, saved maps
    as outputs."""

    @staticmethod
    def forward(ctx, saves, source_row, names, q, k, v, *tables):
        edit = dict(zip(names, tables)) | ({} if source_row is None else {"source_row": source_row})
        ctx.save_for_backward(q, k, v, *edit.values())
        ctx.names, ctx.saves = edit.keys(), saves
        save = q.new_empty(S, H, N, L) if "save" in saves else None
        mean = torch.zeros(S, N, L) if "save_mean" in saves else None
        out = reference.cross_attention(q, k, v, **edit, save=save, save_mean=mean)
        if mean is not None:  # the buffer is float32, too short for finite differences
            mean, exact = q.new_zeros(S, N, L), q.new_empty(S, H, N, L)
            reference.cross_attention(q, k, v, **edit, save=exact)
            mean.copy_(exact.mean(1))
        return out, save, mean

    @staticmethod
    def backward(ctx, grad_out, grad_map, grad_mean):
        q, k, v, *tables = ctx.saved_tensors
        edit = dict(zip(ctx.names, tables))
        grads = reference.cross_attention_gradients(
            grad_out, q, k, v, **edit, grad_map=grad_map, grad_mean=grad_mean
        )
        return (
            None,
            None,
            None,
            *(
                grads[name]
                for name in ("q", "k", "v", *(n for n in ctx.names if n != "source_row"))
            ),
        )


def random_case(source, mix, per_head=False, bias=None, seed=0):
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(B, H, n, D, generator=g, dtype=torch.float64) for n in (N, L, L))
    edit = edit_tensors(source, mix, H, N, L, torch.float64, 2 * seed)
    edit = {name: x if name == "source_row" else x.double() for name, x in edit.items()}
    for name in ("blend", "reweight"):
        if per_head and name in edit:
            edit[name] = torch.rand(S, H, L, generator=g, dtype=torch.float64)
    if bias is not None:
        edit["bias"] = torch.randn(S, *bias, L, generator=g, dtype=torch.float64)
    return q, k, v, edit


def gradcheck(q, k, v, edit, saves):
    source_row = edit.pop("source_row", None)
    leaves = [x.requires_grad_() for x in (q, k, v, *edit.values())]
    names = list(edit)

    def function(*leaves):
        return tuple(
            x for x in WrittenOut.apply(saves, source_row, names, *leaves) if x is not None
        )

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


if not INTERPRETED:

    @pytest.mark.parametrize("source, mix, saves", FORMS, ids=str)
    def test_formulas_of_every_form(source, mix, saves):
        gradcheck(*random_case(source, mix), saves)

    @pytest.mark.parametrize("source", ["none", "source_row", "inject"])
    @pytest.mark.parametrize("bias", [(1, 1), (H, 1), (1, N), (H, N)], ids=str)
    def test_formulas_with_bias_and_single_heads(source, bias):
        mix = ("reweight",) if source == "none" else ("token_map", "blend", "reweight")
        gradcheck(*random_case(source, mix, True, bias, seed=1), ("save", "save_mean"))

    @pytest.mark.parametrize("rows", [[0, 0], [1, 0], [1, 1]], ids=str)
    def test_a_row_gathers_over_all_that_take_its_map(rows):
        q, k, v, edit = random_case("source_row", ("blend",))
        edit["source_row"] = torch.tensor(rows)
        gradcheck(q, k, v, edit, ("save",))

else:
    from test_kernels_fields import with_fields
    from test_kernels_interpreter import quick_interpreter  # noqa: F401, a fixture

    EDITS = [(source, mix) for source, mix, saves in FORMS if not saves]
    DIFFERENTIABLE = ("inject", "token_map", "blend", "reweight")

    @pytest.fixture(autouse=True)
    def poisoned(monkeypatch):
        dispatch.KNOWN.clear()
        allocate = torch.Tensor.new_empty_strided
        poison = lambda *args: allocate(*args).fill_(NAN)
        monkeypatch.setattr(torch.Tensor, "new_empty_strided", poison)

    def gradients(op, q, k, v, edit, seed, **others):
        """(the result, and the gradients of q, k, v and the edit, by name) for a random gradient of
        the result."""
        leaves = {"q": q, "k": k, "v": v} | {n: x for n, x in edit.items() if n in DIFFERENTIABLE}
        leaves = {name: x.detach().requires_grad_() for name, x in leaves.items() if x is not None}
        out = op(**(edit | {"q": q, "k": k, "v": v} | leaves), **others)
        upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed)).to(q.dtype)
        grads = torch.autograd.grad(
            out, list(leaves.values()), upstream.to(out.dtype), materialize_grads=True
        )
        return {"out": out.detach()} | dict(zip(leaves, grads))

    def run(op, formula, q, k, v, edit, **others):
        """Every gradient of the op within the error budget of the same gradient by eager
        PyTorch."""
        exact = {
            n: x.double() if n in DIFFERENTIABLE or n == "bias" else x for n, x in edit.items()
        }
        got, eager = (gradients(each, q, k, v, edit, 0, **others) for each in (op, formula))
        want = gradients(formula, q.double(), k.double(), v.double(), exact, 0, **others)
        for name, x in want.items():
            assert got[name].dtype == eager[name].dtype and got[name].shape == x.shape
            # a gradient of a table sums over heads and queries, one of k and v over queries
            length = max(*q.shape[1:], k.shape[2]) * (q.shape[1] if name in DIFFERENTIABLE else 1)
            check(got[name], eager[name], x, q.dtype, f"gradient of {name}", length)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    @pytest.mark.parametrize("source, mix", EDITS, ids=str)
    def test_cross_attention(source, mix, dtype):
        seed, (n, keys, d) = (
            len(mix),
            [(7, 77, 40), (33, 5, 16), (16, 20, 8), (1, 77, 24)][len(mix)],
        )
        q, k, v = tensors(3, 1, n, keys, d, dtype, seed, layout=("heads inside", "gaps")[seed % 2])
        edit = edit_tensors(source, mix, 1, n, keys, dtype, seed)
        run(ops.cross_attention, reference.cross_attention, q, k, v, edit)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    @pytest.mark.parametrize("rows", [None, [0, 0], [1, 0], [1, 1, 1]], ids=str)
    def test_attention(rows, dtype):
        """More keys than cross_attention takes; rows that gather from many, from each other, from
        nobody."""
        q, k, v = tensors(4, 1, 20, 140, 40, dtype, 0)
        edit = {} if rows is None else {"source_row": torch.tensor(rows)}
        run(ops.attention, reference.attention, q, k, v, edit)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    @pytest.mark.parametrize(
        "names",
        [("bias",), ("kv_row",), ("bias", "kv_row", "own_value", "source_row")],
        ids="+".join,
    )
    def test_attention_with_other_fields(names, dtype):
        """Hidden keys, a query that attends to nothing; rows whose keys and values serve
        several."""
        q, k, v = tensors(3, 1, 12, 12, 24, dtype, 0)
        edit, _ = with_fields(names, 1, 12, 12, dtype, seed=1)
        run(ops.attention, reference.attention, q, k, v, edit, scale=0.3)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    def test_cross_attention_with_other_fields(dtype):
        """A bias, tables for single heads."""
        q, k, v = tensors(3, 2, 7, 20, 16, dtype, 0)
        edit, _ = with_fields(
            ("bias", "source_row", "token_map", "blend", "reweight"), 2, 7, 20, dtype, seed=2
        )
        run(ops.cross_attention, reference.cross_attention, q, k, v, edit)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    @pytest.mark.parametrize("source, mix", EDITS, ids=str)
    def test_edited_map(source, mix, dtype):
        """The map that a save would hold, and its gradients: recomputed, not kept."""
        q, k, v = tensors(S, 2, 7, 5, 16, dtype, 1)
        edit = edit_tensors(source, mix, 2, 7, 5, dtype, 2)

        def formula(q, k, v, **edit):
            save = q.new_empty(S, 2, 7, 5)
            identity = torch.eye(5, dtype=q.dtype).expand(
                S, 2, 5, 5
            )  # P' @ 1 carries gradients, a buffer none
            out = reference.cross_attention(q, k, identity, **edit, save=save)
            assert torch.equal(out, save)
            return out + 0 * v.sum()

        def op(q, k, v, **edit):
            return ops.edited_map(q, k, **edit) + 0 * v.sum()

        run(op, formula, q, k, v, edit)

    def test_memory_grows_with_the_tokens_not_with_their_square(monkeypatch):
        """What is kept for the backward pass, and what it allocates: nothing of the size of a
        map."""
        n, d, sizes = 160, 8, []
        for name in ("new_empty", "new_empty_strided"):
            allocate = getattr(torch.Tensor, name)

            def counted(*args, allocate=allocate, **kwargs):
                x = allocate(*args, **kwargs)
                sizes.append(x.numel())
                return x

            monkeypatch.setattr(torch.Tensor, name, counted)
        q, k, v = (x.requires_grad_() for x in tensors(2, 1, n, n, d, torch.float32, 0))
        out = ops.attention(q, k, v, torch.tensor([0, 0]))
        sizes += [x.numel() for x in out.grad_fn.saved_tensors if x is not None]
        out.sum().backward()
        assert len(sizes) >= 9 and max(sizes) == 2 * n * d < n * n

    def test_what_has_no_gradient_is_refused():
        q, k, v = (x.requires_grad_() for x in tensors(2, 1, 7, 5, 16, torch.float32, 0))
        out = ops.cross_attention(q, k, v)
        with pytest.raises(RuntimeError, match="no second derivatives, .* first; use impl='sdpa'"):
            torch.autograd.grad(out.sum(), q, create_graph=True)
        bias = torch.zeros(1, 1, 1, 5, requires_grad=True)
        with pytest.raises(
            RuntimeError, match="bias: the Triton kernels have no gradient of it; use impl='sdpa'"
        ):
            ops.edited_map(q, k, bias=bias).sum().backward()

    def test_compiles_to_one_graph(monkeypatch):
        """Forward and backward, fullgraph; no recompile when the values change."""
        monkeypatch.undo()
        q, k, v = tensors(3, 1, 7, 5, 16, torch.float32, 0)
        edit = edit_tensors(
            "source_row", ("token_map", "blend", "reweight"), 1, 7, 5, torch.float32, 0
        )
        torch._dynamo.reset()
        graphs = []

        def counting(graph, inputs):
            graphs.append(graph)
            return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

        def block(q, k, v, **edit):
            return ops.cross_attention(q * 2, k, v, **edit) + ops.attention(
                q, k, v, edit["source_row"]
            )

        compiled = torch.compile(block, backend=counting, fullgraph=True)
        for step in range(2):
            edit["blend"] = torch.full_like(edit["blend"], step)
            got, want = (gradients(each, q, k, v, edit, 0) for each in (compiled, block))
            for name, x in want.items():
                torch.testing.assert_close(got[name], x, atol=1e-5, rtol=1e-5)
        assert len(graphs) == 1
