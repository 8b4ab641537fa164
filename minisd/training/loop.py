"""The training loop: AdamW, an exponential moving average of the parameters, and resuming.

The learning rate is constant after a warm-up and falls to zero over the last fifth, so a run that
was given more steps goes on from its saved state as if it had been planned so.
"""

import copy
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Generator, Tensor, nn
from tqdm import tqdm

from ..files import atomic_write
from .recipes import Hyperparameters

WARMUP, COOLDOWN = 200, 0.2  # steps; share of all steps
MAX_GRADIENT = 1.0
SAVE_EVERY = 250


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over WARMUP steps, constant, linear to zero over the last COOLDOWN of all."""
    return peak * min(1.0, (step + 1) / WARMUP, (steps - step) / (COOLDOWN * steps))


def to_device(model: nn.Module, device: torch.device) -> None:
    """Move a model in place, its convolutions in channels_last, in which they train faster."""
    model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def train(
    model: nn.Module,
    loss: Callable[[Generator], Tensor],
    how: Hyperparameters,
    path: Path,
    seed: int,
    device: torch.device,
) -> None:
    """Minimise loss(generator) over the parameters of `model`, and keep their moving average.

    `loss` draws what is random from the generator, which is seeded by (seed, step), so that a
    resumed run sees what an unbroken one would have seen. Every SAVE_EVERY steps and at the end,
    `path` gets the state dicts "model", "average" and "optimizer" and the number of steps done; if
    it is there, the run goes on from it. The model is moved to the device.
    """
    to_device(model, device)
    optimizer = torch.optim.AdamW(
        model.parameters(), how.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True
    )
    average = copy.deepcopy(model).requires_grad_(False)
    parts: dict[str, nn.Module | torch.optim.Optimizer] = {
        "model": model,
        "average": average,
        "optimizer": optimizer,
    }
    first = 0
    if path.exists():
        state = torch.load(path, map_location=device)
        for name, part in parts.items():
            part.load_state_dict(state[name])
        first = state["step"]
    steps = range(first, how.steps)
    bar = tqdm(steps, path.stem, initial=first, total=how.steps, file=sys.stderr, mininterval=5)
    smooth = None
    for step in bar:
        generator = Generator("cpu").manual_seed(seed * 1_000_003 + step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, how.steps, how.lr)
        with torch.autocast(device.type, torch.bfloat16):
            value = loss(generator)
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT)
        optimizer.step()
        decay = min(how.ema, (1 + step) / (10 + step))  # the average forgets the start quickly
        torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
        smooth = value.item() if smooth is None else 0.98 * smooth + 0.02 * value.item()
        bar.set_postfix(loss=f"{smooth:.4f}", refresh=False)
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == how.steps:
            with atomic_write(path) as temporary:
                states = {name: part.state_dict() for name, part in parts.items()}
                torch.save(states | {"step": step + 1}, temporary)
