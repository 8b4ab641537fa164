"""An image on a CPU is the same to the last bit, drawn alone or in any batch beside any others;
with batch_invariant=True no shape that a library chooses by depends on the batch."""

import itertools
import random
from functools import partial

import p2p_model
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import minisd
from minisd.models import ops

WORDS = "a red blue big small circle square left of above on white background striped".split()
SETTINGS = 100  # for each number of threads
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


class Shapes(TorchDispatchMode):
    """The shapes of what products, convolutions, norms and attention are given."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        if any(word in name for word in ("mm", "linear", "conv", "norm", "attention", "softmax")):
            tensors = [tuple(x.shape) for x in args if isinstance(x, torch.Tensor)]
            self.seen.add((name, *tensors))
        return function(*args, **(kwargs or {}))


RULES = {
    "cfg": minisd.cfg,
    "pag": minisd.pag,  # a table of rows
    "deep cache": None,  # saves and takes rows
}


def shapes_of(sd, name, n):
    """Of n images drawn by one of RULES."""
    rule = RULES[name] or partial(minisd.deep_cache, unet=sd.unet, every=2)
    with Shapes() as shapes:
        sd.txt2img("a red circle", num_images=n, steps=3, rule=rule, progress=False)
    return shapes.seen


@torch.no_grad()
@pytest.mark.parametrize("name", RULES)
def test_no_shape_depends_on_the_batch(tmp_path, name):
    """Though texts and guidance groups of an image are rows of one call."""
    p2p_model.load(tmp_path)
    plain, ours = (minisd.load(tmp_path, device="cpu", batch_invariant=b) for b in (False, True))
    one = shapes_of(ours, name, 1)
    assert len(one) > 20 and shapes_of(ours, name, 3) == one
    assert shapes_of(plain, name, 3) != one


@onednn
@torch.no_grad()
def test_image_by_image_is_the_same_image(tmp_path):
    """As it is on a CPU anyway, whatever the rows of edits say."""
    p2p_model.load(tmp_path)
    plain, ours = (minisd.load(tmp_path, device="cpu", batch_invariant=b) for b in (False, True))
    assert repr(ours.network) != repr(plain.network) and ours.loaded["batch_invariant"] is True
    x = plain.noise(0, 3)
    texts = plain.encode_prompt(["", *WORDS[:3]])
    assert torch.equal(ours.encode_prompt(["", *WORDS[:3]]), texts)
    sites = plain.unet.sites("cross")
    factors = torch.rand(3, 77, dtype=torch.float32)
    h, n, _ = plain.unet.shape(sites[1])
    found = []
    for sd in (plain, ours):
        save = torch.zeros(2, h, n, 77)  # of the last two images
        edits = {
            sites[0]: minisd.AttentionEdit(reweight=factors),
            sites[1]: minisd.AttentionEdit(save=save),
        }
        guidance = minisd.cfg(sd.network, texts[:1], texts[1:], edits=lambda step, e=edits: e)
        step = next(iter(minisd.DDIM(sd.schedule, 4)))
        eps, _ = guidance(x, step)
        found += [(eps, save)]
        for seed in range(2):
            options = {"num_images": 2, "steps": 2, "seed": seed, "progress": False}
            found[-1] += (sd.txt2img(["a red", "a blue circle"], **options)[3].tobytes(),)
        edited = minisd.edit_prompt(sd, "a red circle", "a blue circle", steps=2, progress=False)
        found[-1] += (edited[1].tobytes(),)
    (eps, save, *images), (own_eps, own_save, *own_images) = found
    assert torch.equal(own_eps, eps) and save.abs().sum() > 0
    assert torch.equal(own_save, save) and own_images == images


@torch.no_grad()
def test_a_function_of_all_rows_is_refused_image_by_image(tmp_path):
    p2p_model.load(tmp_path)
    sd = minisd.load(tmp_path, device="cpu", batch_invariant=True)
    rule = partial(minisd.cfg, edits=minisd.freeu(sd.unet))
    options = {"steps": 1, "rule": rule, "progress": False}
    sd.txt2img("a red circle", **options)
    with pytest.raises(ValueError, match="2 images under an edit that is a function of all rows"):
        sd.txt2img("a red circle", num_images=2, **options)
    x, context = sd.noise(0, 2), sd.encode_prompt(["a", "b"])
    for wrong in ({"no site": minisd.AttentionEdit()}, {sd.unet.deep: "no edit"}):
        with pytest.raises(ValueError, match="no site|expected FeatureEdit"):
            sd.network(x, torch.tensor(1), context, wrong)
