from __future__ import annotations

import pytest

from overhaul.claims._claim import stored
from overhaul.claims.depth_efficiency import CARRIES, CLAIM, DEPTH, MODELS, Size, carries, experiment
from overhaul.data.tasks import addition

SMALL = Size(length=24, pieces=1, sums=1, steps=1, batch=2, mapped=16)


def test_the_stored_numbers_give_the_stored_verdicts() -> None:
    (result,) = (one for one in stored() if one["slug"] == CLAIM.slug)
    seeds = range(len(result["seconds"]))
    numbers = [{name: values[seed] for name, values in result["numbers"].items()} for seed in seeds]
    verdicts = {check["text"]: check["passed"] for check in result["checks"]}
    assert verdicts == {check.text: [check.passes(found) for found in numbers] for check in CLAIM.checks}


@pytest.mark.slow
def test_one_short_experiment_gives_every_number_that_the_checks_read() -> None:
    found = experiment(0, SMALL)
    assert {type(check.passes(found)) for check in CLAIM.checks} == {bool}
    assert {name.partition(",")[0] for name in found if name.endswith("depth score")} == set(MODELS)
    assert all(0 <= found[f"{name}, depth score"] <= DEPTH - 1 for name in MODELS)


def test_carries_by_hand() -> None:
    assert [carries(sum_) for sum_ in ("12 + 34", "17 + 25", "95 + 85", "91 + 12", "47 + 53")] == [0, 1, 2, 1, 2]
    levels = {carries(row["question"]) for row in addition("validation")}
    assert levels == set(range(len(CARRIES)))
