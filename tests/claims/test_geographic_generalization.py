"""The claim of geographic generalization: its checks; the experiment itself, shortened, is a slow test."""

from __future__ import annotations

import math

import numpy as np
import pytest

from overhaul.claims.geographic_generalization import ANGLES, CLAIM, Size, experiment, turned
from overhaul.data import corpora


def test_digits_are_turned_by_the_angle_of_their_region() -> None:
    rows = corpora.digits("validation")[:4]
    made = turned(rows, np.arange(4))
    assert [row["region"] for row in made.rows] == [f"{angle} degrees" for angle in ANGLES]
    assert np.array_equal(made.items[0]["pixel_values"][0], rows[0]["image"])
    assert not np.array_equal(made.items[3]["pixel_values"][0], rows[3]["image"])
    assert float(made.items[3]["pixel_values"].min()) >= -1.0 - 1e-6


def test_the_checks_compare_the_refit_with_before_and_with_the_controls() -> None:
    spread = {"before": 0.5, "after": 0.1, "after the stream": 0.5, "after the stream, random groups": 0.4}
    found = {
        f"width {width}, {name}: {what}": value
        for width in (2, 4, 8, 16, 32)
        for name, gap in spread.items()
        for what, value in (("max - min", gap), ("average", 0.8))
    }
    assert all(check.passes(found) for check in CLAIM.checks)

    def verdicts(**changes: float) -> list[bool]:
        changed = {**found, **{name.replace("_", " "): value for name, value in changes.items()}}
        return [check.passes(changed) for check in CLAIM.checks]

    assert verdicts(**{"width 8, after: max - min": 0.2}) == [True, True, False, True, True, True]
    assert verdicts(**{"width 8, after: average": 0.7}) == [True, True, True, False, True, True]
    assert verdicts(**{"width 4, after the stream: max - min": 0.2}) == [True, True, True, True, False, True]
    falling = {"width 16, before: max - min": 0.44, "width 32, before: max - min": 0.38}
    assert verdicts(**falling)[1] is False


@pytest.mark.slow
def test_the_experiment_measures_everything() -> None:
    found = experiment(0, Size(widths=(2,), steps=5))
    assert all(map(math.isfinite, found.values()))
    assert {name.partition(", ")[2].partition(":")[0] for name in found} >= {"before", "after", "after the stream"}
    assert all(0 <= value <= 1 for value in found.values())
