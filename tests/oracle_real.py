"""Editing of real pictures again, independently: eager loops over diffusers' UNet, VAE and
schedulers.

Written from the formulas of the papers; shares no code with minisd.editing. Pictures are (1, 3, H,
W) in [-1, 1], latents (1, C, h, w), text embeddings (1, L, D).
"""

import numpy as np
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

SCHEDULERS = {
    "dpm++": lambda config: DPMSolverMultistepScheduler.from_config(config, use_karras_sigmas=True),
    "dpm++ linspace": lambda config: DPMSolverMultistepScheduler.from_config(config),
    "ddim": lambda config: DDIMScheduler.from_config(config),
}


def encode(vae, picture):
    return vae.encode(picture).latent_dist.mode() * vae.config.scaling_factor


def begin(scheduler, steps, strength):
    """The timesteps that are run, and where in the schedule they begin (diffusers' img2img)."""
    scheduler.set_timesteps(steps)
    first = max(steps - min(int(steps * strength), steps), 0)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(first)
    return list(enumerate(scheduler.timesteps))[first:]


def answer(unet, x, t, context):
    return unet(x, t, encoder_hidden_states=context).sample


@torch.no_grad()
def blend(
    unet, vae, scheduler, picture, mask, uncond, cond, start, behind, steps, strength, guidance
):
    """Blended latent diffusion: the final latents. mask (h, w), 1 where it is redrawn."""
    z0, m = encode(vae, picture), mask[None, None].to(picture)
    timesteps = begin(scheduler, steps, strength)
    x = scheduler.add_noise(z0, start, timesteps[0][1].reshape(1))
    for _, t in timesteps:
        x = m * x + (1 - m) * scheduler.add_noise(z0, behind, t.reshape(1))
        u, c = answer(unet, x, t, uncond), answer(unet, x, t, cond)
        x = scheduler.step(u + guidance * (c - u), t, x).prev_sample
    return m * x + (1 - m) * z0


@torch.no_grad()
def erase(
    unet,
    scheduler,
    z0,
    noise,
    uncond,
    cond,
    concepts,
    weights,
    steps,
    strength,
    guidance,
    sega=None,
):
    """Concept erasure: the final latents, from the clean latent z0 or (None) from the noise alone.

    sega: None, or (threshold, warmup, momentum scale, beta) of semantic guidance.
    """
    timesteps = begin(scheduler, steps, strength)
    x = noise if z0 is None else scheduler.add_noise(z0, noise, timesteps[0][1].reshape(1))
    gathered = torch.zeros_like(x)
    for i, t in timesteps:
        u, c = answer(unet, x, t, uncond), answer(unet, x, t, cond)
        eps = u + guidance * (c - u)
        away = torch.zeros_like(x)
        for w, concept in zip(weights, concepts):
            direction = -w * (answer(unet, x, t, concept) - u)
            if sega is not None:
                direction = largest(direction, sega[0])
            away = away + direction
        if sega is not None:
            _, warmup, scale, beta = sega
            away = away + scale * gathered
            gathered = beta * gathered + (1 - beta) * away
            away = away if i >= warmup else torch.zeros_like(x)
        x = scheduler.step(eps + away, t, x).prev_sample
    return x


def largest(direction, threshold):
    """Channel by channel: the values whose size is at least the given quantile of all sizes, the
    others 0."""
    out = torch.zeros_like(direction)
    for row in range(len(direction)):
        for channel in range(direction.shape[1]):
            values = direction[row, channel]
            least = np.quantile(values.abs().numpy(), threshold)
            out[row, channel] = values * (values.abs() >= float(least))
    return out
