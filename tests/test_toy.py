"""The toy in one and two dimensions against what is known in closed form."""

import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import minisd
from minisd.cli import main as cli
from minisd.sampling.schedule import Level
from minisd.toy import figure
from minisd.toy.exact import ExactNoise, guided, label, no_label
from minisd.toy.figure import FINE
from minisd.toy.learned import NoiseMLP, train
from minisd.toy.mixture import Mixture, kolmogorov
from minisd.toy.world import LINE, PLANE, ho_schedule, start

SCHEDULE = ho_schedule()
EXACT = ExactNoise(LINE, SCHEDULE)
N = 100_000
# Massart 1990: N samples of the distribution itself are further from it once in a million times.
SAMPLE = math.sqrt(math.log(2e6) / (2 * N))


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def normal(x, mean, variance):
    return math.exp(-((x - mean) ** 2) / (2 * variance)) / math.sqrt(2 * math.pi * variance)


def noised(x, t, weights, data=LINE):
    """q_t(x) of a mixture in one dimension, from its formula."""
    a_bar = SCHEDULE.alphas_cumprod[t].double().item()
    parts = zip(weights, data.means[:, 0].tolist(), data.stds.tolist())
    return sum(w * normal(x, a_bar**0.5 * m, a_bar * s**2 + 1 - a_bar) for w, m, s in parts)


def noise(x, t, weights):
    """-sigma_t times the central difference of log q_t."""
    sigma, h = math.sqrt(1 - SCHEDULE.alphas_cumprod[t].double().item()), 1e-5
    high, low = (math.log(noised(x + d, t, weights)) for d in (h, -h))
    return -sigma * (high - low) / (2 * h)


# ---- the mixture


def test_the_forward_marginals_are_those_of_noised_samples():
    """q_t from the formula, and from samples x0 that are noised as training noises them."""
    for t in (0, 100, 400, 999):
        level, q = SCHEDULE.level(t), LINE.at(SCHEDULE.level(t))
        x = torch.linspace(-4, 4, 9, dtype=torch.float64)
        expected = [noised(value, t, LINE.weights.tolist()) for value in x.tolist()]
        assert np.allclose(q.log_density(x[:, None]).exp(), expected, rtol=1e-9)
        x0 = LINE.sample(N, seed=t)
        eps = torch.randn(N, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(t + 1))
        assert kolmogorov(level.alpha * x0 + level.sigma * eps, q) < SAMPLE
        assert kolmogorov(1.02 * level.alpha * x0 + level.sigma * eps + 0.03, q) > SAMPLE


def test_cdf_score_and_shares_belong_to_the_density():
    x = torch.linspace(-3.3, 3.1, 21, dtype=torch.float64)
    h = 1e-5
    slope = (LINE.cdf(x + h) - LINE.cdf(x - h)) / (2 * h)
    assert torch.allclose(slope, LINE.log_density(x[:, None]).exp(), atol=1e-9)
    for data in (LINE, PLANE):
        x = data.sample(50, seed=3).requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(data.log_density(x).sum(), x)
        assert torch.allclose(data.score(x), gradient, atol=1e-10)
        assert torch.allclose(data.shares(x).sum(1), torch.ones(50, dtype=torch.float64))
    alone = data.log_parts(x)[:, 1] - data.weights[1].log()
    assert torch.allclose(alone, data.component(1).log_density(x))


def test_densities_of_the_plane_are_of_sum_1():
    """The whole, and each component alone, by its values on a grid."""
    line = torch.linspace(-6, 6, 241, dtype=torch.float64)
    grid = torch.cartesian_prod(line, line)
    for data in (PLANE, *(PLANE.component(k) for k in range(3))):
        total = data.log_density(grid).exp().sum() * 0.05**2
        assert total.item() == pytest.approx(1, rel=1e-6)


def test_a_projection_of_the_plane_is_a_mixture_on_a_line():
    x = PLANE.sample(N, seed=1)
    for direction in ([1.0, 0.0], [0.3, -1.2]):
        u = torch.tensor(direction, dtype=torch.float64)
        assert kolmogorov(x @ u, PLANE.along(direction)) < SAMPLE
    assert kolmogorov(x[:, 0], PLANE.along([0.0, 1.0])) > 0.1


def test_kolmogorov_by_hand():
    flat = Mixture.of([1], [0], [1])
    x = torch.tensor([[1.0], [-1.0]])
    # F is 0.159 and 0.841; the share goes 0 -> 1/2 -> 1 there
    assert kolmogorov(x, flat) == pytest.approx(0.5 - 0.158655, abs=1e-6)
    for alone in (x[:1], x[1:]):  # from 0 to 1 at once, at F = 0.841 and at 0.159
        assert kolmogorov(alone, flat) == pytest.approx(1 - 0.158655, abs=1e-6)


def test_the_world_is_ho_et_als_and_a_start_is_of_its_level():
    """abar_T of beta from 1e-4 to 0.02 is 4.04e-5; a later start is far from N(0, 1)."""
    assert SCHEDULE.alphas_cumprod[-1].item() == pytest.approx(4.036e-5, rel=1e-3)
    later = minisd.DDIM(SCHEDULE, 20, skip=14)
    first = next(iter(later))
    q, one = LINE.at(first.now), start(LINE, later, N)
    assert kolmogorov(one, q) < SAMPLE < kolmogorov(one, LINE.at(first.next))
    assert kolmogorov(one, Mixture.of([1], [0], [1])) > 0.05
    assert torch.equal(start(LINE, later, 9, seed=3), start(LINE, later, 9, seed=3))
    assert not torch.equal(start(LINE, later, 9, seed=3), start(LINE, later, 9))


def test_weights_count_by_their_shares_and_what_does_not_fit_is_said():
    x = torch.linspace(-1, 2, 5, dtype=torch.float64)[:, None]
    one, other = (Mixture.of(w, [0, 1], [1, 2]) for w in ([0.25, 0.75], [2, 6]))
    assert torch.allclose(one.log_density(x), other.log_density(x))
    with pytest.raises(ValueError, match="the mixture has 2 dimensions, expected 1"):
        PLANE.cdf(x)
    for k in (3, -1):
        with pytest.raises(ValueError, match=f"component is {k}, expected a whole number"):
            LINE.component(k)
    with pytest.raises(ValueError, match="context: got"):
        EXACT(x, torch.tensor(3), torch.ones(5, 1, 2))


@pytest.mark.parametrize(
    "weights, means, stds, match",
    [
        ([1, 1], [0], [1, 1], "means: got"),
        ([1, 1], [0, 1], [1], "stds: got"),
        ([1, 0], [0, 1], [1, 1], "expected weights above 0"),
        ([1, 1], [0, 1], [1, -1], "expected weights above 0"),
        ([1, math.nan], [0, 1], [1, 1], "expected weights above 0"),
    ],
)
def test_refuses_what_is_no_mixture(weights, means, stds, match):
    with pytest.raises(ValueError, match=match):
        Mixture.of(weights, means, stds)


# ---- the exact noise, under minisd's guidance


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.5])
def test_guided_noise_is_its_formula(scale):
    """u + scale (c - u), both from differences of log q_t."""
    x = torch.linspace(-2.9, 2.7, 8, dtype=torch.float64)[:, None]
    step = list(minisd.DDIM(SCHEDULE, 10))[4]
    assert step.t == 500
    eps, _ = guided(EXACT, LINE, 2, scale)(x, step)
    for value, found in zip(x[:, 0].tolist(), eps[:, 0].tolist()):
        u, c = noise(value, 500, LINE.weights.tolist()), noise(value, 500, [0, 0, 1])
        assert found == pytest.approx(u + scale * (c - u), abs=1e-7)


def test_contexts_and_groups():
    x, t = PLANE.sample(5), torch.tensor(300)
    exact = ExactNoise(PLANE, SCHEDULE)
    rows = torch.cat([no_label(PLANE).expand(5, -1, -1), label(PLANE, 1).expand(5, -1, -1)])
    u, c = exact(x, t, rows).chunk(2)
    level = SCHEDULE.level(300)
    assert torch.allclose(u, -level.sigma * PLANE.at(level).score(x))
    assert torch.allclose(c, -level.sigma * PLANE.component(1).at(level).score(x))
    with pytest.raises(ValueError, match="scale is 2.0"):
        guided(exact, PLANE, None, 2.0)
    with pytest.raises(ValueError, match="label is 3"):
        label(PLANE, 3)
    with pytest.raises(ValueError, match="got edits of a, expected none"):
        exact(x, t, no_label(PLANE), {"a": None})


# ---- samplers. In one dimension a sampler without noise is a growing function of where it starts,
# so the distribution that it draws from is known without a sample: F(start) at sampler(start).


def discretisation(sampler, predict, data=LINE, target=LINE):
    """The largest |F(start) - F(end)|, over a fine grid of starts."""
    q = data.at(next(iter(sampler)).now)
    x = torch.linspace(-4.2, 4.2, 4001, dtype=torch.float64)[:, None]
    end = minisd.denoise(x, sampler, predict)
    assert (end.diff(dim=0) > 0).all()
    return (q.cdf(x) - target.cdf(end)).abs().max().item()


@pytest.mark.parametrize(
    "make, order",
    [(minisd.DDIM, 1), (lambda *a: minisd.DPMpp2M(*a, karras=False), 2)],
    ids=["ddim", "dpm++"],
)
def test_the_distance_falls_with_the_steps(make, order):
    """As 1 / steps with DDIM; faster with DPM-Solver++ of second order."""
    predict = guided(EXACT, LINE)
    coarse, fine = (discretisation(make(SCHEDULE, n), predict) for n in (20, 80))
    assert fine < 0.016 and coarse > 0.02
    assert 3.2 < coarse / fine < 5 if order == 1 else coarse / fine > 6


@pytest.mark.parametrize("name", ["ddim", "dpm++"])
def test_samples_are_those_of_the_data(name):
    """1e5 of them: no further from the mixture than the sample's size and the steps allow."""
    sampler = (minisd.DDIM if name == "ddim" else minisd.DPMpp2M)(SCHEDULE, 25)
    predict = guided(EXACT, LINE)
    x = minisd.denoise(start(LINE, sampler, N), sampler, predict)
    assert kolmogorov(x, LINE) < SAMPLE + discretisation(sampler, predict)
    assert discretisation(sampler, predict) < 0.03


def test_ddpm_draws_from_the_data():
    """Its steps are random, so the part of the steps is a bound: about 0.9 / steps here."""
    predict, found = guided(EXACT, LINE), []
    for steps in (10, 40):
        sampler = minisd.DDPM(SCHEDULE, steps, seed=1)
        x = minisd.denoise(start(LINE, sampler, N), sampler, predict)
        found.append(kolmogorov(x, LINE))
        assert found[-1] < SAMPLE + 1.2 / steps
    assert found[1] < 0.5 * found[0]


@pytest.mark.parametrize("steps", [3, 20])
def test_each_variance_of_ddpm_is_exact_for_its_own_data(steps):
    """beta for N(0, 1), beta~ for a single point, of any subsequence of the timesteps."""
    unit, point = Mixture.of([1], [0], [1]), Mixture.of([1], [1.5], [0])
    for data, variance in ((unit, "fixed_large"), (point, "fixed_small")):
        sampler = list(minisd.DDPM(SCHEDULE, steps, variance=variance))[:-1]  # not to alpha = 1
        predict = guided(ExactNoise(data, SCHEDULE), data)
        x = minisd.denoise(data.at(sampler[0].now).sample(N), sampler, predict)
        assert kolmogorov(x, data.at(sampler[-1].next)) < SAMPLE
    other = minisd.denoise(
        unit.at(sampler[0].now).sample(N),
        list(minisd.DDPM(SCHEDULE, steps))[:-1],
        guided(ExactNoise(unit, SCHEDULE), unit),
    )
    assert steps > 3 or kolmogorov(other, unit.at(sampler[-1].next)) > SAMPLE


def test_the_plane_is_drawn_too():
    sampler = minisd.DPMpp2M(SCHEDULE, 20)
    predict = guided(ExactNoise(PLANE, SCHEDULE), PLANE)
    x = minisd.denoise(start(PLANE, sampler, N), sampler, predict)
    for direction in ([1.0, 0.0], [0.0, 1.0], [1.0, -2.0]):
        u = torch.tensor(direction, dtype=torch.float64)
        assert kolmogorov(x @ u, PLANE.along(direction)) < SAMPLE + 0.025


def test_inversion_leads_back_and_the_closer_the_more_steps():
    """x0 -> noise -> x0. The noise is distributed as q at the first level."""
    predict, x0, off = guided(EXACT, LINE), LINE.sample(2000, seed=5), []
    for steps in (25, 100):
        sampler = minisd.DDIM(SCHEDULE, steps)
        z = minisd.denoise(x0, minisd.DDIM(SCHEDULE, steps, inverse=True), predict)
        off.append((minisd.denoise(z, sampler, predict) - x0).abs().max().item())
    # of 2000 samples 0.06; the rest is the steps'
    assert kolmogorov(z, LINE.at(next(iter(sampler)).now)) < math.sqrt(math.log(2e6) / 4000) + 0.01
    assert off[1] < 0.35 * off[0] and off[1] < 0.1


# ---- guidance


def test_scale_1_draws_the_component_and_other_scales_do_not_draw_the_tilted_density():
    sampler = minisd.DDIM(SCHEDULE, 100)
    component = LINE.component(2)
    assert discretisation(sampler, guided(EXACT, LINE, 2), component, component) < 0.012
    # Ho and Salimans' density p(x) p(c | x)^3, normalised on a grid, is not what scale 3 draws.
    x = torch.linspace(-6, 8, 14_001, dtype=torch.float64)[:, None]
    tilted = LINE.log_density(x) + 3 * LINE.shares(x)[:, 2].log()
    F = tilted.exp().cumsum(0) / tilted.exp().sum()
    z = start(LINE, sampler, 20_000)
    z = minisd.denoise(z, sampler, guided(EXACT, LINE, 2, 3.0))[:, 0].sort().values
    own = torch.arange(1, 20_001, dtype=torch.float64) / 20_000
    found = F[torch.searchsorted(x[:, 0], z).clamp(max=len(x) - 1)]
    assert (own - found).abs().max() > 0.1


def test_guided_samples_are_those_of_a_fine_solution_of_the_equation():
    """d(x / alpha) = eps d(sigma / alpha), by the midpoint method in ln(sigma / alpha), with the
    noise from the formula in NumPy."""
    scale, k = 3.0, 2
    w, m, s = (v.numpy() for v in (LINE.weights, LINE.means[:, 0], LINE.stds))

    def slope(y, log_ratio):
        """r eps, at x = alpha y."""
        r = np.exp(log_ratio)
        alpha = 1 / np.sqrt(1 + r * r)
        x, variance = alpha * y, alpha**2 * s**2 + (alpha * r) ** 2
        parts = w * np.exp(-((x[:, None] - alpha * m) ** 2) / (2 * variance)) / np.sqrt(variance)
        to_means = (x[:, None] - alpha * m) / variance
        u = (parts * to_means).sum(1) / parts.sum(1)
        return r * alpha * r * (u + scale * (to_means[:, k] - u))

    sampler = minisd.DDIM(SCHEDULE, 500)
    first, *_, last = sampler
    x = np.linspace(-2, 2, 41)
    y, logs = x / first.now.alpha, np.log([first.now.ratio, 1e-4])
    h = (logs[1] - logs[0]) / 4000
    for i in range(4000):
        now = logs[0] + i * h
        y = y + h * slope(y + h / 2 * slope(y, now), now + h / 2)
    steps = torch.from_numpy(x)[:, None]
    predict = guided(EXACT, LINE, k, scale)
    found = {
        n: minisd.denoise(steps, minisd.DDIM(SCHEDULE, n), predict)[:, 0].numpy() for n in (50, 500)
    }
    assert np.abs(found[500] - y).max() < 0.02
    assert np.abs(found[500] - y).max() < 0.3 * np.abs(found[50] - y).max()


# ---- the learned network


@pytest.fixture(scope="module")
def learned():
    return train(LINE, SCHEDULE)


def test_the_learned_network_comes_near_the_exact_noise(learned):
    """Root mean square difference over q_t; the noise itself has 1."""
    for k in (None, 0, 1, 2):
        context = no_label(LINE) if k is None else label(LINE, k)
        data = LINE if k is None else LINE.component(k)
        for t in (0, 10, 100, 300, 600, 900):
            x = data.at(SCHEDULE.level(t)).sample(2000, seed=t)
            rows, time = context.expand(2000, -1, -1), torch.tensor(t)
            off = (learned(x, time, rows) - EXACT(x, time, rows)).square().mean().sqrt()
            assert off < 0.15, (k, t, off)


def test_the_learned_network_draws_the_data(learned):
    sampler = minisd.DPMpp2M(SCHEDULE, 25)
    x = minisd.denoise(start(LINE, sampler, 20_000), sampler, guided(learned, LINE))
    assert kolmogorov(x, LINE) < 0.05
    x = minisd.denoise(start(LINE.component(1), sampler, 20_000), sampler, guided(learned, LINE, 1))
    assert kolmogorov(x, LINE.component(1)) < 0.05


def test_training_is_a_function_of_its_seed_and_leaves_torchs_alone():
    before = torch.random.get_rng_state()
    one, same, other = (train(PLANE, SCHEDULE, steps=2, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(1)  # whatever that state is
    again = train(PLANE, SCHEDULE, steps=2, seed=1)
    assert torch.equal(one.layers[0].weight, again.layers[0].weight)
    assert torch.equal(one.layers[0].weight, same.layers[0].weight)
    assert not torch.equal(one.layers[0].weight, other.layers[0].weight)
    x, t = PLANE.sample(4), torch.tensor([3, 50, 200, 999])
    rows = torch.cat([no_label(PLANE), label(PLANE, 0)]).repeat_interleave(4, 0)
    both = one(x, t[2], rows)
    for i in range(4):  # rows do not look at one another; a time for each, too
        alone = one(x[[i]], t[2], rows[[i]])
        assert torch.allclose(both[[i]], alone, atol=1e-6)
        assert torch.allclose(one(x, t, rows[:4])[[i]], one(x[[i]], t[i], rows[[i]]), atol=1e-6)
    both = one(x, t, rows)  # a time for each, and two groups
    for group in (slice(0, 4), slice(4, 8)):
        assert torch.allclose(both[group], one(x, t, rows[group]), atol=1e-6)
    assert not any(parameter.requires_grad for parameter in one.parameters())
    with pytest.raises(ValueError, match="got edits of a, expected none"):
        one(x, t, rows, {"a": None})
    for options, message in (({"steps": 0}, "steps is 0"), ({"unlabelled": 2}, "unlabelled is 2")):
        with pytest.raises(ValueError, match=message):
            train(PLANE, SCHEDULE, **options)


def test_the_network_gives_sigma_times_its_layers():
    network = NoiseMLP(SCHEDULE, 1, 3)
    del network.layers
    network.layers = lambda inputs: torch.ones(len(inputs), 1)
    t, x, rows = torch.tensor([3, 500]), torch.zeros(2, 1), no_label(LINE).expand(4, -1, -1)
    sigma = (1 - SCHEDULE.alphas_cumprod[t]).sqrt()[:, None]
    assert torch.allclose(network(x, t, rows), torch.cat([sigma, sigma]))
    assert torch.allclose(network(x, t[1], rows), sigma[1].expand(4, 1))


def test_a_share_of_the_samples_hides_its_label(monkeypatch):
    seen, forward = [], NoiseMLP.forward

    def recorded(self, x, t, context, edits=None):
        seen.append(context[:, 0].double())
        return forward(self, x, t, context, edits)

    monkeypatch.setattr(NoiseMLP, "forward", recorded)
    train(LINE, SCHEDULE, steps=2, batch=4096, unlabelled=0.2)
    contexts = torch.cat(seen)
    hidden = (contexts - LINE.weights).abs().max(1).values < 1e-6
    assert abs(hidden.double().mean().item() - 0.2) < 0.03
    assert (contexts[~hidden].max(1).values == 1).all() and (contexts[~hidden].sum(1) == 1).all()
    shares = contexts[~hidden].mean(0)
    assert (shares - LINE.weights).abs().max() < 0.04  # each its own label


# ---- the figure


def page_of(draw, *arguments, size=(400, 200)):
    """(height, width, 3) of what a function of figure.py draws on a page of 3 times that size."""
    page = Image.new("RGB", (size[0] * FINE, size[1] * FINE), "white")
    target = page if draw is figure.field else ImageDraw.Draw(page)
    draw(target, (0, 0, *size), *arguments)
    return np.asarray(page, int)


def has(page, place, colour, reach=4):
    """Whether there is a pixel of the colour near (x, y)."""
    x, y = (round(value) for value in place)
    near = page[max(y - reach, 0) : y + reach + 1, max(x - reach, 0) : x + reach + 1]
    return (near == colour).all(-1).any()


def points(axes, x, y):
    [place] = axes.points(*(torch.tensor([value], dtype=torch.float64) for value in (x, y)))
    return place


def test_axes_have_y_above():
    axes = figure.Axes((10, 20, 110, 220), (0.0, 1.0), (-1.0, 1.0))
    x, y = torch.tensor([[0.0, 1.0, 0.5], [-1.0, 1.0, 0.0]])
    assert axes.points(x, y) == [(30, 660), (330, 60), (180, 360)]


def test_paths_keep_the_first_rows():
    x, sampler = LINE.sample(5), minisd.DDIM(SCHEDULE, 6)
    paths, seen = figure.Paths(x[:2]), [x]
    predict = guided(EXACT, LINE)

    def after(x, step):
        seen.append(x.clone())
        return paths(x, step)

    minisd.denoise(x, sampler, predict, after)
    assert torch.equal(paths.stacked(), torch.stack(seen)[:, :2, 0]) and len(seen) == 7


def test_trajectories_are_coloured_by_where_they_end():
    """Two that change places; beside them the density at the first step, and the data's."""
    way = torch.linspace(-2, 2, 30, dtype=torch.float64)
    paths = torch.stack([way, -way], dim=1)  # to components 2 and 0
    drawn = [page_of(figure.trajectories, LINE, SCHEDULE, paths, t) for t in (900, 20)]
    axes = figure.Axes((90, 0, 310, 200), (0, 29), (-2.2, 2.2))
    for page in drawn:
        for step, value in ((2, way[2].item()), (27, way[27].item())):
            assert has(page, points(axes, step, value), figure.COLOURS[2])
            assert has(page, points(axes, step, -value), figure.COLOURS[0])
            assert not has(page, points(axes, step, -value), figure.COLOURS[2])
    left, right = (slice(None), slice(0, 90 * FINE - 4)), (slice(None), slice(310 * FINE + 4, None))
    assert (drawn[0][left] != drawn[1][left]).any() and (drawn[0][right] == drawn[1][right]).all()
    x = torch.linspace(-2.2, 2.2, 400, dtype=torch.float64)[:, None]
    p = LINE.at(SCHEDULE.level(900)).log_density(x).exp()
    beside = figure.Axes((0, 0, 90, 200), (0, 1.1 * p.max().item()), (-2.2, 2.2))
    for i in (100, 200, 250):
        assert has(drawn[0], points(beside, p[i].item(), x[i].item()), (0, 0, 0))


def test_densities_go_from_dark_to_light():
    page = page_of(figure.densities, LINE, SCHEDULE, (0, 999))
    x = torch.linspace(-4, 4, 500, dtype=torch.float64)[:, None]
    curves = [LINE.at(SCHEDULE.level(t)).log_density(x).exp() for t in (0, 999)]
    axes = figure.Axes((0, 0, 400, 200), (-4.0, 4.0), (0.0, 1.1 * curves[0].max().item()))
    for curve, colour in zip(curves, ((0, 0, 55), (200, 200, 255))):
        for i in (130, 245, 320):
            assert has(page, points(axes, x[i].item(), curve[i].item()), colour)


def test_the_field_points_uphill():
    """One Gaussian, whose score is the way to its mean over s^2: arrows of 0.16 times the root of
    that length; the ground is darkest at the mean."""
    for mean in ([0.0, 0.0], [2.0, 1.0]):
        data = Mixture.of([1], [mean], [1.0])
        page = page_of(figure.field, data, Level(1.0, 0.0), "", size=(400, 400))
        axes = figure.Axes((0, 0, 400, 400), (-4.0, 4.0), (-4.0, 4.0))
        blue = figure.COLOURS[1]
        start = torch.tensor([0.94 * 4, 0.0], dtype=torch.float64)
        score = torch.tensor(mean, dtype=torch.float64) - start
        tip = score / score.norm().sqrt()
        for part in (0.02, 0.09, 0.15):
            assert has(page, points(axes, *(start + part * tip).tolist()), blue)
        assert not has(page, points(axes, *(start - 0.05 * tip).tolist()), blue)
        assert not has(page, points(axes, *(start + 0.2 * tip).tolist()), blue)
        x, y = mean

        def shade(x, y, page=page, axes=axes):
            across, down = map(round, points(axes, x, y))
            return np.median(page[down - 9 : down + 10, across - 9 : across + 10])

        assert (
            shade(x, y) < 150 and shade(-3, -3) > 240 and (x == y or shade(y, x) > shade(x, y) + 50)
        )
        assert y == 0 or shade(x, -y) > shade(x, y) + 50


# ---- the command


def test_the_command_says_what_does_not_fit(tmp_path, capsys):
    to = str(tmp_path / "toy.png")
    for options, message in (
        (["--to", "toy.jpg"], "expected a name that ends in .png"),
        (["--to", to, "--guidance", "2"], "--guidance: expected --label K with it"),
        (["--to", to, "--label", "3"], "label is 3, expected a whole number from 0 to 2"),
        (["--to", to, "--steps", "2000"], "steps is 2000"),
    ):
        assert cli.main(["toy", *options]) == 2
        assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_command_draws_and_its_png_says_how(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ["--sampler", "ddpm", "--steps", "10", "--label", "1", "--guidance", "2"]
    assert cli.main(["toy", "--to", "a.png", *options]) == 0
    assert "Kolmogorov distance to component 1: 0." in capsys.readouterr().out
    assert cli.main(["info", "a.png"]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert (
        line
        == "minisd toy --sampler ddpm --steps 10 --label 1 --guidance 2 --seed 0 --to again.png"
    )
    assert cli.main(line.split()[1:]) == 0
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "a.png").read_bytes()
