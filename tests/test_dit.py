"""DiT equals diffusers' model (compat) and an independent rewrite of the published formulas, every
parameter random; its four conditionings, its sizes, its cost and its start."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from oracle import difference
from oracle_dit import KINDS, Published, diffusers_pair, multiply_adds
from tiny import randomise
from torch.utils.flop_counter import FlopCounterMode

import minisd
from minisd import AttentionEdit, DiT, DiTConfig, FeatureEdit
from minisd.models.dit import drop_labels
from minisd.models.dit_config import SIZES, named_config

BAR = 2e-6
TINY = dict(sample_size=8, num_layers=3, num_attention_heads=3, attention_head_dim=8)
TINY |= dict(num_embeds_ada_norm=10)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_dit(seed=0, **changes):
    return randomise(DiT(DiTConfig(**(TINY | changes))), seed)


@torch.no_grad()
def against_diffusers(size, labels, **config):
    reference, state = diffusers_pair(**config)
    dit = DiT(DiTConfig.from_dict(dict(reference.config) | {"compat": "diffusers"})).eval()
    dit.load_state_dict(state, strict=True)
    x, t = randn(len(labels), 4, *size), torch.tensor([999, 0, 500])[: len(labels)]
    expected = reference(x, timestep=t, class_labels=torch.tensor(labels)).sample
    return difference(dit(x, t, dit.embed_labels(labels)), expected)


@pytest.mark.parametrize(
    ("changes", "size"),
    [
        ({}, (8, 8)),
        ({"out_channels": 4}, (8, 8)),
        ({"patch_size": 4}, (8, 8)),
        ({"patch_size": 1, "sample_size": 4}, (4, 4)),
        ({"attention_head_dim": 72, "num_attention_heads": 2}, (8, 8)),
        ({}, (16, 16)),  # a size of which the model was not made: positions are stretched
        ({}, (4, 4)),
    ],
)
def test_equals_diffusers(changes, size, record_property):
    config = {"patch_size": 2, "out_channels": 8} | TINY | changes
    error = against_diffusers(size, [3, 10, 0], **config)
    record_property("DiT, compat diffusers, tiny", error)
    assert error <= BAR


@torch.no_grad()
def against_published(dit, size, labels=None, text=None):
    x = randn(3, 4, *size)
    t = torch.tensor([999, 0, 500])
    context = text if labels is None else dit.embed_labels(labels)
    published = Published(dit.state_dict(), dit.config)
    expected = published(x, t, labels, text)
    return difference(dit(x, t, context), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("changes", [{}, {"patch_size": 4, "attention_head_dim": 72}])
def test_equals_the_published_formulas(kind, changes, record_property):
    dit = random_dit(conditioning=kind, **changes)
    error = against_published(dit, (8, 8), [3, 10, 0])
    record_property("DiT, published, tiny", error)
    assert error <= BAR


@pytest.mark.parametrize("kind", ["adaln_zero", "adaln"])
def test_with_a_text(kind, record_property):
    """Each block attends to a text, and the time alone enters by the norms."""
    dit = random_dit(conditioning=kind, cross_attention_dim=20, num_embeds_ada_norm=None)
    error = against_published(dit, (8, 8), text=randn(3, 11, 20, seed=2))
    record_property("DiT, published, tiny", error)
    assert error <= BAR


@pytest.mark.full
def test_b_2_at_full_size(record_property):
    """DiT-B/2 for 256 x 256: 131 M parameters, against both oracles."""
    config = dict(num_layers=12, num_attention_heads=12, attention_head_dim=64, patch_size=2)
    config |= dict(sample_size=32, out_channels=8, num_embeds_ada_norm=1000)
    error = against_diffusers((32, 32), [207], **config)
    record_property("DiT-B/2, compat diffusers", error)
    assert error <= BAR
    dit = randomise(DiT(named_config("B/2")), 1)
    x, t, label = randn(1, 4, 32, 32), torch.tensor([321]), [1000]
    with torch.no_grad():
        expected = Published(dit.state_dict(), dit.config)(x, t, label)
        error = difference(dit(x, t, dit.embed_labels(label)), expected)
    record_property("DiT-B/2, published", error)
    assert error <= BAR


def test_the_oracles_disagree_where_the_page_says():
    """What `compat` decides is seen: 4 to 6 percent by the frequencies of the time."""
    dit = random_dit()
    other = DiT(DiTConfig(**TINY, compat="diffusers")).eval()
    other.load_state_dict(dit.state_dict())
    x, t, y = randn(2, 4, 8, 8), torch.tensor([900, 30]), dit.embed_labels([1, 2])
    assert difference(other(x, t, y), dit(x, t, y)) > 1e-3


# ---- sizes


@pytest.mark.parametrize("size", [(8, 16), (6, 2), (16, 4)])
def test_latents_need_not_be_square(size):
    """Sizes that the patch divides; positions as of the published table, stretched side by side."""
    dit = random_dit()
    x, t, y = randn(1, 4, *size), torch.tensor(7), dit.embed_labels([4])
    assert dit(x, t, y).shape == (1, 8, *size)
    h, w = size[0] // 2, size[1] // 2
    places = dit.positions(h, w).reshape(h, w, 4, 6)
    omega = 10000 ** (-torch.arange(6) / 6)
    expected = torch.sin(torch.tensor(4 / w * (w - 1)) * omega)
    torch.testing.assert_close(places[0, w - 1, 0].float(), expected)
    torch.testing.assert_close(places[h - 1, 0, 3].float(), torch.cos(4 / h * (h - 1) * omega))
    # Transposed weights and positions see the transposed latent: nothing else knows a side.
    turned = DiT(dit.config).eval()
    turned.load_state_dict(dit.state_dict())
    weight = turned.pos_embed.proj.weight
    weight.data = weight.data.transpose(2, 3).contiguous()
    out = turned.proj_out_2
    for tensor in (out.weight, out.bias):
        grid = tensor.data.unflatten(0, (2, 2, 8)).transpose(0, 1)
        tensor.data = grid.flatten(0, 2).contiguous()
    swap = lambda h, w: dit.positions(w, h).reshape(w, h, -1).transpose(0, 1).flatten(0, 1)
    turned.positions = swap
    turned_out = turned(x.transpose(2, 3).contiguous(), t, y).transpose(2, 3)
    torch.testing.assert_close(turned_out, dit(x, t, y), rtol=0, atol=1e-5)


# ---- rows, times, labels


@pytest.mark.parametrize("kind", [*KINDS, "text"])
def test_groups_in_one_call_equal_calls_of_their_own(kind):
    text = kind == "text"
    how = dict(cross_attention_dim=20, num_embeds_ada_norm=None) if text else {"conditioning": kind}
    dit = random_dit(**how)
    x, t = randn(2, 4, 8, 8), torch.tensor([10, 800])
    context = randn(6, 5, 20, seed=3) if text else dit.embed_labels([10, 10, 3, 4, 0, 9])
    together = dit(x, t, context)
    alone = torch.cat([dit(x, t, rows) for rows in context.split(2)])
    torch.testing.assert_close(together, alone, rtol=0, atol=2e-6)
    prepared = dit(x, dit.prepare_times(t), dit.prepare(context))
    torch.testing.assert_close(prepared, together, rtol=0, atol=1e-6)
    one_time = dit(x, torch.tensor(10), context)
    torch.testing.assert_close(one_time, dit(x, torch.tensor([10, 10]), context))


def test_labels():
    dit = random_dit()
    y = dit.embed_labels([0, 10])
    assert y.shape == (2, 1, 24) and dit.labels == 10
    assert torch.equal(y[:, 0], dit.class_embedder.embedding_table.weight[[0, 10]])
    for labels, message in (
        ([11], "label is 11, expected a whole number from 0 to 10"),
        ([-1], "label is -1"),
        ([1.5], "label is 1.5"),
    ):
        with pytest.raises(ValueError, match=message):
            dit.embed_labels(labels)
    with pytest.raises(ValueError, match="takes no labels"):
        random_dit(cross_attention_dim=8, num_embeds_ada_norm=None).embed_labels([1])


def test_labels_are_dropped_in_their_share():
    labels = torch.arange(20_000) % 10
    dropped = drop_labels(labels, 10, 0.1, torch.Generator().manual_seed(0))
    gone = dropped == 10
    assert abs(gone.float().mean().item() - 0.1) < 0.01
    assert torch.equal(dropped[~gone], labels[~gone])


# ---- the start, the cost


@pytest.mark.parametrize("kind", [*KINDS, "text"])
def test_the_start(kind):
    """A new network gives 0, and each adaLN-Zero block is the identity."""
    text = kind == "text"
    how = dict(cross_attention_dim=20, num_embeds_ada_norm=None) if text else {"conditioning": kind}
    dit = DiT(DiTConfig(**(TINY | how)))
    context = randn(2, 5, 20) if text else dit.embed_labels([1, 2])
    seen = []
    for block in dit.transformer_blocks:
        block.register_forward_hook(lambda module, args, out: seen.append((args[0], out)))
    out = dit(randn(2, 4, 8, 8), torch.tensor([5, 900]), context)
    assert torch.equal(out, torch.zeros(2, 8, 8, 8))
    same = [torch.equal(a, b) for a, b in seen]
    assert same == [kind in ("adaln_zero", "text")] * 3


GFLOPS = {  # table 4 of the paper and the published figures, multiply-adds at 256 x 256
    "S/8": 0.36,
    "S/4": 1.41,
    "S/2": 6.06,
    "B/8": 1.42,
    "B/4": 5.57,
    "B/2": 23.01,
    "L/8": 5.01,
    "L/4": 19.70,
    "L/2": 80.70,
    "XL/8": 7.39,
    "XL/4": 29.04,
    "XL/2": 118.62,
}
MILLIONS = {"S/2": 33, "B/2": 130, "L/2": 458, "XL/2": 675}


@torch.no_grad()
def gflops(name, size=32):
    """(half of what torch counts, which takes a multiply-add for two operations; the formula;
    millions of parameters)."""
    with torch.device("meta"):
        dit = DiT(named_config(name, sample_size=size))
        x, t = torch.empty(1, 4, size, size), torch.empty(1, dtype=torch.int64)
        y = torch.empty(1, 1, dit.config.width)
    dit.attention = "reference"
    with FlopCounterMode(display=False) as counter:
        dit(x, t, y)
    parameters = sum(p.numel() for p in dit.parameters()) / 1e6
    return counter.get_total_flops() / 2e9, multiply_adds(dit.config, size, size) / 1e9, parameters


@pytest.mark.parametrize("name", GFLOPS)
def test_gflops(name):
    counted, formula, parameters = gflops(name)
    assert counted == formula, name
    assert counted == pytest.approx(GFLOPS[name], abs=0.0051), name
    if name in MILLIONS:
        assert parameters == pytest.approx(MILLIONS[name], abs=0.6)


def test_gflops_at_512():
    counted, formula, _ = gflops("XL/2", 64)
    assert counted == formula and counted == pytest.approx(524.5, abs=0.15)


# ---- attention sites


@pytest.mark.parametrize("kind", [*KINDS, "text"])
def test_sites_take_edits(kind):
    """An edit that saves a map, injects it, and replaces a row's map by another's, at each site."""
    text = kind == "text"
    how = dict(cross_attention_dim=20, num_embeds_ada_norm=None) if text else {"conditioning": kind}
    dit = random_dit(**how)
    x, t = randn(2, 4, 8, 8), torch.tensor(100)
    context = randn(2, 5, 20, seed=3) if text else dit.embed_labels([3, 4])
    crossed = text or kind == "cross_attention"
    names = [f"transformer_blocks.{i}.attn{j}" for i in range(3) for j in range(1, 2 + crossed)]
    assert dit.sites() == names and dit.grid(names[0]) == (4, 4)
    assert dit.sites("cross") == [name for name in names if name.endswith("2")]
    assert dit.sites(max_tokens=16) == names and dit.sites(max_tokens=15) == []
    plain = dit(x, t, context)
    queries = 18 if kind == "in_context" else 16
    for name in names:
        keys = queries if name.endswith("1") else context.shape[1] if text else 2
        saved = torch.zeros(2, 3, queries, keys)
        edited = dit(x, t, context, {name: AttentionEdit(save=saved)})
        torch.testing.assert_close(edited, plain, rtol=0, atol=1e-5)
        torch.testing.assert_close(saved.sum(-1), torch.ones(2, 3, queries))
        back = dit(x, t, context, {name: AttentionEdit(inject=saved)})
        torch.testing.assert_close(back, plain, rtol=0, atol=1e-5)
        moved = dit(x, t, context, {name: AttentionEdit(source_row=torch.tensor([0, 0]))})
        torch.testing.assert_close(moved[0], plain[0], rtol=0, atol=1e-5)
        assert difference(moved[1], plain[1]) > 1e-4
    with pytest.raises(ValueError, match="no site is called"):
        dit(x, t, context, {"attn9": AttentionEdit()})


@pytest.mark.parametrize("impl", ["sdpa", "reference"])
def test_implementations_agree_and_differentiate(impl):
    dit = random_dit(attention_head_dim=72)
    x, t, y = randn(1, 4, 8, 8), torch.tensor(3), dit.embed_labels([2])
    run = partial(dit, x, t, y.detach(), attention=impl)
    plain, kept = run(), run(recompute=True)
    torch.testing.assert_close(plain, kept)
    torch.testing.assert_close(plain, dit(x, t, y), rtol=0, atol=1e-5)
    weight = dit.transformer_blocks[0].norm1.linear.weight
    one, other = (torch.autograd.grad(out.square().sum(), weight)[0] for out in (plain, kept))
    torch.testing.assert_close(one, other)
    assert one.abs().max() > 0


@pytest.mark.parametrize("kind", ["adaln_zero", "in_context", "text"])
def test_one_graph(kind):
    text = kind == "text"
    how = dict(cross_attention_dim=20, num_embeds_ada_norm=None) if text else {"conditioning": kind}
    dit = random_dit(**how)
    x, t = randn(2, 4, 8, 8), torch.tensor(100)
    context = randn(4, 5, 20, seed=3) if text else dit.embed_labels([3, 4, 10, 10])
    compiled = torch.compile(dit, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, t, context), dit(x, t, context), rtol=0, atol=1e-5)


# ---- what is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"out_channels": 5}, "out_channels: got 5, expected 4, or 8 with a learned variance"),
        ({"attention_head_dim": 2, "num_attention_heads": 1}, "the width is 2, expected a multi"),
        (
            {
                "conditioning": "in_context",
                "cross_attention_dim": 8,
                "num_embeds_ada_norm": None,
            },
            "conditioning is 'in_context' of a text, expected 'adaln_zero' or 'adaln'",
        ),
        ({"cross_attention_dim": 8}, "one condition"),
        ({"num_embeds_ada_norm": None}, "one condition"),
    ],
)
def test_bad_configs(changes, message):
    with pytest.raises(ValueError, match=message):
        DiTConfig(**(TINY | changes))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"norm_type": "ada_norm"}, "norm_type: got 'ada_norm', supported is 'ada_norm_zero'"),
        ({"activation_fn": "geglu"}, "activation_fn"),
        ({"conditioning": "none"}, "conditioning: got 'none', supported are adaln_zero, adaln"),
        ({"caption_channels": 9}, "caption_channels: got 9, but this key is unknown"),
    ],
)
def test_configs_are_read_strictly(values, message):
    with pytest.raises(ValueError, match=message):
        DiTConfig.from_dict(values)


def test_bad_inputs():
    dit = random_dit()
    y = dit.embed_labels([1])
    for x, t, context, message in (
        (randn(1, 4, 7, 8), torch.tensor(1), y, "latents of 7 x 8, expected multiples of the pat"),
        (randn(1, 3, 8, 8), torch.tensor(1), y, r"x: got \(1, 3, 8, 8\)"),
        (randn(1, 4, 8, 8), 1, y, "t: got 1, expected a tensor"),
        (randn(2, 4, 8, 8), torch.tensor(1), y, "context: got 1 rows for 2 latents"),
        (randn(1, 4, 8, 8), torch.tensor(1), randn(1, 2, 24), r"context: got \(1, 2, 24\)"),
        (randn(1, 4, 8, 8), torch.tensor(1), {}, "got keys and values, expected what embed_lab"),
    ):
        with pytest.raises(ValueError, match=message):
            dit(x, t, context)
    assert set(SIZES) == {"S", "B", "L", "XL"}
    with pytest.raises(ValueError, match="got 'M/2', expected one of S, B, L, XL"):
        named_config("M/2")


@pytest.mark.parametrize("kind", [*KINDS, "text"])
def test_features_are_edited(kind):
    """Saved and injected again nothing changes; the row of another, or a factor, does."""
    text = kind == "text"
    how = dict(cross_attention_dim=20, num_embeds_ada_norm=None) if text else {"conditioning": kind}
    dit = random_dit(**how)
    x, t = randn(2, 4, 8, 8), torch.tensor(100)
    context = randn(2, 5, 20, seed=3) if text else dit.embed_labels([3, 4])
    plain = dit(x, t, context)
    sites = dit.sites("feature")
    attentions = 2 if text or kind == "cross_attention" else 1
    assert len(sites) == 3 * (4 * attentions + 1) and dit.sites("block") == [
        f"transformer_blocks.{i}" for i in range(3)
    ]
    for site in sites:
        saved = torch.zeros(2, *dit.shape(site, tokens=5 if text else None))
        same = dit(x, t, context, {site: FeatureEdit(save=saved)})
        torch.testing.assert_close(same, plain, rtol=0, atol=1e-5)
        assert saved.abs().max() > 0
        back = dit(x, t, context, {site: FeatureEdit(inject=saved)})
        torch.testing.assert_close(back, plain, rtol=0, atol=1e-5)
        moved = dit(x, t, context, {site: FeatureEdit(source_row=torch.tensor([0, 0]))})
        torch.testing.assert_close(moved[0], plain[0], rtol=0, atol=1e-5)
        assert difference(moved[1], plain[1]) > 1e-5
    assert dit.heads(dit.sites()[0]) == 3
    # Of the conditional half alone, where the groups are one until the edit.
    four = torch.cat([context, context])
    saved = torch.zeros(2, *dit.shape("transformer_blocks.0.attn1.q"))
    edits = {"transformer_blocks.0.attn1.q": FeatureEdit(save=saved)}
    torch.testing.assert_close(dit(x, t, four, edits)[2:], plain, rtol=0, atol=1e-5)


# ---- in place of the UNet


def test_what_edits_a_unet_edits_a_dit():
    """Prompt-to-prompt with a local blend, heat maps and erasure, by a DiT that takes the text."""
    sd = minisd.load("shapes", device="cpu")
    dit = random_dit(cross_attention_dim=128, num_embeds_ada_norm=None, out_channels=4)
    own = replace(sd, unet=dit)
    how = dict(steps=3, sampler="ddim", height=32, width=32, progress=False)
    prompts = ["a red circle", "a blue circle"]
    plain = own.txt2img(prompts, seed=[0, 0], **how)
    source, target = minisd.edit_prompt(own, *prompts, local_blend=["red", "blue"], **how)
    drawn, same, edited = (
        torch.tensor(list(image.tobytes())) for image in (plain[0], source, target)
    )
    assert (drawn - same).abs().max() <= 1 and (edited - same).abs().max() > 1
    images, maps = minisd.heatmap(own, prompts[0], **how)
    word = maps.word("circle")
    assert word.shape[-2:] == (4, 4) and word.min() >= 0 and len(images) == 1
    [image] = minisd.erase_concepts(own, None, prompts[0], ["circle"], **how)
    assert image.size == (32, 32)
