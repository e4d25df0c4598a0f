from __future__ import annotations

import pytest

from overhaul.claims.depth_efficiency import CARRIES, CLAIM, DEPTH, MODELS, Size, carries, experiment
from overhaul.data.tasks import addition

SMALL = Size(length=24, pieces=1, sums=1, steps=1, batch=2, mapped=16)


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
