"""Long runs: what is too long for the tests, which carry a tenth of it (test_soak.py).

    python tests/soak.py draw     500 images and 200 edits in one process: memory, files and threads
                                  stay what they are
    python tests/soak.py share    two processes and eight threads on one model and one folder draw
                                  the bits that each draws alone
    python tests/soak.py kill     kill -9 at 50 moments of every writing command: no half file, and
                                  the command runs again
    python tests/soak.py fuzz     100 000 inputs over every reader

Each prints its figures and ends with code 1 where one of them is wrong. The moments and the inputs
are drawn from --seed.
"""

import argparse
import contextlib
import ctypes
import gc
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

MODEL = ["--model", "shapes", "--device", "cpu", "--steps", "2"]
RED, BLUE = "a red circle", "a blue circle"


def silent_main(*argv):
    """The command in this process -> its exit code."""
    from minisd.cli.main import main

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            return main([str(each) for each in argv])
        except SystemExit as stop:
            return stop.code


# one process, many images


def state():
    """Memory in MB, open files and threads of this process (Linux)."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # not what the allocator keeps for later
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    memory = pages * os.sysconf("SC_PAGE_SIZE") / 1e6
    return memory, len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))


def draw(share, seed):
    """Images from Python and by the command, edits with maps; measured after a fifth and at the
    end."""
    import minisd
    from minisd.cli.output import output_places

    images, edits = max(10, round(500 * share)), max(5, round(200 * share))
    sd = minisd.load("shapes", device="cpu")
    after_a_fifth = None
    with tempfile.TemporaryDirectory() as folder:
        places = output_places(folder + "/images/", images)
        total = images + edits
        order = random.Random(seed).sample(range(total), total)
        for done, i in enumerate(order):
            if i >= images:
                blend = {"words": ("circle",)} if i % 2 else None
                minisd.edit_prompt(
                    sd, RED, BLUE, steps=2, seed=i, local_blend=blend, progress=False
                )
            elif i % 10 == 0:
                argv = ["txt2img", RED, *MODEL, "--seed", i, "-o", f"{folder}/commands"]
                assert silent_main(*argv) == 0
            else:
                [image] = sd.txt2img(RED, steps=2, seed=i, progress=False)
                places.write(i, image, {"seed": i})
            if done == total // 5:
                after_a_fifth = state()
        at_the_end = state()
        written = len(list(Path(folder).rglob("*.png")))
        left = [path.name for path in Path(folder).rglob("*.part")]
    growth = [end - start for start, end in zip(after_a_fifth, at_the_end)]
    figures = {
        "images": images,
        "edits": edits,
        "files written": written,
        "MB after a fifth": round(after_a_fifth[0], 1),
        "MB grown since": round(growth[0], 1),
        "open files grown": growth[1],
        "threads grown": growth[2],
        "left behind": left,
    }
    fine = written == images and growth[0] < 10 and growth[1:] == [0, 0] and not left
    return figures, fine


# one folder, many who draw


def share_folder(share, seed):
    """Each draws its own seeds into one folder; what is there afterwards is what each draws
    alone."""
    import minisd
    from minisd.cli.output import output_places

    each = max(2, round(20 * share))
    sd = minisd.load("shapes", device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "minisd", "txt2img", RED, *MODEL, "-n", str(each)]
        processes = [
            subprocess.Popen(
                [*command, "--seed", str(seed + 1000 * who), "-o", folder],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            for who in (1, 2)
        ]

        def thread(who):
            places = output_places(folder, each)
            for i in range(each):
                own = seed + 1000 * who + i
                [image] = sd.txt2img(RED, steps=2, seed=own, progress=False)
                places.write(i, image, {"seed": own})

        with ThreadPoolExecutor(8) as threads:
            list(threads.map(thread, range(3, 11)))
        codes = [process.wait() for process in processes]
        found = {}
        for path in Path(folder).iterdir():
            with Image.open(path) as image:
                found[int(image.text["seed"])] = np.asarray(image)
        expected = {seed + 1000 * who + i for who in range(1, 11) for i in range(each)}
        others = 0
        for own in sorted(expected & found.keys()):
            [alone] = sd.txt2img(RED, steps=2, seed=own, progress=False)
            others += bool((np.asarray(alone) != found[own]).any())
    figures = {
        "who draws": "2 processes, 8 threads",
        "images": len(expected),
        "lost": len(expected - found.keys()),
        "other bits than alone": others,
        "exit codes": codes,
    }
    return figures, found.keys() == expected and others == 0 and codes == [0, 0]


# kill -9


def writing_commands(image, saved):
    """name -> argv, of every command that writes; {out} is a folder that is not there yet."""
    drawn = [*MODEL, "-o", "{out}/a.png"]
    several = [*MODEL, "-n", "3", "-o", "{out}/"]
    return {
        "txt2img": ["txt2img", RED, *several],
        "txt2img --trace": ["txt2img", RED, *drawn, "--steps", "8", "--trace", "{out}/trace"],
        "img2img": ["img2img", image, BLUE, *drawn, "--strength", "1"],
        "edit --sheet": ["edit", RED, BLUE, *drawn, "--sheet", "{out}/sheet.png"],
        "edit --image": ["edit", RED, BLUE, *drawn, "--image", saved],
        "heatmap": ["heatmap", RED, *drawn],
        "invert --save": ["invert", image, RED, *drawn, "--save", "{out}/a.safetensors"],
        "blend": ["blend", image, image, BLUE, *drawn],
        "erase": ["erase", RED, "red", *drawn],
        "export": ["export", "--model", "shapes", "--to", "{out}/model"],
        "export, there": ["export", "--model", "shapes", "--to", "{there}"],
    }


def half_files(folder):
    """What is under its name and not complete; folders named .xxxxxxxx.part are not."""
    import minisd
    from minisd.checkpoints.header import read_header

    bad = []
    for path in folder.rglob("*"):
        if any(part.endswith(".part") for part in path.parts) or path.is_dir():
            continue
        try:
            if path.suffix in (".png", ".webp"):
                with Image.open(path) as image:
                    image.load()
            elif path.suffix == ".safetensors":
                read_header(path)
            elif path.suffix == ".json":
                json.loads(path.read_text())
            if path.name == "model_index.json":
                minisd.load(path.parent, device="cpu")
        except (OSError, ValueError, SyntaxError) as error:
            bad.append(f"{path.relative_to(folder)}: {error}")
    model = folder / "model"
    if model.exists() and not (model / "model_index.json").exists():
        bad.append("model: it is there, and not whole")
    return bad


def run_and_kill(argv, seconds):
    """The command in a child that has everything imported, killed after so long -> killed?"""
    child = os.fork()
    if child == 0:
        null = os.open(os.devnull, os.O_RDWR)
        for number in range(3):
            os.dup2(null, number)
        # The bar's own lock is shared with children: one that is killed holding it would stop all.
        tqdm.set_lock(threading.RLock())
        os._exit(silent_main(*argv))
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert os.waitstatus_to_exitcode(status) == 0, argv
            return False
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


def kill(share, seed):
    """Each command once for its time, then killed at moments of it, then once more to the end."""
    import torch

    import minisd

    torch.set_num_threads(1)  # a child of a process with more would wait for them
    rng, moments = random.Random(seed), max(3, round(50 * share))
    figures, wrong = Counter(), []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        image, saved = folder / "in.png", folder / "in.safetensors"
        [drawn] = minisd.load("shapes", device="cpu").txt2img(RED, steps=2, progress=False)
        drawn.save(image)
        argv = ["invert", image, RED, *MODEL, "--save", saved, "-o", folder / "x.png"]
        assert silent_main(*argv) == 0
        out, there = folder / "out", folder / "there"
        for what, command in writing_commands(str(image), str(saved)).items():
            argv = [str(each).format(out=out, there=there) for each in command]

            def clear():
                for each in (out, there):
                    shutil.rmtree(each, ignore_errors=True)
                there.mkdir()

            clear()
            start = time.monotonic()
            assert not run_and_kill(argv, 600), what
            length = time.monotonic() - start
            for _ in range(moments):
                clear()
                was_killed = run_and_kill(argv, rng.uniform(0, length))
                figures["killed" if was_killed else "ended before"] += 1
                bad = half_files(there) + (half_files(out) if out.exists() else [])
                wrong += [f"{what}: {each}" for each in bad]
            for name in ("model", "trace"):  # which have to be new
                shutil.rmtree(out / name, ignore_errors=True)
            for each in there.glob("[!.]*"):
                shutil.rmtree(each) if each.is_dir() else each.unlink()
            assert not run_and_kill(argv, 600), what  # beside what the last one left
            figures["commands"] += 1
    return {**figures, "half files": wrong}, not wrong


# fuzz


def fuzz(share, seed):
    """Every reader in turns; an error that is none of those documented is printed with its seed."""
    import fuzz_readers

    inputs = max(100, round(100_000 * share))
    figures, failures = fuzz_readers.run(inputs, seed)
    return {"inputs": inputs, **figures, "failures": failures}, not failures


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    runs = {"draw": draw, "share": share_folder, "kill": kill, "fuzz": fuzz}
    parser.add_argument("run", choices=runs)
    parser.add_argument("--share", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    start = time.monotonic()
    figures, fine = runs[args.run](args.share, args.seed)
    for name, figure in figures.items():
        print(f"{name}: {figure}")
    print(f"{'fine' if fine else 'WRONG'}, {time.monotonic() - start:.0f} s")
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
