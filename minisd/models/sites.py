"""The places of a UNet that edits can address: their names, in forward order, and what is there.

    NAME of an Attention                          its map                            self, cross
    NAME.q, NAME.k, NAME.v, NAME.out              its queries, keys, values, output  q, k, v, out
    NAME of a ResnetBlock                         its output                         resnet
    NAME.skip of a ResnetBlock in an up block     the skip, before it joins          skip
    NAME of a Transformer                         its output                         transformer
    down_blocks.0, ..., mid_block, up_blocks.0    what the block hands on            block

An AttentionEdit is for the maps, a FeatureEdit for all others. What a down block hands on is not
its skips: those have sites of their own, where they join.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple, get_args

from .attention import AttentionEdit
from .features import FeatureEdit

Size = int | tuple[int, int]  # of latents, (h, w)
Edits = Mapping[str, AttentionEdit | FeatureEdit]  # by the names of sites
FeatureKind = Literal["feature", "resnet", "transformer", "block", "skip", "q", "k", "v", "out"]
SiteKind = Literal["self", "cross"] | FeatureKind
MAPS = ("self", "cross")
FEATURES = get_args(FeatureKind)[1:]
KINDS: dict[str | None, tuple[str, ...]] = {
    None: MAPS,
    "feature": FEATURES,
    **{kind: (kind,) for kind in (*MAPS, *FEATURES)},
}


class Site(NamedTuple):
    """One place: its kind, how often the latent's sides were halved there, heads of attention."""

    kind: str
    halvings: int
    heads: int | None = None


def sites_of(unet: Any) -> dict[str, Site]:
    """{name: Site} of all places of a UNet, in forward order."""
    last = len(unet.down_blocks) - 1
    levels = [(block, i, min(i + 1, last)) for i, block in enumerate(unet.down_blocks)]
    levels.append((unet.mid_block, last, last))
    levels += [(b, last - i, max(last - i - 1, 0)) for i, b in enumerate(unet.up_blocks)]
    sites: dict[str, Site] = {}
    for block, inside, after in levels:
        sites |= {name: Site(kind, inside, n) for name, kind, n in inside_of(block)}
        sites[block.name] = Site("block", after)
    return sites


def inside_of(block: Any) -> Iterator[tuple[str, str, int | None]]:
    """(name, kind, heads) of the places inside a block, in forward order."""
    attentions = list(block.attentions)
    for i, resnet in enumerate(block.resnets):
        if block.name.startswith("up"):
            yield f"{resnet.name}.skip", "skip", None
        yield resnet.name, "resnet", None
        for transformer in attentions[i : i + 1]:
            for inner in transformer.transformer_blocks:
                for attention, kind in ((inner.attn1, "self"), (inner.attn2, "cross")):
                    *before, out = attention.features
                    for name in before:
                        yield name, name[-1], attention.heads
                    yield attention.name, kind, attention.heads
                    yield out, "out", attention.heads
            yield transformer.name, "transformer", None
