"""Guidance: functions that turn the UNet and text embeddings into a noise predictor, predict(x,
step) -> eps.

    conditional  eps = e(cond)
    cfg          eps = e(uncond) + scale (e(cond) - e(uncond))
    erase        eps = cfg - sum_i erase_scale_i (e(concept_i) - e(uncond))
    sega         the same for the largest values of each e(concept_i) - e(uncond), after a warm-up, with momentum

Sources: Ho & Salimans 2022 (arXiv 2207.12598); erase is the negation of Liu et al. 2022 (arXiv
2206.01714), sega follows Brack et al. 2023 (arXiv 2301.12247). All groups of rows go through the
UNet in one call, group-major with the conditional group LAST, because an AttentionEdit addresses
the last rows of the batch. The UNet is any callable

    unet(x (B, 4, h, w), t (0-d tensor), context (G*B, L, D), edits) -> eps (G*B, 4, h, w)

and where it has `prepare` and `prepare_times` (unet.py), the context and t are given as these have
made them.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from .. import expect
from .samplers import Step

Edits = Callable[[Step], Mapping]  # step -> {site name: AttentionEdit}
Predict = Callable[[Tensor, Step], Tensor]


def conditional(unet, cond: Tensor, edits: Edits | None = None) -> Predict:
    """eps = e(cond). cond: (B, L, D), or (1, L, D) for every latent."""
    return _combined(_grouped(unet, [("cond", cond)], edits), "conditional", lambda c: c)


def cfg(
    unet,
    uncond: Tensor | Sequence[Tensor],
    cond: Tensor,
    scale: float = 7.5,
    edits: Edits | None = None,
) -> Predict:
    """Classifier-free guidance, eps = u + scale (c - u). With scale 1 no unconditional half is
    computed.

    cond: (B, L, D) or (1, L, D).  uncond: the same, or a list with one such tensor per step of the
    full schedule (entry step.index is used; null-text inversion makes such a list).
    """
    expect.number("guidance scale", scale)
    if scale == 1:
        return conditional(unet, cond, edits)
    call = _grouped(unet, [("uncond", uncond), ("cond", cond)], edits)
    return _combined(call, ("cfg", scale), lambda u, c: u + scale * (c - u))


def erase(
    unet,
    uncond: Tensor | Sequence[Tensor],
    cond: Tensor,
    concepts: Tensor,
    scale: float = 7.5,
    erase_scale: float | Sequence[float] = 10.0,
    edits: Edits | None = None,
) -> Predict:
    """Guidance away from concepts, eps = u + scale (c - u) - sum_i w_i (e_i - u), in one UNet call
    of 2 + n groups.

    concepts: (n, L, D), each for every latent, or (n, B, L, D).  erase_scale: w, one weight for all
    or one each.
    """
    call, weights = _with_concepts(unet, uncond, cond, concepts, scale, erase_scale, edits)

    def combine(u, *eps_of_concepts_and_c):
        *concept_eps, c = eps_of_concepts_and_c
        eps = u + scale * (c - u)
        for w, e in zip(weights, concept_eps):
            eps = eps - w * (e - u)
        return eps

    return _combined(call, ("erase", scale, *weights), combine)


def sega(
    unet,
    uncond: Tensor | Sequence[Tensor],
    cond: Tensor,
    concepts: Tensor,
    scale: float = 7.5,
    erase_scale: float | Sequence[float] = 10.0,
    threshold: float = 0.9,
    warmup: int = 10,
    momentum: float = 0.1,
    beta: float = 0.4,
    edits: Edits | None = None,
) -> Predict:
    """Semantic guidance (Brack et al. 2023): as `erase`, but only where a concept shows most, late,
    with momentum.

        d_i = -w_i (e_i - u), set to 0 where |d_i| is below its quantile `threshold` over the
        positions of each channel
        g   = sum_i d_i + momentum v;    v <- beta v + (1 - beta) g        (v = 0 on the first step that runs)
        eps = u + scale (c - u) + g,     without g while step.index < warmup, in which v already gathers

    warmup counts in the full schedule, as step.index does. A negative weight leads towards a
    concept.
    """
    call, weights = _with_concepts(unet, uncond, cond, concepts, scale, erase_scale, edits)
    expect.number("threshold", threshold, 0, 1)
    expect.whole_number("warmup", warmup, 0)
    expect.number("momentum", momentum)
    expect.number("beta", beta, 0, 1)
    v, last = None, 0

    def state(x, step):
        """v, and whether the step is late enough to be guided."""
        nonlocal v, last
        if 0 < len(step.times) <= warmup:
            raise ValueError(
                f"warmup is {warmup}, expected less than the {len(step.times)} steps: none is guided"
            )
        if v is None or step.index <= last:  # a new run
            v = torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
        last = step.index
        return v, torch.full((), step.index >= warmup, device=x.device)

    def combine(v, late, u, *eps_of_concepts_and_c):
        *concept_eps, c = eps_of_concepts_and_c
        g = momentum * v
        for w, e in zip(weights, concept_eps):
            d = (-w * (e - u)).to(v)
            g = g + torch.where(d.abs() >= _quantile(d.abs(), threshold), d, 0)
        eps = u + scale * (c - u)
        return torch.where(late, (eps + g).to(eps), eps), beta * v + (1 - beta) * g

    def predict(x, step):
        nonlocal v
        now = state(x, step)
        eps, v = combine(*now, *call(x, step))
        return eps

    def graph(x, step, update, *tensors):
        nonlocal v

        def function(groups, v, late, *tensors):
            eps, v = combine(v, late, *groups)
            return update(eps, *tensors), v

        key = ("sega", scale, *weights, threshold, momentum, beta, update)
        out, v = call.graph(key, function, x, step, *state(x, step), *tensors)
        return out

    predict.graph = call.graph and graph
    return predict


def _quantile(x: Tensor, q: float) -> Tensor:
    """The q-quantile over the positions of each row and channel, (B, C, h, w) -> (B, C, 1, 1)."""
    return x.flatten(2).quantile(q, dim=2)[:, :, None, None]


def _with_concepts(unet, uncond, cond, concepts: Tensor, scale, erase_scale, edits: Edits | None):
    """A call(x, step) -> eps of uncond, of each concept and of cond, in one UNet call; and the
    concepts' weights."""
    expect.number("guidance scale", scale)
    if concepts.ndim not in (3, 4):
        raise ValueError(
            f"concepts has shape {tuple(concepts.shape)}, expected (n, L, D) or (n, B, L, D)"
        )
    weights = (
        list(erase_scale)
        if isinstance(erase_scale, (list, tuple))
        else [erase_scale] * len(concepts)
    )
    if len(weights) != len(concepts):
        raise ValueError(
            f"erase_scale is {erase_scale!r}, expected one weight or one per concept ({len(concepts)})"
        )
    for weight in weights:
        expect.number("erase_scale", weight)
    each = concepts[:, None] if concepts.ndim == 3 else concepts
    groups = [("uncond", uncond), *(("concepts", rows) for rows in each), ("cond", cond)]
    return _grouped(unet, groups, edits), weights


def _grouped(unet, groups: list[tuple[str, Tensor | Sequence[Tensor]]], edits: Edits | None):
    """A call(x, step) -> one eps (B, 4, h, w) per group.

    Keys and values of the context are projected once, on the first call (unet.prepare), unless the
    context changes from step to step, and times once for all steps (unet.prepare_times), unless
    gradients are wanted. A UNet with a `replay` (cuda_graph.py) is called through it; its graphs
    hold for the code of attention and the weights' places of now.
    """
    replay = getattr(unet, "replay", None)
    fixed = all(isinstance(rows, Tensor) for _, rows in groups)
    prepare, prepare_times = getattr(unet, "prepare", None), getattr(unet, "prepare_times", None)
    prepared, times = {}, {}  # batch size -> prepared context; t -> its row of prepare_times

    def context_for(batch, step):
        parts = [_rows(name, rows, batch, step) for name, rows in groups]
        if len({part.shape for part in parts}) > 1:
            got = ", ".join(f"{name} {tuple(part.shape)}" for (name, _), part in zip(groups, parts))
            raise ValueError(f"the texts differ in shape: {got}, expected one (L, D) for all")
        return torch.cat(parts)

    def prepared_for(batch, step):
        if not fixed or prepare is None or torch.is_grad_enabled():
            return context_for(batch, step)
        if batch not in prepared:
            prepared[batch] = prepare(context_for(batch, step))
        return prepared[batch]

    def time_for(x, step):
        if prepare_times is None or torch.is_grad_enabled():
            return torch.full((), step.t, device=x.device)
        if step.t not in times:
            run = tuple(dict.fromkeys((*step.times, step.t)))
            times.update(zip(run, prepare_times(torch.tensor(run, device=x.device)).split(1)))
        return times[step.t]

    def inputs(x, step):
        return (
            x,
            time_for(x, step),
            prepared_for(len(x), step),
            edits(step) if edits is not None else {},
        )

    def graph(key, function, x, step, *tensors):
        """function(eps of each group, *tensors): the UNet and what follows as one CUDA graph. key:
        what function is."""

        def whole(tensors, *inputs):
            return function(unet(*inputs).chunk(len(groups)), *tensors)

        state = (
            unet.attention,
            *(p.data_ptr() for p in unet.parameters() if not p.is_mkldnn),
        )  # never so on CUDA
        return replay((state, key), whole, tensors, *inputs(x, step))

    def call(x, step):
        if replay is None or torch.is_grad_enabled():
            return unet(*inputs(x, step)).chunk(len(groups))
        return graph("unet", lambda eps: eps, x, step)

    call.graph = None if replay is None else graph
    return call


def _combined(call, key, combine: Callable[..., Tensor]) -> Predict:
    """predict(x, step) = combine(*call(x, step)), with its `graph` if there is one. key: what
    `combine` computes.

    predict.graph(x, step, update, *tensors) == update(predict(x, step), *tensors): with the
    sampler's update the whole step is one CUDA graph (samplers.take).
    """

    def predict(x, step):
        return combine(*call(x, step))

    def graph(x, step, update, *tensors):
        def function(groups, *tensors):
            return update(combine(*groups), *tensors)

        return call.graph((key, update), function, x, step, *tensors)

    predict.graph = call.graph and graph
    return predict


def _rows(name: str, rows: Tensor | Sequence[Tensor], batch: int, step: Step) -> Tensor:
    """The (batch, L, D) rows of one group at this step."""
    if isinstance(rows, (list, tuple)):
        if step.index >= len(rows):
            raise ValueError(
                f"{name} is a list of {len(rows)} entries, but step {step.index} needs one entry per step"
            )
        rows = rows[step.index]
    if not (isinstance(rows, Tensor) and rows.ndim == 3 and len(rows) in (1, batch)):
        got = f"has shape {tuple(rows.shape)}" if isinstance(rows, Tensor) else f"is {rows!r:.80}"
        raise ValueError(f"{name} {got}, expected (1, L, D) or one per latent, ({batch}, L, D)")
    return rows.expand(batch, -1, -1)
