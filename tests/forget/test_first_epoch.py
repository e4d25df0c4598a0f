from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import overhaul as oh
from conftest import examples_for, tiny_gemma3, tiny_gpt2, tiny_llama, tiny_qwen3, tiny_tokenizer, tiny_vit
from contract import Case, some_facts
from overhaul import session
from overhaul.data.examples import Examples, join
from overhaul.errors import RequestError, RunError
from overhaul.forget.first_epoch import first_epoch
from overhaul.forget.first_epoch.ascent import Goal, iterate, norm_of, once
from overhaul.forget.first_epoch.ledger import chosen
from overhaul.forget.first_epoch.recording import record
from overhaul.influence import gradient
from overhaul.references import reference_nll

LANGUAGE: dict[str, Callable[..., nn.Module]] = {
    "llama": tiny_llama, "gpt2": tiny_gpt2, "gemma3": tiny_gemma3, "qwen3": tiny_qwen3,
}  # fmt: skip
LEARN: dict[str, Any] = {"epochs": 25, "lr": 5e-3, "batch_size": 6}


CASE = Case(
    method=first_epoch,
    materials=lambda: {
        "model": small(),
        "forget": some_facts(0, 2),
        "retain": some_facts(2, 4),
        "unseen": some_facts(6, 4),
        "full": some_facts(0, 6),
    },
    knobs={"epochs": 8, "lr": 3e-3, "batch_size": 3, "repetitions": 3, "retain_rise": None},
    varied={
        "gradients": ("first", "all"),
        "where": ("embedding", [0]),
        "mode": ("once", "iterative"),
        "step": (0.05, 0.5),
        "repetitions": (1, 3, {"mode": "iterative"}),
        "target": (None, 2.5),
        "retain_rise": (None, 1e-4),
        "stores": ("gradient", "update"),
        "epochs": (8, 9),
        "batch_size": (3, 2),
        "lr": (3e-3, 4e-3),
    },
    idle={
        "ledger": "where it is kept changes nothing",
        "match": "no two samples here are nearly the same",
        "tau": "no two samples here are nearly the same",
    },
    apart={"goes on": "a ledger is recorded from its first step on"},
)


@pytest.fixture
def full() -> Examples:
    return examples_for("llama", 12, seed=1)


@pytest.fixture
def forget(full: Examples) -> Examples:
    return full[:2]


@pytest.fixture
def retain(full: Examples) -> Examples:
    return full[2:]


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Tensor], Path]:
    """The weights of a small untied Llama that learnt `full`, and the ledger of how."""
    torch.manual_seed(0)
    model = small()
    folder = tmp_path_factory.mktemp("learnt") / "ledger"
    record(model, examples_for("llama", 12, seed=1), folder, every_epoch=True, **LEARN)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}, folder


def small() -> nn.Module:
    return tiny_llama(num_hidden_layers=3, tie_word_embeddings=False, initializer_range=0.1)


@pytest.fixture
def model(learnt: tuple[dict[str, Tensor], Path]) -> nn.Module:
    model = small()
    model.load_state_dict(learnt[0])
    return model


def changed(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


def nats(model: nn.Module, examples: Examples) -> float:
    return float(reference_nll(model, examples, 8).mean())


@pytest.mark.parametrize("name", LANGUAGE)
def test_every_family_learns_forgets_saves_and_loads(
    name: str, full: Examples, forget: Examples, retain: Examples, tmp_path: Path
) -> None:
    model = LANGUAGE[name]()
    outcome = first_epoch(
        model, forget, retain, full=full, target=4.0, retain_rise=None, repetitions=12, **{**LEARN, "epochs": 8}
    )  # fmt: skip
    facts = outcome.facts
    assert outcome.model is model and facts["weights_as_recorded"] == "yes"
    assert float(str(facts["forget_nll_after"])) > float(str(facts["forget_nll_before"]))
    folder = oh.save(model, tiny_tokenizer(), tmp_path / "saved")
    again, _ = oh.open(str(folder))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert not list(tmp_path.glob("ledger*"))


def test_a_ledger_that_nobody_keeps_lies_in_the_scratch_of_the_run_and_is_gone_afterwards(
    full: Examples, forget: Examples, retain: Examples, tmp_path: Path
) -> None:
    seen: list[Path] = []

    def look(what: str, done: int, total: int, detail: str) -> None:
        seen.extend(tmp_path.glob("working/*/.ledger.partial/*.safetensors"))

    with session.using(scratch=tmp_path / "working", report=look):
        first_epoch(small(), forget, retain, full=full, target=8.0, epochs=1, repetitions=1, retain_rise=None)
    assert seen and list((tmp_path / "working").iterdir()) == []


@pytest.mark.parametrize(
    ("where", "depths"), [("embedding", {-1}), ("first block", {0}), ("last blocks", {1, 2}), ([1], {1})]
)
def test_check_8_what_lies_outside_the_group_stays_bit_for_bit(
    model: nn.Module,
    learnt: tuple[dict[str, Tensor], Path],
    forget: Examples,
    retain: Examples,
    where: Any,
    depths: Any,
) -> None:
    weights, folder = learnt
    group = set(chosen(model, where))
    outcome = first_epoch(model, forget, retain, ledger=str(folder), where=where, target=1.0, retain_rise=None)
    assert changed(model, weights) <= group and changed(model, weights)
    assert outcome.layers["L2 change"].keys() == depths


@pytest.mark.parametrize("gradients", ["first", "all", "last", "live"])
@pytest.mark.parametrize("mode", ["once", "iterative"])
def test_forgetting_ends_at_the_target(
    model: nn.Module,
    learnt: tuple[dict[str, Tensor], Path],
    forget: Examples,
    retain: Examples,
    gradients: Any,
    mode: Any,
) -> None:
    ledger = None if gradients == "live" else str(learnt[1])
    outcome = first_epoch(
        model, forget, retain, ledger=ledger, gradients=gradients, mode=mode, where="all", target=0.8,
        retain_rise=None, repetitions=80, step=0.05,
    )  # fmt: skip
    assert outcome.facts["ended_by"] == "forgotten"
    after = float(str(outcome.facts["forget_nll_after"]))
    assert after >= 0.8
    if mode == "once":
        assert after < 0.82  # no further than needed


def test_the_change_is_eta_times_the_stored_gradients(
    model: nn.Module, learnt: tuple[dict[str, Tensor], Path], forget: Examples, retain: Examples
) -> None:
    from overhaul.forget.first_epoch.ledger import GradientLedger

    weights, folder = learnt
    outcome = first_epoch(model, forget, retain, ledger=str(folder), where="all", target=0.8, retain_rise=None)
    ledger = GradientLedger.open(folder, model)
    stored = ledger.sum(ledger.matching(forget))
    eta = float(str(outcome.facts["eta"]))
    assert eta > 0
    for name, value in stored.items():
        assert torch.allclose(model.get_parameter(name), weights[name] + eta * value, atol=1e-6)
    assert float(str(outcome.facts["length"])) == pytest.approx(eta * norm_of(stored), rel=1e-3)


def test_retain_sets_a_limit(
    model: nn.Module, learnt: tuple[dict[str, Tensor], Path], forget: Examples, retain: Examples
) -> None:
    outcome = first_epoch(
        model, forget, retain, ledger=str(learnt[1]), where="all", target=50.0, retain_rise=0.2, step=0.01
    )
    facts = {name: float(str(outcome.facts[name])) for name in ("retain_nll_before", "retain_nll_after")}
    assert outcome.facts["ended_by"] == "retain"
    assert 0.1 < facts["retain_nll_after"] - facts["retain_nll_before"] <= 0.2


def test_repeated_steps_go_back_from_the_one_that_costs_too_much(
    model: nn.Module, forget: Examples, retain: Examples
) -> None:
    outcome = first_epoch(
        model, forget, retain, gradients="live", mode="iterative", where="all", target=50.0, retain_rise=0.3,
        step=0.05, repetitions=100,
    )  # fmt: skip
    curve = outcome.curves["retain nll per token"]
    assert outcome.facts["ended_by"] == "retain"
    assert curve[-2] > curve[0] + 0.3 >= curve[-1] == pytest.approx(curve[-3], rel=1e-4)


def test_unseen_text_says_when_it_is_enough(
    model: nn.Module, learnt: tuple[dict[str, Tensor], Path], forget: Examples, retain: Examples
) -> None:
    unseen = examples_for("llama", 4, seed=7)
    outcome = first_epoch(model, forget, retain, unseen, ledger=str(learnt[1]), where="all", retain_rise=None)
    facts = outcome.facts
    assert facts["ended_by"] == "forgotten"
    assert facts["target_nll"] == pytest.approx(nats_per_token(small_as(learnt), unseen), rel=1e-4)
    assert float(str(facts["forget_nll_after"])) >= float(str(facts["target_nll"]))
    assert float(str(facts["extraction_before"])) > 0.5 > float(str(facts["extraction_after"]))


def small_as(learnt: tuple[dict[str, Tensor], Path]) -> nn.Module:
    model = small()
    model.load_state_dict(learnt[0])
    return model


def nats_per_token(model: nn.Module, examples: Examples) -> float:
    tokens = sum(int((item["labels"][1:] >= 0).sum()) for item in examples.items)
    return float(reference_nll(model, examples, 8).sum()) / tokens


def test_forgotten_on_loss_alone_is_not_enough_while_greedy_decoding_still_knows() -> None:
    """A model that is unsure of everything and yet right everywhere: high loss, full extraction."""

    class Unsure(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor([0.05]))

        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            following = torch.nn.functional.one_hot(input_ids.roll(-1, dims=1), 64).float()
            return following * self.scale

    examples = examples_for("llama", 3)
    model = Unsure()
    goal = Goal(model, examples, examples, target=1.0, extraction=0.2)
    assert goal.measure().forget > 4.0 and goal.seen[0].extraction == 1.0
    assert goal.verdict() is None
    with torch.no_grad():
        model.scale.fill_(-1.0)
    assert goal.verdict() == "forgotten"


def test_fuzzy_matching_takes_near_duplicates_too(full: Examples, forget: Examples, retain: Examples) -> None:
    long = examples_for("llama", 40, seed=3)
    base = next(item for item in long.items if len(item["input_ids"]) >= 10)
    near = {name: tensor.clone() for name, tensor in base.items()}
    near["input_ids"][0] = 5 if int(near["input_ids"][0]) != 5 else 6
    known = join([Examples([base, near], [{}, {}]), retain])
    target = Examples([base], [{}])
    how: dict[str, Any] = {"target": 4.0, "retain_rise": None, "where": "all", **LEARN, "epochs": 8}
    exact = first_epoch(small(), target, retain, full=known, **how)
    fuzzy = first_epoch(small(), target, retain, full=known, match="fuzzy", tau=0.85, **how)
    assert (exact.facts["samples_matched"], fuzzy.facts["samples_matched"]) == (1, 2)


def test_a_ledger_is_kept_where_it_is_named(full: Examples, forget: Examples, retain: Examples, tmp_path: Path) -> None:
    how: dict[str, Any] = {"target": 3.0, "retain_rise": None, "where": "all", **LEARN, "epochs": 12}
    folder = tmp_path / "kept"
    first = first_epoch(small(), forget, retain, full=full, ledger=str(folder), **how)
    assert len(first.curves["training loss"]) == 24
    assert len(list(folder.glob("*.safetensors"))) == 2  # of what is to be forgotten, and nothing else
    with pytest.raises(RequestError, match="exists already"):
        first_epoch(small(), forget, retain, full=full, ledger=str(folder), **how)
    moved = first.model
    later = first_epoch(moved, forget, retain, ledger=str(folder), target=3.8, retain_rise=None, where="all")
    assert later.facts["weights_as_recorded"] == "no"  # they have moved on since


def test_the_slope_is_that_of_the_loss_along_the_way(model: nn.Module, forget: Examples, retain: Examples) -> None:
    start = nats_per_token(model, forget)
    outcome = first_epoch(
        model, forget, retain, gradients="live", where="all", target=start + 1e-4, retain_rise=None, step=1e-5
    )
    rise = (float(str(outcome.facts["forget_nll_after"])) - start) / float(str(outcome.facts["length"]))
    assert float(str(outcome.facts["slope_before"])) == pytest.approx(rise, rel=0.05)


def test_the_live_gradient_is_that_of_the_summed_nll(model: nn.Module, forget: Examples) -> None:
    parameters = chosen(model, "all")
    here = gradient(model.train(), forget, parameters)
    assert model.training
    direction = {name: gradient / norm_of(here) for name, gradient in here.items()}

    def total(step: float) -> float:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.add_(direction[name], alpha=step)
            value = float(reference_nll(model, forget, 8).double().sum())
            for name, parameter in parameters.items():
                parameter.sub_(direction[name], alpha=step)
        return value

    assert (total(1e-2) - total(-1e-2)) / 2e-2 == pytest.approx(norm_of(here), rel=0.02)


@pytest.mark.parametrize("walk", [once, iterate])
def test_a_step_that_ruins_everything_is_an_error(
    model: nn.Module, forget: Examples, retain: Examples, walk: Any
) -> None:
    parameters = chosen(model, "all")
    direction = gradient(model, retain, parameters)
    goal = Goal.at(model, forget, retain, target=50.0, retain_rise=1e-9)
    with pytest.raises(RunError, match="Even a step of length .* costs `retain` more"):
        walk(parameters, lambda: direction, goal, 1e3, 3)


def test_steps_that_do_not_suffice_say_so(
    model: nn.Module, learnt: tuple[dict[str, Tensor], Path], forget: Examples, retain: Examples
) -> None:
    outcome = first_epoch(
        model, forget, retain, ledger=str(learnt[1]), target=5.0, step=1e-4, repetitions=2, retain_rise=None
    )
    assert outcome.facts["ended_by"] == "repetitions"
    assert float(str(outcome.facts["length"])) == pytest.approx(2e-4, rel=1e-2)


def test_half_precision_adds_up_short_steps(model: nn.Module, forget: Examples, retain: Examples) -> None:
    half = model.to(torch.bfloat16)
    outcome = first_epoch(
        half, forget, retain, gradients="live", mode="iterative", where="all", target=0.6, retain_rise=None,
        step=0.02, repetitions=150,
    )  # fmt: skip
    assert outcome.facts["ended_by"] == "forgotten"
    assert all(parameter.dtype == torch.bfloat16 for parameter in half.parameters())


def test_requests_that_cannot_be_met_are_refused(
    model: nn.Module, learnt: tuple[dict[str, Tensor], Path], full: Examples, forget: Examples, retain: Examples
) -> None:
    ledger = str(learnt[1])
    images = examples_for("vit", 3)
    with pytest.raises(RequestError, match=r"forget\.ssd"):
        first_epoch(tiny_vit(), images, images, ledger=ledger, target=1.0)
    with pytest.raises(RequestError, match="know when to stop"):
        first_epoch(model, forget, retain, ledger=ledger)
    with pytest.raises(RequestError, match="give the folder of that `ledger`"):
        first_epoch(model, forget, retain, target=1.0)
    with pytest.raises(RequestError, match="Leave `ledger` out"):
        first_epoch(model, forget, retain, gradients="live", ledger=ledger, target=1.0)
    with pytest.raises(RequestError, match="1 of 2 examples of `forget` are not in `full`"):
        first_epoch(model, forget, retain, full=full[1:], target=1.0)
    with pytest.raises(RequestError, match="nothing in `full` is alike"):
        first_epoch(model, examples_for("llama", 2, 9), retain, full=full, match="fuzzy", tau=1.0, target=1.0)
    with pytest.raises(RequestError, match="role 'retain' carries loss"):
        first_epoch(model, forget, Examples([], []), ledger=ledger, target=1.0)
    with pytest.raises(RequestError, match="tau"):
        first_epoch(model, forget, retain, ledger=ledger, target=1.0, tau=1.5)


def test_what_was_never_known_is_an_error(
    learnt: tuple[dict[str, Tensor], Path], forget: Examples, retain: Examples
) -> None:
    with pytest.raises(RunError, match="already cost .* nats a token.*does not know them"):
        first_epoch(small(), forget, retain, ledger=str(learnt[1]), target=1.0)
    assert math.isfinite(nats(small(), forget))
