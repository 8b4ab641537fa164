"""minisd_kernels without a launch: what is refused, what is imported, what a fake kernel promises."""

import subprocess
import sys

import pytest
import torch
from minisd_kernels import ops, reference

B, H, N, L, D = 3, 2, 5, 7, 16


def qkv(**change):
    size = {"B": B, "H": H, "N": N, "L": L, "D": D, "dtype": torch.float32} | change
    B_, H_, D_, dtype = size["B"], size["H"], size["D"], size["dtype"]
    q = torch.zeros(B_, size["N"], H_, D_, dtype=dtype).transpose(1, 2)
    k, v = (torch.zeros(B_, size["L"], H_, D_, dtype=dtype).transpose(1, 2) for _ in range(2))
    return q, k, v


@pytest.mark.parametrize("op", [ops.attention, ops.cross_attention])
@pytest.mark.parametrize(
    "change, match",
    [
        (lambda q, k, v: (q[0], k, v), r"expected 4 dimensions .* got \(2, 5, 16\), \(3, 2, 7, 16\)"),
        (lambda q, k, v: (q, k[:2], v), r"expected \(B, H, N, D\), .* got .*\(2, 2, 7, 16\)"),
        (lambda q, k, v: (q, k[:, :1], v), "expected .B, H, N, D., "),
        (lambda q, k, v: (q, k, v[:, :, :6]), "expected .B, H, N, D., "),
        (lambda q, k, v: (q, k[..., :8], v), "expected .B, H, N, D., "),
        (lambda q, k, v: (q[:, :, :0], k, v), "no empty dimension"),
        (lambda q, k, v: (q, k[:, :, :0], v[:, :, :0]), "no empty dimension"),
        (lambda *qkv: [x[..., :12] for x in qkv], "head_dim: expected a multiple of 8 up to 256, got 12"),
        (lambda q, k, v: (q.half(), k, v), "expected one dtype, got torch.float16, torch.float32, torch.float32"),
        (lambda q, k, v: (q.double(), k.double(), v.double()), "expected torch.float16 or .* got torch.float64"),
        (lambda q, k, v: (q, k, v.to("meta")), "expected one device, got cpu, cpu, meta"),
    ],
)
def test_bad_tensors_are_refused(op, change, match):
    with pytest.raises(ValueError, match=match):
        op(*change(*qkv()))


def test_limits():
    with pytest.raises(ValueError, match="at most 128 keys, got 129"):
        ops.cross_attention(*qkv(L=129))
    with pytest.raises(ValueError, match="multiple of 8 up to 256, got 264"):
        ops.attention(*qkv(D=264))


def test_cpu_tensors_are_refused_outside_of_the_interpreter():
    pytest.importorskip("triton")
    for op in (ops.attention, ops.cross_attention):
        with pytest.raises(ValueError, match="need a CUDA device, got cpu; impl='sdpa' runs everywhere"):
            op(*qkv())


@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("op", [ops.attention, ops.cross_attention])
def test_gradients_are_refused(op, which):
    tensors = qkv()
    tensors[which].requires_grad_()
    with pytest.raises(RuntimeError, match="no backward; use impl='sdpa'"):
        op(*tensors)


@pytest.mark.parametrize("name", ["inject", "token_map", "blend", "reweight", "save", "save_mean"])
def test_gradients_to_an_edit_are_refused(name):
    """They would be dropped in silence."""
    sizes = {"inject": (2, H, N, L), "save": (2, H, N, L), "save_mean": (2, N, L), "token_map": (2, L, L)}
    edit = {name: torch.zeros(sizes.get(name, (2, L)), requires_grad=True)}
    if name in ("token_map", "blend"):
        edit["source_row"] = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="no backward; use impl='sdpa'"):
        ops.cross_attention(*qkv(), **edit)


def test_a_gradient_through_the_registered_op_is_refused():
    q, k, v = (x.to("meta").requires_grad_() for x in qkv())
    out = torch.ops.minisd_kernels.attention(q, k, v, None)
    with pytest.raises(RuntimeError, match="no backward; use impl='sdpa'"):
        out.sum().backward()


def test_fake_kernels_promise_the_layout_that_is_returned():
    q, k, v = (x.to("meta") for x in qkv())
    edit = {"source_row": torch.zeros(2, dtype=torch.int64, device="meta")}
    save = {"save": torch.empty(2, H, N, L, device="meta")}
    folded, saving = ops.cross_attention(q, k, v, **edit), ops.cross_attention(q, k, v, **edit, **save)
    for out in (ops.attention(q, k, v), folded, saving):
        assert out.shape == (B, H, N, D) and out.stride() == (N * H * D, D, H * D, 1)
        assert out.stride() == ops.empty_out(q.contiguous()).stride()


@pytest.mark.parametrize("fields", [("source_row",), ("source_row", "blend"), ("inject", "token_map", "blend"), ()])
@pytest.mark.parametrize("reweighted", [False, True])
def test_fold_is_exact(fields, reweighted):
    """P_own V_own + P_source V_source is the unfolded formula, in float64 to the last digits."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, H, n, D, dtype=torch.float64) for n in (N, L, L))
    edit = {
        "source_row": torch.tensor([1, 0]),
        "inject": torch.rand(2, H, N, L, dtype=torch.float64),
        "token_map": torch.rand(2, L, L),
        "blend": torch.rand(2, L),
        "reweight": torch.rand(2, L),
    }
    edit = {name: x for name, x in edit.items() if name in fields + ("reweight",) * reweighted}
    want = reference.cross_attention(q, k, v, **edit)
    parts = (edit.get(name) for name in ("token_map", "blend", "reweight"))
    v_own, v_source = ops.fold(v, bool(fields), *parts)
    p = reference.attention_map(q, k)
    source = edit["inject"] if "inject" in edit else p.flip(0)
    got = (0 if v_own is None else p @ v_own) + (0 if v_source is None else source @ v_source)
    torch.testing.assert_close(got, want, atol=1e-13, rtol=0)


def test_importing_the_ops_imports_neither_triton_nor_minisd():
    code = """
import sys
import torch
before = set(sys.modules)
import minisd_kernels.ops, minisd_kernels.fused, minisd_kernels.reference
new = {name.split(".")[0] for name in set(sys.modules) - before}
assert not new & {"triton", "minisd", "diffusers", "transformers"}, new
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
