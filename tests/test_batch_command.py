"""`minisd batch`: rows to images, equal to what Python draws; what is there is skipped, a bad row
takes no other with it, and workers that are killed -9 are replaced."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import minisd
from minisd.batch import engines, rows, work as work_module
from minisd.batch.work import own_folder, work
from minisd.cli.batch import LoadModel
from minisd.cli.options import ModelRequest

TINY = ["--model", "tiny", "--device", "cpu", "--to", "out"]
MODEL = ModelRequest("tiny", None, None, None, False)
pytestmark = pytest.mark.usefixtures("here")


def write(*given, path="rows.jsonl"):
    lines = [each if isinstance(each, str) else json.dumps(each) for each in given]
    Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def index():
    return [json.loads(line)["id"] for line in Path("out/index.jsonl").read_text().splitlines()]


def names():
    return sorted(path.name for path in Path("out").iterdir())


def equal(path, image):
    with Image.open(path) as drawn:
        return drawn.size == image.size and drawn.tobytes() == image.tobytes()


def test_rows_are_what_python_draws(minisd_command):
    values = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
    Image.fromarray(values).save("in.png")
    write(
        {"prompt": "a cat", "steps": 2, "seed": 3},
        {"prompt": "Zürich, 雪", "steps": 2, "guidance": 1, "width": 40, "height": 24},
        {"method": "img2img", "image": "in.png", "prompt": "a", "strength": 0.7, "steps": 3},
        {
            "method": "edit",
            "source": "a cat",
            "target": "a dog",
            "steps": 2,
            "self_steps": [0, 0.5],
        },
        "",
        {"prompt": "a cat", "seed": 3, "steps": 2},  # the first again
    )
    code, out, err = minisd_command("batch", "rows.jsonl", *TINY)
    assert code == 0, err
    assert out.startswith("4 drawn in ") and out.endswith("0 there already, 0 failed\n")
    sd, how = minisd.load("tiny", device="cpu"), {"progress": False, "steps": 2}
    ids = index()
    assert ids[4] == ids[0] and len(set(ids)) == 4
    assert names() == sorted([*(f"{id}.png" for id in set(ids)), "index.jsonl"])
    assert equal(f"out/{ids[0]}.png", sd.txt2img("a cat", seed=3, **how)[0])
    small = {"width": 40, "height": 24, "guidance": 1}
    assert equal(f"out/{ids[1]}.png", sd.txt2img("Zürich, 雪", **small, **how)[0])
    expected = sd.img2img("in.png", "a", 0.7, steps=3, progress=False)[0]
    assert equal(f"out/{ids[2]}.png", expected)
    edited = minisd.edit_prompt(sd, "a cat", "a dog", self_steps=(0, 0.5), **how)
    assert equal(f"out/{ids[3]}.png", edited[1])
    assert equal(f"out/{ids[3]}.png", minisd.from_recipe(f"out/{ids[3]}.png", progress=False))

    (Path("out") / f"{ids[1]}.png").unlink()
    before = {path.name: path.stat().st_mtime_ns for path in Path("out").glob("*.png")}
    code, out, err = minisd_command("batch", "rows.jsonl", *TINY)
    assert code == 0 and out.startswith("1 drawn in ") and "3 there already" in out
    assert before.items() <= {p.name: p.stat().st_mtime_ns for p in Path("out").glob("*")}.items()


def test_pag_is_an_option_of_a_row(minisd_command):
    write(
        {"prompt": "a cat", "steps": 2, "pag": 3},
        {"method": "edit", "source": "a cat", "target": "a dog", "steps": 2, "pag": 2},
        {"prompt": "a cat", "steps": 2},
        {"prompt": "a cat", "pag": "much"},
    )
    code, out, _ = minisd_command("batch", "rows.jsonl", *TINY, "--batch-size", "2")
    assert code == 2 and out.startswith("3 drawn")
    sd, how = minisd.load("tiny", device="cpu"), {"steps": 2, "progress": False}
    ids = index()
    guided = sd.txt2img("a cat", rule=partial(minisd.pag, pag_scale=3), **how)[0]
    assert equal(f"out/{ids[0]}.png", guided) and not equal(f"out/{ids[2]}.png", guided)
    rule = partial(minisd.pag, pag_scale=2)
    assert equal(f"out/{ids[1]}.png", minisd.edit_prompt(sd, "a cat", "a dog", rule=rule, **how)[1])
    assert equal(f"out/{ids[1]}.png", minisd.from_recipe(f"out/{ids[1]}.png", progress=False))
    error = json.loads(Path(f"out/{ids[3]}.error.json").read_text())["error"]
    assert error == "pag is 'much', expected a finite number"


def test_where_all_is_there_no_model_is_loaded(minisd_command, monkeypatch):
    write({"prompt": "a", "steps": 1}, {"prompt": "b", "steps": 1})
    assert minisd_command("batch", "rows.jsonl", *TINY)[0] == 0
    monkeypatch.setattr(engines.Local, "start", lambda *_: pytest.fail("a worker was started"))
    code, out, _ = minisd_command("batch", "rows.jsonl", *TINY)
    assert code == 0 and out == "0 drawn, 2 there already, 0 failed\n"


def test_a_bad_row_becomes_its_error(minisd_command):
    write(
        '{"prompt": "cut of',
        "[1]",
        {"prompt": "a", "stepz": 2},
        {"prompt": "a", "steps": 0},
        {"prompt": "a", "steps": 2},
        {"method": "img2img", "prompt": "a", "image": "none.png"},
        {"prompt": "a", "steps": 2, "width": 13, "height": 16},  # known when it is drawn
        {"method": "system", "prompt": "a"},
        {"prompt": 5},
        {"prompt": "a", "seed": [1, 2]},
        {"source": "a"},
    )
    code, out, err = minisd_command("batch", "rows.jsonl", *TINY, "--batch-size", "4")
    assert code == 2 and out.startswith("1 drawn in ") and "10 failed" in out
    assert "10 rows failed, each with its ID.error.json; row 1: " in err
    ids = index()
    found = {i: Path(f"out/{id}.error.json") for i, id in enumerate(ids, 1)}
    assert [i for i, path in found.items() if not path.exists()] == [5]
    errors = {i: json.loads(p.read_text()) for i, p in found.items() if p.exists()}
    assert all(error["row"] == i for i, error in errors.items())
    expected = {
        1: "Unterminated string",
        2: "got a list, expected an object",
        3: "got the argument 'stepz', expected prompt, ",
        4: "steps is 0",
        6: "No such file",
        7: "the image is 13 x 16 pixels, expected positive multiples of 4",
        8: "method is 'system', expected one of txt2img, img2img, edit",
        9: "prompt is 5, expected a text",
        10: "seed is a list",
        11: "got the argument 'source'",
    }
    for i, text in expected.items():
        assert text in errors[i]["error"], (i, errors[i])
    assert errors[7]["given"]["width"] == 13
    there = [path.name for path in found.values() if path.exists()]
    assert names() == sorted(["index.jsonl", f"{ids[4]}.png", *there])


def test_no_model_and_no_rows_are_errors(minisd_command):
    write({"prompt": "a"})
    code, _, err = minisd_command("batch", "rows.jsonl", "--model", "none", "--to", "out")
    assert code == 2 and "there is no model 'none'" in err
    code, _, err = minisd_command("batch", "other.jsonl", *TINY)
    assert code == 2 and "other.jsonl" in err
    code, _, err = minisd_command("batch", "rows.jsonl", *TINY, "--engine", "torchrun")
    assert code == 2 and "'RANK' is not set" in err


def jobs_of(*given):
    found = [rows.read_row(i, json.dumps(each), {}) for i, each in enumerate(given, 1)]
    assert all(isinstance(each, rows.Job) for each in found)
    return found


def test_pieces_are_of_equal_shapes_and_of_the_file_alone():
    a, b = {"prompt": "a", "steps": 2}, {"prompt": "a", "steps": 3}
    given = [{**(a if i % 2 else b), "seed": i, "negative_prompt": "x" * i} for i in range(7)]
    found = rows.pieces(jobs_of(*given), 3)
    assert [[job.row for job in piece] for piece in found] == [[1, 3, 5], [2, 4, 6], [7]]
    assert [len(piece) for piece in rows.pieces(jobs_of(*given), 1)] == [1] * 7


def test_what_is_missing_of_a_piece_is_drawn_with_the_others(tmp_path):
    sd, folder = minisd.load("tiny", device="cpu"), tmp_path / "out"
    folder.mkdir()
    texts = ["a cat", "b", "c dog"]
    piece = jobs_of(*({"prompt": p, "seed": 5, "steps": 2, "guidance": 3} for p in texts))
    done = work(sd, piece, folder)
    assert done.drawn == [job.id for job in piece]
    together = sd.txt2img(texts, seed=[5] * 3, steps=2, guidance=3, progress=False)
    for job, image in zip(piece, together):
        assert equal(folder / f"{job.id}.png", image)
    path = folder / f"{piece[1].id}.png"
    path.unlink()
    done = work(sd, piece, folder)
    assert (done.drawn, len(done.there)) == ([piece[1].id], 2)
    assert equal(path, together[1])
    assert equal(path, minisd.from_recipe(path, progress=False))


def test_the_ids_tell_models_images_and_options_apart(tmp_path):
    Image.new("RGB", (8, 8)).save("in.png")
    row = {"method": "img2img", "image": "in.png", "prompt": "a"}
    first = rows.read_row(1, json.dumps(row), {"source": "tiny"})
    other = rows.read_row(9, json.dumps(dict(reversed(row.items()))), {"source": "tiny"})
    assert first.id == other.id
    ids = {first.id, rows.read_row(1, json.dumps(row), {"source": "shapes"}).id}
    ids.add(rows.read_row(1, json.dumps(row | {"seed": 1}), {"source": "tiny"}).id)
    Image.new("RGB", (8, 8), "red").save("in.png")
    ids.add(rows.read_row(1, json.dumps(row), {"source": "tiny"}).id)
    assert len(ids) == 4


# ---- workers that die


def killing(engine, folder, moments, stop, workers):
    """kill -9 of a random worker, be it loading or drawing, at each of the moments: (images that
    are there, seconds after that)."""
    choose = random.Random(0)
    for images, seconds in moments:
        while len(list(folder.glob("*.png"))) < images:
            if stop.wait(0.01):
                return
        stop.wait(seconds)
        if pids := list(workers()):
            os.kill(int(choose.choice(pids)), signal.SIGKILL)
            engine.killed += 1


def processes():
    """{pid: (parent's, command line)} of all that run."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            stat, line = (path / "stat").read_text(), (path / "cmdline").read_bytes()
            found[int(path.name)] = int(stat.rpartition(")")[2].split()[1]), line
    return found


def children():
    """The workers: children of this process that Python's spawn has started."""
    for pid, (parent, line) in processes().items():
        if parent == os.getpid() and b"multiprocessing.spawn" in line:
            yield pid


def actors():
    """Ray's, of the cluster that this process has started: by their titles and their ancestry."""
    found = processes()
    for pid, (parent, line) in found.items():
        while parent in found and parent != os.getpid():
            parent = found[parent][0]
        if parent == os.getpid() and line.startswith(b"ray::MapWorker"):
            yield pid


def kill_test(tmp_path, count, moments, steps, engine_of, workers=children):
    """Two workers of which one is killed at each moment -> (engine, ids drawn)."""
    jobs = jobs_of(*({"prompt": f"a {i}", "seed": i, "steps": steps} for i in range(count)))
    serial, folder = tmp_path / "serial", tmp_path / "out"
    serial.mkdir(), folder.mkdir()
    load, pieces = LoadModel(MODEL, "cpu", None), rows.pieces(jobs, 1)
    sd, threads = load(None), torch.get_num_threads()
    torch.set_num_threads(1)  # as the two workers have: last bits depend on how many there are
    for piece in pieces:
        assert work(sd, piece, serial).drawn
    torch.set_num_threads(threads)
    engine, stop = engine_of(load, folder), threading.Event()
    engine.killed = 0
    killer = threading.Thread(target=killing, args=(engine, folder, moments, stop, workers))
    killer.start()
    try:
        done = list(engine(pieces))
    finally:
        stop.set()
        killer.join()
    drawn = [id for each in done for id in each.drawn]
    there = [id for each in done for id in each.there]
    # Drawn twice only where the worker died between the file and its word: then it is `there`.
    assert sorted(drawn + there) == sorted(job.id for job in jobs)
    assert not any(each.failed for each in done) and len(there) <= engine.killed
    assert sorted(path.name for path in folder.iterdir()) == sorted(f"{j.id}.png" for j in jobs)
    for job in jobs:
        with Image.open(serial / f"{job.id}.png") as image:
            assert equal(folder / f"{job.id}.png", image)
    return engine


def local(load, folder):
    return engines.Local(load, folder, 2, [None])


def random_moments(kills, images):
    choose = random.Random(7)
    counts = sorted(choose.sample(range(images), kills))
    return [(count, choose.uniform(0, 0.5)) for count in counts]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_killed_worker_is_replaced(tmp_path):
    """Reduced: one kill, which is sure to hit a worker that draws."""
    engine = kill_test(tmp_path, 6, [(1, 0.05)], 10, local)
    assert engine.killed == engine.restarts == 1


@pytest.mark.full
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_twenty_kills_at_random_moments(tmp_path, record_property):
    start = time.monotonic()
    engine = kill_test(tmp_path, 60, random_moments(20, 40), 20, local)
    record_property("batch: kills", engine.killed)
    record_property("batch: seconds with kills", time.monotonic() - start)
    assert engine.killed == 20 == engine.restarts


def test_what_others_are_writing_is_left_alone(tmp_path, monkeypatch):
    """A container that shares this machine's name has pids of its own."""
    (tmp_path / ".worker-elsewhere-1").mkdir()
    monkeypatch.setattr(work_module.os, "readlink", lambda path: "pid:[7]")
    own_folder(tmp_path, 2**30).mkdir()  # no process has that
    monkeypatch.undo()
    before = sorted(path.name for path in tmp_path.glob(".worker-*"))
    own_folder(tmp_path, 2**30).mkdir()
    work_module.clean(tmp_path)
    assert sorted(path.name for path in tmp_path.glob(".worker-*")) == before and len(before) == 2


class Ray:
    """Ray's engine with two actors, which write down what they begin to draw."""

    def __init__(self, load, folder):
        self.folder, self.log = folder, folder.parent / "begun"
        log = self.log

        def logged(device):
            sd = load(device)
            draw = sd.txt2img

            def txt2img(**how):
                with open(log, "a") as file:
                    file.write(f"{how['seed']}\n")
                return draw(**how)

            sd.txt2img = txt2img
            return sd

        self.load = logged

    def __call__(self, pieces):
        return engines.ray(self.load, self.folder, pieces, 2)


@pytest.mark.full
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_killed_actors_of_ray_are_replaced(tmp_path, record_property):
    """MINISD_RAY_KILLS: how many, 2 without it; an actor needs seconds to start."""
    pytest.importorskip("ray.data", reason='Ray is an extra: pip install "ray[data]"')
    kills = int(os.environ.get("MINISD_RAY_KILLS", 2))
    start = time.monotonic()
    engine = kill_test(tmp_path, 3 * kills, random_moments(kills, 2 * kills), 20, Ray, actors)
    begun = engine.log.read_text().split()
    record_property("batch, Ray: kills", engine.killed)
    record_property("batch, Ray: seconds with kills", time.monotonic() - start)
    record_property("batch, Ray: begun twice", len(begun) - len(set(begun)))
    assert engine.killed == kills
    assert len(begun) - 3 * kills <= kills  # what was drawn twice, a kill had cut off


def test_a_piece_that_kills_its_workers_fails(tmp_path, monkeypatch):
    """The engine's side, with workers that are threads here: no process has to be started."""
    jobs = jobs_of({"prompt": "a"}, {"prompt": "b"})
    engine = engines.Local(lambda device: None, tmp_path, 1, [None])

    class Dead:
        exitcode = -9

        def join(self):
            pass

        kill = join

    def start(number):
        ours, theirs = engines.mp.Pipe()
        worker = engines.Worker(Dead(), ours, number)

        def run():
            theirs.send("ready")
            [job] = theirs.recv()
            if job.arguments["prompt"] == "b":
                theirs.send(engines.Done([job.id], [], []))
                with suppress(EOFError):  # the engine is done
                    theirs.recv()
            theirs.close()

        threading.Thread(target=run, daemon=True).start()
        return worker

    monkeypatch.setattr(engine, "start", start)
    done = list(engine(rows.pieces(jobs, 1)))
    assert [each.drawn for each in done] == [[], [jobs[1].id]]
    [failure] = done[0].failed
    assert failure.error == "5 workers died over it, the last with exit code -9"
    assert (tmp_path / f"{jobs[0].id}.error.json").exists() and engine.restarts == 5
    own_folder(tmp_path).rmdir()


def test_ranks_of_torchrun_share_the_rows(tmp_path, monkeypatch):
    jobs = jobs_of(*({"prompt": "a", "seed": i, "steps": 1} for i in range(5)))
    sd = minisd.load("tiny", device="cpu")
    drawn = []
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        pieces = rows.pieces(jobs, 1)
        drawn.append([done.drawn for done in engines.torchrun(lambda _: sd, tmp_path, pieces)])
    assert drawn == [[[jobs[i].id] for i in (0, 2, 4)], [[jobs[i].id] for i in (1, 3)]]


@pytest.mark.full
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_torchrun_starts_anew_when_a_rank_is_killed(here):
    given = [{"prompt": f"a {i}", "seed": i, "steps": 20} for i in range(20)]
    write(*given)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--standalone", "--max-restarts", "1", "-m", "minisd", "batch", "rows.jsonl", *TINY]
    env = os.environ | {"OMP_NUM_THREADS": "1"}  # torchrun's own choice
    with open("log", "w") as log:
        told = {"env": env, "stdout": log, "stderr": log}
        run = subprocess.Popen([*command, "--engine", "torchrun"], **told)
        while len(list(Path("out").glob("*.png"))) < 2 and run.poll() is None:
            time.sleep(0.01)
        ranks = [pid for pid, (parent, _) in processes().items() if parent == run.pid]
        os.kill(max(ranks), signal.SIGKILL)
        assert run.wait() == 0, Path("log").read_text()[-2000:]
    told = Path("log").read_text()
    assert "Signal 9" in told or "exitcode: -9" in told or "SIGKILL" in told, told[-2000:]
    assert sorted(names()) == sorted([*(f"{id}.png" for id in index()), "index.jsonl"])
    sd, threads = minisd.load("tiny", device="cpu"), torch.get_num_threads()
    torch.set_num_threads(1)
    for row, id in zip(given, index(), strict=True):
        [image] = sd.txt2img(**row, progress=False)
        assert equal(f"out/{id}.png", image)
    torch.set_num_threads(threads)


@pytest.mark.full
def test_ray_itself(here, minisd_command):
    pytest.importorskip("ray.data", reason='Ray is an extra: pip install "ray[data]"')
    write(*({"prompt": "a", "seed": i, "steps": 1} for i in range(4)))
    code, out, err = minisd_command("batch", "rows.jsonl", *TINY, "--engine", "ray", "--workers", 2)
    assert code == 0, err
    assert out.startswith("4 drawn") and len(set(index())) == 4
