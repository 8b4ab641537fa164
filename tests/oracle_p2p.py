"""Prompt-to-prompt again, independently: an attention processor on diffusers' UNet with every map
materialised.

Written from the formulas of Hertz et al. 2022, token by token in Python loops, with diffusers'
DDIMScheduler. It shares no code with minisd.editing; which word of a target comes from which word
of the source is spelled out by the test.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler

L = 77


@dataclass
class Target:
    """pairs: for each target word the index of the source word that it takes its maps from, or None
    (a new word).

    cross: {None: (first step, end)} for all columns, and {word index: (first step, end)} for those
    of a word. own: self-attention's (first step, end). factors: {target word index: factor}.
    """

    pairs: list
    cross: dict
    own: tuple
    factors: dict = field(default_factory=dict)


@dataclass
class Blend:
    """words, subtract: for each row its word indices. first: the first step that blends."""

    words: list
    subtract: list = None
    threshold: float = 0.3
    first: int = 0


class Controller:
    """The state that the processors share: the step, the rows, and the sums of maps that the blend
    reads."""

    def __init__(self, lengths, targets, self_limit, blend_tokens):
        self.lengths, self.targets, self.self_limit, self.blend_tokens = (
            lengths,
            targets,
            self_limit,
            blend_tokens,
        )
        self.step, self.sums = 0, []

    def span(self, row, word):
        """Token positions of a word, <bos> being 0."""
        first = 1 + sum(self.lengths[row][:word])
        return list(range(first, first + self.lengths[row][word]))

    def cross(self, P):
        """P (rows, H, N, L) -> the edited maps."""
        out = P.clone()
        for b, target in enumerate(self.targets, 1):
            edit = P[b].clone()
            edit[..., 0] = P[0, ..., 0]
            for word, source_word in enumerate(target.pairs):
                if source_word is None:
                    continue
                mine, theirs = self.span(b, word), self.span(0, source_word)
                for n, t in enumerate(mine):
                    if len(mine) == len(theirs):
                        edit[..., t] = P[0, ..., theirs[n]]
                    else:
                        edit[..., t] = P[0, ..., theirs].sum(-1) / len(mine)
            mine, theirs = 1 + sum(self.lengths[b]), 1 + sum(self.lengths[0])
            for t in range(mine, L):
                edit[..., t] = P[0, ..., min(theirs + t - mine, L - 1)]
            for word, factor in target.factors.items():
                for t in self.span(b, word):
                    edit[..., t] = edit[..., t] * factor
            for t in range(L):
                start, end = target.cross[None]
                for word, interval in target.cross.items():
                    if word is not None and t in self.span(b, word):
                        start, end = interval
                if start <= self.step < end:
                    out[b, ..., t] = edit[..., t]
        return out

    def own(self, P):
        """P (rows, H, N, N) -> the edited maps."""
        out = P.clone()
        for b, target in enumerate(self.targets, 1):
            if target.own[0] <= self.step < target.own[1] and P.shape[-1] <= self.self_limit:
                out[b] = P[0]
        return out


class Processor:
    def __init__(self, controller, name):
        self.controller, self.name = controller, name

    def __call__(
        self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **kwargs
    ):
        is_cross = encoder_hidden_states is not None
        source = encoder_hidden_states if is_cross else hidden_states
        q, k, v = (
            x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for x in (attn.to_q(hidden_states), attn.to_k(source), attn.to_v(source))
        )
        P = ((q @ k.transpose(-1, -2)) * attn.scale).softmax(-1)
        half, controller = len(P) // 2, self.controller
        cond = (controller.cross if is_cross else controller.own)(P[half:])
        if is_cross and controller.blend_tokens == P.shape[2] and not self.name.startswith("mid"):
            controller.sums.append(cond.mean(1))
        out = (torch.cat([P[:half], cond]) @ v).transpose(1, 2).flatten(-2)
        return attn.to_out[0](out)


def blended(x, controller, blend, grid):
    """x (rows, C, h, w): outside the words' masks, each target takes the source's latent."""
    total = sum(controller.sums)  # over layers and steps; (rows, N, L)

    def mask(words, pool):
        maps = torch.stack(
            [
                sum(total[row, :, t] for word in words[row] for t in controller.span(row, word))
                for row in range(len(x))
            ]
        ).reshape(len(x), 1, *grid)
        maps = F.max_pool2d(maps, (3, 3), (1, 1), padding=(1, 1)) if pool else maps
        maps = F.interpolate(maps, size=x.shape[2:])
        maps = maps / maps.flatten(1).max(dim=1).values[:, None, None, None]
        found = maps > blend.threshold
        return found[:1] | found

    keep = mask(blend.words, True)
    if blend.subtract is not None:
        keep = keep & ~mask(blend.subtract, False)
    return x[:1] + keep.float() * (x - x[:1])


@torch.no_grad()
def run(
    unet,
    scheduler,
    x,
    uncond,
    cond,
    lengths,
    targets,
    steps,
    guidance,
    self_limit,
    blend=None,
    blend_grid=(0, 0),
):
    """Final latents of source and targets. x (1, C, h, w), uncond (1, L, D) or one for each step,
    cond (rows, L, D).

    lengths: for each row, the number of tokens of each word.
    """
    controller = Controller(lengths, targets, self_limit, blend_grid[0] * blend_grid[1])
    unet.set_attn_processor({name: Processor(controller, name) for name in unet.attn_processors})
    scheduler = DDIMScheduler.from_config(scheduler)
    scheduler.set_timesteps(steps)
    x = x.expand(len(cond), -1, -1, -1)
    for i, t in enumerate(scheduler.timesteps):
        controller.step = i
        u = uncond[i] if isinstance(uncond, list) else uncond
        context = torch.cat([u.expand_as(cond), cond])
        eps_u, eps_c = unet(torch.cat([x, x]), t, encoder_hidden_states=context).sample.chunk(2)
        x = scheduler.step(eps_u + guidance * (eps_c - eps_u), t, x).prev_sample
        if blend is not None and i >= blend.first:
            x = blended(x, controller, blend, blend_grid)
    return x
