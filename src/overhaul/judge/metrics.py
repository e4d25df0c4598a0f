"""The metrics that a recipe's `judge:` block can name. A new one is a decorated function in this file, nothing else.

A metric takes the evidence of one role, or of two where it compares them; the names of its arguments are the names of
those roles in a recipe. It returns its value and the number of examples behind it.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from overhaul.data.tasks import verify
from overhaul.judge import likelihood
from overhaul.judge.evidence import Evidence, Kind
from overhaul.judge.generation import repeated_share, rouge_l
from overhaul.judge.likelihood import Scored

Better = Literal["up", "down"]
Wanted = Literal["up", "down", "same", "chance"]
Value = tuple[float, int]


@dataclass(frozen=True)
class Metric:
    """What the decorator learnt about a function.

    Attributes:
        label: how a report calls it.
        unit: "share" and "probability" lie between 0 and 1; "" is a plain number.
        better: which way a model improves that is to know the role.
        forgotten: which way it should go where the role is to be forgotten.
        reads: the kinds of data it can be measured on.
        columns: what every row must have besides.
        roles: what a recipe calls its roles; one metric of one role has ("role",).
    """

    name: str
    label: str
    unit: str
    better: Better
    forgotten: Wanted
    reads: tuple[Kind, ...]
    columns: tuple[str, ...]
    roles: tuple[str, ...]
    doc: str
    call: Callable[..., Value]


METRICS: dict[str, Metric] = {}


def metric(
    label: str,
    *,
    unit: str = "",
    better: Better = "up",
    forgotten: Wanted | None = None,
    reads: tuple[Kind, ...],
    columns: tuple[str, ...] = (),
) -> Callable[[Callable[..., Value]], Callable[..., Value]]:
    """Register a function under its own name; see `Metric` for the arguments. `forgotten` is the opposite of `better`."""

    def decorate(function: Callable[..., Value]) -> Callable[..., Value]:
        name, doc = function.__name__, inspect.cleandoc(function.__doc__ or "")
        worse: Wanted = forgotten or ("down" if better == "up" else "up")
        roles = tuple(inspect.signature(function).parameters)
        METRICS[name] = Metric(name, label, unit, better, worse, reads, columns, roles, doc, function)
        return function

    return decorate


def _mean(values: Sequence[float]) -> Value:
    return math.fsum(values) / len(values), len(values)


@metric("probability of the answer", unit="probability", reads=("answers", "text", "images"))
def answer_probability(role: Evidence) -> Value:
    """Mean over examples of P(y|x), the geometric mean of the answer's token probabilities, EOS included (TOFU)."""
    return _mean([one.probability for one in role.scored])


@metric("probability of the answer to a paraphrase", unit="probability", reads=("answers",), columns=("paraphrase",))
def paraphrase_probability(role: Evidence) -> Value:
    """`answer_probability` where each question is put as its row's `paraphrase`; equal pairs count once."""
    return _mean([one.probability for one in role.paraphrased])


@metric("right answers", unit="share", reads=("answers", "images"))
def accuracy(role: Evidence) -> Value:
    """Share of greedy answers that the task's verifier accepts, or of images whose label is the most probable one."""
    if role.kind == "images":
        return _mean([float(one.hits[0]) for one in role.scored])
    return _mean([float(verify(role.examples.rows[one.place], one.text)) for one in role.answered])


@metric("words of the answer found (ROUGE-L)", unit="share", reads=("answers", "text"))
def rouge(role: Evidence) -> Value:
    """Mean ROUGE-L recall of greedy answers, or of 32-token continuations of text."""
    return _mean([rouge_l(one.expected, one.text) for one in role.answered])


@metric("repeated token pairs", unit="share", better="down", reads=("answers", "text"))
def repetition(role: Evidence) -> Value:
    """Mean Rep-2 of what is generated: the share of token pairs that occurred before in the same answer."""
    return _mean([repeated_share(one.tokens, 2) for one in role.answered])


@metric("extraction strength", unit="share", reads=("answers", "text"))
def extraction(role: Evidence) -> Value:
    """Mean share of the answer, from its end, that the model completes without a mistake."""
    return _mean([likelihood.extraction_strength(one.without(role.eos).hits) for one in role.scored])


@metric("exact memorisation", unit="share", reads=("answers", "text"))
def memorisation(role: Evidence) -> Value:
    """Mean share of answer tokens that are the most probable ones, teacher-forced."""
    return _mean([likelihood.exact_memorisation(one.without(role.eos).hits) for one in role.scored])


@metric("perplexity", better="down", reads=("answers", "text"))
def perplexity(role: Evidence) -> Value:
    """Exponential of the mean negative log-likelihood over all tokens; at most 8e307, where floats end."""
    tokens = sum(len(one.logp) for one in role.scored)
    return math.exp(min(math.fsum(one.nll for one in role.scored) / tokens, 709.0)), len(role.scored)


@metric("bits per byte", unit="bits/byte", better="down", reads=("text",), columns=("text_bytes",))
def bits_per_byte(role: Evidence) -> Value:
    """Negative log-likelihood in bits per UTF-8 byte of text: what an arithmetic coder would need."""
    size = sum(int(row["text_bytes"]) for row in role.examples.rows)
    return math.fsum(one.nll for one in role.scored) / math.log(2) / size, len(role.scored)


def _separation(score: Callable[[Scored], float], members: Evidence, others: Evidence) -> Value:
    ours, theirs = ([score(one) for one in role.scored] for role in (members, others))
    return likelihood.auc(ours, theirs), len(ours) + len(theirs)


@metric("told from unseen by loss (AUC)", forgotten="chance", reads=("answers", "text", "images"))
def membership(members: Evidence, others: Evidence) -> Value:
    """AUC of the mean log-probability: how well a reader of losses tells members from others the model never saw.

    0.5 is chance; below 0.5, members stand out by being too unlikely, which shows that something was removed.
    """
    return _separation(lambda one: -one.nll / len(one.logp), members, others)


@metric("told from unseen by Min-20% (AUC)", forgotten="chance", reads=("answers", "text"))
def membership_min_k(members: Evidence, others: Evidence) -> Value:
    """As `membership`, by the mean log-probability of the fifth of the tokens that is least likely (Min-K)."""
    return _separation(lambda one: likelihood.min_k(one.logp), members, others)
