"""DELLA: drop parts of what training changed at random, small entries rather than large ones, and grow the rest.

Deep, Bhardwaj and Poria, "DELLA-Merging: Reducing Interference in Model Merging through Magnitude-Based Sampling",
arXiv:2406.11617.

    tau_t = theta_t - theta_0
    r     = rank of an entry's size within its row, from 0 for the smallest to n - 1
    p     = density - epsilon + 2 epsilon r / (n - 1)              (the chance of an entry to be kept)
    keep  : each entry of tau_t with its probability p, divided by it; the others become 0
    theta = theta_0 + lambda(l) tau,    tau the kept changes as one: their sum, or that of those that agree (`_mixing`)

A piece holds whole rows, and whether an entry is kept depends on the seed, the tensor's name and the place alone.

How it differs from the paper and its code:

1. `density` is 1 - the paper's mean drop rate, `epsilon` half of its window.
2. A row is the last dimension of a matrix, all of a vector, and what one kernel of a convolution has. In a row of one entry
   the chance is `density`; mergekit's is not a number there.
3. `rescale="norm"` grows what is kept of each tensor to the L1 norm of the whole change, as mergekit's `rescale` does.
4. `merge: task_arithmetic` is mergekit's `della_linear`. Its `della` and the paper's own is "ties": the mean of those that
   agree (mergekit's since 0.1.5, their sum before: `normalize: false`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt, Le, Lt
from torch import Tensor

from overhaul.errors import RequestError
from overhaul.merge._mixing import Mixing, Mixture
from overhaul.merge._ramp import Ramp
from overhaul.merge._words import Words
from overhaul.method import Outcome, method
from overhaul.models import Checkpoint
from overhaul.weights import TensorFacts, uniform


@method(verb="merge", paper="2406.11617", changes="weights", memory="stream")
def della(
    base: Checkpoint,
    tuned: Sequence[Checkpoint],
    *,
    density: Annotated[float, Gt(0), Le(1)] = 0.7,
    epsilon: Annotated[float, Ge(0), Lt(1)] = 0.07,
    rescale: Literal["density", "norm"] = "density",
    mixing: Mixing = Mixing(merge="ties"),
    words: Words = Words(),
    ramp: Ramp = Ramp(scale=1.1),
    out: Path | None = None,
) -> Outcome:
    """Merge fine-tuned checkpoints of whose changes a random part is kept, the more likely the larger they are.

    Args:
        base: the checkpoint from which all were tuned; config, tokenizer and dtype are taken from it.
        tuned: the fine-tuned checkpoints, with the same tensors.
        density: the mean chance of an entry of a change to be kept.
        epsilon: the chance of the largest entry of a row is higher than that by so much, that of the smallest lower; 0 is
            `merge.dare`.
        rescale: what is kept is divided by its chance ("density"), or grown to the L1 norm of the tensor's change ("norm").
        mixing: how several changes become one.
        words: which words the result knows.
        ramp: how much of that is added. The paper's code shows 1.1.
        out: folder to write.

    Returns:
        The folder. Facts: the seed, the share of entries that were kept of each change, number of tensors, how many changed,
        how far each is from the base, in what the folders differ. Layers: the coefficient by depth.

    Raises:
        RequestError: the checkpoints do not correspond, chances leave 0 to 1, or nothing would change.
        RunError: nothing changed, or a number is not finite.
    """
    seed = torch.initial_seed()
    mixture = Mixture.of("merge.della", base, tuned, words, mixing, ramp)
    if not epsilon < density <= 1 - epsilon:
        raise RequestError(
            f"merge.della: with density {density} and epsilon {epsilon}, entries would be kept with chances from "
            f"{density - epsilon:.3g} to {density + epsilon:.3g}. They have to be above 0 and at most 1: take a smaller "
            "epsilon."
        )

    def keep(tensor: TensorFacts, n: int, change: Tensor) -> Tensor:
        p = chances(change, density, epsilon)
        kept = torch.where(uniform(seed, n, tensor, change) < p, change, 0)
        return kept.div_(p) if rescale == "density" else kept

    outcome = mixture.write(keep if rescale == "density" else mixture.as_large(keep, "rows"), out, "rows")
    outcome.facts["seed"] = seed
    return outcome


def chances(change: Tensor, density: float, epsilon: float) -> Tensor:
    """The chance of each entry of some rows [rows, n]; of equal sizes the first is the smaller one."""
    last = change.shape[1] - 1
    if not last:
        return torch.full_like(change, density)
    # a size's bits with its place behind them: no two are alike, and numpy sorts integers in a third of the time
    keys = change.float().abs().view(torch.int32).to(torch.int64).mul_(2**32).add_(torch.arange(last + 1))
    keys.numpy().sort(axis=1)
    order = keys.bitwise_and_(2**32 - 1)
    line = torch.linspace(density - epsilon, density + epsilon, last + 1, dtype=change.dtype)
    return torch.empty_like(change).scatter_(1, order, line.expand_as(change))
