"""The forget losses GA, NPO, SimNPO and DPO, as pure functions of each sequence's negative log-likelihood.

Written pi and ref for model and reference, nll = -sum over answer tokens of log pi(y_t | x, y_<t). The label of an image is
an answer of one token.

1. Every function returns one value per sequence, [b]; a mean over the batch is taken after the sigmoid, never before it
   (older forks of Open-Unlearning took one ratio per batch).
2. nll is that of the labels. The reference code of MUSE subtracts raw logits over the whole vocabulary, which is another
   objective; results copied from it do not compare.
3. `simnpo` has both forms: the original, per token with a margin, and the one of arXiv:2510.16629, summed and without.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from overhaul.data.examples import IGNORED, Batch
from overhaul.objectives import Term, cross_entropy_sum, pair_nll, sequence_nll, sequences, units

PerSequence = Float[Tensor, " b"]


def gradient_ascent(nll: PerSequence) -> PerSequence:
    """GA: log pi(y|x), to be minimised (Jang et al., arXiv:2210.01504). Unbounded below."""
    return -nll


def npo(nll: PerSequence, reference: PerSequence, beta: float) -> PerSequence:
    """NPO: -(2/beta) log sigmoid(-beta log(pi/ref)) (Zhang et al., arXiv:2404.05868).

    Its gradient is that of GA times 2 pi^beta / (pi^beta + ref^beta): 1 at the start, 0 once y is forgotten.

    Args:
        nll: of each whole answer under the model, in nats.
        reference: the same under the model before unlearning.
        beta: inverse temperature, > 0; towards 0 the loss becomes GA (plus a constant).
    """
    return -(2.0 / beta) * F.logsigmoid(beta * (nll - reference))


def simnpo(nll: PerSequence, beta: float, tokens: Int[Tensor, " b"] | None = None, margin: float = 0.0) -> PerSequence:
    """SimNPO: -(2/beta) log sigmoid(beta nll / |y| - margin) (Fan et al., arXiv:2410.07163): no reference.

    Args:
        nll: of each whole answer under the model, in nats.
        beta: inverse temperature, > 0.
        tokens: |y|, the length of each answer; None for the summed form of arXiv:2510.16629, in which long answers
            saturate the sigmoid at once and hardly move.
        margin: gamma >= 0 of the original.
    """
    per_token = nll if tokens is None else nll / tokens
    return -(2.0 / beta) * F.logsigmoid(beta * per_token - margin)


def dpo(
    nll: PerSequence, reference: PerSequence, refusal: PerSequence, refusal_reference: PerSequence, beta: float
) -> PerSequence:
    """DPO against a refusal: -(2/beta) log sigmoid(beta (log pi/ref (refusal) - log pi/ref (y))) (arXiv:2401.06121).

    Its gradient starts as that of GA on y plus that of descent on the refusal, and goes to 0 once the refusal is preferred.

    Args:
        nll: of each whole answer that is to be forgotten under the model, in nats.
        reference: the same under the model before unlearning.
        refusal: of each refusal of the same question under the model.
        refusal_reference: the same under the model before unlearning.
        beta: inverse temperature, > 0.
    """
    return -(2.0 / beta) * F.logsigmoid(beta * ((refusal_reference - refusal) - (reference - nll)))


def ga_term(role: str) -> Term:
    """GA as its codes run it: the mean over all answer tokens of a step, so that long answers weigh more."""
    return Term(role, lambda logits, batch: -cross_entropy_sum(logits, batch), units, name="GA")


def npo_term(role: str, beta: float) -> Term:
    """The mean of `npo` over sequences; the examples carry `reference_nll`."""

    def loss(nll: Tensor, batch: Batch) -> Tensor:
        return npo(nll, batch["reference_nll"], beta)

    return _per_sequence(role, loss, "NPO")


def simnpo_term(role: str, beta: float, margin: float = 0.0, *, per_token: bool = True) -> Term:
    """The mean of `simnpo` over sequences; `per_token` is the original form."""

    def loss(nll: Tensor, batch: Batch) -> Tensor:
        # an example none of whose labels carries loss costs nothing, whatever it is divided by
        tokens = _lengths(batch).clamp(min=1) if per_token else None
        return simnpo(nll, beta, tokens, margin)

    return _per_sequence(role, loss, "SimNPO")


def dpo_term(role: str, beta: float) -> Term:
    """The mean of `dpo` over pairs, which carry `other_*` (the refusal), `reference_nll` and `other_reference_nll`."""

    def summed(logits: Tensor, batch: Batch) -> Tensor:
        nll, refusal = pair_nll(logits, batch)
        return dpo(nll, batch["reference_nll"], refusal, batch["other_reference_nll"], beta).sum()

    return Term(role, summed, sequences, name="DPO", answers_only=True)


def _lengths(batch: Batch) -> Int[Tensor, " b"]:
    labels = batch["labels"]
    return torch.ones_like(labels) if labels.ndim == 1 else (labels[:, 1:] != IGNORED).sum(dim=1)


def _per_sequence(role: str, loss: Callable[[Tensor, Batch], Tensor], name: str) -> Term:
    def summed(logits: Tensor, batch: Batch) -> Tensor:
        return torch.sum(loss(sequence_nll(logits, batch["labels"]), batch))

    return Term(role, summed, sequences, name=name, answers_only=True)
