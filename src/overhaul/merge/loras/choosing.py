"""Which adapters of a pool are merged, by what they say on the examples, by likeness to a fresh one, or by rank.

Likeness of two changes D1, D2 over all layers, each a product of s_i B_i A_i, without ever forming one:

    cosine    <D1, D2> / |D1| |D2|,     <B1 A1, B2 A2> = trace((A1 A2') (B2' B1))
    fisher    the same of the squared entries: (sum_r b_r a_r)^2 is again a product, of columns b_r * b_q and rows a_r * a_q

"clamp" counts only entries on which both agree in sign, "abs" counts all as agreeing: these need the entries, one layer of
two adapters at a time. A layer that one of them leaves alone counts in the length of the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from overhaul import session
from overhaul.adapter_folders import LowRank
from overhaul.data.examples import Examples
from overhaul.merge.loras.layers import Adapter, added
from overhaul.merge.loras.learning import measured

Choice = Literal["evaluation", "cosine", "clamp", "abs", "fisher", "rank", "random"]


def worth(
    choice: Choice,
    model: nn.Module,
    pool: Sequence[Adapter],
    target: Adapter,
    examples: Examples,
    draw: torch.Generator,
) -> list[float]:
    """A number for each adapter; those with the largest are taken.

    Args:
        choice: by what.
        model: the base, for "evaluation": minus the loss of the base with each adapter alone.
        pool: the adapters.
        target: the fresh adapter, for what goes by likeness.
        examples: for "evaluation".
        draw: for "random".
    """
    if choice == "random":
        return torch.rand(len(pool), generator=draw).tolist()
    if choice == "rank":
        return [float(max(one.rank for one in each.values())) for each in pool]
    found: list[float] = []
    for each in session.progress(pool, "measuring adapters", len(pool)):
        if choice == "evaluation":
            with added(model, each):
                found.append(-measured(model, examples)[0])
        else:
            found.append(likeness(each, target, choice))
    return found


def likeness(one: Adapter, other: Adapter, choice: str = "cosine") -> float:
    """Between -1 and 1; 0 where one of them is nothing."""
    together = sum(product(one[name], other[name], choice) for name in one.keys() & other.keys())
    squares = [sum(product(part, part, choice) for part in each.values()) for each in (one, other)]
    length = (squares[0] * squares[1]) ** 0.5
    return together / length if length else 0.0


def product(one: LowRank, other: LowRank, choice: str = "cosine") -> float:
    """The inner product of two changes of one layer."""
    if choice in ("clamp", "abs"):
        entries = one.dense.double() * other.dense.double()
        return float((entries.clamp(min=0) if choice == "clamp" else entries.abs()).sum())
    if choice == "fisher":
        one, other = squared(one), squared(other)
    (b, a), (c, d) = ((each.b.double() * each.scale, each.a.double()) for each in (one, other))
    return float(((a @ d.T) * (b.T @ c)).sum())


def squared(one: LowRank) -> LowRank:
    """A change whose entries are the squares of another's."""
    b, a = (one.b * one.scale).double(), one.a.double()
    return LowRank(_pairs(a.T).T, _pairs(b), torch.ones(one.rank**2, dtype=torch.double, device=a.device))


def _pairs(columns: Tensor) -> Tensor:
    """[n, r] -> [n, r r]: the products of every two columns."""
    return (columns[:, :, None] * columns[:, None, :]).flatten(1)
