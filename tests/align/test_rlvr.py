"""RLVR: the GRPO loss against its definition, the advantages, and a reward that is learnt and resumed."""

from __future__ import annotations

import copy
import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import examples_for, tiny_llama, tiny_tokenizer
from fit.test_checkpoints import interrupted
from fit.test_loop import same, weights
from overhaul import session
from overhaul.align.rlvr import ADVANTAGE, REFERENCE, advantages, grpo, learn_from, rlvr
from overhaul.data.encode import encode_qa
from overhaul.data.examples import Examples, collate
from overhaul.errors import RequestError
from overhaul.fit import Regime, fit
from overhaul.forward import forward
from overhaul.objectives import answer_tokens, cross_entropy, forward_answers
from overhaul.rollouts import LOGPROB, answer_logprobs, rollouts

ROWS = [{"question": question, "answer": "a", "verify": "exact"} for question in ("ab", "ba", "aab", "b", "bb", "aba")]


def questions() -> Examples:
    return encode_qa(ROWS, tiny_tokenizer(), prompt="{question}:")


def model() -> nn.Module:
    """Of its 64 tokens, the one that ends an answer is likely enough to be drawn."""
    made: Any = tiny_llama(num_hidden_layers=2, initializer_range=0.2, tie_word_embeddings=False)
    return made


@functools.cache
def taught() -> nn.Module:
    """Taught to answer with one letter or two, whichever: now and then it is right."""
    policy = model()
    rows = [{**row, "answer": answer} for row in ROWS for answer in ("a", "b", "ab", "ba")]
    lessons = encode_qa(rows, tiny_tokenizer(), prompt="{question}:")
    fit(policy, [cross_entropy("qa")], {"qa": lessons}, steps=25, batch_size=24, lr=1e-2)
    return policy


CASE = {
    "method": rlvr,
    "materials": lambda: {"model": copy.deepcopy(taught()), "prompts": questions()},
    "knobs": {"steps": 3, "batch_size": 4, "lr": 1e-3, "samples": 4, "updates": 1, "new_tokens": 6},
    "varied": {
        "samples": (2, 4), "updates": (1, 2), "beta": (0.0, 1.0), "clip_ratio": (1e-6, 0.2, {"updates": 3, "lr": 1e-2}),
        "temperature": (0.7, 1.5), "new_tokens": (3, 6), "steps": (2, 3), "batch_size": (2, 4), "lr": (1e-3, 1e-2),
        "warmup": (0.0, 0.9), "schedule": ("constant", "linear"), "weight_decay": (0.0, 0.5), "clip": (1e-3, None),
    },
}  # fmt: skip


def test_advantages_have_mean_0_and_deviation_1_in_each_group_or_are_0() -> None:
    found = advantages(torch.tensor([1.0, 0.0, 0.0, 1.0, 3.0, 2.0, 0.0, 0.0, 5.0]), 3).view(3, 3)
    assert torch.allclose(found[0], torch.tensor([2.0, -1.0, -1.0]) / math.sqrt(3), atol=1e-6)
    assert torch.allclose(found.mean(dim=1), torch.zeros(3), atol=1e-6)
    assert torch.equal(advantages(torch.ones(4), 4), torch.zeros(4))


def drawn(policy: nn.Module, reference: nn.Module) -> Examples:
    answers = rollouts(policy, questions(), 3, new_tokens=5, seed=1)
    answers = answers.with_column(ADVANTAGE, torch.linspace(-1.5, 2.0, len(answers)))
    return answers.with_column(REFERENCE, answer_logprobs(reference, answers))


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_the_loss_is_that_of_each_token_alone(beta: float) -> None:
    old, reference, policy = model(), model(), model()
    with torch.no_grad():  # near the old one, so that some ratios are cut and others not
        for p, q in zip(policy.parameters(), old.parameters(), strict=True):
            p.copy_(q + 0.05 * p)
    answers, cut = drawn(old, reference), 0
    expected = torch.zeros(())
    for item in answers:
        said: Tensor = policy(input_ids=item["input_ids"][None]).logits[0].log_softmax(-1)
        places = [t for t in range(1, len(item["labels"])) if item["labels"][t] >= 0]
        for k, t in enumerate(places):
            now, a = said[t - 1, item["input_ids"][t]], item[ADVANTAGE]
            rho = (now - item[LOGPROB][k]).exp()
            cut += int(not 0.8 <= float(rho.detach()) <= 1.2)
            d = now - item[REFERENCE][k]
            expected = expected + max(-a * rho, -a * min(max(rho, torch.tensor(0.8)), torch.tensor(1.2)))
            expected = expected + beta * ((-d).exp() - 1 + d)
    batch, term = collate(answers.items), grpo("answers", beta, 0.2)
    total = sum(len(item[LOGPROB]) for item in answers)
    assert 0 < cut < total and term.count(batch) == answer_tokens(batch) == total
    assert torch.allclose(term.loss(forward(policy, batch), batch), expected, rtol=1e-4, atol=1e-3)
    assert torch.allclose(term.loss(*forward_answers(policy, batch)), expected, rtol=1e-4, atol=1e-3)


def test_the_first_ratio_is_one_and_its_gradient_that_of_the_policy() -> None:
    policy = model()
    answers = drawn(policy, policy)
    batch = collate(answers.items)
    value = grpo("answers", 0.5, 0.2).loss(*forward_answers(policy, batch))
    counts = torch.tensor([float(len(item[LOGPROB])) for item in answers])
    assert torch.allclose(value, -(batch[ADVANTAGE] * counts).sum(), atol=1e-3)


def ends_early(row: Any, text: str) -> float:
    return 1.0 / (1 + len(text))


def learnt(scratch: Path | None, report: session.Report = lambda *_: None, steps: int = 8) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    policy = model()
    with session.using(scratch=scratch, checkpoint_seconds=0.0, report=report):
        regime = Regime(steps=steps, batch_size=4, lr=5e-3, warmup=0.0, schedule="constant")
        outcome = learn_from(ends_early, policy, questions(), 4, 2, 0.01, 0.2, 1.0, 8, regime)
    return policy, outcome


def test_a_training_with_rollouts_resumes_bit_for_bit_between_two_updates(tmp_path: Path) -> None:
    straight, whole = learnt(None)

    def fifth(what: str, done: int, total: int, detail: str) -> None:
        if what == "rlvr":
            interrupted(6)(what, done, total, detail)

    with pytest.raises(KeyboardInterrupt):
        learnt(tmp_path, fifth)
    resumed, outcome = learnt(tmp_path)
    assert same(weights(resumed), weights(straight)) and outcome.curves == whole.curves
    assert outcome.facts["answers"] == 4 * 4 * 4


def test_what_is_rewarded_becomes_likelier() -> None:
    """An answer that ends at once is worth most: from 1 end in 64 tokens to most of them."""
    _, outcome = learnt(None, steps=30)
    reward = outcome.curves["reward"]
    assert sum(reward[-6:]) > 2 * sum(reward[:6])


def test_equal_rewards_in_every_group_move_nothing_without_a_kl() -> None:
    policy = model()
    before = weights(policy)
    regime = Regime(steps=2, batch_size=4, lr=1e-2)
    learn_from(lambda row, text: 0.0, policy, questions(), 4, 1, 0.0, 0.2, 1.0, 6, regime)
    assert same(weights(policy), before)


def test_prompts_must_be_questions_with_a_tokenizer() -> None:
    with pytest.raises(RequestError, match=r"align\.rlvr: `prompts` must be questions"):
        rlvr(model(), examples_for("llama", 3))
    with pytest.raises(RequestError, match=r"reads the column 'answer'|holds? no|lacks"):
        bare = Examples(questions().items, [{"verify": "exact"}] * len(ROWS), tiny_tokenizer())
        rlvr(model(), bare, **CASE["knobs"])
