"""Membership attacks that know other models: LiRA and RMIA, on confidences that were computed before.

LiRA (Carlini et al., arXiv:2112.03570) asks of which of two populations of shadow models a confidence comes; RMIA
(Zarifzadeh, Liu and Shokri, arXiv:2312.03262) asks how often a sample gains more from the model than strangers do.

    LiRA online   log N(phi; mu_in, s_in^2) - log N(phi; mu_out, s_out^2)          phi = log( p_y / (1 - p_y) )
    LiRA offline  Pr[ Z <= phi ],  Z ~ N(mu_out, s_out^2)
    RMIA          Pr_z[ (p(x|theta) / p(x)) / (p(z|theta) / p(z)) >= gamma ]

Nothing is trained here: the input is a matrix [models, samples] of confidences and one of who was trained on what. For
unlearning (U-LiRA, arXiv:2403.01218) "inside" are models that were trained on the sample and then *unlearned* it by the
method on trial, "outside" those that never saw it. That is the strong test: an attack built on models that merely learnt
the sample looks for the wrong thing, and passes a method that leaves a mark of its own.

How it differs from the papers and their codes:

1. Offline LiRA returns -log Pr[Z > phi], which orders as Pr[Z <= phi] does and does not run into 1 for clear members.
2. A sample's variance is that of its own models ("sample") or one for all samples ("shared", of centred confidences); the
   released code takes the shared one below 64 models. Neither falls below 1e-12.
3. RMIA works with logarithms, so that long answers do not underflow. Online, p(x) is the mean over all references, be they
   inside or outside, as in the paper, which trains as many of either; p(z) is the mean over the same.
4. An AUC near 1/2 bounds this attack and no other: absence is not proved.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from overhaul.errors import RequestError
from overhaul.judge.likelihood import auc, tpr_at_fpr

LEAST_VARIANCE = 1e-12
Attack = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(confidences [samples] of the model under attack, of the shadow models [models, samples], who holds what) -> scores."""


def phi(logits: Float[Tensor, "n c"], labels: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Log-odds of the true class, log p_y - log sum over j != y of p_j, in float64: exact also where p_y is almost 1."""
    logits = logits.double()
    right = logits.gather(1, labels[:, None])[:, 0]
    others = logits.scatter(1, labels[:, None], -torch.inf).logsumexp(dim=1)
    return right - others


def phi_of_logp(logp: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """Log-odds where only log p is known, as of a whole answer; float64. Better from logits where p is close to 1.

    A log p that rounding has brought to 0 counts as the largest float64 below it.
    """
    logp = logp.double().clamp(max=-torch.finfo(torch.float64).tiny)
    return logp - torch.log(-torch.expm1(logp))


def lira_online(
    target: Float[Tensor, " n"],
    shadows: Float[Tensor, "m n"],
    inside: Bool[Tensor, "m n"],
    *,
    variance: Literal["sample", "shared"] = "sample",
) -> Float[Tensor, " n"]:
    """LiRA's likelihood ratio: high for members.

    Args:
        target: phi of n samples under the model on trial.
        shadows: phi of the same samples under m other models.
        inside: which of those models held which sample (for U-LiRA: held it and unlearned it).
        variance: per sample, or one of all samples where models are few (below 64).

    Raises:
        RequestError: shapes do not fit, or a sample has fewer than two models on a side.
    """
    _check(target, shadows, inside)
    within = _normal(shadows, inside, "inside", variance)
    without = _normal(shadows, ~inside, "outside", variance)
    return within.log_density(target) - without.log_density(target)


def lira_offline(
    target: Float[Tensor, " n"],
    shadows: Float[Tensor, "m n"],
    inside: Bool[Tensor, "m n"],
    *,
    variance: Literal["sample", "shared"] = "sample",
) -> Float[Tensor, " n"]:
    """LiRA with models that never held the sample alone: -log Pr[Z > phi], high for members.

    Args:
        target: phi of n samples under the model on trial.
        shadows: phi of the same samples under m other models.
        inside: which of those models held which sample; those are not looked at.
        variance: per sample, or one of all samples where models are few (below 64).

    Raises:
        RequestError: shapes do not fit, or a sample has fewer than two models outside.
    """
    _check(target, shadows, inside)
    without = _normal(shadows, ~inside, "outside", variance)
    return -torch.special.log_ndtr((without.mean - target.double()) / without.deviation)


def rmia(
    target: Float[Tensor, " n"],
    shadows: Float[Tensor, "m n"],
    population: Float[Tensor, " z"],
    population_shadows: Float[Tensor, "m z"],
    *,
    inside: Bool[Tensor, "m n"] | None = None,
    gamma: float = 1.0,
    offline: float | None = None,
) -> Float[Tensor, " n"]:
    """RMIA: the share of strangers that the sample beats by `gamma`; between 0 and 1, high for members.

    Args:
        target: log p(x|theta) of n samples under the model on trial.
        shadows: the same under m reference models, one or two are enough.
        population: log p(z|theta) of z samples that are known to be no members.
        population_shadows: the same under the reference models.
        inside: which reference models held which sample; none, if not given.
        gamma: how many times a stranger's gain the sample's must be; 0 is passed by all, 1 to 2 are usual.
        offline: a of p(x) = ((1 + a) p_out(x) + 1 - a) / 2, for references that never held the samples; between 0 and 1.
            Without it p(x) is the mean over all references.

    Raises:
        RequestError: shapes do not fit, a sample has no reference model outside, gamma or offline is out of range.
    """
    inside = torch.zeros_like(shadows, dtype=torch.bool) if inside is None else inside
    _check(target, shadows, inside)
    nobody = torch.zeros_like(population_shadows, dtype=torch.bool)
    _check(population, population_shadows, nobody)
    if gamma < 0 or (offline is not None and not 0 <= offline <= 1):
        raise RequestError(f"RMIA needs gamma >= 0 and 0 <= offline <= 1; these are {gamma} and {offline}.")
    if bool(inside.all(dim=0).any()):
        raise RequestError("RMIA needs, for every sample, a reference model that was not trained on it.")
    gains = target.double() - _prior(shadows, inside, offline)
    strangers = population.double() - _prior(population_shadows, nobody, offline)
    level = math.log(gamma) if gamma > 0 else -math.inf
    return (gains[:, None] - strangers[None, :] >= level).double().mean(dim=1)


@dataclass(frozen=True)
class Audit:
    """An attack that every model of a pool suffered in turn, the others being its shadows.

    Attributes:
        scores: [models, samples], high for members; float64.
        auc: of each model: members against the others, pooled over samples.
        tpr: false-positive rate -> each model's true-positive rate there.
    """

    scores: Float[Tensor, "m n"]
    auc: list[float]
    tpr: dict[float, list[float]]


def audit(
    confidence: Float[Tensor, "m n"],
    inside: Bool[Tensor, "m n"],
    attack: Attack = lira_online,
    rates: tuple[float, ...] = (0.001, 0.01),
) -> Audit:
    """Let each model of a pool be attacked with all others as shadows.

    Args:
        confidence: of m models on n samples: phi for LiRA.
        inside: who was trained on what; for U-LiRA, who was trained on it and unlearned it.
        attack: (target [n], shadows [m - 1, n], inside [m - 1, n]) -> scores [n].
        rates: the false-positive rates at which the share of members found is reported.

    Raises:
        RequestError: shapes do not fit, or a model has only members or none.
    """
    _check(confidence[0], confidence, inside)
    if bool((inside.all(dim=1) | ~inside.any(dim=1)).any()):
        raise RequestError("Every model of an audit must hold some of the samples and lack others.")
    scores: list[Tensor] = []
    areas: list[float] = []
    found: dict[float, list[float]] = {rate: [] for rate in rates}
    for i in range(len(confidence)):
        rest = [j for j in range(len(confidence)) if j != i]
        one = attack(confidence[i], confidence[rest], inside[rest])
        members, others = one[inside[i]].tolist(), one[~inside[i]].tolist()
        scores.append(one)
        areas.append(auc(members, others))
        for rate in rates:
            found[rate].append(tpr_at_fpr(members, others, rate))
    return Audit(torch.stack(scores), areas, found)


@dataclass(frozen=True)
class _Normal:
    """One normal distribution for each sample."""

    mean: Tensor
    deviation: Tensor

    def log_density(self, values: Tensor) -> Tensor:
        """Log of the density, without the constant that both sides of a ratio share."""
        return -0.5 * ((values.double() - self.mean) / self.deviation) ** 2 - self.deviation.log()


def _normal(shadows: Tensor, chosen: Tensor, side: str, variance: Literal["sample", "shared"]) -> _Normal:
    """Mean and deviation over the chosen models of each sample."""
    count = chosen.sum(dim=0)
    if int(count.min()) < 2:
        place = int(count.argmin())
        raise RequestError(
            f"LiRA needs two shadow models {side} for every sample; sample {place} has {int(count[place])}. Train more "
            "shadow models, each on a random half of the samples."
        )
    values = shadows.double().masked_fill(~chosen, 0.0)
    mean = values.sum(dim=0) / count
    squares = ((values - mean) ** 2).masked_fill(~chosen, 0.0).sum(dim=0)
    spread = squares / count if variance == "sample" else (squares.sum() / count.sum()).expand_as(mean)
    return _Normal(mean, spread.clamp(min=LEAST_VARIANCE).sqrt())


def _prior(shadows: Tensor, inside: Tensor, offline: float | None) -> Tensor:
    """The logarithm of p(x), from reference models."""
    if offline is None:
        return _log_mean(shadows, torch.ones_like(inside))
    without = _log_mean(shadows, ~inside)
    constant = torch.full_like(without, math.log((1.0 - offline) / 2) if offline < 1 else -math.inf)
    return torch.logaddexp(without + math.log((1.0 + offline) / 2), constant)


def _log_mean(logp: Tensor, chosen: Tensor) -> Tensor:
    return logp.double().masked_fill(~chosen, -torch.inf).logsumexp(dim=0) - chosen.sum(dim=0).double().log()


def _check(target: Tensor, shadows: Tensor, inside: Tensor) -> None:
    if shadows.shape != inside.shape or shadows.ndim != 2 or target.shape != shadows.shape[1:] or not len(shadows):
        raise RequestError(
            f"The target's confidences have the shape {tuple(target.shape)}, the shadow models' {tuple(shadows.shape)}, the "
            f"mask {tuple(inside.shape)}; they must be [samples], [models, samples] and [models, samples]."
        )
    if not (bool(target.isfinite().all()) and bool(shadows.isfinite().all())):
        raise RequestError("A confidence is not finite; compute phi from logits, which never is infinite.")
