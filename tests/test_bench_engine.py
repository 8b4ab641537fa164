"""The engine's benchmarks compare like with like: what they time gives the same latents. Nothing is timed here."""

import pytest
import torch

from bench import editing_speed, harness, report, scaling, txt2img, unet

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
