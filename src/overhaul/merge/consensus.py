"""Consensus: of the merged change, keep the weights that several tasks need, and put back those that one or none needs.

Wang, Dimitriadis, Ortiz-Jimenez, Fleuret and Frossard, "Localizing Task Information for Improved Model Merging and
Compression", ICML 2024, arXiv:2405.07813.

    tau_t = theta_t - theta_0
    tau   = the changes as one: their sum, or that of those that agree after trimming (`_mixing`)
    m_t   = 1[ |tau_t| > tall |tau - tau_t| ]          (a weight that task t needs: its TALL mask)
    theta = theta_0 + lambda(l) tau   where sum_t m_t >= agree,   theta_0 elsewhere

Weights that no task needs are the paper's catastrophic ones, those that one needs its selfish ones; `agree: 2` removes both.

How it differs from the paper and its code:

1. The code picks `tall` for each task from 0.2, 0.3 .. 0.6 by the accuracy of the model that the mask alone leaves of the
   merged change; here it is given, one for all or one for each. It writes no masks of tasks, only the merge.
2. Under "ties" each change is trimmed to its largest `density` entries over the whole model, and tau is the sum of those
   that agree, as in the code; masks compare it with whole changes. What cancels has no sign (the code takes the majority's).
3. Weights of checkpoints (`weights`) count in tau and not in the masks' left side.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor

from overhaul.errors import RequestError
from overhaul.merge._mixing import Keep, Mixing, Mixture, from_size
from overhaul.merge._ramp import Ramp
from overhaul.merge._words import Words
from overhaul.method import Outcome, method
from overhaul.models import Checkpoint
from overhaul.weights import TensorFacts, kth_largest

Tall = Annotated[float, Ge(0)]


@method(verb="merge", paper="2405.07813", changes="weights", memory="stream")
def consensus(
    base: Checkpoint,
    tuned: Sequence[Checkpoint],
    *,
    agree: Annotated[int, Ge(0)] = 2,
    tall: Tall | list[Tall] = 0.4,
    density: Annotated[float, Gt(0), Le(1)] = 0.2,
    mixing: Mixing = Mixing(normalize=False),
    words: Words = Words(),
    ramp: Ramp = Ramp(scale=0.4),
    out: Path | None = None,
) -> Outcome:
    """Merge fine-tuned checkpoints, and leave the weights alone that fewer than two of them need.

    Args:
        base: the checkpoint from which all were tuned; config, tokenizer and dtype are taken from it.
        tuned: the fine-tuned checkpoints, with the same tensors.
        agree: how many have to need a weight for its merged change to be kept; 0 keeps all of it.
        tall: how strictly it is told whether a checkpoint needs a weight: larger, fewer do. One number, or one for each.
        density: for "ties", the share of each checkpoint's changes that is kept, the largest ones.
        mixing: how several changes become one.
        words: which words the result knows.
        ramp: how much of that is added. The paper tries 0.1 to 1.0 on held-out data.
        out: folder to write.

    Returns:
        The folder. Facts: the share of entries that were kept of each change by trimming, the share of weights that each
        checkpoint needs and that enough of them need, number of tensors, how many changed, how far each is from the base, in
        what the folders differ. Layers: the coefficient by depth.

    Raises:
        RequestError: the checkpoints do not correspond, more have to agree than there are, or nothing would change.
        RunError: nothing changed, or a number is not finite.
    """
    mixture = Mixture.of("merge.consensus", base, tuned, words, mixing, ramp)
    bounds = _checked(tall, agree, len(tuned))
    keep = _largest(mixture, density) if mixing.merge == "ties" else _all

    def combine(tensor: TensorFacts, models: list[Tensor]) -> Tensor:
        base, *tuned = models
        tau = mixture.change(keep, tensor, models)
        needed = [_needs(model - base, tau, bound) for model, bound in zip(tuned, bounds, strict=True)]
        enough = torch.stack(needed).sum(0) >= agree
        mixture.count("needed_share", needed)
        mixture.count("agreed_share", [enough])
        return torch.add(base, tau.mul_(enough), alpha=ramp(tensor))

    return mixture.written(combine, out)


def _needs(change: Tensor, merged: Tensor, tall: float) -> Tensor:
    """m_t of a piece."""
    return change.abs() > tall * (merged - change).abs()


def _all(_: TensorFacts, __: int, change: Tensor) -> Tensor:
    return change


def _largest(mixture: Mixture, density: float) -> Keep:
    """The largest entries of each change, ranked over the whole model as in the released code."""

    def sizes(_: TensorFacts, models: list[Tensor]) -> list[Tensor]:
        return [(model - models[0]).abs_() for model in models[1:]]

    thresholds = kth_largest(mixture.sources, sizes, lambda numbers: int(density * numbers) + 1)
    return lambda tensor, n, change: from_size(change, thresholds[tensor.name][n])


def _checked(tall: float | Sequence[float], agree: int, count: int) -> Sequence[float]:
    """`tall` of each checkpoint.

    Raises:
        RequestError: there are not as many, or more have to agree than there are.
    """
    bounds = tall if isinstance(tall, Sequence) else [tall] * count
    if len(bounds) != count:
        raise RequestError(
            f"merge.consensus: there are {count} tuned checkpoints and {len(bounds)} numbers in tall. Give one for each, or "
            "one for all."
        )
    if agree > count:
        raise RequestError(
            f"merge.consensus: agree={agree}, but there are {count} tuned checkpoints, so every weight would be the base's. "
            f"Write agree: {count} or less."
        )
    return bounds
