"""minisd: Stable Diffusion v1.x written out so that every tensor can be followed.

The public names below resolve on first use (PEP 562), so that `import minisd` and `minisd --help`
load neither torch nor triton; type checkers read the imports.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .again import from_recipe as from_recipe
    from .checkpoints.sources import CheckpointError as CheckpointError
    from .drawing import Cancelled as Cancelled, Drawing as Drawing
    from .editing.attend_and_excite import attend_and_excite as attend_and_excite
    from .editing.blended import blend as blend
    from .editing.daam import daam as daam
    from .editing.deep_cache import deep_cache as deep_cache
    from .editing.diffedit import diffedit as diffedit
    from .editing.edict import edict as edict
    from .editing.erasure import erase_concepts as erase_concepts
    from .editing.freeu import freeu as freeu
    from .editing.inpainting import inpaint as inpaint
    from .editing.inversion import (
        Inversion as Inversion,
        direct_inversion as direct_inversion,
        invert as invert,
        negative_prompt_inversion as negative_prompt_inversion,
        redraw as redraw,
    )
    from .editing.local_blend import LocalBlend as LocalBlend
    from .editing.long_prompts import long_prompt as long_prompt
    from .editing.maps import Maps as Maps
    from .editing.masactrl import masactrl as masactrl
    from .editing.null_text import null_text as null_text
    from .editing.perturbed import pag as pag
    from .editing.plug_and_play import plug_and_play as plug_and_play
    from .editing.prompt_to_prompt import (
        PromptToPrompt as PromptToPrompt,
        edit_prompt as edit_prompt,
        seed_baseline as seed_baseline,
    )
    from .editing.recording import Recording as Recording, record as record, replay as replay
    from .editing.regional import regional as regional
    from .editing.smoothed import seg as seg
    from .editing.style_aligned import style_aligned as style_aligned
    from .labels import LabelDiffusion as LabelDiffusion, load_dit as load_dit
    from .models.attention import Attention as Attention, AttentionEdit as AttentionEdit
    from .models.clip import CLIPTextConfig as CLIPTextConfig, CLIPTextModel as CLIPTextModel
    from .models.dit import DiT as DiT
    from .models.dit_config import DiTConfig as DiTConfig
    from .models.features import FeatureEdit as FeatureEdit
    from .models.tokenizer import CLIPTokenizer as CLIPTokenizer
    from .models.unet import UNet as UNet, UNetConfig as UNetConfig
    from .models.vae import AutoencoderKL as AutoencoderKL, VAEConfig as VAEConfig
    from .models.vq import VQConfig as VQConfig, VQModel as VQModel
    from .pipeline import StableDiffusion as StableDiffusion, load as load
    from .recipes import recipe as recipe, save as save
    from .sampling.ddpm import DDPM as DDPM
    from .sampling.guidance import (
        Guidance as Guidance,
        cfg as cfg,
        conditional as conditional,
        erase as erase,
        sega as sega,
    )
    from .sampling.loop import denoise as denoise
    from .sampling.samplers import DDIM as DDIM, DPMpp2M as DPMpp2M, Step as Step
    from .sampling.schedule import Level as Level, NoiseSchedule as NoiseSchedule
    from .viewing.attribution import Attribution as Attribution, attribute as attribute
    from .viewing.inside import Capture as Capture, capture as capture, patch as patch
    from .viewing.trace import (
        Trace as Trace,
        animate as animate,
        fit_preview as fit_preview,
        latent_rgb as latent_rgb,
    )
    from .viewing.visualize import (
        contact_sheet as contact_sheet,
        heatmap as heatmap,
        word_sheet as word_sheet,
    )

__version__ = "0.2.0"

_HOME = {  # public name -> module that defines it
    "from_recipe": "again",
    "CheckpointError": "checkpoints.sources",
    "Cancelled": "drawing",
    "Drawing": "drawing",
    "attend_and_excite": "editing.attend_and_excite",
    "blend": "editing.blended",
    "daam": "editing.daam",
    "deep_cache": "editing.deep_cache",
    "diffedit": "editing.diffedit",
    "long_prompt": "editing.long_prompts",
    "masactrl": "editing.masactrl",
    "regional": "editing.regional",
    "style_aligned": "editing.style_aligned",
    "edict": "editing.edict",
    "erase_concepts": "editing.erasure",
    "inpaint": "editing.inpainting",
    "freeu": "editing.freeu",
    "invert": "editing.inversion",
    "redraw": "editing.inversion",
    "Inversion": "editing.inversion",
    "negative_prompt_inversion": "editing.inversion",
    "direct_inversion": "editing.inversion",
    "LocalBlend": "editing.local_blend",
    "Maps": "editing.maps",
    "null_text": "editing.null_text",
    "plug_and_play": "editing.plug_and_play",
    "edit_prompt": "editing.prompt_to_prompt",
    "PromptToPrompt": "editing.prompt_to_prompt",
    "seed_baseline": "editing.prompt_to_prompt",
    "record": "editing.recording",
    "replay": "editing.recording",
    "Recording": "editing.recording",
    "LabelDiffusion": "labels",
    "load_dit": "labels",
    "seg": "editing.smoothed",
    "AttentionEdit": "models.attention",
    "Attention": "models.attention",
    "CLIPTextModel": "models.clip",
    "CLIPTextConfig": "models.clip",
    "DiT": "models.dit",
    "DiTConfig": "models.dit_config",
    "FeatureEdit": "models.features",
    "CLIPTokenizer": "models.tokenizer",
    "UNet": "models.unet",
    "UNetConfig": "models.unet",
    "AutoencoderKL": "models.vae",
    "VAEConfig": "models.vae",
    "VQModel": "models.vq",
    "VQConfig": "models.vq",
    "load": "pipeline",
    "StableDiffusion": "pipeline",
    "DDPM": "sampling.ddpm",
    "recipe": "recipes",
    "save": "recipes",
    "conditional": "sampling.guidance",
    "cfg": "sampling.guidance",
    "erase": "sampling.guidance",
    "sega": "sampling.guidance",
    "Guidance": "sampling.guidance",
    "denoise": "sampling.loop",
    "pag": "editing.perturbed",
    "Step": "sampling.samplers",
    "DDIM": "sampling.samplers",
    "DPMpp2M": "sampling.samplers",
    "NoiseSchedule": "sampling.schedule",
    "Level": "sampling.schedule",
    "attribute": "viewing.attribution",
    "Attribution": "viewing.attribution",
    "capture": "viewing.inside",
    "Capture": "viewing.inside",
    "patch": "viewing.inside",
    "Trace": "viewing.trace",
    "fit_preview": "viewing.trace",
    "latent_rgb": "viewing.trace",
    "animate": "viewing.trace",
    "heatmap": "viewing.visualize",
    "word_sheet": "viewing.visualize",
    "contact_sheet": "viewing.visualize",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        known = ", ".join(sorted(_HOME))
        raise AttributeError(f"module 'minisd' has no attribute {name!r}; public names: {known}")
    value = getattr(import_module(f"minisd.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
