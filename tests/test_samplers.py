"""Samplers against diffusers' schedulers, against the formulas in float64, and against an ODE with
a known solution."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler, DPMSolverMultistepScheduler
from test_schedule import SD14

from minisd.sampling.loop import denoise
from minisd.sampling.samplers import DDIM, DPMpp2M
from minisd.sampling.schedule import Level, NoiseSchedule

COUNTS = [1, 2, 3, 4, 5, 7, 10, 20, 25, 30, 50, 100, 500, 999]
SCHEDULE = NoiseSchedule.from_dict(SD14)
TOLERANCE = 1e-5  # relative to the largest value, for every latent of a trajectory in fp32


def data(step):
    """Where a step is."""
    return step.index, step.t, step.now, step.next


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


X = randn(2, 4, 3, 5)
MIX = randn(4, 4, seed=1) / 2


def model(x, t):
    """A stand-in for the UNet: cheap, not linear, and different at every t."""
    return torch.tanh(torch.einsum("oc,bchw->bohw", MIX.to(x), x) + math.sin(t / 97)) + 0.3 * x


def trajectory(sampler, x):
    latents, x0 = [], None
    for step in sampler:
        x, x0 = step(x, model(x, step.t), x0)
        latents.append(x)
    return latents


def drawn(sampler, x):
    """The noise of each step, as diffusers' DDIMScheduler takes it, drawn by the step itself."""
    return [{"variance_noise": step.noise(x)} for step in sampler]


def reference(scheduler, steps, x, each=(), **kwargs):
    """The latents and timesteps of a diffusers scheduler, run as its pipelines do.

    steps: a slice of the schedule; each: further arguments of each step.
    """
    timesteps, latents = scheduler.timesteps[steps], []
    if isinstance(scheduler, DPMSolverMultistepScheduler):
        scheduler.set_begin_index(steps.start)
    for t, own in zip(timesteps, each or [{}] * len(timesteps), strict=True):
        x = scheduler.step(model(x, int(t)), t, x, **own, **kwargs).prev_sample
        latents.append(x)
    return timesteps.tolist(), latents


def assert_equal(ours, theirs, tolerance=TOLERANCE):
    """Returns the largest relative difference of the latents."""
    assert len(ours) == len(theirs)
    errors = [
        ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()
        for a, b in zip(ours, theirs)
    ]
    for i, error in enumerate(errors):
        assert error <= tolerance, (
            f"latent {i} of {len(ours)}: relative difference {error:.2e}"
        )  # false for NaN, too
    return max(errors, default=0.0)


def skips(n):
    return sorted({0, 1, n // 4, n // 2, n - 1, n}) if n < 500 else [0, n // 2]


def dpm(n, karras):
    scheduler = DPMSolverMultistepScheduler.from_config(SD14, use_karras_sigmas=karras)
    scheduler.set_timesteps(n)
    return scheduler


# ---- equal to diffusers


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("n", COUNTS)
def test_ddim_equals_diffusers(n, eta, record_property):
    for skip in skips(n):
        scheduler = DDIMScheduler.from_config(SD14)
        scheduler.set_timesteps(n)
        sampler = DDIM(SCHEDULE, n, skip, eta=eta, seed=5)
        each = drawn(sampler, X) if eta else ()
        timesteps, theirs = reference(scheduler, slice(skip, n), X, each, eta=eta)
        assert [step.t for step in sampler] == timesteps
        record_property(f"DDIM, eta {eta:g}", assert_equal(trajectory(sampler, X), theirs))


@pytest.mark.parametrize("n", COUNTS)
def test_ddim_inverse_equals_diffusers(n, record_property):
    for skip in skips(n):
        scheduler = DDIMInverseScheduler.from_config(SD14)
        scheduler.set_timesteps(n)
        sampler = DDIM(SCHEDULE, n, skip, inverse=True)
        timesteps, theirs = reference(scheduler, slice(0, n - skip), X)
        assert [step.t for step in sampler] == timesteps
        record_property("DDIM, inverse", assert_equal(trajectory(sampler, X), theirs))


@pytest.mark.parametrize("karras", [True, False])
@pytest.mark.parametrize("n", COUNTS)
def test_dpmpp_equals_diffusers(n, karras, record_property):
    for skip in skips(n):
        sampler = DPMpp2M(SCHEDULE, n, skip, karras)
        timesteps, theirs = reference(dpm(n, karras), slice(skip, n), X)
        assert [step.t for step in sampler] == timesteps
        error = assert_equal(trajectory(sampler, X), theirs)
        record_property(f"DPM-Solver++, {'Karras' if karras else 'linspace'}", error)


def test_dpmpp_karras_1000_steps_equals_diffusers(record_property):
    timesteps, theirs = reference(dpm(1000, True), slice(0, 1000), X)
    sampler = DPMpp2M(SCHEDULE, 1000)
    assert [step.t for step in sampler] == timesteps
    record_property("DPM-Solver++, Karras", assert_equal(trajectory(sampler, X), theirs))


@pytest.mark.parametrize("inverse", [False, True])
def test_ddim_1000_steps_is_refused_with_words(inverse):
    with pytest.raises(
        ValueError, match="1000 timesteps, leading with steps_offset 1, do not fit .* fewer steps"
    ):
        DDIM(SCHEDULE, 1000, inverse=inverse)
    assert len(DDIM(NoiseSchedule.from_dict(SD14 | {"steps_offset": 0}), 1000)) == 1000


def test_dpmpp_linspace_1000_steps_stays_finite():
    """Two of the 1000 timesteps are equal, where diffusers divides 0 by 0; that step must change
    nothing and pass."""
    levels = [step.now for step in DPMpp2M(SCHEDULE, 1000, karras=False)]
    assert sum(a == b for a, b in zip(levels, levels[1:])) == 1
    ours = trajectory(DPMpp2M(SCHEDULE, 1000, karras=False), X)
    assert torch.isfinite(torch.stack(ours)).all()
    close = trajectory(DPMpp2M(SCHEDULE, 999, karras=False), X)[-1]
    assert (ours[-1] - close).abs().max() <= 1e-3 * close.abs().max()
    _, theirs = reference(dpm(1000, False), slice(0, 1000), X)
    assert theirs[-1].isnan().any(), "diffusers has mended this: compare with it"


# Stable Diffusion 2's, and Lin et al. 2023's remedy, where the first level is noise alone.
V = SD14 | {"prediction_type": "v_prediction"}
ZERO_SNR = V | {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


@pytest.mark.parametrize("config", [V, ZERO_SNR], ids=["v", "zero-snr"])
@pytest.mark.parametrize("n", [1, 2, 5, 20, 50, 500])
def test_v_prediction_equals_diffusers(n, config, record_property):
    schedule = NoiseSchedule.from_dict(config)
    for eta in (0.0, 0.7):
        scheduler, sampler = DDIMScheduler.from_config(config), DDIM(schedule, n, eta=eta)
        scheduler.set_timesteps(n)
        each = drawn(sampler, X) if eta else ()
        timesteps, theirs = reference(scheduler, slice(0, n), X, each, eta=eta)
        assert [step.t for step in sampler] == timesteps
        record_property("v-prediction", assert_equal(trajectory(sampler, X), theirs))
    for karras in (True, False):
        scheduler = DPMSolverMultistepScheduler.from_config(config, use_karras_sigmas=karras)
        scheduler.set_timesteps(n)
        timesteps, theirs = reference(scheduler, slice(0, n), X)
        sampler = DPMpp2M(schedule, n, karras=karras)
        assert [step.t for step in sampler] == timesteps
        record_property("v-prediction", assert_equal(trajectory(sampler, X), theirs))
    if config is V:
        scheduler, sampler = DDIMInverseScheduler.from_config(V), DDIM(schedule, n, inverse=True)
        scheduler.set_timesteps(n)
        _, theirs = reference(scheduler, slice(0, n), X)
        record_property("v-prediction", assert_equal(trajectory(sampler, X), theirs))


def test_what_undoes_steps_of_eps_refuses_v(original):
    import minisd

    sd = minisd.load(original, device="cpu")
    sd.schedule, image = NoiseSchedule.from_dict(V), torch.zeros(1, 3, 32, 32)
    with pytest.raises(ValueError, match="the model predicts v_prediction, expected epsilon"):
        minisd.edict(sd, image, "a", "b")
    with pytest.raises(ValueError, match="refine is 2, the model predicts v_prediction"):
        minisd.invert(sd, image, "a", refine=2)


def test_v_and_eps_are_one_step_where_both_are_known():
    """v = alpha eps - sigma x0, so the same network said in the other way draws the same."""
    eps, v = NoiseSchedule.from_dict(SD14), NoiseSchedule.from_dict(V)
    for make in (DDIM, DPMpp2M):
        for a, b in zip(make(eps, 7), make(v, 7)):
            out = model(X, a.t)
            x0 = (X - a.now.sigma * out) / a.now.alpha
            assert_equal([b(X, a.now.alpha * out - a.now.sigma * x0)[0]], [a(X, out)[0]], 1e-4)


@pytest.mark.parametrize("n", COUNTS)
def test_start_equals_add_noise(n):
    """Image to image: a clean latent is noised to the level at which the remaining steps begin."""
    x0, noise = randn(2, 4, 3, 5, seed=2), randn(2, 4, 3, 5, seed=3)
    for skip in skips(n)[:-1]:
        ddim = DDIMScheduler.from_config(SD14)
        ddim.set_timesteps(n)
        expected = ddim.add_noise(x0, noise, ddim.timesteps[skip : skip + 1])
        assert_equal([DDIM(SCHEDULE, n, skip).start(x0, noise)], [expected], 1e-6)
        for karras in (True, False):
            scheduler = dpm(n, karras)
            scheduler.set_begin_index(skip)
            expected = scheduler.add_noise(x0, noise, scheduler.timesteps[skip : skip + 1])
            assert_equal([DPMpp2M(SCHEDULE, n, skip, karras).start(x0, noise)], [expected], 1e-6)


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("n", [1, 3, 20, 70])
def test_timestep_spacing_of_the_checkpoint_is_honoured(spacing, n):
    """A checkpoint that diffusers has saved again names a spacing, which then holds for every
    sampler."""
    config = SD14 | {"timestep_spacing": spacing}
    schedule = NoiseSchedule.from_dict(config)
    for ours, scheduler in [
        (DDIM(schedule, n), DDIMScheduler.from_config(config)),
        (DPMpp2M(schedule, n, karras=False), DPMSolverMultistepScheduler.from_config(config)),
        (
            DPMpp2M(schedule, n),
            DPMSolverMultistepScheduler.from_config(config, use_karras_sigmas=True),
        ),
    ]:
        scheduler.set_timesteps(n)
        timesteps, theirs = reference(scheduler, slice(0, n), X)
        assert [step.t for step in ours] == timesteps
        assert_equal(trajectory(ours, X), theirs)


@pytest.mark.parametrize(
    "change",
    [
        {"set_alpha_to_one": True},
        {"set_alpha_to_one": True, "steps_offset": 0},
        {"num_train_timesteps": 200},
    ],
)
def test_other_schedules_equal_diffusers(change):
    config = SD14 | change
    schedule = NoiseSchedule.from_dict(config)
    for ours, scheduler in [
        (DDIM(schedule, 12, eta=1.0, seed=5), DDIMScheduler.from_config(config)),
        (DDIM(schedule, 12, inverse=True), DDIMInverseScheduler.from_config(config)),
        (
            DPMpp2M(schedule, 12),
            DPMSolverMultistepScheduler.from_config(config, use_karras_sigmas=True),
        ),
    ]:
        scheduler.set_timesteps(12)
        noise = {}
        if isinstance(scheduler, DDIMScheduler):
            noise = {"eta": 1.0, "each": drawn(ours, X)}
        assert_equal(trajectory(ours, X), reference(scheduler, slice(0, 12), X, **noise)[1])


# ---- equal to the formulas, in float64


def alphas_cumprod():
    """The fp32 table, because that is what the model was trained with; all that follows is
    float64."""
    return (
        torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0).double().numpy()
    )


def test_ddim_formula_in_float64():
    """Song et al. 2020, eq. 12 with the sigma of eq. 16, whose alpha is our alphas_cumprod."""
    n, eta, a = 10, 0.5, alphas_cumprod()
    x, expected = X.double(), []
    for i in reversed(range(n)):
        t = 100 * i + 1
        a_t, a_next = a[t], a[t - 100] if t >= 100 else a[0]
        s = eta * math.sqrt((1 - a_next) / (1 - a_t)) * math.sqrt(1 - a_t / a_next)
        e = model(x, t)
        x = (
            math.sqrt(a_next) * (x - math.sqrt(1 - a_t) * e) / math.sqrt(a_t)
            + math.sqrt(1 - a_next - s * s) * e
        )
        # seed and index mixed as NumPy's SeedSequence does, so that no two steps are alike
        (mixed,) = np.random.SeedSequence([7, n - 1 - i]).generate_state(1, np.uint64)
        x = x + s * randn(*X.shape, seed=int(mixed)).double()
        expected.append(x)
    sampler = DDIM(SCHEDULE, n, eta=eta, seed=7)
    assert_equal(trajectory(sampler, X.double()), expected, 1e-12)
    assert_equal(trajectory(sampler, X), expected, 1e-6)


def test_dpmpp_formula_in_float64():
    """Lu et al. 2022, algorithm 2, in lambda = ln(alpha / sigma), on the sigmas of Karras et al.
    2022, eq. 5."""
    n, a = 20, alphas_cumprod()
    table = np.sqrt((1 - a) / a)
    sigmas = (
        table[-1] ** (1 / 7) + np.arange(n) / (n - 1) * (table[0] ** (1 / 7) - table[-1] ** (1 / 7))
    ) ** 7
    lam, alpha = -np.log(sigmas), 1 / np.sqrt(1 + sigmas**2)
    sigma = sigmas * alpha
    nearest = [
        999,
        962,
        921,
        876,
        827,
        772,
        710,
        640,
        561,
        474,
        380,
        285,
        197,
        123,
        69,
        35,
        15,
        6,
        2,
        0,
    ]
    x, before, expected = X.double(), None, []
    for i, t in enumerate(nearest):
        x0 = (x - sigma[i] * model(x, t)) / alpha[i]
        if i == n - 1:
            x = x0  # sigma 0: the exponential of -h vanishes
        else:
            h = lam[i + 1] - lam[i]
            r = (lam[i] - lam[i - 1]) / h if i else None
            D = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * before if i else x0
            x = sigma[i + 1] / sigma[i] * x - alpha[i + 1] * math.expm1(-h) * D
        before = x0
        expected.append(x)
    assert [step.t for step in DPMpp2M(SCHEDULE, n)] == nearest
    assert_equal(
        trajectory(DPMpp2M(SCHEDULE, n), X.double()), expected, 1e-6
    )  # the levels are rounded to fp32


def gaussian_error(sampler):
    """Error against the exact solution for data that is N(0, 0.5^2), whose eps and trajectory are
    known in closed form.

    The last step is left out: DPM-Solver++ jumps there to sigma = 0, by the same distance however
    many steps there are.
    """
    spread = lambda level: math.sqrt(0.25 * level.alpha**2 + level.sigma**2)
    x, x0, steps = X.double(), None, list(sampler)
    for step in steps[:-1]:
        x, x0 = step(x, step.now.sigma / spread(step.now) ** 2 * x, x0)
    exact = X.double() * spread(steps[-1].now) / spread(steps[0].now)
    return ((x - exact).abs().max() / exact.abs().max()).item()


def test_order_of_convergence():
    """Twice the steps: about half the error for DDIM, about a quarter for DPM-Solver++ 2M."""
    for make, order in [(lambda n: DDIM(SCHEDULE, n), 1), (lambda n: DPMpp2M(SCHEDULE, n), 2)]:
        coarse, fine = gaussian_error(make(20)), gaussian_error(make(40))
        assert 0.7 * 2**order < coarse / fine < 1.5 * 2**order
    assert gaussian_error(DPMpp2M(SCHEDULE, 20)) < gaussian_error(DDIM(SCHEDULE, 20)) / 4


SAMPLERS = [
    lambda n, skip=0: DDIM(SCHEDULE, n, skip),
    lambda n, skip=0: DPMpp2M(SCHEDULE, n, skip),
    lambda n, skip=0: DPMpp2M(SCHEDULE, n, skip, karras=False),
]


@pytest.mark.parametrize("make", SAMPLERS)
@pytest.mark.parametrize(("n", "skip"), [(1, 0), (2, 1), (9, 0), (9, 4), (50, 20)])
def test_a_perfect_prediction_recovers_the_image(make, n, skip):
    x0, noise = randn(1, 4, 3, 3, seed=2).double(), randn(1, 4, 3, 3, seed=3).double()
    sampler = make(n, skip)
    end = list(sampler)[-1].next
    x = denoise(sampler.start(x0, noise), sampler, lambda x, step, state: (noise, None))
    torch.testing.assert_close(x, end.alpha * x0 + end.sigma * noise, rtol=0, atol=1e-10)


@pytest.mark.parametrize("n", [1, 2, 20, 999])
def test_inverse_then_ddim_returns_the_start(n):
    x, eps = X.double(), randn(*X.shape, seed=4).double()
    noised = denoise(x, DDIM(SCHEDULE, n, inverse=True), lambda x, step, state: (eps, None))
    back = denoise(noised, DDIM(SCHEDULE, n), lambda x, step, state: (eps, None))
    torch.testing.assert_close(back, x, rtol=0, atol=1e-10)
    assert (noised - x).abs().max() > 1e-3


# ---- the steps themselves


@pytest.mark.parametrize("skip", [0, 3])
def test_inverse_is_the_same_steps_reversed(skip):
    forward = [(s.index, s.t, s.now, s.next) for s in DDIM(SCHEDULE, 10, skip)]
    inverse = [(s.index, s.t, s.next, s.now) for s in DDIM(SCHEDULE, 10, skip, inverse=True)]
    assert inverse == forward[::-1]


@pytest.mark.parametrize("make", SAMPLERS)
def test_skip_leaves_steps_out_and_moves_none(make):
    full, rest = make(10), make(10, 4)
    assert (len(full), len(rest)) == (10, 6) == (len(list(full)), len(list(rest)))
    assert [data(s) for s in full][4:] == [data(s) for s in rest]
    assert [s.index for s in rest] == [4, 5, 6, 7, 8, 9]
    assert all(type(s.t) is int for s in full)
    chain = list(full)
    assert all(a.next == b.now for a, b in zip(chain, chain[1:]))


def test_one_step():
    assert [data(s) for s in DDIM(SCHEDULE, 1)] == [(0, 1, SCHEDULE.level(1), SCHEDULE.level(0))]
    ((index, t, now, end),) = [data(s) for s in DPMpp2M(SCHEDULE, 1)]
    assert (index, t, end) == (0, 999, Level(1.0, 0.0)) and now.ratio == pytest.approx(
        14.6146469, rel=1e-6
    )


@pytest.mark.parametrize(("n", "duplicates"), [(44, 0), (45, 1), (100, 5)])
def test_karras_timesteps_may_repeat_but_levels_do_not(n, duplicates):
    steps = list(DPMpp2M(SCHEDULE, n))
    assert sum(a.t == b.t for a, b in zip(steps, steps[1:])) == duplicates
    assert all(s.now.ratio > s.next.ratio for s in steps)


@pytest.mark.parametrize("make", [*SAMPLERS, lambda n, skip: DDIM(SCHEDULE, n, skip, eta=1.0)])
def test_skip_all_is_empty_and_returns_the_input(make):
    sampler = make(5, 5)
    assert len(sampler) == 0 and list(sampler) == []
    x0 = randn(2, 4, 3, 3, seed=2)
    assert torch.equal(sampler.start(x0, randn(2, 4, 3, 3)), x0)
    assert denoise(x0, sampler, None) is x0


@pytest.mark.parametrize("sampler", [DDIM(SCHEDULE, 6, eta=1.0), DPMpp2M(SCHEDULE, 6)])
def test_iterations_share_no_state(sampler):
    """History and noise belong to one iteration: running again, or two at once, gives the same
    latents."""
    alone = trajectory(sampler, X)
    assert all(map(torch.equal, alone, trajectory(sampler, X)))
    a, b = (X, None), (X, None)  # (x, x0)
    for step_a, step_b, expected in zip(sampler, sampler, alone):
        a, b = (step(x, model(x, step.t), x0) for step, (x, x0) in ((step_a, a), (step_b, b)))
        assert torch.equal(a[0], expected) and torch.equal(b[0], expected)
    with pytest.raises(dataclasses.FrozenInstanceError):
        sampler.steps = 7


def test_eta_noise_is_the_samplers_own():
    run = lambda **kw: trajectory(DDIM(SCHEDULE, 4, **kw), X)[-1]
    assert torch.equal(run(eta=1.0, seed=1), run(eta=1.0, seed=1))
    assert not torch.equal(run(eta=1.0, seed=1), run(eta=1.0, seed=2))
    torch.manual_seed(0)
    before = torch.get_rng_state()
    run(eta=1.0)
    assert torch.equal(torch.get_rng_state(), before), "the global generator must not be used"
    steps = list(DDIM(SCHEDULE, 4, eta=1.0))
    for step in steps:
        assert not torch.equal(step.noise(X), X), "must not repeat the latents of seed 0"


def test_eta_noise_is_a_function_of_seed_and_index():
    """However often a step is called, whatever ran before it, and in which dtype."""
    steps = list(DDIM(SCHEDULE, 4, eta=1.0))
    noise = [step.noise(X) for step in steps]
    for a, b in itertools.combinations(noise, 2):
        assert not torch.equal(a, b)
    for step, first in zip(reversed(steps), reversed(noise)):
        assert torch.equal(step.noise(X), first) and torch.equal(step.noise(X.half()), first)
    skipped = DDIM(SCHEDULE, 4, skip=2, eta=1.0)
    assert all(map(torch.equal, noise[2:], (step.noise(X) for step in skipped)))
    other = [step.noise(X) for step in DDIM(SCHEDULE, 4, eta=1.0, seed=1)]
    assert not any(map(torch.equal, noise, other))
    assert [step.noise(X) for step in DDIM(SCHEDULE, 2)] == [None, None]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    "sampler", [DDIM(SCHEDULE, 5, eta=0.7), DDIM(SCHEDULE, 5, inverse=True), DPMpp2M(SCHEDULE, 5)]
)
def test_dtype_is_kept_and_arithmetic_is_wide(sampler, dtype):
    """One step from rounded input is the fp32 step rounded once."""
    x, eps = X.to(dtype), model(X, 1).to(dtype)
    wide, before = [v if dtype is torch.float64 else v.float() for v in (x, eps)], None
    for step in sampler:
        got, x0 = step(x, eps, before)
        expected, before = step(*wide, before)
        assert got.dtype == dtype and torch.equal(got, expected.to(dtype))
        assert x0.dtype == wide[0].dtype and torch.equal(x0, before)
    assert DPMpp2M(SCHEDULE, 5).start(x, eps).dtype == dtype


def test_denoise_calls_after_each_step_and_keeps_no_graph():
    seen = []

    def after(x, step):
        seen.append((step.index, x.clone()))
        return x + 1

    weight = torch.ones((), requires_grad=True)
    x = denoise(
        X, DDIM(SCHEDULE, 3), lambda x, step, state: (weight * model(x, step.t), None), after
    )
    assert (
        [i for i, _ in seen] == [0, 1, 2]
        and torch.equal(x, seen[-1][1] + 1)
        and not x.requires_grad
    )
    expected = X
    for (_, latent), step in zip(seen, DDIM(SCHEDULE, 3)):
        expected, _ = step(expected, model(expected, step.t))
        assert torch.equal(latent, expected)
        expected = expected + 1


def test_gradients_flow_through_a_step():
    x = X.clone().requires_grad_()
    for sampler in (DDIM(SCHEDULE, 3), DPMpp2M(SCHEDULE, 3)):
        step = next(iter(sampler))
        (grad,) = torch.autograd.grad(step(x, torch.zeros_like(x))[0].sum(), x)
        assert grad.abs().min() > 0


# ---- bad arguments


@pytest.mark.parametrize("make", [DDIM, DPMpp2M])
@pytest.mark.parametrize("steps", [0, -1, 1001, 2.0, 2.5, True, None, "20"])
def test_bad_steps(make, steps):
    with pytest.raises(ValueError, match=r"steps is .*, expected a whole number from 1 to 1000"):
        make(SCHEDULE, steps)


@pytest.mark.parametrize("make", [DDIM, DPMpp2M])
@pytest.mark.parametrize("skip", [-1, 6, 0.5, None])
def test_bad_skip(make, skip):
    with pytest.raises(ValueError, match=r"skip is .*, expected a whole number from 0 to 5"):
        make(SCHEDULE, 5, skip)


@pytest.mark.parametrize("eta", [-0.1, 1.1, math.nan, math.inf, "1", None])
def test_bad_eta(eta):
    with pytest.raises(ValueError, match=r"eta is .*, expected a number from 0 to 1"):
        DDIM(SCHEDULE, 5, eta=eta)


@pytest.mark.parametrize("seed", [None, "x", 1.5, 2**64])
def test_bad_seed(seed):
    with pytest.raises(
        ValueError, match="seed is .*, expected a whole number from -9223372036854775808 to"
    ):
        DDIM(SCHEDULE, 5, eta=1.0, seed=seed)


def test_inverse_has_no_noise_and_no_start():
    with pytest.raises(ValueError, match="eta is 0.5 with inverse=True, expected 0"):
        DDIM(SCHEDULE, 5, eta=0.5, inverse=True)
    with pytest.raises(ValueError, match="starts from the clean latent: give that"):
        DDIM(SCHEDULE, 5, inverse=True).start(X, X)


def test_numpy_integers_are_steps():
    assert [data(s) for s in DDIM(SCHEDULE, np.int64(7), np.int32(2))] == [
        data(s) for s in DDIM(SCHEDULE, 7, 2)
    ]


# ---- the loop


@pytest.mark.parametrize("eta", [0.0, 0.8])
def test_a_step_is_data_that_may_be_called_again_and_elsewhere(eta):
    """Fixed-point inversion calls a step at other latents; nothing in it changes."""
    for sampler in (DDIM(SCHEDULE, 3, eta=eta), DPMpp2M(SCHEDULE, 3)):
        for step in sampler:
            before, eps = dataclasses.replace(step), model(X, step.t)
            first = step(X, eps, X)
            step(randn(2, 4, 3, 5, seed=9), eps)
            again = step(X, eps, X)
            assert all(map(torch.equal, first, again)) and step == before
            with pytest.raises(AttributeError):
                step.index = 7


def test_the_loop_hands_on_the_state_of_one_run():
    """None first, then what the step before returned; the next run begins with None again."""
    seen = []

    def predict(x, step, state):
        seen.append(state)
        return model(x, step.t), (0 if state is None else state) + 1

    for _ in range(2):
        denoise(X, DPMpp2M(SCHEDULE, 3), predict)
    assert seen == [None, 1, 2] * 2


def test_the_loop_hands_on_x0():
    """It is the loop that gives DPM-Solver++ its second order: the trajectory is the one above."""
    for sampler in (DPMpp2M(SCHEDULE, 5), DDIM(SCHEDULE, 5, eta=0.5)):
        seen = []
        after = lambda x, step: seen.append(x) or x  # noqa: B023
        denoise(X, sampler, lambda x, step, state: (model(x, step.t), None), after)
        assert all(map(torch.equal, seen, trajectory(sampler, X)))
