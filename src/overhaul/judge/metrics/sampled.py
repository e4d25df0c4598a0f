"""What a model says when it draws its answers: success at k, validity, diversity.

    pass@k = 1 - C(n - c, k) / C(n, k)        of n samples, c are right        (Chen et al., arXiv:2107.03374)
    distinct-n = different n-grams / n-grams                                   (Li et al., arXiv:1510.03055)

Samples are drawn from one seed, the same for every model, and shared by all metrics that ask for equally many of one
temperature.
"""

from __future__ import annotations

import math
from typing import Annotated

from annotated_types import Ge, Gt
from pydantic import AfterValidator

from overhaul.data.verifiers import check_rows, find_verifier, score, verify
from overhaul.data.verifiers.exact import normalise
from overhaul.judge.evidence import Evidence
from overhaul.judge.metrics import Value, mean, metric

Count = Annotated[int, Ge(1)]
Temperature = Annotated[float, Gt(0)]
VerifierName = Annotated[str, AfterValidator(lambda name: find_verifier(name).name)]

ASKED = ("answers", "prompts")


def at_least_one(n: int, right: int, k: int) -> float:
    """pass@k without bias: the chance that k of `n` samples, of which `right` are right, hold a right one."""
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


@metric("pass@k", "right at least once in k tries", unit="share", reads=ASKED)
def pass_at_k(role: Evidence, *, k: Count = 1, samples: Count = 10, temperature: Temperature = 1.0) -> Value:
    """Mean chance that one of k sampled answers is right by the row's verifier; at least `samples` are drawn."""
    rows, n = role.examples.rows, max(k, samples)
    check_rows(rows)
    drawn = role.sampled(n, temperature)
    return mean([at_least_one(n, sum(verify(rows[one.place], text) for text in one.texts), k) for one in drawn])


@metric("validity", "samples that are well-formed", unit="share", reads=ASKED)
def validity(
    role: Evidence, *, verifier: VerifierName | None = None, samples: Count = 10, temperature: Temperature = 1.0
) -> Value:
    """Mean score of sampled answers by the verifier that is named, or the row's: are they well-formed, right or not?"""
    rows = [row if verifier is None else {**row, "verify": verifier} for row in role.examples.rows]
    check_rows(rows)
    return mean(
        [mean([score(rows[one.place], text) for text in one.texts])[0] for one in role.sampled(samples, temperature)]
    )


@metric("distinct-n", "how much samples differ in their words", unit="share", reads=ASKED)
def distinct_n(role: Evidence, *, n: Count = 2, samples: Count = 10, temperature: Temperature = 1.0) -> Value:
    """Mean over prompts of different n-grams of tokens in their samples, as a share; prompts without any do not count."""
    shares: list[float] = []
    for one in role.sampled(samples, temperature):
        grams = [tuple(said[i : i + n]) for said in one.tokens for i in range(len(said) - n + 1)]
        if grams:
            shares.append(len(set(grams)) / len(grams))
    return mean(shares)


@metric("unique samples", "answers that are no repetition", unit="share", reads=ASKED)
def unique_samples(role: Evidence, *, samples: Count = 10, temperature: Temperature = 1.0) -> Value:
    """Mean over prompts of the share of sampled answers that are different, whatever their case and spaces."""
    return mean([len(set(map(normalise, one.texts))) / len(one.texts) for one in role.sampled(samples, temperature)])
