"""DDPM against diffusers' DDPMScheduler, against DDIM at eta 1 and against the formulas in float64;
and what the learned variance and the guidance of some channels do."""

import math
from functools import partial

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.schedulers import scheduling_ddpm
from test_samplers import SCHEDULE, X, assert_equal, model, randn, trajectory
from test_schedule import SD14

from minisd.sampling.ddpm import DDPM
from minisd.sampling.guidance import cfg
from minisd.sampling.loop import denoise
from minisd.sampling.samplers import DDIM
from minisd.sampling.schedule import NoiseSchedule

DIT = {  # scheduler_config.json of facebook/DiT-XL-2-256
    "_class_name": "DDIMScheduler",
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "num_train_timesteps": 1000,
    "set_alpha_to_one": True,
    "steps_offset": 0,
    "clip_sample": False,
}
LINEAR = NoiseSchedule.from_dict(DIT)
VARIANCES = ["fixed_small", "fixed_large", "learned_range"]


def two(x, t):
    """A network of twice as many channels: the noise, and v between -1 and 1."""
    return torch.cat([model(x, t), torch.sin(3 * x + t)], dim=1)


def network_of(variance):
    return two if variance == "learned_range" else model


def ours(sampler, x, network):
    latents, x0 = [], None
    for step in sampler:
        x, x0 = step(x, network(x, step.t), x0)
        latents.append(x)
    return latents


def theirs(sampler, config, network, monkeypatch, timesteps=None):
    """diffusers' latents, its betas in float64 (in float32 1 - a has three digits), with the
    noise of our steps."""
    scheduler = DDPMScheduler.from_config(config, variance_type=sampler.variance)
    if timesteps is None:
        scheduler.set_timesteps(sampler.steps)
    else:
        scheduler.set_timesteps(timesteps=timesteps)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    assert scheduler.timesteps.tolist() == [step.t for step in sampler]
    x, latents = X.double(), []
    for step in sampler:
        drawn = partial(lambda noise, *_, **__: noise, step.noise(x).double())
        monkeypatch.setattr(scheduling_ddpm, "randn_tensor", drawn)
        x = scheduler.step(network(x, step.t), step.t, x).prev_sample
        latents.append(x)
    return latents


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("steps", [1, 2, 5, 10, 25, 250, 1000])
def test_equals_diffusers(variance, steps, monkeypatch, record_property):
    sampler, network = DDPM(LINEAR, steps, variance=variance), network_of(variance)
    expected = theirs(sampler, DIT, network, monkeypatch)
    record_property(f"DDPM, {variance}", assert_equal(ours(sampler, X, network), expected))


@pytest.mark.parametrize("variance", VARIANCES)
def test_the_published_250_steps_equal_diffusers(variance, monkeypatch, record_property):
    """Timesteps as the published code spaces them: i * 999 / 249, rounded."""
    timesteps = [round(i * 999 / 249) for i in reversed(range(250))]
    sampler = DDPM(LINEAR, 250, variance=variance, spacing="linspace")
    assert [step.t for step in sampler] == timesteps and len(set(timesteps)) == 250
    assert timesteps != [step.t for step in DDPM(LINEAR, 250)]
    network = network_of(variance)
    expected = theirs(sampler, DIT, network, monkeypatch, timesteps)
    latents = ours(sampler, X.double(), network)
    record_property("DDPM, 250 steps, float64", assert_equal(latents, expected, 1e-9))


def test_offset_of_stable_diffusion(monkeypatch, record_property):
    sampler = DDPM(SCHEDULE, 25)
    expected = theirs(sampler, SD14, model, monkeypatch)
    record_property("DDPM, fixed_small", assert_equal(trajectory(sampler, X), expected))


@pytest.mark.parametrize("steps", [3, 100, 1000])
def test_ddim_at_eta_1_is_ddpm(steps, record_property):
    """With all steps and with fewer: the same coefficients, and the same noise from one seed."""
    a, b = DDPM(LINEAR, steps, seed=5), DDIM(LINEAR, steps, eta=1.0, seed=5)
    for one, other in zip(a, b, strict=True):
        assert (one.t, one.now, one.next) == (other.t, other.now, other.next)
    error = assert_equal(trajectory(a, X.double()), trajectory(b, X.double()), 1e-9)
    record_property("DDPM to DDIM at eta 1", error)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_a_step_is_a_draw_from_the_posterior(variance):
    """x_next of the formulas of Ho et al. 2020, written with alphas_cumprod in float64."""
    abar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    steps = list(DDPM(LINEAR, 4, variance=variance))
    ends = [step.t for step in steps[1:]] + [None]
    for step, end in zip(steps, ends):
        now, past = abar[step.t], torch.tensor(1.0).double() if end is None else abar[end]
        beta = 1 - now / past
        x, eps = X.double(), model(X.double(), step.t)
        x0 = (x - (1 - now).sqrt() * eps) / now.sqrt()
        mu = past.sqrt() * beta / (1 - now) * x0 + (1 - beta).sqrt() * (1 - past) / (1 - now) * x
        s = beta if variance == "fixed_large" else beta * (1 - past) / (1 - now)
        expected = mu if end is None else mu + s.sqrt() * step.noise(x).double()
        torch.testing.assert_close(step(x, eps)[0], expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize(("v", "variance"), [(-1.0, "fixed_small"), (1.0, "fixed_large")])
def test_learned_variance_goes_from_the_least_to_the_most(v, variance):
    with_v = lambda x, t: torch.cat([model(x, t), torch.full_like(x, v)], dim=1)
    learned = ours(DDPM(LINEAR, 9, variance="learned_range"), X.double(), with_v)
    fixed = ours(DDPM(LINEAR, 9, variance=variance), X.double(), model)
    assert_equal(learned, fixed, 1e-12)


def test_the_last_step_ends_at_the_mean():
    *_, last = DDPM(LINEAR, 9, variance="learned_range")
    x, x0 = last(X, two(X, last.t))
    torch.testing.assert_close(x, x0, rtol=0, atol=1e-6)  # no noise, whatever v says


def test_what_the_network_says_of_its_variance_is_left_out_by_other_samplers():
    for sampler in (DDIM(LINEAR, 7), DDPM(LINEAR, 7)):
        assert all(map(torch.equal, ours(sampler, X, two), ours(sampler, X, model)))
    step = next(iter(DDPM(LINEAR, 7, variance="learned_range")))
    with pytest.raises(ValueError, match="predicts 4 channels for 4, expected twice as many"):
        step(X, model(X, 0))


def test_the_noise_is_of_the_seed_and_the_index():
    run = lambda seed, skip=0: [s.noise(X) for s in DDPM(LINEAR, 6, skip, seed=seed)]
    first, again = run(3), run(3)
    assert all(map(torch.equal, first, again)) and not torch.equal(first[0], first[1])
    assert torch.equal(run(3, skip=2)[0], first[2]) and not torch.equal(run(4)[0], first[0])
    rows = run((3, 9))
    alone = [next(iter(DDPM(LINEAR, 6, seed=(seed,)))).noise(X[:1]) for seed in (3, 9)]
    assert torch.equal(rows[0], torch.cat(alone))
    step = next(iter(DDPM(LINEAR, 6, seed=(3, 9))))
    four = step.noise(X.repeat(2, 1, 1, 1))
    assert torch.equal(four[:2], rows[0]) and torch.equal(four[2:], rows[0])
    with pytest.raises(ValueError, match="2 seeds for 3 rows"):
        step.noise(torch.cat([X, X[:1]]))


def test_some_channels_are_guided():
    """DiT guides the first 3 of 4 channels; the fourth, and v, are the conditional's."""
    u, c = randn(1, 8, 3, 3, seed=3), randn(1, 8, 3, 3, seed=4)
    network = lambda x, t, context, edits: torch.cat([u, c])
    null, cond = randn(2, 1, 5).split(1)
    step = next(iter(DDPM(LINEAR, 3, variance="learned_range")))
    guided, _ = cfg(network, null, cond, 4.0, channels=3)(X[:1], step)
    torch.testing.assert_close(guided[:, :3], u[:, :3] + 4 * (c[:, :3] - u[:, :3]))
    assert torch.equal(guided[:, 3:], c[:, 3:])
    all_of_them, _ = cfg(network, null, cond, 4.0)(X[:1], step)
    torch.testing.assert_close(all_of_them, u + 4 * (c - u))
    with pytest.raises(ValueError, match="channels is 0, expected a whole number"):
        cfg(network, null, cond, channels=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"variance": "small"}, "variance is 'small', expected one of fixed_small, fixed_large"),
        ({"spacing": "even"}, "spacing is 'even', expected one of None, leading, linspace"),
        ({"seed": 1.5}, "seed is 1.5, expected a whole number"),
        ({"seed": (1, "a")}, "seed is 'a', expected a whole number"),
        ({"steps": 1001}, "steps is 1001, expected a whole number from 1 to 1000"),
    ],
)
def test_bad_options(change, message):
    with pytest.raises(ValueError, match=message):
        DDPM(LINEAR, **({"steps": 5} | change))


def test_samples_have_the_variance_of_the_data():
    """Data N(0, 0.5^2), whose exact eps is known: 1000 steps of DDPM give its variance back."""
    n = 20_000

    def predict(x, step, state):
        alpha, sigma = step.now
        return sigma / (0.25 * alpha**2 + sigma**2) * x, None

    x = denoise(randn(n, 1, 1, 1, seed=8).double(), DDPM(LINEAR, 1000), predict)
    assert x.var().item() == pytest.approx(0.25, rel=5 * math.sqrt(2 / n))
    assert abs(x.mean().item()) < 5 * 0.5 / math.sqrt(n)
