"""DPO: the loss against its definition pair by pair, and what follows from it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import examples_for, tiny_llama, tiny_tokenizer
from overhaul.align.dpo import Loss, dpo, dpo_term, margins, with_reference
from overhaul.data.examples import Examples, collate
from overhaul.data.materials import Source, encode
from overhaul.errors import RequestError
from overhaul.fit import Regime
from overhaul.forward import forward
from overhaul.objectives import forward_answers


def pairs(count: int, seed: int = 0) -> Examples:
    """Prompts with two answers of other lengths."""
    first, other = examples_for("llama", count, seed), examples_for("llama", count, seed + 100)
    items = []
    for one, two in zip(first, other, strict=True):
        prompt = one["input_ids"][one["labels"] < 0]
        answer = two["labels"][two["labels"] >= 0]
        ids = torch.cat([prompt, answer])
        labels = torch.cat([torch.full_like(prompt, -100), answer])
        items.append({**one, "other_input_ids": ids, "other_labels": labels})
    return Examples(items, [{}] * count)


def preferences() -> Examples:
    """Twelve pairs as a recipe reads them."""
    rows = [
        {"prompt": f"{n} + {n}", "chosen": str(2 * n), "rejected": str(2 * n + 1) * (1 + n % 3)} for n in range(1, 13)
    ]
    source = Source.model_validate({"from": "pairs.jsonl", "as": "preference", "prompt": "{question}"})
    return encode(rows, source, tiny_tokenizer())


CASE = dict(
    method=dpo,
    materials=lambda: {"model": tiny_llama(initializer_range=0.2), "preferences": preferences()},
    knobs={"steps": 12, "batch_size": 4, "lr": 1e-3},
    varied={
        "loss": ("sum", "length_normalised"), "beta": (0.5, 5.0), "steps": (2, 12), "batch_size": (2, 4), "lr": (1e-3, 1e-2),
        "warmup": (0.0, 0.9), "schedule": ("constant", "linear"), "weight_decay": (0.0, 0.5), "clip": (1e-3, None),
    },
)  # fmt: skip


def log_likelihood(model: Any, ids: Tensor, labels: Tensor) -> tuple[Tensor, int]:
    """Of one answer alone, without padding: its sum and its number of tokens."""
    said = model(input_ids=ids[None]).logits[0].float().log_softmax(-1)
    places = [t for t in range(1, len(labels)) if labels[t] >= 0]
    return torch.stack([said[t - 1, labels[t]] for t in places]).sum(), len(places)


@pytest.mark.parametrize("loss", ["sum", "length_normalised"])
def test_the_loss_is_that_of_each_pair_alone(loss: Loss) -> None:
    start, model, data = tiny_llama(initializer_range=0.2), tiny_llama(initializer_range=0.2), pairs(6)
    data = with_reference(start, data, "preferences", Regime(steps=6, batch_size=4))
    expected = []
    for item in data:
        sides = []
        for prefix in ("", "other_"):
            ids, labels = item[f"{prefix}input_ids"], item[f"{prefix}labels"]
            (now, tokens), (before, _) = log_likelihood(model, ids, labels), log_likelihood(start, ids, labels)
            sides.append((now - before) / (tokens if loss == "length_normalised" else 1))
        expected.append(-torch.nn.functional.logsigmoid(0.7 * (sides[0] - sides[1])))
    batch, term = collate(data.items), dpo_term("preferences", loss, 0.7)
    assert torch.allclose(term.loss(forward(model, batch), batch), torch.stack(expected).sum(), atol=1e-4)
    assert torch.allclose(term.loss(*forward_answers(model, batch)), torch.stack(expected).sum(), atol=1e-4)


def logits_of(nll: Tensor) -> Tensor:
    """[b, t + 1, 2]: logits under which token 0 costs `nll` [b, t]."""
    p = (-nll).exp()
    return torch.nn.functional.pad(torch.stack([p.log(), (1 - p).log()], dim=-1), (0, 0, 0, 1))


def batch_of(first: list[float], other: list[float], before: tuple[float, float]) -> tuple[Tensor, dict[str, Tensor]]:
    """One pair whose answers' tokens cost so many nats."""
    width = max(len(first), len(other))
    sides = [torch.tensor([side + [1.0] * (width - len(side))]) for side in (first, other)]
    labels = [torch.tensor([[-100] + [0] * len(side) + [-100] * (width - len(side))]) for side in (first, other)]
    known = {"reference_nll": torch.tensor([before[0]]), "other_reference_nll": torch.tensor([before[1]])}
    return logits_of(torch.cat(sides)), {"labels": labels[0], "other_labels": labels[1], **known}


def test_repeating_every_token_changes_the_sum_and_not_the_mean() -> None:
    once = batch_of([0.4], [1.1, 0.9], (0.6, 1.5))
    thrice = batch_of([0.4] * 3, [1.1, 0.9] * 3, (1.8, 4.5))
    normalised, plain = (tuple(float(margins(*each, loss)) for each in (once, thrice)) for loss in _LOSSES)
    assert normalised[0] == pytest.approx(normalised[1], abs=1e-5) == pytest.approx(0.2 + 0.25, abs=1e-5)
    assert plain[1] == pytest.approx(3 * plain[0], abs=1e-5) and plain[0] == pytest.approx(0.2 + 0.5, abs=1e-5)


_LOSSES: tuple[Loss, Loss] = ("length_normalised", "sum")


def test_answers_of_one_token_are_the_same_in_both_and_swapping_turns_the_margin() -> None:
    one = batch_of([0.4], [1.1], (0.6, 1.5))
    assert float(margins(*one, "sum")) == float(margins(*one, "length_normalised"))
    swapped = batch_of([1.1], [0.4], (1.5, 0.6))
    losses = [float(dpo_term("p", "sum", 2.0).loss(*each)) for each in (one, swapped)]
    assert losses[0] - losses[1] == pytest.approx(-2.0 * float(margins(*one, "sum")), abs=1e-5)


def test_at_the_start_the_loss_is_the_logarithm_of_two() -> None:
    outcome = dpo(tiny_llama(), pairs(6), steps=1, batch_size=6, lr=1e-5)  # pyright: ignore[reportCallIssue]
    assert outcome.curves["DPO"] == pytest.approx([math.log(2)], abs=1e-5)
    assert outcome.facts["pairs"] == 6


@pytest.mark.parametrize("loss", ["sum", "length_normalised"])
def test_the_chosen_answers_gain_on_the_rejected(loss: Loss) -> None:
    model = tiny_llama(initializer_range=0.2)
    outcome = dpo(model, pairs(8), loss=loss, beta=1.0, steps=30, batch_size=8, lr=3e-3)  # pyright: ignore[reportCallIssue]
    assert outcome.model is model and float(str(outcome.facts["chosen_gained_more"])) > 0.9
    assert outcome.curves["DPO"][-1] < 0.5 * math.log(2)


def test_the_reference_is_run_on_what_will_be_drawn_alone() -> None:
    rows: list[int] = []
    model: nn.Module = tiny_llama()
    model.register_forward_hook(lambda _, args, kwargs, out: rows.append(len(out.logits)), with_kwargs=True)
    data = with_reference(model, pairs(40), "preferences", Regime(steps=3, batch_size=2))
    assert sum(rows) == 12  # both sides of six
    assert sum(float(item["reference_nll"]) > 0 for item in data) == 6


def test_what_is_no_pair_is_refused() -> None:
    with pytest.raises(RequestError, match="must be prompts with a chosen and a rejected answer"):
        dpo(tiny_llama(), examples_for("llama", 4))
    with pytest.raises(RequestError, match="and these are none"):
        dpo(tiny_llama(), Examples([], []))
