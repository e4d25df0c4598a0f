"""Mixtures of a pool and of its controls, each measured on the same examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from overhaul.adapter_folders import LowRank
from overhaul.data.examples import Examples, join
from overhaul.merge.loras import formulas
from overhaul.merge.loras.how import How
from overhaul.merge.loras.layers import Adapter, added
from overhaul.merge.loras.learning import Curves, Lesson, learnt, measured
from overhaul.outcome import Table

Row = tuple[str, float, float, int, int]


@dataclass(frozen=True)
class Merge:
    """A mixture as one adapter.

    Attributes:
        adapter: it.
        coefficients: of each layer, of each of the merged adapters; none where there are no coefficients.
        curves: of its training.
        learnt: how many numbers were learnt.
    """

    adapter: Mapping[str, LowRank]
    coefficients: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    curves: Curves = field(default_factory=dict)
    learnt: int = 0

    @property
    def is_nothing(self) -> bool:
        """Whether it leaves the model as it is."""
        return not any(bool(one.scale.any()) and bool(one.b.any()) for one in self.adapter.values())


@dataclass
class Trial:
    """What is compared.

    Attributes:
        model: the base.
        how: how pools are merged.
        judged: examples on which all is measured.
        draw: for what is drawn.
        rows: what was measured so far.
    """

    model: nn.Module
    how: How
    judged: Examples
    draw: torch.Generator
    rows: list[Row] = field(default_factory=list)

    def measure(self, name: str, adapter: Adapter, steps: int = 0, learnt: int = 0) -> None:
        """Add a row: the model with an adapter."""
        with added(self.model, adapter):
            self.rows.append((name, *measured(self.model, self.judged), steps, learnt))

    def merge(self, name: str, experts: Sequence[Adapter], lesson: Lesson) -> Merge:
        """Merge adapters and add a row."""
        made = self._merged(name, experts, lesson)
        self.measure(name, made.adapter, lesson.training.steps if made.curves else 0, made.learnt)
        return made

    def _merged(self, name: str, experts: Sequence[Adapter], lesson: Lesson) -> Merge:
        how, count = self.how, len(experts)
        if how.kind == "adaptive":
            return Merge(*learnt(self.model, experts, how, lesson, self.draw, name))
        if how.kind == "search":
            return self._found(experts, join([lesson.train, lesson.valid]))
        if how.kind == "average":
            equal = [1 / count] * count
            return Merge(formulas.weighted(experts, equal), _everywhere(experts, equal))
        made = formulas.ties(experts, how.density) if how.kind == "ties" else formulas.tsv(experts, how.triplets)
        return Merge(made)

    def _found(self, experts: Sequence[Adapter], examples: Examples) -> Merge:
        def loss(weights: list[float]) -> float:
            with added(self.model, formulas.weighted(experts, weights, self.how.rule)):
                return measured(self.model, examples)[0]

        best, tried = formulas.search(loss, len(experts), self.how.evaluations)
        made = formulas.weighted(experts, best, self.how.rule)
        return Merge(made, _everywhere(experts, best), {"objective of the search": tried}, len(experts))

    @property
    def table(self) -> Table:
        """All that was measured."""
        return Table(("", "loss, nats", "share right", "steps", "numbers learnt"), tuple(self.rows))

    def loss(self, name: str) -> float:
        """Of a row."""
        return next(row[1] for row in self.rows if row[0] == name)


def _everywhere(experts: Sequence[Adapter], weights: Sequence[float]) -> dict[str, dict[int, float]]:
    """One coefficient for each adapter, by layer."""
    found: dict[str, dict[int, float]] = {}
    for n, expert in enumerate(experts):
        for name in expert:
            found.setdefault(name, {})[n] = weights[n]
    return found
