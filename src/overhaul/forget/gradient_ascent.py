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

from torch import nn

from overhaul.data.examples import Examples
from overhaul.forget._training import Training, unlearn
from overhaul.method import Outcome, method
from overhaul.objectives import Term, cross_entropy_sum, units


def ga_term(role: str) -> Term:
    """GA as its codes run it: the mean over all answer tokens of a step, so that long answers weigh more."""
    return Term(role, lambda logits, batch: -cross_entropy_sum(logits, batch), units, name="GA", answers_only=True)


@method(verb="forget", paper="2210.01504", changes="weights", memory="training")
def gradient_ascent(
    model: nn.Module,
    forget: Examples,
    retain: Examples | None = None,
    *,
    training: Training = Training(),
) -> Outcome:
    """Train a model up the loss of the answers in `forget`.

    It costs other abilities within a few steps: give `retain` and a `retain_drop`, or use a method that trains on both.

    Args:
        model: a causal language model or an image classifier.
        forget: questions with the answers that are to be forgotten (or texts, or images of a class).
        retain: examples of what is to stay, only watched: for `retain_drop` and the facts.
        training: length, rate and limits.

    Returns:
        The model, with curves of the loss and of the nats a token of what is watched.

    Raises:
        RequestError: `retain_drop` has no `retain` to watch, or a role has no answers.
        RunError: the answers are beyond `stop_at` already, or training diverged (the last good weights are kept).
    """
    return unlearn("gradient_ascent", model, forget, retain, ga_term("forget"), training)
