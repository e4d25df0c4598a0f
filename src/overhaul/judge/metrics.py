"""The metrics that a recipe's `judge:` block can name. A new one is a decorated function in this file, nothing else.

A metric takes the evidence of one role, or of two where it compares them; the names of its arguments are the names of
those roles in a recipe. An argument `retrained_NAME` receives what the model that was trained without the data says about
the role NAME. A metric returns its value and the number of examples behind it.

How the metrics of benchmarks differ from their released codes (TOFU, MUSE, Open-Unlearning):
1. Equal questions with equal answers count once where another question than the role's own is asked.
2. `model_utility` takes the plain probability on every role; TOFU divides it by that of all choices where there are some.
3. `verbatim_memorisation` reads 32 tokens and continues by 32; MUSE continues by 128.
4. `knowledge_memorisation` generates a few tokens more than the longest expected answer, and its examples, if it is to
   have any, stand in the material's `prompt:`; MUSE generates 32 tokens after prompts of its own.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from overhaul.data.tasks import verify
from overhaul.judge import likelihood, standards
from overhaul.judge.evidence import Evidence, Kind, truth_ratios
from overhaul.judge.generation import repeated_share, rouge_l, rouge_l_f1

Better = Literal["up", "down"]
Wanted = Literal["up", "down", "same", "chance", "anchor"]
Value = tuple[float, int]

NEXT_QUESTION = re.compile(r"\n\s*\n|\nQuestion|Question:")
"""Where a model that does not stop goes on by itself: what follows is no part of its answer (MUSE, Open-Unlearning)."""

RETRAINED = "retrained_"
"""How the name of an argument begins that reads the retrained model."""


@dataclass(frozen=True)
class Metric:
    """What the decorator learnt about a function.

    Attributes:
        label: the field's name for it.
        help: what it is in plain words, beneath the label.
        unit: "share" and "probability" lie between 0 and 1; "" is a plain number.
        better: which way a model improves that is to know the role.
        forgotten: which way it should go where the role is to be forgotten.
        reads: the kinds of data it can be measured on.
        columns: what every row must have besides.
        roles: what a recipe calls its roles; one metric of one role has ("role",).
        anchored: those of them that it also reads on the retrained model.
    """

    name: str
    label: str
    help: str
    unit: str
    better: Better
    forgotten: Wanted
    reads: tuple[Kind, ...]
    columns: tuple[str, ...]
    roles: tuple[str, ...]
    anchored: tuple[str, ...]
    doc: str
    call: Callable[..., Value]


METRICS: dict[str, Metric] = {}


def metric(
    label: str,
    help: str,
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
        names = list(inspect.signature(function).parameters)
        roles = tuple(each for each in names if not each.startswith(RETRAINED))
        anchored = tuple(each.removeprefix(RETRAINED) for each in names if each.startswith(RETRAINED))
        METRICS[name] = Metric(name, label, help, unit, better, worse, reads, columns, roles, anchored, doc, function)
        return function

    return decorate


def _mean(values: Sequence[float]) -> Value:
    return math.fsum(values) / len(values), len(values)


@metric("answer probability", "how likely the right answer is", unit="probability", reads=("answers", "text", "images"))
def answer_probability(role: Evidence) -> Value:
    """Mean over examples of P(y|x), the geometric mean of the answer's token probabilities, EOS included (TOFU)."""
    return _mean([one.probability for one in role.scored])


@metric(
    "answer probability, paraphrased question",
    "how likely the right answer is when the question is put otherwise",
    unit="probability",
    reads=("answers",),
    columns=("paraphrase",),
)
def paraphrase_probability(role: Evidence) -> Value:
    """`answer_probability` where each question is put as its row's `paraphrase`; equal pairs count once."""
    return _mean([one.probability for one in role.paraphrased])


@metric("accuracy", "right answers", unit="share", reads=("answers", "images"))
def accuracy(role: Evidence) -> Value:
    """Share of greedy answers that the task's verifier accepts, or of images whose label is the most probable one."""
    if role.kind == "images":
        return _mean([float(one.hits[0]) for one in role.scored])
    return _mean([float(verify(role.examples.rows[one.place], one.text)) for one in role.answered])


@metric("ROUGE-L recall", "words of the right answer that are said, in order", unit="share", reads=("answers", "text"))
def rouge(role: Evidence) -> Value:
    """Mean ROUGE-L recall of greedy answers, or of 32-token continuations of text."""
    return _mean([rouge_l(one.expected, one.text) for one in role.answered])


@metric("VerbMem (ROUGE-L F1)", "text that is continued word by word", unit="share", reads=("text",))
def verbatim_memorisation(role: Evidence) -> Value:
    """Mean ROUGE-L F1 of 32-token continuations of text (MUSE)."""
    return _mean([rouge_l_f1(one.expected, one.text) for one in role.answered])


@metric("KnowMem (ROUGE-L F1)", "what is known on being asked", unit="share", reads=("answers",))
def knowledge_memorisation(role: Evidence) -> Value:
    """Mean ROUGE-L F1 of greedy answers, each cut at a blank line, "Question" on a new line or "Question:" (MUSE)."""
    return _mean([rouge_l_f1(one.expected, NEXT_QUESTION.split(one.text)[0]) for one in role.answered])


@metric("Rep-2", "token pairs that the answer repeats", unit="share", better="down", reads=("answers", "text"))
def repetition(role: Evidence) -> Value:
    """Mean Rep-2 of what is generated: the share of token pairs that occurred before in the same answer."""
    return _mean([repeated_share(one.tokens, 2) for one in role.answered])


@metric(
    "extraction strength",
    "the end of an answer that follows without a mistake",
    unit="share",
    reads=("answers", "text"),
)
def extraction(role: Evidence) -> Value:
    """Mean share of the answer, from its end, that the model completes without a mistake."""
    return _mean([likelihood.extraction_strength(one.without(role.eos).hits) for one in role.scored])


@metric("exact memorisation", "tokens that the model would have said itself", unit="share", reads=("answers", "text"))
def memorisation(role: Evidence) -> Value:
    """Mean share of answer tokens that are the most probable ones, teacher-forced."""
    return _mean([likelihood.exact_memorisation(one.without(role.eos).hits) for one in role.scored])


@metric("perplexity", "how many tokens it wavers between", better="down", reads=("answers", "text"))
def perplexity(role: Evidence) -> Value:
    """Exponential of the mean negative log-likelihood over all tokens; at most 8e307, where floats end."""
    tokens = sum(len(one.logp) for one in role.scored)
    return math.exp(min(math.fsum(one.nll for one in role.scored) / tokens, 709.0)), len(role.scored)


@metric(
    "bits per byte",
    "how short the model can write the text",
    unit="bits/byte",
    better="down",
    reads=("text",),
    columns=("text_bytes",),
)
def bits_per_byte(role: Evidence) -> Value:
    """Negative log-likelihood in bits per UTF-8 byte of text: what an arithmetic coder would need."""
    size = sum(int(row["text_bytes"]) for row in role.examples.rows)
    return math.fsum(one.nll for one in role.scored) / math.log(2) / size, len(role.scored)


@metric(
    "truth ratio",
    "wrong answers against the right one; 1 cannot tell",
    unit="share",
    better="down",
    reads=("answers",),
    columns=("wrong",),
)
def truth_ratio(role: Evidence) -> Value:
    """Mean of min(R, 1/R), R = geometric mean probability of the row's `wrong` answers over that of the right one.

    1 cannot tell them apart. The question is the row's own, the right answer its `paraphrased_answer` where it has one (TOFU
    as in its code).
    """
    return _mean([min(ratio, 1 / ratio) for ratio in truth_ratios(role)])


@metric(
    "truth ratio, arithmetic mean",
    "wrong answers against the right one; 1 cannot tell",
    unit="share",
    better="down",
    reads=("answers",),
    columns=("wrong",),
)
def truth_ratio_arithmetic(role: Evidence) -> Value:
    """As `truth_ratio`, with the arithmetic mean of the wrong answers' probabilities (TOFU's paper)."""
    return _mean([min(ratio, 1 / ratio) for ratio in truth_ratios(role, "arithmetic")])


@metric(
    "max(0, 1 - truth ratio)",
    "how far the right answer is preferred to wrong ones",
    unit="share",
    reads=("answers",),
    columns=("wrong",),
)
def truth_preference(role: Evidence) -> Value:
    """Mean of max(0, 1 - R) of the truth ratio R: what TOFU counts on data that is to stay."""
    return _mean([max(0.0, 1 - ratio) for ratio in truth_ratios(role)])


@metric(
    "model utility",
    "harmonic mean of probability, ROUGE-L and truth ratio",
    unit="share",
    reads=("answers",),
    columns=("wrong",),
)
def model_utility(role: Evidence) -> Value:
    """Harmonic mean of `answer_probability`, `rouge` and `truth_preference`: 0 if one of them is (TOFU).

    TOFU's nine parts over three roles are the harmonic mean of this on each of the roles.
    """
    parts = [answer_probability(role)[0], rouge(role)[0], truth_preference(role)[0]]
    return standards.model_utility(parts), len(role.scored)


Attack = Callable[[Evidence], list[float]]
"""Membership scores of a role's examples, high for members."""


def by_loss(role: Evidence) -> list[float]:
    """The mean log-probability of each answer."""
    return [likelihood.loss_score(one) for one in role.scored]


def by_zlib(role: Evidence) -> list[float]:
    """The mean log-probability per byte that zlib needs for the answer."""
    return [likelihood.zlib_score(one, text) for one, text in zip(role.scored, role.texts, strict=True)]


def by_min_k(role: Evidence, share: float = 0.2) -> list[float]:
    """The mean log-probability of the `share` of the tokens that is least likely, the closing EOS left out (Min-K)."""
    return [likelihood.min_k(one.without(role.eos).logp, share) for one in role.scored]


def by_min_k_plus_plus(role: Evidence) -> list[float]:
    """As `by_min_k`, in deviations from what the model expected at each token (Min-K++)."""
    return [likelihood.min_k_plus_plus(one.without(role.eos)) for one in role.scored]


ATTACKS: Mapping[str, tuple[str, Attack, tuple[Kind, ...]]] = {
    "membership": ("loss", by_loss, ("answers", "text", "images")),
    "membership_zlib": ("zlib", by_zlib, ("answers", "text")),
    "membership_min_k": ("Min-20%", by_min_k, ("answers", "text")),
    "membership_min_k_plus_plus": ("Min-20%++", by_min_k_plus_plus, ("answers", "text")),
}
"""Each becomes three metrics: the AUC under its own name, and the TPR at two false positive rates."""

FALSE_POSITIVE_RATES: Mapping[str, float] = {"_tpr_1e_2": 0.01, "_tpr_1e_3": 0.001}


def _auc(name: str, label: str, attack: Attack) -> Callable[[Evidence, Evidence], Value]:
    def area(members: Evidence, others: Evidence) -> Value:
        ours, theirs = attack(members), attack(others)
        return likelihood.auc(ours, theirs), len(ours) + len(theirs)

    area.__name__ = name
    area.__doc__ = f"""AUC of {label}: how well a reader of it tells members from others the model never saw.

    0.5 is chance; below 0.5, members stand out by being too unlikely, which shows that something was removed.
    """
    return area


def _tpr(name: str, label: str, attack: Attack, fpr: float) -> Callable[[Evidence, Evidence], Value]:
    def found(members: Evidence, others: Evidence) -> Value:
        ours, theirs = attack(members), attack(others)
        return likelihood.tpr_at_fpr(ours, theirs, fpr), len(ours) + len(theirs)

    found.__name__ = name
    found.__doc__ = f"Share of members found by {label} while at most {fpr:.1%} of the others are taken for some."
    return found


TOLD = "told from examples that the model never saw; 0.5 is a guess"
FOUND = "members found while hardly any stranger is taken for one"

for _name, (_label, _attack, _reads) in ATTACKS.items():
    metric(f"membership inference AUC ({_label})", TOLD, forgotten="chance", reads=_reads)(_auc(_name, _label, _attack))
    for _suffix, _fpr in FALSE_POSITIVE_RATES.items():
        metric(f"membership inference TPR at {_fpr:.1%} FPR ({_label})", FOUND, unit="share", reads=_reads)(
            _tpr(_name + _suffix, _label, _attack, _fpr)
        )


@metric(
    "forget quality (log10 p)",
    "whether truth ratios look like the retrained model's; above -1.3 they do",
    unit="log10 p",
    better="down",
    forgotten="anchor",
    reads=("answers",),
    columns=("wrong",),
)
def forget_quality(role: Evidence, retrained_role: Evidence) -> Value:
    """log10 p of a Kolmogorov-Smirnov test of truth ratios against the retrained model's; above -1.3 they look alike (TOFU).

    A destroyed model may pass it: name `model_utility` on what is to be kept beside it. It falls with the number of
    questions, so it is compared between models on one role only.
    """
    ratios = truth_ratios(role)
    return standards.forget_quality(ratios, truth_ratios(retrained_role)), len(ratios)


@metric(
    "PrivLeak (%)",
    "privacy leakage: 0 as retrained, below it remembered, above it shunned",
    better="down",
    forgotten="anchor",
    reads=("answers", "text"),
)
def privacy_leakage(
    members: Evidence, others: Evidence, retrained_members: Evidence, retrained_others: Evidence
) -> Value:
    """How far the AUC of Min-40% is from the retrained model's, in per cent (MUSE).

    0 as retrained, towards -100 where the members are remembered, above 0 where they are shunned.
    """
    ours, theirs, their_ours, their_theirs = (
        by_min_k(role, 0.4) for role in (members, others, retrained_members, retrained_others)
    )
    leakage = standards.privacy_leakage(likelihood.auc(ours, theirs), likelihood.auc(their_ours, their_theirs))
    return leakage, len(ours) + len(theirs)


@metric(
    "KL from the retrained model (nats)",
    "how far outputs are from those of a model that never saw it",
    better="down",
    forgotten="anchor",
    reads=("answers", "text", "images"),
)
def retrained_kl(role: Evidence, retrained_role: Evidence) -> Value:
    """Mean over examples of KL(retrained || model) per answer token, or image."""
    return _mean([kl for kl, _ in role.distances_from(retrained_role)])


@metric(
    "JS from the retrained model (nats)",
    "the same, at most log 2",
    better="down",
    forgotten="anchor",
    reads=("answers", "text", "images"),
)
def retrained_js(role: Evidence, retrained_role: Evidence) -> Value:
    """As `retrained_kl`, by the Jensen-Shannon divergence, which is at most log 2."""
    return _mean([js for _, js in role.distances_from(retrained_role)])
