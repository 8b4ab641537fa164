"""Host time without a card: of a call of the attention ops, and of a guided step of SD v1.4's UNet.

    python -m bench.host [--json FILE]

A driver that launches nothing stands in for CUDA; the kernels are compiled for sm_90 once, and
then every call does what it does on a card but for the launch itself. CPU time of one thread, the
least of several rounds; launches: how many a call makes. Exit status 1: a call of an op takes
longer than the 15 us that it may.

The step has all layers of the UNet, 64 channels wide, on tensors of a CPU that are treated as a
card's: convolutions, products, attention, norms and activations of torch give memory without
computing, what is left (sums, views, the sampler) is of a few thousand numbers. To a convolution
its bias is added, which torch does behind cuDNN's. calls: of Python's and of C's functions from
Python, which are the same on every machine. diffusers, if it is there, is measured in the same way.
"""

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from bench import models

MOST = 15.0  # us of a call
TINY = dict(block_out_channels=(64, 64, 64, 64), sample_size=8, cross_attention_dim=64)
B, H, S, TEXT = 2, 8, 2, 77


class Stub:
    """Stands in for Triton's CUDA driver: counts launches."""

    class utils:
        load_binary = staticmethod(lambda *args: (1, 2, 32, 0, 1024))
        get_device_properties = staticmethod(
            lambda device: {"max_shared_mem": 227 * 1024, "multiprocessor_count": 132}
        )

    launches = 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def launcher_cls(self, source, metadata):
        def launch(*args):
            self.launches += 1

        return launch


def calls() -> dict[str, Callable]:
    """The forms of prompt-to-prompt, on CPU tensors."""
    from minisd_kernels import ops

    def heads(n, d):
        return torch.zeros(B, n, H, d, dtype=torch.float16).transpose(1, 2)

    x, q, k, v = heads(256, 80), heads(64, 40), heads(TEXT, 40), heads(TEXT, 40)
    row = torch.zeros(S, dtype=torch.int64)
    tables = {"token_map": torch.zeros(S, TEXT, TEXT), "blend": torch.zeros(S, TEXT)}
    tables["reweight"] = torch.zeros(S, TEXT)
    save, mean = torch.zeros(S, H, 64, TEXT, dtype=torch.float16), torch.zeros(S, 64, TEXT)
    cross = ops.cross_attention
    return {
        "self": lambda: ops.attention(x, x, x),
        "self-injection": lambda: ops.attention(x, x, x, row),
        "cross": lambda: cross(q, k, v),
        "replace": lambda: cross(q, k, v, source_row=row),
        "save": lambda: cross(q, k, v, save=save),
        "reweight": lambda: cross(q, k, v, reweight=tables["reweight"]),
        "refine": lambda: cross(q, k, v, source_row=row, **tables),
        "save_mean": lambda: cross(q, k, v, save_mean=mean),
    }


def microseconds(call: Callable, rounds: int, n: int) -> float:
    """CPU time of one call, the least of `rounds` means over n calls."""
    best = float("inf")
    for _ in range(rounds):
        start = time.thread_time()
        for _ in range(n):
            call()
        best = min(best, (time.thread_time() - start) / n * 1e6)
    return best


STUB = Stub()  # one: Triton keeps compiled kernels with the driver's launcher


def without_a_card() -> None:
    """Let the kernels be launched on a CPU's tensors, by a driver that launches nothing."""
    import triton
    from minisd_kernels import dispatch, toolchain

    triton.runtime.driver.set_active(STUB)
    toolchain.choose = lambda arch: None
    dispatch.refuse_cpu = lambda q: None


@torch.no_grad()
def measure(rounds: int = 15, n: int = 400) -> dict[str, dict]:
    """{form: {"us", "launches"}}."""
    without_a_card()
    found = {}
    for name, call in calls().items():
        call()  # compiles
        before = STUB.launches
        call()
        launches = STUB.launches - before
        found[name] = {"us": microseconds(call, rounds, n), "launches": launches}
    return found


def without_arithmetic() -> None:
    """Let what torch launches a kernel of cuDNN, cuBLAS or its own for give memory only."""
    known: dict[tuple, torch.Tensor] = {}

    def like(function: Callable) -> Callable:
        def call(x, weight, *others, **options):
            key = (function, x.shape, weight.shape, others[1:2])  # the stride
            if key not in known:
                known[key] = function(x, weight, *others, **options)
            return torch.empty_like(known[key])

        return call

    convolution = like(F.conv2d)
    F.conv2d = lambda x, weight, bias, *others: convolution(x, weight, bias, *others).add_(
        bias.view(1, -1, 1, 1)
    )
    F.linear = like(F.linear)
    first = lambda x, *others, **options: torch.empty_like(x)
    F.scaled_dot_product_attention = F.gelu = torch.group_norm = torch.layer_norm = first
    torch._C._nn.silu = torch._C._nn.silu_ = first


def steps() -> dict[str, Callable]:
    """Guided steps in float16, whose kernels have been compiled."""
    from minisd_kernels import norms

    from minisd import DDIM, NoiseSchedule, UNet, UNetConfig, cfg
    from minisd.checkpoints.load import SD_V1_SCHEDULE
    from minisd.models import ops

    norms.SHORT = 1024 // 64  # the latents stand for 64x64, and take as many launches
    ops.is_on_card = lambda x: x.is_cpu
    ops.by_onednn = lambda layer, kind, x: not x.is_cpu
    half, width = torch.float16, TINY["cross_attention_dim"]
    x, uncond, cond = (torch.zeros(s, dtype=half) for s in ((1, 4, 8, 8), *[(1, 77, width)] * 2))
    unet = models.random_model(lambda: UNet(UNetConfig(**TINY)), "cpu", half)
    unet.to(memory_format=torch.channels_last).attention = "triton"
    step = next(iter(DDIM(NoiseSchedule.from_dict(SD_V1_SCHEDULE), 50)))
    found = {"minisd": models.one_step(cfg(unet, uncond, cond, 7.5), step, x)}
    if importlib.util.find_spec("diffusers") is not None:
        from diffusers import UNet2DConditionModel

        theirs = lambda: UNet2DConditionModel(attention_head_dim=8, **TINY)
        rival = models.random_model(theirs, "cpu", half)
        found["diffusers"] = models.diffusers_step(rival, x, uncond, cond)
    for step in found.values():
        step()
    return found


def number_of_calls(function: Callable) -> int:
    """How many functions of Python's, and of C's from Python, a call of it calls."""
    count = 0

    def profile(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(profile)
    function()
    sys.setprofile(None)
    return count


def measure_steps(rounds: int = 30, n: int = 1) -> dict[str, dict]:
    """{contender: {"us", "calls", "launches"}} of a guided step; launches: of minisd's kernels."""
    without_a_card()
    without_arithmetic()
    found = {}
    for name, step in steps().items():
        before = STUB.launches
        step()
        launches, calls = STUB.launches - before, number_of_calls(step)
        found[name] = {"us": microseconds(step, rounds, n), "calls": calls, "launches": launches}
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.host", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--json", type=Path, help="also write the figures as JSON")
    args = parser.parse_args(argv)
    found = measure()
    for name, x in found.items():
        print(f"{name:<24}{x['us']:6.1f} us, {x['launches']} launches")
    of_steps = measure_steps()
    for name, x in of_steps.items():
        what = f"{x['calls']} calls, {x['launches']} launches of Triton's kernels"
        print(f"{'step of ' + name:<24}{x['us'] / 1000:6.2f} ms, {what}")
    if args.json:
        args.json.write_text(json.dumps(found | {"steps": of_steps}, indent=1) + "\n")
    slow = [name for name, x in found.items() if x["us"] > MOST]
    print("\n".join(f"SLOW {name}: more than {MOST:.0f} us" for name in slow))
    return int(bool(slow))


if __name__ == "__main__":
    sys.exit(main())
