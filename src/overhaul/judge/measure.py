"""One measured number, with all that a report needs to judge it."""

from __future__ import annotations

from dataclasses import dataclass


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
        anchor: what a model that was trained without the data has; known where that is wanted.
        help: what it is in plain words.
        runs: of a time, every timed run, of which the value is the fastest.
    """

    group: str
    metric: str
    label: str
    on: str
    unit: str
    better: str
    wanted: str
    value: float
    n: int
    anchor: float | None = None
    help: str = ""
    runs: tuple[float, ...] = ()
