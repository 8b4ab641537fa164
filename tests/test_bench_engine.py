"""The engine's benchmarks compare like with like: what they time gives the same latents. Nothing is timed here."""

import argparse
import importlib
import os
import subprocess
import sys

import pytest
import torch

from bench import editing_speed, gpu, harness, report, scaling, txt2img, unet

TIMES = {"ms": 2000.0, "low": 1900.0, "high": 2100.0, "bytes": 3_400_000_000, "above": 500_000_000}
RECORD = {"device": "cpu", "processor": "a CPU", "threads": 2, "torch": "2.13", "commit": "0" * 40, "command": "x"}


def same(ours, theirs, bar=1e-4):
    assert ours.shape == theirs.shape and ours.isfinite().all() and ours.std() > 0.1
    assert (ours - theirs).abs().max() <= bar * theirs.abs().max()


def test_a_step_is_diffusers_step():
    arguments = ("cpu", torch.float32, 2, True)
    [ours] = unet.ours("a", *arguments).values()
    for channels_last in (False, True):
        [theirs] = unet.theirs("b", *arguments, channels_last=channels_last).values()
        same(ours(), theirs())


def test_an_edited_step_is_the_eager_step():
    arguments = ("cpu", torch.float32, True, None)
    ours = editing_speed.ours("", *arguments, ("plain", "lockstep", "with maps", "record", "replay"))
    [eager] = editing_speed.eager("eager", *arguments).values()
    expected = eager()
    same(ours["lockstep"](), expected)
    same(ours["with maps"](), expected)
    assert (ours["plain"]() - expected).abs().max() > 1e-2 * expected.abs().max()  # the edit shows
    same(ours["record"](), expected[:1])
    assert ours["replay"]().shape == (1, 4, 32, 32)


def test_a_picture_is_diffusers_picture():
    arguments = ("cpu", torch.float32, "ddim", 1, True)
    [ours] = txt2img.ours("a", *arguments).values()
    [theirs] = txt2img.theirs("b", *arguments).values()
    assert ours()[0].size == theirs().images[0].size == (256, 256)


def build(names):
    if "missing" in names:
        raise ImportError("no module of that name")
    return {name: lambda: torch.zeros(3_000_000) for name in names}


def test_contenders_take_turns_in_their_own_processes(capsys):
    out = harness.contest({"one": (build, ["a", "b"]), "other": (build, ["missing"])}, "cpu", rounds=2)
    assert list(out) == ["a", "b"] and "other left out: ImportError: no module of that name" in capsys.readouterr().out
    assert all(t["low"] <= t["ms"] <= t["high"] and t["bytes"] > 50e6 for t in out.values())
    assert all(10e6 < t["above"] < 100e6 for t in out.values())


def test_tables():
    times = {"minisd fp32": TIMES, "diffusers fp32": {**TIMES, "ms": 3000.0}}
    table = unet.table({**RECORD, "rows": [{"batch": 1, "times": times}]})
    assert "a CPU, 2 threads" in table and "| minisd fp32 | 2000 | 1900 - 2100 | 3.40 GB | 1.50 |" in table
    table = txt2img.table({**RECORD, "rows": [{"sampler": "ddim", "steps": 2, "times": times}]})
    assert "| ddim, 2 steps | diffusers fp32 | 3 | 1.9 - 2.1 | 3.40 GB |" in table
    times = {"plain fp32": TIMES, "lockstep fp32": {**TIMES, "ms": 2100.0}, "eager fp32": {**TIMES, "ms": 4200.0}}
    table = editing_speed.table({**RECORD, "rows": [{"size": 384, "times": times}]})
    assert "| lockstep fp32 | 2100 | 1900 - 2100 | 0.50 GB | 1.05 | 2.00 |" in table
    rows = [
        {"what": "step", "size": size, "batch": batch, "along": along, "ms": ms, "bytes": 1000 * ms}
        for size, batch, along, ms in ((256, 1, "both", 10), (512, 1, "size", 80), (256, 4, "batch", 40))
    ]
    table = scaling.table({**RECORD, "rows": rows})
    assert "| step: exponent of pixels | | | 1.50 | 1.50 |" in table and "of batch | | | 1.00 | 1.00 |" in table


def test_every_engine_benchmark_has_its_table():
    assert {"unet", "txt2img", "editing_speed", "startup", "scaling"} <= {table.results for table in report.TABLES}


@pytest.mark.parametrize("name", ["unet", "txt2img", "editing_speed", "scaling", "startup"])
def test_a_quick_run_writes_nothing(name):
    """The flag is there, and the docstring says so."""
    args = harness.options("doc", f"bench.{name}", ["--quick", "--device", "cpu"])
    assert args.quick and args.rounds == 1


@pytest.mark.parametrize("full", [[], ["--full"]])
def test_the_run_on_a_card_starts_everything_with_options_that_are_known(full, monkeypatch, capsys):
    """bench.gpu with the card and the processes mocked: each benchmark reads its own command line."""

    class Read(Exception):
        pass

    commands, read = [], argparse.ArgumentParser.parse_args

    def parse(self, args=None, namespace=None):
        raise Read(read(self, args, namespace))

    def run(command, cwd):
        assert command[:2] == [sys.executable, "-m"] and cwd == harness.ROOT
        commands.append(command[2:])
        return subprocess.CompletedProcess(command, 1 if command[2] == "bench.fused" else 0)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(subprocess, "run", run)
    assert gpu.main(full) == 1  # one of them fails: said in the end, and the others have run
    assert "failed: bench.fused" in capsys.readouterr().out
    assert commands[0][0] == "pytest" and any("test_kernels_gpu" in part for part in commands[0])
    assert {command[0] for command in commands[1:]} == {
        f"bench.{name}" for name in ("attention", "fused", "editing", "unet", "txt2img", "scaling", "startup")
    }
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    for module, *arguments in commands[1:]:
        monkeypatch.setattr(sys, "argv", [f"{module}.py", *arguments])
        with pytest.raises(Read) as caught:
            importlib.import_module(module).main()
        assert caught.value.args[0].device == "cuda"


def test_the_run_on_a_card_needs_no_installation_but_a_card():
    """In a fresh interpreter that knows the checkout's folder alone, for its child processes, too."""
    code = (
        "import subprocess, sys; from bench import harness; harness.use_checkout();"
        "code = 'import minisd, minisd_kernels, minisd_weights, bench';"
        "sys.exit(subprocess.run([sys.executable, '-c', code]).returncode)"
    )
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", code], cwd=harness.ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    env["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, "-m", "bench.gpu"]
    done = subprocess.run(command, cwd=harness.ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and "no CUDA device" in done.stderr


def test_what_a_benchmark_writes_is_no_change(tmp_path, monkeypatch):
    """The commit of a figure is followed by "with changes" where code differs, not where other figures do."""

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
