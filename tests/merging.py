"""The merges' formulas on whole tensors in memory, as the released codes write them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from overhaul import models
from tiny_checkpoints import make

State = Mapping[str, Tensor]


def flat(state: State) -> Tensor:
    return torch.cat([state[name].float().flatten() for name in sorted(state)])


def unflat(vector: Tensor, like: State) -> dict[str, Tensor]:
    made: dict[str, Tensor] = {}
    start = 0
    for name in sorted(like):
        made[name] = vector[start : start + like[name].numel()].view(like[name].shape)
        start += like[name].numel()
    return made


def trimmed(change: Tensor, density: float) -> Tensor:
    """The released code's `topk_values_mask`: from the k-th smallest size on."""
    k = len(change) - int(len(change) * density)
    return change if k == 0 else torch.where(change.abs() >= change.abs().kthvalue(k).values, change, 0)


def ties_change(changes: Sequence[Tensor], density: float) -> Tensor:
    """The released code's `ties_merging` with `dis-mean`: trim, elect by mass with the majority where it is 0, average."""
    kept = torch.stack([trimmed(change, density) for change in changes])
    sign = kept.sum(0).sign()
    sign = torch.where(sign == 0, sign.sum().sign(), sign)
    agreeing = torch.where(torch.where(sign > 0, kept > 0, kept < 0), kept, 0)
    return agreeing.sum(0) / (agreeing != 0).sum(0).clamp(min=1)


def base_and_two(folder: Path, seed: int = 0) -> dict[str, Any]:
    """Materials of a merge: a base and two models, as different from it as they can be."""
    base, *tuned = (models.facts(make("llama", folder / f"case{n}", n)) for n in range(seed, seed + 3))
    return {"base": base, "tuned": tuned}


def mixed(kept: Tensor, weights: Sequence[float], ties: bool, normalize: bool) -> Tensor:
    """Changes [t, ...] of which some entries are 0, as one: mergekit's formulas with and without the election of signs."""
    factors = torch.tensor(weights).view(-1, *[1] * (kept.ndim - 1))
    weighted = kept * factors
    mask = torch.ones_like(weighted)
    if ties:
        majority = torch.where(weighted.sum(0) >= 0, 1.0, -1.0)
        mask = (weighted.sign() == majority).float()
    divisor = (factors * mask).sum(0) if normalize else torch.ones(())
    return (weighted * mask).sum(0) / torch.where(divisor == 0, 1.0, divisor)


VARIED: dict[str, Any] = {
    "merge": ("task_arithmetic", "ties"),
    "weights": ([1.0, 1.0], [0.5, 1.0]),
    "normalize": (False, True),
    "scale": (1.0, 0.5),
    "beta": (0.0, 0.3),
    "outside": ("alpha", "by_position", {"beta": 0.3}),
}
"""Two values of each knob of `Mixing` and `Ramp`, for a case."""
