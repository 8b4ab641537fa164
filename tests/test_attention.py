"""minisd.models.attention: every edit by every implementation that runs here, against the formula
in float64."""

import itertools

import pytest
import torch
from minisd_kernels import reference

from minisd.models.attention import Attention, AttentionEdit, attention

R, S, H, N, L, D = 3, 2, 2, 5, 7, 16
SOURCES = ("none", "source_row", "inject", "inject_qk")
MIXES = [c for r in range(4) for c in itertools.combinations(("token_map", "blend", "reweight"), r)]
CASES = [(s, m) for s in SOURCES for m in MIXES if s != "none" or set(m) <= {"reweight"}]


def inputs(source, mix, dtype=torch.float64, n=N, keys=L, seed=0):
    g = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    q, k, v = (
        rand(R, n, H, D).transpose(1, 2),
        rand(R, keys, H, D).transpose(1, 2),
        rand(R, keys, H, D).transpose(1, 2),
    )
    edit = {}
    if source == "source_row":
        edit["source_row"] = torch.tensor([1, 0])
    if source == "inject":
        edit["inject"] = torch.softmax(rand(S, H, n, keys), -1)
    if source == "inject_qk":
        edit["inject_qk"] = rand(S, H, n, D), rand(S, H, keys, D)
    shape = {"token_map": (S, keys, keys), "blend": (S, keys), "reweight": (S, keys)}
    edit |= {name: torch.rand(shape[name], generator=g) for name in mix}
    return q, k, v, AttentionEdit(**edit)


def oracle(q, k, v, edit):
    """The formula, row by row and head by head, in float64: shares nothing with the code under
    test."""
    q, k, v = q.double(), k.double(), v.double()
    out, maps = torch.empty(R, H, q.shape[2], D, dtype=torch.float64), []
    for b, h in itertools.product(range(R), range(H)):

        def softmax_map(query, key):
            return torch.softmax(torch.einsum("nd,ld->nl", query, key) / D**0.5, -1)

        p, s = softmax_map(q[b, h], k[b, h]), b - (R - S)
        if s >= 0:
            source = None
            if edit.source_row is not None:
                row = R - S + int(edit.source_row[s])
                source = softmax_map(q[row, h], k[row, h])
            elif edit.inject is not None:
                source = edit.inject[s, h].double()
            elif edit.inject_qk is not None:
                source = softmax_map(*(x[s, h].double() for x in edit.inject_qk))
            if source is not None:
                if edit.token_map is not None:
                    source = source @ edit.token_map[s].double()
                blend = 1.0 if edit.blend is None else edit.blend[s].double()
                p = blend * source + (1 - blend) * p
            if edit.reweight is not None:
                p = edit.reweight[s].double() * p
            maps.append(p)
        out[b, h] = p @ v[b, h]
    return out, torch.stack(maps).unflatten(0, (S, H))


@pytest.mark.parametrize("impl", ["sdpa", "reference"])
@pytest.mark.parametrize("source, mix", CASES)
def test_every_edit_equals_the_formula(source, mix, impl):
    q, k, v, edit = inputs(source, mix)
    want, _ = oracle(q, k, v, edit)
    torch.testing.assert_close(attention(q, k, v, edit, impl), want, atol=1e-12, rtol=0)


@pytest.mark.parametrize("impl", ["sdpa", "reference"])
@pytest.mark.parametrize("source, mix", CASES)
def test_saved_maps_and_queries_are_those_used(source, mix, impl):
    q, k, v, edit = inputs(source, mix)
    want, maps = oracle(q, k, v, edit)
    edit = edit._replace(
        save=torch.full((S, H, N, L), float("nan"), dtype=torch.float64),
        save_mean=torch.ones(S, N, L),
        save_qk=(
            torch.empty(S, H, N, D, dtype=torch.float64),
            torch.empty(S, H, L, D, dtype=torch.float64),
        ),
    )
    torch.testing.assert_close(attention(q, k, v, edit, impl), want, atol=1e-12, rtol=0)
    torch.testing.assert_close(edit.save, maps, atol=1e-12, rtol=0)
    torch.testing.assert_close(edit.save_mean, 1 + maps.mean(1).float(), atol=1e-6, rtol=0)
    assert torch.equal(edit.save_qk[0], q[R - S :]) and torch.equal(edit.save_qk[1], k[R - S :])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("source, mix", CASES)
def test_sdpa_is_as_exact_as_eager(source, mix, dtype):
    """Error against float64 <= max(2 x same-dtype eager, 4 eps x max|reference|), more than 128
    keys included."""
    for seed, keys in ((0, 77), (1, 130)):
        q, k, v, edit = inputs(source, mix, dtype, n=257, keys=keys, seed=seed)
        want, _ = oracle(q, k, v, edit)
        error, eager = (
            (attention(q, k, v, edit, impl).double() - want).abs().max()
            for impl in ("sdpa", "reference")
        )
        assert error <= max(2 * eager, 4 * torch.finfo(dtype).eps * want.abs().max())


def test_saving_alone_leaves_the_output():
    q, k, v, _ = inputs("none", ())
    edit = AttentionEdit(
        save_qk=(torch.empty(1, H, N, D).double(), torch.empty(1, H, L, D).double())
    )
    torch.testing.assert_close(attention(q, k, v, edit), attention(q, k, v), atol=0, rtol=0)
    assert torch.equal(edit.save_qk[0], q[2:])


def test_arange_and_blend_zero_leave_alone():
    """Gating by value: the same tensor shapes, no change."""
    q, k, v, _ = inputs("none", ())
    want = reference.attention(q, k, v)
    for edit in (
        AttentionEdit(source_row=torch.arange(S)),
        AttentionEdit(source_row=torch.arange(S, dtype=torch.int32)),
        AttentionEdit(source_row=torch.tensor([1, 1]), blend=torch.zeros(S, L)),
    ):
        torch.testing.assert_close(attention(q, k, v, edit), want, atol=1e-12, rtol=0)


@pytest.mark.parametrize("source, mix", CASES)
def test_sdpa_is_differentiable(source, mix):
    q, k, v, edit = inputs(source, mix)
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    losses = [attention(*leaves, edit, impl).square().sum() for impl in ("sdpa", "reference")]
    grads = [torch.autograd.grad(loss, leaves) for loss in losses]
    for got, want in zip(*grads):
        torch.testing.assert_close(got, want, atol=1e-10, rtol=0)


def bad(name, value, match, **others):
    return pytest.param(others | {name: value}, match, id=f"{name}: {match}")


@pytest.mark.parametrize(
    "fields, match",
    [
        bad(
            "source_row",
            torch.zeros(4, dtype=torch.int64),
            "one number of rows from 1 to the batch, 3",
        ),
        bad(
            "source_row",
            torch.zeros(2),
            "source_row: expected torch.int32 or torch.int64, got torch.float32",
        ),
        bad("source_row", torch.zeros((), dtype=torch.int64), "one number of rows"),
        bad(
            "inject",
            torch.zeros(2, H, N, L + 1),
            r"inject: expected shape \(2, 2, 5, 7\), got \(2, 2, 5, 8\)",
        ),
        bad("blend", torch.zeros(2, L), "blend: expected a source"),
        bad("token_map", torch.zeros(2, L, L), "token_map: expected a source"),
        bad(
            "reweight",
            torch.zeros(2, L).double(),
            "reweight: expected torch.float32, got torch.float64",
        ),
        bad(
            "reweight",
            torch.zeros(2, L, device="meta"),
            "reweight: expected a tensor on cpu like q, got meta",
        ),
        bad(
            "reweight",
            torch.zeros(2, L),
            "one number of rows",
            source_row=torch.zeros(1, dtype=torch.int64),
        ),
        bad(
            "inject",
            torch.zeros(2, H, N, L),
            "both source_row and inject",
            source_row=torch.tensor([0, 1]),
        ),
        bad("inject_qk", (torch.zeros(2, H, N, D).double(),) * 2, "inject_qk: expected shape"),
        bad(
            "inject_qk",
            (torch.zeros(2, H, N, D), torch.zeros(2, H, L, D)),
            "inject_qk: expected torch.float64",
        ),
        bad(
            "inject_qk",
            (torch.zeros(2, H, N, D).double(), torch.zeros(2, H, L, D).double()),
            "both source_row and inject_qk",
            source_row=torch.tensor([0, 1]),
        ),
        bad(
            "save_qk",
            (torch.zeros(4, H, N, D).double(), torch.zeros(4, H, L, D).double()),
            "at most 3 rows",
        ),
        bad(
            "save_mean",
            torch.zeros(2, N, L).half(),
            "save_mean: expected torch.float32, got torch.float16",
        ),
    ],
)
@pytest.mark.parametrize("impl", ["sdpa", "reference", "triton"])
def test_bad_edits_are_refused(fields, match, impl):
    q, k, v, _ = inputs("none", ())
    with pytest.raises(ValueError, match=match):
        attention(q, k, v, AttentionEdit(**fields), impl)


@pytest.mark.parametrize("impl", ["sdpa", "reference", "triton"])
@pytest.mark.parametrize("name", AttentionEdit._fields)
def test_what_is_no_tensor_is_refused(name, impl):
    q, k, v, _ = inputs("none", ())
    with pytest.raises(
        TypeError,
        match=f"{name}: expected (a tensor|q and k, a tuple of two tensors), got (list|.1.0, 2.0.)",
    ):
        attention(q, k, v, AttentionEdit(**{name: [1.0, 2.0]}), impl)


@pytest.mark.parametrize("impl", ["sdpa", "reference", "triton"])
def test_what_is_no_tensor_is_refused_beside_a_pair(impl):
    q, k, v, _ = inputs("none", ())
    pair = torch.zeros_like(q), torch.zeros_like(k)
    with pytest.raises(TypeError, match="bias: expected a tensor, got list"):
        attention(q, k, v, AttentionEdit(bias=[1.0, 2.0], save_qk=pair), impl)


def test_unknown_impl_and_rows_are_refused():
    q, k, v, _ = inputs("none", ())
    with pytest.raises(
        ValueError, match="attention is 'flash', expected one of triton, sdpa, reference"
    ):
        attention(q, k, v, impl="flash")
    with pytest.raises(ValueError, match=r"source_row: expected values from 0 to 1, got \[2\]"):
        AttentionEdit(source_row=torch.tensor([0, 2])).check_rows()
    with pytest.raises(ValueError, match=r"source_row: expected values from 0 to 1, got \[-1, 3\]"):
        AttentionEdit(
            source_row=torch.tensor([[0, 1], [-1, 0], [0, 3]])
        ).check_rows()  # a table, a row for each step
    with pytest.raises(ValueError, match=r"kv_row: expected values from 0 to 1, got \[2\]"):
        AttentionEdit(kv_row=torch.tensor([[0, 1, 1], [0, 2, 1]])).check_rows()  # S = 2, M = 3
    with pytest.raises(ValueError, match=r"kv_row: expected values from 0 to 1, got \[-1, 2\]"):
        AttentionEdit(kv_row=torch.tensor([[[0], [1]], [[-1], [2]]])).check_rows()  # two steps
    with pytest.raises(ValueError, match=r"kv_row: expected \(\.\.\., S, M\), got \(2,\)"):
        AttentionEdit(kv_row=torch.tensor([0, 1])).check_rows()
    edit = AttentionEdit(source_row=torch.tensor([1, 0]), kv_row=torch.tensor([[0, 1], [1, 0]]))
    assert edit.check_rows() is edit


def test_fewer_key_heads_are_refused_with_an_edit():
    q, k, v = (torch.zeros(2, heads, 3, 8) for heads in (4, 2, 2))
    with pytest.raises(ValueError, match="k, v: expected the 4 heads of q, got 2"):
        attention(q, k, v, AttentionEdit(source_row=torch.tensor([1, 0])))


def test_module_passes_its_edit_on():
    torch.manual_seed(0)
    site = Attention(32, heads=2, context_channels=24).double()
    x, context = torch.randn(R, N, 32).double(), torch.randn(R, L, 24).double()
    kv = site.project(context)
    edit = AttentionEdit(source_row=torch.tensor([1, 0]))
    q = site.to_q(x).view(R, N, 2, 16).transpose(1, 2)
    want = site.to_out[0](
        reference.attention(q, *kv, edit.source_row).transpose(1, 2).reshape(R, N, 32)
    )
    for impl in ("sdpa", "reference"):
        torch.testing.assert_close(site(x, kv, edit, impl), want, atol=1e-12, rtol=0)
        assert (site(x, kv) - want).abs().max() > 1e-3


def fields_of_rows(S, H, N, L, M, generator):
    """One value of each newer field, and tables for single heads."""

    def rand(*shape):
        return torch.rand(shape, generator=generator)

    return {
        "bias": rand(S, 1, N, M * L).log(),
        "kv_row": torch.randint(S, (S, M), generator=generator),
        "own_value": torch.tensor([0.0, 1.0, 0.0]),
        "source_row": torch.tensor([1, 1, 0]),
        "blend": rand(S, H, M * L),
        "reweight": 2 * rand(S, H, M * L),
    }


@pytest.mark.parametrize(
    "names",
    [
        ("bias",),
        ("kv_row",),
        ("own_value",),
        ("reweight",),
        ("source_row", "blend"),
        ("bias", "source_row", "blend", "reweight"),
        ("kv_row", "bias"),
        ("kv_row", "own_value"),
        ("kv_row", "source_row", "blend"),
        ("bias", "source_row"),
        ("own_value", "bias", "reweight"),
        ("kv_row", "bias", "source_row", "blend", "reweight", "own_value"),
    ],
)
def test_newer_fields_against_float64(names):
    """bias, kv_row, own_value and tables for single heads: sdpa within twice eager's error."""
    generator = torch.Generator().manual_seed(3)
    R, S, H, N, D = 5, 3, 2, 9, 8
    M = 2 if "kv_row" in names else 1
    q, k, v = torch.randn(3, R, H, N, D, generator=generator)
    chosen = {
        name: x for name, x in fields_of_rows(S, H, N, N, M, generator).items() if name in names
    }
    edit = AttentionEdit(**chosen)
    double = {
        n: x.double() if x.dtype == torch.float32 and n == "bias" else x for n, x in chosen.items()
    }
    exact = attention(*(x.double() for x in (q, k, v)), AttentionEdit(**double), "reference")
    eager = attention(q, k, v, edit, "reference")
    ours = attention(q, k, v, edit, "sdpa")
    bar = max(2 * (eager - exact).abs().max(), 4 * torch.finfo(q.dtype).eps * exact.abs().max())
    assert (ours - exact).abs().max() <= bar
    untouched = attention(q, k, v, None, "sdpa")
    apart = {"bias", "kv_row"} & set(names)  # calls of their own: last bits may be others
    bits = {"rtol": 1e-5, "atol": 1e-6} if apart else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(ours[: R - S], untouched[: R - S], **bits)
    assert not torch.equal(ours, untouched)


def test_hidden_keys_and_own_values():
    """-inf hides a key to the bit; own_value is a selection, so 0 times infinity is no NaN."""
    q, k, v = torch.randn(3, 2, 2, 6, 8, generator=torch.Generator().manual_seed(4))
    bias = torch.zeros(2, 1, 1, 6)
    bias[..., 4:] = -torch.inf
    shorter = attention(q, k[:, :, :4], v[:, :, :4], None, "sdpa")
    torch.testing.assert_close(attention(q, k, v, AttentionEdit(bias=bias), "sdpa"), shorter)
    all_hidden = AttentionEdit(bias=torch.full((2, 1, 1, 6), -torch.inf), own_value=torch.ones(2))
    for impl in ("sdpa", "reference"):
        assert torch.equal(attention(q, k, v, all_hidden, impl), v)
    with pytest.raises(ValueError, match="inject_qk: its keys are its own, expected no kv_row"):
        edit = AttentionEdit(inject_qk=(q, k), kv_row=torch.tensor([[0], [1]]))
        attention(q, k, v, edit, "sdpa")
