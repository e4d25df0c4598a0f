"""One measured number, with all that a report needs to judge it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Measure:
    """A number that a model was measured to have.

    Attributes:
        group: what was hoped for: "forgotten", "learned", "kept"; or "cost".
        metric: its name in a recipe.
        label: the field's name for it.
        on: the role, or "model".
        unit: "share" and "probability" lie between 0 and 1; "" is a plain number.
        better: "up" or "down": which way a model improves.
        wanted: "up", "down", "same", "chance" (towards 0.5) or "anchor": which way it should go in this group.
        n: number of examples, or of timed runs, behind it.
        value: a float; None where it cannot be measured.
        anchor: what the model that it is compared with has (one trained without the data, say); known where that is wanted.
        like: the name of that model.
        help: what it is in plain words.
        runs: of a time, every timed run, of which the value is the fastest.
        groups: the same number on each group of rows, where it was asked for by group.
        stderr: the standard error of the value, where it is known.
    """

    group: str
    metric: str
    label: str
    on: str
    unit: str
    better: str
    wanted: str
    value: Any
    n: int
    anchor: float | None = None
    like: str = ""
    help: str = ""
    runs: tuple[float, ...] = ()
    groups: Mapping[str, float] = field(default_factory=dict)
    stderr: float | None = None
