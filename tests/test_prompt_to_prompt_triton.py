"""Prompt-to-prompt on the Triton kernels, in Triton's interpreter on the CPU, against the oracle on
diffusers' UNet.

TRITON_INTERPRET must be set before Triton is imported and must not reach the other tests, so this
file runs itself, as test_kernels_interpreter.py does. Latents of 2 x 3, three steps: the
interpreter is slow.
"""

import os
import subprocess
import sys

import p2p_model
import pytest
import torch

from minisd import DDIM, PromptToPrompt, cfg

if os.environ.get("TRITON_INTERPRET") != "1":

    def test_in_its_own_process():
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "--no-header",
            "-p",
            "no:cacheprovider",
            __file__,
        ]
        env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        assert done.returncode == 0 and "2 passed" in done.stdout, (
            done.stdout[-20000:] + done.stderr[-5000:]
        )

else:
    import test_prompt_to_prompt_oracle as against
    from minisd_kernels import ops
    from minisd_kernels.launch import Launch
    from test_kernels_interpreter import quick_interpreter  # noqa: F401, a fixture

    @pytest.fixture(scope="module")
    def pair(tmp_path_factory):
        return p2p_model.load(tmp_path_factory.mktemp("p2p"))

    def test_equals_the_oracle(pair, monkeypatch):
        """Replace and reweight, self-attention, columns of their own time: final latents after
        every step's table."""
        calls, launches = [], []
        launch = Launch.__call__
        monkeypatch.setattr(Launch, "__call__", lambda *args: launches.append(launch(*args)))
        for name in ("attention", "cross_attention"):
            op = getattr(ops, name)
            monkeypatch.setattr(
                ops, name, lambda *args, op=op, **kwargs: calls.append(op) or op(*args, **kwargs)
            )
        monkeypatch.setitem(
            against.CASES,
            "small",
            (
                [against.LONG_SWAP],
                dict(
                    reweight={"my": 3, "old": -1.5},
                    cross_steps={"default": 0.7, "on": 0.34},
                    self_steps=(0.34, 1),
                ),
                [
                    against.Target(
                        [0, 1, 2, 3, 4, 5], {None: (0, 2), 2: (0, 1)}, (1, 3), {3: 3, 4: -1.5}
                    )
                ],
            ),
        )
        ours, theirs = against.both(pair, "small", "triton", height=8, width=12, steps=3)
        against.assert_same(ours, theirs)
        assert len(calls) >= 3 * len(pair[1].unet.sites()), (
            "the kernels were not called at every site"
        )
        assert len(launches) == len(calls)  # one for a site, at every step

    def test_maps(pair):
        """The maps that a local blend reads, of one step, against PyTorch's attention."""
        sd, prompts, maps = pair[1], [against.SOURCE, against.SWAP], []
        for sd.unet.attention in ("triton", "sdpa"):
            options = dict(steps=5, reweight={"my": 3}, height=8, width=12)
            p2p = PromptToPrompt(sd, *prompts, map_sites="up", collect_maps=True, **options)
            maps.append(p2p.maps)
            x, step = sd.noise(3, 1, 8, 12).expand(2, -1, -1, -1), next(iter(DDIM(sd.schedule, 5)))
            with torch.no_grad():
                cfg(sd.unet, sd.encode_prompt([""]), sd.encode_prompt(prompts), 7.5, p2p)(
                    x, step, None
                )
        torch.testing.assert_close(maps[0].mean(), maps[1].mean(), rtol=1e-4, atol=1e-6)
        assert maps[0].mean()[1, :, :, 1].std() > 0
