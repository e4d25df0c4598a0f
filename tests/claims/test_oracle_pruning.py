"""The claim of oracle pruning: its checks; the experiment itself, shortened, is a slow test."""

from __future__ import annotations

import math

import pytest

from overhaul.claims.oracle_pruning import CLAIM, Size, experiment


def test_the_checks_compare_settings_with_each_other_and_with_noise() -> None:
    found = {"easy, loss: tau": -0.5, "hard, loss: tau": -0.3, "longer, loss: tau": -0.2, "longer: noise ceiling": 0.3}
    found |= {"easy, random: tau": 0.1, "hard, random: tau": -0.1}
    assert all(check.passes(found) for check in CLAIM.checks)
    noisy = {**found, "longer: noise ceiling": 0.1, "hard, random: tau": -0.4}
    assert [check.passes(noisy) for check in CLAIM.checks] == [True, True, True, False, False]
    as_good = {**found, "hard, loss: tau": -0.5, "longer, loss: tau": -0.5}
    assert [check.passes(as_good) for check in CLAIM.checks] == [True, False, False, False, True]


@pytest.mark.slow
def test_the_experiment_measures_everything() -> None:
    found = experiment(0, Size(training_steps=100, steps=2, candidates=45))
    assert all(map(math.isfinite, found.values()))
    assert found["easy: patterns"] == 45 and found["hard: patterns"] == 252**2
