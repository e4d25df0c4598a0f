"""Reinforcement learning from verifiable rewards: raise the probability of answers that a program finds right.

Tulu 3 (Lambert et al., arXiv:2411.15124), in the GRPO form of Tulu 3.1 8B (Shao et al., arXiv:2402.03300).

    A   = (r - mean of the group) / (std of the group + 1e-8)          of n answers to one prompt, r from the verifier
    L_t = max(-A rho_t, -A clip(rho_t, 1 - clip_ratio, 1 + clip_ratio)) + beta k3_t,     rho_t = p(y_t) / p_old(y_t)
    k3  = exp(-d) - 1 + d,   d = log p(y_t) - log p_ref(y_t)
    L   = mean of L_t over all answer tokens of the step

How it differs from open-instruct's code:

1. Rollouts are made by the model itself between two steps and are not one update old.
2. What is kept of the start policy are its log-probabilities of the drawn tokens; it runs without gradients, once a rollout,
   and is not held at all where beta is 0.
3. A group in which all rewards are equal has the advantage 0 and only feels the KL.
4. An answer that did not come to its end scores 0, as in the released run.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import torch
from annotated_types import Ge, Gt
from jaxtyping import Float
from torch import Tensor, nn

from overhaul.data.examples import IGNORED, Batch, Examples
from overhaul.data.verifiers import VERIFIERS, score
from overhaul.errors import RequestError
from overhaul.fit import Regime, Training
from overhaul.generation import check_generates
from overhaul.method import Outcome, method
from overhaul.objectives import Term, answer_tokens, token_nll
from overhaul.rollouts import LOGPROB, answer_logprobs, longest_answer, rollouts

ADVANTAGE, REFERENCE = "advantage", "reference_logprob"
TULU = Regime(steps=2000, batch_size=48, lr=5e-7, warmup=0.0, schedule="constant")
Reward = Callable[[Mapping[str, Any], str], float]


@method(verb="align", paper="2411.15124", changes="weights", memory="training")
def rlvr(
    model: nn.Module,
    prompts: Examples,
    *,
    samples: Annotated[int, Ge(2)] = 16,
    updates: Annotated[int, Ge(1)] = 2,
    beta: Annotated[float, Ge(0)] = 0.01,
    clip_ratio: Annotated[float, Gt(0)] = 0.2,
    temperature: Annotated[float, Gt(0)] = 1.0,
    new_tokens: Annotated[int, Ge(1)] | None = None,
    training: Regime = TULU,
) -> Outcome:
    """Train a language model on its own answers, rewarded by each row's verifier.

    The defaults are those of Tulu 3.1 for 8B; a model of some millions of parameters wants a rate of 1e-5 to 1e-4.

    Args:
        model: a causal language model that is right now and then: where no answer of a group is right nothing is learnt.
        prompts: questions whose rows hold what their verifier reads (`verify: gsm8k`, or rows of a generated task).
        samples: answers drawn to each prompt, compared with each other.
        updates: optimizer steps on one set of answers; `steps` counts them all.
        beta: weight of the KL to the model as it was; 0 leaves it out, and then no copy of the model is held.
        clip_ratio: how far from 1 the ratio of new to old probability still counts.
        temperature: at which answers are drawn.
        new_tokens: most tokens of an answer; as many as the longest given one has, if None.
        training: how long and how fast; `batch_size` counts prompts.

    Returns:
        The same model, with curves of the loss, the mean reward, the share of answers that ended and their mean length.
        Facts: the mean reward of the first and of the last tenth of the steps.

    Raises:
        RequestError: `prompts` are no questions with a tokenizer, or a row lacks what its verifier reads.
        RunError: training diverged (the last good weights are kept).
    """
    if prompts.kind == "tokens" and prompts.processor is not None:
        check_verified("align.rlvr", prompts.rows)
    return learn_from(score, model, prompts, samples, updates, beta, clip_ratio, temperature, new_tokens, training)


def check_verified(method: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Whether every row says what its answers are rewarded by, and has what that reads.

    Raises:
        RequestError: a row does not.
    """
    for number, row in enumerate(rows, 1):
        named = str(row.get("verify") or row.get("task"))
        if named not in VERIFIERS:
            raise RequestError(
                f"{method}: row {number} of `prompts` names no verifier, so nothing says which answers are right. Write "
                f"`verify: NAME` in the material; there are {', '.join(sorted(VERIFIERS))}."
            )
        for column in VERIFIERS[named].columns:
            if column not in row:
                raise RequestError(
                    f"{method}: row {number} of `prompts` lacks {column!r}, which `verify: {named}` reads."
                )


def learn_from(
    reward: Reward,
    model: nn.Module,
    prompts: Examples,
    samples: int,
    updates: int,
    beta: float,
    clip_ratio: float,
    temperature: float,
    new_tokens: int | None,
    training: Regime,
) -> Outcome:
    """`rlvr` with a reward of one's own, (row, text) -> a number."""
    if prompts.kind != "tokens" or prompts.processor is None:
        raise RequestError(
            "align.rlvr: `prompts` must be questions that come with their tokenizer, and these are "
            f"{prompts.kind if len(prompts) else 'none'}."
        )
    check_generates(model)
    if new_tokens is None:
        longest_answer(prompts)  # refuses before training what a batch without answers would
    reference = copy.deepcopy(model).requires_grad_(False) if beta else None
    loop = Training(model, {"prompts": prompts}, **training.loop, name="rlvr")
    loop.belongs |= {"samples": samples, "updates": updates, "batch size": training.batch_size, "beta": beta}
    term = grpo("answers", beta, clip_ratio)
    with loop:
        for step in loop:
            if step.number % updates == 0:
                questions = step.draw("prompts", training.batch_size)
                answers = rollouts(
                    loop.live, questions, samples, new_tokens=new_tokens, temperature=temperature, seed=step.seed
                )
                rewards = torch.tensor([reward(row, row["rollout"]) * row["ended"] for row in answers.rows])
                answers = answers.with_column(ADVANTAGE, advantages(rewards, samples))
                if reference is not None:
                    answers = answers.with_column(REFERENCE, answer_logprobs(_beside(reference, loop.live), answers))
                said = _said(rewards, answers)
                # an interrupted training goes on with the same answers
                loop.kept |= {"items": list(answers.items), "said": said}
            answers, said = _again(loop.kept["items"]), loop.kept["said"]
            step.backward([term], {"answers": answers})
            step.record(said)
            step.apply()
    curve, last = loop.ledger.curves["reward"], max(1, loop.ledger.step // 10)
    facts = {
        "steps": loop.ledger.step,
        "prompts": loop.ledger.examples["prompts"],
        "answers": loop.ledger.examples["prompts"] * samples,
        "reward_at_first": sum(curve[:last]) / last,
        "reward_at_the_end": sum(curve[-last:]) / last,
    }
    return Outcome(model, facts=dict(facts), curves=loop.ledger.curves)


def advantages(rewards: Float[Tensor, " n"], samples: int) -> Float[Tensor, " n"]:
    """Rewards against those of their own group of `samples`: mean 0, standard deviation (ddof 1) 1, or all 0."""
    groups = rewards.view(-1, samples)
    centred = groups - groups.mean(dim=1, keepdim=True)
    return (centred / (groups.std(dim=1, keepdim=True) + 1e-8)).flatten()


def grpo(role: str, beta: float, clip_ratio: float) -> Term:
    """The mean over the tokens of answers that carry `advantage`, `old_logprob` and, with a beta, `reference_logprob`."""

    def summed(logits: Tensor, batch: Batch) -> Tensor:
        labels = batch["labels"]
        keep = labels[:, 1:] != IGNORED
        counts = keep.sum(dim=1)
        now = -token_nll(logits, labels)[keep]
        advantage = batch[ADVANTAGE].repeat_interleave(counts)
        rho = (now - _tokens(batch[LOGPROB], counts)).exp()
        total = torch.maximum(-advantage * rho, -advantage * rho.clamp(1 - clip_ratio, 1 + clip_ratio)).sum()
        if beta:
            apart = now - _tokens(batch[REFERENCE], counts)
            total = total + beta * ((-apart).exp() - 1 + apart).sum()
        return total

    return Term(role, summed, answer_tokens, name="GRPO", answers_only=True)


def _tokens(column: Float[Tensor, "b k"], counts: Tensor) -> Tensor:
    """The values of a padded column that belong to answer tokens, one example after the other."""
    return column[torch.arange(column.shape[1], device=column.device) < counts[:, None]]


def _beside(reference: nn.Module, model: nn.Module) -> nn.Module:
    """The start policy on the device where the model trains."""
    return reference.to(next(model.parameters()).device)


def _said(rewards: Tensor, answers: Examples) -> dict[str, float]:
    """What the curves tell of a set of answers."""
    tokens = [float((item["labels"] != IGNORED).sum()) for item in answers.items]
    ended = [float(bool(row["ended"])) for row in answers.rows]
    return {
        "reward": float(rewards.mean()),
        "answers that ended": sum(ended) / len(ended),
        "tokens of an answer": sum(tokens) / len(tokens),
    }


def _again(items: Sequence[Any]) -> Examples:
    return Examples(items, [{}] * len(items))
