"""Local blend: after each step, take the source's latent wherever the edited objects are not.

Source: google/prompt-to-prompt and Avrahami et al. 2022 (blended diffusion); the published code
reads five 16 x 16 layers of a 512 x 512 image, this one whatever maps it is given, at any size
and for any number of targets.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import expect
from ..sampling.samplers import Step
from .alignment import find_word, missing_word
from .maps import Maps

Words = str | Sequence[str | Sequence[str]]  # of all prompts, or, if any is a list, of each row


class LocalBlend:
    """Keeps the change near named objects: outside, a target's latent is the source's.

        near = max_pool_3x3(map of words) > threshold * its maximum
        far  = map of subtract > subtract_threshold * its maximum
        keep = (near_row or near_source) and not (far_row or far_source)
        x_row <- x_row where keep, else x_source                        after each step

    maps: those of a PromptToPrompt that collects them, whose sums over the steps so far are read,
    on the latent's grid. words, subtract: a word or a list of words of all prompts, each row taking
    those that its prompt has; or a list of lists, the words of each row, source first. start: the
    fraction of the steps before which nothing is done. ValueError: a word that no prompt has.
    """

    def __init__(
        self,
        maps: Maps,
        words: Words,
        subtract: Words = (),
        threshold: float = 0.3,
        subtract_threshold: float = 0.3,
        start: float = 0.2,
    ):
        self.maps, self.threshold, self.subtract_threshold = maps, threshold, subtract_threshold
        expect.number("start", start, 0, 1)
        expect.number("threshold", threshold)
        expect.number("subtract_threshold", subtract_threshold)
        self.first = int(start * maps.steps)
        self.words = self.pick(words)
        self.subtract = self.pick(subtract) if len(subtract) else None

    def pick(self, words: Words) -> Tensor:
        """(S, L): 1 in the columns of each row's words."""
        prompts = self.maps.prompts
        L, device = self.maps.tokenizer.max_length, self.maps.source_row.device
        picked = torch.zeros(len(prompts), L, dtype=torch.float32, device=device)
        if is_of_rows(words):
            if len(words) != len(prompts):
                got = f"got lists of words for {len(words)} rows"
                raise ValueError(f"{got}, expected one for each of {len(prompts)}")
            for row, own in enumerate(words):
                for word in [own] if isinstance(own, str) else own:
                    picked[row, self.maps.columns(word, row)] = 1
            return picked
        shared: Any = [words] if isinstance(words, str) else words
        for word in shared:
            found = [find_word(self.maps.tokenizer, prompt, word) for prompt in prompts]
            if not any(found):
                raise missing_word(self.maps.tokenizer, word, prompts)
            for row, positions in enumerate(found):
                picked[row, positions] = 1
        return picked

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        if len(x) != len(self.maps.prompts):
            expected = f"one for each prompt, {len(self.maps.prompts)}"
            raise ValueError(f"got {len(x)} latents, expected {expected}")
        if step.index < self.first:
            return x
        keep = self.mask(self.words, self.threshold, x.shape[2:], pool=True)
        if self.subtract is not None:
            keep &= ~self.mask(self.subtract, self.subtract_threshold, x.shape[2:], pool=False)
        return torch.where(keep, x, x[self.maps.source_row])

    def mask(self, words: Tensor, threshold: float, size: torch.Size, pool: bool) -> Tensor:
        """(S, 1, h, w) bool: where the words are, in a row or in its source."""
        heat = torch.einsum("shwl,sl->shw", self.maps.mean(), words)[:, None]
        if pool:
            heat = F.max_pool2d(heat, 3, stride=1, padding=1)
        heat = F.interpolate(heat, size, mode="nearest")
        found = heat > threshold * heat.amax((1, 2, 3), keepdim=True)
        return found | found[self.maps.source_row]


def is_of_rows(words: Words) -> bool:
    """Whether they are the words of each row: entries that are lists themselves."""
    return not isinstance(words, str) and not all(isinstance(word, str) for word in words)
