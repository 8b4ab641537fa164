"""The methods of drawing and editing, on a model of any size: what `compile` and `graph` have to
hold for."""

from functools import partial

import torch

import minisd
from minisd.viewing.images import to_pil, to_tensor

PROMPTS = ["a red circle", "a red square"]


def methods(sd):
    """name -> (drawing or editing, the CUDA graphs of the UNet that it captures).

    0: it finds one of those before, among the KEPT that were used last.
    """
    options = dict(steps=4, progress=False)
    size = sd.unet.config.sample_size * sd.vae.factor
    image = image_of(size)

    def there_and_back(refine=0):
        inversion = minisd.invert(sd, image, PROMPTS[0], refine=refine, **options)
        return minisd.redraw(sd, inversion, PROMPTS[1], guidance=3, progress=False)

    def null_text():
        inversion = minisd.invert(sd, image, PROMPTS[0], trajectory=True, **options)
        found = minisd.null_text(sd, inversion, 3.0, inner_steps=2, progress=False)
        return minisd.redraw(sd, found, PROMPTS[1], progress=False)

    words = PROMPTS[0].split()[-1], PROMPTS[1].split()[-1]
    edits = dict(reweight={words[1]: 2.0}, local_blend=words)
    recording = minisd.record(sd, PROMPTS[0], **options)
    mask = torch.zeros(size, size).index_fill(1, torch.arange(size // 2), 1.0)
    drawn = {
        "dpm++": (lambda: sd.txt2img(PROMPTS, **options), 1),
        "ddim": (lambda: sd.txt2img(PROMPTS, sampler="ddim", **options), 0),
        "no guidance": (lambda: sd.txt2img(PROMPTS, guidance=1, sampler="ddim", **options), 1),
        "img2img": (lambda: sd.img2img(image, PROMPTS[0], **options), 1),
        "on_step": (lambda: sd.txt2img(PROMPTS[0], on_step=lambda x, step: 0.9 * x, **options), 0),
        "blend": (lambda: minisd.blend(sd, image, mask, PROMPTS[0], **options), 0),
        "prompt-to-prompt": (lambda: minisd.edit_prompt(sd, *PROMPTS, **edits, **options), 1),
        "record": (lambda: minisd.record(sd, PROMPTS[0], **options).z, 1),
        "replay": (lambda: minisd.replay(sd, recording, PROMPTS[1], progress=False), 1),
        "invert, redraw": (there_and_back, 1),
        "fixed-point inversion": (lambda: there_and_back(refine=1), 0),
        "edict": (lambda: minisd.edict(sd, image, *PROMPTS, **options), 0),
        "null-text": (null_text, 1),
    }
    return drawn | loops(sd) | on_attention(sd, options)


def loops(sd):
    """The same of guidance and samplers in a loop of one's own."""
    cond, uncond, x = sd.encode_prompt(PROMPTS), sd.encode_prompt([""]), sd.noise(3, batch=2)
    each = [uncond * (1 + 0.1 * i) for i in range(4)]
    network, ddim = sd.network, minisd.DDIM(sd.schedule, 4)
    eta, inverse = (minisd.DDIM(sd.schedule, 4, **k) for k in ({"eta": 0.7}, {"inverse": True}))
    sega = partial(minisd.sega, network, uncond, cond, cond[:1], warmup=1)
    erased = partial(minisd.erase, network, uncond, cond, cond[:1])

    def loop(sampler, predict):
        return lambda: minisd.denoise(x, sampler, predict)

    return {
        "eta": (loop(eta, minisd.cfg(network, uncond, cond, 3.0)), 0),
        "inverse": (loop(inverse, minisd.conditional(network, cond)), 0),
        "erase": (loop(ddim, erased()), 1),
        "erase, less": (loop(ddim, erased(erase_scale=1.0)), 0),
        "uncond for each step": (loop(ddim, minisd.cfg(network, each, cond, 3.0)), 1),
        "sega": (loop(ddim, sega()), 0),
        "sega, elsewhere": (loop(ddim, sega(threshold=0.5)), 0),
    }


def on_attention(sd, options):
    """The methods on edits of attention and of features."""
    size = sd.unet.config.sample_size * sd.vae.factor
    mask = torch.zeros(size, size).index_fill(1, torch.arange(size // 2), 1.0)
    image, long, weighted = image_of(size), f"{PROMPTS[0]} " * 12, "a (red:2.0) circle"
    word = PROMPTS[0].split()[-1]
    freeu = partial(minisd.cfg, edits=minisd.freeu(sd.unet))
    deep = partial(minisd.deep_cache, unet=sd.unet, every=2)
    return {
        "freeu": (lambda: sd.txt2img(PROMPTS, rule=freeu, **options), 1),
        "deep cache": (lambda: sd.txt2img(PROMPTS, rule=deep, **options), 2),
        "pag": (lambda: sd.txt2img(PROMPTS, rule=minisd.pag, **options), 1),
        "seg": (lambda: sd.txt2img(PROMPTS, rule=minisd.seg, **options), 1),
        "plug-and-play": (lambda: minisd.plug_and_play(sd, *PROMPTS, **options), 1),
        "style": (lambda: minisd.style_aligned(sd, *PROMPTS, **options), 1),
        "masactrl": (lambda: minisd.masactrl(sd, *PROMPTS, start=1, **options), 1),
        "regional": (lambda: minisd.regional(sd, PROMPTS[0], {PROMPTS[1]: mask}, **options), 1),
        "long prompt": (lambda: minisd.long_prompt(sd, long, **options), 1),
        "weights": (lambda: minisd.long_prompt(sd, weighted, "bias", **options), 1),
        "daam": (lambda: minisd.heatmap(sd, PROMPTS[0], **options)[0], 1),
        "diffedit": (lambda: minisd.diffedit(sd, image, *PROMPTS, noises=2, **options), 2),
        "excite": (lambda: minisd.attend_and_excite(sd, PROMPTS[0], word, **options), 0),
    }


def image_of(size: int):
    """An image that any model can be given, in which no two places are alike."""
    return to_pil(torch.linspace(-1, 1, 3 * size * size).view(1, 3, size, size))[0]


def as_tensor(result):
    """Latents as they are, images as a tensor (B, 3, H, W)."""
    if isinstance(result, torch.Tensor):
        return result
    return to_tensor(result, result[0].height, result[0].width)
