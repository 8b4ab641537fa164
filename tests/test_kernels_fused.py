"""GroupNorm + SiLU, LayerNorm and GEGLU: refusals here, the kernels in the interpreter, whose
session test_kernels_interpreter.py starts.
"""

import os

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import NAN, check
from minisd_kernels import dispatch, fused, reference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def parameters(channels, dtype=torch.float32):
    return torch.randn(channels).to(dtype), torch.randn(channels).to(dtype)


def image(*shape, dtype=torch.float32):
    return torch.randn(*shape).to(dtype, memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "call, match",
    [
        (
            lambda: fused.group_norm_silu(torch.zeros(2, 8, 4), 2, *parameters(8)),
            r"expected \(batch, .* \(2, 8, 4\)",
        ),
        (lambda: fused.group_norm_silu(image(2, 8, 0, 4), 2, *parameters(8)), "none of them 0"),
        (
            lambda: fused.group_norm_silu(image(2, 8, 4, 4), 3, *parameters(8)),
            "a divisor of the 8 channels, got 3",
        ),
        (
            lambda: fused.group_norm_silu(torch.zeros(2, 8, 4, 4), 2, *parameters(8)),
            "expected channels_last memory",
        ),
        (
            lambda: fused.group_norm_silu(image(2, 8, 4, 4), 2, *parameters(4)),
            r"weight: .* \(8,\), got \(4,\)",
        ),
        (
            lambda: fused.group_norm_silu(image(2, 8, 4, 4).double(), 2, *parameters(8)),
            "x: .* got torch.float64",
        ),
        (
            lambda: fused.layer_norm(torch.zeros(4, 8).mT, *parameters(4)),
            "x: expected contiguous memory",
        ),
        (lambda: fused.layer_norm(torch.zeros(4, 0), *parameters(0)), "none of them 0"),
        (
            lambda: fused.layer_norm(torch.zeros(1, 16385), *parameters(16385)),
            "at most 16384 channels, got 16385",
        ),
        (
            lambda: fused.layer_norm(torch.zeros(4, 8), *[p.double() for p in parameters(8)]),
            "weight: .* torch.float64",
        ),
        (
            lambda: fused.layer_norm(torch.zeros(4, 8).to("meta"), *parameters(8)),
            "on meta like x, got cpu",
        ),
        (
            lambda: fused.add_layer_norm(torch.zeros(4, 8), torch.zeros(2, 8), *parameters(8)),
            r"h: expected contiguous \(4, 8\), .* got \(2, 8\)",
        ),
        (
            lambda: fused.add_layer_norm(
                torch.zeros(4, 8), torch.zeros(4, 8).half(), *parameters(8)
            ),
            "h: expected .*float32, like x, got .*float16",
        ),
        (
            lambda: fused.add_layer_norm(torch.zeros(8, 8), torch.zeros(8, 8).mT, *parameters(8)),
            r"h: .* strides \(1, 8\)",
        ),
        (
            lambda: fused.group_norm(image(2, 8, 4, 4), 2, *parameters(8), shift=torch.zeros(8)),
            r"shift: expected contiguous rows of 8 channels, .* got \(8,\)",
        ),
        (
            lambda: fused.group_norm_silu(
                image(2, 8, 4, 4), 2, *parameters(8), shift=torch.zeros(3, 8)
            ),
            r"shift: .* as many as divide the 2 images, got \(3, 8\)",
        ),
        (
            lambda: fused.group_norm(
                image(2, 8, 4, 4), 2, *parameters(8), shift=torch.zeros(8, 2).mT
            ),
            r"shift: .* got \(2, 8\), \(1, 2\)",
        ),
        (
            lambda: fused.group_norm(
                image(2, 8, 4, 4), 2, *parameters(8), shift=torch.zeros(1, 8).double()
            ),
            "shift: .* got torch.float64",
        ),
        (lambda: fused.geglu(torch.zeros(4, 7)), "expected an even last dimension, got 7"),
        (lambda: fused.geglu(torch.zeros(4, 8, 2)[..., 0]), "expected contiguous memory"),
    ],
)
def test_bad_tensors_are_refused(call, match):
    with pytest.raises(ValueError, match=match):
        call()


def test_gradients_are_refused():
    x, (weight, bias) = torch.zeros(1, 8, 2, 2), parameters(8)
    for call in (
        lambda: fused.group_norm_silu(image(1, 8, 2, 2).requires_grad_(), 2, weight, bias),
        lambda: fused.layer_norm(x.flatten(1)[:, :8].contiguous(), weight.requires_grad_(), bias),
        lambda: fused.add_layer_norm(
            torch.zeros(2, 8), torch.zeros(2, 8, requires_grad=True), *parameters(8)
        ),
        lambda: fused.group_norm(
            image(1, 8, 2, 2), 2, *parameters(8), shift=torch.zeros(1, 8, requires_grad=True)
        ),
        lambda: fused.geglu(torch.zeros(2, 8, requires_grad=True)),
    ):
        with pytest.raises(RuntimeError, match="no backward; torch.nn.functional has"):
            call()


def test_fake_kernels_promise_the_layout_that_is_returned():
    x, parts = image(2, 8, 3, 5).to("meta"), [p.to("meta") for p in parameters(8)]
    assert fused.group_norm_silu(x, 2, *parts).stride() == x.stride()
    assert fused.geglu(torch.zeros(3, 5, 8, device="meta")).shape == (3, 5, 4)


if INTERPRETED:
    from minisd_kernels import norms

    DTYPES = (torch.float32, torch.float16)

    @pytest.fixture(autouse=True)
    def poisoned(monkeypatch):
        """NaN in every output and in every buffer between the kernels."""
        for name in ("empty_like", "empty"):
            allocate = getattr(torch, name)
            monkeypatch.setattr(
                torch, name, lambda *a, allocate=allocate, **k: allocate(*a, **k).fill_(NAN)
            )
        new_empty = torch.Tensor.new_empty
        monkeypatch.setattr(
            torch.Tensor, "new_empty", lambda *a, **k: new_empty(*a, **k).fill_(NAN)
        )

    def run(name, x, *args, torch_op):
        """Against float64 within twice the error of PyTorch's own op."""
        exact = [a.double() if isinstance(a, torch.Tensor) else a for a in args]
        compare(
            name,
            x.dtype,
            getattr(fused, name)(x, *args),
            torch_op(x, *args),
            getattr(reference, name)(x.double(), *exact),
        )

    def compare(name, dtype, got, plain, want):
        assert got.dtype == dtype and got.shape == want.shape
        check(got, plain, want, dtype, name)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize(
        "shape, groups, offset",
        [
            ((1, 320, 3, 5), 32, 0),  # 10 channels a group
            ((1, 64, 16, 9), 32, 3),  # more than one block of positions, the last one short
            ((2, 30, 8, 8), 3, 0),
            ((2, 7, 1, 1), 7, 0),  # one number in a group
            ((1, 100, 9, 8), 1, -2),
            ((1, 2, 65, 64), 2, 100),  # more blocks than one tile of them; mean far from zero
        ],
        ids=str,
    )
    @pytest.mark.parametrize("silu", [False, True])
    def test_group_norm(shape, groups, offset, dtype, silu, monkeypatch):
        """By the kernels that combine blocks of positions, whatever the size."""
        monkeypatch.setattr(norms, "SHORT", 0)
        x = image_of(shape, offset, dtype)
        launched = run_group_norm(monkeypatch, x, groups, silu)
        assert launched == ["moments_kernel", "group_kernel", "apply_kernel"]

    @pytest.mark.parametrize(
        "dtype, silu",
        [(torch.float32, False), (torch.float16, True), (torch.bfloat16, True)],
        ids=str,
    )
    @pytest.mark.parametrize(
        "shape, groups, offset",
        [
            ((2, 20, 16, 16), 2, 0),
            ((1, 40, 1, 257), 2, 3),  # one position more than a power of 2
            ((2, 60, 5, 7), 2, 100),  # mean far from zero
            ((1, 80, 16, 16), 2, 0),
            ((2, 120, 8, 8), 2, -2),
            ((1, 160, 16, 16), 2, 0),  # more than one tile
            ((1, 64, 32, 32), 1, 1),  # the longest
            ((1, 128, 3, 3), 1, 1),  # the widest
            ((3, 20, 1, 1), 2, 0),  # one position
            ((2, 7, 1, 1), 7, 0),  # one number
        ],
        ids=str,
    )
    def test_group_norm_in_one_launch(shape, groups, offset, dtype, silu, monkeypatch):
        x = image_of(shape, offset, dtype)
        assert run_group_norm(monkeypatch, x, groups, silu) == ["group_norm_kernel"]

    @pytest.mark.parametrize("shape", [(1, 2, 25, 41), (1, 129, 2, 2)], ids=str)
    def test_a_longer_or_wider_group_takes_three_launches(shape, monkeypatch):
        """Of one position more than 1024, or one channel more than 128."""
        x = image_of(shape, 0, torch.float32)
        assert len(run_group_norm(monkeypatch, x, 1, True)) == 3

    @pytest.mark.parametrize("dtype", (*DTYPES, torch.bfloat16), ids=str)
    @pytest.mark.parametrize("rows", [1, 2, 4])
    @pytest.mark.parametrize("short", [0, 1024])
    def test_group_norm_of_what_is_shifted(short, rows, dtype, monkeypatch):
        """Row b % rows of a part of a wider table goes to image b, in one launch and in three."""
        monkeypatch.setattr(norms, "SHORT", short)
        for shape, groups in (((4, 60, 13, 7), 6), ((4, 7, 1, 1), 7), ((4, 33, 3, 2), 1)):
            x = image_of(shape, -3, dtype)
            shift = (torch.randn(rows, 100) * 4).to(dtype)[:, 21 : 21 + shape[1]]
            compare_shifted(x, groups, shift)

    def compare_shifted(x, groups, shift):
        dtype, rows, parts = x.dtype, len(shift), parameters(x.shape[1], x.dtype)

        def torch_op(x, groups, weight, bias, eps, shift):
            x = x + shift.repeat(len(x) // rows, 1)[:, :, None, None]
            return F.silu(F.group_norm(x, groups, weight, bias, eps))

        arguments = x, groups, *parts, 1e-5, shift
        dispatch.KNOWN.clear()
        exact = reference.group_norm_silu(
            *(y.double() if torch.is_tensor(y) else y for y in arguments)
        )
        got = fused.group_norm_silu(*arguments)
        compare("group_norm_silu", dtype, got, torch_op(*arguments), exact)

    def test_one_number_less_its_mean_is_nothing():
        """Whatever was added to it."""
        x, shift = image(2, 7, 1, 1), torch.randn(1, 7) * 1e4
        weight, bias = parameters(7)
        assert torch.equal(fused.group_norm(x, 7, weight, bias, 1e-5, shift)[0, :, 0, 0], bias)

    def image_of(shape, offset, dtype):
        """Channels of different variance, in channels_last memory."""
        torch.manual_seed(0)
        x = (image(*shape) * torch.linspace(0.1, 3, shape[1])[:, None, None] + offset).to(dtype)
        assert x.is_contiguous(memory_format=torch.channels_last)
        return x

    def run_group_norm(monkeypatch, x, groups, silu):
        """Compare with float64; the names of the kernels that are launched."""
        dispatch.KNOWN.clear()

        def torch_op(x, groups, weight, bias, eps):
            y = F.group_norm(x, groups, weight, bias, eps)
            return F.silu(y) if silu else y

        name = "group_norm_silu" if silu else "group_norm"
        weight, bias = parameters(x.shape[1], x.dtype)
        run(name, x, groups, weight, bias, 1e-5, torch_op=torch_op)
        launched, launch = [], norms.Launch.__call__
        monkeypatch.setattr(
            norms.Launch,
            "__call__",
            lambda self, *args: launched.append(self.kernel.__name__) or launch(self, *args),
        )
        assert getattr(fused, name)(x, groups, weight, bias).stride() == x.stride()
        return launched

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize(
        "shape", [(3, 5, 320), (1, 1), (2, 3, 1000), (7, 48), (5, 1280)], ids=str
    )
    def test_layer_norm(shape, dtype):
        torch.manual_seed(0)
        x = (torch.randn(shape) * 3 + 5).to(dtype)

        def torch_op(x, weight, bias, eps):
            return F.layer_norm(x, x.shape[-1:], weight, bias, eps)

        run("layer_norm", x, *parameters(shape[-1], dtype), 1e-5, torch_op=torch_op)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)  # the interpreter does not round bfloat16
    @pytest.mark.parametrize(
        "shape", [(3, 5, 320), (1, 1), (2, 3, 1000), (7, 48), (5, 1280)], ids=str
    )
    def test_the_sum_and_its_layer_norm(shape, dtype):
        """The sum as torch's and the norm as that of the sum, to the last bit."""
        torch.manual_seed(0)
        x, h = ((torch.randn(shape) * 3 + 5).to(dtype) for _ in range(2))
        parts, kept = parameters(shape[-1], dtype), (x.clone(), h.clone())
        total, y = fused.add_layer_norm(x, h, *parts)
        assert torch.equal(total, x + h) and torch.equal(y, fused.layer_norm(x + h, *parts))
        assert torch.equal(x, kept[0]) and torch.equal(h, kept[1])

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("shape", [(2, 17, 320), (1, 2), (3, 1, 514)], ids=str)
    def test_geglu(shape, dtype):
        torch.manual_seed(0)

        def torch_op(x):
            h, gate = x.chunk(2, dim=-1)
            return h * F.gelu(gate)

        run("geglu", (torch.randn(shape) * 3).to(dtype), torch_op=torch_op)

    def test_opcheck_and_compile():
        x, parts = image(2, 8, 3, 5), parameters(8)
        op = torch.ops.minisd_kernels
        torch.library.opcheck(op.group_norm.default, (x, *parts, None, 2, 1e-5))
        torch.library.opcheck(op.group_norm_silu.default, (x, *parts, torch.ones(1, 8), 2, 1e-5))
        rows = torch.randn(10, 8)
        torch.library.opcheck(op.layer_norm.default, (rows, *parts, 1e-5))
        torch.library.opcheck(op.add_layer_norm.default, (rows, rows + 1, *parts, 1e-5))
        torch.library.opcheck(op.geglu.default, (torch.randn(3, 8),))

        def block(x):
            y = fused.group_norm_silu(x, 2, *parts).permute(0, 2, 3, 1).contiguous()
            return fused.geglu(fused.layer_norm(y, *parts))

        compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), block(x))

    @torch.no_grad()
    def test_a_model_on_a_card_takes_them(monkeypatch):
        """The UNet of minisd as if its tensors were on a card: the same values by the kernels."""
        from minisd import UNet, UNetConfig
        from minisd.models import ops

        torch.manual_seed(0)
        types = dict(
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        )
        numbers = dict(block_out_channels=(16, 32), layers_per_block=1, attention_head_dim=2)
        unet = UNet(UNetConfig(**types, **numbers, cross_attention_dim=24, norm_num_groups=4))
        for p in unet.requires_grad_(False).to(memory_format=torch.channels_last).parameters():
            p.uniform_(-0.3, 0.3)  # fresh norms would hide what is left out
        x, context = torch.randn(2, 4, 8, 6), torch.randn(4, 7, 24)
        one_time = x[:1], torch.tensor(5), context[:2]
        two_times = x, torch.tensor([5, 700]), context
        table = unet.prepare_times(torch.tensor([5, 700]))
        by_columns = x, table.t().contiguous().t(), context
        plain = [unet(*arguments) for arguments in (one_time, two_times)]
        taken, shifted = [], []

        def watch(owner, name):
            call = getattr(owner, name)

            def watched(*args):
                taken.append(name)
                shifted.extend(y for y in args[5:] if y is not None)
                return call(*args)

            monkeypatch.setattr(owner, name, watched)

        for name in ("group_norm", "group_norm_silu", "layer_norm", "add_layer_norm", "geglu"):
            watch(fused, name)
        watch(ops, "pointwise")
        monkeypatch.setattr(ops, "HALF", (torch.float32,))
        monkeypatch.setattr(ops, "is_on_card", lambda x: True)
        monkeypatch.setattr(ops, "onednn_computes", lambda dtype: False)
        for arguments, want in zip((one_time, two_times), plain):
            del taken[:], shifted[:]
            torch.testing.assert_close(unet(*arguments), want, atol=1e-5, rtol=1e-4)
            blocks, resnets, shortcuts = 4, 8, 5
            assert {name: taken.count(name) for name in set(taken)} == {
                "group_norm": blocks,
                "group_norm_silu": 2 * resnets + 1,
                "layer_norm": blocks,
                "add_layer_norm": 2 * blocks,
                "geglu": blocks,
                "pointwise": 2 * blocks + shortcuts,
            }
            assert [len(y) for y in shifted] == [len(arguments[0])] * resnets
        torch.testing.assert_close(unet(*by_columns), plain[1], atol=1e-5, rtol=1e-4)
