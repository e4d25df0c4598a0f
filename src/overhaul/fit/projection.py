"""What becomes of a forget and a retain gradient: their sum, or the retain gradient without what undoes forgetting.

    penalty   d = gamma g_f + alpha g_r
    bilevel   d = gamma g_f + alpha (g_r - c g_f),   c = <g_r, g_f> / <g_f, g_f>

over all trained parameters as one vector. All sums are in float32.

1. <d, g_f> = gamma <g_f, g_f>: to first order a step of plain descent lowers the forget loss, whatever the retain gradient.
2. AdamW steps along P m, m the running mean of d and P a diagonal that depends on d. With `metric="adam"` the inner product
   is <a, b> = a' P b with the P of the step to come, so that <P d, g_f> = gamma <P g_f, g_f>. P and c determine each other
   and are found by iteration. The running mean and weight decay stay outside, and so does the first step: there P is
   1 / |d|, and rounding would decide.
3. Where the forget gradient is below the rounding of the sum (a saturated NPO) nothing is projected out: c would be 0 / 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from overhaul.fit import Combine, Combined, Gradients
from overhaul.fit.combining import local

Metric = Literal["euclidean", "adam"]
Products = tuple[float, float, float]
"""<g_f, g_f>, <g_f, g_r>, <g_r, g_r>."""

NEGLIGIBLE = torch.finfo(torch.float32).eps ** 2
"""Of <g_r, g_r>: a forget gradient whose square is smaller is lost when it is added to the retain gradient."""

PASSES, SETTLED = 30, 1e-6


def penalty(gamma: float = 1.0, alpha: float = 1.0) -> Combine:
    """The weighted sum of the gradients of `forget` and `retain`: what training on a weighted loss does."""

    def combine(gradients: Gradients) -> Combined:
        pairs = zip(gradients.of("forget"), gradients.of("retain"), strict=True)
        return Combined((gamma * f + alpha * r for f, r in pairs), curves(products(gradients)))

    return combine


def bilevel(gamma: float = 1.0, alpha: float = 1.0, metric: Metric = "euclidean") -> Combine:
    """The forget gradient whole, and of the retain gradient what is orthogonal to it.

    Args:
        gamma: weight of the forget gradient.
        alpha: weight of the retain gradient's orthogonal part.
        metric: in what inner product; "adam" needs an Adam optimizer.
    """

    def combine(gradients: Gradients) -> Combined:
        known = products(gradients)
        removed = share(known)
        if metric == "adam" and removed:
            removed = _settled(gradients, known, gamma, alpha, removed)
        pairs = zip(gradients.of("forget"), project(gradients, removed), strict=True)
        return Combined((gamma * f + alpha * r for f, r in pairs), curves(known))

    return combine


def project(gradients: Gradients, removed: float) -> Iterator[Tensor]:
    """The retain gradient less `removed` times the forget gradient, parameter by parameter."""
    for f, r in zip(gradients.of("forget"), gradients.of("retain"), strict=True):
        yield r - removed * f


def products(gradients: Gradients) -> Products:
    """The inner products of both gradients over all parameters, and all shards."""
    sums = [torch.zeros(3)]
    for f, r in zip(gradients.of("forget"), gradients.of("retain"), strict=True):
        sums.append(torch.stack([(f * f).sum(), (f * r).sum(), (r * r).sum()]))
    ff, fr, rr = gradients.total(torch.stack([part.to(sums[-1].device) for part in sums]).sum(dim=0))
    return ff, fr, rr


def share(known: Products) -> float:
    """How much of the forget gradient lies in the retain gradient; 0 where the forget gradient is nothing beside it."""
    ff, fr, rr = known
    return 0.0 if ff <= NEGLIGIBLE * rr else fr / ff


def curves(known: Products) -> dict[str, float]:
    """The inner products as curves."""
    names = ("forget gradient squared", "forget times retain gradient", "retain gradient squared")
    return dict(zip(names, known, strict=True))


def _settled(gradients: Gradients, known: Products, gamma: float, alpha: float, removed: float) -> float:
    """The share in the metric of the AdamW step that follows from it."""
    if not gradients.optimizer.state:
        return removed
    for _ in range(PASSES):
        ff, fr = _adam_products(gradients, gamma - alpha * removed, alpha, known)
        if abs(fr / ff - removed) <= SETTLED * abs(removed):
            return fr / ff
        removed = fr / ff
    return removed


def _adam_products(gradients: Gradients, of_forget: float, of_retain: float, known: Products) -> tuple[float, float]:
    """<g_f, g_f> and <g_f, g_r> in the metric of the AdamW step along of_forget g_f + of_retain g_r, clipped."""
    ff, fr, rr = known
    norm = max(of_forget**2 * ff + 2 * of_forget * of_retain * fr + of_retain**2 * rr, 0.0) ** 0.5
    clipped = min(1.0, gradients.clip / (norm + 1e-6))
    groups = {id(p): group for group in gradients.optimizer.param_groups for p in group["params"]}
    sums = [torch.zeros(2)]
    pairs = zip(gradients.parameters, gradients.of("forget"), gradients.of("retain"), strict=True)
    for parameter, f, r in pairs:
        group, state = groups[id(parameter)], gradients.optimizer.state.get(parameter, {})
        kept = group["betas"][1]
        second = (1 - kept) * (clipped * (of_forget * f + of_retain * r)).square()
        if state:
            second += kept * local(state["exp_avg_sq"]).float()
        steps = float(state["step"]) + 1 if state else 1.0
        along = f / ((second / (1 - kept**steps)).sqrt() + group["eps"])
        sums.append(torch.stack([(along * f).sum(), (along * r).sum()]))
    forget, both = gradients.total(torch.stack([part.to(sums[-1].device) for part in sums]).sum(dim=0))
    return forget, both
