"""Guidance: what the network is asked at each step, and how its answers become one prediction.

    conditional  eps = e(cond)
    cfg          eps = e(uncond) + scale (e(cond) - e(uncond))
    erase        eps = cfg - sum_i erase_scale_i (e(concept_i) - e(uncond))
    sega         the same where e(concept_i) - e(uncond) is largest, late, with momentum

A guidance is groups of text embeddings and one `combine` of the network's answers to them. All
groups go through the network in one call, group-major with the conditional group LAST, because
edits address the last rows of the batch. The network is any callable

    network(x (B, C, h, w), t (0-d tensor), context (G*B, L, D), edits) -> (G*B, C, h, w)

and where it has `prepare` and `prepare_times` (UNet), keys, values and times are computed once for
a run, and it is called with what these returned in place of context and t. They travel in the state
that the loop hands on: a guidance itself never changes, so it cannot keep anything of weights that
have changed since.

Sources: Ho & Salimans 2022 (arXiv 2207.12598); erase is the negation of Liu et al. 2022 (arXiv
2206.01714), sega follows Brack et al. 2023 (arXiv 2301.12247).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .. import expect
from .samplers import Step

if TYPE_CHECKING:  # guidance is given the network and imports no model
    from ..models.sites import Edits

MOST = 1000  # of a scale; from about 20 on images fall apart
Scales = float | Sequence[float]  # of all images, or a list with one for each
Embeddings = Tensor | Sequence[Tensor]  # (1 or B, L, D), or one such tensor for each step
StepEdits = Callable[[Step], "Edits"]  # step -> {site name: AttentionEdit or FeatureEdit}


class Predict(Protocol):
    """predict(x, step, state) -> (eps, state). x, eps: (B, C, h, w).

    state: None on the first step of a run, then what the step before returned.
    """

    def __call__(self, x: Tensor, step: Step, state: Any = None, /) -> tuple[Tensor, Any]: ...


class Run(NamedTuple):
    """What a guidance hands from step to step of one run."""

    rows: int = 0  # of the context
    context: Any = None  # of all groups, as network.prepare returned it; None: not fixed
    times: Mapping[int, Tensor] = {}  # t -> its row of network.prepare_times
    momentum: Tensor | None = None  # of sega


@dataclass(frozen=True, eq=False)
class Guidance:
    """predict(x, step, state) -> (combine(eps of each group), state), in one call of the network.

    groups: [(name, embeddings)], the conditional one last. combine: G tensors (B, C, h, w) -> one.
    edits: step -> {site: edit}, of the last rows. ValueError for shapes that differ.
    """

    network: Callable[..., Tensor]
    groups: Sequence[tuple[str, Embeddings]]
    combine: Callable[..., Tensor]
    edits: StepEdits | None = None

    def __call__(self, x: Tensor, step: Step, state: Run | None = None) -> tuple[Tensor, Run]:
        run = self.prepared(x, step, Run() if state is None else state)
        context = self.context(len(x), step) if run.context is None else run.context
        t = run.times[step.t] if run.times else _time(step, x)
        eps = self.network(x, t, context, self.edits_of(x, step)).chunk(len(self.groups))
        out, momentum = self.combined(eps, step, run.momentum)
        return out, run._replace(momentum=momentum)

    def edits_of(self, x: Tensor, step: Step) -> Edits:
        """{site: edit} of this step, for latents x."""
        return {} if self.edits is None else self.edits(step)

    def combined(
        self, eps: Sequence[Tensor], step: Step, momentum: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """(the prediction, the momentum for the next step)."""
        return self.combine(*eps), momentum

    def prepared(self, x: Tensor, step: Step, run: Run) -> Run:
        """The run with what is the same for all its steps; nothing is kept under gradients."""
        if torch.is_grad_enabled():
            return run._replace(context=None, times={})
        prepare = getattr(self.network, "prepare", None)
        prepare_times = getattr(self.network, "prepare_times", None)
        rows, fixed = len(x) * len(self.groups), all(isinstance(e, Tensor) for _, e in self.groups)
        if prepare is not None and fixed and run.rows != rows:
            run = run._replace(rows=rows, context=prepare(self.context(len(x), step)))
        if prepare_times is not None and step.t not in run.times:
            t = tuple(dict.fromkeys((*step.times, step.t)))
            table = prepare_times(torch.tensor(t, dtype=torch.int64, device=x.device))
            run = run._replace(times=dict(zip(t, table.split(1))))
        return run

    def context(self, batch: int, step: Step) -> Tensor:
        """The embeddings of all groups, (G * batch, L, D)."""
        parts = [_rows(name, embeddings, batch, step) for name, embeddings in self.groups]
        if len({part.shape for part in parts}) > 1:
            named = zip(self.groups, parts)
            got = ", ".join(f"{name} {tuple(part.shape)}" for (name, _), part in named)
            raise ValueError(f"the texts differ in shape: {got}, expected one (L, D) for all")
        return torch.cat(parts)


def with_edits(predict: Predict, make: Callable[[Sequence[str]], StepEdits]) -> Guidance:
    """The guidance with edits of the rows of all its groups: make(their names).

    ValueError for what is no `Guidance`, or has edits already.
    """
    if not isinstance(predict, Guidance) or predict.edits is not None:
        got = f"{type(predict).__name__}"
        raise ValueError(f"the rule made a {got}, expected a Guidance without edits")
    return replace(predict, edits=make([name for name, _ in predict.groups]))


def conditional(
    network: Callable[..., Tensor], cond: Tensor, edits: StepEdits | None = None
) -> Guidance:
    """eps = e(cond). cond: (B, L, D), or (1, L, D) for every latent."""
    return Guidance(network, [("cond", cond)], lambda c: c, edits)


def cfg(
    network: Callable[..., Tensor],
    uncond: Embeddings,
    cond: Tensor,
    scale: Scales = 7.5,
    edits: StepEdits | None = None,
    channels: int | None = None,
) -> Guidance:
    """Classifier-free guidance, eps = u + scale (c - u). With scale 1 there is no u to compute.

    cond: (B, L, D) or (1, L, D).  uncond: the same, or a list with one such tensor per step of the
    full schedule (entry step.index is used; null-text inversion makes such a list).  channels: only
    the first ones are guided, the others are c's (DiT guides 3 of 4, and never its variance).
    """
    if channels is not None:
        expect.whole_number("channels", channels, 1)
    if check_scales("guidance scale", scale) == 1:
        return conditional(network, cond, edits)
    groups = [("uncond", uncond), ("cond", cond)]
    return Guidance(network, groups, _guided(scale, cond, channels), edits)


def erase(
    network: Callable[..., Tensor],
    uncond: Embeddings,
    cond: Tensor,
    concepts: Tensor,
    scale: Scales = 7.5,
    erase_scale: float | Sequence[float] = 10.0,
    edits: StepEdits | None = None,
) -> Guidance:
    """Away from concepts, eps = u + scale (c - u) - sum_i w_i (e_i - u), in one call of 2 + n
    groups.

    concepts: (n, L, D), each for every latent, or (n, B, L, D).  erase_scale: w, one weight for all
    or one each.
    """
    weights, guided = _weights(erase_scale, concepts), _guided(scale, cond)

    def combine(u: Tensor, *concepts_and_c: Tensor) -> Tensor:
        *of_concepts, c = concepts_and_c
        eps = guided(u, c)
        for w, e in zip(weights, of_concepts):
            eps = eps - w * (e - u)
        return eps

    return Guidance(network, _with_concepts(uncond, cond, concepts), combine, edits)


def sega(
    network: Callable[..., Tensor],
    uncond: Embeddings,
    cond: Tensor,
    concepts: Tensor,
    scale: Scales = 7.5,
    erase_scale: float | Sequence[float] = 10.0,
    threshold: float = 0.9,
    warmup: int = 10,
    momentum: float = 0.1,
    beta: float = 0.4,
    edits: StepEdits | None = None,
) -> Sega:
    """Semantic guidance (Brack et al. 2023): as `erase`, but only where a concept shows most; late.

        d_i = -w_i (e_i - u), set to 0 where |d_i| is below its quantile `threshold` over the
              positions of each channel
        g   = sum_i d_i + momentum v;    v <- beta v + (1 - beta) g        (v = 0 at the start)
        eps = u + scale (c - u) + g,     without g while step.index < warmup, in which v gathers

    warmup counts in the full schedule, as step.index does. A negative weight leads towards a
    concept.
    """
    weights = _weights(erase_scale, concepts)
    expect.number("threshold", threshold, 0, 1)
    expect.whole_number("warmup", warmup, 0)
    expect.number("momentum", momentum)
    expect.number("beta", beta, 0, 1)
    groups, guided = _with_concepts(uncond, cond, concepts), _guided(scale, cond)
    return Sega(network, groups, guided, edits, weights, threshold, warmup, momentum, beta)


@dataclass(frozen=True, eq=False)
class Sega(Guidance):
    """See `sega`. combine(u, c) is the guidance without the concepts."""

    weights: Sequence[float] = ()
    threshold: float = 0.9
    warmup: int = 10
    momentum: float = 0.1
    beta: float = 0.4

    def combined(
        self, eps: Sequence[Tensor], step: Step, momentum: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        if 0 < len(step.times) <= self.warmup:
            got = f"warmup is {self.warmup}, expected less than the {len(step.times)} steps"
            raise ValueError(f"{got}: none is guided")
        u, *of_concepts, c = eps
        v = momentum
        if v is None:
            v = torch.zeros_like(u, dtype=torch.promote_types(u.dtype, torch.float32))
        g = self.momentum * v
        for w, e in zip(self.weights, of_concepts):
            d = (-w * (e - u)).to(v)
            g = g + torch.where(d.abs() >= _quantile(d.abs(), self.threshold), d, 0)
        out = self.combine(u, c)
        if step.index >= self.warmup:
            out = (out + g).to(out)
        return out, self.beta * v + (1 - self.beta) * g


def check_scales(name: str, scale: Scales, images: int | None = None) -> Scales:
    """The scale or the scales; ValueError for what is no number up to MOST, or a list that has not
    one for each image."""
    listed = scale if isinstance(scale, (list, tuple)) else [scale]
    for each in listed:
        expect.number(name, each, -MOST, MOST)
    if listed is scale and (not listed or images not in (None, len(listed))):
        each_of = "image, at least one" if images is None else f"of {images} images"
        raise ValueError(f"{name} is a list of {len(listed)}, expected one for each {each_of}")
    return scale


def _guided(
    scale: Scales, cond: Tensor, channels: int | None = None
) -> Callable[[Tensor, Tensor], Tensor]:
    """u + scale (c - u), in the first channels alone if they are counted, and each image with its
    own scale if there is a list of them."""
    check_scales("guidance scale", scale)
    each: Any = scale
    if isinstance(scale, Sequence):
        each = torch.tensor(scale, dtype=torch.float32, device=cond.device)[:, None, None, None]

    def guided(u: Tensor, c: Tensor) -> Tensor:
        check_scales("guidance scale", scale, len(u))
        own, rest = c[:, :channels], c[:, channels:] if channels else c[:, :0]
        u = u[:, :channels]
        eps = u + (each * (own - u)).to(u)  # a list's product is float32, as a number's is inside
        return torch.cat([eps, rest], dim=1) if channels else eps

    return guided


def _quantile(x: Tensor, q: float) -> Tensor:
    """The q-quantile over the positions of each row and channel, (B, C, h, w) -> (B, C, 1, 1)."""
    return x.flatten(2).quantile(q, dim=2)[:, :, None, None]


def _with_concepts(
    uncond: Embeddings, cond: Tensor, concepts: Tensor
) -> list[tuple[str, Embeddings]]:
    """The groups uncond, each concept, cond."""
    each = concepts[:, None] if concepts.ndim == 3 else concepts
    return [("uncond", uncond), *(("concepts", rows) for rows in each), ("cond", cond)]


def _weights(erase_scale: float | Sequence[float], concepts: Tensor) -> list[float]:
    """One weight for each concept."""
    if concepts.ndim not in (3, 4):
        got = tuple(concepts.shape)
        raise ValueError(f"concepts has shape {got}, expected (n, L, D) or (n, B, L, D)")
    if isinstance(erase_scale, (list, tuple)):
        weights = list(erase_scale)
    else:
        weights = [erase_scale] * len(concepts)
    if len(weights) != len(concepts):
        expected = f"one weight or one per concept ({len(concepts)})"
        raise ValueError(f"erase_scale is {erase_scale!r}, expected {expected}")
    for weight in weights:
        expect.number("erase_scale", weight)
    return weights


def _time(step: Step, x: Tensor) -> Tensor:
    return torch.full((), step.t, dtype=torch.int64, device=x.device)


def _rows(name: str, embeddings: Embeddings, batch: int, step: Step) -> Tensor:
    """The (batch, L, D) rows of one group at this step."""
    rows: Any = embeddings
    if isinstance(embeddings, (list, tuple)):
        if step.index >= len(embeddings):
            got = f"{name} is a list of {len(embeddings)} entries"
            raise ValueError(f"{got}, but step {step.index} needs one entry per step")
        rows = embeddings[step.index]
    if not (isinstance(rows, Tensor) and rows.ndim == 3 and len(rows) in (1, batch)):
        got = f"has shape {tuple(rows.shape)}" if isinstance(rows, Tensor) else f"is {rows!r:.80}"
        expected = f"(1, L, D) or one per latent, ({batch}, L, D)"
        raise ValueError(f"{name} {got}, expected {expected}")
    return rows.expand(batch, -1, -1)
