"""Edits of features: every field at every site against forward hooks on diffusers' UNet, gradients
of what is saved, one graph for all steps, and what is refused."""

import pytest
import torch
from oracle import CROSS_DOWN, CROSS_UP, PLAIN_DOWN, PLAIN_UP, difference, unet_pair
from test_cuda_graph import Mocked

from minisd import AttentionEdit, FeatureEdit
from minisd.engine.graphs import GraphedUNet

BAR = 1e-5
G, B, S = 2, 2, 3  # guidance groups, latents, edited rows: the last S of G * B


@pytest.fixture(scope="module")
def pair():
    return unet_pair(block_out_channels=(16, 24, 32), layers_per_block=1, attention_head_dim=2)


@pytest.fixture(scope="module")
def inputs():
    g = torch.Generator().manual_seed(0)
    x, context = torch.randn(B, 4, 10, 6, generator=g), torch.randn(G * B, 5, 24, generator=g)
    return x, torch.tensor([3, 700]), context


def reference_call(reference, x, t, context):
    """diffusers' answer, all rows computed apart from the start."""
    return reference(x.repeat(G, 1, 1, 1), t.repeat(G), context).sample


def hooked(reference, site, change):
    """A hook that puts change(x) in place of the feature x of that name, as minisd's shape is."""
    name, _, part = site.rpartition(".")
    if part == "skip":  # the last channels of what the resnet is given
        resnet = reference.get_submodule(name)
        before = reference.get_submodule(name.split(".resnets")[0])
        index = int(name.rsplit(".", 1)[1])
        own = before.resnets[index - 1] if index else None
        width = own.out_channels if own is not None else None

        def skip(module, args, kwargs):
            n = width if width is not None else deep_width(reference, before)
            return (torch.cat([args[0][:, :n], change(args[0][:, n:])], 1), *args[1:]), kwargs

        return resnet.register_forward_pre_hook(skip, with_kwargs=True)
    if part in ("q", "k", "v"):
        heads = reference.get_submodule(name).heads

        def projected(module, args, out):
            split = out.unflatten(-1, (heads, -1)).transpose(1, 2)
            return change(split).transpose(1, 2).flatten(2)

        return reference.get_submodule(f"{name}.to_{part}").register_forward_hook(projected)
    module = reference.get_submodule(f"{name}.to_out.0" if part == "out" else site)

    def output(module, args, out):
        return (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)

    return module.register_forward_hook(output)


def deep_width(reference, block):
    """Channels of what comes to an up block from below."""
    index = list(reference.up_blocks).index(block)
    below = reference.up_blocks[index - 1] if index else reference.mid_block
    return below.resnets[-1].out_channels


def test_names(pair):
    """In forward order, each once; kinds are disjoint and together all features."""
    reference, ours = pair
    features = ours.sites("feature")
    kinds = ("resnet", "transformer", "block", "skip", "q", "k", "v", "out")
    assert sorted(features) == sorted(name for kind in kinds for name in ours.sites(kind))
    assert ours.sites("block") == [
        *("down_blocks.0", "down_blocks.1", "down_blocks.2"),
        *("mid_block", "up_blocks.0", "up_blocks.1", "up_blocks.2"),
    ]
    attention = ours.sites()
    assert len(ours.sites("out")) == len(ours.sites("q")) == len(attention)
    assert not set(attention) & set(features)
    modules = {name for name, _ in reference.named_modules()}
    assert set(ours.sites("resnet") + ours.sites("transformer")) <= modules
    assert features.index("up_blocks.1.resnets.0.skip") + 1 == features.index(
        "up_blocks.1.resnets.0"
    )
    with pytest.raises(ValueError, match="kind is 'heads', expected one of None, 'feature'"):
        ours.sites("heads")
    assert ours.sites("skip", max_tokens=9, size=(9, 6)) == [
        "up_blocks.0.resnets.0.skip",
        "up_blocks.0.resnets.1.skip",
    ]


def test_grids_and_heads_are_those_of_the_features(pair, inputs):
    """What is saved at a site has the shape that grid and heads say."""
    _, ours = pair
    x, t, context = inputs
    for site in ours.sites("feature"):
        h, w = ours.grid(site, (10, 6))
        shape = ours.shape(site, (10, 6), tokens=5)
        if site.endswith((".q", ".k", ".v", ".out")):
            assert shape[0] == (h * w if site.endswith(".out") else ours.heads(site) == 2 and 2)
        else:
            with pytest.raises(ValueError, match="is no attention and has no heads"):
                ours.heads(site)
            assert shape[1:] == (h, w)
        save = torch.full((1, *shape), torch.nan)
        with torch.no_grad():
            ours(x, t, context, {site: FeatureEdit(save=save)})
        assert save.isfinite().all(), site
    for site in ours.sites():
        save = torch.full((1, *ours.shape(site, (10, 6), tokens=5)), torch.nan)
        with torch.no_grad():
            ours(x, t, context, {site: AttentionEdit(save=save)})
        assert save.isfinite().all() and len(save[0]) == ours.heads(site) == 2, site
    for ask in (ours.grid, ours.heads, ours.shape):
        with pytest.raises(ValueError, match="no site is called 'mid_block.attn'"):
            ask("mid_block.attn")


@torch.no_grad()
def test_every_field_at_every_site_equals_hooks_on_diffusers(pair, inputs):
    """x' = apply(scale * source + add) in the last 3 of 4 rows, of which diffusers computes each
    from the start: so the part that the guidance groups share is exact as well."""
    reference, ours = pair
    x, t, context = inputs
    plain, row = reference_call(reference, x, t, context), torch.tensor([1, 1, 0])
    torch.manual_seed(1)
    features = plain_features(reference, ours.sites("feature"), inputs)
    for i, (site, own) in enumerate(features.items()):
        shape = own.shape[1:]
        scale = 1 + torch.rand(S, *[1 if (i + j) % 2 else n for j, n in enumerate(shape)])
        add, stored = torch.randn(S, *[1] * len(shape)), torch.randn(S, *shape)
        routed = FeatureEdit(source_row=row, scale=scale, add=add, apply=torch.tanh)
        cases = [
            (routed, lambda y, scale=scale, add=add: torch.tanh(scale * y[-S:][row] + add)),
            (FeatureEdit(inject=stored, add=add), lambda y, z=stored + add: z),
        ]
        for edit, formula in cases:
            edit = edit._replace(save=torch.empty(S, *shape, dtype=torch.float64))
            hook = hooked(reference, site, lambda y, f=formula: torch.cat([y[:-S], f(y)]))
            expected = reference_call(reference, x, t, context)
            hook.remove()
            got = ours(x, t, context, {site: edit}, attention=("sdpa", "reference")[i % 2])
            assert difference(got, expected) <= BAR, site
            assert difference(edit.save, formula(own)) <= 3 * BAR, site
            assert difference(got[-S:], plain[-S:]) > 100 * BAR, site
            # The rows before the last S are untouched.
            assert difference(got[:-S], plain[:-S]) <= BAR, site


def plain_features(reference, sites, inputs):
    """{site: diffusers' feature of all rows there}."""
    seen = {}
    hooks = [
        hooked(reference, site, lambda y, site=site: seen.setdefault(site, y)) for site in sites
    ]
    reference_call(reference, *inputs)
    for hook in hooks:
        hook.remove()
    return {site: seen[site] for site in sites}


@torch.no_grad()
def test_apply_alone_is_given_all_rows_and_order_is_as_it_is_written(pair, inputs):
    _, ours = pair
    x, t, context = inputs
    rows = []

    def double(y):
        rows.append(len(y))
        return 2 * y

    site = "down_blocks.0.resnets.0"  # where the guidance groups are one without an edit
    first = ours(x, t, context, {site: FeatureEdit(apply=double)})
    assert rows == [G * B]
    both = FeatureEdit(scale=torch.full((G * B, 1, 1, 1), 2.0))
    assert torch.equal(first, ours(x, t, context, {site: both}))
    save = torch.empty(2, 16, 10, 6)
    order = FeatureEdit(
        inject=torch.ones(2, 16, 10, 6),
        scale=torch.full((2, 1, 1, 1), 3.0),
        add=torch.full((2, 1, 1, 1), 5.0),
        apply=lambda y: y * y,
        save=save,
    )
    ours(x, t, context, {site: order})
    assert torch.equal(save, torch.full_like(save, 64.0))  # (3 * 1 + 5) ** 2


@torch.no_grad()
@pytest.mark.parametrize("site", ["q", "out", "transformer", "resnet", "block", "skip"])
def test_what_is_given_is_never_written_to(pair, inputs, site):
    """Layers write over what they are given: not over a stored feature, in all rows or in some."""
    _, ours = pair
    for name in ours.sites(site)[1::3]:
        for rows in (G * B, 1):
            buffer = torch.empty(rows, *shape_at(ours, name, inputs))
            ours(*inputs, {name: FeatureEdit(save=buffer)})
            kept, version = buffer.clone(), buffer._version
            alone = ours(*inputs, {name: FeatureEdit(inject=buffer)})
            assert torch.equal(buffer, kept) and buffer._version == version, name
            given = ours(*inputs, {name: FeatureEdit(apply=lambda y, b=buffer[:1]: b.expand_as(y))})
            assert torch.equal(buffer, kept) and given.isfinite().all(), name
            assert difference(alone, ours(*inputs)) <= BAR


def shape_at(unet, site, inputs):
    """(...) of the feature there."""
    shapes = []
    with torch.no_grad():
        unet(*inputs, {site: FeatureEdit(apply=lambda y: shapes.append(y.shape[1:]) or y)})
    return shapes[0]


@torch.no_grad()
def test_reading_changes_no_bit_and_neither_do_sites_that_are_left_alone(pair, inputs):
    _, ours = pair
    plain = ours(*inputs)
    assert torch.equal(ours(*inputs, {}), plain)
    site = "up_blocks.2.attentions.1"
    save = torch.empty(1, *shape_at(ours, site, inputs))
    for edit in (FeatureEdit(), FeatureEdit(save=save), FeatureEdit(apply=lambda y: y)):
        assert torch.equal(ours(*inputs, {site: edit}), plain)


# ---- gradients


@pytest.mark.parametrize("impl", ["sdpa", "reference"])
def test_saved_maps_and_features_carry_gradients(impl):
    """d(loss of what was saved) / dx against central differences in float64, each kind of save."""
    _, ours = unet_pair(block_out_channels=(8, 16), layers_per_block=1, attention_head_dim=2)
    ours = ours.double()
    g = torch.Generator().manual_seed(2)
    x = torch.randn(1, 4, 6, 4, generator=g, dtype=torch.float64)
    context = torch.randn(1, 5, 24, generator=g, dtype=torch.float64)
    direction = torch.randn(x.shape, generator=g, dtype=torch.float64)
    cross, t = ours.sites("cross")[0], torch.tensor(500)
    made = {
        "save": lambda z: AttentionEdit(save=z(1, 2, 24, 5)),
        "save_mean": lambda z: AttentionEdit(save_mean=z(1, 24, 5, dtype=torch.float32)),
        "save_qk": lambda z: AttentionEdit(save_qk=(z(1, 2, 24, 4), z(1, 2, 5, 4))),
        "feature": lambda z: FeatureEdit(apply=torch.sin, save=z(1, 16, 3, 2)),
    }

    def loss(x, name):
        zeros = lambda *s, dtype=torch.float64: torch.zeros(*s, dtype=dtype)
        edit = made[name](zeros)
        site = "mid_block.attentions.0" if name == "feature" else cross
        ours(x, t, context, {site: edit}, attention=impl)
        saved = edit.save_qk[0] if name == "save_qk" else getattr(edit, name, edit.save)
        return (saved.double() * torch.linspace(-1, 2, saved.numel()).view(saved.shape)).sum()

    for name in made:
        leaf = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(leaf, name), leaf)
        h = 1e-3 if name == "save_mean" else 1e-5  # its sums are float32
        with torch.no_grad():
            slope = (loss(x + h * direction, name) - loss(x - h * direction, name)) / (2 * h)
        own = (gradient * direction).sum()
        assert own.abs() > 1e-6, name
        assert (own - slope).abs() <= (2e-2 if name == "save_mean" else 1e-6) * own.abs(), name


def test_a_gradient_of_a_mean_map_is_autograds_of_the_eager_formula():
    """save_mean of a site alone, against softmax(q k^T / sqrt(D)).mean(heads) written out."""
    from minisd.models.attention import attention

    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 8, generator=g).requires_grad_() for n in (6, 5, 5))
    weight = torch.randn(1, 6, 5, generator=g)
    eager = torch.softmax(torch.einsum("hnd,hld->hnl", q[1], k[1]) / 8**0.5, -1).mean(0)
    expected = torch.autograd.grad((eager * weight[0]).sum(), (q, k))
    for impl in ("sdpa", "reference"):
        total = torch.zeros(1, 6, 5)
        attention(q, k, v, AttentionEdit(save_mean=total), impl)
        got = torch.autograd.grad((total * weight).sum(), (q, k))
        for ours, theirs in zip(got, expected):
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
        total.detach_().zero_()  # the next step's: no history is left
        assert not total.requires_grad


def test_recompute_refuses_what_would_be_saved_twice(pair, inputs):
    _, ours = pair
    x, t, context = inputs
    site = ours.sites("cross")[0]
    edit = AttentionEdit(save_mean=torch.zeros(1, 60, 5))
    with pytest.raises(ValueError, match="recompute=True would save twice, expected no save"):
        ours(x, t, context, {site: edit}, recompute=True)
    with torch.no_grad():  # where recompute does nothing
        ours(x, t, context, {site: edit}, recompute=True)
    assert edit.save_mean.sum() > 0


# ---- graphs


def steps_of(unet, inputs, steps=4):
    """{site: edit} of each step: on and off by value, never by structure."""
    sites = "down_blocks.0.resnets.0", "up_blocks.1.resnets.0.skip", f"{unet.sites('self')[0]}.q"
    shapes = [shape_at(unet, site, inputs) for site in sites]
    rows = torch.stack([torch.tensor([0, 0]), torch.tensor([0, 1])]).repeat(steps // 2, 1)
    scale = torch.rand(steps, 2, 1, 1, 1)
    buffer = torch.zeros(2, *shapes[2])
    stored = torch.randn(steps, 2, *shapes[1])

    def low(y):
        return y - y.mean(2, keepdim=True)

    for i in range(steps):
        yield {
            sites[0]: FeatureEdit(source_row=rows[i], scale=scale[i]),
            sites[1]: FeatureEdit(inject=stored[i]),
            sites[2]: FeatureEdit(apply=low, save=buffer),
        }


@torch.no_grad()
def test_one_compiled_graph_serves_all_steps(pair, inputs):
    _, ours = pair
    graphs = []

    def backend(graph, arguments):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, dynamic=False, backend=backend)
    edits = list(steps_of(ours, inputs))
    for each in edits:
        expected = ours(*inputs, each)
        buffer = each[f"{ours.sites('self')[0]}.q"].save
        saved = buffer.clone()
        assert difference(compiled(*inputs, each), expected) <= BAR
        assert difference(buffer, saved) <= BAR
    assert len(graphs) == 1
    torch._dynamo.reset()


@torch.no_grad()
def test_a_replayed_graph_serves_all_steps_and_reads_what_apply_closes_over(pair, inputs):
    _, ours = pair
    graphed = GraphedUNet(ours)
    graphed.replay = Mocked()
    for each in steps_of(ours, inputs):
        expected = ours(*inputs, each)
        assert torch.equal(graphed(*inputs, each), expected)
    assert graphed.replay.captures == 1
    factor = torch.tensor(2.0)
    edit = {"mid_block": FeatureEdit(apply=lambda y: factor * y)}
    for value in (2.0, 3.0):
        factor.fill_(value)
        assert torch.equal(graphed(*inputs, edit), ours(*inputs, edit))
    assert graphed.replay.captures == 2


# ---- errors


@torch.no_grad()
def test_what_does_not_fit_is_refused_with_the_site(pair, inputs):
    _, ours = pair
    x, t, context = inputs
    site, shape = "mid_block", (32, 3, 2)

    def refused(edit, match, at=site):
        with pytest.raises(ValueError, match=match):
            ours(x, t, context, {at: edit})

    refused(FeatureEdit(inject=torch.ones(5, *shape)), r"mid_block: got inject \(5, 32, 3, 2\)")
    refused(FeatureEdit(save=torch.ones(())), r"mid_block: got save \(\), expected 1 to 4 rows")
    refused(
        FeatureEdit(inject=torch.ones(2, 32, 2, 3)),
        r"mid_block: inject has shape \(2, 32, 2, 3\), expected \(2, 32, 3, 2\)",
    )
    refused(
        FeatureEdit(scale=torch.ones(2, 16, 1, 1)),
        r"scale has shape \(2, 16, 1, 1\), expected .* or 1 in any place but the first",
    )
    refused(
        FeatureEdit(inject=torch.ones(2, *shape), add=torch.ones(1, 1, 1, 1)),
        r"add has shape \(1, 1, 1, 1\), expected \(2, 32, 3, 2\)",
    )
    refused(FeatureEdit(save=torch.ones(1, *shape).int()), "save is torch.int32 on cpu, expected f")
    refused(
        FeatureEdit(source_row=torch.zeros(2)),
        "source_row is torch.float32 on cpu, expected integers on cpu",
    )
    refused(FeatureEdit(add=torch.ones(1, *shape, device="meta")), "add is .* on meta, expected fl")
    refused(
        FeatureEdit(source_row=torch.tensor([0, 1]), inject=torch.ones(2, *shape)),
        "mid_block: expected one source, got both source_row and inject",
    )
    refused(FeatureEdit(apply=lambda y: None), r"apply returned NoneType, expected a ten")
    refused(FeatureEdit(apply=lambda y: y[1:]), r"apply returned \(3, 32, 3, 2\) .* expected \(4,")
    refused(FeatureEdit(apply=lambda y: y.double()), "apply returned .*64 on cpu, expected .*32")
    refused(FeatureEdit(), "no site is called 'mid_blocks'", at="mid_blocks")
    refused(AttentionEdit(), "mid_block: got AttentionEdit as the edit, expected FeatureEdit")
    refused(FeatureEdit(), "got FeatureEdit as the edit, expected AttentionEdit", ours.sites()[0])
    refused(None, "mid_block: got NoneType as the edit, expected FeatureEdit")
    with pytest.raises(ValueError, match=r"source_row: expected values from 0 to 1, got \[2\]"):
        FeatureEdit(source_row=torch.tensor([[0, 1], [2, 0]])).check_rows()
    edit = FeatureEdit(source_row=torch.tensor([1, 0]))
    assert edit.check_rows() is edit


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tables_of_another_dtype_are_rounded_once(pair, inputs, dtype):
    _, ours = pair
    x, t, context = inputs
    half = unet_pair(block_out_channels=(16, 24, 32), layers_per_block=1, attention_head_dim=2)[1]
    half = half.to(dtype)
    save = torch.empty(2, 32, 3, 2, dtype=dtype)
    half(x.to(dtype), t, context, {"mid_block": FeatureEdit(save=save)})
    scale, used = torch.full((2, 1, 1, 1), 1.0009765625), torch.empty_like(save)
    edit = FeatureEdit(scale=scale, add=scale, save=used)
    half(x.to(dtype), t, context, {"mid_block": edit})
    assert torch.equal(used, (scale * save.float() + scale).to(dtype))


# ---- the shallow path


@torch.no_grad()
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_a_deep_feature_in_all_rows_leaves_out_what_is_below(inputs, layers):
    """To the bit what the whole UNet gives with it, in fewer layers; in some rows, or beside other
    edits, all is computed."""
    for kinds in ((CROSS_DOWN, PLAIN_DOWN), (PLAIN_DOWN, CROSS_DOWN)):
        ups = [CROSS_UP if kind == CROSS_DOWN else PLAIN_UP for kind in kinds[::-1]]
        _, ours = unet_pair(
            block_out_channels=(16, 24),
            layers_per_block=layers,
            attention_head_dim=2,
            down_block_types=kinds,
            up_block_types=tuple(ups),
        )
        calls = []

        def called(module, args, out, calls=calls):
            calls.append(module.name)

        for name in ours.sites("resnet"):
            ours.get_submodule(name).register_forward_hook(called)
        deep = torch.randn(G * B, *ours.shape(ours.deep, (10, 6)))
        edit = {ours.deep: FeatureEdit(inject=deep)}
        shallow, few = ours(*inputs, edit), set(calls)
        expected = ours(*inputs, edit | {"mid_block": FeatureEdit()})
        assert difference(shallow, expected) <= BAR and torch.equal(deep, edit[ours.deep].inject)
        up = {f"up_blocks.1.resnets.{i}" for i in range(1, layers + 1)}
        assert few == up | {f"down_blocks.0.resnets.{i}" for i in range(layers - 1)}
        calls.clear()
        ours(*inputs, {ours.deep: FeatureEdit(inject=deep[1:])})
        assert set(calls) == set(ours.sites("resnet"))
