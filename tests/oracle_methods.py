"""Methods on attention again, independently: every map of diffusers' UNet materialised by a
processor, and the loop of diffusers' DDIMScheduler.

Each test says in plain formulas what is done at a site; nothing here is minisd's.
"""

import torch
from diffusers import DDIMScheduler

SELF = "attn1"


def heads(attn, x):
    return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)  # (R, N, H D) -> (R, H, N, D)


def softmax_map(q, k):
    return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)


def plain(q, k, v):
    return softmax_map(q, k) @ v


class Attend:
    """A processor: what attend(site, q, k, v) says of (R, H, N or L, D); minisd's sites."""

    def __init__(self, attend, site):
        self.attend, self.site = attend, site

    def __call__(
        self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **kwargs
    ):
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (
            heads(attn, x) for x in (attn.to_q(hidden_states), attn.to_k(text), attn.to_v(text))
        )
        out = self.attend(self.site, q, k, v)
        return attn.to_out[0](out.transpose(1, 2).flatten(-2))


def watch(unet, attend):
    """Have every attention of the UNet computed by attend(site, q, k, v)."""
    sites = {name: name.removesuffix(".processor") for name in unet.attn_processors}
    unet.set_attn_processor({name: Attend(attend, site) for name, site in sites.items()})


def ddim(config, steps):
    scheduler = DDIMScheduler.from_config(config)
    scheduler.set_timesteps(steps)
    return scheduler


def run(unet, config, x, context, steps, attend, combine, before=None):
    """Final latents. x (B, C, h, w); context (G B, L, D), group-major; combine(*eps of the groups).

    attend(i, site, q, k, v) at step i; before(i, t, x) -> x, what is done ahead of a step.
    """
    scheduler, now = ddim(config, steps), {"i": 0}
    watch(unet, lambda site, q, k, v: attend(now["i"], site, q, k, v))
    groups = len(context) // len(x)
    for i, t in enumerate(scheduler.timesteps):
        now["i"] = i
        x = x if before is None else before(i, t, x)
        with torch.no_grad():
            out = unet(x.repeat(groups, 1, 1, 1), t, encoder_hidden_states=context).sample
            x = scheduler.step(combine(*out.chunk(groups)), t, x).prev_sample
    return x
