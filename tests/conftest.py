"""What several tests of the command and the Hub need; which files come first; and, below pytest's
summary, the measured figures."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

# Files that keep a process for minutes. With several processes (`pytest -n 2 --dist loadfile`) they
# are begun first, so that no process waits for another at the end.
LONG = "test_kernels_compiled", "test_kernels_interpreter", "test_docs", "test_null_text"

if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):  # torch's threads, before its import
    threads = max(1, (os.cpu_count() or 1) // int(workers))
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))


def pytest_addoption(parser):
    parser.addoption("--model", help="of `-m weights`: the real v1.4 weights, as for minisd.load")


def pytest_configure(config):
    config.option.loadscopereorder = False  # pytest-xdist would sort by the number of tests


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


@pytest.fixture
def record_property(record_property):
    """pytest's, for numbers: NumPy's and torch's do not pass from a process to another."""
    return lambda name, value: record_property(name, float(value))


@pytest.fixture(scope="session")
def original(tmp_path_factory):
    """The folder of a tiny random model in diffusers layout."""
    import tiny

    folder = tmp_path_factory.mktemp("original") / "tiny"
    tiny.save(folder)
    return folder


@pytest.fixture
def here(original, tmp_path, monkeypatch):
    """An empty working folder with the model tiny/ in it."""
    (tmp_path / "tiny").symlink_to(original)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def minisd_command(capsys):
    """Run the command in this process -> exit code, stdout, stderr."""
    from minisd.cli import main as cli

    def run(*argv):
        try:
            code = cli.main([str(each) for each in argv])
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def draw_again(minisd_command):
    """Run the command that `minisd info` prints of an image -> the files that it writes."""

    def run(path):
        code, told, err = minisd_command("info", path)
        assert code == 0, err
        _, line = told.split("\n\nminisd ")
        # As a shell reads it: the line may hold bash's escapes.
        words = ["bash", "-c", f"printf '%s\\0' {line.rstrip()}"]
        words = subprocess.run(words, capture_output=True, check=True).stdout.split(b"\0")[:-1]
        code, out, err = minisd_command(*map(os.fsdecode, words))
        assert code == 0, f"{line}\n{err}"
        return out.splitlines()

    return run


@pytest.fixture
def repo(tmp_path):
    """A copy of the bundled model that a test may change, with what published repos hold beside."""
    from minisd.checkpoints.sources import bundled

    folder = Path(shutil.copytree(bundled()["shapes"], tmp_path / "repo"))
    unet = "unet/diffusion_pytorch_model"
    for name in (f"{unet}.non_ema.safetensors", f"{unet}.bin", "v1.ckpt"):
        (folder / name).write_bytes(b"not needed")
    (folder / "safety_checker").mkdir()
    (folder / "safety_checker" / "model.safetensors").write_bytes(b"not needed")
    return folder


@pytest.fixture
def hub(repo, tmp_path, monkeypatch):
    """A Hub with the repo owner/shapes; huggingface_hub asks it, and keeps its cache in
    tmp_path."""
    import huggingface_hub.constants
    from hub_server import Hub

    with Hub({"owner/shapes": repo}) as hub:
        constants = huggingface_hub.constants
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr(
            time, "sleep", lambda seconds: None
        )  # huggingface_hub waits between its attempts
        yield hub


def pytest_terminal_summary(terminalreporter):
    """The largest figure of each name that tests gave to `record_property`, and the memory
    taken."""
    worst = {}
    for reports in terminalreporter.stats.values():
        for report in reports:
            for name, value in getattr(report, "user_properties", ()):
                worst[name] = max(value, worst.get(name, value))
    if worst:
        terminalreporter.section("measured")
    for name in sorted(worst):
        terminalreporter.write_line(f"{name}: {worst[name]:.2g}")
    if sys.platform == "linux":  # elsewhere the unit is another, or there is none
        from resource import RUSAGE_CHILDREN, RUSAGE_SELF, getrusage

        own, child = (getrusage(who).ru_maxrss / 2**20 for who in (RUSAGE_SELF, RUSAGE_CHILDREN))
        terminalreporter.write_line(
            f"peak memory: {own:.1f} GiB, and {child:.1f} GiB in the largest child process"
        )
