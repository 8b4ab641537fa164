"""What the kernel tests share: random tensors and edits, sampled cases, the error budget."""

import itertools
import random

import pytest
import torch
from minisd_kernels import ops, reference

B, S, NAN = 3, 2, float("nan")
DTYPES = (torch.float32, torch.float16)
HEAD_DIMS, QUERIES, KEYS = (
    (8, 16, 40, 48, 64, 80, 96, 160, 256),
    (1, 7, 64, 97, 256),
    (1, 5, 63, 77, 128),
)
SOURCES = ("none", "source_row", "inject")
MIXES = [m for r in range(4) for m in itertools.combinations(("token_map", "blend", "reweight"), r)]
SAVES = ((), ("save",), ("save_mean",), ("save", "save_mean"))
FORMS = [
    (source, mix, saves)
    for source, mix, saves in itertools.product(SOURCES, MIXES, SAVES)
    if source != "none" or set(mix) <= {"reweight"}
]


def tensors(batch, heads, n, keys, d, dtype, seed, layout="heads inside", device="cpu"):
    """Random q, k, v: (batch, tokens, heads, d) memory as in the UNet, plain memory, or views with
    gaps."""
    g = torch.Generator().manual_seed(seed)
    out = []
    for tokens in (n, keys, keys):
        if layout == "heads inside":
            x = torch.randn(batch, tokens, heads, d, generator=g).transpose(1, 2)
        elif layout == "plain":
            x = torch.randn(batch, heads, tokens, d, generator=g)
        elif layout == "gaps":  # odd strides everywhere, the last one included
            x = torch.randn(batch, heads, tokens + 1, 2 * d + 3, generator=g)[
                :, :, :tokens, 1 : 2 * d + 1 : 2
            ]
        else:
            x = torch.randn(batch, heads, d, tokens, generator=g).mT
        # .to() would drop the layout of a view with gaps
        y = torch.empty_strided(x.shape, x.stride(), dtype=dtype, device=device)
        out.append(y.copy_(x))
    return out


def edit_tensors(source, mix, heads, n, keys, dtype, seed, device="cpu"):
    """The edit of the last S rows; every other seed gives views that are not contiguous."""
    g = torch.Generator().manual_seed(seed + 1)
    edit = {}
    if source == "source_row":
        edit["source_row"] = torch.randint(
            S, (S,), generator=g, dtype=(torch.int64, torch.int32)[seed % 2]
        )
    if source == "inject":
        edit["inject"] = torch.softmax(torch.randn(S, heads, n, keys, generator=g), -1).to(dtype)
    if "token_map" in mix:
        edit["token_map"] = torch.rand(S, keys, keys, generator=g) / keys
    if "blend" in mix:
        edit["blend"] = torch.rand(S, keys, generator=g)
    if "reweight" in mix:
        edit["reweight"] = torch.randn(S, keys, generator=g)
    edit = {name: x.to(device) for name, x in edit.items()}
    if seed % 2:
        for name in edit.keys() - {"source_row"}:
            edit[name] = scattered(edit[name])
    return edit


def scattered(x):
    """x with its dimensions in the opposite order in memory, and a gap after each last one."""
    order = range(x.ndim)[::-1]
    memory = x.new_empty(*(x.shape[i] for i in order), 2)[..., 0].permute(*order)
    return memory.copy_(x)


def check(got, eager, want, dtype, what, length=1):
    """Error against float64 <= max(2 x that of eager in the same dtype, 4 eps x max|reference|).

    In float32 also eps x sqrt(length) x max|reference|, where `length` is that of the longest sum:
    another order of a sum is another error of that size, and one run of eager is one draw of it.
    """
    assert got.isfinite().all(), f"{what}: not everything was written, or not finite"
    error, eager_error = ((x.double() - want).abs().max().item() for x in (got, eager))
    share = max(4, length**0.5 if dtype == torch.float32 else 0)
    budget = max(2 * eager_error, share * torch.finfo(dtype).eps * want.abs().max().item())
    assert error <= budget, (
        f"{what}: error {error:.3g}, eager {eager_error:.3g}, budget {budget:.3g}"
    )


def run_cross(q, k, v, edit, saves):
    """Compare output and saves of the op with the reference; rows not edited, with the same kernel
    without the edit."""
    batch, heads, n, keys = *q.shape[:3], k.shape[2]

    def buffers(dtype):
        both = {
            "save": torch.full((S, heads, n, keys), NAN, dtype=dtype),
            "save_mean": torch.ones(S, n, keys),
        }
        return {
            name: scattered(both[name].to(q.device)) if n % 2 else both[name].to(q.device)
            for name in saves
        }

    mine, eager, exact = buffers(q.dtype), buffers(q.dtype), buffers(torch.float64)
    out = ops.cross_attention(q, k, v, **edit, **mine)
    want_eager = reference.cross_attention(q, k, v, **edit, **eager)
    want = reference.cross_attention(q.double(), k.double(), v.double(), **edit, **exact)
    longest = max(keys, q.shape[3])
    check(out, want_eager, want, q.dtype, "out", longest)
    for name in saves:
        check(mine[name], eager[name], exact[name].double(), q.dtype, name, longest)
    if saves or edit:
        plain = ops.cross_attention(q, k, v, **buffers(q.dtype))
        untouched = slice(0, batch - S)
        assert torch.equal(out[untouched], plain[untouched]), (
            "a row that is not edited changes, in some bit"
        )


def sampled_cross_cases(dtypes=DTYPES):
    """Every form in every dtype; sizes drawn so that each occurs often and no case has more than 12
    programs.

    The batch is 3 rows, the last 2 edited, or where that is too much work the 2 rows. `arch` picks
    the tiles: of sm_80 or of sm_90.
    """
    draw = random.Random(0)
    for (source, mix, saves), dtype in itertools.product(FORMS, dtypes):
        for _ in range(1 if dtype == torch.float32 else 2):
            d, keys, arch = draw.choice(HEAD_DIMS), draw.choice(KEYS), draw.choice((80, 90))
            batch, heads, n = B, draw.choice((1, 2)), draw.choice(QUERIES)
            block = 16 if dtype == torch.float32 or arch == 80 and d > 80 else 64
            while batch * heads * -(-n // block) > (8 if d < 160 else 4):
                if heads == 2:
                    heads = 1
                elif batch == B:
                    batch = S
                else:
                    batch, n = B, draw.choice(QUERIES)
            layout = draw.choice(("heads inside", "heads inside", "plain", "gaps", "transposed"))
            size = f"B{batch}-H{heads}-N{n}-L{keys}-D{d}"
            name = f"{source}-{'+'.join(mix + saves) or 'bare'}-{str(dtype)[6:]}-{size}"
            case = (
                source,
                mix,
                saves,
                dtype,
                batch,
                heads,
                n,
                keys,
                d,
                layout,
                arch,
                draw.randrange(10**6),
            )
            yield pytest.param(*case, id=f"{name}-{layout}-sm{arch}")
