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

import re
from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Literal, Unpack, get_args

import torch
from PIL import Image
from torch import Tensor

from .. import expect
from ..drawing import Drawing, Options, as_list
from ..models.attention import AttentionEdit
from ..models.tokenizer import CLIPTokenizer
from ..recipes import tell
from ..sampling.guidance import StepEdits, with_edits

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
    sizes = [len(negatives), len(prompts)]
    of_images = lambda texts: [drawing.per_image(x, len(prompts)) for x in texts.split(sizes)]
    predict = drawing.rule(sd.network, *of_images(states), drawing.guidance)
    if weights == "bias" and (w != 1).any():
        if (w <= 0).any():
            raise ValueError(f"a weight is {w.min():g}, expected more than 0 for a bias, ln w")
        uncond, cond = of_images(w.log()[:, None, None])

        def edits(groups: Sequence[str]) -> StepEdits:
            bias = torch.cat([uncond if name == "uncond" else cond for name in groups])
            return lambda step: dict.fromkeys(sd.unet.sites("cross"), AttentionEdit(bias=bias))

        predict = with_edits(predict, edits)
    images = sd.decode(drawing.denoise(x, drawing.make_sampler(sd, rows=len(x)), predict))
    return tell(images, sd, "long_prompt", arguments, drawing, prompts)


def parse(prompt: str) -> tuple[str, list[float]]:
    """The prompt without its weights, and the weight of each of its characters."""
    text, *rest = WEIGHTED.split(prompt)
    weights = [1.0] * len(text)
    for word, weight, after in zip(rest[::3], rest[1::3], rest[2::3]):
        try:
            weights += [float(weight)] * len(word) + [1.0] * len(after)
        except ValueError:
            raise ValueError(f"got the weight '({word}:{weight})', expected (word:1.3)") from None
        text += word + after
    return text, weights


def chunks(tokenizer: CLIPTokenizer, prompt: str) -> list[list[tuple[int, float]]]:
    """Rows of max_length (id, weight), <bos> chunk <eos> pads, at least one.

    A token's weight is the mean of its characters'.
    """
    (text, weights), L = parse(prompt), tokenizer.max_length
    each = [fmean(weights[a:b]) for a, b in tokenizer.spans(text)]
    tokens = list(zip(tokenizer.encode(text), each))
    bos, eos, pad = ((i, 1.0) for i in (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id))
    starts = range(0, max(len(tokens), 1), L - 2)
    return [[bos, *tokens[i : i + L - 2], eos, *[pad] * L][:L] for i in starts]


@torch.no_grad()
def encode(sd: "StableDiffusion", prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """States (B, L chunks, D) and weights (B, L chunks) float32 of texts of any length."""
    parts = [chunks(sd.tokenizer, prompt) for prompt in prompts]
    empty, most = chunks(sd.tokenizer, ""), max(map(len, parts))
    rows = [part + empty * (most - len(part)) for part in parts]
    table = torch.tensor(rows, dtype=torch.float64, device=sd.device)  # (B, chunks, L, 2)
    chunk_ids = table[..., 0].long().flatten(0, 1).split(1)
    states = torch.cat([sd.text_encoder(ids) for ids in chunk_ids])
    return states.unflatten(0, (len(rows), most)).flatten(1, 2), table[..., 1].flatten(1).float()


def weighted(states: Tensor, weights: Tensor) -> Tensor:
    """states (B, L, D) times weights (B, L), and times the number that restores each row's mean."""
    wide = states.float()
    new = wide * weights[:, :, None]
    return (new * (wide.mean((1, 2)) / new.mean((1, 2)))[:, None, None]).to(states)
