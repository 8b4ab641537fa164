"""minisd: Stable Diffusion v1.x written out so that every tensor can be followed.

The public names below resolve on first use (PEP 562), so that `import minisd` and `minisd --help`
load neither torch nor triton.
"""

from importlib import import_module

__version__ = "0.1.0"

_HOME = {  # public name -> module that defines it
    "load": "pipeline",
    "StableDiffusion": "pipeline",
    "UNet": "models.unet",
    "UNetConfig": "models.unet",
    "AutoencoderKL": "models.vae",
    "VAEConfig": "models.vae",
    "CLIPTextModel": "models.clip",
    "CLIPTextConfig": "models.clip",
    "CLIPTokenizer": "models.tokenizer",
    "AttentionEdit": "models.attention",
    "Attention": "models.attention",
    "NoiseSchedule": "sampling.schedule",
    "Level": "sampling.schedule",
    "Step": "sampling.samplers",
    "DDIM": "sampling.samplers",
    "DPMpp2M": "sampling.samplers",
    "denoise": "sampling.samplers",
    "conditional": "sampling.guidance",
    "cfg": "sampling.guidance",
    "erase": "sampling.guidance",
    "sega": "sampling.guidance",
    "edit_prompt": "editing.prompt_to_prompt",
    "PromptToPrompt": "editing.prompt_to_prompt",
    "LocalBlend": "editing.local_blend",
    "Maps": "editing.maps",
    "blend": "editing.blended",
    "erase_concepts": "editing.erasure",
    "record": "editing.recording",
    "replay": "editing.recording",
    "Recording": "editing.recording",
    "invert": "editing.inversion",
    "redraw": "editing.inversion",
    "Inversion": "editing.inversion",
    "negative_prompt_inversion": "editing.inversion",
    "direct_inversion": "editing.inversion",
    "null_text": "editing.null_text",
    "edict": "editing.edict",
    "heatmap": "viewing.visualize",
    "word_sheet": "viewing.visualize",
    "contact_sheet": "viewing.visualize",
    "Trace": "viewing.trace",
    "fit_preview": "viewing.trace",
    "latent_rgb": "viewing.trace",
    "animate": "viewing.trace",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError(
            f"module 'minisd' has no attribute {name!r}; public names: {', '.join(sorted(_HOME))}"
        )
    value = getattr(import_module(f"minisd.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted(__all__)
