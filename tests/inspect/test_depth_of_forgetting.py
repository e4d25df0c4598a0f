from __future__ import annotations

import copy
import itertools
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import overhaul as oh
from conftest import examples_for, mean_loss, tiny_gpt2, tiny_llama, tiny_qwen3, tiny_tokenizer, tiny_vit
from contract import Case
from overhaul import session
from overhaul.data.encode import answered, encode_qa
from overhaul.data.examples import Examples
from overhaul.errors import RequestError
from overhaul.fit import sgd
from overhaul.forget.gradient_ascent import ga_term
from overhaul.inspect.depth_of_forgetting import (
    ORDERS,
    _curves,
    _facts,
    check_prompts,
    depth_of_forgetting,
    follow,
    likeliest,
    verdict,
)
from overhaul.inspect.path_dependence import learn, unlearn

LANGUAGE: dict[str, Callable[..., nn.Module]] = {"llama": tiny_llama, "gpt2": tiny_gpt2, "qwen3": tiny_qwen3}
QUICK: dict[str, Any] = {"stage_steps": 2, "unlearning_steps": 2, "batch_size": 8, "lr": 5e-3, "unlearning_lr": 2e-3}


CASE = Case(
    method=depth_of_forgetting,
    materials=lambda: {"model": small(), **{name: phrased(name) for name in ("refusal", "forget", "sibling")}},
    knobs={"stage_steps": 1, "unlearning_steps": 2, "batch_size": 3, "lr": 5e-3, "unlearning_lr": 2e-3, "seeds": 1}
    | {"watch_every": 1},
    varied={
        "loss": ("ga", "npo"),
        "beta": (0.5, 2.0, {"loss": "npo"}),
        "optimizer": ("adamw", "sgd"),
        "stage_steps": (1, 2),
        "unlearning_steps": (2, 3),
        "watch_every": (1, 2),
        "batch_size": (3, 2),
        "lr": (5e-3, 1e-2),
        "unlearning_lr": (2e-3, 1e-2),
        "seeds": (1, 2),
    },
)


def small(**changes: Any) -> nn.Module:
    return tiny_llama(num_hidden_layers=2, **changes)


def phrasing(name: str) -> Examples:
    """Eight prompts of three tokens; each answer opens with the phrasing's own tokens and repeats a part of its prompt."""
    opening = {"refusal": [50, 51], "forget": [52, 53, 54], "sibling": [55]}[name]
    prompts = [[3, 10 + n, 20 + n] for n in range(8)]
    items = [answered(prompt, [*opening, prompt[1]], None) for prompt in prompts]
    return Examples(items, [{"prompt": f"what is {n}?"} for n in range(8)])


def phrased(name: str) -> Examples:
    """Four questions, answered with the word."""
    rows = [{"question": f"what is {n}?", "answer": f"{name} {n}"} for n in range(4)]
    return encode_qa(rows, tiny_tokenizer(), prompt="{question}")


@pytest.fixture
def stages() -> dict[str, Examples]:
    return {name: phrasing(name) for name in ("refusal", "forget", "sibling")}


@pytest.fixture
def one_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first order alone, where the other five would show nothing more."""
    monkeypatch.setattr(sys.modules["overhaul.inspect.depth_of_forgetting"], "ORDERS", ORDERS[:1])


@pytest.mark.parametrize(
    ("refusal", "forget", "sibling", "expected"),
    [
        (-5.0, -9.0, -7.0, "deep"),
        (-5.0, -6.0, -8.0, "deep"),
        (-5.0, -9.0, -1.0, "superficial"),
        (-5.0, -9.0, -5.0, "superficial"),  # as likely as the refusal is not below it
        (-5.0, -1.0, -1.0, "not forgotten"),
        (-5.0, -5.0, -9.0, "not forgotten"),
        (-5.0, -1.0, -9.0, "not forgotten"),  # the sibling alone does not count
    ],
)
def test_the_verdict_is_that_of_the_paper(refusal: float, forget: float, sibling: float, expected: str) -> None:
    assert verdict({"refusal": [refusal], "forget": [forget], "sibling": [sibling]}) == expected


def test_the_verdict_is_of_the_look_that_was_asked_for() -> None:
    looks = {"refusal": [-3.0, -4.0, -5.0], "forget": [-1.0, -5.0, -9.0], "sibling": [-2.0, -2.0, -6.0]}
    assert [verdict(looks, at) for at in (0, 1, 2)] == ["not forgotten", "superficial", "deep"]
    assert verdict(looks) == "deep"
    assert [likeliest(looks, at) for at in (0, 1, 2)] == ["forget", "sibling", "refusal"]


def test_all_orders_of_three_stages_are_tried() -> None:
    assert len(ORDERS) == 6
    assert {"-".join(order) for order in ORDERS} == {
        "refusal-sibling-forget", "sibling-refusal-forget", "forget-sibling-refusal",
        "forget-refusal-sibling", "refusal-forget-sibling", "sibling-forget-refusal",
    }  # fmt: skip


def test_facts_name_the_verdict_of_most_seeds_and_what_was_so_before() -> None:
    deep = {"refusal": [-4.0, -3.0], "forget": [-1.0, -9.0], "sibling": [-2.0, -7.0]}
    superficial = deep | {"sibling": [-2.0, -1.0]}
    already = deep | {"refusal": [-0.5, -3.0]}  # deep before anything was unlearnt
    runs = {(n, "-".join(order)): superficial for n in range(3) for order in ORDERS}
    runs[0, "forget-sibling-refusal"] = runs[2, "forget-sibling-refusal"] = already
    runs[1, "refusal-sibling-forget"] = deep
    facts = _facts(runs, 3)
    assert facts["forget-sibling-refusal"] == "deep on 2 of 3 seeds"
    assert facts["refusal-sibling-forget"] == "superficial on 2 of 3 seeds"
    assert facts["sibling-forget-refusal"] == "superficial on 3 of 3 seeds"
    assert facts["deep_share"] == pytest.approx(3 / 18)
    assert facts["deep_share_before"] == pytest.approx(2 / 18)
    # before unlearning `forget` is the likeliest, last in two orders; in `already` it is the refusal, last there too
    assert facts["last_is_likeliest"] == "in 8 of 18 trainings"


def test_curves_are_means_over_seeds() -> None:
    runs = {(n, "-".join(order)): {s: [-1.0 - n, -4.0] for s in ORDERS[0]} for n in range(2) for order in ORDERS}
    curves = _curves(runs, 2)
    assert len(curves) == 18
    assert curves["forget-refusal-sibling: sibling"] == [-1.5, -4.0]


@pytest.mark.parametrize("name", LANGUAGE)
def test_the_model_stays_as_it_was_and_saves(name: str, stages: dict[str, Examples], tmp_path: Path) -> None:
    model = LANGUAGE[name]()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    state, seed = torch.get_rng_state(), torch.initial_seed()
    outcome = depth_of_forgetting(model, **stages, seeds=1, **QUICK)
    assert outcome.model is None
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state) and torch.initial_seed() == seed
    assert {"-".join(order) for order in ORDERS} < outcome.facts.keys()
    assert all(len(curve) == 2 and all(map(math.isfinite, curve)) for curve in outcome.curves.values())
    again, _ = oh.open(str(oh.save(model, tiny_tokenizer(), tmp_path / "saved")))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_stages_are_learnt_the_last_is_likeliest_and_what_is_unlearnt_falls(stages: dict[str, Examples]) -> None:
    options = {**QUICK, "stage_steps": 15, "unlearning_steps": 6, "watch_every": 4}
    outcome = depth_of_forgetting(small(), **stages, seeds=1, **options)
    assert outcome.facts["last_is_likeliest"] == "in 6 of 6 trainings"
    for order in map("-".join, ORDERS):
        forget = outcome.curves[f"{order}: forget"]
        assert len(forget) == 3  # before, after 4 steps, after all 6
        assert forget[2] < forget[1] < forget[0] < 0
        ends = {stage: outcome.curves[f"{order}: {stage}"] for stage in stages}
        assert outcome.facts[order] == f"{verdict(ends)} on 1 of 1 seeds"


@pytest.mark.usefixtures("one_order")
def test_the_loss_and_its_beta_reach_the_unlearning(stages: dict[str, Examples]) -> None:
    def ends(**knobs: Any) -> list[float]:
        torch.manual_seed(0)
        outcome = depth_of_forgetting(small(), **stages, seeds=1, **{**QUICK, **knobs})
        return [curve[-1] for curve in outcome.curves.values()]

    found = [ends(), ends(loss="npo"), ends(loss="simnpo"), ends(loss="npo", beta=50.0)]
    assert all(one != other for one, other in itertools.combinations(found, 2))


@pytest.mark.usefixtures("one_order")
def test_the_same_seed_gives_the_same_curves_and_another_optimizer_others(stages: dict[str, Examples]) -> None:
    def curves(seed: int, **knobs: Any) -> dict[str, list[float]]:
        torch.manual_seed(0)
        model = small()
        torch.manual_seed(seed)
        return depth_of_forgetting(model, **stages, seeds=1, **{**QUICK, "batch_size": 3, **knobs}).curves

    straight = curves(5)
    assert curves(5) == straight
    assert curves(6) != straight
    assert curves(5, optimizer="sgd") != straight


def test_following_changes_nothing(stages: dict[str, Examples]) -> None:
    model = small()
    learn(model, stages, ["forget"], seed=0, steps=10, batch_size=8, lr=5e-3)
    watched, straight = copy.deepcopy(model), copy.deepcopy(model)
    options: dict[str, Any] = {"seed": 3, "steps": 5, "batch_size": 3, "lr": 1e-3}
    before = {name: -mean_loss(model, part) for name, part in stages.items()}
    seen = follow(watched, stages, stages["forget"], ga_term("forget"), every=2, **options)
    alone = unlearn(straight, stages["forget"], ga_term("forget"), clip=1.0, **options)
    assert all(torch.equal(a, b) for a, b in zip(watched.parameters(), straight.parameters(), strict=True))
    assert len(alone.curve) == 5
    assert {name: len(looks) for name, looks in seen.items()} == dict.fromkeys(stages, 4)
    for name, part in stages.items():  # nats a token, whatever the length of the answers
        assert seen[name][0] == pytest.approx(before[name], rel=1e-5)
        assert seen[name][-1] == pytest.approx(-mean_loss(watched, part), rel=1e-5)


def test_a_step_of_sgd_moves_the_weights_by_no_more_than_its_rate(stages: dict[str, Examples]) -> None:
    model = small()
    learn(model, stages, ["forget"], seed=0, steps=10, batch_size=8, lr=5e-3)
    before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    options: dict[str, Any] = {"seed": 0, "steps": 4, "every": 4, "batch_size": 8, "optimizer": sgd()}
    follow(model, stages, stages["forget"], ga_term("forget"), lr=0.05, **options)
    moved = float((nn.utils.parameters_to_vector(model.parameters()).detach() - before).norm())
    assert 0.02 < moved <= 4 * 0.05 * (1 + 1e-4)


def test_an_unlearning_that_was_killed_between_two_looks_goes_on(stages: dict[str, Examples], tmp_path: Path) -> None:
    start = small()
    options: dict[str, Any] = {"seed": 3, "steps": 6, "every": 2, "batch_size": 3, "lr": 1e-3, "label": "path"}

    def run(report: Any) -> dict[str, list[float]]:
        with session.using(scratch=tmp_path, checkpoint_seconds=0.0, report=report):
            return follow(copy.deepcopy(start), stages, stages["forget"], ga_term("forget"), **options)

    def killed(what: str, done: int, total: int, detail: str) -> None:
        if what == "path, GA 2" and done == 1:
            raise KeyboardInterrupt

    straight = follow(copy.deepcopy(start), stages, stages["forget"], ga_term("forget"), **options)
    with pytest.raises(KeyboardInterrupt):
        run(killed)
    assert run(lambda *_: None) == straight


def test_roles_that_answer_other_prompts_are_refused_with_the_first_that_differs(stages: dict[str, Examples]) -> None:
    swapped = stages | {"sibling": stages["sibling"].select([0, 1, 2, 4, 3, 5, 6, 7])}
    with pytest.raises(
        RequestError, match=r"prompt 4 is 'what is 3\?' in the role 'refusal' and 'what is 4\?' in 'sib"
    ):
        depth_of_forgetting(small(), **swapped, **QUICK)
    with pytest.raises(RequestError, match=r"prompt 7 is 'what is 6\?' in the role 'refusal' and missing in 'forget'"):
        depth_of_forgetting(small(), **stages | {"forget": stages["forget"][:6]}, **QUICK)
    with pytest.raises(RequestError, match=r"prompt 7 is missing in the role 'refusal' and 'what is 6\?' in 'forget'"):
        depth_of_forgetting(small(), **stages | {"refusal": stages["refusal"][:6]}, **QUICK)
    without = replace(stages["forget"], rows=[*stages["forget"].rows[:5], *[{}] * 3])
    with pytest.raises(RequestError, match=r"example 6 of the role 'forget' has no prompt.*as: qa"):
        depth_of_forgetting(small(), **stages | {"forget": without}, **QUICK)


def test_questions_with_answers_have_the_prompts_that_are_compared() -> None:
    def encoded(answer: str) -> Examples:
        rows = [{"question": f"how {n}?", "answer": f"{answer} {n}"} for n in range(3)]
        return encode_qa(rows, tiny_tokenizer())

    check_prompts(
        "inspect.depth_of_forgetting",
        {"refusal": encoded("no"), "forget": encoded("try"), "sibling": encoded("to make")},
    )
    with pytest.raises(RequestError, match="prompt 1 is"):
        check_prompts("inspect.depth_of_forgetting", {"refusal": encoded("no"), "forget": encoded("try")[1:]})


def test_requests_that_cannot_be_met_are_refused(stages: dict[str, Examples]) -> None:
    with pytest.raises(RequestError, match=r"depth_of_forgetting needs answers of a language model; these are images"):
        depth_of_forgetting(tiny_vit(), examples_for("vit", 3), stages["forget"], stages["sibling"])
    with pytest.raises(RequestError, match=r"inspect.depth_of_forgetting: no label of the role 'sibling' carries loss"):
        depth_of_forgetting(small(), stages["refusal"], stages["forget"], Examples([], []))
    with pytest.raises(RequestError, match="watch_every"):
        depth_of_forgetting(small(), *stages.values(), watch_every=0)
