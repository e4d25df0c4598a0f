"""The knobs of a training that methods share, documented once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from annotated_types import Ge, Gt, Le

from overhaul.fit.optimizers import adamw
from overhaul.fit.schedules import Schedule


@dataclass(frozen=True)
class Regime:
    """How long and how fast a method trains with AdamW.

    Attributes:
        steps: optimizer steps.
        batch_size: examples of each role in one step.
        lr: peak learning rate of AdamW.
        warmup: steps of linear warm-up, as a share of all steps (below 1) or as a number of steps.
        schedule: what follows the warm-up.
        weight_decay: of matrices.
        clip: largest norm of a step's gradient; a longer one is scaled down. None for no limit.
    """

    steps: Annotated[int, Gt(0)] = 200
    batch_size: Annotated[int, Ge(1), Le(2**24)] = 16  # drawing more alone would take hours
    lr: Annotated[float, Gt(0)] = 1e-5
    warmup: Annotated[float, Ge(0)] = 0.1
    schedule: Schedule = "linear"
    weight_decay: Annotated[float, Ge(0)] = 0.0
    clip: Annotated[float, Gt(0)] | None = 1.0

    @property
    def loop(self) -> dict[str, Any]:
        """The knobs as `Training` takes them."""
        names = ("steps", "lr", "warmup", "schedule", "clip")
        return {**{name: getattr(self, name) for name in names}, "optimizer": adamw(weight_decay=self.weight_decay)}

    @property
    def fit(self) -> dict[str, Any]:
        """The knobs as `fit` takes them."""
        return {**self.loop, "batch_size": self.batch_size}
