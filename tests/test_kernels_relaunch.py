"""The second launch of a kernel, which goes past Triton's: the same kernel, the same arguments.

A driver that writes down what it is asked to launch stands in for a card. The kernels are compiled
for sm_90 and not run.
"""

import os

import pytest
import torch
from minisd_kernels import dispatch, fused, ops

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="compiles")
B, H, S, L = 2, 2, 2, 77


class Recorder:
    """Stands in for Triton's CUDA driver."""

    class utils:
        load_binary = staticmethod(lambda name, *args: (name, f"function {name}", 32, 0, 1024))
        get_device_properties = staticmethod(
            lambda device: {"max_shared_mem": 227 * 1024, "multiprocessor_count": 132}
        )

    launched = []  # the arguments of each launch: grid, stream, function, hooks, the kernel's own

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def launcher_cls(self, source, metadata):
        return lambda *args: self.launched.append(args)


RECORDER = Recorder()  # one for all tests: Triton keeps compiled kernels with the driver's launcher


@pytest.fixture
def recorder(monkeypatch):
    from triton.runtime.driver import driver

    dispatch.KNOWN.clear()
    monkeypatch.setattr(dispatch, "refuse_cpu", lambda q: None)
    monkeypatch.setattr(driver, "_active", RECORDER, raising=False)
    RECORDER.launched.clear()
    yield RECORDER
    dispatch.KNOWN.clear()


def heads(n, d):
    return torch.zeros(B, n, H, d, dtype=torch.float16).transpose(1, 2)


def image(side):
    x = torch.zeros(B, 64, side, side, dtype=torch.float16)
    return x.to(memory_format=torch.channels_last)


def tokens(width):
    return torch.zeros(B, 5, width, dtype=torch.float16)


def parameters():
    return torch.zeros(64, dtype=torch.float16), torch.zeros(64, dtype=torch.float16)


ROW = torch.zeros(S, dtype=torch.int64)
SHIFT = torch.zeros(1, 192, dtype=torch.float16)[:, 64:128]  # one resnet's part of a table
TABLES = {
    "token_map": torch.zeros(S, L, L),
    "blend": torch.zeros(S, L),
    "reweight": torch.zeros(S, H, L),
}
CALLS = {
    "attention": (1, lambda: ops.attention(*[heads(130, 40)] * 3)),
    "attention, all fields": (
        1,
        lambda: ops.attention(
            *[heads(130, 40)] * 3,
            ROW,
            bias=torch.zeros(S, 1, 1, 260),
            kv_row=ROW[:, None].expand(-1, 2),
            own_value=torch.ones(S),
            scale=1.0,
        ),
    ),
    "cross_attention": (1, lambda: ops.cross_attention(heads(64, 80), *[heads(L, 80)] * 2)),
    "refine": (
        1,
        lambda: ops.cross_attention(heads(64, 80), *[heads(L, 80)] * 2, source_row=ROW, **TABLES),
    ),
    "save": (
        2,
        lambda: ops.cross_attention(
            heads(64, 80),
            *[heads(L, 80)] * 2,
            save=torch.zeros(S, H, 64, L, dtype=torch.float16),
            save_mean=torch.zeros(S, 64, L),
        ),
    ),
    "backward": (
        3,
        lambda: torch.ops.minisd_kernels.attention_backward(
            *[heads(64, 40)] * 2, *[heads(L, 40)] * 2, None, ROW, None, None, None, False
        ),
    ),
    "group_norm": (1, lambda: fused.group_norm(image(8), 8, *parameters())),
    "group_norm, shift": (1, lambda: fused.group_norm(image(8), 8, *parameters(), 1e-5, SHIFT)),
    "group_norm_silu": (3, lambda: fused.group_norm_silu(image(64), 8, *parameters())),
    "group_norm_silu, shift": (
        3,
        lambda: fused.group_norm_silu(image(64), 8, *parameters(), 1e-5, SHIFT),
    ),
    "layer_norm": (1, lambda: fused.layer_norm(tokens(64), *parameters())),
    "add_layer_norm": (1, lambda: fused.add_layer_norm(*[tokens(64)] * 2, *parameters())),
    "geglu": (1, lambda: fused.geglu(tokens(128))),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_second_launch_is_the_first_again(name, recorder):
    launches, call = CALLS[name]
    with torch.no_grad():
        call()
        first = list(recorder.launched)
        recorder.launched.clear()
        call()
    assert len(first) == len(recorder.launched) == launches
    for one, two in zip(first, recorder.launched):
        assert len(one) == len(two) > 14
        for a, b in zip(
            one[:6] + one[7:], two[:6] + two[7:]
        ):  # without what a profiler would be told
            if isinstance(a, torch.Tensor):  # the tensors of each call are its own
                assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)
            else:
                assert a == b or a is b


def test_a_profiler_is_told_of_every_launch(recorder):
    """Triton's launcher hands what it is told to the hooks; where there is none, nothing is."""
    hook, told = triton.knobs.runtime.launch_enter_hook, []

    def launch():
        with torch.no_grad():
            ops.attention(*[heads(130, 40)] * 3)
        told.append(recorder.launched[-1][6])

    launch()
    hook.add(print)
    try:
        launch()
    finally:
        hook.remove(print)
    launch()
    assert [x and x.get()["name"] for x in told[1:]] == ["attention_kernel", None]


def test_what_was_compiled_for_other_tensors_is_not_launched(recorder):
    """Other shapes, strides, dtypes or an address that is no multiple of 16 bytes go through Triton
    again."""
    q, k = heads(64, 80), heads(L, 80)
    memory = torch.zeros(B * L * H * 80 + 8, dtype=torch.float16)
    beside = memory[1 : 1 + B * L * H * 80].view(B, L, H, 80).transpose(1, 2)
    assert k.data_ptr() % 16 == 0 and beside.data_ptr() % 16 == 2 and beside.stride() == k.stride()
    others = [
        (q, k, beside),
        (q[:, :, :63], k, k),
        (q, k.contiguous(), k),
        [x.bfloat16() for x in (q, k, k)],
    ]
    with torch.no_grad():
        for tensors in ((q, k, k), *others, (q, k, k)):
            ops.cross_attention(*tensors)
    assert len(dispatch.KNOWN) == 1 + len(others)
    functions = [args[4] for args in recorder.launched]
    assert functions[0] == functions[-1] and len(recorder.launched) == 2 + len(others)


def test_checks_and_choices_are_made_once(recorder, monkeypatch):
    """A call with tensors like earlier ones looks at their shapes and launches."""
    counts = {"check": 0, "prepare": 0}
    check, prepare = dispatch.CHECKS["cross_attention"], dispatch.prepare

    def counted(what, function):
        def call(*args):
            counts[what] += 1
            return function(*args)

        return call

    monkeypatch.setitem(dispatch.CHECKS, "cross_attention", counted("check", check))
    monkeypatch.setattr(dispatch, "prepare", counted("prepare", prepare))
    with torch.no_grad():
        for _ in range(3):
            ops.cross_attention(heads(64, 80), *[heads(L, 80)] * 2)
    assert counts == {"check": 1, "prepare": 1} and len(recorder.launched) == 3
    monkeypatch.setattr(dispatch, "MOST", 1)
    with torch.no_grad():
        ops.cross_attention(heads(63, 80), *[heads(L, 80)] * 2)
    assert len(dispatch.KNOWN) == 1, "what is kept has to have a bound"
