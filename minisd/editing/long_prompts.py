"""Prompts of any length, and words that weigh more or less: "a (red:1.3) circle".

Tokens are cut into chunks of 75, each of which becomes a row with <bos> and <eos>, goes through the
text encoder by itself, and lies beside the others: (B, 77 chunks, D). A text with fewer chunks than
others of the batch gets empty ones. A weight w acts in one of two ways:

    embedding   the token's state times w; then all states times one number that restores their mean
    bias        ln w is added to the token's scores in every cross-attention: its exponentials
                times w, before the softmax divides by their sum

Source: the long prompt weighting of AUTOMATIC1111's web UI and of diffusers' community pipeline
(embedding).
"""

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, Unpack, get_args

import torch
from PIL import Image
from torch import Tensor

from .. import expect
from ..drawing import Drawing, Options, as_list
from ..models.attention import AttentionEdit
from ..models.tokenizer import CLIPTokenizer
from ..recipes import tell
from ..sampling.guidance import Edits, with_edits

if TYPE_CHECKING:
    from ..pipeline import StableDiffusion

Weights = Literal["embedding", "bias"]
WEIGHTED = re.compile(r"\(([^()]*):\s*([+-]?[\d.]+)\s*\)")


def long_prompt(
    sd: "StableDiffusion",
    prompt: str | Sequence[str],
    weights: Weights = "embedding",
    **options: Unpack[Options],
) -> list[Image.Image]:
    """Draw prompt(s) of any length in which (word:1.3) has a weight; the negative prompt, too.

    weights: "embedding" or "bias", see above. options: see `minisd.drawing.Drawing`. ValueError for
    a weight that is no number, and for 0 and less as a bias.
    """
    arguments = dict(locals())
    drawing, prompts = Drawing.of(options, without=("uncond",)), as_list(prompt)
    if weights not in get_args(Weights):
        raise ValueError(f"weights is {weights!r}, expected one of {get_args(Weights)}")
    negatives = as_list(drawing.negative_prompt)
    expect.rows("prompts", prompts=len(prompts), negative_prompts=len(negatives))
    x = drawing.noise(sd, len(prompts) * drawing.num_images)
    states, w = encode(sd, [*negatives, *prompts])
    if weights == "embedding":
        states = weighted(states, w)
    parts = [(negatives, slice(len(negatives))), (prompts, slice(len(negatives), None))]
    uncond, cond = (drawing.per_image(states[rows], len(prompts)) for _, rows in parts)
    predict = drawing.rule(sd.network, uncond, cond, drawing.guidance)
    if weights == "bias" and (w != 1).any():
        if (w <= 0).any():
            raise ValueError(f"a weight is {w.min():g}, expected more than 0 for a bias, ln w")
        of_no_text, of_text = (drawing.per_image(w[rows].log(), len(prompts)) for _, rows in parts)

        def edits(groups: Sequence[str]) -> Edits:
            each = [of_no_text if name == "uncond" else of_text for name in groups]
            bias = AttentionEdit(bias=torch.cat(each)[:, None, None])
            everywhere = dict.fromkeys(sd.unet.sites("cross"), bias)
            return lambda step: everywhere

        predict = with_edits(predict, edits)
    images = sd.decode(drawing.denoise(x, drawing.make_sampler(sd, rows=len(x)), predict))
    return tell(images, sd, "long_prompt", arguments, drawing, prompts)


def parse(prompt: str) -> tuple[str, list[tuple[int, int, float]]]:
    """The prompt without its weights, and (start, end, weight) of each span of characters."""
    text, spans, last = "", [], 0
    for match in WEIGHTED.finditer(prompt):
        text += prompt[last : match.start()]
        try:
            spans.append((len(text), len(text) + len(match[1]), float(match[2])))
        except ValueError:
            raise ValueError(f"got the weight {match[0]!r}, expected (word:1.3)") from None
        text, last = text + match[1], match.end()
    return text + prompt[last:], spans


def chunks(tokenizer: CLIPTokenizer, prompt: str) -> tuple[list[list[int]], list[list[float]]]:
    """Rows of max_length ids, <bos> chunk <eos> pads, at least one; and the weight of each id."""
    text, spans = parse(prompt)
    ids, weights = tokenizer.encode(text), [1.0] * len(tokenizer.encode(text))
    for i, (a, b) in enumerate(tokenizer.spans(text)):
        weights[i] *= math.prod(w for start, end, w in spans if a < end and b > start)
    L = tokenizer.max_length
    starts = range(0, max(len(ids), 1), L - 2)
    rows = [[tokenizer.bos_id, *ids[i : i + L - 2], tokenizer.eos_id] for i in starts]
    rows = [row + [tokenizer.pad_id] * (L - len(row)) for row in rows]
    own = [[1.0, *weights[i : i + L - 2]] for i in starts]
    return rows, [row + [1.0] * (L - len(row)) for row in own]


@torch.no_grad()
def encode(sd: "StableDiffusion", prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """States (B, L chunks, D) and weights (B, L chunks) float32 of texts of any length."""
    parts = [chunks(sd.tokenizer, prompt) for prompt in prompts]
    empty, ones = chunks(sd.tokenizer, "")
    most = max(len(rows) for rows, _ in parts)
    states, weights = [], []
    for rows, own in parts:
        spare = most - len(rows)
        ids = torch.tensor(rows + empty * spare, dtype=torch.int64, device=sd.device)
        states.append(torch.cat([sd.text_encoder(row) for row in ids.split(1)], 1))
        weights.append(torch.tensor(own + ones * spare, dtype=torch.float32, device=sd.device))
    return torch.cat(states), torch.stack([w.flatten() for w in weights])


def weighted(states: Tensor, weights: Tensor) -> Tensor:
    """states (B, L, D) times weights (B, L), and times the number that restores each row's mean."""
    wide = states.float()
    new = wide * weights[:, :, None]
    return (new * (wide.mean((1, 2)) / new.mean((1, 2)))[:, None, None]).to(states)
