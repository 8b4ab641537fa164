"""The benchmarks of the kernels without a card: who takes part, what a failure costs, what the
check of results sees.

The kernels themselves take part in test_kernels_interpreter.py; here PyTorch stands in for them.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from minisd_kernels import attention, cross_attention, dispatch, reference, tuned

from bench import attention as bench, fused, harness, host, tune

SHAPE = dict(B=4, heads=3, N=10, L=5, D=8)
KEYS = ("B", "heads", "N", "L", "D")


@torch.no_grad()
def test_each_shape_is_compiled_once_and_for_itself(monkeypatch):
    """As FlexAttention and the fused ops are: with symbolic sizes, or not at all, the rival would
    be another."""
    sizes, compile = [], torch.compile

    def backend(graph, inputs):
        sizes.append(inputs[0].shape)
        return graph.forward

    monkeypatch.setattr(
        torch, "compile", lambda function, **how: compile(function, backend=backend, **how)
    )
    shapes = [(2, n) for n in range(3, 15)]
    for shape in shapes:
        double = harness.compiled(fused.geglu)
        x = torch.randn(2, shape[1] * 2)
        for _ in range(3):
            torch.testing.assert_close(double(x), reference.geglu(x))
    assert sizes == [(2, 2 * n) for _, n in shapes] and all(
        type(n) is int for size in sizes for n in size
    )


def test_self_attention_reads_one_tensor():
    """(B, N, 3 * H * D), as minisd.models.attention has it on CUDA: the token stride is that of all
    three."""
    qkv = bench.inputs(2, 3, 7, 7, 8, torch.float16, "cpu")
    assert len({x.untyped_storage().data_ptr() for x in qkv}) == 1
    for i, x in enumerate(qkv):
        assert x.shape == (2, 3, 7, 8) and x.dtype == torch.float16
        assert x.stride() == (7 * 72, 8, 72, 1) and x.storage_offset() == 24 * i
    q, k, v = bench.inputs(2, 3, 7, 5, 8, torch.float16, "cpu")
    assert q.stride() == (7 * 24, 8, 24, 1) and k.stride() == v.stride() == (5 * 24, 8, 24, 1)


def test_several_large_maps_are_not_tried(capsys):
    """SDPA's math holds float32 maps of 22 GB at batch 8 and 9216 queries."""

    def names(B, N):
        q, k, v = (torch.empty(B, 8, N, 40, device="meta") for _ in range(3))
        return list(bench.rivals(q, k, v, None, triton=True))

    assert (
        names(8, 4096) == names(2, 9216) == ["minisd", "eager", "SDPA"]
        and not capsys.readouterr().out
    )
    assert names(8, 9216) == ["minisd", "SDPA"]
    assert "eager left out: it holds several maps, 22 GB each in float32" in capsys.readouterr().out


def quick_samples(monkeypatch):
    """A sample is one call, however short."""
    interleave = harness.interleave
    monkeypatch.setattr(
        harness, "interleave", lambda *args, **more: interleave(*args, **more, seconds=0)
    )


def test_a_contender_that_fails_is_left_out(monkeypatch, capsys):
    def fails():
        raise torch.OutOfMemoryError("too little memory\nand much more text")

    def without_text():
        raise AssertionError

    def second_time():
        calls.append(1)
        if len(calls) > 5:  # three to warm up, the two rounds, and then its memory is asked for
            raise ValueError("not again")

    calls = []
    quick_samples(monkeypatch)
    functions = {
        "minisd": fails,
        "a": lambda: None,
        "b": without_text,
        "c": second_time,
        "d": lambda: None,
    }
    times, memory, errors = bench.measure(functions, "cpu", rounds=2)
    assert list(times) == ["a", "d"] == list(memory) and list(functions) == [
        "minisd",
        "a",
        "b",
        "c",
        "d",
    ]
    assert errors == {
        "minisd": "OutOfMemoryError: too little memory",
        "b": "AssertionError: ",
        "c": "ValueError: not again",
    }
    assert capsys.readouterr().out.count("left out") == 3


def stand_in(monkeypatch, spoil=lambda out, edit: None):
    """Ours computed by PyTorch, the result spoilt."""
    compute = bench.attention

    def attention(q, k, v, edit, impl):
        out = compute(q, k, v, edit, "sdpa" if impl == "triton" else impl)
        if impl == "triton":
            spoil(out, edit)
        return out

    rivals = bench.rivals
    monkeypatch.setattr(bench, "attention", attention)
    monkeypatch.setattr(bench, "rivals", lambda *args, triton: rivals(*args, triton=True))


def run(tmp_path, monkeypatch, *more):
    quick_samples(monkeypatch)
    monkeypatch.setattr(harness, "ROOT", tmp_path)
    monkeypatch.setattr(harness, "matrix_peak", lambda *args: 1e12)
    monkeypatch.setattr(harness, "peak_memory", lambda *args: 0)
    monkeypatch.setattr(bench, "bandwidth", lambda device: 1e11)
    shape = ["--shape", "4,2,7,5,8", "--shape", "4,2,7,7,8"]
    command = [*shape, "--dtype", "float32", "--device", "cpu", "--rounds", "1", *more]
    return bench.main(command)


def saved(tmp_path):
    return json.loads((tmp_path / "bench/results/cpu/attention-shape.json").read_text())["rows"]


def test_ours_failing_is_an_error_in_the_end(tmp_path, monkeypatch, capsys):
    """The others are measured and written all the same."""

    def spoil(out, edit):
        if edit is not None and edit.reweight is not None:
            raise RuntimeError("out of resource")

    stand_in(monkeypatch, spoil)
    assert run(tmp_path, monkeypatch) == 1
    assert (
        "FAILED minisd: RuntimeError: out of resource: B4 H2 N7 L5 D8 float32  reweight"
        in capsys.readouterr().out
    )
    rows = saved(tmp_path)
    assert [row["form"] for row in rows] == [
        "plain",
        *bench.CROSS_EDITS,
        "plain",
        *bench.SELF_EDITS,
    ]
    failed = {row["form"]: row for row in rows if row["failed"]}
    assert list(failed) == ["reweight"] and failed["reweight"]["error_over_budget"] is None
    assert {"eager", "folded SDPA", "minisd plain"} == failed["reweight"]["times"].keys()
    assert "reweight" not in bench.table(
        dict.fromkeys(("device", "torch", "triton", "commit", "command"), "x") | {"rows": rows}
    )


def right(q, k, v, edit):
    return bench.attention(q, k, v, edit, "sdpa")


def wrong(q, k, v, edit):
    return right(q, k, v, edit) + (1e-3 if edit is not None and edit.reweight is not None else 0)


def failing(q, k, v, edit):
    raise RuntimeError("no such kernel")


@pytest.mark.parametrize(
    "name, found", [("right", None), ("wrong", "WRONG"), ("failing", "FAILED")]
)
def test_a_contender_is_held_to_the_budget(tmp_path, monkeypatch, capsys, name, found):
    contender, path = f"{__name__}:{name}", tmp_path / "there.json"
    more = ["--contender", contender, "--only", "re", "--json", str(path)]
    assert run(tmp_path, monkeypatch, *more) == (found is not None)
    printed, rows = capsys.readouterr().out, json.loads(path.read_text())["rows"]
    assert {row["form"] for row in rows} == {form for form in bench.CROSS_EDITS if "re" in form}
    assert {row["contender"]["name"] for row in rows} == {contender}
    assert not (tmp_path / "bench").exists()
    if found is not None:
        assert f"{found} {contender}" in printed
    elif name == "right":
        assert all(row["contender"]["error_over_budget"] <= 1 for row in rows)
        assert all(contender in row["times"] for row in rows)


def test_nothing_to_measure_is_an_error(tmp_path, monkeypatch, capsys):
    assert run(tmp_path, monkeypatch, "--only", "nonsense") == 1
    assert "nothing was measured: no form contains 'nonsense'" in capsys.readouterr().out


@pytest.mark.parametrize(
    "option, value, expected",
    [
        ("--contender", "no_such_module:f", "expected module:function"),
        ("--contender", "bench.attention:no_such_function", "expected module:function"),
        ("--contender", "bench.attention", "expected module:function"),
        ("--shape", "2,8,64", "expected B,H,N,L,D"),
        ("--shape", "2,8,64,64,x", "expected B,H,N,L,D"),
        ("--shape", "2,8,64,0,40", "expected B,H,N,L,D"),
    ],
)
def test_an_option_that_cannot_be_read(option, value, expected, capsys):
    with pytest.raises(SystemExit):
        bench.main([option, value])
    (said,) = capsys.readouterr().err.splitlines()[-1:]
    assert f"argument {option}: {value!r}: " in said and expected in said


def test_what_a_form_needs():
    """FLOPs and bytes of B 4, of which 2 are edited, counted by hand."""
    B, heads, N, L, D, size = 4, 3, 10, 5, 8, 2
    S, one = 2, 2 * heads * N * L * D  # FLOPs of one product of a row
    qkvo, table, maps = 2 * B * heads * (N + L) * D * size, S * L * 4, S * heads * N * L
    want = {
        "plain": (8 * one, qkvo),
        "replace": (8 * one, qkvo),
        "reweight": (8 * one, qkvo + table),
        "refine": (
            (8 + 2 * S) * one + 2 * S * heads * L * L * D,
            qkvo + table + S * L * L * 4,
        ),
        "inject": ((8 - S) * one, qkvo + maps * size),
        "save": (8 * one, qkvo + maps * size),
        "save_mean": (8 * one, qkvo + 2 * S * N * L * 4),
        "refine, save_mean": (
            (8 + S) * one + 2 * S * heads * L * L * N,
            qkvo + table + S * L * L * 4 + 2 * S * N * L * 4,
        ),
    }
    for form, expected in want.items():
        edit = bench.make_edit(form, B, heads, N, L, D, torch.float16, "cpu")
        assert bench.needs(edit, B, heads, N, L, D, size) == expected, form


def test_what_was_measured_before_a_crash_is_kept(tmp_path, monkeypatch):
    stand_in(monkeypatch)
    before = bench.inputs

    def inputs(B, heads, N, L, D, *more):
        if L == 7:
            raise RuntimeError("the device is gone")
        return before(B, heads, N, L, D, *more)

    monkeypatch.setattr(bench, "inputs", inputs)
    with pytest.raises(RuntimeError, match="the device is gone"):
        run(tmp_path, monkeypatch)
    rows = saved(tmp_path)
    assert len(rows) == 1 + len(bench.CROSS_EDITS) and all(
        row["error_over_budget"] <= 1 for row in rows
    )


@torch.no_grad()
@pytest.mark.parametrize("form", ["plain", *bench.CROSS_EDITS, *bench.SELF_EDITS])
@pytest.mark.parametrize("slices", [1, 4])
def test_the_check_sees_every_head_query_and_saved_map(form, slices, monkeypatch):
    shape = SHAPE | {"L": SHAPE["N"]} if form in bench.SELF_EDITS else SHAPE
    B, heads, N, L, D = (shape[name] for name in KEYS)
    monkeypatch.setattr(bench, "MAPS_AT_ONCE", B * heads * L * -(-N // slices))
    q, k, v = bench.inputs(B, heads, N, L, D, torch.float32, "cpu")
    edit = bench.make_edit(form, B, heads, N, L, D, torch.float32, "cpu")
    wrong = {"nothing": None}
    for head in range(heads):  # a part each of the output
        wrong[f"out {head}"] = lambda out, edit, head=head: out[-1, head, 3 * head].add_(1e-3)
    wrong["unwritten"] = lambda out, edit: out[0, 0, -1, -1].fill_(float("nan"))
    if "save" in form:
        name = "save_mean" if "save_mean" in form else "save"
        wrong["map"] = lambda out, edit: getattr(edit, name)[0, -1].mul_(1.01)
        wrong["unwritten map"] = lambda out, edit: getattr(edit, name)[-1, 0].fill_(float("nan"))
    for what, spoil in wrong.items():
        with monkeypatch.context() as patch:
            stand_in(patch, spoil or (lambda out, edit: None))
            ratio = bench.error_ratio(q, k, v, edit)
        assert (ratio <= 1) == (what == "nothing"), (what, ratio)
        row = dict(
            B=B,
            H=heads,
            N=N,
            L=L,
            D=D,
            dtype="float32",
            form=form,
            failed={},
            error_over_budget=ratio,
        )
        row["times"] = {"minisd": {"ms": 1.0}, "eager": {"ms": 9.0}}
        assert [text[:5] for text in bench.misses([row])] == ["WRONG"] * (what != "nothing")


def test_a_fused_op_that_is_not_a_number_is_wrong():
    row = dict(
        op="geglu", B=2, C=8, side=4, dtype="float16", error_over_budget=float("nan"), times={}
    )
    row["times"] = {"minisd": {"ms": 1.0}, "torch": {"ms": 2.0}}
    assert [text[:5] for text in fused.misses([row])] == ["WRONG"]


@pytest.mark.full
def test_host_time_counts_launches(tmp_path):
    """In a process of its own, because Triton's driver is replaced; times depend on the machine."""
    code = "import json; from bench import host; found = host.measure(rounds=1, n=3); "
    code += "print(json.dumps([found, host.measure_steps(rounds=1)]))"
    env = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found, steps = json.loads(done.stdout)
    launches = {name: x["launches"] for name, x in found.items()}
    assert launches == dict.fromkeys(found, 1) | {"save_mean": 2}
    assert len(found) == 8 and all(0 < x["us"] < 10_000 for x in found.values())
    ours, theirs = steps["minisd"], steps["diffusers"]
    # GroupNorm, 16 of them 3 each; LayerNorm, GEGLU and two attentions in each transformer
    launches = (2 * 22 + 16 + 1) + 2 * 16 + 16 * (3 + 1 + 2)
    assert ours["launches"] == launches and theirs["launches"] == 0
    assert 3_000 < ours["calls"] < 12_200 and theirs["calls"] > 3_000  # about 12,000


@pytest.mark.parametrize("us, status", [(14.9, 0), (15.1, 1)])
def test_a_call_that_takes_too_long_on_the_host_is_an_error(us, status, monkeypatch, capsys):
    """However many launches it makes."""
    found = {"cross": {"us": 1.0, "launches": 1}, "save_mean": {"us": us, "launches": 2}}
    monkeypatch.setattr(host, "measure", lambda: found)
    monkeypatch.setattr(host, "measure_steps", lambda: {})
    assert host.main([]) == status
    assert ("SLOW save_mean: more than 15 us" in capsys.readouterr().out) == bool(status)


@pytest.mark.full
def test_listings_are_kept(tmp_path):
    """bench.kernel_resources --dump keeps PTX and SASS of each kernel; no kernel is an error."""
    env = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}

    def look(only):
        command = [sys.executable, "-m", "bench.kernel_resources", "--arch", "90", "--only", only]
        command += ["--dump", "ptx,sass", str(tmp_path)]
        root = Path(__file__).parents[1]
        return subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)

    done = look("layer_norm")
    assert done.returncode == 0, done.stderr
    names = sorted(path.name for path in tmp_path.iterdir())
    kernels = {name.rsplit(".", 1)[0] for name in names}
    assert kernels and names == sorted(f"{k}.{kind}" for k in kernels for kind in ("ptx", "sass"))
    for path in tmp_path.iterdir():
        assert ("EXIT" if path.suffix == ".sass" else ".visible .entry") in path.read_text()
    done = look("no such form")
    assert done.returncode == 1 and "no form contains 'no such form'" in done.stdout + done.stderr


FIELDS = ("source_row", "inject", "token_map", "blend", "reweight", "save", "save_mean")


def test_a_tile_is_that_of_card_op_head_dim_and_size_of_numbers(monkeypatch):
    tile = {"BLOCK_N": 32}
    monkeypatch.setattr(tuned, "table", lambda: {"A card": {"attention 40 2": tile}})
    monkeypatch.setattr(tuned, "card", lambda device: device)

    def look_up(op="attention", D=40, itemsize=2, device="A card", is_cuda=True):
        shape, element_size = (2, 8, 64, D), lambda: itemsize
        return tuned.tile(
            op,
            SimpleNamespace(is_cuda=is_cuda, device=device, shape=shape, element_size=element_size),
        )

    assert look_up() == tile
    for other in (
        {"op": "cross_attention"},
        {"D": 80},
        {"itemsize": 4},
        {"device": "B"},
        {"is_cuda": False},
    ):
        assert look_up(**other) == {}


def test_every_launch_asks_for_its_tile(monkeypatch):
    """What is found replaces that much of the rule's choice, and the grid follows."""
    launched, asked = [], []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **choice: launched.append((grid[0], choice))

    for module, name in (
        (attention, "attention_kernel"),
        (cross_attention, "cross_attention_kernel"),
        (cross_attention, "mean_kernel"),
    ):
        monkeypatch.setattr(module, name, Kernel())
        monkeypatch.setattr(module, "arch", lambda: 90)

    def launch_all():
        q, k, v = (
            torch.empty(2, 2, n, 40, dtype=torch.float16, device="meta") for n in (64, 77, 77)
        )
        save, mean = torch.empty(1, 2, 64, 77, device="meta"), torch.empty(1, 64, 77, device="meta")
        for name, args in (
            ("attention", [*[None] * 5, False]),
            ("cross_attention", [None] * 7),
            ("cross_attention_save", [*[None] * 6, save, None, None]),
            ("cross_attention_save", [*[None] * 7, mean, None]),
        ):
            tensors = (q, k, v, *args)[: dispatch.TENSORS[name]]
            dispatch.prepare(name, (q, k, v, *args), q)(*tensors, q)
        return launched[-5:-1]  # the last is the mean's

    by_rule = launch_all()
    tile = {"BLOCK_N": 32, "num_warps": 2, "num_stages": 5}
    monkeypatch.setattr(tuned, "tile", lambda op, q: asked.append(op) or tile)
    assert launch_all() == [(2 * 2 * 2, choice | tile) for _, choice in by_rule]
    assert [grid for grid, _ in by_rule] == [1 * 2 * 2] * 4
    assert list(dict.fromkeys(asked)) == list(tune.TILES) == list(tune.FORMS)


def test_only_what_beats_the_rule_by_more_than_the_spread_is_kept(tmp_path, monkeypatch, capsys):
    """bench.tune with a made-up clock: by what the launch would look up, one tile is quicker at one
    head dim, one is quicker within the spread, one computes something else, one does not run."""
    good, within, wrong, fails = tune.TILES["attention"][:4]
    card = {}
    monkeypatch.setattr(tuned, "table", lambda: {"cpu": card})

    def launch(q, k, v, edit, impl):
        """Stands in for attention: what it would be launched with."""
        [(key, tile)] = card.items()
        if tile == fails:
            raise RuntimeError("out of resource: shared memory")
        op, D, itemsize = key.rsplit(" ", 2)
        assert (int(D), int(itemsize)) == (q.shape[3], 2)
        return op, int(D), tile

    def interleave(functions, device, rounds, graph):
        return {name: clock(*function()) for name, function in functions.items()}

    def clock(op, D, tile):
        if (op, D, tile) == ("attention", 40, good):
            ms, spread = 0.8, 0.01
        elif op == "attention" and tile == within:
            ms, spread = 0.9, 0.1
        else:
            ms, spread = 0.5 if op == "attention" and tile == wrong else 1, 0.01
        return {"ms": ms, "low": ms - spread, "high": ms + spread}

    monkeypatch.setattr(tune, "attention", launch)
    monkeypatch.setattr(
        tune, "error_ratio", lambda *args: 9 if launch(*args, "triton")[2] == wrong else 1
    )
    monkeypatch.setattr(
        tune, "inputs", lambda B, H, N, L, D, dtype, device: torch.empty(3, 1, 1, 1, D, dtype=dtype)
    )
    monkeypatch.setattr(tune, "make_edit", lambda *args: None)
    monkeypatch.setattr(harness, "interleave", interleave)
    monkeypatch.setattr(harness, "peak_memory", lambda *args: 0)
    monkeypatch.setattr(harness, "ROOT", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(harness, "device_name", lambda device: "cpu")
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels/tuned.json").write_text('{"Another": {}, "cpu": {"old": {}}}')
    assert tune.main([]) == 0
    found = json.loads((tmp_path / "kernels/tuned.json").read_text())
    assert found == {"Another": {}, "cpu": {"attention 40 2": good}}
    assert not card and "out of resource" in capsys.readouterr().out


def test_nothing_is_tuned_without_a_card(capsys):
    assert tune.main(["--device", "cpu"]) == 2 and "no CUDA device" in capsys.readouterr().err
    assert tuned.table() == json.loads((harness.ROOT / "kernels/tuned.json").read_text())


def test_tiles_are_tried_where_the_models_launch_them():
    """Self-attention over 64 tokens is one tile of keys, so cross_attention's."""
    assert tune.cases("attention", 160) == [
        (B, N, N, form)
        for B in (2, 8)
        for N in (256, 576, 144)
        for form in ("plain", "self-injection")
    ]
    assert tune.cases("cross_attention, save", 160) == [
        (B, N, 77, form)
        for B in (2, 8)
        for N in (256, 64)
        for form in ("save", "save_mean", "refine, save_mean")
    ]
