"""First-epoch gradient unlearning: give back to the weights the gradients that samples had in the first epoch.

Zagardo, "A More Practical Approach to Machine Unlearning", arXiv:2406.09391. No code was released, and the paper gives no
setting; what follows is a reading of it.

    theta_S <- theta_S + eta * sum over forgotten z of g_1(z),     g_1(z) = grad_S of z's summed answer NLL in epoch 1

How it differs from the paper:

1. eta is calibrated: the smallest multiple at which the forgotten answers cost as much as unseen text does (`mode="once"`),
   or steps of one length until then (`"iterative"`). Both stop where the retained answers cost `retain_rise` more.
2. The paper warns of stopping in an optimum that still knows the samples. So after every repetition it is also checked how
   much of an answer greedy decoding gives back (extraction strength), against unseen text.
3. Fuzzy matching compares tokens (difflib's ratio) and misses nothing, though it does not compare all pairs.
4. `gradients="live"` is ordinary gradient ascent with the same rules, to compare with. On a small GPT-2 (claim
   first-epoch-ga) the first epoch's gradients, which mostly hold what all samples share, are less selective than the sum
   over all epochs.
5. In a tied model (GPT-2) the token embedding is the output head too, so "embedding" changes both.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le
from torch import nn

from overhaul import session
from overhaul.data.examples import Examples
from overhaul.errors import RequestError, writing
from overhaul.forget.first_epoch.ascent import Goal, Way, iterate, norm_of, once
from overhaul.forget.first_epoch.ledger import (
    GradientLedger,
    Stores,
    Where,
    alike,
    chosen,
    identity,
    token_lists,
    weights_digest,
)
from overhaul.forget.first_epoch.recording import record
from overhaul.influence import Gradients, dot, gradient
from overhaul.method import Outcome, method
from overhaul.objectives import answer_tokens, check_labelled
from overhaul.stack import LayerStack

Facts = dict[str, float | int | str | list[int]]


@method(verb="forget", paper="2406.09391", changes="weights", memory="training")
def first_epoch(
    model: nn.Module,
    forget: Examples,
    retain: Examples,
    unseen: Examples | None = None,
    full: Examples | None = None,
    *,
    ledger: str | None = None,
    gradients: Literal["first", "all", "last", "live"] = "first",
    where: Where | list[int] = "embedding",
    match: Literal["exact", "fuzzy"] = "exact",
    tau: Annotated[float, Gt(0), Le(1)] = 0.85,
    mode: Literal["once", "iterative"] = "once",
    step: Annotated[float, Gt(0)] = 0.05,
    repetitions: Annotated[int, Ge(1)] = 20,
    target: Annotated[float, Gt(0)] | None = None,
    retain_rise: Annotated[float, Gt(0)] | None = 0.5,
    stores: Stores = "gradient",
    epochs: Annotated[int, Ge(1)] = 3,
    batch_size: Annotated[int, Ge(1)] = 16,
    lr: Annotated[float, Gt(0)] = 1e-4,
) -> Outcome:
    """Undo what chosen samples did to the weights in the first epoch, by the gradients that were kept of it.

    Args:
        model: a causal language model: as `full` is to be learnt by it, or as it is after the training that was recorded.
        forget: the samples to be forgotten, encoded as they were when they were learnt.
        retain: examples of what is to stay; they are measured, never trained on.
        unseen: text of the same kind that the model never saw: forgetting ends where `forget` looks like it.
        full: a training set with `forget` in it. The model learns it first, and is recorded while it does; "live" gradients
            do without.
        ledger: folder of a ledger that was recorded before; with `full`, where the new one is kept (else it is deleted).
        gradients: those of the first epoch, of all recorded epochs, of the last, or of the present weights ("live").
        where: the parameters to change: the token embedding, all, the first block, the last two, or blocks by depth.
        match: which samples of the ledger count: those with the same tokens, or all that are nearly the same.
        tau: how alike two samples are for "fuzzy": 2 * tokens in common / all tokens; 1 is "exact".
        mode: one step, as long as needed, or repeated steps of one length.
        step: length of the first step tried ("once") or of every step ("iterative"), in L2 norm over the parameters.
        repetitions: most doublings of the step ("once") or most steps ("iterative").
        target: nats a token at which `forget` counts as forgotten; what `unseen` costs if not given.
        retain_rise: nats a token that `retain` may cost more; null for no limit.
        stores: what is recorded of `full`: gradients, or the optimizer's displacements.
        epochs: passes over `full`.
        batch_size: examples of `full` in a step.
        lr: learning rate of AdamW on `full`.

    Returns:
        The model, changed in place. Facts: the multiple of the summed gradients (`eta`), the length of the way, what ended
        it, nats a token and extraction strength before and after, and how steeply `forget` rises along the direction before
        and after (TracIn's product of gradients, per unit of length). Layers: L2 change by depth. Curves: what every
        repetition measured.

    Raises:
        RequestError: roles, ledger and knobs do not fit together, or the ledger belongs to another model.
        RunError: `forget` is not known to the model, or no step stays within `retain_rise`.
    """
    _check(forget, retain, unseen, full, ledger, gradients, target)
    stack, parameters = LayerStack.of(model), chosen(model, where)
    facts: Facts = {}
    curves: dict[str, list[float]] = {}
    stored: Gradients | None = None
    if gradients != "live":
        near = tau if match == "fuzzy" else None
        if full is None:
            stored, facts = _sum(GradientLedger.open(ledger or "", model), model, forget, near, gradients, parameters)
        else:
            training = {"where": where, "stores": stores, "epochs": epochs, "batch_size": batch_size, "lr": lr}
            tracked = _tracked(full, forget, near)
            with _scratch() as scratch:
                folder = Path(ledger or scratch / "ledger")
                every = gradients != "first"
                kept, ran = record(model, full, folder, tracked=tracked, every_epoch=every, **training)
                stored, facts = _sum(kept, model, forget, near, gradients, parameters)
            curves["training loss"] = ran.curves["loss"]

    def direction() -> Gradients:
        return gradient(model, forget, parameters) if stored is None else stored

    goal = Goal.at(model, forget, retain, unseen=unseen, target=target, retain_rise=retain_rise)
    slope = _slope(model, forget, parameters, direction())
    way = (once if mode == "once" else iterate)(parameters, direction, goal, step, repetitions)
    facts |= _facts(goal, way)
    facts |= {"slope_before": slope, "slope_after": _slope(model, forget, parameters, direction())}
    seen = [one for one in goal.seen if math.isfinite(one.forget + one.retain)]  # a step may be far too long
    curves |= {f"{name} nll per token": [getattr(one, name) for one in seen] for name in ("forget", "retain")}
    curves["extraction strength"] = [one.extraction for one in seen]
    return Outcome(model, facts=facts, layers={"L2 change": _by_depth(stack, way)}, curves=curves)


def _check(
    forget: Examples,
    retain: Examples,
    unseen: Examples | None,
    full: Examples | None,
    ledger: str | None,
    gradients: str,
    target: float | None,
) -> None:
    roles = {"forget": forget, "retain": retain, "unseen": unseen, "full": full}
    for role, examples in roles.items():
        if examples is None:
            continue
        check_labelled(role, examples)
        if examples.classified:
            raise RequestError(
                "forget.first_epoch needs answers of a language model; these have a class each. Use forget.ssd."
            )
        if not any(answer_tokens(batch) for batch in examples.batches(64)):
            raise RequestError(f"forget.first_epoch: no label of the role {role!r} carries loss, so it has no answers.")
    if target is None and unseen is None:
        raise RequestError(
            "forget.first_epoch must know when to stop: give the role `unseen` (text of the same kind that the model never "
            "saw), or `target` in nats a token."
        )
    if gradients == "live" and ledger is not None:
        raise RequestError(
            'forget.first_epoch: gradients="live" are those of the present weights, not of a ledger. Leave `ledger` out.'
        )
    if gradients != "live" and full is None and ledger is None:
        raise RequestError(
            f"forget.first_epoch: gradients={gradients!r} are those that were kept while the model learnt: give the folder "
            "of that `ledger`, or the training set as the role `full`, which the model then learns here."
        )


def _tracked(full: Examples, forget: Examples, tau: float | None) -> list[int]:
    """Which examples of the training set must be recorded for `forget` to be taken back."""
    if tau is not None:
        places = alike(token_lists(forget), token_lists(full), tau)
    else:
        wanted = set(map(identity, forget.items))
        places = [place for place, item in enumerate(full.items) if identity(item) in wanted]
        missing = len(wanted) - len({identity(full.items[place]) for place in places})
        if missing:
            raise RequestError(
                f"forget.first_epoch: {missing} of {len(wanted)} examples of `forget` are not in `full`, so the model would "
                'not learn them there. Build both from the same file; match: "fuzzy" takes what is nearly the same.'
            )
    if not places:
        raise RequestError(f"forget.first_epoch: nothing in `full` is alike to `forget` by tau={tau}. Lower tau.")
    return places


@contextmanager
def _scratch() -> Iterator[Path]:
    """A folder for a ledger that nobody keeps, on the disk of the run."""
    place = session.current().scratch
    if place is not None:
        with writing(place):
            place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place) as folder:
        yield Path(folder)


def _sum(
    kept: GradientLedger,
    model: nn.Module,
    forget: Examples,
    tau: float | None,
    gradients: Literal["first", "all", "last"],
    parameters: Mapping[str, Any],
) -> tuple[Gradients, Facts]:
    """What the ledger holds of `forget`, and some words on it."""
    ids = kept.matching(forget, tau)
    kept.check(parameters)
    same = "yes" if kept.weights == weights_digest(model) else "no"
    facts: Facts = {"samples_matched": len(ids), "ledger_bytes": kept.bytes, "weights_as_recorded": same}
    return kept.sum(ids, gradients, list(parameters)), facts


def _slope(model: nn.Module, forget: Examples, parameters: Mapping[str, nn.Parameter], direction: Gradients) -> float:
    """By how many nats a token `forget` rises for each unit of length along the direction, to first order."""
    here = gradient(model, forget, parameters)
    return dot(here, direction) / norm_of(direction) / sum(answer_tokens(batch) for batch in forget.batches(64))


def _facts(goal: Goal, way: Way) -> Facts:
    before, after = goal.seen[0], goal.seen[-1]
    return {
        "eta": way.eta,
        "length": way.length,
        "repetitions": way.repetitions,
        "ended_by": way.ended,
        "target_nll": goal.target,
        "forget_nll_before": before.forget,
        "forget_nll_after": after.forget,
        "retain_nll_before": before.retain,
        "retain_nll_after": after.retain,
        "extraction_before": before.extraction,
        "extraction_after": after.extraction,
    }


def _by_depth(stack: LayerStack, way: Way) -> dict[int, float]:
    squares: dict[int, float] = {}
    for name, moved in way.by_parameter.items():
        depth = stack.depth(name)
        squares[depth] = squares.get(depth, 0.0) + moved**2
    return {depth: value**0.5 for depth, value in sorted(squares.items())}
