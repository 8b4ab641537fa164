"""Tracing: what is kept and written, the linear preview against the decoder, and animations read
back by Pillow."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import minisd
from minisd import DDIM, Trace, animate, cfg, denoise, fit_preview, latent_rgb
from minisd.cli import main as cli
from minisd.cli.options import ANIMATIONS

PROMPT = "a big red circle left of a small blue square on a white background"
OTHERS = [
    "a green triangle on a black background",
    "a yellow star above a purple circle on a gray background",
]


@pytest.fixture(scope="module")
def sd():
    return minisd.load("shapes", device="cpu")


def values(image):
    return np.asarray(image).astype(int)


def same(a, b):
    return a.size == b.size and (values(a) == values(b)).all()


def correlation(a, b):
    return torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].item()


# what is kept


def test_it_keeps_every_third_step_and_the_last_and_changes_nothing(sd, tmp_path):
    seen = []

    def on_step(x, step):
        seen.append((step.index, step.t, x.clone()))
        return trace(x, step)

    trace = Trace(sd, every=3, folder=tmp_path / "new")
    [plain], [drawn] = (
        sd.txt2img(PROMPT, steps=8, on_step=each, progress=False) for each in (None, on_step)
    )
    assert same(plain, drawn)
    assert [(step.index, step.t) for step in trace.steps] == [seen[i][:2] for i in (2, 5, 7)]
    assert all(
        torch.equal(kept, seen[i][2]) for kept, i in zip(trace.latents, (2, 5, 7), strict=True)
    )
    assert same(trace.images[0], sd.decode(seen[2][2])[0]) and same(trace.images[-1], plain)
    names = [f"step_{i:04}_t{seen[i][1]:04}.png" for i in (2, 5, 7)]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == names
    for name, image in zip(names, trace.images):
        assert same(Image.open(tmp_path / "new" / name), image)


def test_it_keeps_the_steps_that_are_named_as_copies_in_both_directions(sd):
    trace, x = Trace(sd, every=[0, 2], view=latent_rgb), sd.noise(0)
    predict = lambda x, step, state: (0.1 * x, state)  # noqa: E731
    x = denoise(x, DDIM(sd.schedule, 4), predict, after=trace)
    x = denoise(x, DDIM(sd.schedule, 4, inverse=True), predict, after=trace)
    assert [step.index for step in trace.steps] == [0, 2, 2, 0]
    kept = trace.latents[-1].clone()
    assert torch.equal(x, kept)
    x.zero_()
    assert torch.equal(trace.latents[-1], kept)
    for every in (0, 2.5, "5"):
        with pytest.raises(
            ValueError, match=f"every is {every!r}, expected a whole number, at least 1"
        ):
            Trace(sd, every=every)


def test_it_composes_with_everything_that_draws(sd):
    cond, uncond = sd.encode_prompt([PROMPT]), sd.encode_prompt([""])
    options = dict(steps=2, progress=False)

    def trace():
        traces.append(Trace(sd))
        return traces[-1]

    traces, drawn = [], []
    drawn.append(sd.txt2img(OTHERS, on_step=trace(), **options))
    drawn.append(sd.img2img(drawn[0][0], PROMPT, 0.5, on_step=trace(), **options))
    drawn.append(
        sd.decode(
            denoise(sd.noise(0), DDIM(sd.schedule, 2), cfg(sd.unet, uncond, cond), after=trace())
        )
    )
    target = PROMPT.replace("circle", "square")
    edit = dict(local_blend=["circle", "square"], after=lambda x, step: x + 0.01)
    drawn.append(minisd.edit_prompt(sd, PROMPT, target, on_step=trace(), **edit, **options))
    drawn.append(minisd.seed_baseline(sd, PROMPT, target, on_step=trace(), **options))
    drawn.append(minisd.heatmap(sd, PROMPT, on_step=trace(), **options)[0])
    recording = minisd.record(sd, PROMPT, on_step=trace(), **options)
    drawn.append(sd.decode(recording.z))
    drawn.append(minisd.replay(sd, recording, target, on_step=trace(), progress=False))
    mask = np.zeros((64, 64), bool)
    mask[:, :32] = True
    blend = dict(strength=1.0, paste_back=False, sampler="ddim")
    minisd.blend(sd, drawn[0][0], mask, PROMPT, on_step=trace(), **blend, **options)
    erased = minisd.erase_concepts(sd, None, PROMPT, ["red"], on_step=trace(), **options)
    inversion = minisd.invert(sd, drawn[0][0], PROMPT, on_step=trace(), **options)
    redrawn = minisd.redraw(sd, inversion, on_step=trace(), progress=False)
    counts = [2, 1, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2]
    assert [len(traced.images) for traced in traces] == counts
    # The blend puts back its background at last, and an inversion ends as noise.
    del traces[8], traces[9]
    drawn += [erased, redrawn]
    for images, traced in zip(drawn, traces, strict=True):
        assert (values(traced.images[-1]) == np.hstack([values(image) for image in images])).all()
    replaced = minisd.edit_prompt(
        sd, PROMPT, OTHERS[0], on_step=lambda x, step: torch.zeros_like(x), **options
    )
    assert same(replaced[1], sd.decode(torch.zeros(1, 4, 16, 16))[0])
    ignored = minisd.edit_prompt(sd, PROMPT, OTHERS[0], on_step=lambda x, step: None, **options)
    assert same(ignored[1], minisd.edit_prompt(sd, PROMPT, OTHERS[0], **options)[1])


def test_latents_as_colours_by_hand(sd):
    z = torch.zeros(2, 4, 2, 2)
    z[0, 0, 0, 1], z[0, 1, 1, 0], z[0, 2, 1, 1], z[1, 3] = 3, -3, 30, 99
    first, second = latent_rgb(z)
    middle = values(second)[0, 0, 0]
    assert middle in (127, 128) and (values(second) == middle).all()
    expected = np.full((2, 2, 3), middle)
    expected[0, 1, 0], expected[1, 0, 1], expected[1, 1, 2] = 255, 0, 255
    assert (values(first) == expected).all()
    trace = Trace(sd, view=latent_rgb)
    trace(z, next(iter(DDIM(sd.schedule, 1))))
    assert trace.images[0].size == (16, 8)  # two rows of 2 x 2 latents, each of 4 x 4 pixels
    assert (values(trace.images[0])[:4, 4:8] == expected[0, 1]).all()
    assert same(trace.render(latent_rgb)[0], trace.images[0])


# the preview


@pytest.fixture(scope="module")
def preview(sd):
    return fit_preview(sd)


def test_the_preview_is_near_the_decoder(sd, preview):
    """Correlation with what is decoded, averaged over 4 x 4 pixels: measured .79 to .91."""
    trace = Trace(sd, view=preview)
    sd.txt2img([PROMPT, *OTHERS], steps=8, on_step=trace, progress=False)
    measured = []
    for z, image in zip(trace.latents, trace.images):
        decoded = F.avg_pool2d(sd.decode(z, as_tensor=True), sd.vae.factor).permute(0, 2, 3, 1)
        shown = np.stack([values(each) for each in preview(z)])
        measured.append(correlation(torch.from_numpy(shown).float(), decoded))
        assert image.size == (3 * 64, 64)
        assert (values(image)[::4, ::4] == np.hstack(list(shown))).all()
    print("correlations", [round(each, 3) for each in measured])
    assert min(measured) >= 0.65 and min(measured[-3:]) >= 0.86


def test_the_preview_is_the_least_squares_solution(sd):
    """No small change of its weights brings it nearer: the gradient of the squared error
    vanishes."""
    pictures = torch.rand(2, 3, 48, 40, generator=torch.Generator().manual_seed(5)) * 2 - 1
    preview = fit_preview(sd, pictures)
    z = sd.encode_image(pictures)
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(0))
    x = torch.cat([z, 0.5 * z + 0.75**0.5 * noise]).double()
    target = F.avg_pool2d(sd.decode(x, as_tensor=True).double(), 4)
    parts = [each.double().requires_grad_() for each in preview]
    colours = lambda: F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), *parts)  # noqa: E731
    error = lambda: (colours() - target).pow(2).sum()  # noqa: E731
    expected = (255 * (colours().detach() / 2 + 0.5).clamp(0, 1)).permute(0, 2, 3, 1).numpy()
    assert np.abs(np.stack([values(image) for image in preview(x)]) - expected).max() <= 0.51
    gradients = torch.autograd.grad(error(), parts)
    scale = target.pow(2).sum()
    assert all((gradient.abs() < 1e-4 * scale).all() for gradient in gradients)
    with torch.no_grad():
        parts[0][1, 2, 0, 1] += 0.05
        assert (
            max(g.abs().max() for g in torch.autograd.grad(torch.enable_grad()(error)(), parts))
            > 1e-3 * scale
        )


# animations


@pytest.fixture(scope="module")
def frames():
    random = np.random.default_rng(0)
    flat = random.integers(0, 256, (5, 1, 1, 3), dtype=np.uint8)
    return [Image.fromarray(each) for each in np.broadcast_to(flat, (5, 12, 20, 3)).copy()]


@pytest.mark.parametrize(
    ("suffix", "tolerance"), [(".webp", 6), (".png", 0), (".gif", 6), (".GIF", 6)]
)
def test_animations_are_read_back(frames, tmp_path, suffix, tolerance):
    path = tmp_path / "new" / f"a{suffix}"
    animate(frames, path, fps=20, hold=0.5)
    with Image.open(path) as image:
        assert image.n_frames == 5 and image.info["loop"] == 0
        for i, frame in enumerate(frames):
            image.seek(i)
            image.load()
            assert image.info["duration"] == (50 if i < 4 else 550)
            assert np.abs(values(image.convert("RGB")) - values(frame)).max() <= tolerance
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_animations_are_refused_in_words(frames, tmp_path, monkeypatch):
    with pytest.raises(
        ValueError, match="a.avi: expected a name that ends in .webp, .png, .gif, .mp4"
    ):
        animate(frames, "a.avi")
    with pytest.raises(ValueError, match=r"expected images of one size, got \[\]"):
        animate([], tmp_path / "a.gif")
    with pytest.raises(ValueError, match="expected images of one size"):
        animate([*frames, Image.new("RGB", (3, 3))], tmp_path / "a.gif")
    for how, message in (
        ({"fps": 0}, "fps is 0, expected a number from 0.1 to 1000"),
        ({"hold": -1}, "hold is -1"),
    ):
        with pytest.raises(ValueError, match=message):
            animate(frames, tmp_path / "a.gif", **how)
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)  # not installed
    with pytest.raises(
        ModuleNotFoundError, match=r"mp4 needs imageio-ffmpeg: pip install 'minisd\[video\]'"
    ):
        animate(frames, tmp_path / "a.mp4")
    assert list(tmp_path.iterdir()) == []


def test_mp4(frames, tmp_path):
    import imageio_ffmpeg as ffmpeg

    path = tmp_path / "a.mp4"
    animate([frame.resize((33, 20)) for frame in frames], path, fps=5, hold=1)
    reader = ffmpeg.read_frames(str(path))
    about = next(reader)
    assert about["fps"] == 5 and about["size"] == (34, 20) and about["codec"] == "h264"
    shown = [np.frombuffer(each, np.uint8).reshape(20, 34, 3).astype(int) for each in reader]
    assert len(shown) == 10
    for got, frame in zip(shown, [*frames, *[frames[-1]] * 5]):
        assert np.abs(got[5:15, 5:25] - values(frame)[0, 0]).max() <= 16
    assert list(tmp_path.iterdir()) == [path]


# the command

SHAPES = ["--model", "shapes", "--steps", "3", "--device", "cpu"]


@pytest.fixture
def command(tmp_path, monkeypatch, minisd_command):
    monkeypatch.chdir(tmp_path)
    return minisd_command


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def count(path):
    with Image.open(path) as image:
        return image.n_frames


def test_trace_writes_steps_and_animations(command, tmp_path):
    code, out, _ = command("txt2img", PROMPT, *SHAPES, "-o", "o.png", "--trace", "t")
    steps = ["t/step_0000_t0999.png", "t/step_0001_t0427.png", "t/step_0002_t0000.png"]
    assert (code, out) == (0, "o.png\n") and files(tmp_path) == [
        "o.png",
        "t/images.webp",
        "t/latents.webp",
        *steps,
    ]
    assert same(Image.open(steps[-1]), Image.open("o.png"))
    assert count("t/images.webp") in (2, 3) and count("t/latents.webp") in (
        2,
        3,
    )  # the last two are nearly the same

    (tmp_path / "empty").mkdir()
    options = [
        "--trace-every",
        "2",
        "--trace-format",
        "gif",
        "--trace-preview",
        "-n",
        "2",
        "--seed",
        "5",
    ]
    assert command("img2img", "o.png", PROMPT, *SHAPES, "--trace", "empty", *options)[0] == 0
    names = ["images.gif", "latents.gif", "step_0001_t0427.png", "step_0002_t0000.png"]
    assert files(tmp_path / "empty") == [f"seed{seed}/{name}" for seed in (5, 6) for name in names]
    last = values(Image.open("empty/seed6/step_0002_t0000.png"))
    assert (
        last == last[::4, ::4].repeat(4, 0).repeat(4, 1)
    ).all()  # a preview: 4 x 4 pixels for each latent
    assert (values(Image.open("minisd-00001.png")) != last).any()


def test_trace_of_the_editing_commands(command):
    options = [*SHAPES, "--trace-format", "png"]
    assert (
        command(
            "edit", PROMPT, OTHERS[0], OTHERS[1], "--cross-steps", "0", *options, "--trace", "e"
        )[0]
        == 0
    )
    edited = [values(Image.open(f"minisd-0000{i}.png")) for i in range(3)]
    name = next(name for name in files(Path("e")) if name.startswith("step_0002"))
    assert (values(Image.open(f"e/{name}")) == np.hstack(edited)).all() and count(
        "e/latents.png"
    ) >= 2
    assert command("heatmap", PROMPT, *options, "--trace", "h/new", "-o", "h.png")[0] == 0
    assert len(files(Path("h/new"))) == 5


def test_every_command_that_draws_can_be_traced():
    commands = cli.build_parser()._subparsers._group_actions[0].choices
    options = {
        name: {action.dest for action in parser._actions} for name, parser in commands.items()
    }
    drawing = [name for name, dests in options.items() if {"guidance", "dtype"} <= dests]
    assert {"txt2img", "img2img", "edit", "heatmap"} <= set(drawing)
    assert all(
        {"trace", "trace_every", "trace_preview", "trace_format"} <= options[name]
        for name in drawing
    )
    assert set(ANIMATIONS) == {suffix.removeprefix(".") for suffix in minisd.viewing.trace.FORMATS}


@pytest.mark.parametrize(
    ("failure", "code"), [(KeyboardInterrupt(), 130), (OSError("No space left on device"), 2)]
)
def test_a_trace_that_fails_leaves_nothing(command, tmp_path, monkeypatch, failure, code):
    save, saved = Image.Image.save, []

    def fail(self, path, **options):
        saved.append(path)
        if len(saved) < when:
            return save(self, path, **options)
        path.write_bytes(b"half")
        raise failure

    monkeypatch.setattr(Image.Image, "save", fail)
    (tmp_path / "old").mkdir()
    for when, folder in [
        (2, "new/deep"),
        (2, "old"),
        (6, "new/deep"),
    ]:  # in the second step, in the second animation
        saved.clear()
        assert (
            command("txt2img", PROMPT, *SHAPES, "-o", "pictures/o.png", "--trace", folder)[0]
            == code
        )
        assert len(saved) == when
        left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
        drawn = (
            {"pictures", "pictures/o.png"} if when == 6 else set()
        )  # a picture that is whole stays
        assert left == {"old"} | drawn


@pytest.mark.parametrize(
    ("failure", "code"), [(KeyboardInterrupt(), 130), (OSError("No space left on device"), 2)]
)
def test_a_trace_that_fails_leaves_what_others_wrote(command, tmp_path, monkeypatch, failure, code):
    def fail(*_):
        (tmp_path / "t/inner").mkdir()
        (tmp_path / "t/other.png").write_text("of another program")
        raise failure

    monkeypatch.setattr(minisd.viewing.trace, "animate", fail)
    result, _, err = command("txt2img", PROMPT, *SHAPES, "-o", "o.png", "--trace", "t")
    assert result == code and err.splitlines()[-1].startswith("minisd: ")
    assert {path.name for path in tmp_path.rglob("*")} == {"o.png", "t", "inner", "other.png"}


def test_trace_refuses_before_the_model_is_loaded(command, tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").write_text("")
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    for options, message in [
        (["--trace", "full"], "argument --trace: got 'full', expected a new or an empty folder"),
        (["--trace", "full/a"], "got 'full/a', expected a new or an empty folder"),
        (
            ["--trace", "t", "--trace-every", "0"],
            "argument --trace-every: got 0, expected at least 1",
        ),
        (["--trace", "t", "--trace-format", "avi"], "invalid choice: 'avi'"),
        (
            ["--trace", "t", "--trace-format", "mp4"],
            "mp4 needs imageio-ffmpeg: pip install 'minisd[video]'",
        ),
        (["--trace-every", "2"], "--trace-every: expected --trace DIR with it"),
        (["--trace-preview"], "--trace-preview: expected --trace DIR with it"),
    ]:
        code, out, err = command(
            "txt2img", PROMPT, "--model", "there is none", "-o", "o.png", *options
        )
        assert code == 2 and out == "" and message in err and err.count("\n") == 1
    assert files(tmp_path) == ["full/a"]
