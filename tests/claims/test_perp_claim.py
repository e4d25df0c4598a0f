from __future__ import annotations

import pytest
import torch

from conftest import tiny_llama
from overhaul.claims.perp import CLAIM, CRITERIA, PATTERNS, RATES, Size, _randomly, experiment
from overhaul.selectors import select
from overhaul.shrink.prune import Rule


@pytest.mark.smoke  # seven short trainings of the starter
def test_a_short_experiment_gives_every_number_the_checks_read() -> None:
    found = experiment(0, Size(samples=2, judged=4, blocks="0", steps=1))
    assert all(value > 1 for name, value in found.items() if not name.endswith(("zeros", "trained")))
    assert len(found) == 1 + len(PATTERNS) * (2 * len(CRITERIA) + 1) + 3 + 3 * (len(RATES) + 1)
    for check in CLAIM.checks:
        assert check.passes(found) in (True, False)


def test_the_random_mask_has_as_many_zeros_in_every_matrix_and_its_pattern() -> None:
    model = tiny_llama()
    _randomly(model, Rule(0.5, "2:4"), 0)
    first, other = (model.get_parameter(f"{name}.weight") for name in select(model, "attention.q").modules[:2])
    assert bool(((first == 0).view(32, -1, 4).sum(2) == 2).all())
    assert not torch.equal(first == 0, other == 0)
