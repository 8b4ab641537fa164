"""Guidance against its formulas, with a stand-in UNet that sees every argument, and once with
minisd's own UNet."""

import dataclasses
import subprocess
import sys

import pytest
import torch

from minisd.models.unet import UNet, UNetConfig
from minisd.sampling.guidance import cfg, conditional, erase, sega
from minisd.sampling.loop import denoise
from minisd.sampling.samplers import DDIM
from minisd.sampling.schedule import NoiseSchedule

SCHEDULE = NoiseSchedule.from_dict(
    {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
)
STEPS = list(DDIM(SCHEDULE, 4))


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X = randn(2, 4, 3, 5)
COND, UNCOND, CONCEPTS = randn(2, 7, 6, seed=1), randn(1, 7, 6, seed=2), randn(3, 7, 6, seed=3)


def eps(x, t, context):
    """One row: a latent (4, h, w), a timestep, a text (L, D)."""
    return torch.tanh(x * context.mean() + context[0, 0] + t / 1000)


class Recorder:
    """A UNet that computes `eps` row by row and notes how it was called."""

    def __init__(self):
        self.calls = []

    def __call__(self, x, t, context, edits):
        self.calls.append((x, t, context, edits))
        groups = len(context) // len(x)
        return torch.stack(
            [eps(row, t, text) for row, text in zip(x.repeat(groups, 1, 1, 1), context)]
        )


class Preparing(Recorder):
    """The same with a `prepare`, which wraps the context so that only this UNet can read it."""

    prepared = 0

    def prepare(self, context):
        self.prepared += 1
        return {"context": context}

    def __call__(self, x, t, context, edits):
        return super().__call__(
            x, t, context["context"] if isinstance(context, dict) else context, edits
        )


def rowwise(x, step, rows):
    return torch.stack(
        [eps(latent, step.t, text) for latent, text in zip(x, rows.expand(len(x), -1, -1))]
    )


@pytest.mark.parametrize("step", STEPS)
def test_conditional(step):
    unet = Recorder()
    torch.testing.assert_close(
        conditional(unet, COND)(X, step)[0], rowwise(X, step, COND), rtol=0, atol=0
    )
    ((x, t, context, edits),) = unet.calls
    assert x is X and torch.equal(context, COND) and edits == {}
    assert t.shape == () and t.dtype == torch.int64 and t.item() == step.t


@pytest.mark.parametrize("scale", [7.5, 0.0, -1.0, 1.5])
@pytest.mark.parametrize("uncond", [UNCOND, randn(2, 7, 6, seed=4)])
@pytest.mark.parametrize("cond", [COND, COND[:1]])
def test_cfg(scale, uncond, cond):
    unet, step = Recorder(), STEPS[1]
    u, c = rowwise(X, step, uncond), rowwise(X, step, cond)
    torch.testing.assert_close(
        cfg(unet, uncond, cond, scale)(X, step)[0], u + scale * (c - u), rtol=0, atol=1e-14
    )
    ((_, _, context, _),) = unet.calls
    assert torch.equal(context[:2], uncond.expand(2, -1, -1)) and torch.equal(
        context[2:], cond.expand(2, -1, -1)
    )


def test_cfg_of_scale_1_runs_no_unconditional_half():
    unet = Recorder()
    got, _ = cfg(unet, UNCOND, COND, scale=1)(X, STEPS[0])
    assert torch.equal(got, conditional(Recorder(), COND)(X, STEPS[0])[0])
    assert [len(context) for _, _, context, _ in unet.calls] == [2]


@pytest.mark.parametrize("n", [0, 1, 3])
@pytest.mark.parametrize("several", [False, True])
def test_erase(n, several):
    unet, step, weights = Recorder(), STEPS[2], [4.0, -1.0, 0.5][:n] if several else [10.0] * n
    predict = erase(unet, UNCOND, COND, CONCEPTS[:n], 3.0, weights if several else 10.0)
    u, c = rowwise(X, step, UNCOND), rowwise(X, step, COND)
    expected = u + 3.0 * (c - u)
    for w, concept in zip(weights, CONCEPTS):
        expected = expected - w * (rowwise(X, step, concept[None]) - u)
    torch.testing.assert_close(predict(X, step)[0], expected, rtol=0, atol=1e-13)
    ((_, _, context, _),) = unet.calls  # one call, the conditional rows last
    rows = [UNCOND[0], UNCOND[0], *(row for row in CONCEPTS[:n] for _ in range(2)), *COND]
    assert torch.equal(context, torch.stack(rows))


def test_erase_with_concepts_of_their_own_for_each_latent():
    both = torch.stack([CONCEPTS[:2], CONCEPTS[1:]], dim=1)  # (n, B, L, D)
    got, _ = erase(Recorder(), UNCOND, COND, both, 3.0, [4.0, -1.0])(X, STEPS[2])
    for i in range(2):
        alone = erase(Recorder(), UNCOND, COND[i : i + 1], CONCEPTS[i : i + 2], 3.0, [4.0, -1.0])
        torch.testing.assert_close(
            got[i : i + 1], alone(X[i : i + 1], STEPS[2])[0], rtol=0, atol=1e-13
        )


def test_defaults_are_the_published_scales():
    step = STEPS[0]
    u, c, e = (rowwise(X, step, rows) for rows in (UNCOND, COND, CONCEPTS[:1]))
    torch.testing.assert_close(cfg(Recorder(), UNCOND, COND)(X, step)[0], u + 7.5 * (c - u))
    got, _ = erase(Recorder(), UNCOND, COND, CONCEPTS[:1])(X, step)
    torch.testing.assert_close(got, u + 7.5 * (c - u) - 10.0 * (e - u))


@pytest.mark.parametrize("make", [cfg, lambda *args: erase(*args, CONCEPTS)])
def test_uncond_of_every_step(make):
    """A list has one entry per step of the full schedule, so a skipped start does not shift it."""
    unconds = [randn(1 + i % 2, 7, 6, seed=10 + i) for i in range(4)]
    for unet in (Recorder(), Preparing()):
        with torch.no_grad():
            predict, state = make(unet, unconds, COND), None
            for step in list(DDIM(SCHEDULE, 4, skip=1)):
                got, state = predict(X, step, state)
                expected, _ = make(Recorder(), unconds[step.index], COND)(X, step)
                assert torch.equal(got, expected)


@pytest.mark.parametrize("make", [conditional, lambda *a, **k: cfg(a[0], UNCOND, *a[1:], **k)])
def test_edits_are_a_function_of_the_step(make):
    unet = Recorder()
    predict = make(unet, COND, edits=lambda step: {"site": step.index})
    for step in STEPS:
        predict(X, step)
    assert [edits for _, _, _, edits in unet.calls] == [{"site": i} for i in range(4)]


def test_keys_and_values_are_prepared_once_a_run():
    """In the state that is handed on: a run after it prepares anew, for the weights of then."""
    unet = Preparing()
    predict = cfg(unet, UNCOND, COND[:1])
    x = denoise(X, DDIM(SCHEDULE, 4), predict)
    assert unet.prepared == 1
    assert torch.equal(x, denoise(X, DDIM(SCHEDULE, 4), cfg(Recorder(), UNCOND, COND[:1])))
    denoise(X, DDIM(SCHEDULE, 4), predict)
    assert unet.prepared == 2
    with torch.no_grad():
        _, state = predict(X, STEPS[0])
        got, _ = predict(X[:1], STEPS[1], state)  # another batch has other rows
    assert unet.prepared == 4
    assert torch.equal(got, cfg(Recorder(), UNCOND, COND[:1])(X[:1], STEPS[1])[0])


def test_a_guidance_keeps_nothing_of_a_run():
    """Two runs by one object, step by step in turn, and one that was broken off before them."""
    predict = sega(Preparing(), UNCOND, COND, CONCEPTS, warmup=1)
    before = dict(vars(predict))
    with torch.no_grad():
        alone, state = [], None
        for step in STEPS:
            eps, state = predict(X, step, state)
            alone.append(eps)
        predict(2 * X, STEPS[0])  # broken off
        first = second = None
        for step, expected in zip(STEPS, alone):
            a, first = predict(X, step, first)
            b, second = predict(X, step, second)
            assert torch.equal(a, expected) and torch.equal(b, expected)
    assert vars(predict) == before
    with pytest.raises(dataclasses.FrozenInstanceError):
        predict.edits = None


def test_gradients_reach_the_embedding_after_a_run_without_them():
    """Null-text inversion optimises uncond: nothing that was prepared without gradients may be used
    then."""
    uncond = UNCOND.clone().requires_grad_()
    predict = cfg(Preparing(), uncond, COND)
    with torch.no_grad():
        _, state = predict(X, STEPS[0])
    for _ in range(2):
        (grad,) = torch.autograd.grad(predict(X, STEPS[0], state)[0].sum(), uncond)
        assert grad.abs().max() > 0


def semantic(**options):
    return sega(Recorder(), UNCOND, COND, CONCEPTS, **options)


@pytest.mark.parametrize(
    ("predict", "words"),
    [
        (
            lambda: conditional(Recorder(), randn(3, 7, 6)),
            r"cond has shape \(3, 7, 6\), expected .*\(2, L, D\)",
        ),
        (lambda: conditional(Recorder(), "a cat"), r"cond is 'a cat', expected \(1, L, D\)"),
        (lambda: cfg(Recorder(), [None] * 4, COND), r"uncond is None, expected \(1, L, D\)"),
        (
            lambda: conditional(Recorder(), COND[0]),
            r"cond has shape \(7, 6\), expected \(1, L, D\)",
        ),
        (lambda: cfg(Recorder(), randn(4, 7, 6), COND), r"uncond has shape \(4, 7, 6\)"),
        (
            lambda: cfg(Recorder(), [UNCOND] * 3, COND),
            "uncond is a list of 3 entries, but step 3 needs one entry",
        ),
        (
            lambda: erase(Recorder(), UNCOND, COND, CONCEPTS[0]),
            r"concepts has shape \(7, 6\), expected \(n, L, D\)",
        ),
        (
            lambda: erase(Recorder(), UNCOND, COND, CONCEPTS, 7.5, [1.0, 2.0]),
            "one weight or one per concept",
        ),
        (
            lambda: erase(Recorder(), UNCOND, COND, CONCEPTS, 7.5, [1.0]),
            "one weight or one per concept",
        ),
        (
            lambda: erase(Recorder(), UNCOND, COND, CONCEPTS, 7.5, "10"),
            "erase_scale is '10', expected a finite number",
        ),
        (
            lambda: erase(Recorder(), UNCOND, COND, CONCEPTS, "3"),
            "guidance scale is '3', expected a number from -1000 to 1000",
        ),
        (
            lambda: cfg(Recorder(), UNCOND, COND, "3"),
            "guidance scale is '3', expected a number from -1000 to 1000",
        ),
        (lambda: cfg(Recorder(), UNCOND, COND, True), "guidance scale is True"),
        (
            lambda: cfg(Recorder(), UNCOND[:, :5], COND),
            r"texts differ in shape: uncond \(2, 5, 6\), cond \(2, 7, 6\)",
        ),
        (lambda: semantic(threshold="0.9"), "threshold is '0.9', expected a number from 0 to 1"),
        (lambda: semantic(warmup=1.5), "warmup is 1.5, expected a whole number, at least 0"),
        (lambda: semantic(momentum=None), "momentum is None, expected a finite number"),
        (lambda: semantic(momentum=10**400), "momentum is 10000.*, expected a finite number"),
        (lambda: semantic(beta=2), "beta is 2, expected a number from 0 to 1"),
    ],
)
def test_bad_arguments(predict, words):
    with pytest.raises(ValueError, match=words):
        predict()(X, STEPS[3])


def test_with_the_unet():
    """The group order, the prepared keys and the shared prefix of minisd's UNet give what separate
    calls give."""
    config = UNetConfig(
        sample_size=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(32, 64),
        layers_per_block=1,
        attention_head_dim=2,
        cross_attention_dim=6,
    )
    torch.manual_seed(0)
    unet, step = UNet(config).double(), STEPS[1]
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x, t = randn(2, 4, 8, 8), torch.tensor(step.t)
    with torch.no_grad():
        u, c, e = (unet(x, t, rows.expand(2, -1, -1)) for rows in (UNCOND, COND, CONCEPTS[:1]))
        got, _ = erase(unet, UNCOND, COND, CONCEPTS[:1])(x, step)
        torch.testing.assert_close(got, u + 7.5 * (c - u) - 10.0 * (e - u), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(
        cfg(unet, UNCOND, COND)(x, step)[0], u + 7.5 * (c - u), rtol=1e-9, atol=1e-9
    )
    assert (c - u).abs().max() > 1e-3


def test_guidance_loads_no_model():
    code = (
        "import sys, minisd.sampling.guidance;"
        "print(*(m for m in sys.modules if m.startswith('minisd')))"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert set(loaded) == {
        "minisd",
        "minisd.expect",
        "minisd.sampling",
        "minisd.sampling.guidance",
        "minisd.sampling.samplers",
        "minisd.sampling.schedule",
    }
