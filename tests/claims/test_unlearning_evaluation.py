from __future__ import annotations

import math

import pytest

from claims.test_stored import RESULTS
from overhaul.claims import _people
from overhaul.claims._claim import Numbers
from overhaul.claims.unlearning_evaluation import CLAIM, NULL, Size, experiment, variants

SMALL = Size(
    _people.Size(people=5, forgotten=2, holdout=2, hidden=32, blocks=1, steps=40, batch=20, lr=1e-2),
    length=0.05,
    relearning_steps=1,
)


@pytest.fixture(scope="module")
def found() -> Numbers:
    return experiment(0, SMALL)


def test_a_short_experiment_gives_every_number_that_is_stored(found: Numbers) -> None:
    assert all(math.isfinite(value) for value in found.values())
    assert found.keys() == RESULTS[CLAIM.slug]["numbers"].keys()


def test_every_model_is_measured_alike(found: Numbers) -> None:
    names = {"original", "retrained", *variants()}
    measures = {name: {key.removeprefix(f"{name}, ") for key in found if key.startswith(f"{name}, ")} for name in names}
    assert len(set(map(frozenset, measures.values()))) == 1
    assert len(found) == len(names) * len(measures["GA"])


def test_the_retrained_model_cannot_be_told_from_itself(found: Numbers) -> None:
    assert found["retrained, forget quality"] == 0.0


def test_the_null_control_never_sees_what_is_to_be_forgotten() -> None:
    chosen = variants()
    assert {term.role for term in chosen[NULL].terms} == {"retain"}
    assert chosen[NULL].steps == max(variant.steps for variant in chosen.values())


def test_checks_can_fail(found: Numbers) -> None:
    # all models alike: nothing is destroyed, shows or comes back
    same = {key: 0.5 for key in found}
    assert sum(check.passes(same) for check in CLAIM.checks) <= 4
