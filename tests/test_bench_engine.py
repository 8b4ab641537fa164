"""The engine's benchmarks compare like with like: what they time gives the same latents. Nothing is
timed here."""

import contextlib
import re
import subprocess
import sys

import pytest
import torch

from bench import against, editing_speed, harness, report, scaling, txt2img, unet

TIMES = {"ms": 2000.0, "low": 1900.0, "high": 2100.0, "bytes": 3_400_000_000, "above": 500_000_000}
RECORD = {
    "device": "cpu",
    "processor": "a CPU",
    "threads": 2,
    "torch": "2.13",
    "commit": "0" * 40,
    "command": "x",
}


def same(ours, theirs, bar=1e-4):
    assert ours.shape == theirs.shape and ours.isfinite().all() and ours.std() > 0.1
    assert (ours - theirs).abs().max() <= bar * theirs.abs().max()


def test_each_batch_has_its_file(monkeypatch):
    written = {}

    def contest(builders, device, rounds, results):
        results |= dict.fromkeys(builders, torch.ones(1))
        return {name: {"ms": 1.0, "bytes": 1} for name in builders}

    monkeypatch.setattr(harness, "contest", contest)
    monkeypatch.setattr(harness, "finish", lambda name, rows, *rest: written.update({name: rows}))
    monkeypatch.setattr(sys, "argv", ["unet", "--device", "cpu", "--no-compiled"])
    assert unet.main() == 0
    assert list(written) == ["unet", "unet_batch2", "unet_batch8"]
    for batch, rows in zip((1, 2, 8), written.values()):
        assert [row["batch"] for row in rows] == [batch] * 3


def test_a_step_is_diffusers_step():
    arguments = ("cpu", torch.float32, 2, True)
    [ours] = unet.ours("a", *arguments).values()
    for channels_last in (False, True):
        [theirs] = unet.theirs("b", *arguments, channels_last=channels_last).values()
        same(ours(), theirs())


@pytest.mark.parametrize(
    "package, contender", [("openvino", unet.openvino), ("onnxruntime", unet.onnx_runtime)]
)
def test_a_converted_step_is_diffusers_step(package, contender):
    pytest.importorskip(package, reason='needs minisd[bench]: pip install -e ".[bench]"')
    arguments = ("cpu", torch.float32, 1, True)
    [theirs] = unet.theirs("a", *arguments).values()
    [converted] = contender("b", *arguments).values()
    same(converted(), theirs())


def test_an_edited_step_is_the_eager_step():
    arguments = ("cpu", torch.float32, True, None)
    ours = editing_speed.ours(
        "", *arguments, ("plain", "lockstep", "with maps", "record", "replay")
    )
    [eager] = editing_speed.eager("eager", *arguments).values()
    expected = eager()
    same(ours["lockstep"](), expected)
    same(ours["with maps"](), expected)
    assert (ours["plain"]() - expected).abs().max() > 1e-2 * expected.abs().max()  # the edit shows
    same(ours["record"](), expected[:1])
    assert ours["replay"]().shape == (1, 4, 32, 32)


def test_an_image_is_diffusers_image():
    arguments = ("cpu", torch.float32, "ddim", 1, True)
    [ours] = txt2img.ours("a", *arguments).values()
    [theirs] = txt2img.theirs("b", *arguments).values()
    assert ours()[0].size == theirs().images[0].size == (256, 256)


def build(names):
    if "missing" in names:
        raise ImportError("no module of that name")
    return {name: lambda: torch.zeros(3_000_000) for name in names}


@pytest.mark.full
def test_contenders_take_turns_in_their_own_processes(capsys):
    out = harness.contest(
        {"one": (build, ["a", "b"]), "other": (build, ["missing"])}, "cpu", rounds=2
    )
    assert (
        list(out) == ["a", "b"]
        and "other left out: ImportError: no module of that name" in capsys.readouterr().out
    )
    assert all(t["low"] <= t["ms"] <= t["high"] and t["bytes"] > 50e6 for t in out.values())
    assert all(len(t["samples"]) == 2 for t in out.values())
    assert all(10e6 < t["above"] < 100e6 for t in out.values())
    results = {}
    harness.contest({"one": (build, ["a"])}, "cpu", rounds=1, results=results)
    assert list(results) == ["a"] and results["a"].shape == (3_000_000,)


def test_on_a_card_the_first_call_counts_for_the_peak(monkeypatch):
    """The replay of a CUDA graph allocates nothing; its capture did. On a CPU the first call is a
    warm-up alone."""
    memory = {"now": 100, "peak": 0, "calls": 0}

    def call():
        memory["peak"] = 100 if memory["calls"] else 900
        memory["calls"] += 1

    class Pipe:
        def __init__(self):
            self.sent, self.asked = [], ["build", "a", "a", None]

        def send(self, message):
            self.sent.append(message)

        def recv(self):
            return self.asked.pop(0)

    monkeypatch.setattr(harness, "reset_peak", lambda device: memory["now"])
    monkeypatch.setattr(harness, "peak_bytes", lambda device: memory["peak"])
    monkeypatch.setattr(harness, "milliseconds", lambda function, device: function() or 1.0)
    for device, expected in (("cuda", (1.0, 900, 800)), ("cpu", (1.0, 100, 0))):
        memory["calls"], pipe = 0, Pipe()
        harness._work(pipe, device, lambda: {"a": call})
        assert pipe.sent == [["a"], expected, expected]


def test_a_graph_is_repeated_as_often_as_its_replay_is_quick(monkeypatch):
    """A clock in ms on which a call takes 1 from Python and 0.01 in a replay: 2 ms hold 200
    replayed calls."""
    now, captured, replayed = [0.0], [], []

    class Event:
        def __init__(self, enable_timing):
            pass

        def record(self):
            self.at = now[0]

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return end.at - self.at

    class Graph:
        calls = 0

        def replay(self):
            now[0] += 0.01 * self.calls
            replayed.append(self.calls)

    @contextlib.contextmanager
    def capturing(graph):
        captured.append(graph)
        yield
        captured.remove(graph)

    def call():
        if captured:
            captured[-1].calls += 1
        else:
            now[0] += 1

    for name, fake in (("Event", Event), ("CUDAGraph", Graph), ("graph", capturing)):
        monkeypatch.setattr(torch.cuda, name, fake)
    out = harness.interleave({"a": call}, "cuda", rounds=3, graph=True)
    assert out["a"]["ms"] == pytest.approx(0.01) and replayed[-3:] == [200] * 3


def test_tables():
    times = {"minisd fp32": TIMES, "diffusers fp32": {**TIMES, "ms": 3000.0}}
    table = unet.table({**RECORD, "rows": [{"batch": 1, "times": times}]})
    assert (
        "a CPU, 2 threads" in table
        and "| minisd fp32 | 2000 | 1900 - 2100 | 3.40 GB | 0.50 GB | 1.50 |" in table
    )
    wrong = {"minisd fp32": {**TIMES, "error": 3.21e-6}, "OpenVINO fp32": TIMES}
    table = unet.table({**RECORD, "rows": [{"batch": 1, "times": wrong}]})
    assert "| 0.50 GB | 3.2e-06 | 1.00 |" in table and "| 0.50 GB | - | 1.00 |" in table
    times["minisd fp32"] = {**TIMES, "ms": 5.2134, "low": 5.1, "high": 87.654}  # as on a card
    alone = {"batch": 1, "times": {"minisd fp32": times["minisd fp32"]}}
    [head, rule, row] = unet.table({**RECORD, "rows": [alone]}).splitlines()[2:]
    assert row == "| minisd fp32 | 5.213 | 5.1 - 87.65 | 3.40 GB | 0.50 GB |"  # no rival
    assert head.count("|") == rule.count("|") == row.count("|")
    both = {"batch": 1, "times": times}  # what has a rival is shown, where there is some
    rows = {**RECORD, "rows": [alone, both]}
    assert unet.table(rows) == unet.table({**RECORD, "rows": [both]})
    table = txt2img.table({**RECORD, "rows": [{"sampler": "ddim", "steps": 2, "times": times}]})
    assert "| ddim, 2 steps | diffusers fp32 | 3 | 1.9 - 2.1 | 3.40 GB | 0.50 GB |" in table
    card = {"plain": times["minisd fp32"]}
    assert "| plain | 5.213 | 5.1 - 87.65 |" in editing_speed.table(
        {**RECORD, "rows": [{"size": 512, "times": card}]}
    )
    times = {
        "plain fp32": TIMES,
        "lockstep fp32": {**TIMES, "ms": 2100.0},
        "eager fp32": {**TIMES, "ms": 4200.0},
    }
    table = editing_speed.table({**RECORD, "rows": [{"size": 384, "times": times}]})
    assert "| lockstep fp32 | 2100 | 1900 - 2100 | 0.50 GB | 1.05 | 2.00 |" in table
    rows = [
        {"what": "step", "size": size, "batch": batch, "along": along, "ms": ms, "bytes": 1000 * ms}
        | {"flops": batch * size**2 * 10**9}
        for size, batch, along, ms in (
            (256, 1, "both", 10),
            (512, 1, "size", 80),
            (256, 4, "batch", 40),
        )
    ]
    table = scaling.table({**RECORD, "rows": rows})
    assert (
        "| step: exponent of pixels | | | 1.50 | 1.50 | 1.00 |" in table
        and "of batch | | | 1.00 | 1.00 | 1.00 |" in table
    )


def times_of(**ms):
    """Times as of `harness.contest`; a figure may be (ms, bytes)."""
    pairs = {name: t if isinstance(t, tuple) else (t, 1000) for name, t in ms.items()}
    return {name: {"ms": t, "bytes": size, "above": size} for name, (t, size) in pairs.items()}


def test_what_misses_its_target_is_named():
    """Made-up rows: met just so, and missed just so."""
    times = times_of(
        minisd=400, diffusers=812.5, **{"minisd graph": 325, "diffusers compiled": 406.25}
    )
    assert txt2img.misses([{"sampler": "ddim", "steps": 50, "times": times}]) == []
    times["minisd graph"]["ms"] = 326
    assert (
        txt2img.misses([{"sampler": "dpm++", "steps": 25, "times": times}]) == []
    )  # has no target
    assert txt2img.misses([{"sampler": "ddim", "steps": 50, "times": times}]) == [
        "SLOW  minisd graph, ms a step: 6.52, must be <= 6.5",
        "SLOW  diffusers / minisd graph: 2.492, must be >= 2.5",
        "SLOW  diffusers compiled / minisd graph: 1.246, must be >= 1.25",
    ]

    times = times_of(plain=10, lockstep=(11, 100), eager=(44, 800))
    assert editing_speed.misses([{"times": times}]) == []
    times["lockstep"].update(ms=11.5, above=101)
    assert editing_speed.misses([{"times": times}]) == [
        "SLOW  lockstep / plain: 1.15, must be <= 1.1",
        "SLOW  eager / lockstep: 3.826, must be >= 4",
        "SLOW  memory above the weights, eager / lockstep: 7.921, must be >= 8",
    ]
    on_cpu = {
        "plain fp32": 10,
        "lockstep fp32": 11,
        "plain bf16": 6,
        "lockstep bf16": 6.5,
        "eager fp32": 13.75,
    }
    assert editing_speed.misses([{"times": times_of(**on_cpu)}]) == []
    assert editing_speed.misses(
        [{"times": times_of(**on_cpu | {"lockstep fp32": 11.1, "lockstep bf16": 7})}]
    ) == [
        "SLOW  lockstep fp32 / plain fp32: 1.11, must be <= 1.1",
        "SLOW  eager fp32 / lockstep fp32: 1.239, must be >= 1.25",
        "SLOW  lockstep bf16 / plain bf16: 1.167, must be <= 1.1",
        "SLOW  eager fp32 / lockstep bf16: 1.964, must be >= 2",
    ]

    batch_1 = [
        {"minisd fp32": 100, "diffusers fp32": 103},
        {"minisd bf16": 10, "diffusers bf16 channels_last": 10.9, "diffusers fp32": 17},
        {"minisd fp32": (100, 1001), "diffusers fp32 channels_last": 102},
        {"minisd graph": 100, "diffusers": 50},  # on CUDA images have targets
    ]
    rows = [{"batch": 1, "times": times_of(**ms)} for ms in batch_1]
    rows.append(
        {"batch": 2, "times": times_of(**{"minisd fp32": 100, "diffusers fp32": 50})}
    )  # has no target
    assert unet.misses(rows) == [
        "SLOW  diffusers bf16 channels_last / minisd bf16: 1.09, must be >= 1.1",
        "SLOW  diffusers fp32 channels_last / minisd fp32: 1.02, must be >= 1.03",
        "SLOW  memory of minisd fp32 / diffusers fp32 channels_last: 1.001, must be <= 1.0",
    ]


def test_every_engine_benchmark_has_its_table():
    alone = {table.results for table in report.TABLES}
    names = "unet", "txt2img", "editing_speed", "startup", "scaling"
    assert {(name,) for name in names} <= alone


def fake_tree(folder, ms, minisd="minisd"):
    """A checkout whose guided step sleeps; minisd: where its package of that name lies."""
    for name in ("minisd", "bench", "kernels", "weights", minisd):
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "__init__.py").write_text("")
    (folder / "bench" / "unet.py").write_text(
        "import time, minisd\n"
        f"def ours(name, *given): return {{name: lambda: time.sleep({ms / 1e3})}}\n"
    )
    return folder


@pytest.mark.full
def test_a_tree_is_timed_against_another(tmp_path, monkeypatch, capsys):
    """Each in a process of its own, with its own code; a tree that finds another's is refused."""
    other = fake_tree(tmp_path / "other", ms=40)
    monkeypatch.setattr(harness, "ROOT", fake_tree(tmp_path / "this", ms=20))
    arguments = ["--quick", "--device", "cpu", "--dtype", "fp32", "--rounds", "3"]
    assert against.main([str(other), *arguments]) == 0
    printed = capsys.readouterr().out
    ratio = float(printed.split("this / other: time ")[1].split()[0])
    assert 0.4 < ratio < 0.7 and "fp32\nthis   2" in printed and "\nother  4" in printed
    (other / "bench" / "unet.py").write_text("raise ImportError('broken')")
    assert against.main([str(other), *arguments]) == 1
    assert "other left out: ImportError: broken" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        against.main([str(tmp_path), *arguments])
    assert "is no checkout of minisd" in capsys.readouterr().err


def test_the_ratio_is_of_each_round():
    """A slow minute that hits both cancels out."""
    this = {**TIMES, "samples": [10, 100, 10], "bytes": 103}
    other = {**TIMES, "samples": [10, 98, 11], "bytes": 100}
    assert against.compare({"this": this, "other": other})[-1] == (
        "this / other: time 1.000 (0.955 - 1.010), memory 1.030"
    )


@pytest.mark.parametrize("name", ["unet", "txt2img", "editing_speed", "scaling", "startup"])
def test_a_quick_run_writes_nothing(name):
    """The flag is there, and the docstring says so."""
    args = harness.options("doc", f"bench.{name}", ["--quick", "--device", "cpu"])
    assert args.quick and args.rounds == 1


def test_the_ptxas_of_a_card_is_recorded(monkeypatch):
    """That which would make the kernels there, with what somebody has chosen."""
    pytest.importorskip("triton", reason="Triton is installed on Linux alone")
    from minisd_kernels import tiles
    from triton import knobs

    assert harness.provenance("cpu")["ptxas"] is None
    monkeypatch.setattr(tiles, "arch", lambda: 90)
    assert re.fullmatch(r"\d+\.\d+", harness.assembler("cuda"))
    monkeypatch.setattr(tiles, "arch", lambda: 100)
    assert harness.assembler("cuda") == knobs.nvidia.ptxas_blackwell.version


def test_where_there_is_no_git(tmp_path, monkeypatch):
    """Outside of a repository, and on a machine without git: the figures are kept."""
    monkeypatch.setattr(harness, "ROOT", tmp_path)
    assert harness.provenance("cpu")["commit"] == "unknown"
    monkeypatch.setenv("PATH", str(tmp_path))
    record = harness.provenance("cpu")
    assert record["commit"] == "unknown" and record["diffusers"] and record["transformers"]


def test_what_a_benchmark_writes_is_no_change(tmp_path, monkeypatch):
    """The commit of a figure is followed by "with changes" where code differs, not where other
    figures do."""

    def git(*arguments):
        who = ["-c", "user.name=n", "-c", "user.email=e"]
        subprocess.run(["git", *who, *arguments], cwd=tmp_path, check=True, capture_output=True)

    (tmp_path / "code.py").write_text("1")
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    monkeypatch.setattr(harness, "ROOT", tmp_path)
    harness.save("unet", [], "cpu")
    (tmp_path / "README.md").write_text("a table")
    assert " with changes" not in harness.provenance("cpu")["commit"]
    (tmp_path / "code.py").write_text("2")
    assert harness.provenance("cpu")["commit"].endswith(" with changes")
