"""What a card has to run (bench.gpu), without one: which commands, in which order, until when."""

import argparse
import importlib
import math
import os
import subprocess
import sys
import time

import pytest
import torch

from bench import gpu, harness
from bench.kernel_resources import nvidia


@pytest.mark.parametrize("full", [[], ["--full"]])
def test_the_run_on_a_card_starts_everything_with_options_that_are_known(full, monkeypatch, capsys):
    """bench.gpu with the card and the processes mocked: each benchmark reads its own command
    line."""

    class Read(Exception):
        pass

    commands, read, tests = [], argparse.ArgumentParser.parse_args, []

    def parse(self, args=None, namespace=None):
        raise Read(read(self, args, namespace))

    def start(command, cwd):
        assert command[:2] == [sys.executable, "-m"] and cwd == harness.ROOT
        commands.append(command[2:])
        return subprocess.CompletedProcess(command, 1 if command[2] == "bench.fused" else 0)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(subprocess, "Popen", start)
    monkeypatch.setattr(
        gpu, "finish", lambda process, deadline: gpu.FAILED if process.returncode else gpu.PASSED
    )
    monkeypatch.setattr(gpu, "collect", lambda folder, deadline, files: [files])
    monkeypatch.setattr(
        gpu, "run_tests", lambda found, *_, **env: tests.extend(found) or {gpu.FAILED, gpu.LATE}
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert gpu.main(["unet", "editing"]) == 0 and not tests
    in_order = ["bench.editing", "bench.unet"]  # that of the parts
    assert [command[0] for command in commands] == in_order
    assert "unet: passed, 0 s" in capsys.readouterr().out
    commands.clear()
    with pytest.raises(SystemExit):
        gpu.main(["unet", "vae"])
    assert not commands and "no such part: vae" in capsys.readouterr().err
    assert gpu.main(["unet", "scaling", "--minutes", "0"]) == 1 and not commands
    assert "not done in time: unet, scaling" in capsys.readouterr().out
    assert gpu.main(full) == 1  # two of them fail: said in the end, and the others have run
    said = "failed: tests, fused, bundled\nnot done in time: tests, bundled\n"
    assert capsys.readouterr().out.endswith(said)
    assert tests == ["test_*.py", "test_kernels*.py"]
    assert {command[0] for command in commands} == {
        f"bench.{name}"
        for name in ("attention", "fused", "editing", "unet", "txt2img", "scaling", "startup")
    }
    assert all(
        ("--compiled" in command) == bool(full)
        for command in commands
        if "compiled" in str(command)
    )
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    for module, *arguments in commands:
        monkeypatch.setattr(sys, "argv", [f"{module}.py", *arguments])
        with pytest.raises(Read) as caught:
            importlib.import_module(module).main()
        assert caught.value.args[0].device == "cuda"


@pytest.mark.parametrize("full", [[], ["--full"]])
def test_the_tests_on_a_card_run_with_the_bundled_ptxas_too(full, monkeypatch, capsys):
    """The kernels' alone, and on sm_90, where another one may have been chosen."""
    ran = []

    def run_tests(found, deadline, env=None):
        ran.append((*found, deadline == math.inf, (env or {}).get("TRITON_PTXAS_PATH")))
        return {gpu.PASSED}

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "collect", lambda folder, deadline, files: [folder / files])
    monkeypatch.setattr(gpu, "run_tests", run_tests)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert gpu.main(["bundled"]) == 0 and not ran
    assert "bundled skipped: only on sm_90 " in capsys.readouterr().out
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert gpu.main(["bundled", "tests", *full]) == 0
    folder, bundled = harness.ROOT / "tests", str(nvidia("ptxas"))
    assert ran == [
        (folder / "test_*.py", bool(full), None),
        (folder / "test_kernels*.py", bool(full), bundled),
    ]


def test_the_run_on_a_card_needs_no_installation_but_a_card():
    """In a fresh interpreter that knows the checkout's folder alone, for its child processes,
    too."""
    code = (
        "import subprocess, sys, bench;"
        "code = 'import minisd, minisd_kernels, minisd_weights, bench';"
        "sys.exit(subprocess.run([sys.executable, '-c', code]).returncode)"
    )
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=harness.ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    done = subprocess.run(
        [sys.executable, "-m", "bench.scaling", "--help"], cwd=harness.ROOT, env=env
    )
    assert done.returncode == 0  # it imports minisd
    env["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, "-m", "bench.gpu"]
    done = subprocess.run(command, cwd=harness.ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and "no CUDA device" in done.stderr


@pytest.mark.full
def test_gpu_tests_that_cannot_be_imported_are_skipped(tmp_path):
    """With diffusers out of reach, pytest really collecting: also where a module of the tests' own
    imports it."""
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['diffusers'] = None")
    (tmp_path / "own.py").write_text("import diffusers")
    mark = f"import pytest\n@{gpu.MARK}\ndef test_it():\n    pass\n"
    (tmp_path / "test_needs.py").write_text(f"import own\n{mark}")
    (tmp_path / "test_broken.py").write_text(f"import no_such_module\n{mark}")
    (tmp_path / "test_other.py").write_text("import diffusers")
    code = (
        "from math import inf; from pathlib import Path; from bench import gpu;"
        f"print(*gpu.collect(Path({str(tmp_path)!r}), inf, 'test_*.py'), sep='\\n');"
        "print(*gpu.collect(gpu.harness.ROOT / 'tests', inf, 'test_*.py'), sep='\\n')"
    )
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=harness.ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found, skipped = [], []
    for line in done.stdout.splitlines():
        (skipped if line.endswith("skipped: diffusers is not installed") else found).append(line)
    assert skipped[0].startswith("test_needs.py") and found[0] == str(tmp_path / "test_broken.py")
    assert (
        len(
            [
                line
                for line in found
                if line.startswith("tests/test_kernels_gpu.py::test_cross_attention[")
            ]
        )
        > 20
    )
    marked = {
        file.name
        for file in (harness.ROOT / "tests").glob("test_*.py")
        if gpu.MARK in file.read_text()
    }
    here = {line.split("::")[0].removeprefix("tests/") for line in found[1:]}
    assert here | {line.split()[0] for line in skipped[1:]} == marked


def test_the_gpu_tests_run_in_shares(tmp_path, capsys):
    (tmp_path / "test_a.py").write_text(
        f"import pytest\n@{gpu.MARK}\n@pytest.mark.parametrize('n', range(3))\n"
        "def test_it(n): assert n < 2"
    )
    tests = [f"{tmp_path / 'test_a.py'}::test_it[{n}]" for n in range(3)]
    assert gpu.run_tests(tests[:2], time.monotonic() + 600) == {gpu.PASSED}
    assert gpu.run_tests(tests, math.inf, processes=2) == {gpu.PASSED, gpu.FAILED}
    assert "1 failed, 1 passed" in capsys.readouterr().out


@pytest.mark.parametrize("deaf", [False, True])
def test_what_is_not_done_at_the_deadline_is_interrupted(deaf, capsys):
    """As Ctrl-C would, so that it can tidy up; what does not hear that is ended all the same."""
    handler = "SIG_IGN" if deaf else "default_int_handler"
    code = f"import signal, time\nsignal.signal(signal.SIGINT, signal.{handler})\n"
    code += "try: print('started', flush=True); time.sleep(60)\nfinally: print('tidy')"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdout.readline() == b"started\n"
    assert gpu.finish(process, time.monotonic(), patience=0.5 if deaf else 10) == gpu.LATE
    assert capsys.readouterr().out.split() == ([] if deaf else ["tidy"])


@pytest.mark.full
@pytest.mark.parametrize("slow", [True, False])
def test_the_part_in_which_the_time_ends(slow, tmp_path, monkeypatch, capsys):
    """It is interrupted, whatever it makes of that; if it failed first, that is what it is listed
    for. The next part is not started. With real processes, and a clock that is past the deadline
    when the second of them works or is dead."""
    working, clock, popen = tmp_path / "working", [0.0], subprocess.Popen
    waits = f"import pathlib, time\ntry: pathlib.Path({str(working)!r}).touch(); time.sleep(60)\n"
    (tmp_path / "good.py").write_text("")
    (tmp_path / "last.py").write_text(
        waits + "except KeyboardInterrupt: pass" if slow else "raise SystemExit(1)"
    )

    def start(command, cwd):
        process = popen(command, cwd=cwd)
        while "last" in command and process.poll() is None and not working.exists():
            time.sleep(0.01)
        clock[0] = 600.0 * ("last" in command)
        return process

    parts = {"unet": ["good"], "txt2img": ["last"], "startup": ["good"]}
    monkeypatch.setattr(gpu, "commands", lambda full: parts)
    monkeypatch.setattr(harness, "ROOT", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(subprocess, "Popen", start)
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    assert gpu.main(list(parts)) == 1
    said = (
        "not done in time: txt2img, startup\n"
        if slow
        else "failed: txt2img\nnot done in time: startup\n"
    )
    assert capsys.readouterr().out.endswith("\nunet 0 s, txt2img 600 s = 600 s\n" + said)


def test_collecting_ends_at_the_deadline(tmp_path, monkeypatch, capsys):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_slow.py").write_text(f"import time\ntime.sleep(60)\n# {gpu.MARK}")
    clock = iter([0.0, 0.0])  # main's two looks at it; then it is late
    monkeypatch.setattr(harness, "ROOT", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(time, "monotonic", lambda: next(clock, 600.0))
    monkeypatch.setattr(
        gpu, "run_tests", lambda tests, deadline: pytest.fail("they were collected")
    )
    assert gpu.main(["tests"]) == 1
    assert capsys.readouterr().out.endswith("not done in time: tests\n")
