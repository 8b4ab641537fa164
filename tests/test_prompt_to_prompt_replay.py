"""Two runs, record and replay, against one lockstep run; what is stored, what it takes, what is
refused."""

from dataclasses import replace

import p2p_model
import pytest
import torch
from safetensors.torch import save_file

from minisd import DDIM, cfg, denoise
from minisd.editing.prompt_to_prompt import PromptToPrompt, edit_prompt
from minisd.editing.recording import Injection, Recorder, Recording, record, replay

STEPS = 5
SOURCE, SWAP, REFINED = "a cat on my mat", "a lion on my mat", "a sad cat on my red mat"
SIZE = dict(height=24, width=44)


@pytest.fixture(scope="module")
def sd(tmp_path_factory):
    return p2p_model.load(tmp_path_factory.mktemp("p2p"))[1]


def run(sd, prompts, edits=None, after=None):
    x = sd.noise(3, **SIZE).expand(len(prompts), -1, -1, -1)
    predict = cfg(sd.unet, sd.encode_prompt([""]), sd.encode_prompt(prompts), 7.5, edits)
    return denoise(x, DDIM(sd.schedule, STEPS), predict, after)


def recorded(sd, **what):
    recorder = Recorder(sd, SOURCE, STEPS, **SIZE, **what)
    return run(sd, [SOURCE], recorder, recorder.store), recorder


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize("impl", ["sdpa", "reference"])
@pytest.mark.parametrize("dtype, bound", [(torch.float16, 1e-3), (torch.float32, 1e-5)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(cross_steps=(0.2, 0.6), self_steps=1.0),
        dict(
            cross_steps={"default": 0.4, "cat": 1.0, "lion": 0.2}, self_steps=0, reweight={"my": -2}
        ),
        dict(self_sites=[], cross_sites="up"),
    ],
)
def test_record_and_replay_equal_lockstep(sd, impl, dtype, bound, options):
    sd.unet.attention = impl
    prompts = [SOURCE, SWAP, REFINED] if "cross_steps" in options else [SOURCE, SWAP]
    options = (
        {"reweight": {"sad": 3}} | options
        if REFINED in prompts and "reweight" not in options
        else options
    )
    together = run(sd, prompts, PromptToPrompt(sd, *prompts, steps=STEPS, **SIZE, **options))
    source, recorder = recorded(sd, dtype=dtype)
    assert relative(source, together[:1]) < 1e-5
    targets = run(sd, prompts[1:], Injection(sd, recorder.recording, *prompts[1:], **options))
    sd.unet.attention = "sdpa"
    assert relative(targets, together[1:]) <= bound
    assert relative(targets, run(sd, prompts[1:])) > 0.01


def test_only_the_recorded_sites_are_injected(sd):
    _, recorder = recorded(sd, cross_sites="mid", self_sites=[])
    (site,) = recorder.cross_sites
    step = next(iter(DDIM(sd.schedule, STEPS)))
    assert set(Injection(sd, recorder.recording, SWAP)(step)) == {site}
    assert list(recorder.recording.maps) == [f"{site}.p"]


def test_tensors_have_the_same_shapes_at_every_step(sd):
    """Gate by value: nothing of the edits but their content depends on the step."""
    _, recorder = recorded(sd)
    edits = Injection(sd, recorder.recording, SWAP, REFINED, cross_steps=0.4, self_steps=(0.2, 0.6))

    def shapes(x):
        return (
            tuple(x.shape)
            if torch.is_tensor(x)
            else None
            if x is None
            else [shapes(each) for each in x]
        )

    assert (
        len(
            {
                str({site: shapes(e) for site, e in edits(step).items()})
                for step in DDIM(sd.schedule, STEPS)
            }
        )
        == 1
    )


def test_what_is_recorded(sd):
    """Conditional rows only: the maps and q, k of a plain forward pass of the conditional row."""
    plain = run(sd, [SOURCE])
    x, recorder = recorded(sd, dtype=torch.float32)
    recording = recorder.recording
    assert relative(x, plain) < 1e-5
    assert recording.t.tolist() == [step.t for step in DDIM(sd.schedule, STEPS)]
    assert set(recorder.cross_sites) == set(sd.unet.sites("cross"))
    assert recorder.self_sites == sd.unet.sites(
        "self", 18, (6, 11)
    )  # 3 x 6 positions at the coarsest resolution
    kept = {}
    for name in recorder.self_sites + recorder.cross_sites:
        module = sd.unet.get_submodule(name)
        module.to_q.register_forward_hook(lambda m, i, o, name=name: kept.update({name: o[-1:]}))
    first = next(iter(DDIM(sd.schedule, STEPS)))
    context = torch.cat([sd.encode_prompt([""]), sd.encode_prompt([SOURCE])])
    with torch.no_grad():
        sd.unet(sd.noise(3, **SIZE), torch.tensor(first.t), context)
    for name in recorder.self_sites + recorder.cross_sites:
        module = sd.unet.get_submodule(name)
        module.to_q._forward_hooks.clear()
        q = kept[name].unflatten(-1, (2, -1)).transpose(1, 2)
        if name in recorder.self_sites:
            torch.testing.assert_close(recording.maps[f"{name}.q"][0], q, rtol=1e-4, atol=1e-5)
        else:
            k = module.to_k(context[1:]).unflatten(-1, (2, -1)).transpose(1, 2)
            p = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
            torch.testing.assert_close(recording.maps[f"{name}.p"][0], p, rtol=1e-4, atol=1e-5)


def test_save_and_load(sd, tmp_path):
    _, recorder = recorded(sd)
    recorder.recording.save(tmp_path / "maps.safetensors")
    again = Recording.load(tmp_path / "maps.safetensors")
    assert (again.prompt, again.steps, again.size) == (SOURCE, STEPS, (6, 11))
    assert all(torch.equal(x, again.maps[name]) for name, x in recorder.recording.maps.items())
    assert all(x.dtype == torch.float16 for x in again.maps.values())
    assert torch.equal(
        run(sd, [SWAP], Injection(sd, again, SWAP)),
        run(sd, [SWAP], Injection(sd, recorder.recording, SWAP)),
    )
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="other.safetensors holds no minisd_recording"):
        Recording.load(tmp_path / "other.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "maps.safetensors").read_bytes()[:-1])
    with pytest.raises(ValueError, match="cut.safetensors cannot be read as safetensors"):
        Recording.load(tmp_path / "cut.safetensors")


def test_a_save_that_fails_leaves_the_older_file(tmp_path, monkeypatch):
    def disk_is_full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("no space left")

    kept = Recording(
        SOURCE, 1, (1, 1), torch.zeros(1, dtype=torch.int64), {"a.p": torch.zeros(1, 1, 1, 1, 1)}
    )
    kept.save(tmp_path / "maps.safetensors")
    monkeypatch.setattr("minisd.checkpoints.bundle.save_file", disk_is_full)
    with pytest.raises(OSError, match="no space left"):
        kept.save(tmp_path / "maps.safetensors")
    assert Recording.load(tmp_path / "maps.safetensors").prompt == SOURCE
    assert [path.name for path in tmp_path.iterdir()] == ["maps.safetensors"]


def test_the_size_is_worked_out_first(sd):
    _, recorder = recorded(sd)
    assert recorder.bytes == sum(x.numel() * x.itemsize for x in recorder.recording.maps.values())
    with pytest.raises(
        MemoryError,
        match="7 cross- and 4 self-attention sites over 50 steps .* GB, the limit is 1e-06",
    ):
        Recorder(sd, SOURCE, 50, limit=1000)
    with pytest.raises(ValueError, match="dtype is 'half', expected a floating-point torch dtype"):
        Recorder(sd, SOURCE, 50, dtype="half")
    with pytest.raises(ValueError, match="steps is '50', expected a whole number, at least 1"):
        Recorder(sd, SOURCE, "50")


def test_size_of_stable_diffusion(sd):
    """33.2 MB a step of cross maps, 5.3 MB of self-attention maps (EDITING B11), of which q and k
    take 6.9 MB."""
    from minisd.models.unet import UNet, UNetConfig

    with torch.device("meta"):
        unet = UNet(UNetConfig())
    parts = {
        "unet": unet,
        "tokenizer": sd.tokenizer,
        "device": sd.device,
        "latent_size": lambda *_: (64, 64),
    }
    real = type("SD", (), parts)()
    with pytest.raises(
        MemoryError, match="16 cross- and 0 self-attention sites over 50 steps takes 1.66 GB"
    ):
        Recorder(real, SOURCE, 50, self_sites=[], limit=1e9)
    with pytest.raises(
        MemoryError, match="0 cross- and 6 self-attention sites over 50 steps takes 0.344 GB"
    ):
        Recorder(real, SOURCE, 50, cross_sites=[], limit=1e8)


def test_another_schedule_is_refused(sd):
    _, recorder = recorded(sd)
    replaying = Injection(sd, recorder.recording, SWAP)
    for sampler in (DDIM(sd.schedule, 4), DDIM(sd.schedule, 6)):
        with pytest.raises(
            ValueError, match="expected a run like the recorded one of 5 steps at timesteps"
        ):
            for step in sampler:
                replaying(step)


def test_record_and_replay_of_pictures(sd):
    """The two calls draw what edit_prompt draws, up to the float16 of the maps."""
    options = dict(seed=3, progress=False)
    recording = record(sd, SOURCE, steps=STEPS, **SIZE, **options)
    [image] = sd.decode(recording.z)
    assert recording.z.shape == (1, 4, 6, 11)
    images = replay(sd, recording, SWAP, REFINED, cross_steps=0.6, self_steps=0.2, **options)
    together = edit_prompt(
        sd, SOURCE, SWAP, REFINED, steps=STEPS, cross_steps=0.6, self_steps=0.2, **SIZE, **options
    )
    assert len(images) == 2 and images[0].size == (44, 24)
    for mine, other in zip([image, *images], together, strict=True):
        a, b = (
            torch.frombuffer(bytearray(i.tobytes()), dtype=torch.uint8).int() for i in (mine, other)
        )
        assert (a - b).abs().max() <= 2
    none = replay(sd, recording, SWAP, cross_steps=0, self_steps=0, **options)
    plain = run(sd, [SWAP])
    assert none[0].tobytes() == sd.decode(plain)[0].tobytes()
    given = replay(
        sd,
        recording,
        SWAP,
        cross_steps=0,
        self_steps=0,
        latents=sd.noise(3, **SIZE),
        progress=False,
    )
    assert given[0].tobytes() == none[0].tobytes()


def test_a_recording_of_another_model_is_refused(sd):
    recording = record(sd, SOURCE, steps=2, cross_sites="mid", self_sites="mid", progress=False)
    names = sorted(recording.maps)
    assert [name[-2:] for name in names] == [".k", ".q", ".p"]
    for change in (
        lambda x: x.repeat(1, 1, 2, 1, 1),  # heads
        lambda x: x[:, :, :, :-1],  # queries
        lambda x: x[..., :-1],  # tokens, or the head's width
    ):
        for some in (names[:2], names[2:]):
            maps = {**recording.maps, **{name: change(recording.maps[name]) for name in some}}
            other = replace(recording, maps=maps)
            with pytest.raises(ValueError, match="in each step, the model's has .*another model"):
                Injection(sd, other, SWAP)
    maps = {f"no.{name}": x for name, x in recording.maps.items()}
    with pytest.raises(ValueError, match=r"no site for the map no\.mid_block"):
        replay(sd, replace(recording, maps=maps), SWAP, progress=False)
    with pytest.raises(ValueError, match="z has 5 channels, the model's latents have 4"):
        Injection(sd, replace(recording, z=torch.zeros(1, 5, *recording.size)), SWAP)
    recording.check(sd)


def test_a_recording_without_maps_or_of_other_sites_is_refused(sd):
    recording = record(sd, SOURCE, steps=2, cross_sites="mid", self_sites=[], progress=False)
    with pytest.raises(ValueError, match="the recording has no map, expected at least one"):
        replace(recording, maps={})
    with pytest.raises(ValueError, match="the recording has no map"):
        record(sd, SOURCE, steps=2, cross_sites=[], self_sites=[], progress=False)
    with pytest.raises(ValueError, match="got the map 'p', expected SITE.p, SITE.q or SITE.k"):
        replace(recording, maps={"p": torch.zeros(2, 1, 1, 1, 1)})
    with pytest.raises(ValueError, match="choose nothing of the recording, which has mid_block"):
        replay(sd, recording, SWAP, cross_sites="up", progress=False)
