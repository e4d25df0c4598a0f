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

from torch import nn

from overhaul.data.examples import Examples
from overhaul.forget._training import Keeping, Training, unlearn
from overhaul.forget.gradient_ascent import ga_term
from overhaul.method import Outcome, method


@method(verb="forget", paper="2401.06121", changes="weights", memory="training")
def grad_diff(
    model: nn.Module,
    forget: Examples,
    retain: Examples,
    *,
    keeping: Keeping = Keeping(),
    training: Training = Training(),
) -> Outcome:
    """Train a model up the loss of the answers in `forget` and down that of `retain`.

    The defaults of rate and length are those of Open-Unlearning for models from 1B on; a model of some millions of
    parameters wants a rate of 1e-4 to 1e-3.

    Args:
        model: a causal language model or an image classifier.
        forget: questions with the answers that are to be forgotten (or texts, or images of a class).
        retain: examples of what is to stay.
        keeping: what is done with `retain`.
        training: length, rate and limits.

    Returns:
        The model, with curves of every term and of the forget answers' nats a token.

    Raises:
        RequestError: `retain` is empty, or a role has no answers.
        RunError: the answers are beyond `stop_at` already, or training diverged (the last good weights are kept).
    """
    return unlearn(
        "grad_diff", model, forget, retain, ga_term("forget"), training,
        keeping=keeping,
    )  # fmt: skip
