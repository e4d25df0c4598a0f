"""Right against wrong answers, and the utility that TOFU makes of them.

How they differ from the released code of TOFU:
1. Equal questions with equal answers count once.
2. `model_utility` takes the plain probability on every role; TOFU divides it by that of all choices where there are some.
"""

from __future__ import annotations

from overhaul.judge import standards
from overhaul.judge.evidence import Evidence, truth_ratios
from overhaul.judge.metrics import Value, mean, metric
from overhaul.judge.metrics.answers import answer_probability
from overhaul.judge.metrics.generated import rouge


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
    return mean([min(ratio, 1 / ratio) for ratio in truth_ratios(role)])


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
    return mean([min(ratio, 1 / ratio) for ratio in truth_ratios(role, "arithmetic")])


@metric(
    "max(0, 1 - truth ratio)",
    "how far the right answer is preferred to wrong ones",
    unit="share",
    reads=("answers",),
    columns=("wrong",),
)
def truth_preference(role: Evidence) -> Value:
    """Mean of max(0, 1 - R) of the truth ratio R: what TOFU counts on data that is to stay."""
    return mean([max(0.0, 1 - ratio) for ratio in truth_ratios(role)])


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
