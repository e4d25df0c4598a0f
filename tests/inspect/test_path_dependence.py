from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import overhaul as oh
from conftest import examples_for, tiny_gemma3, tiny_gpt2, tiny_llama, tiny_qwen3, tiny_tokenizer, tiny_vit
from contract import Case, some_facts
from overhaul import session
from overhaul.data.examples import Examples, collate
from overhaul.errors import RequestError
from overhaul.forget.gradient_ascent import ga_term
from overhaul.forward import forward
from overhaul.inspect.path_dependence import WATCHED, distance, learn, orders, path_dependence, unlearn
from overhaul.references import cache_outputs

LANGUAGE: dict[str, Callable[..., nn.Module]] = {
    "llama": tiny_llama, "gpt2": tiny_gpt2, "gemma3": tiny_gemma3, "qwen3": tiny_qwen3,
}  # fmt: skip
QUICK: dict[str, Any] = {"stage_steps": 6, "unlearning_steps": 3, "batch_size": 8, "lr": 5e-3, "unlearning_lr": 2e-3}


CASE = Case(
    method=path_dependence,
    materials=lambda: {"model": small(), "forget": some_facts(0, 4), "first": some_facts(4, 4)},
    knobs={"stage_steps": 2, "unlearning_steps": 2, "batch_size": 3, "lr": 5e-3, "unlearning_lr": 2e-3, "seeds": 1},
    varied={
        "loss": ("npo", "ga"),
        "beta": (0.5, 2.0),
        "stage_steps": (2, 3),
        "unlearning_steps": (2, 3),
        "batch_size": (3, 2),
        "lr": (5e-3, 1e-2),
        "unlearning_lr": (2e-3, 1e-2),
        "seeds": (1, 2),
    },
)


def small(**changes: Any) -> nn.Module:
    return tiny_llama(num_hidden_layers=2, **changes)


@pytest.fixture
def forget() -> Examples:
    return examples_for("llama", 8, seed=1)


@pytest.fixture
def first() -> Examples:
    return examples_for("llama", 8, seed=2)


@pytest.fixture
def second() -> Examples:
    return examples_for("llama", 8, seed=3)


def test_orders_move_one_stage_and_keep_the_others() -> None:
    assert orders(["a", "b"], "u") == [["u", "a", "b"], ["a", "u", "b"], ["a", "b", "u"]]
    assert orders(["a"], "u") == [["u", "a"], ["a", "u"]]


@pytest.mark.parametrize("name", LANGUAGE)
def test_the_model_stays_as_it_was_and_saves(name: str, forget: Examples, first: Examples, tmp_path: Path) -> None:
    model = LANGUAGE[name]()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    state, seed = torch.get_rng_state(), torch.initial_seed()
    outcome = path_dependence(model, forget, first, seeds=1, **{**QUICK, "stage_steps": 2, "unlearning_steps": 1})
    assert outcome.model is None
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state) and torch.initial_seed() == seed
    assert all(math.isfinite(value) for value in outcome.facts.values() if isinstance(value, float))
    again, _ = oh.open(str(oh.save(model, tiny_tokenizer(), tmp_path / "saved")))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_check_9_a_stage_that_is_the_forget_set_itself_leaves_no_difference(forget: Examples) -> None:
    outcome = path_dependence(small(), forget, forget, seeds=1, **{**QUICK, "batch_size": 8, "stage_steps": 3})
    # whole batches: the order of drawing does not matter, only rounding does
    assert outcome.facts["distance_before"] == pytest.approx(0.0, abs=1e-8)
    assert outcome.facts["distance_after"] == pytest.approx(0.0, abs=1e-6)
    assert outcome.facts["spread"] == pytest.approx(0.0, abs=1e-3)


def test_other_orders_end_elsewhere_and_what_was_learnt_last_is_forgotten_most_slowly(
    forget: Examples, first: Examples, second: Examples
) -> None:
    options = {**QUICK, "stage_steps": 20, "unlearning_steps": 6, "unlearning_lr": 1e-3}
    outcome = path_dependence(small(), forget, first, second, loss="ga", seeds=2, **options)
    facts = {name: value for name, value in outcome.facts.items() if isinstance(value, int | float)}
    assert facts["distance_before"] > 0.05 and facts["distance_after"] > 0.05
    scores = [facts[f"forget_score_place_{place}"] for place in (1, 2, 3)]
    assert facts["slowest_place"] == 1 + scores.index(min(scores))
    assert facts["spread"] >= max(scores) - min(scores) - 1e-6  # a mean of maxima is at least the maximum of means
    assert facts["spread_over_noise"] == pytest.approx(facts["spread"] / facts["seed_noise"])
    assert {f"{WATCHED}, place {place}" for place in (1, 2, 3)} == outcome.curves.keys()
    assert all(len(curve) == 6 for curve in outcome.curves.values())
    assert facts["slowest_place"] == 3


@pytest.mark.parametrize("loss", ["ga", "npo", "simnpo"])
def test_every_loss_forgets(forget: Examples, first: Examples, loss: Any) -> None:
    outcome = path_dependence(small(), forget, first, loss=loss, seeds=1, **{**QUICK, "stage_steps": 15})
    assert all(float(str(outcome.facts[f"forget_score_place_{place}"])) > 0 for place in (1, 2))


def test_beta_reaches_the_loss(forget: Examples, first: Examples) -> None:
    def score(beta: float | None) -> Any:
        torch.manual_seed(0)
        model = small()
        options = {**QUICK, "stage_steps": 8, "unlearning_steps": 4}
        return path_dependence(model, forget, first, beta=beta, seeds=1, **options).facts["forget_score_place_2"]

    assert score(None) == score(0.5)
    assert score(20.0) < score(None)  # a large beta stops pushing at once


def test_unlearning_reports_the_rise_of_its_answers_and_starts_at_the_reference(forget: Examples) -> None:
    model = small()
    learn(model, {"forget": forget}, ["forget"], seed=0, steps=20, batch_size=8, lr=5e-3)
    batch = collate(forget.items)
    tokens = int((batch["labels"][:, 1:] >= 0).sum())

    def nats() -> float:
        with torch.no_grad():
            logits = forward(model, batch)[:, :-1].flatten(0, 1)
        labels = batch["labels"][:, 1:].flatten()
        return float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum", ignore_index=-100)) / tokens

    before = nats()
    found = unlearn(model, forget, ga_term("forget"), seed=0, steps=5, batch_size=8, lr=1e-3)
    assert found.score == pytest.approx(nats() - before, rel=1e-3)
    assert found.curve[0] == pytest.approx(before, rel=1e-4) and found.curve[-1] > found.curve[0]


def test_distance_is_that_of_the_predictions_at_the_answers(forget: Examples) -> None:
    one, other = small(), small()
    ours, theirs = (cache_outputs(model, forget, 3) for model in (one, other))
    batch = collate(forget.items)
    keep = batch["labels"][:, 1:] != -100
    with torch.no_grad():
        first, second = (forward(model, batch)[:, :-1][keep].softmax(-1) for model in (one, other))
    assert distance(ours, theirs) == pytest.approx(float((first - second).square().sum(-1).mean()), rel=1e-3)
    assert distance(ours, ours) == 0.0
    assert distance(ours, theirs) == pytest.approx(distance(theirs, ours))


def test_the_same_seed_gives_the_same_facts_and_another_one_other_paths(forget: Examples, first: Examples) -> None:
    def facts(seed: int) -> dict[str, Any]:
        torch.manual_seed(0)
        model = small()
        torch.manual_seed(seed)
        return path_dependence(model, forget, first, seeds=1, **{**QUICK, "batch_size": 3}).facts

    assert facts(5) == facts(5)
    assert facts(5) != facts(6)


def test_a_run_that_was_killed_goes_on(forget: Examples, first: Examples, tmp_path: Path) -> None:
    def run(report: Any) -> dict[str, Any]:
        torch.manual_seed(0)
        model = small()
        with session.using(scratch=tmp_path, checkpoint_seconds=0.0, report=report):
            return path_dependence(model, forget, first, seeds=1, **QUICK).facts

    def killed(what: str, done: int, total: int, detail: str) -> None:
        if what == "seed 0, place 2, forget" and done == 4:
            raise KeyboardInterrupt

    torch.manual_seed(0)
    straight = path_dependence(small(), forget, first, seeds=1, **QUICK).facts
    with pytest.raises(KeyboardInterrupt):
        run(killed)
    assert run(lambda *_: None) == straight


def test_requests_that_cannot_be_met_are_refused(forget: Examples, first: Examples) -> None:
    with pytest.raises(RequestError, match="`third` comes after `second`"):
        path_dependence(small(), forget, first, None, first)
    with pytest.raises(RequestError, match="these are images"):
        path_dependence(tiny_vit(), examples_for("vit", 3), first)
    with pytest.raises(RequestError, match="role 'second' carries loss"):
        path_dependence(small(), forget, first, Examples([], []))
    with pytest.raises(RequestError, match="loss"):
        path_dependence(small(), forget, first, loss="GA")  # pyright: ignore[reportArgumentType]
