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

from typing import Annotated, Literal

from annotated_types import Ge, Gt
from torch import nn

from overhaul.data.examples import Examples
from overhaul.fit import Schedule
from overhaul.forget._losses import npo_term
from overhaul.forget._training import Training, unlearn
from overhaul.method import Outcome, method


@method(verb="forget", paper="2404.05868", changes="weights", memory="training")
def npo(
    model: nn.Module,
    forget: Examples,
    retain: Examples | None = None,
    *,
    beta: Annotated[float, Gt(0)] = 0.1,
    retain_term: Literal["gdr", "klr", "none"] = "gdr",
    retain_weight: Annotated[float, Gt(0)] = 1.0,
    epochs: Annotated[float, Gt(0)] = 10.0,
    steps: Annotated[int, Gt(0)] | None = None,
    batch_size: Annotated[int, Ge(1)] = 32,
    lr: Annotated[float, Gt(0)] = 1e-5,
    warmup: Annotated[float, Ge(0)] = 0.1,
    schedule: Schedule = "linear",
    weight_decay: Annotated[float, Ge(0)] = 0.0,
    stop_at: Annotated[float, Gt(0)] | Literal["chance"] | None = "chance",
    retain_drop: Annotated[float, Gt(0)] | None = None,
) -> Outcome:
    """Train a model away from the answers in `forget`, by NPO.

    The defaults of rate and length are those of Open-Unlearning for models from 1B on; a model of some millions of
    parameters wants a rate of 1e-4 to 1e-3.

    Args:
        model: a causal language model or an image classifier.
        forget: questions with the answers that are to be forgotten (or texts, or images of a class).
        retain: examples of what is to stay; needed unless retain_term is "none".
        beta: inverse temperature; towards 0 it becomes gradient ascent, and a large one stops pushing sooner.
        retain_term: "gdr", cross-entropy on `retain`; "klr", KL from the model as it was; "none", forget only.
        retain_weight: weight of the retain term beside the forget term.
        epochs: passes over `forget`; as many examples of `retain` are drawn in each.
        steps: optimizer steps instead of epochs.
        batch_size: examples of each role in one step.
        lr: peak learning rate of AdamW.
        warmup: steps of linear warm-up, as a share of all steps (below 1) or as a number of steps.
        schedule: what follows the warm-up.
        weight_decay: of matrices.
        stop_at: end early once the answers of `forget` cost this many nats a token (mean over the last epoch);
            "chance" is log(vocabulary), None never.
        retain_drop: end early once the answers of `retain` cost this many nats a token more than before (mean over the
            last epoch); None never.

    Returns:
        The model, with curves of every term and of the forget answers' nats a token.

    Raises:
        RequestError: `retain` is missing although a retain term or limit is asked for, or a role has no answers.
        RunError: the answers are beyond `stop_at` already, or training diverged (the last good weights are kept).
    """
    training = Training(epochs, steps, batch_size, lr, warmup, schedule, weight_decay, stop_at, retain_drop)
    term = npo_term("forget", beta)
    return unlearn("npo", model, forget, retain, term, training, retain_term=retain_term, retain_weight=retain_weight)
