"""Prompt-to-prompt against the eager oracle on diffusers' UNet: the same tiny random checkpoint,
lockstep, DDIM."""

import oracle_p2p
import p2p_model
import pytest
import tiny
import torch
from oracle_p2p import Blend, Target

from minisd import DDIM, cfg, denoise
from minisd.editing.local_blend import LocalBlend
from minisd.editing.prompt_to_prompt import PromptToPrompt

STEPS = 5
SOURCE = "a cat on my big mat"
SWAP, LONG_SWAP = "a dog on my big mat", "a lioness on my old sofa"
REFINED, SHORTER = "a sad cat on my big red mat", "a cat my mat"


# name -> (target prompts, arguments of PromptToPrompt, the oracle's targets, its blend,
# LocalBlend's arguments)
WHOLE, MOST = {None: (0, 5)}, {None: (0, 4)}
CASES = {
    "replace": ([SWAP], {}, [Target([0, 1, 2, 3, 4, 5], MOST, (0, 2))]),
    "replace by longer words": ([LONG_SWAP], {}, [Target([0, 1, 2, 3, 4, 5], MOST, (0, 2))]),
    "refine": ([REFINED], {}, [Target([0, None, 1, 2, 3, 4, None, 5], MOST, (0, 2))]),
    "refine, words removed": (
        [SHORTER],
        dict(cross_steps=(0.2, 1)),
        [Target([0, 1, 3, 5], {None: (1, 5)}, (0, 2))],
    ),
    "reweight": (
        [SOURCE] * 3,
        dict(
            reweight=[{"cat": 2.5, "mat": -1}, {"big": 0}, {"cat": -2}],
            cross_steps=1.0,
            self_steps=(0.4, 0.8),
        ),
        [Target(list(range(6)), WHOLE, (2, 4), f) for f in ({1: 2.5, 5: -1}, {4: 0}, {1: -2})],
    ),
    "replace, then reweight": (
        [SWAP, LONG_SWAP, SWAP],
        dict(
            reweight={"my": 3, "dog": -1.5}, cross_steps=[0.8, 0.6, 0.4], self_steps=[0.4, 0.0, 1.0]
        ),
        [
            Target([0, 1, 2, 3, 4, 5], {None: (0, 4)}, (0, 2), {3: 3, 1: -1.5}),
            Target([0, 1, 2, 3, 4, 5], {None: (0, 3)}, (0, 0), {3: 3}),
            Target([0, 1, 2, 3, 4, 5], {None: (0, 2)}, (0, 5), {3: 3, 1: -1.5}),
        ],
    ),
    "refine, then reweight": (
        [REFINED],
        dict(reweight={"sad": 4, "cat": 0.5}),
        [Target([0, None, 1, 2, 3, 4, None, 5], MOST, (0, 2), {1: 4, 2: 0.5})],
    ),
    "a word of its own time": (
        [SWAP],
        dict(cross_steps={"default": 0.4, "dog": (0.2, 0.6), "mat": 1.0}),
        [Target([0, 1, 2, 3, 4, 5], {None: (0, 2), 1: (1, 3), 5: (0, 5)}, (0, 2))],
    ),
    "one word": (
        [LONG_SWAP],
        dict(cross_steps={"default": 0, "on": 1}, self_steps=0),
        [Target([0, 1, 2, 3, 4, 5], {None: (0, 0), 2: (0, 5)}, (0, 0))],
    ),
    "local blend": (
        [SWAP],
        {},
        [Target([0, 1, 2, 3, 4, 5], MOST, (0, 2))],
        Blend([[1], [1]], threshold=0.9, first=1),
        dict(words=("cat", "dog"), threshold=0.9),
    ),
    "local blend with a word to spare, three targets": (
        [SWAP, LONG_SWAP, SWAP],
        dict(reweight={"my": 2}),
        [Target([0, 1, 2, 3, 4, 5], MOST, (0, 2), {3: 2})] * 3,
        Blend([[1], [1], [1], [1]], [[5], [5], [5], [5]], threshold=0.7, first=0),
        dict(
            words=["cat", "dog", "lioness", ("dog",)],
            subtract=["mat", "mat", "sofa", "mat"],
            threshold=0.7,
            subtract_threshold=0.7,
            start=0,
        ),
    ),
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return p2p_model.load(tmp_path_factory.mktemp("p2p"))


def both(pair, case, impl, height=32, width=32, uncond=None, steps=STEPS):
    """Final latents of minisd and of the oracle."""
    reference, sd = pair
    targets, arguments, expected, blend, blend_arguments = (*CASES[case], None, None)[:5]
    prompts = [SOURCE, *targets]
    cond, x = sd.encode_prompt(prompts), sd.noise(3, 1, height, width)
    uncond = sd.encode_prompt([""]) if uncond is None else uncond
    sd.unet.attention = impl
    arguments = {"steps": steps, "height": height, "width": width, **arguments}
    p2p = PromptToPrompt(sd, *prompts, collect_maps=blend is not None, **arguments)
    after = LocalBlend(p2p.maps, **blend_arguments) if blend else None
    predict = cfg(sd.unet, uncond, cond, 7.5, p2p)
    ours = denoise(x.expand(len(prompts), -1, -1, -1), DDIM(sd.schedule, steps), predict, after)

    lengths = [[len(word) for word in prompt.split()] for prompt in prompts]
    h, w = x.shape[2:]
    grid = -(-h // 2), -(-w // 2)
    theirs = oracle_p2p.run(
        reference,
        tiny.SCHEDULER,
        x,
        uncond,
        cond,
        lengths,
        expected,
        steps,
        7.5,
        grid[0] * grid[1],
        blend,
        grid,
    )
    return ours, theirs


def assert_same(ours, theirs):
    """Each row within 1e-4 of its largest value, and the targets are not the source."""
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine - other).abs().max() <= 1e-4 * other.abs().max()
    assert all((row - theirs[0]).abs().max() > 0.01 * theirs.abs().max() for row in theirs[1:])


def kept(latents):
    """For each target, the share of positions where it is the source."""
    return [(row == latents[0]).all(0).float().mean().item() for row in latents[1:]]


@pytest.mark.parametrize("impl", ["sdpa", "reference"])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_oracle(pair, case, impl):
    ours, theirs = both(pair, case, impl)
    assert_same(ours, theirs)
    blends = "blend" in case
    assert kept(ours) == kept(theirs) and all(
        0.1 < share < 0.9 if blends else share == 0 for share in kept(ours)
    )


@pytest.mark.parametrize("case", ["local blend", "replace, then reweight"])
def test_other_sizes(pair, case):
    assert_same(*both(pair, case, "sdpa", height=24, width=44))


def test_an_unconditional_embedding_for_each_step(pair):
    generator = torch.Generator().manual_seed(0)
    uncond = [torch.randn(1, 77, 24, generator=generator) for _ in range(STEPS)]
    ours, theirs = both(pair, "replace", "sdpa", uncond=uncond)
    assert_same(ours, theirs)
    assert (ours - both(pair, "replace", "sdpa")[0]).abs().max() > 0.01
