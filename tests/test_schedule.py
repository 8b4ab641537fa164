"""NoiseSchedule against diffusers' tables, and the config keys it honours, ignores and refuses."""

import json
import math
import random
from collections import Counter

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from minisd.sampling.samplers import DDIM
from minisd.sampling.schedule import Level, NoiseSchedule

# scheduler_config.json of Stable Diffusion v1.4.
SD14 = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}


def test_sd14_numbers():
    schedule = NoiseSchedule.from_dict(SD14)
    assert len(schedule) == 1000 and schedule.alphas_cumprod.dtype == torch.float32
    assert schedule.alphas_cumprod[0].item() == pytest.approx(0.9991499781608582, rel=1e-7)
    assert schedule.alphas_cumprod[999].item() == pytest.approx(0.00466009508818388, rel=1e-6)
    assert schedule.ratios()[[0, -1]] == pytest.approx([0.0291675, 14.614646911621094], rel=1e-5)
    assert schedule.steps_offset == 1 and schedule.timestep_spacing is None
    assert schedule.clean == schedule.level(0)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02},
        {"num_train_timesteps": 37},
        {"num_train_timesteps": 4, "trained_betas": [0.1, 0.2, 0.05, 0.3]},
    ],
)
def test_tables_equal_diffusers(change):
    config = SD14 | change
    ours, theirs = NoiseSchedule.from_dict(config), DDIMScheduler.from_config(config)
    assert torch.equal(ours.alphas_cumprod, theirs.alphas_cumprod)
    sigmas = DPMSolverMultistepScheduler.from_config(config).sigmas.numpy()
    np.testing.assert_allclose(ours.ratios(), sigmas, rtol=1e-6)


def test_absent_keys_take_the_defaults_of_ddim():
    ours, theirs = NoiseSchedule.from_dict({}), DDIMScheduler()
    assert torch.equal(ours.alphas_cumprod, theirs.alphas_cumprod)
    assert (ours.steps_offset, ours.set_alpha_to_one) == (
        theirs.config.steps_offset,
        theirs.config.set_alpha_to_one,
    )
    assert ours.clean == Level(1.0, 0.0)


def test_levels_preserve_variance_and_fall():
    schedule = NoiseSchedule.from_dict(SD14)
    levels = [schedule.level(t) for t in range(1000)]
    assert all(abs(a * a + s * s - 1) < 1e-12 for a, s in levels)
    assert [a for a, _ in levels] == pytest.approx(
        schedule.alphas_cumprod.double().sqrt().tolist(), rel=1e-12
    )
    assert all(noisier.sigma > level.sigma for level, noisier in zip(levels, levels[1:]))
    for ratio in (0.0, 1e-3, 0.5, 14.6):
        assert Level.from_ratio(ratio).ratio == pytest.approx(ratio, rel=1e-12)


@pytest.mark.parametrize("t", [-1, 1000])
def test_timestep_outside_is_refused(t):
    with pytest.raises(ValueError, match=rf"timestep {t} .* 0 to 999"):
        NoiseSchedule.from_dict(SD14).level(t)


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("n", [1, 2, 3, 7, 20, 50, 333, 999])
def test_spacings_equal_diffusers(spacing, n):
    config = SD14 | {"timestep_spacing": spacing}
    theirs = DDIMScheduler.from_config(config)
    theirs.set_timesteps(n)
    assert NoiseSchedule.from_dict(config).timesteps(n, spacing) == theirs.timesteps.tolist()


@pytest.mark.parametrize(("offset", "n"), [(1, 1000), (0, 1001), (1000, 1)])
def test_timesteps_that_do_not_fit(offset, n):
    with pytest.raises(
        ValueError,
        match=f"{n} timesteps, leading with steps_offset {offset}, do not fit .* 0 to 999",
    ):
        NoiseSchedule.from_dict(SD14 | {"steps_offset": offset}).timesteps(n, "leading")


@pytest.mark.parametrize(
    "change",
    [
        {"prediction_type": "sample"},
        {"clip_sample": True},
        {"thresholding": True},
        {"rescale_betas_zero_snr": 1},
        {"use_flow_sigmas": True},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"timestep_spacing": "even"},
        {"num_train_timesteps": 0},
        {"num_train_timesteps": 10.5},
        {"steps_offset": -1},
        {"steps_offset": None},
    ],
)
def test_other_maths_is_refused(change):
    ((key, value),) = change.items()
    with pytest.raises(ValueError, match=f"{key} is {value!r}, (only|expected) "):
        NoiseSchedule.from_dict(SD14 | change)


@pytest.mark.parametrize(
    "change",
    [{"beta_end": 2.0}, {"beta_start": None}, {"trained_betas": []}, {"trained_betas": [0.1, 0.0]}],
)
def test_betas_are_between_0_and_1(change):
    with pytest.raises(ValueError, match="betas are .*, expected numbers between 0 and 1"):
        NoiseSchedule.from_dict(SD14 | change)


@pytest.mark.parametrize("kind", ["linear", "scaled_linear"])
def test_zero_terminal_snr_equals_diffusers(kind):
    config = SD14 | {"rescale_betas_zero_snr": True, "beta_schedule": kind}
    schedule = NoiseSchedule.from_dict(config | {"prediction_type": "v_prediction"})
    assert torch.equal(schedule.alphas_cumprod, DDIMScheduler.from_config(config).alphas_cumprod)
    assert schedule.level(999) == (0.0, 1.0) and schedule.level(999).ratio == math.inf
    theirs = DPMSolverMultistepScheduler.from_config(config)
    assert schedule.ratios()[-1] == theirs.sigmas.max() and 4095 < schedule.ratios()[-1] < 4097
    with pytest.raises(ValueError, match="to 0.0, the network predicts epsilon, expected below 1"):
        NoiseSchedule.from_dict(config)


def test_schedulers_without_betas_are_refused():
    with pytest.raises(ValueError, match="FlowMatchEulerDiscreteScheduler without beta_start"):
        NoiseSchedule.from_dict(
            dict(FlowMatchEulerDiscreteScheduler().config)
            | {"_class_name": "FlowMatchEulerDiscreteScheduler"}
        )


@pytest.mark.parametrize(
    "scheduler", [DDIMScheduler, PNDMScheduler, EulerDiscreteScheduler, UniPCMultistepScheduler]
)
def test_files_that_diffusers_writes_are_read(scheduler):
    config = json.loads(scheduler.from_config(SD14).to_json_string())
    schedule = NoiseSchedule.from_dict(config)
    assert torch.equal(schedule.alphas_cumprod, NoiseSchedule.from_dict(SD14).alphas_cumprod)
    assert schedule.timestep_spacing == config["timestep_spacing"]


def test_solver_options_of_the_file_are_ignored():
    config = SD14 | {
        "_class_name": "EulerDiscreteScheduler",
        "solver_order": 3,
        "interpolation_type": "linear",
    }
    assert torch.equal(
        NoiseSchedule.from_dict(config).alphas_cumprod, NoiseSchedule.from_dict(SD14).alphas_cumprod
    )


@pytest.mark.parametrize("config", [{"a": 2}, {"clip_sample": False, "skip_prk_steps": True}])
def test_a_config_of_something_else_is_refused(config):
    with pytest.raises(ValueError, match="expected some of .*'beta_end'.*'num_train_timesteps'"):
        NoiseSchedule.from_dict(config)
    assert len(NoiseSchedule.from_dict({})) == 1000


def random_config(rng):
    """A scheduler_config.json: what files hold, and what they might."""
    n = rng.choice([10, 100, 1000])
    some = {
        "_class_name": rng.choice(["DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler"]),
        "num_train_timesteps": n,
        "beta_start": rng.choice([0.0001, 0.00085, 0.01, 0.0]),
        "beta_end": rng.choice([0.012, 0.02, 0.5, 1.0]),
        "beta_schedule": rng.choice(["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"]),
        "trained_betas": rng.choice([None, None, [rng.random() / 9 for _ in range(n)], [0.1] * 7]),
        "steps_offset": rng.choice([0, 1, 3]),
        "set_alpha_to_one": rng.choice([True, False]),
        "timestep_spacing": rng.choice(["leading", "linspace", "trailing", "even"]),
        "prediction_type": rng.choice(["epsilon", "epsilon", "v_prediction", "sample"]),
        "rescale_betas_zero_snr": rng.choice([False, False, True]),
        "thresholding": rng.choice([False, False, True]),
        "sigma_min": rng.choice([None, None, 0.03]),
        "sigma_max": rng.choice([None, None, 14.6]),
        "timestep_type": rng.choice(["discrete", "discrete", "continuous"]),
    }
    kept = rng.sample(sorted(some), rng.randint(2, 9))
    return {key: some[key] for key in kept} | {"clip_sample": False}


def test_random_configs_give_the_tables_of_diffusers_or_are_refused():
    rng = random.Random(0)
    counts = Counter()
    for _ in range(400):
        config = random_config(rng)
        try:
            ours = NoiseSchedule.from_dict(config)
        except ValueError as error:
            assert str(error).startswith("scheduler config: ") and len(str(error)) < 300
            counts["refused"] += 1
            continue
        theirs = DDIMScheduler.from_config(config)
        assert torch.equal(ours.alphas_cumprod, theirs.alphas_cumprod), config
        assert ours.clean.alpha**2 == pytest.approx(theirs.final_alpha_cumprod.item(), rel=1e-6)
        for n in (1, 7):
            steps = [step.t for step in DDIM(ours, n)]
            theirs.set_timesteps(n)
            assert steps == theirs.timesteps.tolist(), config
        counts["equal"] += 1
    assert counts["equal"] > 40 and counts["refused"] > 40, counts
