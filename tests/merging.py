"""The merges' formulas on whole tensors in memory, as the released codes write them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

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
