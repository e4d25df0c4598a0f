"""Log-probabilities of answers: equal to the formulas, and the same however examples are batched."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from conftest import FAMILIES, examples_for, tiny_llama
from overhaul.data.encode import answered
from overhaul.data.examples import IGNORED, Examples
from overhaul.errors import RequestError, RunError
from overhaul.judge import likelihood
from overhaul.judge.likelihood import auc, exact_memorisation, extraction_strength, min_k, score

VOCABULARY = 64


class Constant(nn.Module):
    """Gives every token the same logit: a uniform model."""

    def __init__(self, logit: float = 0.0) -> None:
        super().__init__()
        self.logit = nn.Parameter(torch.tensor(logit))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.logit.expand(*input_ids.shape, VOCABULARY)


def hits(text: str) -> Tensor:
    return torch.tensor([mark == "x" for mark in text])


def test_uniform_model_gives_log_v_one_over_v_and_min_k_log_v() -> None:
    for one in score(Constant(1.5), examples_for("llama", 12)):
        assert one.nll / len(one.logp) == pytest.approx(math.log(VOCABULARY), rel=1e-6)
        assert one.probability == pytest.approx(1 / VOCABULARY, rel=1e-6)
        for share in (0.01, 0.2, 0.4, 0.99, 1.0):
            assert min_k(one.logp, share) == pytest.approx(-math.log(VOCABULARY), rel=1e-6)


def test_all_memorised_means_all_extractable() -> None:
    assert exact_memorisation(hits("xxxxx")) == extraction_strength(hits("xxxxx")) == 1.0


def test_only_last_token_right_gives_one_over_t() -> None:
    assert extraction_strength(hits("....x")) == pytest.approx(1 / 5)


def test_nothing_right_gives_extraction_zero() -> None:
    assert extraction_strength(hits("....")) == exact_memorisation(hits("....")) == 0.0


@pytest.mark.parametrize(
    ("marks", "strength", "memorised"), [("xxxx.", 0.0, 0.8), (".xxxx", 0.8, 0.8), ("xx.xx", 0.4, 0.8), ("x", 1, 1)]
)
def test_extraction_counts_from_the_end(marks: str, strength: float, memorised: float) -> None:
    assert extraction_strength(hits(marks)) == pytest.approx(strength)
    assert exact_memorisation(hits(marks)) == pytest.approx(memorised)


def test_min_k_takes_the_least_likely_tokens() -> None:
    logp = torch.tensor([-1.0, -9.0, -2.0, -4.0, -3.0])
    assert min_k(logp, 0.2) == -9.0
    assert min_k(logp, 0.4) == -6.5
    assert min_k(logp, 0.59) == -6.5
    assert min_k(logp, 0.01) == -9.0
    assert min_k(logp, 1.0) == pytest.approx(-3.8)


def test_auc_swapping_sets_gives_the_complement_and_equals_sklearn() -> None:
    draw = torch.Generator().manual_seed(3)
    members = torch.randint(0, 12, (37,), generator=draw).tolist()  # few values, so many ties
    others = torch.randint(2, 15, (23,), generator=draw).tolist()
    expected = roc_auc_score([1] * 37 + [0] * 23, members + others)
    assert auc(members, others) == pytest.approx(expected, abs=1e-12)
    assert auc(others, members) == pytest.approx(1 - expected, abs=1e-12)
    assert auc([1.0], [1.0]) == 0.5
    assert auc([2.0, 3.0], [0.0, 1.0]) == 1.0


def by_hand(model: nn.Module, examples: Examples, i: int) -> Tensor:
    """Log-probabilities of one answer, without batch, padding or mask."""
    item = examples.items[i]
    with torch.no_grad():
        logits = model(input_ids=item["input_ids"][None]).logits[0].log_softmax(-1)
    labels = item["labels"]
    return torch.stack([logits[t - 1, labels[t]] for t in range(1, len(labels)) if labels[t] != IGNORED])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("batch_tokens", [1, 20, 4096])
def test_batch_size_and_padding_change_no_value(family: str, batch_tokens: int) -> None:
    model, examples = FAMILIES[family](), examples_for(family, 24)
    for i, one in enumerate(score(model, examples, batch_tokens)):
        torch.testing.assert_close(one.logp, by_hand(model, examples, i), atol=2e-5, rtol=0)


def test_padding_side_changes_no_value() -> None:
    model, examples = tiny_llama(), examples_for("llama", 16)
    width = max(len(item["input_ids"]) for item in examples.items)
    ids, mask = torch.zeros(16, width, dtype=torch.long), torch.zeros(16, width, dtype=torch.long)
    for row, item in enumerate(examples.items):
        ids[row, width - len(item["input_ids"]) :] = item["input_ids"]
        mask[row, width - len(item["input_ids"]) :] = 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits.log_softmax(-1)
    for row, one in enumerate(score(model, examples)):
        last = len(one.targets)
        left = logits[row, -last - 1 : -1].gather(1, one.targets[:, None])[:, 0]
        torch.testing.assert_close(one.logp, left, atol=2e-5, rtol=0)


def test_order_changes_no_value(family: str) -> None:
    model, examples = FAMILIES[family](), examples_for(family, 20)
    order = torch.randperm(20).tolist()
    straight, mixed = score(model, examples), score(model, examples.select(order))
    for place, i in enumerate(order):
        torch.testing.assert_close(mixed[place].logp, straight[i].logp, atol=2e-5, rtol=0)
        assert torch.equal(mixed[place].hits, straight[i].hits)
        assert torch.equal(mixed[place].targets, straight[i].targets)


@pytest.mark.parametrize("family", ["vit", "resnet"])
def test_an_image_is_an_answer_of_one_token(family: str) -> None:
    model, examples = FAMILIES[family](), examples_for(family, 10)
    pixels = torch.stack([item["pixel_values"] for item in examples.items])
    with torch.no_grad():
        expected = model(pixel_values=pixels).logits.log_softmax(-1)
    for i, one in enumerate(score(model, examples, batch_tokens=50)):
        label = examples.items[i]["labels"]
        assert one.probability == pytest.approx(expected[i, label].exp().item(), rel=1e-4)
        assert one.hits.tolist() == [bool(expected[i].argmax() == label)]


def test_no_batch_is_wider_than_its_budget() -> None:
    examples = examples_for("llama", 40)
    plan: Any = likelihood._plan(examples, 30)
    batches = list(plan)
    assert sorted(i for batch in batches for i in batch) == list(range(40))
    assert max(len(b) * max(len(examples[i]["input_ids"]) for i in b) for b in batches) <= 30
    assert len(batches) < 40


def test_only_a_closing_eos_is_left_out() -> None:
    one = score(Constant(), Examples([answered([5, 6], [7, 8], 2)], [{}]))[0]
    assert one.targets.tolist() == [7, 8, 2]
    assert one.without(2).targets.tolist() == [7, 8]
    assert len(one.without(2).hits) == len(one.without(2).logp) == 2
    assert one.without(8) is one
    assert one.without(None) is one
    alone = score(Constant(), Examples([answered([5, 6], [2], None)], [{}]))[0]
    assert alone.without(2) is alone


def test_mode_is_put_back_and_dropout_is_off() -> None:
    model = FAMILIES["gpt2"](resid_pdrop=0.5, embd_pdrop=0.5).train()
    examples = examples_for("gpt2", 4)
    first, second = score(model, examples), score(model, examples)
    assert model.training
    assert all(torch.equal(a.logp, b.logp) for a, b in zip(first, second, strict=True))


def test_outputs_that_are_not_finite_stop_the_judgement() -> None:
    with pytest.raises(RunError, match="not finite"):
        score(Constant(math.nan), examples_for("llama", 3))


def test_an_example_without_an_answer_is_an_error() -> None:
    with pytest.raises(RequestError, match="no token that carries loss"):
        score(Constant(), Examples([answered([5, 6], [], None)], [{}]))
