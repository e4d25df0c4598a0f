from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from contract import Case
from forget.unlearning import BRIEF, EASY, TRAINING, knowing, taught
from overhaul.errors import RequestError
from overhaul.fit import fit
from overhaul.forget.simnpo import simnpo, simnpo_term
from overhaul.objectives import cross_entropy

CASE = Case(
    method=simnpo,
    materials=knowing,
    knobs={**BRIEF, "beta": 1.0, "retain_weight": 1.0},
    varied={
        **TRAINING,
        "beta": (1.0, 2.0),
        "margin": (0.0, 1.0),
        "per_token": (True, False),
        "retain_term": ("gdr", "none"),
        "retain_weight": (1.0, 3.0),
    },
)


@pytest.mark.parametrize("form", [{"per_token": True, "margin": 0.5}, {"per_token": False, "margin": 0.0}])
def test_both_forms_train_on_their_loss(form: dict[str, Any]) -> None:
    model, forget, retain = taught("llama")
    by_hand = copy.deepcopy(model)
    simnpo(model, forget, retain, beta=2.5, retain_weight=2.0, steps=4, stop_at=None, **form, **EASY)
    terms = [simnpo_term("forget", 2.5, **form), cross_entropy("retain", 2.0, "retain")]
    fit(by_hand, terms, {"forget": forget, "retain": retain}, steps=4, batch_size=8, lr=3e-3)
    assert all(torch.allclose(p, q, atol=1e-6) for p, q in zip(model.parameters(), by_hand.parameters(), strict=True))


def test_a_larger_margin_pushes_longer() -> None:
    reached = []
    for margin in (0.0, 6.0):
        model, forget, _ = taught("llama")
        outcome = simnpo(model, forget, retain_term="none", margin=margin, steps=25, stop_at=None, **EASY)
        facts: Any = outcome.facts
        reached.append(facts["forget_nll_after"])
    assert reached[1] > 1.2 * reached[0] > 0


def test_a_missing_retain_role_says_what_to_do() -> None:
    model, forget, _ = taught("llama")
    with pytest.raises(RequestError, match=r"forget\.simnpo: .*`retain` is missing.*retain_term: \"none\""):
        simnpo(model, forget)
