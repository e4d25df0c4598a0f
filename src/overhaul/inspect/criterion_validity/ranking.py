"""Does a score of patterns say which of them ends well? Rank correlation, anomalies, and how much noise there is."""

from __future__ import annotations

import itertools
import math
import statistics
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy

from overhaul.intervals import interval


@dataclass(frozen=True)
class Validity:
    """How well a score foretells what is left; None where it cannot be told (all scores, or all results, are the same).

    Attributes:
        tau: Kendall's tau-b between the scores (low: little is lost) and what is left (high: good): -1 foretells all.
        p: of a tau of zero, two-sided.
        anomalies: the share of patterns that end strictly better than the one with the lowest score.
        low: of the anomalies, the 2.5% quantile when patterns are drawn again.
        high: the 97.5% quantile.
        counterexamples: the share of pairs of which the one with the lower score ends worse.
    """

    tau: float | None
    p: float | None
    anomalies: float
    low: float
    high: float
    counterexamples: float


def validity(scores: Sequence[float], left: Sequence[float], seed: int = 0) -> Validity:
    """Compare scores of patterns with what is left of each; `seed` is that of the bootstrap."""
    score, end = numpy.asarray(scores, float), numpy.asarray(left, float)
    tau, p = kendall(score, end)
    pairs = list(zip(score, end, strict=True))
    low, high = interval(lambda drawn: anomaly_ratio(*numpy.array(drawn).T), (pairs, range(len(pairs))), seed=seed)
    wrong = (numpy.subtract.outer(score, score) < 0) & (numpy.subtract.outer(end, end) < 0)
    count = max(1, math.comb(len(score), 2))
    return Validity(tau, p, anomaly_ratio(score, end), low, high, float(wrong.sum()) / count)


def kendall(
    one: Sequence[float] | numpy.ndarray, other: Sequence[float] | numpy.ndarray
) -> tuple[float | None, float | None]:
    """Kendall's tau-b and its p-value."""
    from scipy.stats import kendalltau

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found: Any = kendalltau(one, other)
    tau, p = float(found.statistic), float(found.pvalue)
    return (None, None) if math.isnan(tau) else (tau, p)


def anomaly_ratio(score: numpy.ndarray, end: numpy.ndarray) -> float:
    """The share of patterns that end better than the one with the lowest score, the first where several have it."""
    return float((end > end[score.argmin()]).mean())


def ceiling(repeats: Sequence[Sequence[float]]) -> float | None:
    """How well what is left after some trainings foretells it after others: no score can be expected to do much better.

    Args:
        repeats: for each training, what was left of each pattern.

    Returns:
        Kendall's tau between two halves of the trainings, mean over all ways to halve them; None with one training.
    """
    ends = numpy.asarray(repeats, float)
    found = [kendall(ends[list(a)].mean(0), ends[list(b)].mean(0))[0] for a, b in _halves(len(ends))]
    known = [tau for tau in found if tau is not None]
    return statistics.fmean(known) if known else None


def _halves(count: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    for one in itertools.combinations(range(count), count // 2):
        if one:
            yield one, tuple(n for n in range(count) if n not in one)
