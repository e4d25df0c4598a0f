"""Negative preference optimisation: make chosen answers unlikely, and stop pushing once they are.

Zhang, Lin, Bai and Mei, COLM 2024, arXiv:2404.05868; exact forms as in arXiv:2510.16629.

    L = mean over answers of -(2/beta) log sigmoid( beta (nll - nll_ref) )  +  retain_weight * L_retain

How it differs from the released code and from Open-Unlearning:

1. The reference is run once before training and its log-likelihoods are cached; no second model is held.
2. `klr` is KL(reference || model) at the answer tokens of `retain`, from probabilities (MUSE's code takes raw logits).
3. Training ends where an answer token of `forget` is no likelier than a uniform guess (`stop_at`): what lies beyond is
   not forgetting but a mark that a membership attack can see.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Literal

from annotated_types import Ge, Gt
from torch import Tensor, nn

from overhaul.data.examples import Batch, Examples
from overhaul.errors import RequestError, RunError
from overhaul.fit import Ledger, Schedule, fit
from overhaul.forget._losses import npo_term
from overhaul.method import Outcome, method
from overhaul.objectives import Term, answer_tokens, cross_entropy, cross_entropy_sum
from overhaul.references import cache_outputs, reference_nll

ANSWER_NLL = "forget nll per token"


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
) -> Outcome:
    """Train a language model away from the answers in `forget`, by NPO.

    The defaults of rate and length are those of Open-Unlearning for models from 1B on; a model of some millions of
    parameters wants a rate of 1e-4 to 1e-3.

    Args:
        model: a causal language model.
        forget: questions with the answers that are to be forgotten (or texts).
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

    Returns:
        The model, with curves of every term and of the forget answers' nats a token.

    Raises:
        RequestError: `retain` is missing although a retain term is asked for, or the examples are images or empty.
        RunError: the answers are beyond `stop_at` already, or training diverged (the last good weights are kept).
    """
    _check(forget, retain, retain_term)
    tokens = sum(answer_tokens(batch) for batch in forget.batches(64))
    limit = math.log(_vocabulary(model)) if stop_at == "chance" else stop_at
    per_epoch = math.ceil(len(forget) / batch_size)
    total = steps or math.ceil(epochs * per_epoch)
    known = reference_nll(model, forget, batch_size)
    before = float(known.sum()) / tokens
    if limit is not None and before >= limit:
        raise RunError(
            f"forget.npo: the answers in `forget` already cost {before:.2f} nats a token, above stop_at = {limit:.2f}: "
            "the model does not know them. Check that the questions are put as in training, or write stop_at: null."
        )
    data = {"forget": forget.with_column("reference_nll", known)}
    terms = [npo_term("forget", beta), Term("forget", _watched, answer_tokens, 0.0, ANSWER_NLL)]
    if retain is not None and retain_term == "gdr":
        data["retain"] = retain
        terms.append(cross_entropy("retain", retain_weight, "retain"))
    elif retain is not None and retain_term == "klr":
        reference = cache_outputs(model, retain, batch_size)
        data["retain"] = reference.examples
        terms.append(reference.kl_term("retain", retain_weight, "retain"))
    ledger = fit(
        model,
        terms,
        data,
        steps=total,
        batch_size=batch_size,
        lr=lr,
        warmup=round(warmup * total) if warmup < 1 else int(warmup),
        schedule=schedule,
        weight_decay=weight_decay,
        should_stop=None if limit is None else _stop_rule(limit, per_epoch),
        name="npo",
    )
    facts: dict[str, float | int | str | list[int]] = {
        "steps": ledger.step,
        "stopped_early": "yes" if ledger.step < total else "no",
        "forget_nll_before": before,
        "forget_nll_after": float(reference_nll(model, forget, batch_size).sum()) / tokens,
    }
    return Outcome(model, facts=facts, curves=ledger.curves)


def _watched(logits: Tensor, batch: Batch) -> Tensor:
    return cross_entropy_sum(logits.detach(), batch)


def _check(forget: Examples, retain: Examples | None, retain_term: str) -> None:
    if forget.is_image:
        raise RequestError("forget.npo needs answers of a language model; these are images. Use forget.ssd.")
    if not any(answer_tokens(batch) for batch in forget.batches(64)):
        raise RequestError("forget.npo: the role `forget` has no answer to forget: no label carries loss.")
    if retain_term != "none" and not retain:
        raise RequestError(
            f"forget.npo: retain_term={retain_term!r} needs examples of what is to stay, but the role `retain` is missing "
            'or empty. Give it, or write retain_term: "none" to train on `forget` alone (which costs other abilities).'
        )


def _stop_rule(limit: float, per_epoch: int) -> Callable[[Ledger], bool]:
    """Whether the mean over the last epoch's steps has passed the limit: one batch alone would be chance."""

    def passed(ledger: Ledger) -> bool:
        recent = ledger.curves[ANSWER_NLL][-per_epoch:]
        return sum(recent) / len(recent) >= limit

    return passed


def _vocabulary(model: nn.Module) -> int:
    find = getattr(model, "get_output_embeddings", None)
    head = find() if find is not None else None
    if head is None:
        raise RequestError(
            'forget.npo: this model names no output head, so stop_at="chance" is unknown; give a number.'
        )
    return head.weight.shape[0]
