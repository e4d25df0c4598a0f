"""Negative preference optimisation: make chosen answers unlikely, and stop pushing once they are.

Zhang, Lin, Bai and Mei, COLM 2024, arXiv:2404.05868; exact forms as in arXiv:2510.16629.

    L = mean over answers of -(2/beta) log sigmoid( beta (nll - nll_ref) )  +  retain_weight * L_retain

How it differs from the released code and from Open-Unlearning:

1. The reference is run once before training and its log-likelihoods are cached; no second model is held.
2. `klr` is KL(reference || model) at the answer tokens of `retain`, from probabilities (MUSE's code takes raw logits).
3. Training ends where an answer token of `forget` is no likelier than a uniform guess (`stop_at`): what lies beyond is
   not forgetting but a mark that a membership attack can see.
4. Images may be forgotten too: a label is an answer of one token.
"""

from __future__ import annotations

from typing import Annotated

import torch.nn.functional as F
from annotated_types import Gt
from torch import Tensor, nn

from overhaul.data.examples import Batch, Examples
from overhaul.forget._training import Keeping, PerSequence, Training, per_sequence, unlearn
from overhaul.method import Outcome, method
from overhaul.objectives import Term


def npo_loss(nll: PerSequence, reference: PerSequence, beta: float) -> PerSequence:
    """NPO: -(2/beta) log sigmoid(-beta log(pi/ref)) (Zhang et al., arXiv:2404.05868).

    Its gradient is that of GA times 2 pi^beta / (pi^beta + ref^beta): 1 at the start, 0 once y is forgotten.

    Args:
        nll: of each whole answer under the model, in nats.
        reference: the same under the model before unlearning.
        beta: inverse temperature, > 0; towards 0 the loss becomes GA (plus a constant).
    """
    return -(2.0 / beta) * F.logsigmoid(beta * (nll - reference))


def npo_term(role: str, beta: float) -> Term:
    """The mean of `npo_loss` over sequences; the examples carry `reference_nll`."""

    def loss(nll: Tensor, batch: Batch) -> Tensor:
        return npo_loss(nll, batch["reference_nll"], beta)

    return per_sequence(role, loss, "NPO")


@method(verb="forget", paper="2404.05868", changes="weights", memory="training")
def npo(
    model: nn.Module,
    forget: Examples,
    retain: Examples | None = None,
    *,
    beta: Annotated[float, Gt(0)] = 0.1,
    keeping: Keeping = Keeping(),
    training: Training = Training(),
) -> Outcome:
    """Train a model away from the answers in `forget`, by NPO.

    The defaults of rate and length are those of Open-Unlearning for models from 1B on; a model of some millions of
    parameters wants a rate of 1e-4 to 1e-3.

    Args:
        model: a causal language model or an image classifier.
        forget: questions with the answers that are to be forgotten (or texts, or images of a class).
        retain: examples of what is to stay; needed unless retain_term is "none".
        beta: inverse temperature; towards 0 it becomes gradient ascent, and a large one stops pushing sooner.
        keeping: what is done with `retain`.
        training: length, rate and limits.

    Returns:
        The model, with curves of every term and of the forget answers' nats a token.

    Raises:
        RequestError: `retain` is missing although a retain term or limit is asked for, or a role has no answers.
        RunError: the answers are beyond `stop_at` already, or training diverged (the last good weights are kept).
    """
    term = npo_term("forget", beta)
    return unlearn("npo", model, forget, retain, term, training, keeping=keeping)
