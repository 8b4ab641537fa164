"""Train a small latent diffusion model from scratch on images of `minisd.training.scenes`.

It made the bundled `shapes`. Its stages share one run folder, and each resumes where it stopped:

    python -m minisd.training autoencoder --run RUN
        L = |x - decode(z)| + kl_weight KL(q(z|x) || N(0, 1)),  z ~ q(z|x)
    python -m minisd.training text --run RUN
        L = summary_loss: ends and pads tell which words the caption has
    python -m minisd.training diffusion --run RUN
        L = w_t |eps - eps_theta(alpha_t z + sigma_t eps, t, text)|^2
    python -m minisd.training export --run RUN --to weights/shapes
        the folder in diffusers layout, float16

A diffusion transformer on the bundled model's latents and texts, in a run folder of its own:

    python -m minisd.training transformer --run RUN
        the third loss, eps_theta a DiT; with --to DIR its average is then written as a model

On labels, on the bundled model's latents: the bundled `shapes-dit`, and four small ones, trained
alike, for `python -m bench.dit`; each stage in a run folder of its own:

    python -m minisd.training shapes-dit --run RUN
    python -m minisd.training miniature --run RUN
        the third loss and L_t of the variance; with --to DIR each is then written as DIR/NAME

Real drawings, emoji of three sets (see minisd/training/emoji.py for where they come from):

    python -m minisd.training emoji --icons ICONS --run RUN --to DIR
        the three losses one after the other, from the weights of the bundled model

The objective is that of Rombach et al. 2022, https://arxiv.org/abs/2112.10752 (eq. 2).
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from .emoji import EMOJI, export_emoji, train_emoji
from .export import export
from .labelled import export_labelled, train_labelled
from .recipes import MINIATURE, RECIPES, SHAPES_DIT, TRANSFORMER, Recipe
from .stages import train_autoencoder, train_diffusion, train_text
from .transformer import export_transformer, train_transformer

ORDER = ("autoencoder", "text", "diffusion", "export")
NEEDS = {"diffusion": ("autoencoder.pt", "text.pt"), "export": ("pool.pt", "diffusion.pt")}
# In run folders of their own; --to writes the model.
OTHERS = ("transformer", "shapes-dit", "miniature", "emoji")
STAGES = {  # name on the command line -> what trains it, its hyperparameters in the recipe
    "autoencoder": (train_autoencoder, "autoencoder"),
    "text": (train_text, "text_encoder"),
    "diffusion": (train_diffusion, "diffusion"),
}
WEIGHTS = {  # options of the diffusion stage that replace the recipe's numbers
    "max_weight": "cap of the loss's weight",
    "noisy_share": "share of the samples that are drawn very noisy",
    "layout_weight": "weight of the layout loss",
    "summary_weight": "weight of the summary loss",
    "silent_share": "share of the samples whose words alone must tell",
    "faint_share": "share of the samples whose noise is fainter",
}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m minisd.training",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("stage", choices=(*ORDER, *OTHERS))
    add("--run", type=Path, required=True, help="folder of the run: its states, the encoded pool")
    add(
        "--recipe",
        choices=RECIPES,
        default="small",
        help="small: 64x64, for a CPU; large: 128x128, for a GPU",
    )
    add("--steps", type=int, help="train to this many steps instead of the recipe's")
    for name, what in WEIGHTS.items():
        add(f"--{name.replace('_', '-')}", type=float, help=f"diffusion: {what}")
    add("--seed", type=int, default=0)
    add("--device", default="cpu")
    add("--icons", type=Path, help="emoji: the folder of npm install")
    add("--to", type=Path, help=f"export, {', '.join(OTHERS)}: the folder to write")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser()
    args = parser.parse_args(arguments)
    if args.stage not in OTHERS and (args.stage == "export") != (args.to is not None):
        parser.error("--to goes with export and with stages of other worlds, and export needs it")
    if (args.stage == "emoji") != (args.icons is not None):
        parser.error("--icons goes with emoji, which needs it")
    for name in NEEDS.get(args.stage, ()):
        if not (args.run / name).exists():
            parser.error(
                f"{args.run / name} is not there: the stages run in order, {', '.join(ORDER)}"
            )
    args.run.mkdir(parents=True, exist_ok=True)
    if args.stage in OTHERS:
        train_other(args)
        return
    recipe = RECIPES[args.recipe]
    if args.stage == "export":
        export(recipe, args.run, args.to)
        return
    train_stage, hyperparameters = STAGES[args.stage]
    recipe = with_weights(recipe, args)
    if args.steps is not None:
        how = replace(getattr(recipe, hyperparameters), steps=args.steps)
        recipe = replace(recipe, **{hyperparameters: how})
    train_stage(recipe, args.run, args.seed, torch.device(args.device))


def with_weights(recipe: Recipe, args: argparse.Namespace) -> Recipe:
    """The recipe with the numbers that were given on the command line."""
    given = {name: number for name in WEIGHTS if (number := getattr(args, name)) is not None}
    return replace(recipe, **given)


def train_other(args: argparse.Namespace) -> None:
    """A transformer, of texts or labels, or emoji: train, and write the model if wanted."""
    device, steps = torch.device(args.device), {} if args.steps is None else {"steps": args.steps}
    where = args.run, args.seed, device
    if args.stage == "transformer":
        dit = replace(TRANSFORMER, diffusion=replace(TRANSFORMER.diffusion, **steps))
        train_transformer(dit, *where)
        write = partial(export_transformer, dit, args.run)
    elif args.stage in ("shapes-dit", "miniature"):
        labelled = SHAPES_DIT if args.stage == "shapes-dit" else MINIATURE
        labelled = replace(labelled, how=replace(labelled.how, **steps))
        train_labelled(labelled, *where)
        write = partial(export_labelled, labelled, args.run)
    else:
        emoji = replace(EMOJI, diffusion=replace(EMOJI.diffusion, **steps))
        emoji = with_weights(emoji, args)
        train_emoji(emoji, args.icons, *where)
        write = partial(export_emoji, emoji, args.icons, args.run)
    if args.to is not None:
        write(args.to)


if __name__ == "__main__":
    main()
