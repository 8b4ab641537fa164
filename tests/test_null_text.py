"""Null-text inversion against the published loop on diffusers' UNet, with torch's own Adam, one
picture at a time."""

import sys

import oracle_invert
import p2p_model
import pytest
import tiny
import torch
from oracle_p2p import Target

import minisd
from minisd import Inversion, edit_prompt, invert, null_text
from minisd.editing.inversion import redraw_latents

SOURCE, SWAP = "a cat on my mat", "a dog on my mat"
PROMPTS = [SOURCE, "a red bird", "on"]
QUIET = {"progress": False}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return p2p_model.load(tmp_path_factory.mktemp("null"))


@pytest.fixture(scope="module")
def sd(pair):
    return pair[1]


def pictures(batch, height=32, width=32):
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1


def far(ours, reference):
    assert ours.shape == reference.shape
    return ((ours - reference).abs().max() / reference.abs().max()).item()


def oracle(pair, inversion, row, inner_steps, early_stop=1e-5):
    reference, sd = pair
    path = list(inversion.trajectory[:, row : row + 1])
    null, cond = sd.encode_prompt(["", inversion.prompts[row]]).split(1)
    return oracle_invert.null_text(
        reference,
        tiny.SCHEDULER,
        path,
        null,
        cond,
        inversion.steps,
        7.5,
        inner_steps,
        early_stop,
        inversion.skip,
    )


@pytest.mark.parametrize(
    "steps, skip, inner_steps, early_stop",
    [(5, 0, 3, 1e-5), (1, 0, 2, 1e-5), (50, 44, 4, 1e-5), (50, 44, 6, 0.003)],
    ids=["five steps", "one step", "the end of fifty", "rows stop one by one"],
)
def test_loss_curves_embeddings_and_pictures_equal_the_oracle(
    pair, steps, skip, inner_steps, early_stop
):
    """Three pictures in one batch; the oracle takes them one by one."""
    _, sd = pair
    options = dict(steps=steps, skip=skip, trajectory=True)
    inversion = invert(sd, pictures(3, 24, 32), PROMPTS, **options, **QUIET)
    ours = null_text(sd, inversion, inner_steps=inner_steps, early_stop=early_stop, **QUIET)
    assert (
        ours.losses.shape == (steps, inner_steps, 3)
        and ours.guidance == 7.5
        and ours.method == "null-text"
    )
    assert ours.losses[:skip].isnan().all() and (ours.latents == inversion.latents).all()
    z, lengths = redraw_latents(sd, ours, **QUIET), set()
    for row in range(3):
        embeddings, losses, x = oracle(pair, inversion, row, inner_steps, early_stop)
        for i, (theirs, phi) in enumerate(zip(losses, embeddings), skip):
            mine = ours.losses[i, :, row]
            lengths.add(len(theirs))
            assert (
                mine[: len(theirs)].tolist() == pytest.approx(theirs, rel=0.01)
                and mine[len(theirs) :].isnan().all()
            )
            assert far(ours.uncond[i, row : row + 1], phi) < 1e-3
        assert far(z[row : row + 1], x) <= 1e-4
    assert (len(lengths) > 1) == (early_stop > 1e-5)


def test_it_leads_back_where_guidance_leads_astray(pair):
    """More inner steps come nearer to the trajectory, and the loss of each step falls."""
    sd = pair[1]
    options = dict(steps=50, skip=44, trajectory=True)
    inversion = invert(sd, pictures(2), PROMPTS[:2], **options, **QUIET)
    errors = [far(redraw_latents(sd, inversion, guidance=7.5, **QUIET), inversion.z)]
    for inner_steps in (0, 3, 20):
        found = null_text(sd, inversion, inner_steps=inner_steps, early_stop=0, **QUIET)
        errors.append(far(redraw_latents(sd, found, **QUIET), inversion.z))
    assert errors[1] == pytest.approx(errors[0], rel=1e-3) and errors[1] > errors[2] > errors[3]
    assert (found.losses[44:, -1] < found.losses[44:, 0]).all()


def test_more_than_fifty_steps_run_through_the_same_rates(sd, monkeypatch):
    """Step i of 100 has the rate and the threshold of step i / 2 of 50; Adam's first step moves by
    just the rate."""
    module, stops = sys.modules["minisd.editing.null_text"], []
    adam = module.adam
    monkeypatch.setattr(module, "adam", lambda *given: stops.append(given[-1]) or adam(*given))
    inversion = invert(sd, pictures(1), SOURCE, steps=100, skip=97, trajectory=True, **QUIET)
    found = null_text(sd, inversion, inner_steps=1, **QUIET)
    before = [sd.encode_prompt([""]), *found.uncond[97:99]]
    moved = [(after - phi).abs().max().item() for phi, after in zip(before, found.uncond[97:])]
    assert moved == pytest.approx([0.01 * (1 - i / 200) for i in (97, 98, 99)], rel=0.01)
    assert stops == pytest.approx([1e-5 + 1e-5 * i for i in (97, 98, 99)])


def test_memory_saving_and_the_network_s_state(sd, monkeypatch):
    """`recompute` changes no number; nothing but the unconditional call has gradients; the UNet is
    left as it was."""
    inversion = invert(sd, pictures(1), SOURCE, steps=3, trajectory=True, **QUIET)
    calls, forward, chosen = [], type(sd.unet).forward, "sdpa"

    def spy(self, x, t, context, *, attention, recompute):
        assert attention == "sdpa" and self.attention == chosen
        calls.append((recompute, torch.is_grad_enabled(), x.requires_grad, context.requires_grad))
        return forward(self, x, t, context, attention=attention, recompute=recompute)

    monkeypatch.setattr(type(sd.unet), "forward", spy)
    plain = null_text(sd, inversion, inner_steps=2, early_stop=0, **QUIET)
    one_step = [
        (False, False, False, False),
        *[(False, True, False, True)] * 2,
        (False, False, False, False),
    ]
    assert calls == 3 * one_step  # e(cond), the inner steps, e(phi)
    saved = null_text(sd, inversion, inner_steps=2, early_stop=0, recompute=True, **QUIET)
    assert calls[12:] == [(True, *call[1:]) for call in calls[:12]]
    assert far(saved.uncond, plain.uncond) < 1e-5
    assert all(p.grad is None and p.requires_grad for p in sd.unet.parameters())
    # Attention and recompute are arguments of the call: the UNet is never anything else meanwhile.
    sd.unet.attention = chosen = "triton"
    try:
        ours = null_text(sd, inversion, inner_steps=2, early_stop=0, **QUIET)
    finally:
        sd.unet.attention = "sdpa"
    assert torch.equal(ours.uncond, plain.uncond)


def test_recomputing_keeps_fewer_activations(sd):
    """Bytes that autograd keeps between the passes."""

    def kept(recompute):
        total = 0

        def count(x):
            nonlocal total
            total += x.nbytes
            return x

        context = sd.encode_prompt([SOURCE]).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            sd.unet(torch.randn(1, 4, 16, 16), torch.tensor(5), context, recompute=recompute)
        return total

    assert kept(True) < 0.5 * kept(False)


def test_editing_a_picture_and_its_file(pair, tmp_path):
    """Prompt-to-prompt with an embedding per step, from the file, equals the oracle."""
    reference, sd = pair
    steps = 5
    inversion = invert(sd, pictures(2), PROMPTS[:2], steps=steps, trajectory=True, **QUIET)
    null_text(sd, inversion, inner_steps=2, **QUIET)[0].save(tmp_path / "n.safetensors")
    loaded, latents = Inversion.load(tmp_path / "n.safetensors"), []
    assert loaded.guidance == 7.5 and loaded.uncond.shape == (steps, 1, 77, 24)
    options = loaded.edit_options(sd)
    assert options.pop("after") is None and options["guidance"] == 7.5

    edit_prompt(sd, SOURCE, SWAP, **options, after=lambda x, step: latents.append(x) or x, **QUIET)
    lengths = [[len(word) for word in prompt.split()] for prompt in (SOURCE, SWAP)]
    x, uncond, cond = inversion.latents[:1], list(loaded.uncond), sd.encode_prompt([SOURCE, SWAP])
    targets = [Target([0, 1, 2, 3, 4], {None: (0, 4)}, (0, 2))]
    theirs = oracle_invert.edit(
        reference, tiny.SCHEDULER, x, uncond, cond, lengths, targets, steps, 7.5, 16
    )
    assert far(latents[-1], theirs) <= 1e-4


def test_half_precision(tmp_path):
    p2p_model.load(tmp_path)
    sd = minisd.load(tmp_path, device="cpu", dtype="bfloat16")
    inversion = invert(sd, pictures(1), SOURCE, steps=2, trajectory=True, **QUIET)
    found = null_text(sd, inversion, inner_steps=2, **QUIET)
    assert found.uncond.dtype == torch.float32 and found.losses.isfinite().all()
    assert redraw_latents(sd, found, **QUIET).isfinite().all()


def test_what_on_step_raises_stops_it(sd):
    inversion, seen = invert(sd, pictures(1), SOURCE, steps=3, trajectory=True, **QUIET), []

    def stop(x, step):
        seen.append((step.index, tuple(x.shape)))
        if step.index == 1:
            raise minisd.Cancelled("enough")

    with pytest.raises(minisd.Cancelled, match="enough"):
        null_text(sd, inversion, inner_steps=1, on_step=stop, **QUIET)
    assert seen == [(0, inversion.z.shape), (1, inversion.z.shape)]


@pytest.mark.parametrize(
    "kept, arguments, message",
    [
        (False, {}, "null-text needs the trajectory"),
        (True, {"guidance": 1}, "guidance is 1"),
        (True, {"guidance": float("nan")}, "guidance is nan, expected a number from -1000 to 1000"),
        (True, {"inner_steps": -1}, "inner_steps is -1, expected a whole number, at least 0"),
        (True, {"inner_steps": 1.5}, "inner_steps is 1.5"),
        (True, {"lr": "0.01"}, "lr is '0.01', expected a number, at least 0"),
        (True, {"early_stop": -1}, "early_stop is -1"),
    ],
)
def test_bad_arguments(sd, kept, arguments, message):
    inversion = invert(sd, pictures(1), SOURCE, steps=2, trajectory=kept, **QUIET)
    with pytest.raises(ValueError, match=message):
        null_text(sd, inversion, **arguments, **QUIET)
