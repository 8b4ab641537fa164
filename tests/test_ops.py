"""Layers as functions that choose their code at the call: the values of the layers themselves, and
nothing done to the models."""

import copy
import itertools
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from minisd import AutoencoderKL, CLIPTextConfig, CLIPTextModel, UNet, UNetConfig, VAEConfig
from minisd.models import convolutions, ops

onednn = pytest.mark.skipif(
    not ops.onednn_computes(torch.float32), reason="no oneDNN for this processor"
)
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
    return UNet(TINY).eval().requires_grad_(False).to(memory_format=torch.channels_last)


def far(a, b):
    assert a.shape == b.shape
    return ((a - b).abs().max() / b.abs().max()).item()


class Called(TorchDispatchMode):
    """The names of the operators that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))

    def product(self):
        """Whether it was oneDNN's product."""
        return any("_linear_pointwise" in name for name in self.names)


def by_product(function, *arguments):
    with Called() as called:
        out = function(*arguments)
    return out, called.product()


@onednn
@pytest.mark.parametrize(
    "size, kernel, stride, padding, dilation, product",
    [
        ((2, 5, 7, 5), 3, 1, 1, 1, True),
        ((1, 16, 9, 6), 3, 2, 1, 1, False),
        ((3, 4, 6, 7), 3, 2, 0, 1, False),
        ((1, 33, 1, 3), 1, 1, 0, 1, True),
        ((2, 8, 40, 40), 3, 1, 1, 1, False),
        ((2, 8, 40, 40), 1, 1, 0, 1, True),
        ((1, 4, 9, 9), 3, 1, 2, 2, False),
        ((1, 4, 1, 1), 3, 1, 1, 1, True),
        ((1, 4, 5, 5), 1, 2, 0, 1, False),
    ],
)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@torch.no_grad()
def test_a_convolution(size, kernel, stride, padding, dilation, product, bias, layout):
    """By windows where there are few positions, as a linear layer where it is 1x1."""
    torch.manual_seed(0)
    layer = nn.Conv2d(size[1], 160, kernel, stride, padding, dilation, bias=bias)
    layer.requires_grad_(False).to(memory_format=torch.channels_last)
    weight = layer.weight
    before = weight.clone()
    for _ in range(2):
        x = torch.randn(size).to(memory_format=layout)
        exact = F.conv2d(
            x.double(),
            weight.double(),
            *[layer.bias.double() if bias else None],
            stride,
            padding,
            dilation,
        )
        out, chosen = by_product(ops.conv2d, layer, x)
        assert far(out.double(), exact) <= 2e-6 and chosen == product
        assert out.is_contiguous(memory_format=torch.channels_last)
    assert layer.weight is weight and torch.equal(weight, before)


@torch.no_grad()
def test_windows():
    x = torch.randn(2, 3, 5, 4)
    windows = convolutions.windows_3x3(x)
    padded = F.pad(x, (1, 1, 1, 1))
    for b, i, j in ((0, 0, 0), (1, 4, 3), (1, 2, 1)):
        window = padded[b, :, i : i + 3, j : j + 3]  # (C, 3, 3)
        assert torch.equal(windows[b, i, j], window.permute(1, 2, 0).flatten())


@onednn
@pytest.mark.parametrize("change", [{"groups": 2}, {"padding_mode": "reflect"}])
@torch.no_grad()
def test_other_convolutions_are_called_as_they_are(change):
    layer = nn.Conv2d(4, 6, 3, padding=1, **change).to(memory_format=torch.channels_last)
    x = torch.randn(1, 4, 5, 6)
    out, product = by_product(ops.conv2d, layer.requires_grad_(False), x)
    assert torch.equal(out, layer(x)) and not product


@onednn
@pytest.mark.parametrize("shape", [(3, 24), (2, 5, 24), (2, 3, 5, 24), (1, 24)])
@torch.no_grad()
def test_a_linear_layer(shape):
    torch.manual_seed(0)
    for bias in (True, False):
        layer = nn.Linear(24, 13, bias=bias).requires_grad_(False)
        x = torch.randn(*shape[:-1], 48)[..., ::2]  # no stride of 1
        out, product = by_product(ops.linear, layer, x)
        assert far(out, layer(x)) <= 2e-6 and product
    x = torch.randn(24, 5)
    assert far(ops.linear(layer, x.T), layer(torch.randn(24, 5).T)) > 0.1  # can fail


@torch.no_grad()
def test_whole_models(monkeypatch):
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
        model = model.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        before = {name: (p, p.clone()) for name, p in model.named_parameters()}
        first, names = call(model), list(model.state_dict())
        with monkeypatch.context() as patch:
            patch.setattr(ops, "by_onednn", lambda layer, kind, x: False)
            assert far(first, call(model)) <= 1e-5
        assert torch.equal(call(model), first) and list(model.state_dict()) == names
        for name, p in model.named_parameters():
            assert p is before[name][0] and torch.equal(p, before[name][1])


@torch.no_grad()
def test_new_values_are_used_at_once():
    model, x, context, t = unet(), torch.randn(1, 4, 8, 8), torch.randn(1, 7, 24), torch.tensor(1)
    before = copy.deepcopy(model.state_dict())
    model(x, t, context)
    other = {name: 2 * value for name, value in before.items()}
    model.load_state_dict(other, strict=True)
    fresh = unet()
    fresh.load_state_dict(other)
    assert torch.equal(model(x, t, context), fresh(x, t, context))


@torch.no_grad()
def test_dtypes():
    model, x, context, t = unet(), torch.randn(1, 4, 8, 8), torch.randn(1, 7, 24), torch.tensor(1)
    ours = copy.deepcopy(model)
    ours(x, t, context)
    for dtype, bar in ((torch.bfloat16, 0.05), (torch.float64, 1e-12), (torch.float32, 1e-5)):
        (got, product) = by_product(ours.to(dtype), x.to(dtype), t, context.to(dtype))
        # what the first change left of the weights, in memory that no product of ours reads
        plain = copy.deepcopy(model).to(torch.bfloat16).to(dtype)
        with torch.autocast("cpu", enabled=False), torch.enable_grad():
            plain.requires_grad_(True)
            expected = plain(x.to(dtype), t, context.to(dtype)).detach()
        assert got.dtype == dtype and far(got, expected) <= bar
        assert product == ops.onednn_computes(dtype)


def test_gradients():
    """Of the inputs and of every parameter, the same after a run without them as before."""
    model, x, t = unet(), torch.randn(1, 4, 8, 8), torch.tensor(1)
    with torch.no_grad():
        model(x, t, torch.randn(1, 7, 24))
    grads = []
    for each in (unet(), model):
        each.requires_grad_(True)
        context = torch.linspace(-1, 1, 7 * 24).view(1, 7, 24).requires_grad_()
        out, product = by_product(lambda c, each=each: each(x, t, c), context)
        assert not product
        out.square().sum().backward()
        grads.append([context.grad, *(p.grad for p in each.parameters())])
    for ours, fresh in zip(*reversed(grads), strict=True):
        assert ours.abs().max() > 0 and torch.equal(ours, fresh)


def test_gradients_of_the_biases_alone():
    """Where only they are trained, the first layers have no other that asks for a gradient."""
    model, grads = unet(), []
    arguments = torch.randn(2, 4, 40, 32), torch.tensor(5), torch.randn(2, 7, 24)
    for trained in (lambda name: name.endswith("bias"), lambda name: True):
        for name, p in model.named_parameters():
            p.requires_grad_(trained(name)).grad = None
        model(*arguments).square().sum().backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if n.endswith("bias")})
    some, all_of_them = grads
    for name, grad in some.items():
        torch.testing.assert_close(grad, all_of_them[name], atol=1e-3, rtol=1e-4, msg=name)


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
def test_a_1x1_convolution_on_a_card(bias, monkeypatch):
    """A product of views for inference, whatever the sizes; else, and in float32, as it is."""
    monkeypatch.setattr(ops, "is_on_card", lambda x: True)
    taken, pointwise = [], ops.pointwise
    monkeypatch.setattr(ops, "pointwise", lambda *args: taken.append(1) or pointwise(*args))
    monkeypatch.setattr(ops, "onednn_computes", lambda dtype: False)
    orders = torch.contiguous_format, torch.channels_last
    sizes = (1, 1, 1), (1, 5, 3), (3, 1, 4), (2, 4, 1), (2, 3, 5)
    for dtype, order, (B, h, w) in itertools.product(ops.HALF, orders, sizes):
        layer = nn.Conv2d(6, 7, 1, bias=bias).to(dtype, memory_format=order)
        x = torch.randn(B, 6, h, w).to(dtype, memory_format=torch.channels_last)
        y, exact = ops.conv2d(layer, x), copy.deepcopy(layer).double()(x.double())
        assert ops.in_channels_last(y) and far(y.double(), exact) <= torch.finfo(dtype).eps
    assert len(taken) == 20
    layer = nn.Conv2d(6, 7, 1, bias=bias).half()
    x = torch.randn(2, 6, 3, 5).half().to(memory_format=torch.channels_last)
    with torch.enable_grad():
        assert ops.conv2d(layer, x).requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        ops.conv2d(layer, x)
    graphs = []
    backend = lambda graph, inputs: graphs.append(graph.code) or graph.forward
    torch._dynamo.reset()
    torch.compile(partial(ops.conv2d, layer), backend=backend, fullgraph=True)(x)
    assert len(graphs) == 1 and "conv2d" in graphs[0] and "as_strided" not in graphs[0]
    ops.conv2d(layer.float(), x.float())
    assert len(taken) == 20
    ops.conv2d(layer.half(), x)  # which any of them would have been without its reason
    assert len(taken) == 21


@torch.no_grad()
def test_compile_sees_the_plain_layers():
    model, x, context, t = unet(), torch.randn(1, 4, 8, 8), torch.randn(1, 7, 24), torch.tensor(1)
    expected, graphs = model(x, t, context), []
    backend = lambda graph, inputs: graphs.append(graph.code) or graph.forward
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    assert far(compiled(x, t, context), expected) <= 1e-5
    assert len(graphs) == 1 and "conv2d" in graphs[0] and "_linear_pointwise" not in graphs[0]
    torch._dynamo.reset()


@onednn
@torch.no_grad()
def test_whatever_is_special_about_a_layer_is_called():
    """Hooks, a forward of its own, another class, other parameters, autocast: as any module is."""
    x = torch.randn(2, 6)
    calls = []

    class Own(nn.Linear):
        def forward(self, x):
            calls.append("class")
            return super().forward(x)

    def layer(kind=nn.Linear):
        return kind(6, 4).requires_grad_(False)

    assert by_product(ops.linear, layer(), x)[1]
    ops.linear(layer(Own), x)
    patched = layer()
    patched.forward = lambda x: calls.append("forward") or x
    assert ops.linear(patched, x) is x
    for register in ("register_forward_hook", "register_forward_pre_hook"):
        hooked = layer()
        getattr(hooked, register)(lambda *arguments: calls.append("hook"))
        ops.linear(hooked, x)
    handle = nn.modules.module.register_module_forward_hook(lambda *args: calls.append("global"))
    ops.linear(layer(), x)
    handle.remove()
    assert calls == ["class", "forward", "hook", "hook", "global"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ops.linear(layer(), x).dtype == torch.bfloat16
    spectral = nn.utils.parametrizations.weight_norm(layer())
    assert torch.equal(ops.linear(spectral, x), spectral(x))
    assert ops.linear(nn.Sequential(layer(), nn.ReLU()), x).min() == 0
