"""Gradients of roles kept apart and combined."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import examples_for
from fit.test_checkpoints import interrupted
from fit.test_loop import KNOBS, same, small, two_roles, weights
from overhaul import session
from overhaul.data.examples import Batch
from overhaul.errors import RunError
from overhaul.fit import Combined, Gradients, Ledger, Training, fit, sgd
from overhaul.objectives import Penalty, Term, cross_entropy, units


def train(
    model: Any, terms: Any, data: Any, *, combine: Any, batch_size: int, accumulation: int = 1, **knobs: Any
) -> Ledger:
    """`fit` with a combiner."""
    with Training(model, data, **knobs) as training:
        for step in training:
            step.take(terms, batch_size, accumulation, combine)
    return training.ledger


def one_and_a_half(gradients: Gradients) -> Combined:
    """a + 1.5 b, and how many parameters there were."""
    pairs = zip(gradients.of("a"), gradients.of("b"), strict=True)
    return Combined((a + 1.5 * b for a, b in pairs), {"parameters": float(len(gradients.parameters))})


def orthogonal(gradients: Gradients) -> Combined:
    """What of b is orthogonal to a: depends on the whole of both."""
    pairs = [(a.clone(), b.clone()) for a, b in zip(gradients.of("a"), gradients.of("b"), strict=True)]
    sums = torch.stack([torch.stack([(a * a).sum(), (a * b).sum()]) for a, b in pairs]).sum(dim=0)
    squared, both = gradients.total(sums)
    return Combined((b - both / squared * a for a, b in pairs), {"a squared": squared, "a times b": both})


def after(combine: Any, weight: float = 1.0, **changes: Any) -> tuple[dict[str, Tensor], Any]:
    torch.manual_seed(0)
    model = small()
    _, data = two_roles()
    terms = [cross_entropy("a", name="a"), cross_entropy("b", weight, name="b")]
    options: dict[str, Any] = {"steps": 3, "batch_size": 8, "lr": 0.1, "clip": None, "optimizer": sgd(), **changes}
    ledger = train(model, terms, data, combine=combine, **options)
    return weights(model), ledger


def test_the_sum_of_gradients_is_the_gradient_of_the_sum() -> None:
    apart, ledger = after(one_and_a_half)
    at_once, plain = after(None, weight=1.5)
    assert all(torch.allclose(apart[name], at_once[name], atol=1e-6) for name in at_once)
    assert ledger.curves["gradient norm"] == pytest.approx(plain.curves["gradient norm"], rel=1e-5)
    assert ledger.curves["a"] == pytest.approx(plain.curves["a"], rel=1e-5)
    assert ledger.curves["parameters"] == [len(list(small().parameters()))] * 3


def test_check_9_two_micro_batches_are_one_of_double_size() -> None:
    one, once = after(orthogonal, batch_size=8)
    two, twice = after(orthogonal, batch_size=4, accumulation=2)
    assert all(torch.allclose(one[name], two[name], atol=1e-6) for name in one)
    assert twice.curves["a times b"] == pytest.approx(once.curves["a times b"], rel=1e-4, abs=1e-6)


def test_what_is_clipped_is_the_combination() -> None:
    torch.manual_seed(0)
    before = weights(small())
    clipped, ledger = after(orthogonal, steps=1, lr=1.0, clip=1e-3)
    moved = math.sqrt(sum(float((clipped[n] - before[n]).square().sum()) for n, _ in small().named_parameters()))
    assert moved == pytest.approx(1e-3, rel=2e-2)
    assert ledger.curves["gradient norm"][0] > 1e-2


def test_one_copy_of_the_gradients_is_held_and_the_other_is_used_again() -> None:
    held: list[set[int]] = []
    written: list[int] = []

    def look(gradients: Gradients) -> Combined:
        held.append({part.data_ptr() for parts in gradients.parts.values() for part in parts if part is not None})

        def direction() -> Any:
            yield from (a + b for a, b in zip(gradients.of("a"), gradients.of("b"), strict=True))
            written.extend(p.grad.data_ptr() for p in gradients.parameters if p.grad is not None)

        return Combined(direction(), {})

    after(look, steps=1)
    count = len(list(small().parameters()))
    assert len(held[0]) == 2 * count
    assert len(written) == count and set(written) < held[0]


def test_parameters_that_one_role_does_not_use_count_as_zero_for_it() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(64, 8)
            self.heads = nn.ModuleList(nn.Linear(8, 64) for _ in range(3))

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return self.heads[int(input_ids[0, 0] >= 32)](self.embedding(input_ids))

    def examples(first: int) -> Any:
        data = examples_for("llama", 4, seed=first)
        for item in data.items:
            item["input_ids"][0] = first
        return data

    data = {"a": examples(3), "b": examples(40)}
    torch.manual_seed(0)
    model = Heads()
    manual = copy.deepcopy(model)
    terms = [cross_entropy("a", name="a"), cross_entropy("b", name="b")]
    knobs: dict[str, Any] = {"steps": 1, "batch_size": 4, "lr": 0.1, "clip": None, "optimizer": sgd()}
    ledger = train(model, terms, data, combine=one_and_a_half, **knobs)
    terms[1] = cross_entropy("b", 1.5, name="b")
    fit(manual, terms, data, **knobs)
    assert all(torch.allclose(p, q, atol=1e-6) for p, q in zip(model.parameters(), manual.parameters(), strict=True))
    assert ledger.curves["parameters"] == [5.0], "the third head is used by neither role"


def test_gradients_of_bfloat16_weights_are_seen_in_float32() -> None:
    kinds: set[torch.dtype] = set()

    def look(gradients: Gradients) -> Combined:
        kinds.update(part.dtype for role in "ab" for part in gradients.of(role))
        return one_and_a_half(gradients)

    model = small().to(torch.bfloat16)
    before = weights(model)
    _, data = two_roles()
    terms = [cross_entropy("a", name="a"), cross_entropy("b", name="b")]
    train(model, terms, data, steps=1, batch_size=4, lr=0.1, optimizer=sgd(), combine=look)
    assert kinds == {torch.float32}
    assert all(p.dtype == torch.bfloat16 for p in model.parameters()) and not same(weights(model), before)


def test_a_combination_that_is_not_finite_stops_before_the_weights() -> None:
    def broken(gradients: Gradients) -> Combined:
        return Combined((math.nan * a for a in gradients.of("a")), {})

    model = small()
    before = weights(model)
    terms, data = [cross_entropy("a", name="a")], {"a": examples_for("llama", 4)}
    with pytest.raises(RunError, match="step 1: the gradient is not finite"):
        train(model, terms, data, steps=2, combine=broken, **KNOBS)
    assert same(weights(model), before)


def test_resuming_is_bit_exact_with_the_combiner_s_curves(tmp_path: Path) -> None:
    straight, whole = after(orthogonal, steps=5)
    with (
        session.using(scratch=tmp_path, checkpoint_seconds=0.0, report=interrupted(4)),
        pytest.raises(KeyboardInterrupt),
    ):
        after(orthogonal, steps=5)
    with session.using(scratch=tmp_path, checkpoint_seconds=0.0):
        resumed, ledger = after(orthogonal, steps=5)
    assert same(resumed, straight)
    assert ledger.curves == whole.curves and len(ledger.curves["a squared"]) == 5


def test_a_penalty_on_the_weights_has_no_place_in_a_combination() -> None:
    def size(now: Mapping[str, Tensor]) -> Tensor:
        return torch.stack([p.square().sum() for p in now.values()]).sum()

    with pytest.raises(ValueError, match="penalty on the weights has none"):
        train(
            small(),
            [cross_entropy("a"), Penalty(size)],
            {"a": examples_for("llama", 4)},
            steps=1,
            batch_size=4,
            combine=one_and_a_half,
        )


@pytest.mark.parametrize("apart", [False, True])
def test_a_role_that_is_only_watched_is_measured_and_trains_nothing(apart: bool) -> None:
    graphs: list[bool] = []

    def watched(logits: Tensor, batch: Batch) -> Tensor:
        graphs.append(logits.requires_grad)
        return logits.float().sum() * 0.0 + units(batch)

    def alone(gradients: Gradients) -> Combined:
        return Combined(gradients.of("a"), {})

    results = []
    for terms in ([cross_entropy("a", name="a")], [cross_entropy("a", name="a"), Term("b", watched, units, 0.0, "b")]):
        torch.manual_seed(0)
        model = small()
        _, data = two_roles()
        ledger = train(model, terms, data, steps=2, combine=alone if apart else None, optimizer=sgd(), **KNOBS)
        results.append((weights(model), ledger))
    assert same(results[0][0], results[1][0])
    assert results[1][1].curves["b"] == pytest.approx([1.0, 1.0])
    assert graphs and not any(graphs)
