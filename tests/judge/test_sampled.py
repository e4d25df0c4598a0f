"""Metrics of drawn answers, against counts by hand and against distributions that are known."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import nn

from conftest import tiny_llama, tiny_tokenizer
from overhaul.data.examples import Examples
from overhaul.data.materials import examples
from overhaul.errors import RequestError
from overhaul.judge.evidence import Evidence, Sampled, kind_of
from overhaul.judge.judge import check, judge
from overhaul.judge.metrics.sampled import at_least_one

SAID = {0: ["4", "4", "5", "6"], 1: ["7", "7", "7", "7"]}


@pytest.fixture
def sums() -> Examples:
    rows = [{"question": "2 + 2", "answer": "4"}, {"question": "3 + 4", "answer": "8"}]
    options: dict[str, Any] = {"form": "prompt", "columns": {"prompt": "question"}, "prompt": "{question} ="}
    return examples(rows, tiny_tokenizer(), verify="addition", **options)


def ask(metric: str, data: Examples, model: nn.Module | None = None, **options: Any) -> float | None:
    requests = check({"kept": {metric: {"on": "role", **options}}}, ["role"])
    return judge(model or tiny_llama(), requests, {"role": data}).measures[0].value


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the model draws, fixed."""

    def sampled(_: Evidence, count: int, temperature: float) -> list[Sampled]:
        return [
            Sampled(place, texts[:count], [[ord(character) for character in text * 3] for text in texts[:count]])
            for place, texts in SAID.items()
        ]

    monkeypatch.setattr(Evidence, "sampled", sampled)


@pytest.mark.parametrize(("n", "right"), [(4, 0), (4, 1), (5, 2), (6, 4), (3, 3)])
def test_pass_at_k_is_the_share_of_all_choices_of_k_samples(n: int, right: int) -> None:
    for k in range(1, n + 1):
        choices = list(itertools.combinations([i < right for i in range(n)], k))
        assert at_least_one(n, right, k) == pytest.approx(sum(map(any, choices)) / len(choices))


def test_success_is_counted_by_the_verifier_of_the_row(said: None, sums: Examples) -> None:
    # two of four right for the first prompt; all for the second, whatever its `answer` says
    assert ask("pass_at_k", sums, k=1, samples=4) == pytest.approx((2 / 4 + 1) / 2)
    assert ask("pass_at_k", sums, k=2, samples=4) == pytest.approx((1 - 1 / 6 + 1) / 2)
    assert ask("pass_at_k", sums, k=4, samples=1) == 1.0  # at least k are drawn
    assert ask("validity", sums, samples=4) == pytest.approx((2 / 4 + 1) / 2)
    assert ask("validity", sums, samples=4, verifier="json_valid") == 1.0
    assert ask("validity", sums, samples=4, verifier="exact") == pytest.approx((2 / 4 + 0) / 2)


def test_diversity_is_counted_over_the_samples_of_a_prompt(said: None, sums: Examples) -> None:
    assert ask("unique_samples", sums, samples=4) == pytest.approx((3 / 4 + 1 / 4) / 2)
    assert ask("distinct_n", sums, samples=4, n=2) == pytest.approx((3 / 8 + 1 / 8) / 2)  # two pairs in each "444"
    assert ask("distinct_n", sums, samples=1, n=2) == pytest.approx((1 / 2 + 1 / 2) / 2)
    assert ask("distinct_n", sums, samples=1, n=9) is None


def coin() -> nn.Module:
    """A model whose every token is "4" or "5", with odds of 3 at temperature 1."""
    model: Any = tiny_llama(num_hidden_layers=1, tie_word_embeddings=False)
    four, five = tiny_tokenizer().convert_tokens_to_ids(["4", "5"])
    head = nn.Linear(32, 64)
    nn.init.zeros_(head.weight)
    nn.init.constant_(head.bias, -1e4)
    with torch.no_grad():
        head.bias[four], head.bias[five] = math.log(3), 0.0
    model.lm_head = head
    return model


def test_temperature_reaches_the_draws(sums: Examples) -> None:
    evidence = Evidence(coin(), sums, 9)
    for temperature, expected in ((1.0, 3 / 4), (0.5, 9 / 10), (100.0, 0.5)):
        drawn = evidence.sampled(200, temperature)
        tokens = [text for one in drawn for text in "".join(one.texts)]
        share = tokens.count("4") / len(tokens)
        # 400 answers of 6 tokens: a deviation of 0.01, of which six are allowed
        assert len(tokens) == 2400 and abs(share - expected) < 0.06


def test_draws_repeat_themselves_and_leave_the_random_state_alone(sums: Examples) -> None:
    model = coin()
    state = torch.get_rng_state()
    first = Evidence(model, sums, 9).sampled(5, 1.0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert Evidence(model, sums, 9).sampled(5, 1.0) == first


def test_prompts_are_answered_and_sampled_but_have_no_likelihood(sums: Examples) -> None:
    assert kind_of(sums) == "prompts"
    assert ask("accuracy", sums, coin()) == 0.0
    (request,) = check({"kept": {"perplexity": "role"}}, ["role"])
    with pytest.raises(RequestError, match="reads answers or text, but 'role' holds prompts"):
        judge(coin(), [request], {"role": sums})
    samples = judge(coin(), check({"kept": {"accuracy": "role"}}, ["role"]), {"role": sums}).samples
    assert {name: samples[0][name] for name in ("prompt", "expected")} == {"prompt": "2 + 2 =", "expected": "4"}
    assert set(samples[0]["output"]) == {"4"}
