"""Bootstrap intervals: how far a number may be off because other rows, people or models could have been drawn.

    unit     what is drawn anew, with replacement: a row, or all rows of a cluster (questions about a person, photographs
             of a home, models of a family), since ten that belong together are no ten samples
    limits   the (1 - level) / 2 quantile of the draws and its counterpart (percentile interval)

Draws come from a seed of their own: the same data gives the same interval, and torch's generator does not move.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import numpy as np

from overhaul.errors import RequestError

BOOTSTRAPS = 1000
LEVEL = 0.95


def multiplicities(
    units: Sequence[Hashable], draws: int = BOOTSTRAPS, seed: int | np.random.Generator = 0
) -> Iterator[np.ndarray]:
    """How often each item counts in each draw, [n]: as often as its unit was drawn.

    Args:
        units: the unit of each item; `range(n)` where every item is one by itself.
        draws: how often as many units as there are are drawn.
        seed: or a generator, which goes on.
    """
    codes = numbered(units)
    count = int(codes.max()) + 1
    draw = np.random.default_rng(seed)
    for _ in range(draws):
        yield np.bincount(draw.integers(count, size=count), minlength=count)[codes]


def numbered(units: Sequence[Hashable]) -> np.ndarray:
    """Units as numbers from 0, in the order in which they first appear."""
    known: dict[Hashable, int] = {}
    return np.array([known.setdefault(unit, len(known)) for unit in units], dtype=np.int64)


def limits(drawn: Any, level: float = LEVEL) -> Any:
    """Lower and upper limit, [2, ...], of what a statistic was in each draw, [draws, ...]."""
    outside = (1 - level) / 2
    return np.quantile(np.asarray(drawn, dtype=float), (outside, 1 - outside), axis=0)


def interval(
    statistic: Callable[..., float],
    *samples: tuple[Sequence[Any], Sequence[Hashable]],
    draws: int = BOOTSTRAPS,
    level: float = LEVEL,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile interval of a statistic.

    Args:
        statistic: takes one list of values for each of `samples`, such as `auc`.
        samples: the values, and the unit (the row's person) of each; each sample is drawn from itself.
        draws: how often units are drawn anew.
        level: the share of the draws that lies within.
        seed: of the draws.

    Raises:
        RequestError: a sample has fewer than two units, so nothing can be said about others.
    """
    for values, units in samples:
        if len(values) != len(units):
            raise ValueError(f"{len(values)} values but {len(units)} units")
        if len(set(units)) < 2:
            raise RequestError("An interval over clusters needs at least two of them; give each person a label.")
    draw = np.random.default_rng(seed)
    each = [(list(values), multiplicities(units, draws, draw)) for values, units in samples]
    drawn = [statistic(*(_repeated(values, next(counts)) for values, counts in each)) for _ in range(draws)]
    low, high = limits(drawn, level)
    return float(low), float(high)


def _repeated(values: Sequence[Any], counts: np.ndarray) -> list[Any]:
    return [value for value, count in zip(values, counts.tolist(), strict=True) for _ in range(count)]
