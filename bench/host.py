"""Host time of a call of the attention ops: Python and torch up to the launch, without a card.

    python -m bench.host [--json FILE]

A driver that launches nothing stands in for CUDA; the kernels are compiled for sm_90 once, and
then every call does what it does on a card but for the launch itself. CPU time of one thread, the
least of several rounds, in microseconds; launches: how many a call makes. Exit status 1: a call
takes longer than the 15 us that it may.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

MOST = 15.0  # us of a call
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


@torch.no_grad()
def measure(rounds: int = 15, n: int = 400) -> dict[str, dict]:
    """{form: {"us", "launches"}}."""
    import triton
    from minisd_kernels import dispatch, toolchain

    stub = Stub()
    triton.runtime.driver.set_active(stub)
    toolchain.choose = lambda arch: None
    dispatch.refuse_cpu = lambda q: None
    found = {}
    for name, call in calls().items():
        call()  # compiles
        before = stub.launches
        call()
        launches = stub.launches - before
        found[name] = {"us": microseconds(call, rounds, n), "launches": launches}
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
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    slow = [name for name, x in found.items() if x["us"] > MOST]
    print("\n".join(f"SLOW {name}: more than {MOST:.0f} us" for name in slow))
    return int(bool(slow))


if __name__ == "__main__":
    sys.exit(main())
