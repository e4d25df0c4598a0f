"""Accuracy by group, and what of its spread is more than chance or a difference in classes."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.stats import binom

from overhaul.intervals import multiplicities


@dataclass(frozen=True)
class Hits:
    """What some models got right of one set of rows.

    Attributes:
        right: by model and row, [models, n] of 0 and 1.
        groups: places of the rows by the group's name.
        classes: of the rows, numbers; None where rows have none.
    """

    right: np.ndarray
    groups: Mapping[str, np.ndarray]
    classes: np.ndarray | None

    @property
    def average(self) -> np.ndarray:
        """Micro average: the share of all rows, [models]."""
        return self.right.mean(axis=1)

    @cached_property
    def accuracy(self) -> np.ndarray:
        """The share of each group's rows, [models, groups]."""
        return np.stack([self.right[:, places].mean(axis=1) for places in self.groups.values()], axis=1)

    @property
    def sizes(self) -> list[int]:
        """Rows of each group."""
        return [len(places) for places in self.groups.values()]

    def of(self, group: str) -> int:
        """The place of a group."""
        return list(self.groups).index(group)

    @cached_property
    def chance(self) -> np.ndarray:
        """What max - min is expected to be if all groups share the model's average, [models]."""
        return np.array([expected_max_min(float(p), self.sizes) for p in self.average])

    @cached_property
    def adjusted(self) -> tuple[np.ndarray, int] | None:
        """Accuracy by group with every class counting alike, [models, groups], and how many classes all groups have.

        The difference of two groups in it is the mean over classes of the difference within a class. None without classes,
        or where the groups have none in common.
        """
        if self.classes is None:
            return None
        held = [set(self.classes[places].tolist()) for places in self.groups.values()]
        common = sorted(set.intersection(*held))
        if not common:
            return None
        means = [
            np.mean([self.right[:, places[self.classes[places] == each]].mean(axis=1) for each in common], axis=0)
            for places in self.groups.values()
        ]
        return np.stack(means, axis=1), len(common)

    def drawn(self, units: Sequence[Hashable], seed: int, draws: int) -> np.ndarray:
        """Accuracy by group when rows are drawn anew within each group, [draws, models, groups].

        Args:
            units: what of all rows is drawn together.
            seed: of the draws, which are the same for every model.
            draws: how many.
        """
        random = np.random.default_rng(seed)
        found: list[np.ndarray] = []
        for places in self.groups.values():
            counts = multiplicities([units[place] for place in places], draws, random)
            own = self.right[:, places].astype(float)
            found.append(np.stack([own @ each / each.sum() for each in counts]))
        return np.stack(found, axis=2)


def max_min(accuracy: np.ndarray) -> np.ndarray:
    """The best group minus the worst, over the last axis."""
    return accuracy.max(axis=-1) - accuracy.min(axis=-1)


def expected_max_min(accuracy: float, sizes: Sequence[int]) -> float:
    """E[max - min] of independent Binomial(n_g, accuracy) / n_g: what chance alone does, exactly.

    E[max] is the integral of 1 - prod P(X_g <= x) over x from 0 to 1, E[min] that of prod P(X_g > x); both are constant
    between the values that a group can take.
    """
    steps = np.unique(np.concatenate([np.arange(size + 1) / size for size in sizes]))
    widths, left = np.diff(steps), steps[:-1]
    # a hair above, so that 0.1 * 10 counts as 1
    below = np.stack([binom.cdf(np.floor(left * size + 1e-9), size, accuracy) for size in sizes])
    return float(widths @ (1 - below.prod(axis=0) - (1 - below).prod(axis=0)))
