"""Learning rates over a training, as shares of the peak.

1. A schedule by name belongs to one training: warm-up, then constant, linear or cosine down to a floor. A later training
   that names one again re-warms and re-decays (arXiv:2403.08763).
2. `Infinite` has no end (arXiv:2503.02844). Its steps are absolute, over all trainings of a model, so more data never
   changes a rate that was used before.
3. Steps count from 0 and the warm-up from (step + 1) / warmup, so the first step is not wasted on a rate of zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

Schedule = Literal["constant", "linear", "cosine"]
Factor = Callable[[int], float]
"""(absolute step) -> share of the peak rate."""


def learning_rate(step: int, steps: int, peak: float, warmup: int, schedule: Schedule, floor: float = 0.0) -> float:
    """The rate of optimizer step `step` (0-based) of `steps`: linear warm-up to `peak`, then down to `floor * peak`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    share = min(1.0, (step - warmup) / max(1, steps - warmup))
    shape = {"constant": 1.0, "linear": 1.0 - share, "cosine": _half_cosine(share)}[schedule]
    return peak * (floor + (1.0 - floor) * shape)


def warmup_steps(warmup: float, steps: int) -> int:
    """Steps of warm-up, given as their share of all steps (below 1) or as their number."""
    return round(warmup * steps) if warmup < 1 else int(warmup)


def _half_cosine(share: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * share))


def _inverse_root(share: float) -> float:
    """From 1 to 0 along 1 / sqrt(1 + 10 * share)."""
    return 1.0 - ((1.0 + 10.0 * share) ** -0.5 - 1.0) / (11.0**-0.5 - 1.0)


@dataclass(frozen=True)
class Infinite:
    """Warm-up to the peak, cool-down to a plateau, the plateau for as long as data comes, and annealing for a release.

    All positions are absolute steps, all rates shares of the peak:

        step < warmup            (step + 1) / warmup
        step < cooled            from 1 to plateau along `shape`
        step < annealing         plateau
        then, a from 0 to 1      plateau * (floor / plateau) ** a,   a = (step - annealing) / annealing_steps

    Attributes:
        warmup: steps of linear warm-up.
        cooled: where the plateau begins. Without a cool-down (equal to `warmup`) the warm-up ends on the plateau; with a
            plateau of 1 this is warm-up, stable, decay.
        plateau: the rate between cool-down and annealing.
        floor: the rate at the end of annealing and after it, above 0.
        shape: of the cool-down.
        annealing: where annealing begins; None is never. See `annealed`.
        annealing_steps: how long it takes.

    Raises:
        ValueError: positions out of order, or rates that do not satisfy 0 < floor <= plateau <= 1.
    """

    warmup: int
    cooled: int
    plateau: float
    floor: float
    shape: Literal["cosine", "linear", "inverse_root"] = "cosine"
    annealing: int | None = None
    annealing_steps: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.floor <= self.plateau <= 1:
            raise ValueError(f"rates must satisfy 0 < floor <= plateau <= 1, not {self.floor} and {self.plateau}")
        if not 0 <= self.warmup <= self.cooled:
            raise ValueError(f"the plateau begins at {self.cooled}, before the warm-up ends at {self.warmup}")
        if self.annealing is not None and (self.annealing < self.cooled or self.annealing_steps < 1):
            raise ValueError(
                f"annealing takes at least one step and begins on the plateau (from {self.cooled}), not "
                f"{self.annealing_steps} steps from {self.annealing}"
            )

    def __call__(self, step: int) -> float:
        """The share of the peak at an absolute step."""
        if step < self.warmup:
            top = 1.0 if self.cooled > self.warmup else self.plateau
            return top * (step + 1) / self.warmup
        if step < self.cooled:
            share = (step - self.warmup) / (self.cooled - self.warmup)
            left = {"cosine": _half_cosine, "linear": lambda q: 1.0 - q, "inverse_root": _inverse_root}[self.shape](
                share
            )
            return self.plateau + (1.0 - self.plateau) * left
        if self.annealing is None or step < self.annealing:
            return self.plateau
        share = min(1.0, (step - self.annealing) / self.annealing_steps)
        return self.plateau * (self.floor / self.plateau) ** share

    def annealed(self, start: int, steps: int) -> Infinite:
        """The branch that leaves the plateau at `start` and reaches the floor `steps` later; this one stays as it is."""
        return replace(self, annealing=start, annealing_steps=steps)
