"""The Triton kernels on a GPU, bfloat16 included, against float64; run by `python -m bench.gpu`."""

import pytest
import torch
from kernel_cases import NAN, B, S, check, edit_tensors, run_cross, sampled_cross_cases, tensors
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
    allocate = torch.Tensor.new_empty

    def poison(*args, **kwargs):
        x = allocate(*args, **kwargs)
        return x.fill_(NAN) if x.is_floating_point() else x

    monkeypatch.setattr(torch.Tensor, "new_empty", poison)


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
    for name, args in (
        ("group_norm", (x, C // 10 if C == 320 else 2, weight, bias)),
        ("group_norm_silu", (x, C // 10 if C == 320 else 2, weight, bias)),
        ("layer_norm", (rows[..., :C].contiguous(), weight, bias)),
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
