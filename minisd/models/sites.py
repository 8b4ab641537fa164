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
    """One place: how often the latent's sides are halved there, channels, heads of attention."""

    kind: str
    halvings: int
    channels: int
    heads: int = 0  # 0: no attention
    cross: bool = False  # whether its keys are the text's

    def shape(self, grid: tuple[int, int], tokens: int) -> tuple[int, ...]:
        """Of one row of what is there; `tokens` of the text are the keys of cross-attention."""
        (h, w), H = grid, self.heads
        keys = tokens if self.cross else h * w
        sizes = {"q": (H, h * w, self.channels // max(H, 1)), "out": (h * w, self.channels)}
        sizes |= dict.fromkeys("kv", (H, keys, self.channels // max(H, 1)))
        sizes |= dict.fromkeys(MAPS, (H, h * w, keys))
        return sizes.get(self.kind, (self.channels, h, w))


def sites_of(unet: Any) -> dict[str, Site]:
    """{name: Site} of all places of a UNet, in forward order."""
    last = len(unet.down_blocks) - 1
    levels = [(block, i, min(i + 1, last)) for i, block in enumerate(unet.down_blocks)]
    levels.append((unet.mid_block, last, last))
    levels += [(b, last - i, max(last - i - 1, 0)) for i, b in enumerate(unet.up_blocks)]
    sites: dict[str, Site] = {}
    width = unet.conv_in.out_channels  # of what each layer is given
    for block, inside, after in levels:
        attentions = list(block.attentions)
        for i, resnet in enumerate(block.resnets):
            if block.name.startswith("up"):
                skip = resnet.conv1.in_channels - width
                sites[f"{resnet.name}.skip"] = Site("skip", inside, skip)
            width = resnet.conv1.out_channels
            sites[resnet.name] = Site("resnet", inside, width)
            for transformer in attentions[i : i + 1]:
                for inner in transformer.transformer_blocks:
                    sites |= dict(inside_of(inner, inside, width))
                sites[transformer.name] = Site("transformer", inside, width)
        sites[block.name] = Site("block", after, width)
    return sites


def inside_of(block: Any, halvings: int, channels: int) -> Iterator[tuple[str, Site]]:
    """(name, Site) of the attentions of a transformer's block, in forward order."""
    for name, kind in (("attn1", "self"), ("attn2", "cross")):
        if (attention := getattr(block, name, None)) is None:
            continue
        place = Site(kind, halvings, channels, attention.heads, kind == "cross")
        *before, out = attention.features
        for feature in before:
            yield feature, place._replace(kind=feature[-1])
        yield attention.name, place
        yield out, place._replace(kind="out")
