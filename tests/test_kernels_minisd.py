"""What minisd's attention does with impl="triton" where the kernels take an edit in part only.

In the interpreter's session, which test_kernels_interpreter.py starts.
"""

import os

import pytest
import torch
from kernel_cases import check, tensors
from minisd_kernels import dispatch, ops, reference

from minisd.models.attention import IMPLEMENTATIONS, AttentionEdit, attention

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
R, S, H = 3, 2, 2

if INTERPRETED:
    from test_kernels_fields import with_fields
    from test_kernels_interpreter import poisoned, quick_interpreter  # noqa: F401, fixtures

    def exactly(edit):
        """The edit in float64, tables aside."""
        wide = {"bias", "inject", "save"} & {n for n, x in edit.items() if x is not None}
        return edit | {name: edit[name].double() for name in wide}

    def compare(q, k, v, edit, what):
        """Output and saved maps of "triton" within the error budget of "reference"."""
        buffers = {n: x for n, x in edit.items() if n.startswith("save")}
        runs = {}
        for name, impl, tensors_, given in (
            ("got", "triton", (q, k, v), edit),
            ("eager", "reference", (q, k, v), edit),
            ("want", "reference", (q.double(), k.double(), v.double()), exactly(edit)),
        ):
            saves = {n: torch.zeros_like(given[n]) for n in buffers}
            out = attention(*tensors_, AttentionEdit(**given | saves), impl)
            runs[name] = {"out": out} | saves
        length = max(q.shape[3], k.shape[2])
        for name, x in runs["want"].items():
            got, eager = runs["got"][name], runs["eager"][name]
            check(got, eager, x.double(), q.dtype, f"{what}: {name}", length)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    @pytest.mark.parametrize(
        "names",
        [
            ("kv_row", "reweight"),
            ("kv_row", "source_row", "blend"),
            ("own_value", "source_row", "token_map", "blend"),
            ("kv_row", "bias", "source_row", "token_map", "blend", "reweight", "own_value"),
        ],
        ids="+".join,
    )
    def test_joined_rows_and_own_values_together_with_tables(names, dtype):
        """The kernels take one or the other; minisd joins the keys and folds the values itself."""
        # joined: fewer keys than cross_attention takes, and more
        for n, d in ((7, 16), (70, 8)) if dtype == torch.float16 else ((7, 16),):
            q, k, v = tensors(R, H, n, n, d, dtype, n)
            edit, _ = with_fields(names, H, n, n, dtype, seed=2)
            compare(q, k, v, edit, f"{n} keys")

    @pytest.mark.parametrize("keys", [129, 256, 257])
    @pytest.mark.parametrize("source", [None, "source_row"])
    def test_maps_of_long_prompts_are_edited_and_saved(keys, source):
        """Whether or not the kernels take so many keys."""
        q, k, v = tensors(R, 1, 5, keys, 16, torch.float32, keys)
        names = ("reweight",) if source is None else ("source_row", "token_map", "blend")
        edit, _ = with_fields(names, 1, 5, keys, torch.float32, seed=2)
        compare(q, k, v, edit, "folded")
        saves = {"save": torch.empty(S, 1, 5, keys), "save_mean": torch.empty(S, 5, keys)}
        compare(q, k, v, edit | saves, "saved")

    @pytest.mark.parametrize("edit", [None, AttentionEdit(source_row=torch.tensor([1, 0]))])
    def test_autocast(edit, monkeypatch):
        """Mixed dtypes become autocast's before they are checked, in every implementation."""
        q, k, v = tensors(S, 1, 9, 7, 16, torch.float32, 0)
        dtypes, call = [], dispatch.call
        monkeypatch.setattr(ops, "call", lambda op, *a: dtypes.append(a[0].dtype) or call(op, *a))
        want = attention(q.half(), k.half(), v.half(), edit, "triton")
        with torch.autocast("cpu", dtype=torch.float16):
            for impl in IMPLEMENTATIONS:
                got = attention(q.half(), k, v, edit, impl)
                assert got.dtype == torch.float16
                torch.testing.assert_close(got, want, atol=2e-3, rtol=0)
        assert dtypes == [torch.float16] * 2

    @pytest.mark.parametrize("keys", [5, 257])
    @pytest.mark.parametrize("impl", IMPLEMENTATIONS)
    def test_a_saved_map_carries_its_gradients(impl, keys):
        """Into the same buffers that it is written to; a loss of the map and of the output."""
        names = ("source_row", "token_map", "blend", "reweight", "bias")
        edit, _ = with_fields(names, H, 6, keys, torch.float32, seed=2)
        weights = torch.randn(S, H, 6, keys, generator=torch.Generator().manual_seed(0))

        def gradients(impl, dtype, edit):
            q, k, v = (x.requires_grad_() for x in tensors(R, H, 6, keys, 16, dtype, 3))
            save = torch.full((S, H, 6, keys), torch.nan, dtype=dtype)
            mean = torch.zeros(S, 6, keys)
            if impl == "formula":  # P' @ 1 is the map, of the rows that are edited
                out = reference.cross_attention(q, k, v, **edit)
                identity = torch.eye(keys, dtype=dtype).expand(S, H, keys, keys)
                save = reference.cross_attention(q[R - S :], k[R - S :], identity, **edit)
                mean = save.mean(1)
            else:
                out = attention(q, k, v, AttentionEdit(**edit, save=save, save_mean=mean), impl)
            loss = (save * weights).sum() + (mean * weights[:, 0]).sum() + out.square().sum()
            return *torch.autograd.grad(loss, (q, k, v)), save.detach(), mean.detach()

        want = gradients("formula", torch.float64, exactly(edit))
        eager = gradients("formula", torch.float32, edit)
        for got, of_eager, x in zip(gradients(impl, torch.float32, edit), eager, want):
            check(got, of_eager, x.double(), torch.float32, impl, H * max(keys, 16))
