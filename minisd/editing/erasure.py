"""Concept erasure: draw a prompt, or redraw a picture after it, with guidance away from what is
named.

    eps = u + s (c - u) - sum_i w_i (e_i - u)

u, c and e_i are the UNet's answers to the empty (or negative) prompt, the prompt and each concept,
from one call with 2 + n rows a picture. `guide` says how they are joined: `erase` is the formula
above, `sega` picks out the few latent values in which a concept shows most (both in guidance.py).

Sources: Liu et al. 2022 (arXiv 2206.01714), negation; Gandikota et al. 2023 (arXiv 2303.07345) aim
at the same eps by fine-tuning; Brack et al. 2023 (SEGA, arXiv 2301.12247).
"""

from collections.abc import Callable, Sequence

from PIL import Image
from torch import Tensor

from .. import expect
from ..pipeline import as_list, denoise_shown, make_sampler, unchanged
from ..sampling.guidance import Predict, erase
from ..sampling.samplers import Step


def erase_concepts(
    sd,
    image,
    prompt: str | Sequence[str],
    concepts: str | Sequence[str],
    strength: float | None = None,
    erase_scale: float | Sequence[float] = 10.0,
    *,
    negative_prompt: str | Sequence[str] = "",
    steps: int = 50,
    guidance: float = 7.5,
    sampler: str = "dpm++",
    seed: int | Sequence[int] = 0,
    height: int | None = None,
    width: int | None = None,
    guide: Callable[..., Predict] = erase,
    on_step: Callable[[Tensor, Step], Tensor | None] | None = None,
    progress: bool = True,
) -> list[Image.Image]:
    """Draw prompt(s) without some concepts, from noise (image None) or from picture(s) noised to
    `strength` of the way.

    concepts: what to leave out, for all prompts. strength: 0 to 1, without it 0.3; the last
    int(steps * strength) steps are run, and if there are none the picture itself is returned, of
    its own size unless one is given. erase_scale: w, one weight for all concepts or one each; with
    a negative one a concept is added instead. guide: `erase`, `sega` or partial(sega,
    threshold=0.8, ...), called as guide(unet, uncond, cond, concepts, guidance, erase_scale). The
    rest is as in `sd.txt2img` and `sd.img2img`. ValueError for what does not fit.
    """
    prompts, concepts = as_list(prompt), as_list(concepts)
    if not concepts or not all(isinstance(text, str) and text.strip() for text in concepts):
        raise ValueError(
            f"got the concepts {concepts}, expected at least one text, each saying what to leave out"
        )
    if image is None and strength is not None:
        raise ValueError(
            f"strength is {strength!r}, but there is no picture that it could say how far to leave"
        )
    if strength is None:
        strength = 1.0 if image is None else 0.3
    plan = make_sampler(sampler, sd.schedule, steps, strength)
    uncond, cond = sd.condition(prompts, negative_prompt)
    predict = guide(sd.unet, uncond, cond, sd.encode_prompt(concepts), guidance, erase_scale)

    rows, size = len(prompts), (height, width)
    if image is not None:
        pictures = sd.pixels(image, height, width)
        rows, size = expect.rows(pictures=len(pictures), prompts=len(prompts)), pictures.shape[2:]
        if len(plan) == 0:
            kept = unchanged(image, pictures, height, width)
            return kept * (rows // len(kept))
    x = sd.noise(seed, rows, *size)
    if image is not None:
        x = plan.start(sd.encode_image(pictures), x)
    return sd.decode(denoise_shown(x, plan, predict, on_step, progress))
