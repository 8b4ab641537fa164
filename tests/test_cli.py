"""The `minisd` command: what it draws and writes, what it prints, and how it fails."""

import ast
import os
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file

import minisd
from minisd import drawing, pipeline
from minisd.checkpoints import load as checkpoint
from minisd.cli import main as cli, options, output

TINY = ["--model", "tiny", "--steps", "3", "--device", "cpu"]


pytestmark = pytest.mark.usefixtures("here")


def full(value):
    """A value of a parametrised test that is tried in the second tier alone."""
    return pytest.param(value, marks=pytest.mark.full)


def files(folder):
    return sorted(
        str(path.relative_to(folder)) for path in folder.rglob("*") if "tiny" not in path.parts
    )


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image)


def chunks(path):
    """What a PNG tells beside its recipe and A1111's text (test_recipes.py)."""
    with Image.open(path) as image:
        told = dict(image.text)
    told.pop("recipe", None), told.pop("parameters", None)
    return told


def write_image(path, mode="RGB", width=45, height=26):
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(values).convert(mode).save(path)
    return path


# drawing


def test_txt2img_draws_what_the_pipeline_draws(minisd_command, here):
    options = [
        "--size",
        "40x24",
        "--guidance",
        "3",
        "--negative",
        "blurry",
        "--sampler",
        "ddim",
        "--seed",
        "7",
    ]
    code, out, err = minisd_command(
        "txt2img", "a red circle", *TINY, *options, "-o", "new/folder/out.png"
    )
    assert code == 0 and out == "new/folder/out.png\n" and "3/3" in err
    assert files(here) == ["new", "new/folder", "new/folder/out.png"]

    sd = minisd.load("tiny", device="cpu")
    [expected] = sd.txt2img(
        "a red circle",
        negative_prompt="blurry",
        steps=3,
        guidance=3,
        sampler="ddim",
        seed=7,
        height=24,
        width=40,
        progress=False,
    )
    assert (pixels("new/folder/out.png") == np.asarray(expected)).all()
    assert chunks("new/folder/out.png") == {
        "version": f"minisd {minisd.__version__}",
        "command": "txt2img",
        "prompt": "a red circle",
        "negative": "blurry",
        "model": "tiny",
        "seed": "7",
        "size": "40x24",
        "steps": "3",
        "guidance": "3.0",
        "sampler": "ddim",
        "dtype": "float32",
        "device": "cpu",
    }


def test_img2img_draws_what_the_pipeline_draws(minisd_command):
    write_image("in.png")
    code, out, _ = minisd_command(
        "img2img", "in.png", "a dog", "--strength", "0.7", *TINY, "-o", "out.png"
    )
    assert (code, out) == (0, "out.png\n")
    sd = minisd.load("tiny", device="cpu")
    [expected] = sd.img2img(Image.open("in.png"), "a dog", 0.7, steps=3, progress=False)
    assert expected.size == (44, 24) and (pixels("out.png") == np.asarray(expected)).all()
    minisd_command("img2img", "in.png", "a dog", *TINY, "--size", "16x32", "-o", "out.png")
    assert Image.open("out.png").size == (16, 32)


@pytest.mark.parametrize(
    "arguments",
    [
        ["txt2img", "a cat", "-n", "3", "--seed", "5", "--dtype", "bfloat16"],
        ["txt2img", "a cat", "--dtype", "float64"],
        ["txt2img", "--negative=-5 'apples' \"and\" $HOME", "--seed", "-9", "--", "--steps"],
        ["txt2img", "two\nlines; $HOME -- 'quoted'"],
        ["txt2img", "$'a\x1b[2J\x07\x9b\\', \u202e\xa0", "--negative", "\t\r\x7f1"],
        [
            "txt2img",
            "Zürich, 雪 🎨",
            "--sampler",
            "dpm++ linspace",
            "--size",
            "24x40",
            "--guidance",
            "1",
        ],
        ["img2img", "in.png", "a dog", "--strength", "0.9", "-n", "2"],
        ["img2img", "an image.jpg", "a dog", "--size", "32x32", "--negative", "cats"],
        ["img2img", "in.png", "a dog", "--strength", "0"],
        ["txt2img", "a <cat>", "--lora", "a:b.safetensors", "--lora", "a:b.safetensors:-0.5"],
        ["img2img", "in.png", "a <cat>", "--embedding", "cat.safetensors"],
        ["img2img", os.fsdecode(b"caf\xe9 '\x1b.png"), "$'a\\303'"],
        ["blend", os.fsdecode(b"caf\xe9 '\x1b.png"), "in.png", "a dog"],
    ],
)
def test_the_command_that_info_prints_draws_the_same_bits(minisd_command, draw_again, arguments):
    lora = {"lora_unet_conv_in.lora_up.weight": torch.ones(16, 1, 1, 1)}
    lora["lora_unet_conv_in.lora_down.weight"] = torch.ones(1, 4, 3, 3)
    save_file(lora, "a:b.safetensors")
    save_file({"<cat>": torch.ones(2, 24)}, "cat.safetensors")
    write_image("in.png")
    write_image("an image.jpg")
    shutil.copy("in.png", b"caf\xe9 '\x1b.png")  # a name that is no UTF-8
    code, out, _ = minisd_command(arguments[0], *TINY, "-o", "images/", *arguments[1:])
    assert code == 0
    path = out.splitlines()[-1]  # of several, the last: it is drawn again without the others
    assert draw_again(path) == ["again.png"]
    assert (pixels("again.png") == pixels(path)).all() and chunks("again.png") == chunks(path)


@pytest.mark.parametrize(
    ("arguments", "files_again"),
    [
        (
            ["edit", "a cat", "a dog", *TINY, "-n", "2", "--seed=-5", "--sheet=s.png", "-ox.png"],
            [["again-0.png", "again-1.png"], ["again.png"]],
        ),
        (["edit", "a cat", *TINY, "--reweight", "cat=-2", "--sheet", "s.png"], [["again.png"]]),
        (
            [
                "edit",
                "a cat",
                "a dog",
                *TINY,
                "--image",
                "in.png",
                "-o",
                "x/",
                "--self-steps",
                "0.2:1",
            ],
            [["again-0.png", "again-1.png"]],
        ),
        (["heatmap", "a cat", *TINY, "-n2", "--output", "h.png"], [["again.png"]]),
        (["invert", "in.png", "a cat", *TINY, "--save", "p.safetensors"], [["again.png"]]),
        (
            [
                "blend",
                "in.png",
                "in.png",
                "a cat",
                *TINY,
                "-n",
                "2",
                "--trace=t",
                "--trace-every",
                "2",
            ],
            [["again.png"]],
        ),
        (
            ["erase", *TINY, "-n2", "--seed", "7", "-o", "x/", "--", "a", "-n", "-o"],
            [["again.png"]],
        ),
    ],
    ids=lambda value: value[0] if isinstance(value[0], str) else "",
)
def test_other_commands_draw_each_image_again_and_write_nothing_else(
    minisd_command, draw_again, here, arguments, files_again
):
    write_image("in.png")
    code, out, err = minisd_command(*arguments)
    assert code == 0, err
    before, found = files(here), []
    for path in [line for line in out.splitlines() if line.endswith(".png")]:
        new = draw_again(path)
        assert new in files_again and files(here) == sorted([*before, *new])
        same = [p for p in new if chunks(p) == chunks(path) and (pixels(p) == pixels(path)).all()]
        assert len(same) == 1, f"{path}: {chunks(path)}"
        found.append(new)
        for each in new:
            (here / each).unlink()
    assert all(names in found for names in files_again)


@pytest.mark.parametrize(
    ("argv", "again"),
    [
        (["heatmap", "a", "--seed", "-3", "-n", "2"], ["heatmap", "a"]),
        (["edit", "-o", "x.png", "a", "-", "--sheet=s.png"], ["edit", "a", "-"]),
        (
            ["blend", "--trace-preview", "-ob.png", "i", "m", "--trace-format", "gif"],
            ["blend", "i", "m"],
        ),
        (
            ["edit", "a b", "--negative=-o x", "--self-steps", "1"],
            ["edit", "a b", "--negative=-o x", "--self-steps", "1"],
        ),
        (
            ["erase", "--strength", "-1", "--erase-scale=-1,2"],
            ["erase", "--strength", "-1", "--erase-scale=-1,2"],
        ),
    ],
)
def test_the_line_that_draws_again(argv, again):
    end = ["--", "-n", "--seed"]
    line = output.line_again([*argv, *end], 5)
    assert shlex.split(line) == [*again, "--seed", "5", "-o", "again.png", *end]
    assert shlex.split(output.line_again(argv, None, "--sheet")) == [*again, "--sheet", "again.png"]


def test_info_of_an_image(minisd_command):
    minisd_command("txt2img", "a cat", *TINY, "-o", "out.png")
    code, out, err = minisd_command("info", "out.png")
    assert code == 0 and err == ""
    assert "prompt:          a cat\n" in out and "seed:            0\n" in out
    assert out.endswith(
        "\n\nminisd txt2img 'a cat' --model tiny --seed 0 --size 32x32 --steps 3 --guidance 7.5 "
        "--sampler dpm++ --dtype float32 --device cpu -o again.png\n"
    )


def test_prompt_that_is_cut_warns_in_one_line(minisd_command):
    code, _, err = minisd_command("txt2img", "word " * 90, *TINY, "-o", "out.png")
    warning = [line for line in err.splitlines() if "warning" in line]
    assert code == 0 and len(warning) == 1
    assert re.fullmatch(
        r"minisd: warning: the prompt has \d+ tokens and 75 fit; this part was cut: .*", warning[0]
    )


# files


def test_several_images_and_folders(minisd_command, here):
    assert (
        minisd_command("txt2img", "a", *TINY, "-n", "2", "-o", "x.png")[1] == "x-0.png\nx-1.png\n"
    )
    assert [chunks(f"x-{i}.png")["seed"] for i in range(2)] == ["0", "1"]
    assert (pixels("x-0.png") != pixels("x-1.png")).any()

    assert minisd_command("txt2img", "a", *TINY, "-o", "new")[1] == "new/minisd-00000.png\n"
    before = (here / "new/minisd-00000.png").read_bytes()
    out = minisd_command("txt2img", "b", *TINY, "-n", "2", "-o", "new")[1]
    assert out == "new/minisd-00001.png\nnew/minisd-00002.png\n"
    assert (here / "new/minisd-00000.png").read_bytes() == before
    assert (
        minisd_command("txt2img", "a", *TINY)[1] == "minisd-00000.png\n"
    )  # the working folder is the default


def test_names_that_are_like_others_of_the_command_are_kept_apart(minisd_command, here):
    """Beside those that are refused: what is written is as much as is printed."""
    for i, places in enumerate(
        [("x.png", "x-2.png"), ("x.png", "x.png"), ("x.png", "x-01.png"), ("d/", "d/")]
        + [("d/", "d/minisd-1.png"), ("x.png", "d/x-0.png"), ("d/x-0.png", "x.png")]
    ):
        (here / str(i)).mkdir()
        image, sheet = (f"{i}/{name}" for name in places)
        code, out, err = minisd_command("edit", "a", "b", *TINY, "-o", image, "--sheet", sheet)
        assert code == 0 and len(out.splitlines()) == 3, err
        assert len(list((here / str(i)).rglob("*.png"))) == 3


@pytest.mark.full
def test_processes_that_draw_into_one_folder_lose_nothing(here):
    command = [sys.executable, "-m", "minisd", "txt2img", "a", *TINY, "--steps", "1", "-n", "6"]
    both = [
        subprocess.Popen([*command, "--seed", seed, "-o", "new"], stdout=-1, stderr=-1, text=True)
        for seed in ("0", "100")
    ]
    printed = [process.communicate()[0].splitlines() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sorted(printed[0] + printed[1]) == files(here)[1:]  # behind "new" itself
    for first, paths in zip((0, 100), printed):
        assert [int(chunks(path)["seed"]) for path in paths] == list(range(first, first + 6))


def test_a_name_that_is_no_utf8_is_written_to(minisd_command, here):
    name = os.fsdecode(b"new\xff/\xe9.png")
    assert minisd_command("txt2img", "a", *TINY, "-o", name)[0] == 0
    assert chunks(name)["prompt"] == "a" and os.listdir(os.fsencode(here)) == [b"tiny", b"new\xff"]


def test_a_hundred_million_images_begin_at_once(here):
    """Names and seeds are made as they are needed; a seed that is none is told at once."""
    command = [sys.executable, "-m", "minisd", "txt2img", "a", *TINY, "-n", "100000000"]
    process = subprocess.Popen([*command, "-o", "x.png"], stdout=-1, stderr=-1, bufsize=0)
    start, peak = time.monotonic(), 0
    while not Path("x-1.png").exists():
        assert process.poll() is None and time.monotonic() - start < 60
        time.sleep(0.05)
        if sys.platform == "linux":
            status = Path(f"/proc/{process.pid}/status").read_text()
            peak = max(peak, *map(int, re.findall(r"VmHWM:\s+(\d+)", status)), 0)
    process.kill()
    process.communicate()
    assert peak < 1.5e6  # kB: torch and a tiny model, not 10^8 names
    last = subprocess.run([*command, "--seed", str(2**64 - 10**8 + 1)], capture_output=True)
    assert b"expected a whole number or a list of them" in last.stderr
    assert {"x-0.png", "x-1.png"} <= set(files(here))


def test_an_image_is_whole_or_not_there(minisd_command, here, monkeypatch):
    (here / "old.png").write_bytes(b"an older image")

    failures = [KeyboardInterrupt(), OSError("No space left on device")]

    def save(self, path, **options):
        path.write_bytes(b"half")
        raise failures.pop(0)

    monkeypatch.setattr(Image.Image, "save", save)
    for code in (130, 2):
        assert minisd_command("txt2img", "a", *TINY, "-o", "old.png")[0] == code
        assert files(here) == ["old.png"] and (here / "old.png").read_bytes() == b"an older image"


def test_written_files_are_ordinary_files(minisd_command, here):
    (here / "target").mkdir()
    (here / "link.png").symlink_to(here / "target" / "real.png")
    assert minisd_command("txt2img", "a", *TINY, "-o", "link.png")[0] == 0
    (here / "plain").write_text("")
    assert (here / "link.png").is_symlink() and not (here / "target" / "real.png").is_symlink()
    assert (here / "target" / "real.png").stat().st_mode == (here / "plain").stat().st_mode


SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP] if hasattr(signal, "SIGHUP") else []


def with_signals():
    """In a process that starts: a background job ignores Ctrl-C, and nohup SIGHUP."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)


@pytest.mark.parametrize("number", [*SIGNALS[:2], *(full(each) for each in SIGNALS[2:])])
def test_a_signal_leaves_nothing_behind(here, number):
    command = [sys.executable, "-m", "minisd", "txt2img", "a", *TINY, "--steps", "1000"]
    command += ["-o", "new/out.png", "--trace", "new/trace"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, preexec_fn=with_signals)
    seen = b""
    while not re.search(
        rb" [1-9]\d*/1000", seen
    ):  # some steps are done; the bar does not show each
        seen += process.stderr.read(1) or pytest.fail(f"ended early: {seen.decode()[-500:]}")
    assert "new/trace/step_0000_t0999.png" in files(here)
    process.send_signal(number)
    process.send_signal(number)  # twice: who is impatient loses nothing
    _, rest = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert rest.decode().endswith("\nminisd: interrupted\n") and b"Traceback" not in rest
    assert files(here) == []


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("module", ["argparse", "torch"])
def test_a_signal_while_libraries_are_imported(here, module, number):
    """An import in which the interrupt comes, and that swallows KeyboardInterrupt, as C++ may."""
    interrupt = f"try: os.kill(os.getpid(), {int(number)})\nexcept BaseException: pass\n"
    (here / "early").mkdir()
    (here / "early" / f"{module}.py").write_text(f"import os, signal\n{interrupt}raise ImportError")
    paths = [str(here / "early"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {"PYTHONPATH": os.pathsep.join(paths), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "minisd", "txt2img", "a", *TINY],
        capture_output=True,
        preexec_fn=with_signals,
        env=os.environ | environment,
    )
    assert (done.returncode, done.stderr.decode()) == (128 + number, "\nminisd: interrupted\n")
    assert files(here) == ["early", f"early/{module}.py"]


@pytest.mark.full
def test_signals_that_are_ignored_stay_ignored(here):
    """Under nohup, and Ctrl-C in a shell's background job."""

    def ignoring():
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    command = [sys.executable, "-m", "minisd", "txt2img", "a", *TINY, "--steps", "200"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, preexec_fn=ignoring)
    process.stderr.read(1)  # the bar: it draws
    for number in SIGNALS:
        process.send_signal(number)
    process.communicate()
    assert process.returncode == 0 and files(here) == ["minisd-00000.png"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="POSIX files")
@pytest.mark.parametrize("closed", [(0, 1, 2), full((0,)), full((1,)), full((2,))], ids=str)
def test_standard_files_may_be_closed(here, closed):
    """And none of the files that are opened instead of them gets what is printed."""

    def run(*argv):
        command = [sys.executable, "-m", "minisd", *argv]
        close = lambda: [os.close(number) for number in closed]
        return subprocess.run(command, capture_output=True, preexec_fn=close)

    done = run("txt2img", "word " * 90, *TINY, "-o", "a.png", "--trace", "steps")
    assert done.returncode == 0 and b"Traceback" not in done.stderr
    assert chunks("a.png")["prompt"] == "word " * 90
    assert (done.stdout == b"") == (1 in closed) and (done.stderr == b"") == (2 in closed)
    for path in [here / "a.png", *(here / "steps").glob("*.png")]:
        pixels(path)
    for argv, code in [(["models"], 0), (["info", "a.png"], 0), (["txt2img"], 2)]:
        done = run(*argv)
        assert done.returncode == code and b"Traceback" not in done.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_standard_output_that_is_full_is_an_error():
    command = [sys.executable, "-m", "minisd", "models"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    message = "minisd: error: [Errno 28] No space left on device\n"
    assert (done.returncode, done.stderr) == (2, message)


def test_ctrl_c_while_the_arguments_are_read(minisd_command, monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "build_parser", interrupted)
    assert minisd_command("models") == (130, "", "\nminisd: interrupted\n")


def test_a_reader_that_goes_away_is_no_error():
    ours, theirs = os.pipe()
    os.close(ours)
    done = subprocess.run(
        [sys.executable, "-m", "minisd", "models"], stdout=theirs, stderr=subprocess.PIPE
    )
    os.close(theirs)
    assert (done.returncode, done.stderr) == (141, b"")


def test_a_name_may_be_as_long_as_the_system_allows(here):
    name = "n" * 251 + ".png"
    assert output.output_places(name, 1).name(0) == Path(name)
    output.write_png(here / name, Image.new("RGB", (8, 8)), {})
    assert files(here) == [name]


# models


def test_what_the_terminal_cannot_show_is_escaped(here):
    output.write_png(
        here / "a.png", Image.new("RGB", (8, 8)), {"version": "minisd 0", "prompt": "雪 red"}
    )
    run = [sys.executable, "-m", "minisd", "info", "a.png"]
    done = subprocess.run(
        run, capture_output=True, env=os.environ | {"PYTHONIOENCODING": "ascii:strict"}
    )
    assert done.returncode == 0 and rb"prompt:          \u96ea red" in done.stdout


def test_info_of_an_image_that_means_ill(minisd_command, here):
    chunks = {
        "version": "minisd 0",
        "prompt": "a\x1b[2Jcat",
        "arguments": "edit 'a cat'; rm -rf $HOME `id` a\x9bm",
    }
    output.write_png(here / "a.png", Image.new("RGB", (8, 8)), chunks)
    code, out, _ = minisd_command("info", "a.png")
    assert (
        code == 0 and r"prompt:          a\x1b[2Jcat" in out and out.replace("\n", "").isprintable()
    )
    assert out.endswith("\n\nminisd edit 'a cat;' rm -rf '$HOME' '`id`' $'a\\302\\233m'\n")
    output.write_png(here / "a.png", Image.new("RGB", (8, 8)), chunks | {"arguments": "edit 'a"})
    assert minisd_command("info", "a.png")[::2] == (
        2,
        "minisd: error: its arguments cannot be read: No closing quotation\n",
    )


def test_info_of_lines_that_look_like_its_own(minisd_command, here):
    """A prompt's second line is no command; a file's name may hold what Unicode calls a line's
    end."""
    told = {"version": "minisd 0", "prompt": "a\n\nminisd evil", "lora": "a\u2028b:1.0\nc:0.5"}
    output.write_png(here / "a.png", Image.new("RGB", (8, 8)), told)
    code, out, _ = minisd_command("info", "a.png")
    lines = out.split("\n")
    assert code == 0 and [line for line in lines if line.startswith("minisd")] == [lines[-2]]
    assert lines[-2].endswith("--lora $'a\\342\\200\\250b:1.0' --lora c:0.5 -o again.png")


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"recipe": "["}, "its recipe cannot be read: "),
        ({"recipe": "[" * 100_000}, "its recipe cannot be read: "),
        ({"recipe": "[]"}, "its recipe cannot be read: expected an object with arguments and mod"),
        ({"recipe": '{"arguments": [], "model": 1}'}, "expected an object with arguments and mod"),
        (None, "a.png cannot be read as a PNG image: "),
        ({"bomb": "\0" * 10**8}, "a.png cannot be read as a PNG image: "),
    ],
)
def test_info_of_what_cannot_be_read(minisd_command, here, told, message):
    text = PngInfo()
    for key, value in {"version": "minisd 0", **(told or {})}.items():
        text.add_text(key, value, zip=key == "bomb")
    Image.new("RGB", (8, 8)).save("a.png", pnginfo=text)
    if told is None:
        (here / "a.png").write_bytes((here / "a.png").read_bytes()[:50])
    code, out, err = minisd_command("info", "a.png")
    assert (code, out) == (2, "") and message in err and err.count("\n") == 1


def test_info_of_a_model(minisd_command):
    code, out, err = minisd_command("info", "tiny")
    assert code == 0 and err == ""
    sd = minisd.load("tiny", device="cpu")
    total = 0
    for part in checkpoint.MODELS:
        parameters = list(getattr(sd, part).parameters())
        count = sum(p.numel() for p in parameters)
        total += count
        assert f"{part}: {count:,} parameters in {len(parameters)} tensors (F32)" in out
    assert f"total: {total:,} parameters" in out
    assert (
        "block_out_channels: (16, 32)" in out and "tokenizer: 514 pieces, 77 ids per prompt" in out
    )


# help and errors


def test_modules_of_the_command_import_one_way():
    """main -> the groups of commands -> output -> options, lines; edit also reads what is
    inverted."""
    folder = Path(cli.__file__).parent
    ranks = dict(options=0, lines=0, output=1, invert=2, main=4)
    seen = set()
    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level == 1:
                names = [node.module] if node.module else [alias.name for alias in node.names]
                for name in names:
                    assert ranks.get(name, 3) < ranks.get(path.stem, 3), f"{path.stem} -> {name}"
                    seen.add((path.stem, name))
    assert {("main", "edit"), ("edit", "invert"), ("draw", "output")} <= seen


def test_what_argparse_read_is_not_written_to():
    for path in Path(cli.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            written = isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
            assert (
                not written
                and getattr(node, "id", "") != "setattr"
                or (path.stem == "main" and node.attr == "showwarning")
            ), f"{path.name}:{node.lineno}"


def test_help_shows_the_defaults(minisd_command):
    code, out, _ = minisd_command("txt2img", "--help")
    text = " ".join(out.split())
    for default in ("sd-v1-4", "0", "25", "7.5", "dpm++", "1", "."):
        assert f"(default: {default})" in text
    assert code == 0 and "None" not in text and "False" not in text
    assert minisd_command("--version") == (0, f"minisd {minisd.__version__}\n", "")
    for command in ("txt2img", "img2img", "models", "info"):
        assert command in minisd_command("--help")[1]


def test_the_model_is_v1_4_where_none_is_named():
    [commands] = [
        action.choices for action in cli.build_parser()._actions if isinstance(action.choices, dict)
    ]
    taking = {
        name: parser
        for name, parser in commands.items()
        if "--model" in parser._option_string_actions
    }
    assert taking.pop("dit").get_default("model") == "facebook/DiT-XL-2-256"
    assert set(taking) == {
        "txt2img",
        "img2img",
        "edit",
        "heatmap",
        "invert",
        "blend",
        "inpaint",
        "batch",
        "erase",
        "masactrl",
        "pnp",
        "style",
        "excite",
        "regional",
        "diffedit",
        "export",
    }
    assert {parser.get_default("model") for parser in taking.values()} == {"sd-v1-4"}


def test_choices_are_those_of_the_pipeline():
    assert options.SAMPLERS == tuple(drawing.SAMPLERS)
    assert options.DTYPES == (*pipeline.DTYPES, "auto")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: command"),
        (["draw"], "invalid choice: 'draw'"),
        (["txt2img"], "the following arguments are required: prompt"),
        (["txt2img", "a", "--size", "64"], "got '64', expected WIDTHxHEIGHT"),
        (["txt2img", "a", "--size", "64x-8"], "got '64x-8', expected WIDTHxHEIGHT"),
        (
            ["txt2img", "a", "--size", "30x32", *TINY],
            "the image is 30 x 32 pixels, expected positive multiples of 4",
        ),
        (["txt2img", "a", "-n", "0"], "got 0, expected at least 1"),
        (["txt2img", "a", "--steps", "x"], "--steps: got x, expected a whole number"),
        (
            ["txt2img", "a", *TINY, "--steps", "1001"],
            "steps is 1001, expected a whole number from 1 to 1000",
        ),
        (["txt2img", "a", "--sampler", "euler"], "invalid choice: 'euler' (choose from"),
        (["txt2img", "a", "--dtype", "int8"], "invalid choice: 'int8'"),
        # --sa would be --sampler there, and --save to the line that draws again
        (["txt2img", "a", *TINY, "--sa", "ddim"], "unrecognized arguments: --sa ddim"),
        (["--vers"], "the following arguments are required: command"),
        (["txt2img", "a", "--model", "nope"], "there is no model 'nope'"),
        (["txt2img", "a", *TINY, "--device", "gpu"], "device 'gpu' cannot be used here"),
        (["txt2img", "a", *TINY, "--seed", str(2**64)], "at least one, from -2**63 to 2**64 - 1"),
        (
            ["txt2img", "a", *TINY, "--guidance", "nan"],
            "argument --guidance: got nan, expected a finite number",
        ),
        (
            ["txt2img", "a", "--negative", "b", "--guidance", "1"],
            "--negative-prompt: it has no effect at --guidance 1",
        ),
        (["txt2img", "a", *TINY, "--device", "meta"], "device 'meta' cannot be used here"),
        (
            ["txt2img", "a", *TINY, "-o", "out.jpg"],
            "-o out.jpg: expected a name that ends in .png, or a folder",
        ),
        (
            ["txt2img", "a", "-n", "2", "-o", f"{'n' * 250}.png"],
            "File name too long",
        ),  # with -0 and -1 it is
        (["txt2img", "a", "--trace", "n" * 256], "File name too long"),
        (["export", "--to", "file/x"], "--to file/x: "),
        (
            ["txt2img", "a", *TINY, "-o", "file/out.png"],
            "file is not a folder that can be written to",
        ),
        (["txt2img", "a", *TINY, "-o", "pipe.png"], "pipe.png is a pipe or a device, expected a f"),
        (["txt2img", "a", *TINY, "-o", "null.png"], "null.png is a pipe or a device, expected a f"),
        (["edit", "a", "b", *TINY, "--sheet", "pipe.png"], "pipe.png is a pipe or a device"),
        (["edit", "a", "b", *TINY, "-o", "x.png", "--sheet", "x-1.png"], "that is a name of -o"),
        (
            ["edit", "a", "b", *TINY, "-n", "2", "-o", "./x.png", "--sheet", "x.png"],
            "--sheet x.png: that is a name of -o, expected another",
        ),
        (
            ["edit", "a", "b", *TINY, "-o", "d/", "--sheet", "d/minisd-00001.png"],
            "that is a name of -o",
        ),
        (
            ["txt2img", "a", *TINY, "--trace", "t", "--trace-format", "png", "-o", "t/images.png"],
            "-o t/images.png: it is in the folder of --trace",
        ),
        (
            ["img2img", "in.png", "a", *TINY, "--strength", "1.1"],
            "strength is 1.1, expected a number from 0 to 1",
        ),
        (
            ["info", "in.png"],
            "in.png carries no settings: minisd did not draw it, or they were stripped",
        ),
        (["info", "none.png"], "No such file or directory: 'none.png'"),
        (["info", "file"], "file is neither a PNG image nor a .safetensors file"),
        (
            ["info", "tiny", "--variant", "fp16"],
            "diffusion_pytorch_model.fp16.safetensors is missing",
        ),
    ],
)
def test_errors_are_one_line_and_exit_code_2(minisd_command, here, arguments, message):
    write_image("in.png")
    (here / "file").write_text("no image")
    os.mkfifo(here / "pipe.png")
    (here / "null.png").symlink_to(os.devnull)
    before = files(here)
    code, out, err = minisd_command(*arguments)
    assert code == 2 and out == "" and message in err
    assert err.count("\n") == 1 and re.match(r"minisd( \w+)?: error: ", err)
    assert files(here) == before


WITHOUT_EFFECT = [  # each at its default where it has one
    (["txt2img", "a", "--trace-every", "1"], "--trace-every: expected --trace DIR with it"),
    (["txt2img", "a", "--trace-format", "webp"], "--trace-format: expected --trace DIR with it"),
    (["txt2img", "a", "--trace-preview"], "--trace-preview: expected --trace DIR with it"),
    (["txt2img", "a", "--guidance", "1", "--negative", ""], "it has no effect at --guidance 1"),
    (
        ["blend", "in.png", "in.png", "a", "--feather", "0", "--no-paste-back"],
        "--feather",
    ),
    (["erase", "a", "b", "--strength", "0.3"], "--strength: expected --image with it"),
    (["erase", "a", "b", "--threshold", "0.9"], "--threshold: expected --sega with it"),
    (["erase", "a", "b", "--warmup", "10"], "--warmup: expected --sega with it"),
    (["erase", "a", "b", "--momentum", "0.1"], "--momentum: expected --sega with it"),
    (["edit", "a", "b", "--threshold", "0.3"], "--threshold: expected --local-blend with it"),
    (["edit", "a", "b", "--subtract", "a"], "--subtract: expected --local-blend with it"),
    (["edit", "a", "b", "--inversion", "direct"], "--inversion: expected --image with it"),
    (["edit", "a", "b", "--refine", "0"], "--refine: expected --image with it"),
    (["edit", "a", "b", "--sweep", "0,1", "--cross-steps", "0.8"], "--sweep: expected one target"),
    (["edit", "a", "b", "--image", "in.png", "--seed", "0"], "--seed: an inverted image is drawn"),
    (["invert", "in.png", "a", "--seed", "0"], "--seed: an inverted image is drawn from its own"),
    (["info", "in.png", "--variant", "fp16"], "--variant: it is for models"),
    (["info", "in.png", "--tokenizer", "a"], "--tokenizer: it is for models"),
]


@pytest.mark.parametrize(("arguments", "message"), WITHOUT_EFFECT, ids=range(len(WITHOUT_EFFECT)))
def test_options_without_effect_are_noticed(minisd_command, here, arguments, message):
    write_image("in.png")
    model = [] if arguments[0] == "info" else ["--model", "tiny", "--device", "cpu"]
    code, out, err = minisd_command(*arguments, *model)
    assert (code, out) == (2, "") and message in err and err.count("\n") == 1
    assert files(here) == ["in.png"]


def test_checkpoint_errors_of_many_lines_show_the_first(minisd_command, original, here):
    shutil.copytree(original, here / "broken")
    config = here / "broken/unet/config.json"
    config.write_text(config.read_text().replace('"layers_per_block": 1', '"layers_per_block": 2'))
    code, _, err = minisd_command("txt2img", "a", "--model", "broken")
    assert code == 2 and re.fullmatch(
        r"minisd: error: unet, broken/unet/diffusion_pytorch_model.safetensors: (missing|misshapen)"
        r" [\w.]+, .+; in all \d+ tensors do not fit the models \(\d+ more lines with --debug\)\n",
        err,
    )


def test_debug_shows_the_traceback(minisd_command):
    with pytest.raises(checkpoint.CheckpointError):
        minisd_command("txt2img", "a", "--model", "nope", "--debug")
    run = [sys.executable, "-m", "minisd", "info", "none.png"]
    quiet = subprocess.run(run, capture_output=True, text=True)
    loud = subprocess.run([*run, "--debug"], capture_output=True, text=True)
    assert (
        quiet.returncode == 2
        and quiet.stderr == "minisd: error: [Errno 2] No such file or directory: 'none.png'\n"
    )
    assert loud.returncode == 1 and "Traceback" in loud.stderr


# images that are given

READING = [  # every command that reads an image, at each place where it does
    ["img2img", "IMAGE", "a"],
    ["blend", "IMAGE", "whole.png", "a"],
    ["blend", "whole.png", "IMAGE", "a"],
    ["erase", "a", "b", "--image", "IMAGE"],
    ["invert", "IMAGE", "a"],
    ["edit", "a cat", "a dog", "--image", "IMAGE"],
]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of files that are no image, or one that has to be converted first."""
    folder = tmp_path_factory.mktemp("images")
    whole = write_image(folder / "whole.png", width=40, height=24)
    (folder / "cut.png").write_bytes(whole.read_bytes()[:1000])
    (folder / "cut.jpg").write_bytes(write_image(folder / "whole.jpg").read_bytes()[:700])
    (folder / "text.png").write_text("no image")
    (folder / "empty.png").write_bytes(b"")
    (folder / "folder.png").mkdir()
    write_image(folder / "float.tif", "F")
    tiff = write_image(folder / "whole.tif").read_bytes()
    samples = struct.pack("<HHIH", 277, 3, 1, 3)  # a tag of Pillow's, of which Pillow logs, too
    assert samples in tiff
    (folder / "odd.tif").write_bytes(tiff.replace(samples, struct.pack("<HHIH", 277, 3, 1, 260)))
    write_image(folder / "dot.png", width=1, height=1)
    huge = whole.read_bytes().replace(struct.pack(">II", 40, 24), struct.pack(">II", 20000, 20000))
    (folder / "huge.png").write_bytes(
        huge[:29] + struct.pack(">I", zlib.crc32(huge[12:29])) + huge[33:]
    )
    return folder


@pytest.mark.parametrize("arguments", READING, ids=" ".join)
def test_bad_images_are_refused_in_one_line(minisd_command, here, images, arguments):
    for name, message in [
        ("none.png", "No such file or directory: '{path}'"),
        ("folder.png", "[Errno 21] Is a directory: '{path}'"),
        ("empty.png", "cannot identify image file '{path}'"),
        ("text.png", "cannot identify image file '{path}'"),
        ("cut.png", "{path} cannot be read as "),
        ("cut.jpg", "{path} cannot be read as "),
        ("float.tif", "of mode F has no known white"),
        ("odd.tif", "{path} cannot be read as "),
        ("huge.png", "{path} is too large: expected at most 89,478,485 pixels"),
        ("dot.png", ""),  # too small to draw, or not of the mask's proportions
    ]:
        path = images / name
        given = [
            {"IMAGE": path, "whole.png": images / "whole.png"}.get(each, each) for each in arguments
        ]
        code, out, err = minisd_command(*given, *TINY, "-o", "new/out.png", "--trace", "new/trace")
        assert code == 2 and out == "" and message.format(path=path) in err
        lines = [each for each in err.splitlines() if "are less than one step" not in each]
        assert len(lines) == 1 and lines[0].startswith("minisd: error: ") and files(here) == []


def test_images_are_taken_as_a_viewer_shows_them(minisd_command, here, images):
    """At strength 0, and where strength x steps is below 1, the image itself comes out."""
    rgb = np.asarray(Image.open(images / "whole.png"))
    upright = Image.Exif()
    upright[274] = 6  # stored lying on its left side
    Image.fromarray(np.rot90(rgb).copy()).save("turned.png", exif=upright)
    Image.fromarray(rgb).convert("RGBA").save("clear.png")
    Image.fromarray(rgb).save(
        "moving.png", save_all=True, append_images=[Image.new("RGB", (40, 24))]
    )
    for name, strength in [("turned.png", "0"), ("clear.png", "0"), ("moving.png", "0.3")]:
        code, _, _ = minisd_command(
            "img2img", name, "a", *TINY, "--strength", strength, "-o", "out.png"
        )
        assert code == 0 and (pixels("out.png") == rgb).all()
    dot = ["img2img", images / "dot.png", "a", *TINY, "--strength", "0", "-o", "out.png"]
    assert "the image is 1 x 1 pixels, expected at least 4 x 4" in minisd_command(*dot)[2]
    assert minisd_command(*dot, "--size", "8x4")[0] == 0 and pixels("out.png").shape == (4, 8, 3)


@pytest.mark.parametrize("mode", ["RGBA", "P", "LA", "I;16", "1", "CMYK"])
def test_images_of_any_mode(minisd_command, mode):
    if mode == "I;16":
        Image.fromarray(np.full((24, 40), 40000, np.uint16)).save("in.tif")
    else:
        write_image("in.tif", mode)
    assert (
        minisd_command("img2img", "in.tif", "a", *TINY, "--strength", "0", "-o", "out.png")[0] == 0
    )
    assert Image.open("out.png").mode == "RGB"
    if mode == "I;16":
        assert (pixels("out.png") == round(40000 / 257)).all()


def test_an_option_has_the_name_that_it_has_in_python():
    """Of a field of Drawing, an argument of PromptToPrompt, heatmap and null_text."""
    from minisd.cli.main import build_parser
    from minisd.drawing import Options
    from minisd.editing.prompt_to_prompt import EditOptions

    [commands] = [a.choices for a in build_parser()._actions if isinstance(a.choices, dict)]
    python_only = {"rule", "uncond", "latents", "on_step", "progress", "self_sites", "map_sites"}
    drawing = set(Options.__annotations__) - python_only - {"height", "width"} | {"size"}
    expected = {
        "txt2img": drawing,
        "edit": drawing | set(EditOptions.__annotations__) - python_only | {"local_blend"},
        "heatmap": drawing | {"where", "until"},
        "invert": drawing | {"refine", "inner_steps"},
        "blend": drawing | {"strength", "feather"},
        "erase": drawing | {"strength", "erase_scale", "threshold", "warmup", "momentum"},
    }
    for name, names in expected.items():
        known = {option for a in commands[name]._actions for option in a.option_strings}
        missing = {"--" + name.replace("_", "-") for name in names} - known
        assert not missing, f"{name}: {missing}"
