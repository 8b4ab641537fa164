"""Guidance: functions that turn the UNet and text embeddings into a noise predictor, predict(x, step) -> eps.

    conditional  eps = e(cond)
    cfg          eps = e(uncond) + scale (e(cond) - e(uncond))
    erase        eps = cfg - sum_i erase_scale_i (e(concept_i) - e(uncond))

Sources: Ho & Salimans 2022 (arXiv 2207.12598); erase is the negation of Liu et al. 2022 (arXiv 2206.01714). All groups
of rows go through the UNet in one call, group-major with the conditional group LAST, because an AttentionEdit addresses
the last rows of the batch. The UNet is any callable

    unet(x (B, 4, h, w), t (0-d tensor), context (G*B, L, D), edits) -> eps (G*B, 4, h, w)
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from .samplers import Step

Edits = Callable[[Step], Mapping]  # step -> {site name: AttentionEdit}
Predict = Callable[[Tensor, Step], Tensor]


def conditional(unet, cond: Tensor, edits: Edits | None = None) -> Predict:
    """eps = e(cond). cond: (B, L, D), or (1, L, D) for every latent."""
    call = _grouped(unet, [("cond", cond)], edits)
    return lambda x, step: call(x, step)[0]


def cfg(
    unet, uncond: Tensor | Sequence[Tensor], cond: Tensor, scale: float = 7.5, edits: Edits | None = None
) -> Predict:
    """Classifier-free guidance, eps = u + scale (c - u). With scale 1 no unconditional half is computed.

    cond: (B, L, D) or (1, L, D).  uncond: the same, or a list with one such tensor per step of the full schedule
    (entry step.index is used; null-text inversion makes such a list).
    """
    if scale == 1:
        return conditional(unet, cond, edits)
    call = _grouped(unet, [("uncond", uncond), ("cond", cond)], edits)

    def predict(x, step):
        u, c = call(x, step)
        return u + scale * (c - u)

    return predict


def erase(
    unet,
    uncond: Tensor | Sequence[Tensor],
    cond: Tensor,
    concepts: Tensor,
    scale: float = 7.5,
    erase_scale: float | Sequence[float] = 10.0,
    edits: Edits | None = None,
) -> Predict:
    """Guidance away from concepts, eps = u + scale (c - u) - sum_i w_i (e_i - u), in one UNet call of 2 + n groups.

    concepts: (n, L, D), each row for every latent.  erase_scale: w, one weight for all concepts or one each.
    """
    if concepts.ndim != 3:
        raise ValueError(f"concepts has shape {tuple(concepts.shape)}, expected (n, L, D): one row per concept")
    weights = torch.as_tensor(erase_scale, dtype=torch.float64)
    if weights.shape not in ((), (len(concepts),)):
        raise ValueError(f"erase_scale is {erase_scale!r}, expected one weight or one per concept ({len(concepts)})")
    weights = weights.expand(len(concepts)).tolist()
    groups = [("uncond", uncond), *(("concepts", row[None]) for row in concepts), ("cond", cond)]
    call = _grouped(unet, groups, edits)

    def predict(x, step):
        u, *concept_eps, c = call(x, step)
        eps = u + scale * (c - u)
        for w, e in zip(weights, concept_eps):
            eps = eps - w * (e - u)
        return eps

    return predict


def _grouped(unet, groups: list[tuple[str, Tensor | Sequence[Tensor]]], edits: Edits | None):
    """A call(x, step) -> one eps (B, 4, h, w) per group.

    Keys and values of the context are projected once, on the first call (unet.prepare), unless the context changes from
    step to step or gradients are wanted.
    """
    fixed = all(isinstance(rows, Tensor) for _, rows in groups)
    prepare = getattr(unet, "prepare", None)
    prepared = {}  # batch size -> prepared context

    def context_for(x, step):
        batch = len(x)
        if not fixed or prepare is None or torch.is_grad_enabled():
            return torch.cat([_rows(name, rows, batch, step) for name, rows in groups])
        if batch not in prepared:
            prepared[batch] = prepare(torch.cat([_rows(name, rows, batch, step) for name, rows in groups]))
        return prepared[batch]

    def call(x, step):
        t = torch.full((), step.t, device=x.device)
        eps = unet(x, t, context_for(x, step), edits(step) if edits is not None else {})
        return eps.chunk(len(groups))

    return call


def _rows(name: str, rows: Tensor | Sequence[Tensor], batch: int, step: Step) -> Tensor:
    """The (batch, L, D) rows of one group at this step."""
    if not isinstance(rows, Tensor):
        if step.index >= len(rows):
            raise ValueError(f"{name} is a list of {len(rows)} entries, but step {step.index} needs one entry per step")
        rows = rows[step.index]
    if rows.ndim != 3 or rows.shape[0] not in (1, batch):
        raise ValueError(f"{name} has shape {tuple(rows.shape)}, expected (1, L, D) or one per latent, ({batch}, L, D)")
    return rows.expand(batch, -1, -1)
