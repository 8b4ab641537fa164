"""Which ptxas makes the kernels for sm_90: versions are made up, and so is the driver."""

import subprocess
import sys

import pytest

pytest.importorskip("triton")

from minisd_kernels import toolchain
from minisd_kernels.toolchain import Tool, pick

OWN, BUNDLED = "/opt/cuda/bin/ptxas", "/triton/bin/ptxas"


def newer(version):
    return Tool("/triton/bin/ptxas-blackwell", version)


@pytest.mark.parametrize(
    "own, bundled, blackwell, cuda, version",
    [
        (None, "12.8", "12.9", "12.8", "12.9"),  # Triton 3.6.0
        (None, "12.8", "13.1", "13.0", "13.1"),  # Triton 3.7.1, torch for CUDA 13
        (
            None,
            "12.8",
            "13.1",
            "12.8",
            "12.8",
        ),  # its code would need a driver that may not be there
        (None, "12.8", "13.1", None, "12.8"),  # torch for the CPU
        (None, "12.8", None, "13.0", "12.8"),
        (None, "12.9", "13.4", "13.0", "12.9"),  # Triton 3.9.0: nothing to mend
        (None, "12.4", "12.9", "12.4", "12.9"),
        ("12.8", "12.8", "13.1", "13.0", "12.8"),  # the user's choice stays
        ("13.0", "12.8", "13.1", "13.0", "13.0"),
    ],
)
def test_the_ptxas_that_is_picked(own, bundled, blackwell, cuda, version):
    own = own and Tool(OWN, own)
    found = pick(own, Tool(BUNDLED, bundled), blackwell and newer(blackwell), cuda)
    assert found.version == version and (own is None or found == own)


@pytest.mark.parametrize(
    "own, bundled, blackwell",
    [
        ("12.4", "12.9", "13.1"),
        (None, "12.4", None),
        (None, "12.4", "13.1"),
        (None, "11.8", "12.6"),
    ],
)
def test_without_any_that_was_looked_at_nothing_is_launched(own, bundled, blackwell):
    own = own and Tool(OWN, own)
    place = OWN if own else "/triton"
    match = rf"need ptxas 12.8 or newer, got 1\d\.\d \({place}.*set TRITON_PTXAS_PATH"
    with pytest.raises(RuntimeError, match=match):
        pick(own, Tool(BUNDLED, bundled), blackwell and newer(blackwell), "12.4")


CHOOSE = """
import os, sys, torch, triton
from minisd_kernels import tiles, toolchain
from triton.backends.nvidia.compiler import get_ptxas_version

who = sys.argv[1]
nvidia = triton.knobs.nvidia
bundled, other = nvidia.ptxas.path, nvidia.ptxas_blackwell.path
if who == "own":
    nvidia.ptxas = other
if who == "bundled":  # Triton's own, but asked for
    os.environ["TRITON_PTXAS_PATH"] = bundled
before, key = nvidia.ptxas.path, get_ptxas_version(90)
torch.version.cuda = "13.0"

class Driver:
    arch = 80
    def get_current_target(self):
        return self

triton.runtime.driver.set_active(Driver())
assert tiles.arch() == 80 and nvidia.ptxas.path == before  # another arch: left alone
Driver.arch = 90
toolchain.MENDED = (99, 0)  # whatever is bundled has the fault
assert tiles.arch() == 90
wanted = bundled if who == "bundled" else other
assert nvidia.ptxas.path == wanted and bundled != other, nvidia.ptxas.path
# what was compiled before is not taken from the cache
assert (get_ptxas_version(90) != key) == (who == "ours")
"""


@pytest.mark.parametrize("who", ["ours", "own", "bundled"])
def test_it_is_chosen_at_the_first_launch_on_sm_90(who):
    done = subprocess.run([sys.executable, "-c", CHOOSE, who], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_versions_are_numbers():
    assert toolchain.number("12.10") > toolchain.number("12.9") > toolchain.number("9.2.88")
