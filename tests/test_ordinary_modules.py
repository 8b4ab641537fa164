"""Models are ordinary torch modules, before and after use: what the user does to them works at any
time and gives the bits of a fresh model (DESIGN 4.6)."""

import copy
import io
import pickle
import threading
import warnings

import p2p_model
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

import minisd
from minisd.models import ops

PROMPT = "a red circle"
OPTIONS = {"steps": 3, "progress": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ordinary")
    p2p_model.load(folder)
    return folder


@pytest.fixture
def sd(folder):
    return minisd.load(folder, device="cpu")


@pytest.fixture
def drawn(sd):
    """A model that has drawn, and edited."""
    minisd.edit_prompt(sd, PROMPT, "a red square", **OPTIONS)
    return sd


def latents(sd, **options):
    """The drawn latents: an image's 8 bits would hide a difference."""
    last = []
    sd.txt2img(PROMPT, on_step=lambda x, step: last.append(x), **OPTIONS, **options)
    return last[-1]


def like(sd, folder):
    """A fresh model with the weights that sd has now."""
    fresh = minisd.load(folder, device="cpu")
    fresh.unet.load_state_dict({name: x.clone() for name, x in sd.unet.state_dict().items()})
    return fresh


def models(sd):
    return sd.text_encoder, sd.unet, sd.vae


def layers(unet, kinds=(nn.Linear, nn.Conv2d)):
    return {name: module for name, module in unet.named_modules() if isinstance(module, kinds)}


def site(unet, kind="self"):
    return unet.get_submodule(unet.sites(kind)[0])


# ---- parameters


def test_drawing_changes_no_parameter(sd):
    """The same objects, of the same class, in the same place, with the same bits, all readable."""
    before = [(p, p.data_ptr(), p.clone()) for model in models(sd) for p in model.parameters()]
    kinds = [type(module) for model in models(sd) for module in model.modules()]
    image = sd.txt2img(PROMPT, **OPTIONS)[0]
    minisd.edit_prompt(sd, PROMPT, "a red square", **OPTIONS)
    minisd.redraw(sd, minisd.invert(sd, image, PROMPT, **OPTIONS), progress=False)
    after = [p for model in models(sd) for p in model.parameters()]
    for (p, place, value), now in zip(before, after, strict=True):
        assert now is p and type(p) is nn.Parameter and p.data_ptr() == place
        assert p.layout == torch.strided and torch.equal(p, value)
        assert p.numpy().shape == p.shape and p.norm().isfinite()
    assert [type(module) for model in models(sd) for module in model.modules()] == kinds


def test_copies_and_files_of_a_model_that_has_drawn(drawn, folder):
    expected = latents(drawn)
    assert torch.equal(latents(copy.deepcopy(drawn)), expected)
    assert torch.equal(latents(pickle.loads(pickle.dumps(drawn))), expected)
    for model, name in zip(models(drawn), ("text_encoder", "unet", "vae")):
        fresh, file = minisd.load(folder, device="cpu"), io.BytesIO()
        setattr(fresh, name, pickle.loads(pickle.dumps(model)))
        assert torch.equal(latents(fresh), expected)
        torch.save(model, file)
        file.seek(0)
        setattr(fresh, name, torch.load(file, weights_only=False))
        assert torch.equal(latents(fresh), expected)


def test_half_and_back(drawn, folder):
    drawn.unet.half().float()
    assert torch.equal(latents(drawn), latents(like(drawn, folder)))
    assert drawn.unet.conv_in.weight.equal(drawn.unet.conv_in.weight.half().float())


@pytest.mark.parametrize("kind", ["Linear", "Conv2d 1x1", "Conv2d 3x3"])
def test_weights_merged_in_place_are_those_of_the_next_image(drawn, folder, kind):
    chosen = {
        "Linear": lambda m: isinstance(m, nn.Linear),
        "Conv2d 1x1": lambda m: isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1),
        "Conv2d 3x3": lambda m: isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3),
    }[kind]
    before, generator = latents(drawn), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in filter(chosen, drawn.unet.modules()):
            out, rest = len(module.weight), module.weight[0].numel()
            down, up = (torch.randn(n, generator=generator) for n in (rest, out))
            module.weight += 0.05 * (up[:, None] * down).view_as(module.weight)  # of rank 1
    after = latents(drawn)
    assert torch.equal(after, latents(like(drawn, folder))) and not torch.equal(after, before)


def changes():
    """What writes new values past _version, or has none."""

    def add(layer):
        layer.weight.data += torch.linspace(-1, 1, layer.weight.numel()).view_as(layer.weight)

    def assign(layer):
        layer.weight.data = layer.weight.data + 0.1

    def inference(layer):
        with torch.inference_mode():
            layer.weight.mul_(-1)

    return {"p.data += x": add, "p.data = y": assign, "inference tensors": inference}


@pytest.mark.parametrize("change", changes())
@pytest.mark.parametrize("name", ["to_k", "time", "conv"])
def test_a_predictor_that_was_used_before_sees_weights_that_changed(folder, change, name):
    """In its next run: nothing of the run before is kept, whatever the version counters say."""
    with torch.inference_mode(change == "inference tensors"):
        sd = minisd.load(folder, device="cpu")
    assert sd.unet.conv_in.weight.is_inference() == (change == "inference tensors")
    layer = {
        "to_k": site(sd.unet, "cross").to_k,
        "time": sd.unet.time_embedding.linear_1,
        "conv": sd.unet.mid_block.resnets[0].conv1,
    }[name]
    uncond, cond = (sd.encode_prompt([text]).clone() for text in ("", PROMPT))
    x, sampler = sd.noise(0), minisd.DPMpp2M(sd.schedule, 3)
    predict = minisd.cfg(sd.network, uncond, cond)
    before = minisd.denoise(x, sampler, predict)
    changes()[change](layer)
    after = minisd.denoise(x, sampler, predict)
    fresh = like(sd, folder)
    expected = minisd.denoise(x, sampler, minisd.cfg(fresh.network, uncond, cond))
    assert torch.equal(after, expected) and not torch.equal(after, before)


# ---- what others do to modules


def test_training_after_drawing_reaches_every_parameter(drawn):
    drawn.unet.requires_grad_(True)
    with torch.no_grad():
        latents(drawn)
    x, context = drawn.noise(0), drawn.encode_prompt([PROMPT])
    drawn.unet(x, torch.tensor(500), context).square().sum().backward()
    without = [n for n, p in drawn.unet.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def test_dynamic_quantisation_runs(drawn):
    before = latents(drawn)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        drawn.unet = torch.ao.quantization.quantize_dynamic(drawn.unet, {nn.Linear})
    kinds = {type(module) for module in drawn.unet.modules()}
    assert nn.Linear not in kinds and torch.ao.nn.quantized.dynamic.Linear in kinds
    after = latents(drawn)
    assert after.isfinite().all() and 0 < (after - before).abs().mean() < 0.2 * before.abs().mean()


def test_compile_by_the_user(drawn):
    expected = latents(drawn)
    torch._dynamo.reset()
    drawn.unet = torch.compile(drawn.unet, backend="eager")
    torch.testing.assert_close(latents(drawn), expected, rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()


def every_module(sd):
    """name -> module of the three models, but for those that only hold others."""
    named = {"text": sd.text_encoder, "unet": sd.unet, "vae": sd.vae}
    each = {f"{a} {b}": m for a, model in named.items() for b, m in model.named_modules()}
    holders = nn.ModuleList, nn.Sequential
    return {name: m for name, m in each.items() if not isinstance(m, holders)}


def there_and_back(sd):
    """All three models run."""
    size = sd.unet.config.sample_size * sd.vae.factor
    return sd.img2img(torch.zeros(1, 3, size, size), PROMPT, strength=1.0, **OPTIONS)


def test_hooks_fire_on_every_block_and_layer(drawn):
    modules, calls = every_module(drawn), set()
    modules.pop("vae ")  # is called as encode and decode
    for name, module in modules.items():
        module.register_forward_pre_hook(lambda *_, name=name: calls.add((name, "before")))
        module.register_forward_hook(lambda *_, name=name: calls.add((name, "after")))
    there_and_back(drawn)
    assert calls == {(name, when) for name in modules for when in ("before", "after")}


def test_what_a_hook_keeps_is_never_written_to(drawn):
    kept = []
    for name, module in every_module(drawn).items():
        module.register_forward_hook(
            lambda m, x, y, name=name: kept.extend(
                (name, part, part.clone()) for part in (*x, y) if isinstance(part, torch.Tensor)
            )
        )
    there_and_back(drawn)
    assert len(kept) > 500
    assert not {name for name, part, before in kept if not torch.equal(part, before)}


BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
ALONE = [f"{BLOCK}.{part}" for part in ("norm1", "attn1", "attn1.to_out.0", "ff", "ff.net.2")]
ALONE += [f"down_blocks.0.resnets.0.{part}" for part in ("norm1", "conv1", "norm2", "conv2")]


@pytest.mark.parametrize("name", [*ALONE, "down_blocks.0.attentions.0.proj_out"])
def test_what_a_single_hook_keeps_is_never_written_to(folder, name):
    """With others near it all layers would take the way of watched ones."""
    sd, kept = minisd.load(folder, device="cpu"), []
    hook = lambda m, x, y: kept.extend([(y, y.clone()), (x[0], x[0].clone())])
    sd.unet.get_submodule(name).register_forward_hook(hook)
    drawn = latents(sd)
    assert kept and all(torch.equal(part, before) for part, before in kept)
    torch.testing.assert_close(drawn, latents(minisd.load(folder, device="cpu")))


@pytest.mark.parametrize("name", ["down_blocks.0", "attn1.to_q", "attn1", "attn2.to_q", "conv_out"])
def test_a_hook_that_comes_after_compiling_is_called(folder, name):
    eager, compiled = (
        minisd.load(folder, device="cpu", compile=compile) for compile in (False, "eager")
    )
    before = latents(compiled)

    def halve(module, x, y):
        return torch.utils._pytree.tree_map(lambda part: 0.5 * part, y)

    for sd in (eager, compiled):
        [place] = [n for n, _ in sd.unet.named_modules() if n.endswith(name)][:1]
        hook = sd.unet.get_submodule(place).register_forward_hook(halve)
    after = latents(compiled)
    torch.testing.assert_close(after, latents(eager), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(after, before, rtol=1e-3, atol=1e-3)
    hook.remove()
    assert torch.equal(latents(compiled), before)
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", ["self", "cross"])
@pytest.mark.parametrize("name", ["to_q", "to_k", "to_v"])
def test_what_hooks_adapters_and_parametrizations_change_is_drawn(drawn, kind, name):
    attention = site(drawn.unet, kind)
    layer, before = getattr(attention, name), latents(drawn)

    hook = layer.register_forward_hook(lambda module, args, out: 1.5 * out)
    hooked = latents(drawn)
    hook.remove()
    assert torch.equal(latents(drawn), before)
    with torch.no_grad():
        layer.weight *= 1.5  # which is the same function
        assert layer.bias is None
        scaled = latents(drawn)
        layer.weight /= 1.5
    torch.testing.assert_close(hooked, scaled, rtol=1e-4, atol=1e-4)
    assert (hooked - before).abs().max() > 1e-3

    class LoRA(nn.Module):
        """y = W x + B A x, in place of the layer."""

        def __init__(self, base):
            super().__init__()
            self.base = base
            self.A = nn.Parameter(torch.full((1, base.in_features), 0.1))
            self.B = nn.Parameter(torch.full((base.out_features, 1), 0.1))

        def forward(self, x):
            return self.base(x) + x @ self.A.T @ self.B.T

    setattr(attention, name, LoRA(layer))
    adapted = latents(drawn)
    setattr(attention, name, layer)
    kept = layer.weight.clone()
    with torch.no_grad():
        layer.weight += 0.01
        merged = latents(drawn)
        layer.weight.copy_(kept)
    torch.testing.assert_close(adapted, merged, rtol=1e-4, atol=5e-6 * merged.abs().max().item())
    assert (adapted - before).abs().max() > 1e-3

    class Half(nn.Module):
        def forward(self, weight):
            return weight / 2

    parametrize.register_parametrization(layer, "weight", Half())
    halved = latents(drawn)
    parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
    assert (halved - before).abs().max() > 1e-3
    torch.testing.assert_close(halved, latents(drawn), rtol=1e-4, atol=1e-4)

    mask = torch.zeros_like(layer.weight)
    prune.custom_from_mask(layer, "weight", mask)
    pruned = latents(drawn)
    prune.remove(layer, "weight")
    assert not layer.weight.any()
    torch.testing.assert_close(pruned, latents(drawn), rtol=1e-4, atol=1e-4)
    assert (pruned - halved).abs().max() > 1e-3


# ---- threads


def in_threads(*functions):
    """What each returns, begun at one moment; raises what one of them raised."""
    results, errors = [None] * len(functions), []
    barrier = threading.Barrier(len(functions))

    def run(i):
        try:
            barrier.wait()
            results[i] = functions[i]()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


def test_eight_threads_on_a_cold_model_draw_what_one_does(folder):
    expected = latents(minisd.load(folder, device="cpu"))
    for _ in range(3):
        cold = minisd.load(folder, device="cpu")
        for got in in_threads(*[lambda: latents(cold)] * 8):  # noqa: B023
            assert torch.equal(got, expected)


def test_a_backward_pass_changes_no_bit_of_later_images(drawn):
    expected = latents(drawn)
    context = drawn.encode_prompt([PROMPT]).requires_grad_()
    drawn.unet(drawn.noise(0), torch.tensor(1), context).sum().backward()
    assert context.grad.any() and torch.equal(latents(drawn), expected)
    drawn.unet.requires_grad_(True)
    drawn.unet(drawn.noise(0), torch.tensor(1), context).sum().backward()
    drawn.unet.requires_grad_(False)
    assert torch.equal(latents(drawn), expected)


@pytest.mark.parametrize("attention", ["sdpa", "reference"])
def test_null_text_in_another_thread_changes_nothing(drawn, attention):
    drawn.unet.attention = attention
    image = drawn.txt2img(PROMPT, **OPTIONS)[0]
    inversion = minisd.invert(drawn, image, PROMPT, trajectory=True, **OPTIONS)
    expected, running, seen = latents(drawn), threading.Event(), []

    def optimise():
        found = minisd.null_text(drawn, inversion, inner_steps=3, progress=False)
        running.set()
        return found.uncond

    def draw():
        got = []
        while not running.is_set() or not got:
            got.append(latents(drawn))
            seen.append(drawn.unet.attention)
        return got

    uncond, images = in_threads(optimise, draw)
    assert images and all(torch.equal(each, expected) for each in images)
    assert set(seen) == {attention} and drawn.unet.attention == attention
    alone = minisd.null_text(drawn, inversion, inner_steps=3, progress=False).uncond
    assert torch.equal(uncond, alone)


def test_what_is_watched_or_wrapped_is_asked_at_every_step(sd):
    """Hooks on the layers that project text and time, too, and a wrapper whose scale is ramped."""
    calls = {"to_q": 0, "to_k": 0, "time": 0}
    site = sd.unet.get_submodule(sd.unet.sites("cross")[0])
    layers = {"to_q": site.to_q, "to_k": site.to_k, "time": sd.unet.time_embedding.linear_1}

    def count(name):
        return lambda *_: calls.update({name: calls[name] + 1})

    hooks = [layer.register_forward_hook(count(name)) for name, layer in layers.items()]
    sd.txt2img("a red circle", steps=3, progress=False)
    for hook in hooks:
        hook.remove()
    assert calls == {"to_q": 3, "to_k": 3, "time": 3}

    class Scaled(torch.nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer, self.scale = layer, 1.0

        def forward(self, x):
            return self.scale * self.layer(x)

    def latents(ramp):
        last = []
        site.to_v = Scaled(layers_to_v)

        def on_step(x, step):
            last.append(x)
            site.to_v.scale *= ramp

        sd.txt2img("a red circle", steps=3, progress=False, on_step=on_step)
        site.to_v = layers_to_v
        return last[-1]

    layers_to_v = site.to_v
    assert (latents(0.5) - latents(1.0)).abs().max() > 1e-4


def test_forward_mode_derivatives_are_those_of_torch(sd):
    layer = sd.unet.time_embedding.linear_1
    x = torch.randn(3, layer.in_features)
    ours = torch.func.jvp(lambda x: ops.linear(layer, x), (x,), (torch.ones_like(x),))[1]
    theirs = torch.func.jvp(layer, (x,), (torch.ones_like(x),))[1]
    assert theirs.abs().max() > 0
    torch.testing.assert_close(ours, theirs)


def test_a_predictor_follows_the_models_dtype(sd):
    """Embeddings made in float32 serve a model that is bfloat16 now, and back."""
    uncond, cond = sd.encode_prompt([""]), sd.encode_prompt(["a red circle"])
    predict, step = minisd.cfg(sd.network, uncond, cond), next(iter(minisd.DDIM(sd.schedule, 3)))
    x = sd.noise(0)
    with torch.no_grad():
        before, _ = predict(x, step)
        sd.to(dtype=torch.bfloat16)
        half, _ = predict(x.bfloat16(), step)
        sd.to(dtype=torch.float32)
    assert half.dtype == torch.bfloat16
    assert ((half.float() - before).norm() / before.norm()).item() < 0.1
