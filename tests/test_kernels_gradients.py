"""Gradients: the written-out formulas of reference.py by finite differences in float64."""

import pytest
import torch
from kernel_cases import FORMS, edit_tensors
from minisd_kernels import reference

B, S, H, N, L, D = 3, 2, 2, 3, 4, 2


class WrittenOut(torch.autograd.Function):
    """reference.cross_attention whose backward is reference.cross_attention_gradients, saved maps as outputs."""

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
