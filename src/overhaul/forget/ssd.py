"""Selective synaptic dampening: forget by shrinking the weights that matter to the forget set and hardly elsewhere.

Foster, Schoepf and Brintrup, AAAI 2024, arXiv:2308.07707. Label-free form: arXiv:2402.19308; adaptive: arXiv:2402.10098.

    M_i = 1 where I_forget,i > alpha I_full,i         theta_i <- min(lam I_full,i / I_forget,i, 1) theta_i  where M_i = 1

How it differs from the paper:

1. `alpha="adaptive"` is the default: the percentile of all ratios that ASSD derives from the share of the data that is to
   be forgotten. A fixed alpha (10 in the paper, for batches of 128) depends on the batch size and on the model: on two
   small transformers the same alpha selected 2% and 14% of the weights. `lam` is 1, as in the experiments of both papers
   (the default of ASSD's function is 0.1, which none of them uses).
2. What `forget` is held against is ASSD's with the adaptive rule wherever there is a role `retain`: the retained data
   alone. Without it, and with a fixed alpha, it is the paper's: all data, `forget` included (`full`, or `forget` with
   `retain`). All data hides in the denominator what only `forget` needs, so the ratios lie closer together.
3. `importance="batch"` squares the gradient of each batch's mean, as the released code does and not as the paper writes;
   it needs batches of mixed examples, so both sets are shuffled. `importance="sample"` is the paper's formula. The
   default takes batches where both sets have at least 20 of them: four squared means are no estimate of a diagonal.
4. Importance is accumulated in float32 whatever the model's dtype. Frozen parameters are skipped, tied ones counted once.
5. For a language model the loss is the mean over the answer tokens of a batch, and "logits" the mean of their squared
   norms there.
6. A weight with no importance anywhere (0/0) is never selected. Selecting no weight at all is an error.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt
from torch import nn

from overhaul.data.examples import Examples, join
from overhaul.errors import RequestError, RunError
from overhaul.importance import (
    Dampened,
    PerParameter,
    adaptive_alpha,
    batch_importance,
    dampen,
    ratios,
    sample_importance,
)
from overhaul.method import Outcome, method
from overhaul.objectives import check_learnable
from overhaul.stack import LayerStack

FEWEST_BATCHES = 20
"""With fewer of them, the squared gradients of batch means say little about single examples."""

HARDLY_ANY, HARDLY_LESS = 1e-5, 0.99
"""A share of changed weights, and a mean factor, at which hardly anything can have been forgotten."""


@method(
    verb="forget",
    paper="2308.07707",
    changes="weights",
    memory="gradient",
    singly=lambda knobs: knobs["importance"] != "batch",
)
def ssd(
    model: nn.Module,
    forget: Examples,
    full: Examples | None = None,
    retain: Examples | None = None,
    *,
    alpha: Annotated[float, Gt(0)] | Literal["adaptive"] = "adaptive",
    lam: Annotated[float, Ge(0)] = 1.0,
    importance: Literal["auto", "batch", "sample"] = "auto",
    batch_size: Annotated[int, Ge(1)] = 64,
    signal: Literal["loss", "logits"] = "loss",
) -> Outcome:
    """Dampen the weights that matter disproportionately to `forget`; no training, no data kept.

    Args:
        model: an image classifier or a language model.
        forget: examples of what is to be forgotten.
        full: the whole training set, `forget` included, or a sample of it; `forget` with `retain` if not given.
        retain: what is to stay; where it is given, "adaptive" holds `forget` against it alone.
        alpha: how many times as important to `forget` as to the rest a weight must be to be selected; "adaptive" takes the
            percentile that the share of `forget` in all data asks for.
        lam: dampening constant: a selected weight keeps lam / ratio of itself; 0 prunes it.
        importance: squared gradient of batch means ("batch"), or mean of the examples' squared gradients ("sample"); "auto"
            is "sample" where `forget` or what it is held against has fewer than 20 batches.
        batch_size: examples in a batch: with "batch" it is part of the definition, with "sample" it is not used.
        signal: the gradient of what: "loss" (with true labels), or "logits" (squared norm of the outputs, no labels).

    Returns:
        The model, with the share of weights selected at each depth.

    Raises:
        RequestError: a role is empty, there is neither `full` nor `retain`, or `full` is not larger than `forget`.
        RunError: no weight was selected or none changed, or gradients are not finite.
    """
    _check_roles(forget, full, retain, signal)
    name, against = _against(forget, full, retain, alpha == "adaptive")
    share = len(forget) / (len(against) + (len(forget) if name == "retain" else 0))
    if importance == "auto":
        few = min(len(forget), len(against)) < FEWEST_BATCHES * batch_size
        importance = "sample" if few else "batch"
    seed = torch.initial_seed()
    gradients = "of batches"
    measured: list[PerParameter] = []
    for what, examples in (("importance for forget", forget), (f"importance for {name}", against)):
        shuffled = examples.shuffled(seed)
        if importance == "batch":
            measured.append(batch_importance(model, shuffled, batch_size, signal, what))
        else:
            values, gradients = sample_importance(model, shuffled, signal, what)
            measured.append(values)
    ratio = ratios(*measured)
    threshold = adaptive_alpha(ratio, share) if alpha == "adaptive" else alpha
    done = dampen(model, ratio, threshold, lam)
    _check_effect(done, ratio, alpha, threshold, lam, name)
    selected, size = sum(done.selected.values()), sum(values.numel() for values in ratio.values())
    facts: dict[str, float | int | str | list[int]] = {
        "alpha": threshold,
        "selected": selected,
        "selected_share": selected / size,
        "changed": done.changed,
        "mean_factor": done.mean_factor,
        "importance": importance,
        "gradients": gradients,
        "held_against": name,
    }
    if advice := _advice(done, size):
        facts["advice"] = advice
    return Outcome(model, facts=facts, layers=_by_depth(model, done, ratio))


def _check_roles(forget: Examples, full: Examples | None, retain: Examples | None, signal: str) -> None:
    for role, examples in (("forget", forget), ("full", full), ("retain", retain)):
        if examples is not None and not len(examples):
            raise RequestError(f"forget.ssd: the role {role!r} has no examples.")
        if examples is not None and signal == "loss":
            check_learnable(role, examples)
    if full is None and retain is None:
        raise RequestError(
            "forget.ssd holds what is to be forgotten against other data. Give `retain`, what is to stay, or `full`, the "
            "whole training set."
        )
    if full is not None and len(forget) >= len(full):
        raise RequestError(
            f"forget.ssd: `forget` has {len(forget)} examples and `full` {len(full)}. `full` is the whole training set: "
            "what is to be forgotten and what is to stay. With nothing to stay, no weight can be told apart."
        )


def _against(
    forget: Examples, full: Examples | None, retain: Examples | None, adaptive: bool
) -> tuple[Literal["full", "retain"], Examples]:
    """What the importance for `forget` is divided by."""
    if retain is not None and (adaptive or full is None):
        return ("retain", retain) if adaptive else ("full", join([forget, retain]))
    assert full is not None
    return "full", full


def _check_effect(
    done: Dampened, ratio: PerParameter, alpha: float | str, threshold: float, lam: float, against: str
) -> None:
    if done.changed:
        return
    highest = max((float(v[~v.isnan()].max()) for v in ratio.values() if not v.isnan().all()), default=math.nan)
    selected = sum(done.selected.values())
    if selected and (lam > 1 or alpha != "adaptive"):
        advice = f"lam = {lam:g} lies above every ratio, so nothing shrinks: write a smaller lam."
    elif alpha == "adaptive":
        advice = f"`forget` and `{against}` look the same to the model: check that `forget` is only what is to go."
    else:
        advice = "Write a smaller alpha, or alpha: adaptive. (For batches, a larger batch_size raises ratios too.)"
    raise RunError(
        f"forget.ssd selected {selected:,} weights and changed none. A weight is selected if it is more than alpha = "
        f"{threshold:.4g} times as important to `forget` as to `{against}`; the highest ratio is {highest:.4g}. {advice}"
    )


def _advice(done: Dampened, size: int) -> str:
    """What to try where hardly anything changed; "" where something did."""
    few, gentle = done.changed < HARDLY_ANY * size, done.mean_factor > HARDLY_LESS
    if not few and not gentle:
        return ""
    what = f"{done.changed:,} of {size:,} weights changed, to {done.mean_factor:.4g} of themselves on average"
    return f"{what}: a smaller {'alpha selects more of them' if few else 'lam dampens them more'}"


def _by_depth(model: nn.Module, done: Dampened, ratio: PerParameter) -> dict[str, dict[int, float]]:
    """The share of selected weights at each depth, one table for each stack of blocks."""
    tables: dict[str, dict[int, float]] = {}
    stacks = LayerStack.find(model)
    for stack in stacks:
        chosen: dict[int, int] = {}
        size: dict[int, int] = {}
        for name, values in ratio.items():
            if len(stacks) > 1 and not name.startswith(f"{stack.path}."):
                continue
            depth = stack.depth(name)
            chosen[depth] = chosen.get(depth, 0) + done.selected[name]
            size[depth] = size.get(depth, 0) + values.numel()
        label = "selected share" if len(stacks) == 1 else f"selected share in {stack.path}"
        tables[label] = {depth: chosen[depth] / size[depth] for depth in sorted(size)}
    return tables
