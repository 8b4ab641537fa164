"""An image on a CPU is the same to the last bit, drawn alone or in any batch beside any others."""

import itertools
import random

import p2p_model
import pytest
import torch
from torch import nn

import minisd
from minisd.models import ops

WORDS = "a red blue big small circle square left of above on white background striped".split()
SETTINGS = 30  # for each number of threads
onednn = pytest.mark.skipif(
    not ops.onednn_computes(torch.float32), reason="no oneDNN for this processor"
)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("batch")
    p2p_model.load(folder)
    kinds = [t for t in (torch.float32, torch.bfloat16) if ops.onednn_computes(t)]
    return [minisd.load(folder, device="cpu", dtype=dtype) for dtype in kinds]


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def setting(rng, count):
    """Prompts with their seeds, and the options of all of them."""
    prompts = [" ".join(rng.sample(WORDS, rng.randint(0, 8))) for _ in range(count)]
    seeds = rng.sample(range(100), count)
    factor = rng.choice([1, 1, 2, 4])
    options = {
        "steps": rng.randint(1, 3),
        "guidance": rng.choice([1.0, 3.0, 7.5]),
        "sampler": rng.choice(["ddim", "dpm++"]),
        "negative_prompt": rng.choice(["", "a blue square"]),
        "progress": False,
    }
    return prompts, seeds, factor, options


def drawn(sd, prompts, seeds, factor, options):
    """The last latents, and the images as tensors."""
    last = []
    size = factor * sd.unet.config.sample_size * sd.vae.factor
    options = options | {"height": size, "width": size}
    images = sd.txt2img(prompts, seed=seeds, on_step=lambda x, step: last.append(x), **options)
    return last[-1], images


def compare(sd, rng):
    """One setting: each image of a batch beside itself alone."""
    prompts, seeds, factor, options = setting(rng, rng.randint(2, 5))
    together, images = drawn(sd, prompts, seeds, factor, options)
    for i in rng.sample(range(len(prompts)), 2):
        alone, [image] = drawn(sd, [prompts[i]], [seeds[i]], factor, options)
        assert torch.equal(alone[0], together[i]), (prompts, seeds, factor, options, i)
        assert image.tobytes() == images[i].tobytes()


@onednn
@torch.no_grad()
def test_random_settings(models, threads):
    rng = random.Random(threads)
    for sd in models:
        for _ in range(3):
            compare(sd, rng)


@onednn
@pytest.mark.full
@torch.no_grad()
def test_more_settings(models, threads):
    rng = random.Random(17 + threads)
    for i in range(SETTINGS):
        compare(models[i % len(models)], rng)


@onednn
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layers(dtype, threads):
    """Rows of 1 to 4 images of a linear layer, convolutions and norms, at sizes where oneDNN,
    torch and ops.py choose other code for other numbers of rows."""
    if not ops.onednn_computes(dtype):
        pytest.skip(f"no oneDNN for {dtype} on this processor")
    torch.manual_seed(0)

    def same(layer, function, x):
        layer.to(dtype, memory_format=torch.channels_last).requires_grad_(False)
        x = x.to(dtype)
        if x.ndim == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        alone = torch.cat([function(layer, row) for row in x.split(1)])
        for n in range(2, len(x) + 1):
            assert torch.equal(function(layer, x[:n]), alone[:n]), (layer, tuple(x.shape), n)

    for rows, (out, width) in itertools.product((1, 2, 77), ((33, 24), (640, 2560), (320, 768))):
        same(nn.Linear(width, out), ops.linear, torch.randn(4, rows, width))
    for side, out, kernel in itertools.product((1, 4, 8, 16, 17, 40), (4, 160, 1280), (1, 3)):
        width = 16 if out > 200 else 32
        layer = nn.Conv2d(width, out, kernel, padding=kernel // 2)
        same(layer, ops.conv2d, torch.randn(4, width, side, side))
    for side in (8, 16, 18):
        layer = nn.Conv2d(ops.CHANNELS, 160, 3, padding=1)  # Winograd's form in float32
        same(layer, ops.conv2d, torch.randn(4, ops.CHANNELS, side, side))
        twice = (2 * side, 2 * side)
        enlarged = lambda layer, x, twice=twice: ops.upsample_conv(layer, x, twice)
        same(nn.Conv2d(24, 32, 3, padding=1), enlarged, torch.randn(4, 24, side, side))
    for side in (4, 31, 32, 40):
        norm = nn.GroupNorm(4, 32)
        nn.init.normal_(norm.weight)
        for function in (ops.group_norm, ops.group_norm_silu):
            same(norm, function, torch.randn(4, 32, side, side))
    norm = nn.LayerNorm(320)
    same(norm, lambda layer, x: layer(x), torch.randn(4, 77, 320))
