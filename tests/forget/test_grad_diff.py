from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from contract import Case
from forget.unlearning import BRIEF, EASY, TRAINING, knowing, losses, taught
from overhaul.fit import fit
from overhaul.forget.grad_diff import grad_diff
from overhaul.objectives import cross_entropy

CASE = Case(
    method=grad_diff,
    materials=knowing,
    knobs=BRIEF,
    varied={**TRAINING, "retain_term": ("gdr", "klr"), "retain_weight": (1.0, 3.0)},
)


def test_it_is_one_training_on_the_difference_of_both_losses() -> None:
    model, forget, retain = taught("llama")
    by_hand = copy.deepcopy(model)
    grad_diff(model, forget, retain, retain_weight=0.7, steps=4, stop_at=None, **EASY)
    terms = [cross_entropy("forget", -1.0, "up"), cross_entropy("retain", 0.7, "down")]
    fit(by_hand, terms, {"forget": forget, "retain": retain}, steps=4, batch_size=8, lr=3e-3)
    assert all(torch.allclose(p, q, atol=1e-6) for p, q in zip(model.parameters(), by_hand.parameters(), strict=True))


@pytest.mark.parametrize("kind", ["gdr", "klr"])
def test_a_heavier_retain_term_keeps_more(kind: Any) -> None:
    kept = []
    for weight in (0.1, 10.0):
        model, forget, retain = taught("llama")
        grad_diff(model, forget, retain, retain_term=kind, retain_weight=weight, steps=15, stop_at=None, **EASY)
        kept.append(losses(model, forget, retain)[1])
    assert kept[1] < 0.5 * kept[0]
