"""How likely a model finds what was expected: read from one forward pass.

How they differ from the released code of TOFU: equal questions with equal answers count once where another question than the
role's own is asked.
"""

from __future__ import annotations

import math

from overhaul.judge import likelihood
from overhaul.judge.evidence import Evidence
from overhaul.judge.metrics import Value, mean, metric


@metric("answer probability", "how likely the right answer is", unit="probability", reads=("answers", "text", "images"))
def answer_probability(role: Evidence) -> Value:
    """Mean over examples of P(y|x), the geometric mean of the answer's token probabilities, EOS included (TOFU)."""
    return mean([one.probability for one in role.scored])


@metric(
    "answer probability, paraphrased question",
    "how likely the right answer is when the question is put otherwise",
    unit="probability",
    reads=("answers",),
    columns=("paraphrase",),
)
def paraphrase_probability(role: Evidence) -> Value:
    """`answer_probability` where each question is put as its row's `paraphrase`; equal pairs count once."""
    return mean([one.probability for one in role.paraphrased])


@metric(
    "extraction strength",
    "the end of an answer that follows without a mistake",
    unit="share",
    reads=("answers", "text"),
)
def extraction(role: Evidence) -> Value:
    """Mean share of the answer, from its end, that the model completes without a mistake."""
    return mean([likelihood.extraction_strength(one.without(role.eos).hits) for one in role.scored])


@metric("exact memorisation", "tokens that the model would have said itself", unit="share", reads=("answers", "text"))
def memorisation(role: Evidence) -> Value:
    """Mean share of answer tokens that are the most probable ones, teacher-forced."""
    return mean([likelihood.exact_memorisation(one.without(role.eos).hits) for one in role.scored])


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
