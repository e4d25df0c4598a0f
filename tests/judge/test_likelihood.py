"""Log-probabilities of answers: equal to the formulas, and the same however examples are batched."""

from __future__ import annotations

import math
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score, roc_curve
from torch import Tensor, nn

from conftest import FAMILIES, examples_for, tiny_gemma3, tiny_llama, tiny_qwen3
from overhaul.data.encode import answered
from overhaul.data.examples import IGNORED, Examples
from overhaul.errors import RequestError, RunError
from overhaul.judge import likelihood
from overhaul.judge.likelihood import (
    Scored,
    auc,
    batches_within,
    exact_memorisation,
    extraction_strength,
    loss_score,
    min_k,
    min_k_plus_plus,
    roc,
    score,
    tpr_at_fpr,
    zlib_score,
)

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
            assert min_k_plus_plus(one, share) == 0.0
        assert loss_score(one) == pytest.approx(-math.log(VOCABULARY), rel=1e-6)


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


def scored(logp: list[float], mean: list[float], variance: list[float]) -> Scored:
    count = len(logp)
    values = (torch.tensor(each) for each in (logp, mean, variance))
    first, *moments = values
    return Scored(first, torch.zeros(count, dtype=torch.bool), torch.zeros(count, dtype=torch.long), *moments)


def test_min_k_plus_plus_takes_the_largest_deviations_below_what_was_expected() -> None:
    one = scored([-1.0, -4.0, -2.0, -0.5], [-1.0, -3.5, -0.5, -1.0], [1.0, 4.0, 0.25, 0.0])
    # z = 0, -0.25, -3, and 0.5 / 0.001 where the variance is clamped at 1e-6
    assert min_k_plus_plus(one, 0.25) == pytest.approx(-3.0)
    assert min_k_plus_plus(one, 0.5) == pytest.approx((-3.0 - 0.25) / 2)
    assert min_k_plus_plus(one, 1.0) == pytest.approx((0.5 / 0.001 - 3.25) / 4)


def test_zlib_divides_by_the_bytes_that_zlib_needs() -> None:
    one = scored([-2.0, -4.0], [-1.0, -1.0], [1.0, 1.0])
    size = len(zlib.compress(b"an otter"))
    assert loss_score(one) == -3.0
    assert zlib_score(one, "an otter") == pytest.approx(-3.0 / size)
    assert zlib_score(one, "an otter " * 40) > zlib_score(one, "an otter")


def test_tokens_ruled_out_by_the_model_leave_the_moments_finite() -> None:
    class Masked(Constant):
        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            logits = super().forward(input_ids).clone()
            logits[..., VOCABULARY // 2 :] = -torch.inf
            return logits

    one = score(Masked(), Examples([answered([5, 6], [7, 8], None)], [{}]))[0]
    assert one.mean.tolist() == pytest.approx([-math.log(VOCABULARY / 2)] * 2)
    assert one.variance.tolist() == [0.0, 0.0]


def test_reading_logits_in_pieces_changes_no_value(monkeypatch: pytest.MonkeyPatch) -> None:
    model, examples = tiny_llama(), examples_for("llama", 12)
    whole = score(model, examples)
    monkeypatch.setattr(likelihood, "CHUNK", 3 * VOCABULARY)
    for one, other in zip(whole, score(model, examples), strict=True):
        assert torch.equal(one.logp, other.logp)
        assert torch.equal(one.variance, other.variance)


def test_the_curve_equals_sklearn_and_has_the_area() -> None:
    draw = torch.Generator().manual_seed(4)
    members = torch.randint(3, 18, (41,), generator=draw).double().tolist()
    others = torch.randint(0, 15, (29,), generator=draw).double().tolist()
    false, true, _ = roc_curve([1] * 41 + [0] * 29, members + others, drop_intermediate=False)
    ours = np.array(roc(members, others))
    np.testing.assert_allclose(ours, np.stack([false, true], axis=1), atol=1e-12)
    assert np.trapezoid(ours[:, 1], ours[:, 0]) == pytest.approx(auc(members, others), abs=1e-12)


def test_true_positives_are_counted_where_false_ones_are_few_enough() -> None:
    others = [float(i) for i in range(100)]
    members = [98.5, 99.5, 99.0, 10.0]
    assert tpr_at_fpr(members, others, 0.001) == 0.25  # above all others
    assert tpr_at_fpr(members, others, 0.01) == 0.75  # at most one other: 99.0 counts with its tie
    assert tpr_at_fpr(members, others, 0.9) == 1.0
    assert tpr_at_fpr(others, others, 0.01) == pytest.approx(0.01)
    assert tpr_at_fpr([0.0], [1.0], 0.01) == 0.0


def by_hand(model: nn.Module, examples: Examples, i: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of one answer with their expectation and variance, without batch, padding or mask."""
    item = examples.items[i]
    with torch.no_grad():
        logp = model(input_ids=item["input_ids"][None]).logits[0].double().log_softmax(-1)
    labels = item["labels"]
    places = [t for t in range(1, len(labels)) if labels[t] != IGNORED]
    before = logp[[t - 1 for t in places]]
    mean = (before.exp() * before).sum(1)
    variance = (before.exp() * before.square()).sum(1) - mean.square()
    return before[range(len(places)), labels[places]].float(), mean.float(), variance.float()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("batch_tokens", [1, 20, 4096])
def test_batch_size_and_padding_change_no_value(family: str, batch_tokens: int) -> None:
    model, examples = FAMILIES[family](), examples_for(family, 24)
    for i, one in enumerate(score(model, examples, batch_tokens)):
        for found, expected in zip((one.logp, one.mean, one.variance), by_hand(model, examples, i), strict=True):
            torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


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
        before = logits[row, -last - 1 : -1]
        mean = (before.exp() * before).sum(1)
        variance = (before.exp() * (before - mean[:, None]).square()).sum(1)
        expected = (before.gather(1, one.targets[:, None])[:, 0], mean, variance)
        for found, left in zip((one.logp, one.mean, one.variance), expected, strict=True):
            torch.testing.assert_close(found, left, atol=2e-5, rtol=0)


def test_order_changes_no_value(family: str) -> None:
    model, examples = FAMILIES[family](), examples_for(family, 20)
    order = torch.randperm(20).tolist()
    straight, mixed = score(model, examples), score(model, examples.select(order))
    for place, i in enumerate(order):
        for name in ("logp", "mean", "variance"):
            torch.testing.assert_close(getattr(mixed[place], name), getattr(straight[i], name), atol=2e-5, rtol=0)
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
    batches = list(batches_within(examples, 30))
    assert sorted(i for batch in batches for i in batch) == list(range(40))
    assert max(len(b) * max(len(examples[i]["input_ids"]) for i in b) for b in batches) <= 30
    assert len(batches) < 40


def test_only_a_closing_eos_is_left_out() -> None:
    one = score(Constant(), Examples([answered([5, 6], [7, 8], 2)], [{}]))[0]
    assert one.targets.tolist() == [7, 8, 2]
    assert one.without(2).targets.tolist() == [7, 8]
    shorter = one.without(2)
    assert [len(x) for x in (shorter.hits, shorter.logp, shorter.mean, shorter.variance)] == [2] * 4
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


def softcapped(**changes: Any) -> nn.Module:
    """A head with something behind it."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    options: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
    options |= {"num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48, "final_logit_softcapping": 0.02}
    return Gemma2ForCausalLM(Gemma2Config(**{**options, **changes})).eval()


class Centred(nn.Module):
    """A model that does more with its logits than one position at a time: its head cannot be run on answers alone."""

    def __init__(self) -> None:
        super().__init__()
        self.inner: Any = tiny_llama()

    def get_output_embeddings(self) -> nn.Module:
        return self.inner.lm_head

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        logits = self.inner(input_ids=input_ids, attention_mask=attention_mask).logits
        return logits * torch.arange(1.0, 1 + logits.shape[1])[:, None]


@pytest.mark.parametrize("make", [tiny_llama, tiny_qwen3, tiny_gemma3, softcapped, FAMILIES["gpt2"]])
def test_the_head_is_run_where_answers_are_and_gives_the_same_numbers(make: Any) -> None:
    model, examples = make(), examples_for("llama", 16)
    rows: list[int] = []
    model.get_output_embeddings().register_forward_hook(lambda _, args, out: rows.append(out[..., 0].numel()))
    found = score(model, examples, batch_tokens=60)
    # one example whole and by its answer alone, then the others' answers
    assert sum(rows) == rows[0] + sum(len(one.targets) for one in found)
    assert rows[1] < rows[0] < 15
    for i, one in enumerate(found):
        expected, _, _ = by_hand(model, examples, i)
        torch.testing.assert_close(one.logp, expected, atol=2e-5, rtol=0)


def test_a_model_that_reads_its_logits_together_is_run_whole() -> None:
    model, examples = Centred(), examples_for("llama", 12)
    for i, one in enumerate(score(model, examples)):
        item = examples.items[i]
        with torch.no_grad():
            logp = model(item["input_ids"][None])[0].log_softmax(-1)
        count = len(one.targets)
        torch.testing.assert_close(
            one.logp, logp[-count - 1 : -1].gather(1, one.targets[:, None])[:, 0], atol=1e-4, rtol=0
        )


def test_an_example_without_an_answer_is_an_error() -> None:
    with pytest.raises(RequestError, match="no token that carries loss"):
        score(Constant(), Examples([answered([5, 6], [], None)], [{}]))
