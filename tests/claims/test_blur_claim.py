from __future__ import annotations

import math
from functools import cache

import pytest
import torch

from claims.test_stored import RESULTS
from overhaul.claims.blur import (
    CLAIM,
    FACTS,
    Size,
    _facts,
    along_a_random_direction,
    experiment,
    quadratic_toy,
    step_along,
)
from overhaul.data.examples import IGNORED
from overhaul.fit.projection import bilevel, penalty

SHORT = Size(learning_steps=5, adamw_steps=3, sgd_steps=3, toy_steps=(600, 1500, 3))


@cache
def toy() -> dict[str, float]:
    return quadratic_toy(0, SHORT)


def test_facts_have_one_format_and_keys_of_their_own() -> None:
    forget, retain = _facts(0)
    assert (len(forget), len(retain)) == (24, 72)
    keys = {tuple(item["input_ids"][:3].tolist()) for item in [*forget.items, *retain.items]}
    assert len(keys) == FACTS
    assert all((item["labels"] != IGNORED).tolist() == [False] * 4 + [True] * 3 for item in forget.items)


def test_the_null_control_takes_as_much_away_in_another_direction() -> None:
    draw = torch.Generator().manual_seed(0)
    f, r = (torch.randn(5000, generator=draw) for _ in range(2))
    r = r + 0.5 * f
    summed = step_along(penalty(), f, r)
    ours, control = step_along(bilevel(), f, r), step_along(along_a_random_direction(1.0, 0), f, r)
    assert float((control - summed).norm()) == pytest.approx(float((ours - summed).norm()), rel=1e-4)
    taken = (summed - control) / (summed - control).norm()
    assert abs(float(taken @ f) / float(f.norm())) < 5 / math.sqrt(5000)


def test_a_short_experiment_gives_every_number_that_is_stored() -> None:
    found = {**toy(), **experiment(0, SHORT)}
    assert all(math.isfinite(value) for value in found.values())
    assert found.keys() == RESULTS[CLAIM.slug]["numbers"].keys()
