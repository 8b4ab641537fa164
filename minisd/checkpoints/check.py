"""Is this checkpoint what it says it is? `minisd check SOURCE`, and v1.4's acceptance values.

The sha256 of the published files are those of the Git LFS pointers of the Hub's model repositories
(CompVis' stable-diffusion-v1-4 at 133a221, main); the acceptance values are those of diffusers' own
test of that model, tests/pipelines/stable_diffusion/test_stable_diffusion.py.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..models.tokenizer import CLIPTokenizer
from ..sampling.guidance import cfg
from ..sampling.loop import denoise
from ..sampling.samplers import DDIM
from .header import Entry
from .load import Checkpoint, build_models, is_finite
from .sources import SHORT_NAMES, CheckpointError, bundled, sha256
from .tensor_file import read_tensors

if TYPE_CHECKING:  # what draws is handed in: the pipeline stands above this layer
    from ..pipeline import StableDiffusion

# True: it is right. False: it is not. None: there is nothing to compare it with. And what to say.
Finding = tuple[bool | None, str]
V1_4 = SHORT_NAMES["sd-v1-4"]
PUBLISHED = {  # sha256, or how it starts -> whose and what
    "145a07e0f05ec5bbe6e2e9faf608bdb311caf708895cac8c8ed713c59864e1e8": (V1_4, "unet"),
    "a35404d03ec8f977715a4d2a080ddf72e2144f2ee49bb1ee213258bc64f9cc87": (V1_4, "unet, fp16"),
    "ac3d1bff03f9e9a6f8671b5a7a3fd984f90185c84e407bc569f97c1cce7445fd": (V1_4, "unet, non_ema"),
    "a2b5134f4dbc140d9c11f11cba3233099e00af40f262f136c691fb7d38d2194c": (V1_4, "vae"),
    "4fbcf0ebe55a0984f5a5e00d8c4521d52359af7229bb4d81890039d2aa16dd7c": (V1_4, "vae, fp16"),
    "7b3a12df205cb3c74dd4eae4354d93f606ae6b3bc29d5d06fd97921cb9ad8a81": (V1_4, "text_encoder"),
    "77795e2023adcf39bc29a884661950380bd093cf0750a966d473d1718dc9ef4e": (
        V1_4,
        "text_encoder, fp16",
    ),
    "6ce0161689b3": ("v1-5-pruned-emaonly.safetensors", "all three"),
    "1a189f0be69d": ("v1-5-pruned.safetensors", "all three, and their averages"),
    "a2bf730a0c7d": ("openai/clip-vit-large-patch14", "a whole CLIP"),
}
CLIP_MERGES = "9fd691f7c8039210e0fced15865466c65820d09b63988b0174bfe25de299051a"  # merges.txt
# vocab.json, its keys sorted
CLIP_VOCABULARY = "e089ad92ba36837a0d31433e555c8f45fe601ab5c221d4f607ded32d9f7a4349"
ASTRONAUT = "a photograph of an astronaut riding a horse"
ASTRONAUT_IDS = [320, 8853, 539, 550, 18376, 6765, 320, 4558]
ACCEPTANCE = [0.38019, 0.28647, 0.27321, 0.40377, 0.38290, 0.35446, 0.39218, 0.38165, 0.42239]
TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def digests(checkpoint: Checkpoint) -> dict[Path, str]:
    """The sha256 of a checkpoint's weights files."""
    return {path: sha256(path) for path in dict.fromkeys(checkpoint.files.values())}


def check_files(
    checkpoint: Checkpoint, digests: dict[Path, str], repo: str | None
) -> Iterator[Finding]:
    """Compare the files with what was published, their tensors and vocabulary with the models.

    repo: the Hub repo that the files are said to come from. Of a repo that is not in PUBLISHED
    (v1.5's folder is not) the Hub's cache knows the sums that the Hub gave when the files came.
    """
    ours: dict[str, str] = {}
    for name, sha in listed().items():
        ours.setdefault(sha, name)  # models share an autoencoder
    for path, sha in digests.items():
        whose, what = published(sha) or ("weights/README.md", ours.get(sha))
        if what is not None:
            yield True, f"{path} is {what} of {whose}"
        elif repo == V1_4 or path.parent.parent in bundled().values():
            yield False, f"{path} is not a file of {repo or 'minisd'} that is known: sha256 {sha}"
        elif repo is not None and (blob := blob_name(path)):
            yield blob == sha, f"{path}: sha256 {sha}, {repo} has {blob} there"
        else:
            where = repo or "this source"
            yield (
                None,
                f"{path}: minisd knows no sha256 of {where} to compare it with; it is {sha}",
            )
    try:
        _, entries = build_models(checkpoint)
    except CheckpointError as error:
        yield False, str(error)
        return
    for part, tensors in entries.items():
        yield True, f"{part}: {len(tensors)} tensors, all names and shapes"
        yield check_values(part, checkpoint.files[part], tensors)
    yield from check_vocabulary(checkpoint.tokenizer)


def check_values(part: str, path: Path, entries: dict[str, Entry]) -> Finding:
    """Whether every value of a part's tensors is finite."""
    bad = [name for name, tensor in read_tensors(path, entries) if not is_finite(tensor)]
    if not bad:
        return True, f"{part}: all values finite"
    shown = f"{', '.join(bad[:5])}{' ...' if len(bad) > 5 else ''}"
    return False, f"{part}: NaN or infinite values in {len(bad)}: {shown}"


def check_vocabulary(tokenizer: CLIPTokenizer) -> Iterator[Finding]:
    """Whether the vocabulary is CLIP's, and whether texts come back from their ids."""
    merges = "\n".join(["#version: 0.2", *(" ".join(pair) for pair in tokenizer.merges), ""])
    vocabulary = json.dumps(tokenizer.vocab, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    got = [hashlib.sha256(text.encode()).hexdigest() for text in (vocabulary, merges)]
    is_clip = got == [CLIP_VOCABULARY, CLIP_MERGES]
    if is_clip:
        yield True, "vocabulary: CLIP's"
    else:
        yield None, f"vocabulary: {len(tokenizer.vocab)} pieces, not CLIP's"
    for text in (ASTRONAUT, "zürich, 2 cats & 雪 !"):
        ids = tokenizer.encode(text)
        back = tokenizer.decode(ids)
        # Spaces are not kept, but after each word one: those of the text and of the answer are left
        # out.
        right = re.sub(r"\s", "", back) == re.sub(r"\s", "", text) and ids == tokenizer.encode(back)
        right = right and not (is_clip and text == ASTRONAUT and ids != ASTRONAUT_IDS)
        yield right, f"vocabulary: {text!r} -> {len(ids)} ids -> {back!r}"


def check_image(sd: "StableDiffusion", is_v1_4: bool) -> Iterator[Finding]:
    """Draw the image of `acceptance`: v1.4's has known values, others' must be no flat field."""
    if sd.unet.config.in_channels != sd.channels:
        yield None, "an inpainting model: no image is drawn without a mask"
        return
    image, values = acceptance(sd)
    spread = image.float().std().item()
    fine = bool(image.isfinite().all()) and spread > 0.01
    yield fine, f"an image in 3 steps: standard deviation {spread:.3f}"
    if is_v1_4:
        expected = torch.tensor(ACCEPTANCE, dtype=torch.float32, device="cpu")
        off, most = (values - expected).abs().max().item(), TOLERANCE[sd.dtype]
        yield (
            off <= most,
            f"v1.4's acceptance values: off by {off:.1e}, expected at most {most:.0e} in "
            f"{sd.dtype}",
        )


@torch.no_grad()
def acceptance(sd: "StableDiffusion") -> tuple[Tensor, Tensor]:
    """The astronaut in 3 steps of DDIM, guidance 7.5, from NumPy's noise -> image, values.

    image: (1, 3, H, W) in [0, 1]. values: the nine of its blue channel in the lower right corner,
    row by row.
    """
    shape = (1, sd.channels, *sd.latent_size(None, None))
    x = torch.from_numpy(np.random.RandomState(0).standard_normal(shape)).to(sd.device, sd.dtype)
    uncond, cond = sd.encode_prompt(["", ASTRONAUT]).split(1)
    x = denoise(x, DDIM(sd.schedule, 3), cfg(sd.network, uncond, cond, 7.5))
    image = sd.decode(x, as_tensor=True)
    assert isinstance(image, Tensor)
    image = image / 2 + 0.5
    return image, image[0, -1, -3:, -3:].flatten().float().cpu()


def blob_name(path: Path) -> str | None:
    """The sha256 by which the Hub's cache keeps a file.

    snapshots/COMMIT/FILE is a link to blobs/SHA256.
    """
    name = path.resolve().name
    return name if path.is_symlink() and re.fullmatch("[0-9a-f]{64}", name) else None


def published(sha: str) -> tuple[str, str] | None:
    """Whose and what the file of that sha256 is, of those in PUBLISHED."""
    return next((whose for start, whose in PUBLISHED.items() if sha.startswith(start)), None)


def is_v1_4(digests: dict[Path, str]) -> bool:
    """Whether all three models are the published v1.4's, in either precision."""
    known = [published(sha) for sha in digests.values()]
    return all(each is not None and each[0] == V1_4 and "non_ema" not in each[1] for each in known)


def listed() -> dict[str, str]:
    """The sha256 of the bundled models' files, {MODEL/FILE: sha256}, from weights/README.md."""
    table = (bundled()["shapes"].parent / "README.md").read_text(encoding="utf-8")
    return dict(re.findall(r"^\| `([\w./-]+)` \| `([0-9a-f]{64})` \|$", table, re.M))
