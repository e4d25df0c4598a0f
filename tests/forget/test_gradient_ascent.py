from __future__ import annotations

import copy
import math

import pytest
import torch

from contract import Case
from forget.unlearning import BRIEF, EASY, TRAINING, knowing, losses, taught
from overhaul.data.examples import collate
from overhaul.fit import fit
from overhaul.forget._training import ANSWER_NLL, RETAIN_NLL
from overhaul.forget.gradient_ascent import gradient_ascent
from overhaul.objectives import cross_entropy, cross_entropy_sum, evaluate, units

CASE = Case(
    method=gradient_ascent,
    materials=knowing,
    knobs=BRIEF,
    varied=TRAINING,
)


def test_it_is_descent_on_the_loss_with_its_sign_turned() -> None:
    model, forget, _ = taught("llama")
    by_hand = copy.deepcopy(model)
    gradient_ascent(model, forget, steps=3, stop_at=None, **EASY)
    fit(by_hand, [cross_entropy("forget", -1.0)], {"forget": forget}, steps=3, batch_size=8, lr=3e-3)
    assert all(torch.allclose(p, q, atol=1e-6) for p, q in zip(model.parameters(), by_hand.parameters(), strict=True))


def test_it_ends_where_answers_are_no_likelier_than_a_guess() -> None:
    model, forget, retain = taught("llama")
    outcome = gradient_ascent(model, forget, retain, steps=500, **EASY)
    assert outcome.facts["stopped_early"] == "yes"
    assert "`forget` cost 4.16 nats" in str(outcome.facts["stopped_because"])
    assert outcome.curves[ANSWER_NLL][-1] >= math.log(64) > outcome.curves[ANSWER_NLL][-2]


def test_retain_is_watched_and_changes_nothing() -> None:
    results = []
    for drop in (None, 100.0):
        model, forget, retain = taught("llama")
        before = losses(model, forget, retain)[1]
        outcome = gradient_ascent(model, forget, retain, steps=5, stop_at=None, retain_drop=drop, **EASY)
        results.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert outcome.curves[RETAIN_NLL][0] == pytest.approx(before, rel=1e-4)
    batch = collate(retain.items)
    now = float(evaluate(model, cross_entropy_sum, [batch])[0]) / units(batch)
    assert outcome.facts["retain_nll_after"] == pytest.approx(now, rel=1e-4)
