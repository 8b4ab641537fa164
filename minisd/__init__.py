"""minisd: Stable Diffusion v1.x written out so that every tensor can be followed.

The public names below resolve on first use (PEP 562), so that `import minisd` and `minisd --help` load neither torch
nor triton.
"""

from importlib import import_module

__version__ = "0.1.0"

_HOME = {  # public name -> module that defines it
    "load": "pipeline",
    "StableDiffusion": "pipeline",
    "UNet": "unet",
    "UNetConfig": "unet",
    "AutoencoderKL": "vae",
    "VAEConfig": "vae",
    "CLIPTextModel": "clip",
    "CLIPTextConfig": "clip",
    "CLIPTokenizer": "tokenizer",
    "AttentionEdit": "attention",
    "Attention": "attention",
    "NoiseSchedule": "schedule",
    "Level": "schedule",
    "Step": "samplers",
    "DDIM": "samplers",
    "DPMpp2M": "samplers",
    "denoise": "samplers",
    "conditional": "guidance",
    "cfg": "guidance",
    "erase": "guidance",
    "sega": "guidance",
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
    "heatmap": "visualize",
    "word_sheet": "visualize",
    "contact_sheet": "visualize",
    "Trace": "trace",
    "fit_preview": "trace",
    "latent_rgb": "trace",
    "animate": "trace",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError(f"module 'minisd' has no attribute {name!r}; public names: {', '.join(sorted(_HOME))}")
    value = getattr(import_module(f"minisd.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted(__all__)
