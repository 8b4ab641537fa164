"""Prompt-to-prompt: what must hold exactly, schedules by hand, choice of sites, local blend,
refusals."""

import copy
import inspect

import p2p_model
import pytest
import torch

from minisd import DDIM, cfg, denoise, seed_baseline
from minisd.editing.alignment import token_map
from minisd.editing.local_blend import LocalBlend
from minisd.editing.maps import Maps
from minisd.editing.prompt_to_prompt import PromptToPrompt, edit_prompt, stack
from minisd.editing.sites import coarsest, select_sites
from minisd.editing.tables import cross_table, interval
from minisd.models.attention import AttentionEdit, attention
from minisd.models.unet import UNet, UNetConfig

STEPS = 5
SOURCE, SWAP, REFINED = "a cat on my mat", "a dog on my mat", "a sad cat on my red mat"


@pytest.fixture(scope="module")
def sd(tmp_path_factory):
    return p2p_model.load(tmp_path_factory.mktemp("p2p"))[1]


@pytest.fixture(params=["sdpa", "reference"])
def impl(sd, request):
    sd.unet.attention = request.param
    yield request.param
    sd.unet.attention = "sdpa"


def run(sd, prompts, edits=None, after=None, steps=STEPS, seed=3):
    """Final latents of the prompts from one noise."""
    cond = torch.cat([sd.encode_prompt([prompt]) for prompt in prompts])
    uncond, x = sd.encode_prompt([""]), sd.noise(seed).expand(len(prompts), -1, -1, -1)
    return denoise(x, DDIM(sd.schedule, steps), cfg(sd.unet, uncond, cond, 7.5, edits), after)


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


# algebra


@pytest.mark.parametrize("cross, own", [(0.8, 0.4), (1.0, 1.0), ((0.2, 0.6), 0.0)])
def test_identical_prompts_give_the_plain_run(sd, impl, cross, own):
    prompts = [SOURCE] * 3
    edits = PromptToPrompt(sd, *prompts, steps=STEPS, cross_steps=cross, self_steps=own)
    assert torch.equal(run(sd, prompts, edits), run(sd, prompts))


def test_identical_prompts_with_a_schedule_for_each_word(sd, impl):
    """Columns that are exchanged for equal ones leave the images as they are, but for the order of
    a sum, P_own V_own + P_source V_source: within twice eager's error against float64."""
    edits = PromptToPrompt(
        sd, SOURCE, SOURCE, steps=STEPS, cross_steps={"default": 0.4, "cat": 1, "my": (0.4, 0.6)}
    )
    ours, plain = run(sd, [SOURCE] * 2, edits), run(sd, [SOURCE] * 2)
    exact = copy.deepcopy(sd).to(dtype=torch.float64)
    exact.unet.attention = "reference"
    truth = run(exact, [SOURCE] * 2)
    image = exact.decode(truth, as_tensor=True)
    assert image.dtype == torch.float64
    eager = run(exact.to(dtype=torch.float32), [SOURCE] * 2)
    assert relative(ours, truth) <= 2 * relative(eager, truth) < 1e-5
    decoded, by_eager = (sd.decode(x, as_tensor=True) for x in (ours, eager))
    assert relative(decoded, image) <= 2 * relative(by_eager, image) < 2e-5
    if impl == "reference":
        assert relative(ours, plain) <= 1e-6
        assert relative(decoded, sd.decode(plain, as_tensor=True)) <= 1e-6


@pytest.mark.parametrize("target", [SWAP, REFINED])
def test_without_steps_there_is_no_edit(sd, impl, target):
    edits = PromptToPrompt(
        sd, SOURCE, target, steps=STEPS, cross_steps=0, self_steps=0, reweight={"my": 5}
    )
    assert torch.equal(run(sd, [SOURCE, target], edits), run(sd, [SOURCE, target]))


@pytest.mark.parametrize("source", ["source_row", "inject", "inject_qk"])
def test_a_row_that_takes_its_own_map_only_gives_the_plain_bits(source):
    """Where blend is 0, P_own V_own + P_source V_source is P_own V + 0, beside rows that blend."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(4, 2, n, 8, generator=generator) for n in (16, 77, 77))
    blend = torch.stack([torch.zeros(77), torch.full((77,), 0.3), torch.zeros(77)])
    token_map = torch.rand(3, 77, 77, generator=generator)
    stored = {
        "source_row": torch.tensor([2, 0, 0]),
        "inject": torch.rand(3, 2, 16, 77, generator=generator),
        "inject_qk": (q[:3] + 1, k[:3] - 1),
    }[source]
    edit = AttentionEdit(token_map=token_map, blend=blend, **{source: stored})
    plain = attention(q, k, v, impl="sdpa")
    for factors in (None, torch.ones(3, 77)):
        out = attention(q, k, v, edit._replace(reweight=factors), impl="sdpa")
        assert torch.equal(out[[0, 1, 3]], plain[[0, 1, 3]])
        assert relative(out[2], plain[2]) > 0.01
    own = attention(q, k, v, AttentionEdit(source_row=torch.arange(4)), impl="sdpa")
    assert torch.equal(own, plain)


def test_reweight_by_one_is_the_identity(sd, impl):
    plain = PromptToPrompt(sd, SOURCE, REFINED, steps=STEPS)
    by_one = PromptToPrompt(sd, SOURCE, REFINED, steps=STEPS, reweight={"sad": 1, "mat": 1})
    assert torch.equal(run(sd, [SOURCE, REFINED], by_one), run(sd, [SOURCE, REFINED], plain))


def test_the_source_row_is_never_changed(sd, impl):
    prompts = [SOURCE, SWAP, REFINED, SOURCE]
    options = dict(
        steps=STEPS,
        cross_steps=[0.8, 1.0, {"default": 0, "cat": 1}],
        self_steps=[0.2, 1.0, 0],
        reweight=[{"dog": -2}, {"red": 5}, {"cat": 0}],
    )
    out, plain = run(sd, prompts, PromptToPrompt(sd, *prompts, **options)), run(sd, prompts)
    assert torch.equal(out[0], plain[0])
    collects = PromptToPrompt(sd, *prompts, collect_maps=True, **options)
    blended = run(sd, prompts, collects, LocalBlend(collects.maps, ("cat", "dog"), start=0))
    # Not bit for bit: where maps are collected, they are formed.
    assert relative(blended[0], plain[0]) <= 1e-5
    assert all(relative(out[row], plain[row]) > 1e-3 for row in (1, 2, 3))


def test_targets_do_not_see_each_other(sd):
    both = run(sd, [SOURCE, SWAP, REFINED], PromptToPrompt(sd, SOURCE, SWAP, REFINED, steps=STEPS))
    for row, target in ((1, SWAP), (2, REFINED)):
        alone = run(sd, [SOURCE, target], PromptToPrompt(sd, SOURCE, target, steps=STEPS))
        assert relative(both[row], alone[1]) < 1e-5


def test_stack(sd):
    """Two edits as one batch, each with its own noise and local blend, equal the two one by one."""
    groups = [[SOURCE, SWAP], [REFINED, SOURCE, SWAP]]
    options = dict(steps=STEPS, reweight={"my": 2}, collect_maps=True)

    def x_T(prompts, seed):
        return sd.noise(seed).expand(len(prompts), -1, -1, -1)

    def result(prompts, x, edits):
        predict = cfg(sd.unet, sd.encode_prompt([""]), sd.encode_prompt(prompts), 7.5, edits)
        blend = LocalBlend(edits.maps, ("cat", "dog"), threshold=0.8)
        return denoise(x, DDIM(sd.schedule, STEPS), predict, blend)

    edits = [PromptToPrompt(sd, *prompts, **options) for prompts in groups]
    expected = [result(p, x_T(p, seed), e) for p, e, seed in zip(groups, edits, (1, 2))]
    together = result(
        sum(groups, []), torch.cat([x_T(p, s) for p, s in zip(groups, (1, 2))]), stack(*edits)
    )
    assert relative(together, torch.cat(expected)) < 1e-5
    for other in (options | {"steps": 4}, options | {"collect_maps": False}):
        with pytest.raises(ValueError, match="same steps and sites"):
            stack(edits[0], PromptToPrompt(sd, SOURCE, SWAP, **other))


def test_rows_are_checked_where_the_edit_is_built(sd, monkeypatch):
    """On a card a bad row would be read from foreign memory, and a check in the loop would wait for
    the card."""
    edits = [PromptToPrompt(sd, SOURCE, SWAP, steps=STEPS) for _ in range(2)]
    edits[1].self_row[3, 1] = 2  # the next group's, once stacked
    with pytest.raises(ValueError, match=r"source_row: expected values from 0 to 1, got \[2\]"):
        stack(*edits)

    arange = torch.arange
    monkeypatch.setattr(torch, "arange", lambda *args, **options: arange(*args, **options) - 1)
    with pytest.raises(ValueError, match=r"source_row: expected values from 0 to 1, got \[-1, "):
        PromptToPrompt(sd, SOURCE, SWAP, steps=STEPS, cross_sites=[], self_sites=[])


# schedules


@pytest.mark.parametrize(
    "steps, value, expected",
    [
        (1, 0.8, (0, 0)),
        (1, 1, (0, 1)),
        (1, (0, 1), (0, 1)),
        (1, (0.5, 1.0), (0, 1)),
        (2, 0.4, (0, 0)),
        (2, 0.8, (0, 1)),
        (2, (0.5, 1), (1, 2)),
        (2, 0, (0, 0)),
        (3, 0.4, (0, 1)),
        (3, 0.8, (0, 2)),
        (3, (0.34, 0.67), (1, 2)),
        (3, 1.0, (0, 3)),
        (50, 0.8, (0, 40)),
        (50, 0.4, (0, 20)),
        (50, (0.1, 0.5), (5, 25)),
        (50, 1.0, (0, 50)),
        (50, 0.01, (0, 0)),
    ],
)
def test_interval(steps, value, expected):
    assert interval("x", value, steps) == expected
    table = cross_table(value, steps, 4, None)
    assert [s for s in range(steps) if table[s].eq(1).all()] == list(range(*expected))
    assert table.sum() == 4 * (expected[1] - expected[0])


@pytest.mark.parametrize(
    "steps, value, expected",
    [
        (1, 0.8, (0, 1)),
        (2, 0.8, (0, 2)),
        (3, 0.8, (0, 3)),
        (50, 0.8, (0, 40)),
        (50, 1.0, (0, 50)),
        (50, (0.5, 1.0), (25, 50)),
        (4, (0.2, 0.8), (1, 4)),
    ],
)
def test_interval_of_the_published_code(steps, value, expected):
    """int(fraction * (steps + 1)), cut to the steps that there are."""
    table = cross_table(value, steps, 4, None, google=True)
    assert [s for s in range(steps) if table[s].eq(1).all()] == list(range(*expected))


@pytest.mark.parametrize(
    "value", [-0.1, 1.1, (0.5, 0.4), (0.1, 0.2, 0.3), "0.5", None, (0, "a"), float("nan")]
)
def test_bad_intervals(value):
    with pytest.raises(ValueError, match="expected a fraction from 0 to 1"):
        interval("x", value, 10)


def test_a_schedule_for_each_word():
    columns = {"cat": [2, 3], "mat": [5]}.__getitem__
    schedule = {"default": (0.0, 0.4), "cat": 0.2, "mat": (0.6, 1.0)}
    table = cross_table(schedule, 5, 7, columns)
    assert table.int().tolist() == [
        [1, 1, 1, 1, 1, 0, 1],
        [1, 1, 0, 0, 1, 0, 1],
        [0, 0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 1, 0],
    ]
    assert schedule == {"default": (0.0, 0.4), "cat": 0.2, "mat": (0.6, 1.0)}
    assert (
        cross_table({"cat": 0}, 2, 4, columns).int().tolist() == [[1, 1, 0, 0]] * 2
    )  # without "default": all steps


def test_tables(sd):
    """blend, reweight and self_row by hand. Tokens of "a cat on my mat": a 1, cat 2-4, on 5-6, my
    7-8, mat 9-11."""
    edits = PromptToPrompt(
        sd,
        SOURCE,
        SWAP,
        SWAP,
        steps=2,
        cross_steps=[0.5, {"default": 1, "dog": (0.5, 1)}],
        self_steps=[1, (0.5, 1)],
        reweight={"dog": 3, "my": -1},
    )
    assert edits.source_row.tolist() == [0, 0, 0] and edits.self_row.tolist() == [
        [0, 0, 2],
        [0, 0, 0],
    ]
    on = torch.ones(77)
    not_dog = on.clone()
    not_dog[2:5] = 0
    factors = on.clone()
    factors[2:5], factors[7:9] = 3, -1
    off = 0 * on
    assert torch.equal(
        edits.blend, torch.stack([torch.stack([off, on, not_dog]), torch.stack([off, off, on])])
    )
    early = torch.stack([on, factors, torch.where(not_dog > 0, factors, 1)])
    assert torch.equal(edits.reweight, torch.stack([early, torch.stack([on, on, factors])]))


def test_the_published_code_s_tables(sd):
    """compat="google": a longer word, whose map is the published one, and 51 counted steps of 50
    (or 3 of 2)."""
    target = "a lioness on my mat"
    options = {"steps": 2, "cross_steps": 0.7}
    edits = {
        compat: PromptToPrompt(sd, SOURCE, target, **options, compat=compat)
        for compat in (None, "google")
    }
    for compat, edit in edits.items():
        expected, _ = token_map(sd.tokenizer, SOURCE, target, google=compat is not None)
        assert torch.equal(edit.token_map[1], expected)
    assert not torch.equal(edits[None].token_map, edits["google"].token_map)
    assert [e.blend[:, 1].mean(1).tolist() for e in edits.values()] == [[1, 0], [1, 1]]


def test_new_words_are_reweighted_too(sd):
    edits = PromptToPrompt(sd, SOURCE, REFINED, steps=2, reweight={"sad": 4}, cross_steps=0.5)
    assert edits.blend[0, 1, 2:5].eq(0).all() and edits.reweight[0, 1, 2:5].eq(4).all()
    assert (
        edits.blend[0, 1].sum() == 77 - 6
        and edits.blend[1].eq(0).all()
        and edits.reweight[1].eq(1).all()
    )


# sites


def test_sites_of_stable_diffusion():
    with torch.device("meta"):
        unet = UNet(UNetConfig())
    for size, tokens in (
        ((64, 64), 256),
        ((96, 64), 384),
        ((64, 96), 384),
        ((72, 40), 180),
        ((9, 17), 15),
    ):
        assert coarsest(unet, size) == tokens
    own = unet.sites("self", coarsest(unet, (96, 64)), (96, 64))
    assert {site.split(".attentions")[0] for site in own} == {
        "down_blocks.2",
        "mid_block",
        "up_blocks.1",
    }
    assert len(own) == 6

    cross = unet.sites("cross")
    assert select_sites(unet, "cross") == cross and len(cross) == 16
    assert select_sites(unet, "cross", "mid") == [
        site for site in cross if site.startswith("mid_block")
    ]
    assert (
        len(select_sites(unet, "cross", "down")) == 6
        and len(select_sites(unet, "cross", ["up", "mid"])) == 10
    )
    assert select_sites(unet, "cross", "16x16") == [
        s for s in cross if s.startswith(("down_blocks.2", "up_blocks.1"))
    ]
    assert len(select_sites(unet, "self", 1024)) == 5 + 5 + 1
    assert select_sites(unet, "self", "up_blocks.3*s.2.*") == [
        "up_blocks.3.attentions.2.transformer_blocks.0.attn1"
    ]
    assert select_sites(unet, "self", []) == []
    for where in ("32", 63, "16x17", "down_blocks.9*", ["up", "nowhere"]):
        with pytest.raises(
            ValueError, match="no self-attention site is picked by .*64x64, 32x32, 16x16, 8x8"
        ):
            select_sites(unet, "self", where)


def test_only_the_chosen_sites_are_edited(sd):
    step = next(iter(DDIM(sd.schedule, STEPS)))
    edits = PromptToPrompt(sd, SOURCE, SWAP, steps=STEPS)(step)
    assert set(edits) == {*sd.unet.sites("cross"), *sd.unet.sites("self", 16)}
    edits = PromptToPrompt(
        sd, SOURCE, SWAP, steps=STEPS, cross_sites="mid", self_sites=["down", "8x8"]
    )(step)
    assert set(edits) == {
        "mid_block.attentions.0.transformer_blocks.0.attn2",
        *(s for s in sd.unet.sites("self") if s.startswith(("down", "up_blocks.1"))),
    }
    assert PromptToPrompt(sd, SOURCE, SWAP, steps=STEPS, cross_sites=[], self_sites=[])(step) == {}


# maps and local blend


def test_maps_are_the_means(sd):
    """Against maps saved whole, head by head, at every step."""
    prompts, sites = [SOURCE, SWAP], sd.unet.sites("cross")
    p2p = PromptToPrompt(sd, *prompts, steps=STEPS, map_sites=sites, collect_maps=True)
    seen = []

    def edits(step):
        saves = {s: torch.empty(2, 2, sd.unet.grid(s)[0] * sd.unet.grid(s)[1], 77) for s in sites}
        seen.append(saves)
        return {
            site: e._replace(save=saves[site]) if site in saves else e
            for site, e in p2p(step).items()
        }

    assert p2p.maps.grids[sites[0]] == (8, 8)
    for _ in range(2):  # the second run starts from zero
        seen.clear()
        run(sd, prompts, edits)
        for site, total in p2p.maps.sums.items():
            torch.testing.assert_close(
                total, sum(saves[site].mean(1) for saves in seen), rtol=1e-5, atol=1e-6
            )
    fine = [s for s in sites if sd.unet.grid(s) == (8, 8)]
    mean = sum(saves[s].mean(1) for saves in seen for s in fine) / len(fine) / STEPS
    torch.testing.assert_close(
        p2p.maps.mean((8, 8)), mean.unflatten(1, (8, 8)), rtol=1e-5, atol=1e-6
    )
    cat = mean[0].unflatten(0, (8, 8))[:, :, 2:5].mean(-1)
    torch.testing.assert_close(p2p.maps.word("cat", 0, (8, 8)), cat, rtol=1e-5, atol=1e-6)
    assert p2p.maps.mean().shape == (2, 8, 8, 77) and p2p.maps.mean((4, 4)).shape == (2, 4, 4, 77)
    assert p2p.maps.mean().sum(-1).allclose(torch.ones(2, 8, 8), atol=1e-5)
    with pytest.raises(ValueError, match="no saved site has the grid"):
        p2p.maps.mean((5, 5))
    with pytest.raises(ValueError, match="'dog' is not in the prompt, expected one of 'a', 'cat'"):
        p2p.maps.word("dog")


def test_maps_of_the_early_steps(sd):
    early, whole = Maps(sd, [SOURCE], STEPS, until=0.4), Maps(sd, [SOURCE], STEPS)
    with pytest.raises(RuntimeError, match="the maps are empty"):
        early.mean()
    assert relative(run(sd, [SOURCE], early), run(sd, [SOURCE], whole)) < 1e-5
    assert (early.count, whole.count) == (2, 5) and not early.mean().allclose(
        whole.mean(), rtol=1e-3
    )
    assert set(early.sums) == {
        s for s in sd.unet.sites("cross") if "mid" not in s and sd.unet.grid(s) == (4, 4)
    }


def saving(edits):
    return {site for site, edit in edits.items() if edit.save_mean is not None}


def test_maps_that_nobody_asks_for_are_not_saved(sd):
    step = next(iter(DDIM(sd.schedule, STEPS)))
    assert saving(PromptToPrompt(sd, SOURCE, SWAP, steps=STEPS)(step)) == set()
    p2p = PromptToPrompt(sd, SOURCE, SWAP, steps=STEPS, collect_maps=True)
    assert saving(p2p(step)) == set(p2p.maps.sums) != set()


def test_a_look_changes_no_computation(sd, impl):
    """hasattr, and what a debugger does: maps are collected where that was asked for, only."""
    plain = PromptToPrompt(sd, SOURCE, SWAP, steps=STEPS)
    expected, step = run(sd, [SOURCE, SWAP], plain), next(iter(DDIM(sd.schedule, STEPS)))
    looked = PromptToPrompt(sd, SOURCE, SWAP, steps=STEPS)
    for each in (looked, looked.repeated(1), stack(looked)):
        before = dict(vars(each))
        assert not hasattr(each, "maps") and getattr(each, "maps", None) is None
        dir(each), repr(each), inspect.getmembers(each)
        with pytest.raises(AttributeError, match=r"PromptToPrompt\(..., collect_maps=True\)"):
            _ = each.maps
        assert vars(each).keys() == before.keys()
        assert all(vars(each)[name] is value for name, value in before.items())
        assert saving(each(step)) == set()
        assert torch.equal(run(sd, [SOURCE, SWAP], each), expected)
    collects = PromptToPrompt(sd, SOURCE, SWAP, steps=STEPS, collect_maps=True)
    assert hasattr(collects, "maps") and collects.maps is collects.maps
    collected = run(sd, [SOURCE, SWAP], collects)
    assert collects.maps.count == STEPS  # and looking has not counted
    hasattr(collects, "maps"), collects.maps.mean(), repr(collects)
    assert torch.equal(run(sd, [SOURCE, SWAP], collects), collected)


class Given:
    """Maps with given means, of two rows on a 3 x 4 grid."""

    def __init__(self, sd, prompts, mean):
        self.prompts, self.tokenizer, self.steps, self.source_row = (
            prompts,
            sd.tokenizer,
            10,
            torch.tensor([0, 0]),
        )
        self._mean = mean

    columns = Maps.columns

    def mean(self):
        return self._mean


def test_local_blend_by_hand(sd):
    mean = torch.zeros(2, 3, 4, 77)
    mean[0, 0, 0, 2:5] = 1  # cat at the top left of the source
    mean[1, 2, 3, 2:5] = 2  # dog at the bottom right of the target
    mean[1, 2, 2, 9:12] = 5  # mat beside it
    mean[1, 1, 3, 9:12] = 1
    maps = Given(sd, [SOURCE, SWAP], mean)
    source, target = torch.randn(1, 4, 6, 8), torch.randn(1, 4, 6, 8)
    x = torch.cat([source, target])
    step = list(DDIM(sd.schedule, 10))

    near = torch.zeros(6, 8, dtype=torch.bool)
    near[:4, :4] = near[2:, 4:] = (
        True  # 3 x 3 max pool, then each position twice in both directions
    )
    listed = ["dog", "cat"], [["cat"], ["dog"]], (("cat",), "dog"), ["cat", "dog", "mat", "cat"][:2]
    for words in (("cat", "dog"), *listed):
        out = LocalBlend(maps, words)(x, step[2])
        assert torch.equal(out[0], source[0]) and torch.equal(
            out[1], torch.where(near, target[0], source[0])
        )
    far = torch.zeros(6, 8, dtype=torch.bool)
    far[4:, 4:6] = (
        True  # only the mat's strongest position is above half of the maximum; no max pool
    )
    out = LocalBlend(maps, ("cat", "dog"), subtract="mat", subtract_threshold=0.5)(x, step[2])
    assert torch.equal(out[1], torch.where(near & ~far, target[0], source[0]))
    assert LocalBlend(maps, "dog")(x, step[1]) is x  # before start = 0.2 of the steps
    assert LocalBlend(maps, "dog", start=0)(x, step[0]) is not x


def test_maps_start_anew_with_every_run(sd):
    """Also where the run before ended at the step at which this one begins: one step, drawn with
    two seeds."""
    for steps in (1, 2):
        maps = Maps(sd, [SOURCE], steps)
        run(sd, [SOURCE], maps, steps=steps, seed=3)
        first = {site: total.clone() for site, total in maps.sums.items()}
        run(sd, [SOURCE], maps, steps=steps, seed=4)
        alone = Maps(sd, [SOURCE], steps)
        run(sd, [SOURCE], alone, steps=steps, seed=4)
        assert maps.count == alone.count == steps
        for site, total in maps.sums.items():
            assert torch.equal(total, alone.sums[site]) and not torch.equal(total, first[site])


def test_local_blend_refuses(sd):
    maps = PromptToPrompt(sd, SOURCE, SWAP, steps=STEPS, collect_maps=True).maps
    with pytest.raises(ValueError, match="'bird' is not in the prompt"):
        LocalBlend(maps, ("cat", "bird"))
    with pytest.raises(ValueError, match="'cat' is not in the prompt, expected one of 'a', 'dog'"):
        LocalBlend(maps, [["cat"], ["cat"]])
    with pytest.raises(ValueError, match="words for 1 rows, expected one for each of 2"):
        LocalBlend(maps, [["cat"]])
    with pytest.raises(ValueError, match="start is 2"):
        LocalBlend(maps, "cat", start=2)
    with pytest.raises(ValueError, match="got 3 latents"):
        LocalBlend(maps, "cat")(torch.zeros(3, 4, 8, 8), next(iter(DDIM(sd.schedule, STEPS))))


# refusals


@pytest.mark.parametrize(
    "targets, options, message",
    [
        (
            [SWAP],
            dict(reweight={"cat": 2}),
            "'cat' is not in the prompt, expected one of 'a', 'dog', 'on'",
        ),
        ([SWAP], dict(cross_steps={"cat": 0.2}), "'cat' is not in the prompt"),
        ([SWAP, REFINED], dict(reweight=[{"sad": 2}, None]), "'sad' is not in the prompt"),
        ([SWAP], dict(reweight={"dog": float("inf")}), "factor of 'dog' is inf"),
        ([SWAP], dict(cross_steps=1.5), "cross_steps: got 1.5"),
        ([SWAP], dict(cross_steps={"dog": 2}), "cross_steps of 'dog': got 2"),
        ([SWAP], dict(self_steps={"dog": 0.2}), "self_steps: got"),
        (
            [SWAP],
            dict(self_steps=[0.2, 0.3]),
            "self_steps has 2 entries, expected one for each of 1 targets",
        ),
        ([SWAP], dict(edit="swap"), "edit is 'swap'"),
        ([REFINED], dict(edit="replace"), "same number of words"),
        ([SWAP], dict(compat="diffusers"), "compat is 'diffusers'"),
        ([SWAP], dict(steps=0), "steps is 0"),
        ([SWAP], dict(steps="50"), "steps is '50', expected a whole number, at least 1"),
        ([SWAP], dict(reweight={"dog": "2"}), "factor of 'dog' is '2', expected a finite number"),
        ([SWAP], dict(self_sites="nowhere"), "no self-attention site"),
        (
            [SWAP],
            dict(cross_sites=[20.5]),
            "no cross-attention site is picked by 20.5; expected down, mid, up",
        ),
        (
            [SWAP],
            dict(reweight=("dog", 2)),
            r"reweight: got \('dog', 2\), expected {word: factor}, or a list",
        ),
        ([], {}, "expected at least one target prompt"),
    ],
)
def test_refusals(sd, targets, options, message):
    with pytest.raises(ValueError, match=message):
        PromptToPrompt(sd, SOURCE, *targets, **{"steps": STEPS} | options)


def test_a_word_of_one_target_is_enough(sd):
    schedule = {"default": 1, "sad": 0}
    edits = PromptToPrompt(
        sd, SOURCE, SWAP, REFINED, steps=1, cross_steps=schedule, reweight={"dog": 2}
    )
    assert edits.blend[0, 1].eq(1).all() and edits.blend[0, 2, 2:5].eq(0).all()
    assert edits.reweight[0, 1, 2:5].eq(2).all() and edits.reweight[0, 2].eq(1).all()


def test_a_sampler_with_more_steps(sd):
    edits = PromptToPrompt(sd, SOURCE, SWAP, steps=3)
    with pytest.raises(ValueError, match="the sampler is at step 3, expected a sampler of steps=3"):
        run(sd, [SOURCE, SWAP], edits, steps=4)


def test_steps_count_in_the_full_schedule(sd):
    """A run that skips the first steps (a real picture) takes the tables' later rows."""
    edits = PromptToPrompt(sd, SOURCE, SWAP, steps=5, cross_steps=(0.2, 0.6), self_steps=0.6)
    rows = [
        (edits(s)[edits.cross_sites[0]].blend.sum(), edits(s)[edits.self_sites[0]].source_row.sum())
        for s in DDIM(sd.schedule, 5, skip=2)
    ]
    assert rows == [(77, 0), (0, 1), (0, 1)]


# edit_prompt


def pixels(images):
    return torch.stack(
        [torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8) for image in images]
    )


def test_edit_prompt(sd):
    options = dict(steps=STEPS, seed=3, progress=False)
    images = edit_prompt(sd, SOURCE, SWAP, REFINED, self_steps=0.2, **options)
    baseline = seed_baseline(sd, SOURCE, SWAP, REFINED, **options)
    edits = PromptToPrompt(sd, SOURCE, SWAP, REFINED, steps=STEPS, self_steps=0.2)
    assert torch.equal(pixels(images), pixels(sd.decode(run(sd, edits.prompts, edits))))
    assert torch.equal(pixels(baseline), pixels(sd.decode(run(sd, edits.prompts))))
    assert torch.equal(pixels(images[:1]), pixels(baseline[:1])) and not torch.equal(
        pixels(images), pixels(baseline)
    )
    given = edit_prompt(
        sd, SOURCE, SWAP, REFINED, self_steps=0.2, latents=sd.noise(3), **options | {"seed": 0}
    )
    assert torch.equal(pixels(given), pixels(images))


def test_edit_prompt_of_another_size_sampler_and_blend(sd):
    options = dict(
        steps=4, progress=False, height=24, width=44, sampler="dpm++", reweight={"dog": 2}
    )
    images = edit_prompt(sd, SOURCE, SWAP, local_blend=("cat", "dog"), **options)
    same = edit_prompt(
        sd, SOURCE, SWAP, local_blend=dict(words=("cat", "dog"), threshold=0.3), **options
    )
    assert [image.size for image in images] == [(44, 24)] * 2
    assert torch.equal(pixels(images), pixels(same))
    narrow = edit_prompt(
        sd, SOURCE, SWAP, local_blend=dict(words=("cat", "dog"), threshold=0.9), **options
    )
    assert not torch.equal(pixels(narrow), pixels(images))


def test_edit_prompt_after_each_step(sd):
    """`after` comes before the blend: a source row that is overwritten shows outside the mask."""
    track = torch.randn(1, 4, 8, 8)

    def after(x, step):
        return torch.cat([track, x[1:]])

    options = dict(steps=STEPS, progress=False)
    images = edit_prompt(
        sd,
        SOURCE,
        SWAP,
        after=after,
        local_blend=dict(words=("cat", "dog"), threshold=1),
        **options,
    )
    expected = sd.decode(track)
    assert torch.equal(
        pixels(images), pixels(expected * 2)
    )  # nothing is above the maximum, so all is the source's


def test_edit_prompt_with_an_embedding_for_each_step(sd):
    """What null-text inversion hands over: given latents, and one unconditional embedding for each
    step."""
    uncond = [
        torch.randn(1, 77, 24, generator=torch.Generator().manual_seed(i)) for i in range(STEPS)
    ]
    options = dict(
        steps=STEPS, progress=False, latents=sd.noise(3), cross_steps={"default": 0.8, "dog": 0.4}
    )
    images = edit_prompt(sd, SOURCE, SWAP, uncond=uncond, **options)
    edits = PromptToPrompt(sd, SOURCE, SWAP, steps=STEPS, cross_steps=options["cross_steps"])
    cond = torch.cat([sd.encode_prompt([prompt]) for prompt in edits.prompts])
    x = sd.noise(3).expand(2, -1, -1, -1)
    expected = sd.decode(
        denoise(x, DDIM(sd.schedule, STEPS), cfg(sd.unet, uncond, cond, 7.5, edits))
    )
    assert torch.equal(pixels(images), pixels(expected))
    assert not torch.equal(
        pixels(images), pixels(edit_prompt(sd, SOURCE, SWAP, uncond=uncond[0], **options))
    )


def test_a_sweep_of_factors(sd):
    images = edit_prompt(
        sd, SOURCE, steps=3, reweight=[{"cat": f} for f in (-2, 1, 5)], progress=False
    )
    assert len(images) == 4 and torch.equal(pixels(images[:1]), pixels(images[2:3]))
    assert not torch.equal(pixels(images[1:2]), pixels(images[3:4]))


def test_edit_prompt_refuses(sd):
    with pytest.raises(ValueError, match=r"latents have shape \(3, 4, 8, 8\), expected \(1, "):
        edit_prompt(sd, SOURCE, SWAP, steps=2, latents=sd.noise(0, 3))
    for given in ([0.0], [0.0, 0.0], 5):
        name = type(given).__name__
        with pytest.raises(ValueError, match=f"latents are {name}, expected a tensor of floats"):
            edit_prompt(sd, SOURCE, SWAP, steps=2, latents=given)
    with pytest.raises(ValueError, match=r"the latents have shape .*, expected \(1, 4, 4, 8\)"):
        edit_prompt(sd, SOURCE, SWAP, steps=2, latents=sd.noise(0), height=16)
    with pytest.raises(ValueError, match="on_step returned int, expected None or latents of shape"):
        edit_prompt(sd, SOURCE, SWAP, steps=2, on_step=lambda x, step: 3, progress=False)
    with pytest.raises(TypeError, match="cross_step"):
        edit_prompt(sd, SOURCE, SWAP, steps=2, cross_step=0.3)
