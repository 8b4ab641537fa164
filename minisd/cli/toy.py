"""The command `minisd toy`: diffusion in one and two dimensions, as an image."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from .. import __version__
from .options import AddCommand, Call, count, number, positive, whole
from .output import check_file, line_again, write_png

if TYPE_CHECKING:
    from ..sampling.samplers import Sampler
    from ..sampling.schedule import NoiseSchedule

SAMPLERS = ("ddim", "ddpm", "dpm++")
PATHS, SAMPLES = 100, 20_000  # drawn, and counted


def add_commands(command: AddCommand) -> None:
    what = "draw diffusion in one and two dimensions: trajectories, densities, the score field"
    parser = command("toy", toy, what)
    add = parser.add_argument
    add("--to", metavar="PATH", required=True, help="a .png file")
    add("--sampler", choices=SAMPLERS, default="ddim", help="what draws the trajectories")
    add("--steps", type=positive, default=50, help="steps of the sampler, up to 1000")
    one = "lead to this component of the data, 0, 1 or 2; without it, to all of them"
    add("--label", type=count, metavar="K", help=one)
    add("--guidance", type=number, default=1.0, help="guidance scale, with --label; 1 is none")
    add("--seed", type=whole, default=0, help="seed of the trajectories")


def toy(args: Namespace, call: Call) -> None:
    path = Path(args.to)
    if path.suffix.lower() != ".png":
        raise ValueError(f"--to {path}: expected a name that ends in .png")
    if args.label is None:
        call.refuse("expected --label K with it", "guidance")
    check_file("--to", path)
    from ..drawing import seeds
    from ..sampling.loop import denoise
    from ..toy.exact import ExactNoise, guided
    from ..toy.figure import Paths, figure
    from ..toy.mixture import kolmogorov
    from ..toy.world import LINE, PLANE, ho_schedule, start

    [seed] = seeds(args.seed)
    schedule = ho_schedule()
    sampler = make_sampler(args.sampler, schedule, args.steps, seed)
    predict = guided(ExactNoise(LINE, schedule), LINE, args.label, args.guidance)
    x = start(LINE, sampler, SAMPLES, seed)
    paths = Paths(x[:PATHS])
    x = denoise(x, sampler, predict, after=paths)
    image = figure(LINE, PLANE, schedule, paths.stacked(), next(iter(sampler)).t)
    call.before_writing()
    told = {"version": f"minisd {__version__}", "command": "toy"}
    again = line_again(call.argv, seed, "--to")
    write_png(path, image, {**told, "arguments": again})
    print(path)
    data = LINE if args.label is None else LINE.component(args.label)
    name = "the data" if args.label is None else f"component {args.label}"
    print(f"{SAMPLES} samples, Kolmogorov distance to {name}: {kolmogorov(x, data):.4f}")


def make_sampler(name: str, schedule: NoiseSchedule, steps: int, seed: int) -> Sampler:
    from ..sampling.ddpm import DDPM
    from ..sampling.samplers import DDIM, DPMpp2M

    if name == "ddpm":
        return DDPM(schedule, steps, seed=seed)
    return DDIM(schedule, steps) if name == "ddim" else DPMpp2M(schedule, steps)
