"""The Triton kernels on a GPU, bfloat16 included, against float64; run by `python -m bench.gpu`."""

import pytest
import torch
from kernel_cases import (
    FORMS,
    NAN,
    B,
    S,
    check,
    edit_tensors,
    run_cross,
    sampled_cross_cases,
    tensors,
)
from minisd_kernels import fused, ops, reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """NaN in every output, and in what lies between two launches: a number that no kernel wrote
    shows."""
    for name in ("new_empty", "new_empty_strided"):

        def poison(*args, allocate=getattr(torch.Tensor, name), **kwargs):
            x = allocate(*args, **kwargs)
            return x.fill_(NAN) if x.is_floating_point() else x

        monkeypatch.setattr(torch.Tensor, name, poison)


# One of each form: a compile takes about a second, and the interpreter has seen the others.
CASES = [case for i, case in enumerate(sampled_cross_cases(DTYPES)) if i % 5 == i // 5 % 5]
SIZES = [(4096, 40), (1024, 80), (256, 160), (64, 160), (1000, 8), (97, 48), (500, 64), (77, 256)]


@pytest.mark.parametrize(
    "source, mix, saves, dtype, batch, heads, n, keys, d, layout, arch, seed", CASES
)
def test_cross_attention(source, mix, saves, dtype, batch, heads, n, keys, d, layout, arch, seed):
    """The card that is there picks the tiles, not `arch`."""
    q, k, v = tensors(batch, heads, n, keys, d, dtype, seed, layout, "cuda")
    edit = edit_tensors(source, mix, heads, n, keys, dtype, seed, "cuda")
    run_cross(q, k, v, edit, saves)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n, d", SIZES)
def test_attention(n, d, dtype):
    q, k, v = tensors(B, 2, n, n, d, dtype, seed=n, device="cuda")
    for rows in ([1, 0], [0, 0]):  # the second pair shares a map
        row = torch.tensor(rows, device="cuda")
        exact = reference.attention(q.double(), k.double(), v.double(), row)
        check(
            ops.attention(q, k, v, row),
            reference.attention(q, k, v, row),
            exact,
            dtype,
            "out",
            max(n, d),
        )


def fields(names, heads, n, keys, dtype, seed):
    """Random tensors of the fields that are named; joined keys are twice as many."""
    g = torch.Generator().manual_seed(seed)
    total = keys * (2 if "kv_row" in names else 1)
    bias = (3 * torch.randn(S, heads, n, total, generator=g)).to(dtype)
    bias[:, :, -1, total // 3 :] = bias[0, :, 0] = float("-inf")  # a query that sees nothing
    every = {
        "bias": bias,
        "kv_row": torch.tensor([[1, 0], [1, 1]]),
        "own_value": torch.tensor([0.0, 1.0]),
        "source_row": torch.tensor([1, 0]),
        "token_map": torch.rand(S, total, total, generator=g) / total,
        "blend": torch.rand(S, heads, total, generator=g),
        "reweight": 2 * torch.rand(S, heads, total, generator=g),
    }
    return {name: every[name].cuda() for name in names}


def differences(op, formula, q, k, v, edit, length, leaves=(), **others):
    """What the op returns, and its gradients of q, k, v and the leaves, by the budget."""

    def run(op, q, k, v, edit):
        tracked = {"q": q, "k": k, "v": v} | {name: edit[name] for name in leaves}
        tracked = {name: x.detach().requires_grad_() for name, x in tracked.items()}
        out = op(**edit | tracked, **others)
        out = out if isinstance(out, tuple) else (out,)
        g = torch.Generator().manual_seed(0)
        upstream = [torch.randn(x.shape, generator=g).to(q.dtype).to(x) for x in out]
        grads = torch.autograd.grad(out, list(tracked.values()), upstream)
        return [x.detach() for x in (*out, *grads)]

    exact = {n: x.double() if n in ("bias", "inject") else x for n, x in edit.items()}
    got, eager = run(op, q, k, v, edit), run(formula, q, k, v, edit)
    want = run(formula, q.double(), k.double(), v.double(), exact)
    for i, (mine, theirs, x) in enumerate(zip(got, eager, want)):
        check(mine, theirs, x.double(), q.dtype, f"result {i}", length)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "names, others",
    [
        ((), {}),
        (("source_row",), {}),
        (("bias",), {}),
        (("kv_row",), {"return_lse": True}),
        (("bias", "kv_row", "own_value", "source_row"), {"scale": 0.1}),
        (("source_row",), {"is_causal": True, "return_lse": True}),
    ],
    ids=str,
)
@pytest.mark.parametrize("n, d, key_heads", [(300, 40, 4), (256, 80, 2), (64, 160, 4)])
def test_fields_of_attention_and_its_gradients(n, d, key_heads, names, others, dtype):
    q, _, _ = tensors(B, 4, n, n, d, dtype, 0, device="cuda")
    _, k, v = tensors(B, key_heads, n, n, d, dtype, 1, device="cuda")
    edit = fields(names, 4, n, n, dtype, 0)
    differences(ops.attention, reference.attention, q, k, v, edit, 4 * 2 * n, **others)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("keys, d, key_heads", [(77, 40, 4), (77, 160, 2), (154, 80, 4)])
@pytest.mark.parametrize("names", [("bias",), ("bias", "source_row", "blend", "reweight")], ids=str)
def test_fields_of_cross_attention_and_its_gradients(names, keys, d, key_heads, dtype):
    """A bias, tables for single heads, fewer key heads, more than one prompt."""
    q, _, _ = tensors(B, 4, 100, keys, d, dtype, 0, device="cuda")
    _, k, v = tensors(B, key_heads, 100, keys, d, dtype, 1, device="cuda")
    edit = fields(names, 4, 100, keys, dtype, 0)
    leaves = [name for name in names if name in ("blend", "reweight")]
    differences(ops.cross_attention, reference.cross_attention, q, k, v, edit, 4 * 100 * 2, leaves)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("source, mix", [(s, m) for s, m, saves in FORMS if not saves], ids=str)
def test_gradients_of_every_edit(source, mix, dtype):
    q, k, v = tensors(B, 2, 130, 77, 40, dtype, 0, device="cuda")
    edit = edit_tensors(source, mix, 2, 130, 77, dtype, 2, "cuda")
    leaves = [name for name in edit if name != "source_row"]
    differences(ops.cross_attention, reference.cross_attention, q, k, v, edit, 2 * 130 * 77, leaves)


@pytest.mark.parametrize("keys", [154, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("saves", [(), ("save", "save_mean")], ids=["edit", "save"])
def test_long_prompts(saves, dtype, keys):
    q, k, v = tensors(B, 2, 100, keys, 40, dtype, 0, device="cuda")
    edit = edit_tensors(
        "source_row", ("token_map", "blend", "reweight"), 2, 100, keys, dtype, 0, "cuda"
    )
    run_cross(q, k, v, edit, saves)


@pytest.mark.parametrize("source", ["source_row", "inject"])
@pytest.mark.parametrize("d", [40, 80, 160])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gate_is_a_value(dtype, d, source):
    """A row that takes nothing of a source comes out as without an edit, one that takes all as
    without a blend, to the last bit."""
    q, k, v = tensors(B, 2, 100, 77, d, dtype, 0, device="cuda")
    edit = edit_tensors(source, ("token_map",), 2, 100, 77, dtype, 0, "cuda")
    plain, all_of_it = ops.cross_attention(q, k, v), ops.cross_attention(q, k, v, **edit)
    gate = torch.stack([torch.zeros(77), torch.ones(77)]).cuda()
    for _ in range(2):  # the second launch goes past Triton's
        out = ops.cross_attention(q, k, v, **edit, blend=gate)
        assert torch.equal(out[:-1], plain[:-1]) and torch.equal(out[-1], all_of_it[-1])


def test_a_replayed_cuda_graph_writes_to_the_same_buffers():
    q, k, v = tensors(B, 2, 64, 77, 40, torch.float16, 0, device="cuda")
    edit = edit_tensors("source_row", ("blend",), 2, 64, 77, torch.float16, 0, "cuda")
    mean = torch.zeros(S, 64, 77, device="cuda")
    ops.cross_attention(q, k, v, **edit, save_mean=mean)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.cross_attention(q, k, v, **edit, save_mean=mean)
    for step in range(2):
        edit["blend"].fill_(step)
        mean.zero_()
        graph.replay()
        want_mean = torch.zeros_like(mean)
        want = reference.cross_attention(q, k, v, **edit, save_mean=want_mean)
        torch.testing.assert_close(out, want, atol=4e-3, rtol=0)
        torch.testing.assert_close(mean, want_mean, atol=1e-3, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("C, side", [(320, 64), (640, 9), (1280, 8), (30, 7)])
def test_fused_ops(C, side, dtype):
    torch.manual_seed(0)
    weight, bias = (torch.randn(C, device="cuda").to(dtype) for _ in range(2))
    x = torch.randn(2, C, side, side, device="cuda").to(dtype, memory_format=torch.channels_last)
    rows = torch.randn(2, side * side, 2 * C, device="cuda").to(dtype)
    shift, tokens = torch.randn(1, C, device="cuda").to(dtype), rows[..., :C].contiguous()
    for name, args in (
        ("group_norm", (x, C // 10 if C == 320 else 2, weight, bias)),
        ("group_norm_silu", (x, C // 10 if C == 320 else 2, weight, bias)),
        ("group_norm_silu", (x, C // 10 if C == 320 else 2, weight, bias, 1e-5, shift)),
        ("layer_norm", (tokens, weight, bias)),
        ("geglu", (rows,)),
    ):
        exact = getattr(reference, name)(
            *(a.double() if isinstance(a, torch.Tensor) else a for a in args)
        )
        check(
            getattr(fused, name)(*args),
            getattr(reference, name)(*args),
            exact,
            dtype,
            name,
            x.numel() // 2,
        )
    total, y = fused.add_layer_norm(tokens, tokens.flip(0), weight, bias)
    assert torch.equal(total, tokens + tokens.flip(0))
    exact = reference.layer_norm(total.double(), weight.double(), bias.double())
    check(y, reference.layer_norm(total, weight, bias), exact, dtype, "add_layer_norm", C)
