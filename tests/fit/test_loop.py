from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import Tensor, nn

from conftest import examples_for, tiny_llama, tiny_resnet
from overhaul.data.examples import Batch, Examples
from overhaul.errors import RequestError, RunError
from overhaul.fit import Draw, Training, adamw, by_length, fit, parallel
from overhaul.fit.schedules import Infinite
from overhaul.objectives import Penalty, Term, answer_tokens, cross_entropy, sequence_nll, sequences
from overhaul.references import cache_outputs

KNOBS: dict[str, Any] = {"batch_size": 4, "lr": 1e-2}


def small() -> nn.Module:
    return tiny_llama(num_hidden_layers=2, initializer_range=0.2)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return all(torch.equal(ours[name], theirs[name]) for name in theirs)


def per_sequence(role: str, weight: float) -> Term:
    """A term whose unit is the sequence, beside one whose unit is the token."""
    return Term(role, lambda logits, batch: sequence_nll(logits, batch["labels"]).sum(), sequences, weight, "sequences")


def two_roles() -> tuple[list[Term], dict[str, Examples]]:
    terms = [cross_entropy("a", 1.0, "a"), per_sequence("a", 0.3), cross_entropy("b", 0.7, "b")]
    return terms, {"a": examples_for("llama", 40, seed=1), "b": examples_for("llama", 70, seed=2)}


def sgd(model: nn.Module, trained: Any) -> torch.optim.Optimizer:
    """Plain descent, whose steps are proportional to the gradient: AdamW would hide a wrong factor."""
    return torch.optim.SGD(trained.values(), lr=1.0)


def distance(start: dict[str, Tensor]) -> Callable[[Mapping[str, Tensor]], Tensor]:
    """Half the squared distance of the weights from where they began."""
    return lambda now: torch.stack([(now[n] - start[n]).square().sum() for n in now]).sum() / 2


def test_accumulation_does_not_change_a_result() -> None:
    """1 x 32 as 2 x 16 and 4 x 8: per token, per sequence, KL on either role, a penalty on the weights."""
    results = []
    for accumulation in (1, 2, 4):
        torch.manual_seed(0)
        model = small()
        terms, data = two_roles()
        to_a, to_b = (cache_outputs(model, data[role], 16) for role in "ab")
        penalty = Penalty(distance({n: p.detach() + 0.1 for n, p in model.named_parameters()}), 0.2)
        objective = [*terms, to_a.kl_term("a", 0.5, "KL a"), to_b.kl_term("b", 2.0, "KL b"), penalty]
        data = {"a": to_a.examples, "b": to_b.examples}
        sizes = {"a": 32 // accumulation, "b": 20 // accumulation}
        ledger = fit(
            model,
            objective,
            data,
            steps=3,
            batch_size=sizes,
            accumulation=accumulation,
            lr=0.1,
            optimizer=sgd,
            clip=None,
        )
        results.append((weights(model), ledger))
    for other, ledger in results[1:]:
        for name, tensor in results[0][0].items():
            assert torch.allclose(other[name], tensor, rtol=0, atol=1e-6), name
        assert ledger.examples == results[0][1].examples == {"a": 96, "b": 60}
        for curve, values in results[0][1].curves.items():
            assert ledger.curves[curve] == pytest.approx(values, abs=1e-5)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_penalty_counts_once_a_step(accumulation: int) -> None:
    """Descent on half a squared distance d leaves (1 - lr * weight) d of it, whatever else is drawn beside."""
    model = small()
    target = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    before = weights(model)
    still = Term("a", lambda logits, batch: logits.sum() * 0.0, sequences)
    ledger = fit(
        model, [still, Penalty(distance(target), 0.5)], {"a": examples_for("llama", 6)}, steps=2, batch_size=2,
        accumulation=accumulation, lr=0.2, optimizer=sgd, clip=None,
    )  # fmt: skip
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter, 0.9**2 * before[name], rtol=1e-5, atol=1e-8), name
    half = sum(float(before[n].square().sum()) for n, _ in model.named_parameters()) / 2
    assert ledger.curves["penalty"] == pytest.approx([half, 0.9**2 * half], rel=1e-5)
    assert ledger.curves["loss"] == pytest.approx([0.5 * value for value in ledger.curves["penalty"]])


def test_a_penalty_needs_no_data_and_sees_what_trains() -> None:
    model, seen = small(), list[str]()

    def norms(now: Mapping[str, Tensor]) -> Tensor:
        seen.extend(now)
        return torch.stack([p.square().sum() for p in now.values()]).sum()

    ledger = fit(model, [Penalty(norms)], {}, steps=1, lr=1e-2, trainable=lambda name: "norm" in name)
    assert seen == [name for name, _ in model.named_parameters() if "norm" in name]
    assert (ledger.examples, ledger.step) == ({}, 1)


def test_a_penalty_that_is_not_finite_stops_too() -> None:
    model = small()
    before = weights(model)
    nothing = Penalty(lambda now: next(iter(now.values())).sum() * math.nan, name="EWC")
    with pytest.raises(RunError, match="step 1: the term 'EWC', which reads the weights, is nan"):
        fit(model, [nothing], {}, steps=1)
    assert same(weights(model), before)


def test_one_step_is_the_gradient_of_the_weighted_means() -> None:
    model, (terms, data) = small(), two_roles()
    manual = copy.deepcopy(model)
    fit(model, terms, data, steps=1, batch_size={"a": 40, "b": 70}, lr=0.1, optimizer=sgd, clip=None)
    total = torch.zeros(())
    for weight, role, unit in ((1.0, "a", "token"), (0.3, "a", "sequence"), (0.7, "b", "token")):
        nll, tokens = torch.zeros(()), 0
        for item in data[role].items:
            logits = manual(input_ids=item["input_ids"][None]).logits
            nll = nll + sequence_nll(logits, item["labels"][None]).sum()
            tokens += int((item["labels"][1:] >= 0).sum())
        total = total + weight * nll / (tokens if unit == "token" else len(data[role]))
    total.backward()
    for ours, theirs in zip(model.parameters(), manual.parameters(), strict=True):
        assert theirs.grad is not None
        assert torch.allclose(ours, theirs - 0.1 * theirs.grad, atol=1e-5)


def test_padding_does_not_change_a_result() -> None:
    def train(data: dict[str, Examples], terms: list[Term]) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = small()
        fit(model, terms, data, steps=3, lr=0.1, optimizer=sgd, batch_size=8)
        return weights(model)

    terms, data = two_roles()
    wide = {}
    for role, examples in data.items():
        items = [
            {
                "input_ids": torch.nn.functional.pad(item["input_ids"], (0, 9), value=5),
                "labels": torch.nn.functional.pad(item["labels"], (0, 9), value=-100),
            }
            for item in examples.items
        ]
        wide[role] = Examples(items, examples.rows)
    narrow, wider = train(data, terms), train(wide, terms)
    assert all(torch.allclose(narrow[name], wider[name], atol=1e-5) for name in narrow)


def test_lengths_are_grouped_without_losing_an_example() -> None:
    examples = examples_for("llama", 50)
    groups = by_length(examples.items)
    lengths = [[item["input_ids"].shape[0] for item in group] for group in groups]
    assert sorted(length for group in lengths for length in group) == sorted(
        item["input_ids"].shape[0] for item in examples.items
    )
    assert len(groups) > 1
    assert all(2 * min(group) >= max(group) for group in lengths)


def spoilt(after: int) -> Callable[[Tensor, Batch], Tensor]:
    calls = [0]

    def loss(logits: Tensor, batch: Batch) -> Tensor:
        calls[0] += 1
        return logits.float().square().mean() * (math.nan if calls[0] > after else 1.0)

    return loss


@pytest.mark.parametrize("build", [small, tiny_resnet])
def test_a_loss_that_is_not_finite_stops_with_the_last_good_weights(build: Callable[[], nn.Module]) -> None:
    family = "resnet" if build is tiny_resnet else "llama"
    data = {"a": examples_for(family, 4)}
    torch.manual_seed(0)
    good = build()
    torch.manual_seed(0)
    bad = build()
    count = answer_tokens if family == "llama" else sequences
    kept = Term("a", spoilt(99), count, name="spoilt")
    # one length and one role: one forward a step
    data = {"a": data["a"].select([0, 0, 0, 0])}
    fit(good, [kept], data, steps=3, **KNOBS)
    with pytest.raises(
        RunError, match=r"step 4: the term 'spoilt' on the role 'a' is nan\. The weights are those after step 3"
    ):
        fit(bad, [Term("a", spoilt(3), count, name="spoilt")], data, steps=9, **KNOBS)
    assert same(weights(bad), weights(good))
    assert not bad.training


def test_a_gradient_that_is_not_finite_stops_too() -> None:
    model = small()
    before = weights(model)

    def loss(logits: Tensor, batch: Batch) -> Tensor:
        return torch.sqrt(logits.float().sum() * 0.0)  # zero, with an infinite slope

    with pytest.raises(RunError, match="step 1: the gradient is not finite"):
        fit(model, [Term("a", loss, answer_tokens)], {"a": examples_for("llama", 4)}, steps=2, **KNOBS)
    assert same(weights(model), before)


def test_norm_statistics_of_a_bad_step_are_taken_back() -> None:
    model = tiny_resnet()
    before = weights(model)
    images = examples_for("resnet", 4)
    broken = Examples([{**item, "pixel_values": item["pixel_values"] * math.nan} for item in images.items], images.rows)
    with pytest.raises(RunError, match="step 1: the term 'cross-entropy' on the role 'a' is nan"):
        fit(model, [cross_entropy("a")], {"a": broken}, steps=1, **KNOBS)
    assert same(weights(model), before)


def test_a_schedule_of_its_own_brings_its_own_warmup() -> None:
    rates = Infinite(warmup=1, cooled=2, plateau=0.5, floor=0.1)
    with pytest.raises(ValueError, match="belong to a schedule given by name"):
        fit(small(), [cross_entropy("a")], {"a": examples_for("llama", 4)}, steps=1, schedule=rates, warmup=3)


def test_only_the_chosen_subset_trains_and_the_rest_is_thawed_again() -> None:
    model = small()
    frozen_before = model.get_parameter("model.norm.weight").requires_grad_(False)
    before = weights(model)
    fit(
        model, [cross_entropy("a")], {"a": examples_for("llama", 8)}, steps=3,
        trainable=lambda name: ".mlp." in name, optimizer=adamw(weight_decay=0.1), **KNOBS,
    )  # fmt: skip
    changed = {name for name, tensor in model.named_parameters() if not torch.equal(tensor, before[name])}
    assert changed == {name for name, _ in model.named_parameters() if ".mlp." in name}
    assert not frozen_before.requires_grad
    assert all(p.requires_grad for p in model.parameters() if p is not frozen_before)
    assert all(p.grad is None for p in model.parameters())


def test_the_subset_is_thawed_after_an_error_and_after_a_refusal() -> None:
    model, data = small(), {"a": examples_for("llama", 4)}
    with pytest.raises(RunError):
        fit(model, [Term("a", spoilt(0), answer_tokens)], data, steps=1, trainable=lambda n: "mlp" in n, **KNOBS)
    with pytest.raises(RequestError, match="Nothing to train"):
        fit(model, [cross_entropy("a")], data, steps=1, trainable=lambda n: False, **KNOBS)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_gradients_that_lie_about_are_not_used() -> None:
    results = []
    for stale in (False, True):
        torch.manual_seed(0)
        model = small()
        if stale:
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)
        fit(model, [cross_entropy("a")], {"a": examples_for("llama", 8)}, steps=2, optimizer=sgd, **KNOBS)
        results.append(weights(model))
    assert same(*results)


def test_clipping_bounds_a_step_and_reports_the_norm_before() -> None:
    moved = {}
    for clip in (None, 0.01):
        torch.manual_seed(0)
        model = small()
        before = weights(model)
        ledger = fit(
            model, [cross_entropy("a")], {"a": examples_for("llama", 8)}, steps=1, clip=clip, optimizer=sgd,
            batch_size=8, lr=1.0,
        )  # fmt: skip
        step = sum(float((p.detach() - before[n]).square().sum()) for n, p in model.named_parameters()) ** 0.5
        moved[clip] = step, ledger.curves["gradient norm"][0]
    assert moved[0.01][0] == pytest.approx(0.01, rel=1e-2)
    assert moved[None][0] == pytest.approx(moved[None][1], rel=1e-3)
    assert moved[0.01][1] == pytest.approx(moved[None][1], rel=1e-4) and moved[None][1] > 0.1


def test_draws_take_every_example_once_an_epoch_in_another_order() -> None:
    draw = Draw("forget", 10, seed=5)
    epochs = [draw.indices(10 * n, 10) for n in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_draw_depends_on_seed_role_and_number_alone() -> None:
    straight = Draw("forget", 10, seed=5).indices(0, 25)
    again = Draw("forget", 10, seed=5)
    assert again.indices(13, 9) == straight[13:22]
    assert again.indices(2, 4) == straight[2:6]
    assert Draw("retain", 10, seed=5).indices(0, 25) != straight
    assert Draw("forget", 10, seed=6).indices(0, 25) != straight


def test_roles_of_unequal_size_are_drawn_by_their_own_counters() -> None:
    seen: dict[str, list[int]] = {"a": [], "b": []}

    def watch(role: str) -> Term:
        def loss(logits: Tensor, batch: Batch) -> Tensor:
            seen[role] += batch["number"].tolist()
            return logits.float().square().sum() * 0.0

        return Term(role, loss, sequences, name=role)

    parts = {"a": examples_for("llama", 6, seed=1), "b": examples_for("llama", 4, seed=2)}
    data = {role: part.with_column("number", torch.arange(len(part))) for role, part in parts.items()}
    ledger = fit(small(), [watch("a"), watch("b")], data, steps=4, batch_size={"a": 3, "b": 2}, lr=1e-3)
    assert ledger.examples == {"a": 12, "b": 8}
    for role, size in (("a", 6), ("b", 4)):
        assert sorted(seen[role][:size]) == sorted(seen[role][size:]) == list(range(size))
    tokens = sum(item["input_ids"].shape[0] for item in parts["a"].items)
    assert ledger.tokens["a"] == 2 * tokens


def test_curves_hold_one_value_a_step() -> None:
    terms, data = two_roles()
    ledger = fit(small(), terms, data, steps=4, **KNOBS)
    assert {name: len(curve) for name, curve in ledger.curves.items()} == dict.fromkeys(
        ["loss", "a", "sequences", "b", "lr", "gradient norm"], 4
    )
    for n in range(4):
        total = ledger.curves["a"][n] + 0.3 * ledger.curves["sequences"][n] + 0.7 * ledger.curves["b"][n]
        assert ledger.curves["loss"][n] == pytest.approx(total, rel=1e-5)


def test_training_teaches() -> None:
    model = small()
    ledger = fit(model, [cross_entropy("a", name="a")], {"a": examples_for("llama", 8)}, steps=40, **KNOBS)
    assert ledger.curves["a"][-1] < 0.2 * ledger.curves["a"][0]


def test_a_loop_may_be_left_early() -> None:
    model = small()
    with Training(model, {"a": examples_for("llama", 8)}, steps=9, lr=1e-2) as training:
        for step in training:
            if step.number == 2:
                break
            step.take([cross_entropy("a")], 4)
    assert training.ledger.step == 2 and not model.training


def test_bf16_training_leaves_a_plain_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "_has_fast_bf16", lambda: True)
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        model, data = small(), {"a": examples_for("llama", 4)}
        for _ in range(2):
            fit(model, [cross_entropy("a")], data, steps=2, **KNOBS)
            assert not {"forward", "_original_forward", "_is_accelerate_prepared"} & vars(model).keys()
        item: Any = {"input_ids": data["a"].items[0]["input_ids"][None]}
        copied = copy.deepcopy(model)
        assert torch.equal(model(**item).logits, copied(**item).logits)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def test_an_engine_that_steps_by_itself_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = SimpleNamespace(distributed_type=DistributedType.DEEPSPEED)
    monkeypatch.setattr("accelerate.Accelerator", lambda **_: engine)
    with pytest.raises(RequestError, match="not for DEEPSPEED, whose engine steps"):
        fit(small(), [cross_entropy("a")], {"a": examples_for("llama", 4)}, steps=1)


def test_a_missing_or_empty_role_is_refused() -> None:
    with pytest.raises(RequestError, match="'retain', which is missing"):
        fit(small(), [cross_entropy("retain")], {"forget": examples_for("llama", 4)}, steps=1)
    with pytest.raises(RequestError, match="'retain', which is missing or has no examples"):
        fit(small(), [cross_entropy("retain")], {"retain": Examples([], [])}, steps=1)


def test_terms_of_one_name_are_refused() -> None:
    data = {"a": examples_for("llama", 4), "b": examples_for("llama", 4)}
    with pytest.raises(ValueError, match="a name of its own"):
        fit(small(), [cross_entropy("a"), cross_entropy("b")], data, steps=1)
