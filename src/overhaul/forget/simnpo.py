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

from typing import Annotated, Literal

from annotated_types import Ge, Gt
from torch import nn

from overhaul.data.examples import Examples
from overhaul.fit import Schedule
from overhaul.forget._losses import simnpo_term
from overhaul.forget._training import Training, unlearn
from overhaul.method import Outcome, method


@method(verb="forget", paper="2410.07163", changes="weights", memory="training")
def simnpo(
    model: nn.Module,
    forget: Examples,
    retain: Examples | None = None,
    *,
    beta: Annotated[float, Gt(0)] = 4.5,
    margin: Annotated[float, Ge(0)] = 0.0,
    per_token: bool = True,
    retain_term: Literal["gdr", "klr", "none"] = "gdr",
    retain_weight: Annotated[float, Gt(0)] = 8.0,
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
    term = simnpo_term("forget", beta, margin, per_token=per_token)
    return unlearn(
        "simnpo", model, forget, retain, term, training, retain_term=retain_term, retain_weight=retain_weight
    )
