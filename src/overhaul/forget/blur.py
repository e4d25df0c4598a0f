"""BLUR: forget first. Of the retain gradient only what does not undo forgetting is followed.

"BLUR: A Bi-Level Optimization Approach for LLM Unlearning", arXiv:2506.08164.

    d = gamma g_f + alpha ( g_r - (<g_r, g_f> / <g_f, g_f>) g_f )

g_f and g_r are the gradients of the forget and the retain loss over all weights as one vector. The penalty it is compared
with, g_f + alpha g_r, is `forget.npo`, `forget.simnpo` or `forget.grad_diff` with `retain_weight`.

How it differs from the released code:

1. Both of its forms are here: gamma of BLUR-NPO, alpha of BLUR-RMU.
2. "npo" is NPO, from log-likelihoods of the labels; the code for MUSE takes raw logits over the vocabulary.
3. The gradients are combined after accumulation and after they were added up over processes, and clipped after that. What
   the code steps along is never clipped: its MUSE part clips when no parameter has a gradient, its TOFU part clips the
   plain sum, which the combined gradient then replaces (and combines those of the last micro-batch alone), its WMDP part
   does not clip.
4. Where the forget gradient is nothing beside the retain gradient (a saturated NPO), nothing is projected out.

What AdamW breaks: that the forget loss falls by rate * gamma <g_f, g_f>, whatever the retain gradient, holds for a step
along d, `optimizer="sgd"`. AdamW divides d by its own running size, weight by weight, and what was orthogonal is so no
longer; the forget loss may rise. `metric="adam"` projects in the inner product of that very step. AdamW's running mean (a
tenth of each step is new) and weight decay stay outside.
"""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Gt
from torch import nn

from overhaul.data.examples import Examples
from overhaul.errors import RequestError
from overhaul.fit import adamw, sgd
from overhaul.fit.projection import Metric, bilevel
from overhaul.forget._training import Keeping, Training, unlearn
from overhaul.forget.gradient_ascent import ga_term
from overhaul.forget.npo import npo_term
from overhaul.forget.simnpo import simnpo_term
from overhaul.method import Outcome, method
from overhaul.objectives import Term

Lower = Literal["npo", "ga", "simnpo"]
BETA = {"npo": 0.1, "simnpo": 4.5}


@method(verb="forget", paper="2506.08164", changes="weights", memory="training")
def blur(
    model: nn.Module,
    forget: Examples,
    retain: Examples,
    *,
    loss: Lower = "npo",
    beta: Annotated[float, Gt(0)] | None = None,
    retain_term: Literal["gdr", "klr"] = "gdr",
    gamma: Annotated[float, Gt(0)] = 1.0,
    alpha: Annotated[float, Gt(0)] = 1.0,
    optimizer: Literal["adamw", "sgd"] = "adamw",
    metric: Metric = "euclidean",
    training: Training = Training(),
) -> Outcome:
    """Train a model away from `forget`, and towards `retain` only as far as that does not undo it.

    The defaults of rate and length are those of the authors' scripts for models from 1B on; a model of some millions of
    parameters wants a rate of 1e-4 to 1e-3 (with plain descent, ten times that).

    Args:
        model: a causal language model or an image classifier.
        forget: questions with the answers that are to be forgotten (or texts, or images of a class).
        retain: examples of what is to stay.
        loss: what forgets: "npo", "ga" (gradient ascent) or "simnpo".
        beta: inverse temperature of "npo" (0.1 if None) or "simnpo" (4.5 if None).
        retain_term: "gdr", cross-entropy on `retain`; "klr", KL from the model as it was.
        gamma: weight of the forget gradient.
        alpha: weight of what is left of the retain gradient.
        optimizer: "adamw", or "sgd", plain descent, for which the promise of the method holds.
        metric: in what inner product the retain gradient is made orthogonal: of the weights, or of AdamW's step ("adam").
        training: length, rate and limits.

    Returns:
        The model, with curves of both losses and of <g_f, g_f>, <g_f, g_r> and <g_r, g_r>.

    Raises:
        RequestError: `metric` and `optimizer` or `beta` and `loss` do not go together, `retain` is empty, or a role has no
            answers.
        RunError: the answers are beyond `stop_at` already, or training diverged (the last good weights are kept).
    """
    if metric == "adam" and optimizer != "adamw":
        raise RequestError(
            'forget.blur: metric="adam" is that of AdamW\'s step. Write optimizer: adamw, or metric: euclidean.'
        )
    make = adamw if optimizer == "adamw" else sgd
    return unlearn(
        "blur", model, forget, retain, _forget_term(loss, beta), training, keeping=Keeping(retain_term),
        combine=bilevel(gamma, alpha, metric), optimizer=make(weight_decay=training.weight_decay),
    )  # fmt: skip


def _forget_term(loss: Lower, beta: float | None) -> Term:
    if loss == "ga":
        if beta is not None:
            raise RequestError('forget.blur: loss="ga" has no temperature. Leave beta out, or write loss: npo.')
        return ga_term("forget")
    term = npo_term if loss == "npo" else simnpo_term
    return term("forget", BETA[loss] if beta is None else beta)
