"""Below pytest's summary: the largest figure of each name that tests gave to `record_property`, and the memory taken."""

import sys


def pytest_terminal_summary(terminalreporter):
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
