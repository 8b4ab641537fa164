"""Inversion again, independently: loops on diffusers' UNet and schedulers, one picture at a time,
torch.optim.Adam.

Written from the formulas of the papers that minisd/editing/inversion.py, null_text.py and edict.py
name. It shares no code with them.
"""

import numpy as np
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler
from oracle_p2p import Controller, Processor


def eps_of(unet, x, t, context):
    return unet(x, t, encoder_hidden_states=context).sample


def scheduler(kind, config, steps):
    plan = kind.from_config(config)
    plan.set_timesteps(steps)
    return plan


@torch.no_grad()
def invert(unet, config, z, cond, steps, refine=0, skip=0, one_t_per_row=False):
    """The latents from z (B, C, h, w) to noise, z first."""
    plan, path = scheduler(DDIMInverseScheduler, config, steps), [z]
    for t in plan.timesteps[: steps - skip]:
        before = guess = path[-1]
        for _ in range(1 + refine):
            eps = eps_of(unet, guess, t.repeat(len(z)) if one_t_per_row else t, cond)
            guess = plan.step(eps, t, before).prev_sample
        path.append(guess)
    return path


@torch.no_grad()
def sample(unet, config, x, uncond, cond, steps, guidance, skip=0):
    """All latents from x on. uncond: one, or a list with one for each step of the whole schedule;
    None: no guidance."""
    plan, path = scheduler(DDIMScheduler, config, steps), [x]
    for i in range(skip, steps):
        t = plan.timesteps[i]
        eps = eps_of(unet, path[-1], t, cond)
        if uncond is not None:
            u = eps_of(
                unet,
                path[-1],
                t,
                (uncond[i] if isinstance(uncond, list) else uncond).expand_as(cond),
            )
            eps = u + guidance * (eps - u)
        path.append(plan.step(eps, t, path[-1]).prev_sample)
    return path


def null_text(
    unet, config, path, null, cond, steps, guidance, inner_steps, early_stop=1e-5, skip=0
):
    """The published loop for ONE picture: path from noise to z, null and cond (1, L, D) ->
    (embeddings, losses, x)."""
    plan, phi, x, found, losses = scheduler(DDIMScheduler, config, steps), null, path[0], [], []
    unet.requires_grad_(False)
    for i, target in zip(range(skip, steps), path[1:]):
        t = plan.timesteps[i]
        with torch.no_grad():
            eps_c = eps_of(unet, x, t, cond)
        phi = phi.clone().detach().requires_grad_()
        adam = torch.optim.Adam([phi], lr=1e-2 * (1 - i / 100))
        losses.append([])
        for _ in range(inner_steps):
            eps_u = eps_of(unet, x, t, phi)
            loss = (
                (plan.step(eps_u + guidance * (eps_c - eps_u), t, x).prev_sample - target)
                .square()
                .mean()
            )
            adam.zero_grad()
            loss.backward()
            adam.step()
            losses[-1].append(loss.item())
            if loss.item() < early_stop + i * 2e-5:
                break
        phi = phi.detach()
        found.append(phi)
        with torch.no_grad():
            eps_u = eps_of(unet, x, t, phi)
        x = plan.step(eps_u + guidance * (eps_c - eps_u), t, x).prev_sample
    return found, losses, x


@torch.no_grad()
def edit(unet, config, x, uncond, cond, lengths, targets, steps, guidance, self_limit, path=None):
    """Prompt-to-prompt by materialised maps (oracle_p2p); path: the source row is put back on it
    (direct inversion).

    uncond (1 or rows, L, D) or a list; path from noise to z.
    """
    controller = Controller(lengths, targets, self_limit, 0)
    before = unet.attn_processors
    unet.set_attn_processor({name: Processor(controller, name) for name in before})
    plan = scheduler(DDIMScheduler, config, steps)
    x = x.expand(len(cond), -1, -1, -1)
    for i, t in enumerate(plan.timesteps):
        controller.step = i
        u = uncond[i] if isinstance(uncond, list) else uncond
        context = torch.cat([u.expand_as(cond), cond])
        eps_u, eps_c = eps_of(unet, torch.cat([x, x]), t, context).chunk(2)
        x = plan.step(eps_u + guidance * (eps_c - eps_u), t, x).prev_sample
        if path is not None:
            x = torch.cat([path[i + 1], x[1:]])
    unet.set_attn_processor(before)
    return x


@torch.no_grad()
def edict(unet, config, z, uncond, source, target, steps, guidance, run, p):
    """Invert after source, draw after target, the last `run` steps of the schedule; float64 latents
    -> the pair.

    alpha-bar at t and at the step's other end, t - 1000 // steps, or the first one below zero.
    """
    plan = scheduler(DDIMScheduler, config, steps)
    bars = plan.alphas_cumprod.double().numpy()

    def eps(x, t, cond):
        x = x.float()
        u, c = (eps_of(unet, x, t, e.expand(len(x), -1, -1)).double() for e in (uncond, cond))
        return u + guidance * (c - u)

    def numbers(t):
        bar, bar_next = bars[t], bars[t - 1000 // steps] if t >= 1000 // steps else bars[0]
        a = np.sqrt(bar_next / bar)
        return float(a), float(np.sqrt(1 - bar_next) - np.sqrt(bar_next * (1 - bar) / bar))

    pair = [z.double(), z.double()]
    indices = range(steps - run, steps)
    for i in reversed(indices):
        t = int(plan.timesteps[i])
        (a, b), first, second = numbers(t), i % 2, 1 - i % 2
        pair[second] = (pair[second] - (1 - p) * pair[first]) / p
        pair[first] = (pair[first] - (1 - p) * pair[second]) / p
        pair[second] = (pair[second] - b * eps(pair[first], t, source)) / a
        pair[first] = (pair[first] - b * eps(pair[second], t, source)) / a
    noise = list(pair)
    for i in indices:
        t = int(plan.timesteps[i])
        (a, b), first, second = numbers(t), i % 2, 1 - i % 2
        pair[first] = a * pair[first] + b * eps(pair[second], t, target)
        pair[second] = a * pair[second] + b * eps(pair[first], t, target)
        pair[first] = p * pair[first] + (1 - p) * pair[second]
        pair[second] = p * pair[second] + (1 - p) * pair[first]
    return noise, pair
