from __future__ import annotations

import math

import numpy as np
import pytest

from overhaul.claims.fairsisa import CLAIM, MINORITY, Size, _digit_sets, experiment, generated
from overhaul.forget.sisa import example_ids

SMALL = Size(draws=1, train=600, calibration=2_000, test=2_000, requests=4, epochs=2.0)


def test_the_minoritys_labels_follow_the_features_less() -> None:
    table = generated(np.random.default_rng(0), 20_000)
    assert table.groups.mean() == pytest.approx(MINORITY, abs=0.02)
    assert table.labels.mean() == pytest.approx(0.5, abs=0.02)
    strong, weak = (
        np.corrcoef(table.x[table.groups == group, 0], table.labels[table.groups == group])[0, 1] for group in (0, 1)
    )
    assert strong > weak + 0.1 > 0.3


def test_digits_are_cut_into_three_disjoint_sets_with_both_labels_in_both_groups() -> None:
    sets = _digit_sets(0)
    assert [len(one) for one in sets] == [900, 448, 449]
    assert len({one for part in sets for one in example_ids(part)}) == 1797
    for part in sets:
        cells = {(int(item["labels"]), row["group"]) for item, row in zip(part.items, part.rows, strict=True)}
        assert len(cells) == 4


def test_a_short_experiment_gives_every_number_the_checks_read_and_what_is_exact_holds() -> None:
    found = experiment(0, SMALL)
    assert all(math.isfinite(value) for value in found.values())
    verdicts = {check.text: bool(check.passes(found)) for check in CLAIM.checks}
    exact = ("on the calibration sample", "after 20 requests", "digits: the gap is gone")
    assert all(passed for text, passed in verdicts.items() if text.startswith(exact))
    assert sum(text.startswith(exact) for text in verdicts) == 3
