from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import overhaul.forget
from conftest import examples_for, tiny_tokenizer
from forget.unlearning import EASY, KINDS, losses, taught
from overhaul.data.examples import Examples, collate
from overhaul.errors import RequestError
from overhaul.forget.dpo import dpo_loss as dpo
from overhaul.forget.gradient_ascent import ga_term
from overhaul.forget.npo import npo_term
from overhaul.forget.simnpo import simnpo_term
from overhaul.models import open_model, save
from overhaul.objectives import sequence_nll

methods: Any = overhaul.forget
HELD_BACK = ["grad_diff", "npo", "simnpo", "blur"]
GENTLE: dict[str, Any] = {**EASY, "steps": 25, "lr": 1e-3, "stop_at": None}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", HELD_BACK)
def test_every_family_forgets_and_keeps(name: str, kind: str) -> None:
    """One class of images, too: a label is an answer of one token."""
    model, forget, retain = taught(kind)
    before = losses(model, forget, retain)
    outcome = getattr(methods, name)(model, forget, retain, **GENTLE)
    after = losses(model, forget, retain)
    assert outcome.model is model
    assert after[0] > before[0] + 0.5, "forgotten"
    assert after[0] - before[0] > 4 * (after[1] - before[1]), "kept"
    assert outcome.facts["forget_nll_before"] == pytest.approx(before[0], abs=1e-4)
    assert outcome.facts["forget_nll_after"] == pytest.approx(after[0], rel=1e-4)
    assert outcome.facts["retain_nll_before"] == pytest.approx(before[1], abs=1e-4)
    assert outcome.facts["retain_nll_after"] == pytest.approx(after[1], rel=1e-4)


@pytest.mark.parametrize("name", HELD_BACK)
def test_klr_starts_at_zero(name: str) -> None:
    model, forget, retain = taught("llama")
    outcome = getattr(methods, name)(model, forget, retain, retain_term="klr", **{**GENTLE, "steps": 8})
    first, *_, last = outcome.curves["retain"]
    assert abs(first) < 1e-5 < last


@pytest.mark.parametrize("name", [*HELD_BACK, "gradient_ascent"])
def test_a_drop_of_what_is_retained_ends_the_training(name: str) -> None:
    model, forget, retain = taught("llama")
    weak = {} if name == "gradient_ascent" else {"alpha" if name == "blur" else "retain_weight": 1e-6}
    weak |= {"beta": 0.1} if name == "simnpo" else {}  # its own default stops pushing before anything else is lost
    outcome = getattr(methods, name)(
        model, forget, retain, retain_drop=0.5, **weak, **{**GENTLE, "steps": 200, "lr": 3e-3}
    )
    assert outcome.facts["stopped_early"] == "yes" and int(outcome.facts["steps"]) < 200
    assert "`retain` cost" in outcome.facts["stopped_because"]
    assert losses(model, forget, retain)[1] > 0.5


@pytest.mark.parametrize("name", ["npo", "simnpo", "gradient_ascent", "grad_diff", "blur"])
def test_images_end_at_the_guess_of_a_class(name: str) -> None:
    model, forget, retain = taught("vit")
    outcome = getattr(methods, name)(model, forget, retain, **{**GENTLE, "steps": 400, "stop_at": "chance", "lr": 3e-3})
    assert outcome.facts["stopped_early"] == "yes"
    assert f"{math.log(10):.3g} nats" in outcome.facts["stopped_because"]


@pytest.mark.parametrize("name", HELD_BACK)
def test_what_was_forgotten_stays_so_in_a_saved_model(name: str, tmp_path: Path) -> None:
    model, forget, retain = taught("llama")
    getattr(methods, name)(model, forget, retain, **{**GENTLE, "steps": 5})
    opened, _ = open_model(save(model, tiny_tokenizer(), tmp_path / "forgot"))
    assert losses(opened, forget, retain) == pytest.approx(losses(model, forget, retain), rel=1e-5)


def test_a_watch_without_anything_to_watch_is_refused() -> None:
    model, forget, _ = taught("llama")
    with pytest.raises(RequestError, match="retain_drop=1.0 watches the role `retain`, which is missing"):
        methods.gradient_ascent(model, forget, retain_drop=1.0)
    silent = Examples([{**item, "labels": torch.full_like(item["labels"], -100)} for item in forget.items], forget.rows)
    with pytest.raises(RequestError, match="`retain` has no answer to keep"):
        methods.npo(model, forget, silent)
    with pytest.raises(RequestError, match=r"forget\.grad_diff: .*use forget\.gradient_ascent"):
        methods.grad_diff(model, forget, Examples([], []))


def test_the_loss_of_an_image_is_that_of_its_label() -> None:
    logits, batch = torch.randn(6, 10), collate(examples_for("vit", 6).items)
    nll = F.cross_entropy(logits, batch["labels"], reduction="none")
    batch["reference_nll"] = torch.rand(6)
    assert torch.equal(sequence_nll(logits, batch["labels"]), nll)
    assert ga_term("forget").loss(logits, batch) == pytest.approx(-float(nll.sum()), rel=1e-6)
    assert ga_term("forget").count(batch) == npo_term("forget", 0.5).count(batch) == 6
    expected = -(2 / 0.5) * F.logsigmoid(0.5 * (nll - batch["reference_nll"])).sum()
    assert npo_term("forget", 0.5).loss(logits, batch) == pytest.approx(float(expected), rel=1e-6)
    both = [simnpo_term("forget", 2.5, per_token=per_token).loss(logits, batch) for per_token in (True, False)]
    assert torch.equal(*both)


def test_dpo_by_hand_and_at_the_start() -> None:
    nll, reference, refusal, known = (torch.tensor([value]) for value in (5.0, 3.0, 7.0, 11.0))
    ratio = (11.0 - 7.0) - (3.0 - 5.0)
    assert dpo(nll, reference, refusal, known, 0.1).item() == pytest.approx(20 * math.log1p(math.exp(-0.1 * ratio)))
    ours, theirs = (nn.Parameter(torch.tensor([value])) for value in (3.0, 11.0))
    loss = dpo(ours, reference, theirs, known, 0.1)
    loss.sum().backward()
    assert loss.item() == pytest.approx(20 * math.log(2))
    assert ours.grad is not None and theirs.grad is not None
    assert (ours.grad.item(), theirs.grad.item()) == pytest.approx((-1.0, 1.0))
