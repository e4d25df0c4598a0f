"""The claim's experiment on two small networks: its exact parts; the full run is `overhaul reproduce`."""

from __future__ import annotations

import math

import numpy as np

from overhaul.claims.geographic_generalization import ANGLES, CLAIM, Size, experiment, turned
from overhaul.data import corpora


def test_digits_are_turned_by_the_angle_of_their_region() -> None:
    rows = corpora.digits("validation")[:4]
    made = turned(rows, np.arange(4))
    assert [row["region"] for row in made.rows] == [f"{angle} degrees" for angle in ANGLES]
    assert np.array_equal(made.items[0]["pixel_values"][0], rows[0]["image"])
    assert not np.array_equal(made.items[3]["pixel_values"][0], rows[3]["image"])
    assert float(made.items[3]["pixel_values"].min()) >= -1.0 - 1e-6


def test_a_run_has_the_numbers_that_the_checks_read() -> None:
    found = experiment(0, Size(widths=(2,), steps=5))
    assert all(map(math.isfinite, found.values()))
    for name in ("before", "after", "after the stream", "after the stream, random groups"):
        assert 0 <= found[f"width 2, {name}: max - min"] <= 1
        assert found[f"width 2, {name}: average"] <= 1
    complete = {
        name.replace("width 2", f"width {width}"): value for name, value in found.items() for width in (2, 4, 8, 16, 32)
    }
    assert all(check.passes(complete) in (True, False) for check in CLAIM.checks)
