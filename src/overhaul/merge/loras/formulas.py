"""Mixtures without gradients: of equal parts, of what agrees, of singular vectors, and by a search over one number each."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Literal

import torch
from torch import Tensor

from overhaul.adapter_folders import LowRank
from overhaul.errors import RunError
from overhaul.merge._mixing import agreeing, from_size
from overhaul.merge.loras.layers import Adapter, changed_by, concatenated

BOUND = 1.5
PENALTY = 0.05
"""LoraHub's bounds of a coefficient, and its weight on their mean size."""
Rule = Literal["exact", "separate"]


def by_layer(experts: Sequence[Adapter], merge: Callable[[list[LowRank]], LowRank]) -> dict[str, LowRank]:
    """`merge` on what the experts do to each layer."""
    return {name: merge([expert[name] for expert in experts if name in expert]) for name in changed_by(experts)}


def weighted(experts: Sequence[Adapter], weights: Sequence[float], rule: Rule = "exact") -> dict[str, LowRank]:
    """The sum of w_i s_i B_i A_i; with the rule "separate", of the factors apart, which adds w_i w_j B_i A_j."""
    found: dict[str, LowRank] = {}
    for name in changed_by(experts):
        here = [(expert[name], weight) for expert, weight in zip(experts, weights, strict=True) if name in expert]
        if rule == "separate":
            found[name] = _apart(here)
        else:
            scale = torch.cat([weight * part.scale for part, weight in here])
            found[name] = concatenated([part for part, _ in here], scale)
    return found


def _apart(here: Sequence[tuple[LowRank, float]]) -> LowRank:
    """A = sum w sqrt(s) A_i, B = sum w sqrt(s) B_i; smaller ranks are filled up with zeros."""
    rank = max(part.rank for part, _ in here)
    first, _ = here[0]
    a, b = first.a.new_zeros(rank, first.a.shape[1]), first.b.new_zeros(len(first.b), rank)
    for part, weight in here:
        root = weight * part.scale.sqrt()
        a[: part.rank] += root[:, None] * part.a
        b[:, : part.rank] += root * part.b
    return LowRank(a, b, a.new_ones(rank))


def ties(experts: Sequence[Adapter], density: float) -> dict[str, LowRank]:
    """Of every layer's changes the largest entries, and of these the mean of those with the sign of their sum."""

    def merge(parts: list[LowRank]) -> LowRank:
        kept = [_largest(part.dense, density) for part in parts]
        sign = torch.stack(kept).sum(0).sign()
        return _as_product(agreeing(kept, sign, [1.0] * len(kept)))

    return by_layer(experts, merge)


def _largest(change: Tensor, density: float) -> Tensor:
    count = max(1, round(density * change.numel()))
    return from_size(change, float(change.abs().flatten().kthvalue(change.numel() - count + 1).values))


def _as_product(change: Tensor) -> LowRank:
    """A change of full rank as a product with the identity on its shorter side."""
    out, wide = change.shape
    eye = torch.eye(min(out, wide), device=change.device, dtype=change.dtype)
    a, b = (eye, change) if wide <= out else (change, eye)
    return LowRank(a, b, change.new_ones(len(a)))


def tsv(experts: Sequence[Adapter], rank: int) -> dict[str, LowRank]:
    """The first singular triplets of every change, their vectors made orthogonal to each other, values divided by n."""

    def merge(parts: list[LowRank]) -> LowRank:
        triplets = [part.svd() for part in parts]
        left = torch.cat([u[:, :rank] for u, _, _ in triplets], dim=1)
        values = torch.cat([s[:rank] for _, s, _ in triplets]) / len(experts)
        right = torch.cat([vh[:rank] for _, _, vh in triplets])
        return LowRank(nearest_orthogonal(right), nearest_orthogonal(left), values)

    return by_layer(experts, merge)


def nearest_orthogonal(matrix: Tensor) -> Tensor:
    """The matrix with orthonormal rows or columns that is nearest: its SVD without the singular values."""
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u @ vh


def search(loss: Callable[[list[float]], float], count: int, evaluations: int) -> tuple[list[float], list[float]]:
    """Coefficients by COBYLA, from 0 and between -1.5 and 1.5, of all that were tried the best.

    Args:
        loss: what a mixture with these coefficients costs; not finite for one that is no candidate.
        count: how many coefficients there are.
        evaluations: how many mixtures are tried, the base among them.

    Returns:
        The coefficients, and the objective of each try: loss + 0.05 mean |w|.

    Raises:
        RunError: no candidate has a finite loss.
    """
    from scipy.optimize import minimize

    tried: list[tuple[float, list[float]]] = []

    def objective(w: Any) -> float:
        inside = [min(BOUND, max(-BOUND, float(value))) for value in w]
        value = loss(inside) + PENALTY * sum(map(abs, inside)) / count
        tried.append((value, inside))
        if len(tried) >= evaluations:
            raise _Enough
        return value if math.isfinite(value) else 1e6

    with suppress(_Enough):
        minimize(objective, [0.0] * count, method="COBYLA", bounds=[(-BOUND, BOUND)] * count, options={"rhobeg": 0.5})
    feasible = [one for one in tried if math.isfinite(one[0])]
    if not feasible:
        raise RunError(
            f"merge.loras: none of {len(tried)} mixtures has a finite loss on the examples. Look at adapters and data."
        )
    return min(feasible)[1], [value for value, _ in feasible]


class _Enough(Exception):
    """All evaluations are used up."""
