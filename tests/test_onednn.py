"""oneDNN in place of torch.nn's layers: the same function, the same state dicts, gradients where
they are asked for."""

import copy

import pytest
import torch
import torch.nn.functional as F
from minisd.engine.onednn import Conv2d, Linear, available, use_onednn
from torch import nn

from minisd import AutoencoderKL, CLIPTextConfig, CLIPTextModel, UNet, UNetConfig, VAEConfig

pytestmark = pytest.mark.skipif(not available(torch.float32), reason="no oneDNN for this processor")
TINY = UNetConfig(
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    block_out_channels=(16, 32),
    layers_per_block=1,
    attention_head_dim=2,
    cross_attention_dim=24,
    norm_num_groups=4,
)


def unet():
    torch.manual_seed(0)
    return UNet(TINY).eval().requires_grad_(False)


def convolutions(model):
    return [module for module in model.modules() if isinstance(module, nn.Conv2d)]


def far(a, b):
    assert a.shape == b.shape
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize(
    "size, kernel, stride, padding",
    [
        ((2, 5, 7, 5), 3, 1, 1),
        ((1, 16, 9, 6), 3, 2, 1),
        ((3, 4, 6, 7), 3, 2, 0),
        ((1, 33, 1, 3), 1, 1, 0),
    ],
)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@torch.no_grad()
def test_a_convolution(size, kernel, stride, padding, bias, layout):
    plain = nn.Conv2d(size[1], 11, kernel, stride, padding, bias=bias).requires_grad_(False)
    ours = use_onednn(copy.deepcopy(plain))
    assert type(ours) is Conv2d
    for _ in range(2):
        x = torch.randn(size).to(memory_format=layout)
        assert far(ours(x), plain(x)) <= 2e-6 and ours.weight.is_mkldnn
    assert ours(x).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("shape", [(3, 24), (2, 5, 24), (2, 3, 5, 24), (1, 24)])
@torch.no_grad()
def test_a_linear_layer(shape):
    for bias in (True, False):
        plain = nn.Linear(24, 13, bias=bias).requires_grad_(False)
        ours = use_onednn(copy.deepcopy(plain))
        assert type(ours) is Linear
        x = torch.randn(*shape[:-1], 48)[..., ::2]  # no stride of 1
        assert far(ours(x), plain(x)) <= 2e-6
    assert (
        far(ours(torch.randn(24, 5).T), plain(torch.randn(24, 5).T)) > 0.1
    )  # the comparison can fail


@torch.no_grad()
def test_whole_models():
    torch.manual_seed(0)
    vae = AutoencoderKL(
        VAEConfig(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4)
    )
    numbers = dict(
        vocab_size=99,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=3,
    )
    text = CLIPTextModel(CLIPTextConfig(**numbers))
    x, z, ids = torch.randn(2, 4, 9, 6), torch.randn(1, 4, 5, 7), torch.randint(0, 99, (2, 77))
    context, t = torch.randn(4, 7, 24), torch.tensor(500)
    for model, call in (
        (unet(), lambda m: m(x, t, context)),
        (vae, lambda m: m.decode(z)),
        (text, lambda m: m(ids)),
    ):
        model = model.eval().requires_grad_(False)
        expected, names = call(model), list(model.state_dict())
        ours = use_onednn(copy.deepcopy(model))
        assert far(call(ours), expected) <= 1e-5 and list(ours.state_dict()) == names
        first = call(ours)
        assert torch.equal(call(ours), first)


@torch.no_grad()
def test_state_dicts_stay_what_they_are():
    model, x, context, t = unet(), torch.randn(1, 4, 8, 8), torch.randn(1, 7, 24), torch.tensor(1)
    before = copy.deepcopy(model.state_dict())
    use_onednn(model)(x, t, context)
    assert any(module.weight.is_mkldnn for module in convolutions(model))
    after = model.state_dict()
    assert list(after) == list(before) and all(
        torch.equal(after[name], before[name]) for name in before
    )

    other = {name: 2 * value for name, value in before.items()}
    model.load_state_dict(other, strict=True)
    plain = unet()
    plain.load_state_dict(other)
    assert far(model(x, t, context), plain(x, t, context)) <= 1e-5
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in plain.parameters())


@torch.no_grad()
def test_dtypes():
    model, x, context, t = unet(), torch.randn(1, 4, 8, 8), torch.randn(1, 7, 24), torch.tensor(1)
    ours = use_onednn(copy.deepcopy(model))
    ours(x, t, context)
    for dtype, bar in ((torch.bfloat16, 0.05), (torch.float64, 1e-12), (torch.float32, 1e-5)):
        got = ours.to(dtype)(x.to(dtype), t, context.to(dtype))
        plain = (
            copy.deepcopy(model).to(torch.bfloat16).to(dtype)
        )  # what the first change left of the weights
        assert got.dtype == dtype and far(got, plain(x.to(dtype), t, context.to(dtype))) <= bar
        assert all(module.weight.is_mkldnn == available(dtype) for module in convolutions(ours))


def test_gradients():
    model, x, t = unet(), torch.randn(1, 4, 8, 8), torch.tensor(1)
    ours = use_onednn(copy.deepcopy(model))
    with torch.no_grad():
        ours(x, t, torch.randn(1, 7, 24))
    grads = []
    for each in (model, ours):
        context = torch.linspace(-1, 1, 7 * 24).view(1, 7, 24).requires_grad_()
        each(x, t, context).square().sum().backward()
        grads.append(context.grad)
    assert grads[0].abs().max() > 0 and far(grads[1], grads[0]) <= 1e-5
    layer = convolutions(ours)[-1]
    assert layer.stays_plain and not layer.weight.is_mkldnn  # not changed to and fro at every step
    weight = use_onednn(nn.Conv2d(3, 4, 1)).weight  # of a model in training
    assert weight.requires_grad and not weight.is_mkldnn


@torch.no_grad()
def test_compile_sees_the_plain_layers():
    model, x, context, t = unet(), torch.randn(1, 4, 8, 8), torch.randn(1, 7, 24), torch.tensor(1)
    ours = use_onednn(copy.deepcopy(model))
    expected = model(x, t, context)
    assert (
        far(torch.compile(ours, backend="eager", fullgraph=True)(x, t, context), expected) <= 1e-5
    )
    torch._dynamo.reset()


@torch.no_grad()
def test_a_training_model_is_left_alone():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 5))
    use_onednn(model)
    model(torch.randn(1, 3, 3, 3))
    assert model[0].weight.requires_grad and not model[0].weight.is_mkldnn
    with torch.enable_grad():
        model(torch.randn(1, 3, 3, 3)).sum().backward()
    assert model[0].weight.grad is not None and model[2].weight.grad is not None
    x = torch.ones(1, 3, 3, 3)
    assert far(model[0](x), F.conv2d(x, model[0].weight, model[0].bias)) <= 1e-6
