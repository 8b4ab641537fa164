"""What several tests of the command need; and, below pytest's summary, the measured figures."""

import sys

import pytest


def pytest_addoption(parser):
    parser.addoption("--model", help="of `-m weights`: the real v1.4 weights, as for minisd.load")


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
    from minisd import cli

    def run(*argv):
        try:
            code = cli.main([str(each) for each in argv])
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return run


def pytest_terminal_summary(terminalreporter):
    """The largest figure of each name that tests gave to `record_property`, and the memory taken."""
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
        terminalreporter.write_line(f"peak memory: {own:.1f} GiB, and {child:.1f} GiB in the largest child process")
