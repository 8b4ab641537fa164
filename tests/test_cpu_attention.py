"""minisd_kernels.cpu, the C function: float64 written as loops, bits whatever stands beside a row,
and PyTorch wherever something else than values is asked for."""

import time

import pytest
import torch
import torch.nn.functional as F
from minisd_kernels import cpu
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from bench import harness
from minisd import UNet, UNetConfig
from minisd.models.attention import AttentionEdit, attention

DTYPES = [
    pytest.param(
        dtype,
        marks=pytest.mark.skipif(
            not cpu.computes(dtype), reason="minisd_kernels.cpu was not built, or no AVX-512"
        ),
    )
    for dtype in (torch.float32, torch.bfloat16)
]
needs = DTYPES[0].marks[0]
SHAPES = [  # B, H, N, L, D
    (1, 1, 1, 1, 8),
    (2, 3, 5, 7, 8),
    (1, 2, 49, 129, 40),
    (2, 2, 97, 77, 80),
    (1, 1, 48, 64, 160),
    (1, 2, 100, 500, 16),
    (1, 1, 33, 65, 512),
]


def tensors(B, H, N, L, D, dtype, seed=0, factor=1.0):
    g = torch.Generator().manual_seed(seed)
    return [
        (factor * torch.randn(B, n, H, D, generator=g)).to(dtype).transpose(1, 2) for n in (N, L, L)
    ]


def exact(q, k, v):
    """The formula in float64, a query at a time."""
    q, k, v = q.double(), k.double(), v.double()
    out = torch.empty_like(q)
    for place in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:3])).tolist():
        b, h, n = place
        p = torch.exp(torch.mv(k[b, h], q[b, h, n]) / q.shape[3] ** 0.5 - 50)  # no maximum
        out[b, h, n] = p @ v[b, h] / p.sum()
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("factor", [1.0, 4.0])
def test_against_float64(shape, dtype, factor):
    """Within twice the error of eager PyTorch, in bfloat16 within 0.6 times."""
    q, k, v = tensors(*shape, dtype, factor=factor)
    want = exact(q, k, v)
    eager = torch.softmax(q @ k.mT * shape[4] ** -0.5, -1) @ v
    got = cpu.attention(q, k, v)
    assert got.dtype == dtype and got.transpose(1, 2).is_contiguous()
    error, bar = ((x.double() - want).square().mean().sqrt() for x in (got, eager))
    eps, largest = torch.finfo(dtype).eps, want.abs().max()
    assert error <= max(0.6 * bar if dtype == torch.bfloat16 else 2 * bar, eps * largest / 2)


@needs
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_querys_bits_are_its_own(dtype):
    """Whatever the batch, the other heads and queries, the strides and the number of threads."""
    q, k, v = tensors(3, 4, 150, 501, 24, dtype)
    whole, threads = cpu.attention(q, k, v), torch.get_num_threads()
    for b, h, some in ((0, 0, slice(0, 1)), (2, 3, slice(40, 150)), (1, 2, slice(7, 8))):
        part = cpu.attention(
            q[b : b + 1, h : h + 1, some], *(x[b : b + 1, h : h + 1] for x in (k, v))
        )
        assert torch.equal(part[0, 0], whole[b, h, some])
    assert torch.equal(cpu.attention(*(x.contiguous() for x in (q, k, v))), whole)
    row = torch.tensor([2, 0, 2])
    assert torch.equal(cpu.attention(q[row], k[row], v[row]), whole[row])
    try:
        for n in (1, 2, 3, 7):
            torch.set_num_threads(n)
            assert torch.equal(cpu.attention(q, k, v), whole)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_numbers(dtype):
    """Scores of thousands, equal keys, and a NaN that stays in its row."""
    q, k, v = tensors(1, 1, 50, 70, 16, dtype, factor=100.0)
    want = torch.softmax((q.double() @ k.double().mT) / 4, -1) @ v.double()
    got, eps = cpu.attention(q, k, v), torch.finfo(dtype).eps
    if dtype == torch.float32:  # scores of 1e4 in float32 are 1e-3 from the exact ones
        assert (got - want).abs().max() <= 5e-3 * want.abs().max()
    assert got.isfinite().all()
    for large in (10.0, 300.0):  # scores of 1e7 to 1e10: the largest has it all
        far = [large * x for x in (q, k)]
        one = ((far[0].double() @ far[1].double().mT) / 4).argmax(-1)
        assert torch.equal(cpu.attention(*far, v)[0, 0], v[0, 0, one[0, 0]])
    below = q.abs() * 1e13, -k.abs() * 1e13  # every score is below -1e30
    assert cpu.attention(*below, v).isfinite().all()
    same = k[:, :, :1].expand_as(k).contiguous()
    mean = v.double().mean(2, keepdim=True).expand_as(want)
    assert (cpu.attention(q, same, v) - mean).abs().max() <= 2 * eps * v.abs().max()
    poisoned = q.clone()
    poisoned[0, 0, 3] = float("nan")
    out = cpu.attention(poisoned, k, v)
    assert out[0, 0, 3].isnan().all() and out.isnan().sum() == 16
    assert torch.equal(out[0, 0, 4:], got[0, 0, 4:])
    for infinite in (float("inf"), float("nan")):
        broken = k.clone()
        broken[0, 0, 69, 2] = infinite  # every score of that key is inf, -inf or NaN
        theirs = F.scaled_dot_product_attention(q, broken, v).isfinite().all(-1)
        assert torch.equal(cpu.attention(q, broken, v).isfinite().all(-1), theirs)


class Called(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def chosen(*arguments, **options):
    """Whether minisd takes the C function."""
    with Called() as called:
        attention(*arguments, **options)
    return any("cpu_attention" in name for name in called.names)


@needs
def test_where_it_is_chosen():
    """For values alone: not for gradients, masks, other dtypes, odd widths, autocast."""
    q, k, v = tensors(2, 2, 9, 7, 16, torch.float32)
    assert chosen(q, k, v) and chosen(q, k, v, AttentionEdit(source_row=torch.tensor([1, 0])))
    assert chosen(q, k, v, AttentionEdit(inject_qk=(q, k)))
    assert not chosen(q, k, v, impl="reference")
    assert not chosen(q, k, v, AttentionEdit(bias=torch.zeros(2, 1, 1, 7)))
    assert not chosen(*(x.double() for x in (q, k, v))) and not chosen(q.half(), k.half(), v.half())
    assert not chosen(q[..., :12], k[..., :12], v[..., :12])
    assert not chosen(*(x.mT.contiguous().mT for x in (q, k, v)))
    assert chosen(*tensors(1, 1, 3, 3, 512, torch.float32))  # the VAE's
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not chosen(q, k, v)
    needing = v.clone().requires_grad_()
    assert not chosen(q, k, needing)
    with torch.no_grad():
        assert chosen(q, k, needing)
    attention(q, k, needing).sum().backward()
    assert needing.grad.abs().max() > 0
    with pytest.raises(ValueError, match="which minisd_kernels.cpu.takes would have refused"):
        cpu.attention(q.double(), k.double(), v.double())


@needs
def test_derivatives_graphs_and_fakes():
    q, k, v = tensors(2, 2, 9, 7, 16, torch.float32)
    ones = torch.ones_like(q)
    with pytest.raises(NotImplementedError):  # torch's own; a derivative of 0 would be wrong
        torch.func.jvp(lambda q: attention(q, k, v), (q,), (ones,))
    each = torch.func.vmap(lambda q, k, v: attention(q[None], k[None], v[None])[0])(q, k, v)
    torch.testing.assert_close(each, attention(q, k, v))
    graphs = []
    torch._dynamo.reset()
    backend = lambda graph, inputs: graphs.append(graph.code) or graph.forward
    compiled = torch.compile(attention, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v), attention(q, k, v))
    assert len(graphs) == 1 and "scaled_dot_product_attention" in graphs[0]
    torch._dynamo.reset()
    meta = [x.to("meta") for x in (q, k, v)]
    assert attention(*meta).shape == q.shape
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(x) for x in (q, k, v)]
        strides = attention(*fake).stride()
    assert strides == attention(q, k, v).stride()
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.minisd_kernels.cpu_attention, (q, k, v), test_utils=tests)


@torch.no_grad()
def test_without_it_a_model_gives_the_same(monkeypatch):
    """Where there was no compiler: PyTorch's attention, the same up to the order of sums."""
    torch.manual_seed(0)
    numbers = dict(block_out_channels=(32, 64), attention_head_dim=4, cross_attention_dim=24)
    types = dict(
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    unet = UNet(UNetConfig(**numbers, **types, norm_num_groups=8)).requires_grad_(False)
    x, context = torch.randn(1, 4, 16, 16), torch.randn(2, 7, 24)
    outs = []
    for there in (cpu.computes(torch.float32), False):
        monkeypatch.setattr(cpu, "computes", lambda dtype, there=there: there)
        with Called() as called:
            outs.append(unet(x, torch.tensor(5), context))
        assert any("cpu_attention" in name for name in called.names) == there
    assert (outs[0] - outs[1]).abs().max() <= 1e-5 * outs[1].abs().max()


@needs
def test_no_map_is_in_memory():
    q, k, v = tensors(1, 4, 4096, 4096, 8, torch.float32)
    memory = harness.peak_memory(lambda: cpu.attention(q, k, v), "cpu")
    assert memory is None or memory < 4096 * 4096  # a map of one head has four times as many bytes


@needs
def test_threads_share_the_work():
    """CPU time of the calling thread, the least of some calls: with two threads half of what it is
    with one. Who is done takes the next piece, so where both processors are busy it may be more."""
    q, k, v = tensors(1, 4, 2048, 2048, 40, torch.float32)
    before, spent = torch.get_num_threads(), {1: [], 2: []}
    try:
        for threads in 8 * (1, 2):
            torch.set_num_threads(threads)
            start = time.thread_time()
            cpu.attention(q, k, v)
            spent[threads].append(time.thread_time() - start)
    finally:
        torch.set_num_threads(before)
    assert 0.25 < min(spent[2]) / min(spent[1]) < 0.8
