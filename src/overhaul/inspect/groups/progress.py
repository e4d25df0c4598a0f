"""How much of the progress on a reference benchmark arrives elsewhere: slopes over models, with intervals over families."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.special import logit, ndtri

from overhaul.intervals import BOOTSTRAPS, limits, multiplicities

Scale = Literal["probit", "logit"]
FAMILIES = 3
"""Families of models that an interval needs."""


def stretched(accuracy: np.ndarray, rows: int | Sequence[int], scale: Scale) -> np.ndarray:
    """Accuracies on a scale without ends; 0 and 1 count as half a row."""
    half = 0.5 / np.asarray(rows, dtype=float)
    return (ndtri if scale == "probit" else logit)(np.clip(accuracy, half, 1 - half))


def slopes(x: np.ndarray, y: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Least-squares slope of each series on x, [series]; NaN where x does not vary.

    Args:
        x: of the models, [models].
        y: series by model, [series, models].
        weights: how often each model counts.
    """
    counts = np.ones(len(x)) if weights is None else weights
    from_mean = x - counts @ x / counts.sum()
    spread = counts @ from_mean**2
    if spread <= 1e-15 * counts.sum():
        return np.full(len(y), np.nan)
    return y @ (counts * from_mean) / spread


@dataclass(frozen=True)
class Rates:
    """Slopes of several series on one reference.

    Attributes:
        names: of the series.
        values: the slopes, [series]; NaN where the reference does not vary.
        drawn: the same with families of models drawn anew, [draws, series]; None with too few families.
    """

    names: Sequence[str]
    values: np.ndarray
    drawn: np.ndarray | None

    @classmethod
    def of(cls, x: np.ndarray, series: Mapping[str, np.ndarray], families: Sequence[Hashable], seed: int) -> Rates:
        """Slopes of each series on x; draws in which x does not vary say nothing and are left out."""
        y = np.stack(list(series.values()))
        drawn = None
        if len(set(families)) >= FAMILIES:
            every = np.stack([slopes(x, y, counts) for counts in multiplicities(families, BOOTSTRAPS, seed)])
            known = every[np.isfinite(every).all(axis=1)]
            drawn = known if len(known) >= BOOTSTRAPS / 2 else None
        return cls(list(series), slopes(x, y), drawn)

    def row(self, name: str) -> tuple[float | None, float | None, float | None]:
        """A slope with its interval."""
        n = list(self.names).index(name)
        return _told(self.values[n], None if self.drawn is None else self.drawn[:, n])

    def gap(self, one: str, other: str) -> tuple[float | None, float | None, float | None]:
        """The difference of two slopes, with its interval."""
        a, b = (list(self.names).index(name) for name in (one, other))
        return _told(
            self.values[a] - self.values[b], None if self.drawn is None else self.drawn[:, a] - self.drawn[:, b]
        )

    def ratio(self, one: str, other: str) -> tuple[float | None, float | None, float | None]:
        """One slope as a multiple of another; nothing where the other may as well be 0 or less."""
        a, b = (list(self.names).index(name) for name in (one, other))
        if not self.values[b] > 0:
            return None, None, None
        sure = self.drawn is not None and (self.drawn[:, b] > 0).all()
        return _told(self.values[a] / self.values[b], self.drawn[:, a] / self.drawn[:, b] if sure else None)  # pyright: ignore[reportOptionalSubscript]


def _told(value: float, drawn: np.ndarray | None) -> tuple[float | None, float | None, float | None]:
    if not np.isfinite(value):
        return None, None, None
    low, high = (None, None) if drawn is None else map(float, limits(drawn))
    return float(value), low, high
