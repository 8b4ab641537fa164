"""minisd_kernels without a launch: what is refused, what is imported, what a fake kernel
promises."""

import contextlib
import subprocess
import sys

import pytest
import torch
from minisd_kernels import dispatch, fused, ops, reference
from torch.utils._python_dispatch import TorchDispatchMode

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
        (
            lambda q, k, v: (q[0], k, v),
            r"expected 4 dimensions .* got \(2, 5, 16\), \(3, 2, 7, 16\)",
        ),
        (lambda q, k, v: (q, k[:2], v), r"expected \(B, H, N, D\), .* got .*\(2, 2, 7, 16\)"),
        (lambda q, k, v: (q, k[:, :1], v), "expected .B, H, N, D., "),
        (lambda q, k, v: (q, k, v[:, :, :6]), "expected .B, H, N, D., "),
        (lambda q, k, v: (q, k[..., :8], v), "expected .B, H, N, D., "),
        (lambda q, k, v: (q[:, :, :0], k, v), "no empty dimension"),
        (lambda q, k, v: (q, k[:, :, :0], v[:, :, :0]), "no empty dimension"),
        (
            lambda *qkv: [x[..., :12] for x in qkv],
            "head_dim: expected a multiple of 8 up to 256, got 12",
        ),
        (
            lambda q, k, v: (q.half(), k, v),
            "expected one dtype, got torch.float16, torch.float32, torch.float32",
        ),
        (
            lambda q, k, v: (q.double(), k.double(), v.double()),
            "expected torch.float16 or .* got torch.float64",
        ),
        (lambda q, k, v: (q, k, v.to("meta")), "expected one device, got cpu, cpu, meta"),
    ],
)
def test_bad_tensors_are_refused(op, change, match):
    with pytest.raises(ValueError, match=match):
        op(*change(*qkv()))


def test_limits():
    for saves in ({}, {"save": torch.empty(2, H, N, 257)}, {"save_mean": torch.empty(2, N, 257)}):
        with pytest.raises(
            ValueError, match="at most 256 keys, got 257; .* impl='sdpa' edits and saves"
        ):
            ops.cross_attention(
                *(x.to("meta") for x in qkv(L=257)), **{n: x.to("meta") for n, x in saves.items()}
            )
    with pytest.raises(ValueError, match="multiple of 8 up to 256, got 264"):
        ops.attention(*qkv(D=264))


@pytest.mark.parametrize("scale", [0, -0.3, float("nan"), float("inf"), torch.tensor(0.3)], ids=str)
@pytest.mark.parametrize("op", [ops.attention, ops.cross_attention])
def test_a_scale_that_turns_scores_around_is_refused(op, scale):
    """The kernels multiply after they have looked for the largest score, and hide keys by -inf."""
    for tracked in (False, True):
        q, k, v = (x.requires_grad_(tracked) for x in qkv())
        with pytest.raises(ValueError, match="scale: expected None or a finite .* above 0, got "):
            op(q, k, v, scale=scale)


def test_cpu_tensors_are_refused_outside_of_the_interpreter():
    pytest.importorskip("triton")
    for op in (ops.attention, ops.cross_attention):
        with pytest.raises(
            ValueError, match="need a CUDA device, got cpu; impl='sdpa' runs everywhere"
        ):
            op(*qkv())


OPS = torch.ops.minisd_kernels
DIRECT = {
    "attention": lambda q, k, v: OPS.attention(q, k, v, *[None] * 5, False),
    "attention_lse": lambda q, k, v: OPS.attention_lse(q, k, v, *[None] * 5, True),
    "cross_attention": lambda q, k, v: OPS.cross_attention(q, k, v, *[None] * 7),
    "cross_attention_save": lambda q, k, v: OPS.cross_attention_save(
        q, k, v, *[None] * 6, torch.empty(2, H, N, L, device=q.device), None, None
    ),
    "attention_backward": lambda q, k, v: OPS.attention_backward(q, q, k, v, *[None] * 5, False),
}


@pytest.mark.parametrize("name", dispatch.SCHEMAS)
def test_gradients_through_the_registered_ops_are_refused(name):
    q, k, v = (x.to("meta") for x in qkv())
    DIRECT[name](q, k, v)
    with pytest.raises(
        RuntimeError, match=f"minisd_kernels.{name} has no backward; minisd_kernels.ops has"
    ):
        DIRECT[name](q, k, v.requires_grad_())


@pytest.mark.parametrize("name", dispatch.SCHEMAS)
def test_the_registered_ops_check_their_inputs(name):
    """Called directly, in a compiled graph, anywhere."""
    if name != "attention_backward":
        with pytest.raises(ValueError, match="no empty dimension"):
            DIRECT[name](*(x.to("meta") for x in qkv(L=0)))


class Seen(TorchDispatchMode):
    """The names of the operators, which are not computed."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return args[0]


@torch.no_grad()
def test_who_looks_on_sees_the_op(monkeypatch):
    """Where nobody does, it is called past torch's dispatcher."""
    q, k, v = qkv()
    names = []
    with Seen() as seen:
        assert ops.attention(q, k, v) is q and fused.geglu(q) is q
    assert seen.names == [f"minisd_kernels.{name}.default" for name in ("attention", "geglu")]
    monkeypatch.setattr(dispatch, "run", lambda name, x, *args: names.append(name) or x)
    assert ops.attention(q, k, v) is q and fused.geglu(q) is q
    assert names == ["attention", "geglu"]
    own_class = torch.Tensor._make_subclass(type("Own", (torch.Tensor,), {}), q)
    for x in (own_class, q.to("meta")):
        names.clear()
        with contextlib.suppress(ValueError):  # needs a card
            fused.geglu(x)
        assert not names


@pytest.mark.parametrize("op", [ops.attention, ops.cross_attention])
def test_forward_mode_derivatives_are_refused(op):
    """They would be zero in silence: the registered ops know nothing of tangents."""
    q, k, v = (x.to("meta") for x in qkv())
    match = "no forward-mode derivatives; use impl='sdpa'"
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(v, torch.ones_like(v))
        op(q, k, v)
        with torch.no_grad():
            with pytest.raises(RuntimeError, match=match):
                op(q, k, dual)
        with pytest.raises(RuntimeError, match=match):
            DIRECT[op.__name__](q, k, dual)
    with pytest.raises(RuntimeError, match=match):
        torch.func.jvp(lambda q: op(q, k, v), (q,), (q,))


@pytest.mark.parametrize("op", [ops.attention, ops.cross_attention])
@pytest.mark.parametrize(
    "dtypes", [(torch.float32,) * 3, (torch.bfloat16, torch.float32, torch.float32)], ids=str
)
def test_autocast_casts_as_sdpa_does(op, dtypes, monkeypatch):
    """One dtype under autocast, float32 products included; mixed dtypes without it are an error."""
    got = []
    monkeypatch.setattr(ops, "call", lambda _, *args: got.append([x.dtype for x in args[:3]]))
    q, k, v = (x.to(dtype) for x, dtype in zip(qkv(), dtypes))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        want = torch.nn.functional.scaled_dot_product_attention(q, k, v).dtype
        op(q, k, v)
    assert got == [[want] * 3] and want == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (
            op(*qkv(dtype=torch.float64)) is None and got[-1] == [torch.float64] * 3
        )  # refused by the op itself


def test_a_buffer_with_overlapping_memory_is_refused():
    edit = {"source_row": torch.zeros(2, dtype=torch.int64)}
    for name, wrong, right in (
        (
            "save",
            torch.empty(1, H, N, L).expand(2, -1, -1, -1),
            torch.empty(L, N, 2 * H, 2).permute(3, 2, 1, 0)[:, ::2],
        ),
        (
            "save",
            torch.empty(100).as_strided((2, H, N, L), (48, 24, 3, 1)),
            torch.empty(2, H, N, 2 * L)[..., ::2],
        ),
        (
            "save_mean",
            torch.empty(2, 1, L).expand(-1, N, -1),
            torch.empty(L, N, 2).permute(2, 1, 0),
        ),
    ):
        with pytest.raises(
            ValueError, match=f"{name}: expected memory of its own for every element"
        ):
            ops.cross_attention(*qkv(), **edit, **{name: wrong})
        ops.check(*qkv(), **edit, **{name: right})
    ops.check(
        *qkv(), save=torch.empty(H * N * L).as_strided((1, H, N, L), (0, N * L, L, 1))
    )  # one row: no stride


def test_fake_kernels_promise_the_layout_that_is_returned():
    q, k, v = (x.to("meta") for x in qkv())
    edit = {"source_row": torch.zeros(2, dtype=torch.int64, device="meta")}
    save = {"save": torch.empty(2, H, N, L, device="meta")}
    edited, saving = (
        ops.cross_attention(q, k, v, **edit),
        ops.cross_attention(q, k, v, **edit, **save),
    )
    for out in (ops.attention(q, k, v), edited, saving):
        assert out.shape == (B, H, N, D) and out.stride() == (N * H * D, D, H * D, 1)
        assert out.stride() == dispatch.empty_out(q.contiguous()).stride()


@pytest.mark.parametrize(
    "fields", [("source_row",), ("source_row", "blend"), ("inject", "token_map", "blend"), ()]
)
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


@pytest.mark.parametrize(
    "fields, match",
    [
        (
            {"bias": torch.zeros(2, H, N, L + 1)},
            r"bias: expected shape \(2, 2, 5, 7\) or \(2, 2, 1, 7\) or .*8\)",
        ),
        (
            {"bias": torch.zeros(2, 1, 1, L).double()},
            "bias: expected torch.float16 or .* got torch.float64",
        ),
        (
            {"kv_row": torch.zeros(2, dtype=torch.int64)},
            r"kv_row: expected shape \(S, M\), M at least 1, got \(2,\)",
        ),
        (
            {"kv_row": torch.zeros(2, 1)},
            "kv_row: expected torch.int32 or torch.int64, got torch.float32",
        ),
        ({"own_value": torch.ones(2)}, "own_value: expected as many keys as queries, 5, got 7"),
        (
            {"own_value": torch.ones(2, dtype=torch.int64)},
            "own_value: expected torch.float32 or torch.bool",
        ),
        (
            {"reweight": torch.ones(2, H + 1, L)},
            r"reweight: expected shape \(2, 7\) or \(2, 2, 7\), got \(2, 3, 7\)",
        ),
        (
            {"bias": torch.zeros(1, 1, 1, L), "reweight": torch.ones(2, L)},
            "expected one number of rows",
        ),
    ],
)
def test_bad_fields_are_refused(fields, match):
    with pytest.raises(ValueError, match=match):
        ops.check(*qkv(), **fields)


@pytest.mark.parametrize("value", [[1, 0], 0.5])
@pytest.mark.parametrize("name", ["source_row", "bias", "kv_row", "own_value", "reweight", "save"])
def test_what_is_no_tensor_is_refused(name, value):
    match = f"{name}: expected a tensor, got {type(value).__name__}"
    with pytest.raises(TypeError, match=match):
        ops.check(*qkv(), **{name: value})
    op = ops.attention if name in ("kv_row", "own_value") else ops.cross_attention
    for tracked in (False, True):
        with pytest.raises(TypeError, match=match):
            op(*(x.requires_grad_(tracked) for x in qkv()), **{name: value})


def test_what_cross_attention_does_not_take():
    for name, x in (("kv_row", torch.zeros(2, 1, dtype=torch.int64)), ("own_value", torch.ones(2))):
        with pytest.raises(
            ValueError,
            match=f"{name}: cross_attention does not take it; attention.. does, and impl='sdpa'",
        ):
            ops.cross_attention(*qkv(), **{name: x})


def test_importing_the_ops_imports_neither_triton_nor_minisd():
    code = """
import sys
import torch
before = set(sys.modules)
import minisd_kernels.ops, minisd_kernels.fused, minisd_kernels.reference, minisd_kernels.gradients
import minisd_kernels.diffusers
new = {name.split(".")[0] for name in set(sys.modules) - before}
assert not new & {"triton", "minisd", "diffusers", "transformers"}, new
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
