"""SimNPO: negative preference optimisation without a reference, per token and with a margin.

Fan et al., "Simplicity Prevails: Rethinking Negative Preference Optimization for LLM Unlearning", arXiv:2410.07163.

    L = mean over answers of -(2/beta) log sigmoid( beta nll / |y| - margin )  +  retain_weight * L_retain

How it differs from the released code and from Open-Unlearning:

1. The margin stands beside beta, as in the paper; Open-Unlearning writes beta (nll / |y| - delta), so delta = margin / beta.
2. The forget term has weight 1; the codes' 0.125 of it beside 1 of the retain term is a `retain_weight` of 8, the default.
3. `per_token=False` is the form of arXiv:2510.16629, without 1 / |y|: long answers saturate the sigmoid and hardly move.
4. Training ends where an answer token of `forget` is no likelier than a uniform guess (`stop_at`).
"""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt
from jaxtyping import Int
from torch import Tensor, nn

from overhaul.data.examples import IGNORED, Batch, Examples
from overhaul.forget._training import Keeping, PerSequence, Training, per_sequence, unlearn
from overhaul.method import Outcome, method
from overhaul.objectives import Term


def simnpo_loss(
    nll: PerSequence, beta: float, tokens: Int[Tensor, " b"] | None = None, margin: float = 0.0
) -> PerSequence:
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


def simnpo_term(role: str, beta: float, margin: float = 0.0, *, per_token: bool = True) -> Term:
    """The mean of `simnpo_loss` over sequences; `per_token` is the original form."""

    def loss(nll: Tensor, batch: Batch) -> Tensor:
        # an example none of whose labels carries loss costs nothing, whatever it is divided by
        tokens = _lengths(batch).clamp(min=1) if per_token else None
        return simnpo_loss(nll, beta, tokens, margin)

    return per_sequence(role, loss, "SimNPO")


def _lengths(batch: Batch) -> Int[Tensor, " b"]:
    labels = batch["labels"]
    return torch.ones_like(labels) if labels.ndim == 1 else (labels[:, 1:] != IGNORED).sum(dim=1)


@method(verb="forget", paper="2410.07163", changes="weights", memory="training")
def simnpo(
    model: nn.Module,
    forget: Examples,
    retain: Examples | None = None,
    *,
    beta: Annotated[float, Gt(0)] = 4.5,
    margin: Annotated[float, Ge(0)] = 0.0,
    per_token: bool = True,
    keeping: Keeping = Keeping(retain_weight=8.0),
    training: Training = Training(),
) -> Outcome:
    """Train a model away from the answers in `forget`, by SimNPO.

    An answer is pushed less the less likely it already is, whatever it cost before. The defaults of rate and length are
    those of Open-Unlearning for models from 1B on; a model of some millions of parameters wants a rate of 1e-4 to 1e-3.

    Args:
        model: a causal language model or an image classifier.
        forget: questions with the answers that are to be forgotten (or texts, or images of a class).
        retain: examples of what is to stay; needed unless retain_term is "none".
        beta: inverse temperature: a large one stops pushing sooner.
        margin: gamma of the paper: nats (times beta) a token that an answer costs where it is pushed by half.
        per_token: whether an answer counts by its nats a token, or by all its nats.
        keeping: what is done with `retain`.
        training: length, rate and limits.

    Returns:
        The model, with curves of every term and of the forget answers' nats a token.

    Raises:
        RequestError: `retain` is missing although a retain term or limit is asked for, or a role has no answers.
        RunError: the answers are beyond `stop_at` already, or training diverged (the last good weights are kept).
    """
    term = simnpo_term("forget", beta, margin, per_token=per_token)
    return unlearn("simnpo", model, forget, retain, term, training, keeping=keeping)
