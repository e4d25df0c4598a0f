"""What the methods that train a forget loss share: checks, the reference, what is retained, when to stop, what is said.

1. The reference is the model as it is given, run once; its log-likelihoods and outputs are cached. No second model is held.
2. `klr` is KL(reference || model) at the answer tokens of `retain`, from probabilities (MUSE's code takes raw logits,
   Open-Unlearning's counts prompts and padding).
3. Training ends where an answer token of `forget` is no likelier than a uniform guess (`stop_at`): what lies beyond is
   not forgetting but a mark that a membership attack can see. It also ends where the answers of `retain` have become dearer
   by `retain_drop`. Both are means over the last epoch: one batch alone would be chance.
4. What `retain` costs before and after is measured on at most 256 of its examples, spread evenly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt, Le
from jaxtyping import Float
from torch import Tensor, nn

from overhaul import fit
from overhaul.data.examples import Batch, Examples
from overhaul.errors import RequestError, RunError
from overhaul.fit import Combine, Draw, Ledger, OptimizerFactory, Schedule, adamw
from overhaul.method import Outcome
from overhaul.objectives import (
    Term,
    check_labelled,
    check_positions,
    cross_entropy,
    cross_entropy_sum,
    evaluate,
    sequence_nll,
    sequences,
    units,
)
from overhaul.references import cache_outputs, reference_nll

ANSWER_NLL = "forget nll per token"
RETAIN_NLL = "retain nll per token"
SAMPLE = 256

RetainTerm = Literal["gdr", "klr", "none"]
PerSequence = Float[Tensor, " b"]


@dataclass(frozen=True)
class Training:
    """How long, how fast and until when; the knobs that all these methods have.

    Attributes:
        epochs: passes over `forget`; as many examples of `retain` are drawn in each.
        steps: optimizer steps instead of epochs.
        batch_size: examples of each role in one step.
        lr: peak learning rate.
        warmup: steps of linear warm-up, as a share of all steps (below 1) or as a number of steps.
        schedule: what follows the warm-up.
        weight_decay: of matrices.
        stop_at: end early once the answers of `forget` cost this many nats a token (mean over the last epoch); "chance" is
            log(vocabulary), None never.
        retain_drop: end early once the answers of `retain` cost this many nats a token more than before (mean over the last
            epoch); None never.
    """

    epochs: Annotated[float, Gt(0)] = 10.0
    steps: Annotated[int, Gt(0)] | None = None
    batch_size: Annotated[int, Ge(1), Le(2**24)] = 32
    lr: Annotated[float, Gt(0)] = 1e-5
    warmup: Annotated[float, Ge(0)] = 0.1
    schedule: Schedule = "linear"
    weight_decay: Annotated[float, Ge(0)] = 0.0
    stop_at: Annotated[float, Gt(0)] | Literal["chance"] | None = "chance"
    retain_drop: Annotated[float, Gt(0)] | None = None


@dataclass(frozen=True)
class Keeping:
    """What is done with the role `retain`.

    Attributes:
        retain_term: "gdr", cross-entropy on `retain`; "klr", KL from the model as it was; "none", forget only.
        retain_weight: weight of the retain term beside the forget term.
    """

    retain_term: RetainTerm = "gdr"
    retain_weight: Annotated[float, Gt(0)] = 1.0


def per_sequence(role: str, loss: Callable[[Tensor, Batch], Tensor], name: str) -> Term:
    """The mean over sequences of a loss of each sequence's negative log-likelihood, (nll [b], batch) -> [b].

    nll is -sum over answer tokens of log pi(y_t | x, y_<t); the label of an image is an answer of one token. A mean over the
    batch is taken after whatever `loss` does, never before (older forks of Open-Unlearning took one ratio per batch).
    """

    def summed(logits: Tensor, batch: Batch) -> Tensor:
        return torch.sum(loss(sequence_nll(logits, batch["labels"]), batch))

    return Term(role, summed, sequences, name=name, answers_only=True)


def unlearn(
    name: str,
    model: nn.Module,
    forget: Examples,
    retain: Examples | None,
    term: Term,
    training: Training,
    *,
    keeping: Keeping = Keeping("none"),
    columns: Mapping[str, Tensor] | None = None,
    combine: Combine | None = None,
    optimizer: OptimizerFactory | None = None,
    trainable: Callable[[str], bool] | None = None,
) -> Outcome:
    """Train the model on a forget term, beside a retain term where one is asked for.

    Args:
        name: of the method, for errors and progress.
        model: changed in place.
        forget: what is to go; the term finds the column `reference_nll` in it, nats of each answer before training.
        retain: what is to stay.
        term: on the role "forget".
        training: length, rate and limits.
        keeping: what is done with `retain`.
        columns: what else the forget term reads, a value for each example.
        combine: see `Step.backward`.
        optimizer: AdamW if not given.
        trainable: which parameters to train, by name; all that require gradients if not given.

    Raises:
        RequestError: a role is missing or has nothing that carries loss.
        RunError: the answers are beyond `stop_at` already, or training diverged (the last good weights are kept).
    """
    tokens = _check(name, forget, retain, keeping.retain_term, training)
    known = reference_nll(model, forget, training.batch_size)
    before = float(known.sum()) / tokens
    stop = _stop(name, model, forget, retain, keeping, training, before)
    total = training.steps or math.ceil(training.epochs * stop.per_epoch)
    data = {"forget": forget.with_column("reference_nll", known)}
    for column, values in (columns or {}).items():
        data["forget"] = data["forget"].with_column(column, values)
    terms = [term, Term("forget", _watched, units, 0.0, ANSWER_NLL, answers_only=True)]
    if retain:
        terms += _retaining(model, retain, data, keeping, training, total)
    loop = fit.Training(
        model, data, steps=total, lr=training.lr, warmup=training.warmup, schedule=training.schedule,
        optimizer=optimizer or adamw(weight_decay=training.weight_decay), name=name,
        trainable=trainable,
    )  # fmt: skip
    with loop:
        for step in loop:
            if step.number and stop.reason(loop.ledger):
                break
            step.take(terms, training.batch_size, combine=combine)
    after = float(reference_nll(model, forget, training.batch_size).sum()) / tokens
    facts = {"forget_nll_before": before, "forget_nll_after": after}
    if retain and stop.kept_before is not None:
        kept = _nats(model, retain, training.batch_size)
        facts |= {"retain_nll_before": stop.kept_before, "retain_nll_after": kept}
    return Outcome(model, facts={**_ended(loop.ledger, total, stop), **facts}, curves=loop.ledger.curves)


def _ended(ledger: Ledger, total: int, stop: _Stop) -> dict[str, int | str]:
    """How many steps there were, and why no more."""
    if ledger.step == total:
        return {"steps": total, "stopped_early": "no"}
    return {"steps": ledger.step, "stopped_early": "yes", "stopped_because": stop.reason(ledger) or ""}


def _stop(
    name: str,
    model: nn.Module,
    forget: Examples,
    retain: Examples | None,
    keeping: Keeping,
    training: Training,
    before: float,
) -> _Stop:
    """When to end; refused where `forget` costs as much already, `before` nats a token."""
    limit = limit_of(model, forget, training)
    if limit is not None and before >= limit:
        raise RunError(
            f"forget.{name}: the answers in `forget` already cost {before:.2f} nats a token, above stop_at = {limit:.2f}: "
            "the model does not know them. Check that the questions are put as in training, or write stop_at: null."
        )
    kept_before = _nats(model, retain, training.batch_size) if retain else None
    watched = "retain" if keeping.retain_term == "gdr" else RETAIN_NLL
    per_epoch = math.ceil(len(forget) / training.batch_size)
    return _Stop(limit, kept_before, training.retain_drop, watched, per_epoch)


def limit_of(model: nn.Module, forget: Examples, training: Training) -> float | None:
    """The nats a token at which training ends; None where it does not for that reason."""
    check_positions(model, forget)
    return _chance(model, forget) if training.stop_at == "chance" else training.stop_at


@dataclass(frozen=True)
class _Stop:
    """Whether the means over the last epoch's steps have passed a limit."""

    limit: float | None
    kept_before: float | None
    retain_drop: float | None
    retained: str
    per_epoch: int

    def reason(self, ledger: Ledger) -> str | None:
        if self.limit is not None and self._recent(ledger, ANSWER_NLL) >= self.limit:
            return f"the answers of `forget` cost {self.limit:.3g} nats a token or more"
        if self.retain_drop is not None and self.kept_before is not None:
            dearer = self._recent(ledger, self.retained) - self.kept_before
            if dearer >= self.retain_drop:
                return f"the answers of `retain` cost {dearer:.3g} nats a token more than before"
        return None

    def _recent(self, ledger: Ledger, curve: str) -> float:
        values = ledger.curves[curve][-self.per_epoch :]
        return sum(values) / len(values)


def _check(name: str, forget: Examples, retain: Examples | None, retain_term: str, training: Training) -> int:
    """Refuse roles that cannot be used; the answer tokens (or images) of `forget`."""
    for role, examples in (("forget", forget), ("retain", retain)):
        if examples:
            check_labelled(role, examples)
    tokens = sum(units(batch) for batch in forget.batches(64))
    if not tokens:
        raise RequestError(f"forget.{name}: the role `forget` has no answer to forget: no label carries loss.")
    kept = sum(units(batch) for batch in retain.batches(64)) if retain else 0
    if retain and not kept:
        raise RequestError(f"forget.{name}: the role `retain` has no answer to keep: no label carries loss.")
    if retain_term != "none" and not retain:
        other = (
            "or use forget.gradient_ascent to train on `forget` alone (which costs other abilities)."
            if name in ("grad_diff", "blur")
            else 'or write retain_term: "none" to train on `forget` alone (which costs other abilities).'
        )
        raise RequestError(
            f"forget.{name}: retain_term={retain_term!r} needs examples of what is to stay, but the role `retain` is "
            f"missing or empty. Give it, {other}"
        )
    if training.retain_drop is not None and not retain:
        raise RequestError(
            f"forget.{name}: retain_drop={training.retain_drop} watches the role `retain`, which is missing or empty. Give "
            "it, or leave retain_drop out."
        )
    return tokens


def _retaining(
    model: nn.Module,
    retain: Examples,
    data: dict[str, Examples],
    keeping: Keeping,
    training: Training,
    steps: int,
) -> list[Term]:
    """The terms on `retain`, whose data is put beside the rest; the watch where the retain term is not the watch itself."""
    watched = Term("retain", _watched, units, 0.0, RETAIN_NLL, answers_only=True)
    watch = [watched] if training.retain_drop is not None else []
    weight = keeping.retain_weight
    if keeping.retain_term == "gdr":
        data["retain"] = retain
        return [cross_entropy("retain", weight, "retain")]
    if keeping.retain_term == "klr":
        draws = Draw("retain", len(retain), torch.initial_seed())
        drawn = draws.indices(0, min(len(retain), steps * training.batch_size))
        reference = cache_outputs(model, retain, training.batch_size, set(drawn))
        data["retain"] = reference.examples
        return [reference.kl_term("retain", weight, "retain"), *watch]
    if watch:
        data["retain"] = retain
    return watch


def _watched(logits: Tensor, batch: Batch) -> Tensor:
    labels = batch["labels"]
    # of pairs, the sequence that is to be forgotten
    return cross_entropy_sum(logits.detach()[: labels.shape[0], : labels.shape[1] if labels.ndim > 1 else None], batch)


def _nats(model: nn.Module, examples: Examples, batch_size: int) -> float:
    """Nats a token (or image) of at most `SAMPLE` examples, spread evenly over them."""
    every = math.ceil(len(examples) / SAMPLE)
    sample = examples.select(range(0, len(examples), every))
    tokens = sum(units(batch) for batch in sample.batches(64))
    return float(reference_nll(model, sample, batch_size).sum()) / max(tokens, 1)


def _chance(model: nn.Module, examples: Examples) -> float:
    """Nats a token of a uniform guess: log of the vocabulary, or of the number of classes."""
    (choices,) = evaluate(model, lambda logits, _: torch.tensor(logits.shape[-1]), [next(examples.batches(1))])
    return math.log(int(choices))
