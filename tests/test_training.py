"""The training objectives against their formulas, resuming, and a tiny run up to a checkpoint that
loads."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

import minisd
from bench.scorer import score
from minisd import CLIPTextConfig, VAEConfig
from minisd.checkpoints.load import SD_V1_SCHEDULE
from minisd.sampling.schedule import NoiseSchedule
from minisd.training import (
    __main__ as training,
    data,
    labelled,
    loop,
    objective,
    scenes,
    stages,
    transformer,
)
from minisd.training.__main__ import main
from minisd.training.objective import (
    autoencoder_loss,
    diffusion_loss,
    hybrid_loss,
    variance_loss,
)
from minisd.training.recipes import (
    MINIATURE,
    RECIPES,
    SHAPES_DIT,
    TRANSFORMER,
    Hyperparameters,
    Recipe,
    small_dit,
)

TINY = Recipe(
    image_size=16,
    vae=VAEConfig(block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, sample_size=16),
    text=CLIPTextConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    ),
    unet=replace(
        RECIPES["small"].unet,
        sample_size=8,
        block_out_channels=(8, 8),
        attention_head_dim=1,
        cross_attention_dim=16,
        norm_num_groups=4,
    ),
    autoencoder=Hyperparameters(steps=6, batch=4, lr=1e-3, pool=16, ema=0.9),
    text_encoder=Hyperparameters(steps=6, batch=4, lr=1e-3, pool=16, ema=0.9),
    diffusion=Hyperparameters(steps=6, batch=4, lr=1e-3, pool=16, ema=0.9),
    kl_weight=1e-3,
    max_weight=20.0,
    noisy_share=0.5,
    layout_weight=1.0,
    summary_weight=0.05,
    silent_share=0.5,
    faint_share=0.5,
)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(RECIPES, "tiny", TINY)


LINEAR = NoiseSchedule.from_dict({"beta_schedule": "linear"})


def said(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g) for _ in range(3)]


def test_variance_loss_is_the_kl_of_two_normals():
    """torch.distributions' divergence of the posterior, from the formulas of its mean, in float64;
    at t = 0 the integral of a density, by its values."""
    noise, eps, v = said(4, 2, 3, 5)
    v = v.clamp(-1, 1)
    z = said(4, 2, 3, 5, seed=1)[0].double()
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float32).double()
    abar = torch.cumprod(1 - betas, 0)
    for row, t in enumerate((1, 2, 400, 999)):
        now, past, beta = abar[t], abar[t - 1], betas[t]
        x = now.sqrt() * z[row] + (1 - now).sqrt() * noise[row]
        of_x = (1 - beta).sqrt() * (1 - past) / (1 - now) * x
        guess = (x - (1 - now).sqrt() * eps[row]) / now.sqrt()
        true, told = (of_x + past.sqrt() * beta / (1 - now) * each for each in (z[row], guess))
        least = beta * (1 - past) / (1 - now)
        f = (v[row].double() + 1) / 2
        s = (0.5 * (f * beta.log() + (1 - f) * least.log())).exp()
        normal = torch.distributions.Normal
        nats = torch.distributions.kl_divergence(normal(true, least.sqrt()), normal(told, s))
        one = [each[[row]] for each in (noise, eps, v)]
        bits = variance_loss(LINEAR, one[0], torch.tensor([t]), *one[1:])
        assert bits.item() == pytest.approx(nats.mean().item() / math.log(2), rel=3e-3)
    f = (v[0].double() + 1) / 2
    small = betas[1] * betas[0] / (1 - abar[1])  # beta~ of t = 1 stands for that of t = 0
    s = (0.5 * (f * betas[0].log() + (1 - f) * small.log())).exp()
    off = ((1 - abar[0]) / abar[0]).sqrt() * (noise[0] - 0.9 * noise[0]).double()
    y = torch.linspace(-1, 1, 4001, dtype=torch.float64)[:, None, None, None] / 255
    density = (-((y - off) ** 2) / (2 * s**2)).exp() / (s * math.sqrt(2 * math.pi))
    expected = -torch.trapezoid(density, y, dim=0).log2().mean()
    near = [noise[[0]], torch.tensor([0]), 0.9 * noise[[0]], v[[0]]]
    assert variance_loss(LINEAR, *near).item() == pytest.approx(expected.item(), rel=1e-3)


def test_variance_loss_counts_bits_and_leaves_the_mean_alone():
    """The bound is tight where the reverse process is exact: of N(0, 1) with its exact noise, sigma
    x, and beta (v = 1), all parts are the entropy of values in steps of 2 / 255, 9.04 bits each.

    noise - sigma (alpha z + sigma noise) = alpha u, u of N(0, 1), whose quantiles stand for it."""
    n, T = 2000, len(LINEAR)
    u = torch.special.ndtri((torch.arange(n, dtype=torch.float64) + 0.5) / n)
    u = (u / u.square().mean().sqrt()).float().reshape(1, 1, 1, n)
    total = 0.0
    for t in range(T):
        off = LINEAR.level(t).alpha * u
        total += variance_loss(LINEAR, off, torch.tensor([t]), 0 * u, torch.ones_like(u)).item()
    a = LINEAR.level(T - 1).alpha
    total += 0.5 * (a**2 + 1 - a**2 - 1 - math.log(1 - a**2)) / math.log(2)  # of x_T, E z^2 = 1
    entropy = 0.5 * math.log2(2 * math.pi * math.e) - math.log2(2 / 255)
    assert entropy == pytest.approx(9.04, abs=0.01) and total == pytest.approx(entropy, abs=0.02)
    noise, eps, v = (x.requires_grad_() for x in said(3, 1, 2, 2))
    variance_loss(LINEAR, noise.detach(), torch.tensor([0, 5, 900]), eps, v).backward()
    assert eps.grad is None and (v.grad != 0).all()
    # exact noise and the least variance: nothing is lost
    t = torch.tensor([1, 500, 999])
    assert abs(variance_loss(LINEAR, noise, t, noise, -torch.ones_like(v)).item()) < 1e-6


def test_hybrid_loss_is_the_sum_of_both():
    z, noise, v = said(3, 4, 2, 2)
    t, context = torch.tensor([0, 500, 999]), torch.ones(3, 1, 1)
    weight = torch.full((4,), 0.5, requires_grad=True)

    def network(x, t, context):
        return torch.cat([weight[:, None, None] * x * context[..., None], v], dim=1)

    alone = lambda x, t, context: network(x, t, context)[:, :4]
    loss = hybrid_loss(network, LINEAR, z, noise, t, context, 7.0)
    simple = diffusion_loss(alone, LINEAR, z, noise, t, context, 7.0)
    abar = LINEAR.alphas_cumprod[t][:, None, None, None]
    eps = alone(abar.sqrt() * z + (1 - abar).sqrt() * noise, t, context)
    torch.testing.assert_close(loss, simple + variance_loss(LINEAR, noise, t, eps, v))
    both = [torch.autograd.grad(each, weight)[0] for each in (loss, simple)]
    torch.testing.assert_close(*both)  # what learns the noise is the first part
    v.requires_grad_()
    hybrid_loss(network, LINEAR, z, noise, t, context, 7.0).backward()
    assert (v.grad != 0).all()  # and the variance the second


def test_diffusion_loss_is_the_formula():
    schedule = NoiseSchedule.from_dict(SD_V1_SCHEDULE)
    torch.manual_seed(0)
    z, noise = torch.randn(3, 4, 5, 6), torch.randn(3, 4, 5, 6)
    context, t = torch.randn(3, 7, 8), torch.tensor([0, 500, 999])

    def unet(x, t, context):
        return torch.sin(3 * x) + t[:, None, None, None] / 1000 + context.mean()

    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    a = torch.cumprod(1 - betas, 0)[t][:, None, None, None]
    x = a.sqrt() * z + (1 - a).sqrt() * noise
    errors = (unet(x, t, context.double()) - noise).square().mean(dim=(1, 2, 3))
    plain = diffusion_loss(unet, schedule, z, noise, t, context)
    assert plain.item() == pytest.approx(errors.mean().item(), rel=1e-5)
    weights = torch.tensor(
        [1 / a.flatten()[0], 1 / a.flatten()[1], 20.0]
    )  # 1 / a at t = 999 is 214
    weighted = diffusion_loss(unet, schedule, z, noise, t, context, max_weight=20.0)
    assert weighted.item() == pytest.approx((weights * errors).mean().item(), rel=1e-5)


def test_autoencoder_loss_is_the_formula():
    torch.manual_seed(0)
    x, mean, logvar, noise = (torch.randn(2, 3, 4, 4) for _ in range(4))

    class Vae:
        def encode(self, x):
            return mean, logvar

        def decode(self, z):
            return torch.tanh(z)

    posterior = torch.distributions.Normal(mean, (logvar / 2).exp())
    kl = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).mean()
    expected = (torch.tanh(mean + (logvar / 2).exp() * noise) - x).abs().mean() + 0.3 * kl
    assert autoencoder_loss(Vae(), x, noise, 0.3).item() == pytest.approx(expected.item(), rel=1e-6)


def test_layout_loss_is_the_formula():
    """Cell by cell: a 4 x 2 grid, one thing over the left half, the second absent or over the
    bottom right quarter."""
    boxes = torch.tensor([[[0.0, 0.5, 1.0], [0.0, 0.0, 0.0]], [[0.0, 0.5, 1.0], [0.75, 0.75, 0.5]]])
    covered = torch.zeros(2, 2, 4, 2)
    covered[:, 0, :, 0] = 1
    covered[1, 1, 2:, 1] = 1
    logits = torch.randn(2, 2, 4, 2, generator=torch.Generator().manual_seed(0))
    p = torch.sigmoid(logits.double())
    expected = -torch.where(covered > 0, p.log(), (1 - p).log()).mean()
    loss = objective.layout_loss(logits / 2, lambda features: 2 * features, boxes)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_summary_loss_is_the_formula():
    """Caption by caption, end by end: the tokens 0..5 of which each caption has some; 5 ends and
    pads."""
    ids, end = torch.tensor([[4, 1, 5, 5], [4, 2, 0, 5]]), 5
    context = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))
    expected = 0.0
    for row, position in ((0, 2), (0, 3), (1, 3)):
        p = torch.sigmoid(2 * context[row, position].double())
        expected -= sum(p[i].log() if i in ids[row] else (1 - p[i]).log() for i in range(6)) / 3
    loss = objective.summary_loss(context, ids, end, lambda states: 2 * states)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_silenced_rows_keep_their_words_alone():
    """Row 0 is left alone; row 1 keeps its two words and gets the empty caption's states at its end
    and its pad."""
    ids, end = torch.tensor([[4, 1, 2, 5], [4, 2, 5, 5]]), 5
    context, empty = torch.randn(2, 4, 6), torch.randn(1, 4, 6)
    silenced = objective.silence(context, empty, ids, end, torch.tensor([False, True]))
    assert torch.equal(
        silenced, torch.stack([context[0], torch.cat([context[1, :2], empty[0, 2:]])])
    )


def test_times_are_drawn_as_said():
    """In the noisiest quarter lie a quarter of the samples, or noisy_share plus a quarter of the
    rest; all occur."""
    for share in (0.0, 0.6):
        generator = torch.Generator().manual_seed(0)
        t = torch.cat([objective.draw_times(32, 1000, share, generator) for _ in range(2000)])
        assert t.min() == 0 and t.max() == 999
        counts = torch.histc(t.float(), bins=4, min=0, max=1000) / len(t)
        rest = (1 - share) / 4
        assert torch.allclose(counts, torch.tensor([rest, rest, rest, rest + share]), atol=0.01)


def test_draw_amplitudes():
    """1 but in faint_share of the samples, in which it is uniform from 0.6 to 1."""
    k = objective.draw_amplitudes(100_000, 0.3, torch.Generator().manual_seed(0))
    assert k.shape == (100_000, 1, 1, 1) and k.min() >= 0.6 and k.max() == 1
    assert (k == 1).double().mean() == pytest.approx(0.7, abs=0.01)
    assert k[k < 1].mean() == pytest.approx(0.8, abs=0.01) and k[k < 1].std() == pytest.approx(
        0.4 / 12**0.5, abs=0.01
    )
    assert (objective.draw_amplitudes(100, 0.0, torch.Generator()) == 1).all()


def test_learning_rate():
    rates = [loop.learning_rate(step, 1000, 2.0) for step in range(1000)]
    assert rates[0] == 2.0 / loop.WARMUP and rates[loop.WARMUP] == rates[799] == 2.0
    assert rates[900] == pytest.approx(1.0) and rates[999] == pytest.approx(0.01)


def test_no_caption_of_the_pool_is_held_out():
    _, captions, _ = data.draw_scenes(300, 8, seed=5)
    assert {scenes.split(caption) for caption in captions} == {"train"}


def test_the_boxes_of_the_pool_are_those_of_its_pictures():
    pictures, captions, boxes = data.draw_scenes(50, 64, seed=5)
    for picture, caption, (first, second) in zip(pictures, captions, boxes, strict=True):
        assert (second[2] > 0) == (len(scenes.parse(caption).things) == 2)
        changed = (picture != picture[0, 0]).any(-1)  # differs from the background
        for x, y, side in (first, second) if second[2] else (first,):
            (left, right), (top, bottom) = (
                (64 * (c - side / 2), 64 * (c + side / 2)) for c in (x, y)
            )
            inside = torch.zeros(64, 64, dtype=torch.bool)
            inside[
                max(int(top) - 1, 0) : int(bottom) + 2, max(int(left) - 1, 0) : int(right) + 2
            ] = True
            assert (changed & inside).any()
            changed &= ~inside
        assert not changed.any()


def test_the_vocabulary_has_one_token_for_each_word():
    tokenizer = data.make_tokenizer()
    assert all(len(tokenizer.encode(word)) == 1 for word in scenes.words())


def test_a_stopped_run_resumes_as_if_unbroken(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "SAVE_EVERY", 3)
    main(["autoencoder", "--run", str(tmp_path / "whole"), "--recipe", "tiny"])

    class Stopped(Exception):
        pass

    losses = []

    def stop_at_the_fifth(*args):
        losses.append(autoencoder_loss(*args))
        if len(losses) == 5:
            raise Stopped
        return losses[-1]

    monkeypatch.setattr(stages, "autoencoder_loss", stop_at_the_fifth)
    with pytest.raises(Stopped):
        main(["autoencoder", "--run", str(tmp_path / "broken"), "--recipe", "tiny"])
    monkeypatch.setattr(stages, "autoencoder_loss", autoencoder_loss)
    main(["autoencoder", "--run", str(tmp_path / "broken"), "--recipe", "tiny"])
    whole, broken = (torch.load(tmp_path / name / "autoencoder.pt") for name in ("whole", "broken"))
    assert whole["step"] == broken["step"] == 6
    for part in ("model", "average"):
        assert all(torch.equal(whole[part][key], broken[part][key]) for key in whole[part])


def test_training_makes_a_checkpoint_that_minisd_and_diffusers_load(tiny, tmp_path):
    run, folder = tmp_path / "run", tmp_path / "model"
    for stage in ("autoencoder", "text", "diffusion"):
        main([stage, "--run", str(run), "--recipe", "tiny"])
    main(["export", "--run", str(run), "--recipe", "tiny", "--to", str(folder)])

    sd = minisd.load(folder, device="cpu")
    pool = torch.load(run / "pool.pt")
    assert sd.vae.config.scaling_factor == pytest.approx(pool["scaling_factor"])
    latents = pool["scaling_factor"] * (
        pool["mean"].float() + pool["std"].float() * torch.randn(pool["mean"].shape)
    )
    assert latents.std().item() == pytest.approx(1, rel=0.1)
    average = torch.load(run / "diffusion.pt")["average"]
    for key, value in sd.unet.state_dict().items():
        assert torch.equal(value, average[f"unet.{key}"].half().float())

    pipe = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    x = sd.noise(0)
    ours = sd.txt2img("a red circle", steps=3, sampler="ddim", latents=x, progress=False)[0]
    theirs = pipe("a red circle", num_inference_steps=3, latents=x, height=16, width=16).images[0]
    differences = [abs(a - b) for a, b in zip(ours.tobytes(), theirs.tobytes(), strict=True)]
    assert max(differences) <= 1


def test_training_learns(tiny, tmp_path, monkeypatch):
    """60 steps on two pictures: the reconstruction error falls to less than half."""
    monkeypatch.setitem(
        RECIPES,
        "tiny",
        replace(TINY, autoencoder=replace(TINY.autoencoder, pool=2, lr=1e-2), kl_weight=0.0),
    )
    monkeypatch.setattr(loop, "WARMUP", 5)
    losses = []

    def record(*args):
        losses.append(autoencoder_loss(*args))
        return losses[-1]

    monkeypatch.setattr(stages, "autoencoder_loss", record)
    main(["autoencoder", "--run", str(tmp_path), "--recipe", "tiny", "--steps", "60"])
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


def test_a_transformer_learns_on_the_bundled_latents(tmp_path, monkeypatch):
    """A tiny DiT, by its command: its loss falls, and the bundled parts are as they were."""
    small = replace(
        TRANSFORMER,
        dit=replace(
            TRANSFORMER.dit,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=4,
            patch_size=2,
        ),
        diffusion=replace(TRANSFORMER.diffusion, batch=8, pool=8, lr=1e-2),
        max_weight=1.0,
    )
    monkeypatch.setattr(training, "TRANSFORMER", small)
    monkeypatch.setattr(loop, "WARMUP", 5)
    losses = []

    def record(*args):
        losses.append(diffusion_loss(*args))
        return losses[-1]

    monkeypatch.setattr(transformer, "diffusion_loss", record)
    folder = tmp_path / "model"
    main(["transformer", "--run", str(tmp_path), "--steps", "80", "--to", str(folder)])
    assert sum(losses[-8:]) < 0.8 * sum(losses[:8])
    state, pool = (torch.load(tmp_path / name) for name in ("transformer.pt", "latents.pt"))
    assert state["step"] == 80 and all(
        name.startswith(("dit.", "layout_")) for name in state["average"]
    )
    own = minisd.load(folder, device="cpu")
    assert isinstance(own.unet, minisd.DiT) and own.unet.config == small.dit
    for name, value in own.unet.state_dict().items():
        assert torch.equal(value, state["average"][f"dit.{name}"].half().float())
    assert own.txt2img("a red circle", steps=1, progress=False)[0].size == (64, 64)
    with pytest.raises(ValueError, match="its DiT takes a text: minisd.load"):
        minisd.load_dit(folder)
    bundled = minisd.load("shapes", device="cpu")
    assert pool["scaling_factor"] == bundled.vae.config.scaling_factor
    assert all(torch.equal(pool["vae"][name], x) for name, x in bundled.vae.state_dict().items())


def test_four_labelled_dits_learn_and_are_read_back(tmp_path, monkeypatch):
    """Two tiny ones, by their command: the loss falls, and load_dit takes what was written."""
    tiny_dits = {"small-4": small_dit(1, 1, 4), "small-2": small_dit(1, 2, 2)}
    how = replace(MINIATURE.how, batch=8, pool=48, lr=1e-2)
    monkeypatch.setattr(training, "MINIATURE", replace(MINIATURE, dits=tiny_dits, how=how))
    monkeypatch.setattr(loop, "WARMUP", 5)
    losses = []

    def record(*args):
        assert args[1].prediction == "epsilon" and (args[5] != 0).any()
        losses.append(hybrid_loss(*args))
        return losses[-1]

    monkeypatch.setattr(labelled, "hybrid_loss", record)
    folder = tmp_path / "models"
    line = ["miniature", "--run", str(tmp_path), "--steps", "60"]
    main([*line, "--to", str(folder)])
    assert len(losses) == 120
    for own in (losses[:60], losses[60:]):
        assert sum(own[-8:]) < 0.8 * sum(own[:8])
    pool = torch.load(tmp_path / "labelled.pt")
    assert pool["mean"].shape == (48, 4, 16, 16) and pool["labels"].tolist() == [*range(24)] * 2
    for name, config in tiny_dits.items():
        state = torch.load(tmp_path / f"{name}.pt")
        loaded = minisd.load_dit(folder / name, device="cpu")
        assert state["step"] == 60 and loaded.dit.config == config
        for key, value in loaded.dit.state_dict().items():
            assert torch.equal(value, state["average"][f"dit.{key}"].half().float())
        assert loaded.generate(3, steps=2, progress=False)[0].size == (64, 64)
    index = json.loads((folder / "small-4" / "model_index.json").read_text())
    assert index["id2label"]["0"] == "a red circle" and len(index["id2label"]) == 24
    assert index["trained_steps"] == 60
    main(line)  # all done: nothing is trained again
    assert len(losses) == 120


def test_the_bundled_dit_has_a_stage_of_its_own(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(training, "train_labelled", lambda *args: seen.append(args))
    monkeypatch.setattr(training, "export_labelled", lambda *args: seen.append(args))
    main(["shapes-dit", "--run", str(tmp_path), "--steps", "7", "--seed", "3", "--to", "model"])
    recipe = replace(SHAPES_DIT, how=replace(SHAPES_DIT.how, steps=7))
    assert seen == [
        (recipe, tmp_path, 3, torch.device("cpu")),
        (recipe, tmp_path, Path("model")),
    ]


def test_labels_are_what_is_rendered():
    """The pixels of each label's renderings have one thing, of its shape and colour."""
    texts = [str(thing) for thing in labelled.LABELS]
    assert len(set(texts)) == 24 == MINIATURE.dits["small-4"].num_embeds_ada_norm
    verdicts = [score(im, text) for im, text in zip(labelled.render_labels(48, 5), texts * 2)]
    assert sum(v["all"] for v in verdicts) >= 47


def test_command_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0 and "eps_theta" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["export", "--run", str(tmp_path)])
    assert "--to goes with export and with" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["diffusion", "--run", str(tmp_path)])
    assert "autoencoder.pt is not there: the stages run in order" in capsys.readouterr().err
