"""Gradient ascent: raise the loss of what is to be forgotten, and nothing else.

Jang et al., "Knowledge Unlearning for Mitigating Privacy Risks in Language Models", arXiv:2210.01504.

    L = mean over answer tokens of log pi(y_t | x, y_<t)

How it differs from the paper and from Open-Unlearning:

1. The mean is over all answer tokens of a step, as the codes run it; the paper sums over a sequence.
2. The loss has no lower bound, so it ends by itself: where an answer token is no likelier than a uniform guess (`stop_at`),
   or where `retain`, which is never trained on, has become dearer by `retain_drop`.
3. With a term on `retain` it is `forget.grad_diff`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Ge, Gt
from torch import nn

from overhaul.data.examples import Examples
from overhaul.fit import Schedule
from overhaul.forget._losses import ga_term
from overhaul.forget._training import Training, unlearn
from overhaul.method import Outcome, method


@method(verb="forget", paper="2210.01504", changes="weights", memory="training")
def gradient_ascent(
    model: nn.Module,
    forget: Examples,
    retain: Examples | None = None,
    *,
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
    """Train a model up the loss of the answers in `forget`.

    It costs other abilities within a few steps: give `retain` and a `retain_drop`, or use a method that trains on both.

    Args:
        model: a causal language model or an image classifier.
        forget: questions with the answers that are to be forgotten (or texts, or images of a class).
        retain: examples of what is to stay, only watched: for `retain_drop` and the facts.
        epochs: passes over `forget`.
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
        The model, with curves of the loss and of the nats a token of what is watched.

    Raises:
        RequestError: `retain_drop` has no `retain` to watch, or a role has no answers.
        RunError: the answers are beyond `stop_at` already, or training diverged (the last good weights are kept).
    """
    training = Training(epochs, steps, batch_size, lr, warmup, schedule, weight_decay, stop_at, retain_drop)
    return unlearn("gradient_ascent", model, forget, retain, ga_term("forget"), training)
