"""Rollouts: what is drawn, what is said about it, and that it depends on the seed alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from conftest import FAMILIES, examples_for, tiny_llama, tiny_tokenizer
from overhaul.data.encode import encode_qa
from overhaul.data.examples import Examples
from overhaul.errors import RequestError
from overhaul.rollouts import LOGPROB, rollouts

ROWS = [{"question": "ab"[: 1 + n % 2] * (1 + n), "answer": "xyz"} for n in range(5)]


def questions() -> Examples:
    return encode_qa(ROWS, tiny_tokenizer(), prompt="{question}:")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_each_token_carries_the_log_probability_of_the_model_itself(family: str) -> None:
    """At any temperature: compared with a forward over each sequence alone."""
    model: Any = FAMILIES[family](initializer_range=0.3).train()
    drawn = rollouts(model, questions(), 3, new_tokens=6, temperature=1.7, top_p=0.9, seed=1)
    assert len(drawn) == 15 and model.training
    model.eval()
    for n, (item, row) in enumerate(zip(drawn, drawn.rows, strict=True)):
        prompt = questions()[n // 3]
        start = int((prompt["labels"] >= 0).nonzero()[0])
        assert torch.equal(item["input_ids"][:start], prompt["input_ids"][:start])
        assert (item["labels"][:start] == -100).all() and torch.equal(item["labels"][start:], item["input_ids"][start:])
        said = model(input_ids=item["input_ids"][None]).logits[0, start - 1 : -1].log_softmax(-1)
        expected = said.gather(1, item["input_ids"][start:, None])[:, 0]
        assert torch.allclose(item[LOGPROB], expected, atol=1e-4)
        answer = item["input_ids"][start:].tolist()
        assert row["ended"] == (answer[-1] == 2) and 2 not in answer[:-1] and len(answer) <= 6
        assert row["rollout"] == tiny_tokenizer().decode([t for t in answer if t != 2])
        assert row["answer"] == "xyz" and row["question"] == ROWS[n // 3]["question"]


def test_they_depend_on_the_seed_and_leave_the_generator_alone() -> None:
    model = tiny_llama(initializer_range=0.2)
    before = torch.get_rng_state()
    first, again, other = (rollouts(model, questions(), 2, new_tokens=8, seed=seed).digest() for seed in (3, 3, 4))
    assert first == again != other and torch.equal(torch.get_rng_state(), before)


def test_the_frequencies_are_those_of_the_tempered_model() -> None:
    """4,000 first tokens against softmax(logits / T): the total variation of so many draws over 64 tokens is below 0.1."""
    model: Any = tiny_llama(initializer_range=0.3)
    drawn = rollouts(model, questions()[:1], 4000, new_tokens=1, temperature=2.0, seed=0, logprobs=False)
    assert LOGPROB not in drawn[0]
    counts = torch.bincount(torch.stack([item["input_ids"][-1] for item in drawn]), minlength=64) / 4000
    with torch.no_grad():
        expected = (model(input_ids=drawn[0]["input_ids"][None, :-1]).logits[0, -1] / 2.0).softmax(-1)
    assert float((counts - expected).abs().sum()) / 2 < 0.1


def test_what_cannot_be_answered_is_refused() -> None:
    with pytest.raises(RequestError, match="that come with their tokenizer"):
        rollouts(tiny_llama(), examples_for("llama", 2))
    bare = Examples([{"input_ids": torch.tensor([1, 5]), "labels": torch.tensor([-100, -100])}], [{}], tiny_tokenizer())
    with pytest.raises(RequestError, match="say how long one may be"):
        rollouts(tiny_llama(), bare)
    assert len(rollouts(tiny_llama(), bare, new_tokens=3)) == 1
