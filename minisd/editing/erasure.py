"""Concept erasure: draw a prompt, or redraw an image by it, with guidance away from what is named.

    eps = u + s (c - u) - sum_i w_i (e_i - u)

u, c and e_i are the network's answers to the empty (or negative) prompt, the prompt and each
concept, from one call with 2 + n rows an image. `guide` says how they are joined: `erase` is the
formula above, `sega` picks out the few latent values in which a concept shows most (guidance.py).

Sources: Liu et al. 2022 (arXiv 2206.01714), negation; Gandikota et al. 2023 (arXiv 2303.07345) aim
at the same eps by fine-tuning; Brack et al. 2023 (SEGA, arXiv 2301.12247).
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Unpack

from PIL import Image

from .. import expect
from ..drawing import Drawing, Options, as_list, embed
from ..pipeline import ImageInput, unchanged
from ..recipes import tell
from ..sampling.guidance import Predict, erase

if TYPE_CHECKING:
    from ..pipeline import StableDiffusion


def erase_concepts(
    sd: "StableDiffusion",
    image: ImageInput | None,
    prompt: str | Sequence[str],
    concepts: str | Sequence[str],
    strength: float | None = None,
    erase_scale: float | Sequence[float] = 10.0,
    *,
    guide: Callable[..., Predict] = erase,
    **options: Unpack[Options],
) -> list[Image.Image]:
    """Draw prompt(s) without some concepts, from noise (image None) or from image(s) noised.

    concepts: what to leave out, for all prompts. strength: 0 to 1, without it 0.3; the last
    int(steps * strength) steps are run, and if there are none the image itself is returned, of its
    own size unless one is given. erase_scale: w, one weight for all concepts or one each; with a
    negative one a concept is added instead. guide: `erase`, `sega` or partial(sega, threshold=0.8,
    ...), called as guide(network, uncond, cond, concepts, guidance, erase_scale). options: see
    `minisd.drawing.Drawing` (here steps=50). ValueError for what does not fit.
    """
    arguments = dict(locals())
    prompts, concepts = as_list(prompt), as_list(concepts)
    if not concepts or not all(isinstance(text, str) and text.strip() for text in concepts):
        expected = "at least one text, each saying what to leave out"
        raise ValueError(f"got the concepts {concepts}, expected {expected}")
    if image is None and strength is not None:
        why = "there is no image that it could say how far to leave"
        raise ValueError(f"strength is {strength!r}, but {why}")
    drawing = Drawing.of(options, without=("rule",), steps=50)
    if strength is None:
        strength = 1.0 if image is None else 0.3
    plan = drawing.make_sampler(sd, strength)

    pixels, rows = None, len(prompts)
    if image is not None:
        pixels = sd.pixels(image, drawing.height, drawing.width)
        rows = expect.rows(images=len(pixels), prompts=len(prompts))
    sized = drawing if pixels is None else drawing.at(*pixels.shape[2:])
    x = sized.noise(sd, rows * drawing.num_images)
    if image is not None and pixels is not None:
        if len(plan) == 0:
            kept = unchanged(image, pixels, drawing)
            kept = drawing.each(kept * (rows // len(kept)))
            return tell(kept, sd, "erase_concepts", arguments, drawing, prompts)
        x = plan.start(drawing.per_image(sd.encode_image(pixels), rows), x)
    uncond, cond = drawing.embed(sd, prompts * (rows // len(prompts)))
    named = embed(sd, concepts)
    predict = guide(sd.network, uncond, cond, named, drawing.guidance, erase_scale)
    images = sd.decode(drawing.denoise(x, plan, predict))
    return tell(images, sd, "erase_concepts", arguments, drawing, prompts)
