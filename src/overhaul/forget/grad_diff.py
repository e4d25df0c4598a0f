"""Gradient difference: up the loss of what is to be forgotten, down that of what is to stay, in one step.

Liu, Liu and Stone, "Continual Learning and Private Unlearning", arXiv:2203.12817; for language models arXiv:2401.06121.

    L = mean over answer tokens of log pi(y_t | x, y_<t)  +  retain_weight * L_retain

How it differs from the code of TOFU and from Open-Unlearning:

1. There is one weight, of the retain term; AdamW's steps do not depend on a common factor.
2. `klr` is KL(reference || model) at the answer tokens of `retain`, from cached outputs; the codes hold a second model, and
   count prompts and padding too.
3. The forget term has no lower bound. Training ends where an answer token is no likelier than a uniform guess (`stop_at`).
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


@method(verb="forget", paper="2401.06121", changes="weights", memory="training")
def grad_diff(
    model: nn.Module,
    forget: Examples,
    retain: Examples,
    *,
    retain_term: Literal["gdr", "klr"] = "gdr",
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
    """Train a model up the loss of the answers in `forget` and down that of `retain`.

    The defaults of rate and length are those of Open-Unlearning for models from 1B on; a model of some millions of
    parameters wants a rate of 1e-4 to 1e-3.

    Args:
        model: a causal language model or an image classifier.
        forget: questions with the answers that are to be forgotten (or texts, or images of a class).
        retain: examples of what is to stay.
        retain_term: "gdr", cross-entropy on `retain`; "klr", KL from the model as it was.
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
        RequestError: `retain` is empty, or a role has no answers.
        RunError: the answers are beyond `stop_at` already, or training diverged (the last good weights are kept).
    """
    training = Training(epochs, steps, batch_size, lr, warmup, schedule, weight_decay, stop_at, retain_drop)
    return unlearn(
        "grad_diff", model, forget, retain, ga_term("forget"), training,
        retain_term=retain_term, retain_weight=retain_weight,
    )  # fmt: skip
