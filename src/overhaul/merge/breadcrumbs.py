"""Model Breadcrumbs: of what training changed in each tensor, keep neither the largest entries nor the small ones.

Davari and Belilovsky, "Model Breadcrumbs: Scaling Multi-Task Model Merging with Sparse Masks", ECCV 2024, arXiv:2312.06795.

    tau_t = theta_t - theta_0
    keep  : of each tensor of tau_t, leave out the largest `outliers` of all entries by size, then keep the largest
            `density` of all, and set the others to 0
    theta = theta_0 + lambda(l) tau,    tau the kept changes as one: their sum, or that of those that agree (`_mixing`)

Two passes over the files: one finds the sizes between which entries are kept (`weights.kth_largest`), one writes.

How it differs from the paper and its code:

1. The paper's beta (0.9) and gamma (0.99) are bounds of ranks; here both numbers are shares of entries, as mergekit has
   them: `outliers` is 1 - gamma (mergekit's gamma), `density` is gamma - beta, which is kept.
2. Entries are ranked within a tensor, as in the paper's text and mergekit. The released code ranks within each row.
3. Entries as large as the last that is kept, to either side, are kept too. In bfloat16 these can be many: `kept_share` says
   what came of it.
4. mergekit keeps as many as `density` says, whichever of equal ones; before 0.1.5 none where no outlier was to be left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
from annotated_types import Ge, Gt, Le, Lt
from torch import Tensor

from overhaul.merge._mixing import Mixing, Mixture
from overhaul.merge._ramp import Ramp
from overhaul.merge._words import Words
from overhaul.method import Outcome, method
from overhaul.models import Checkpoint
from overhaul.weights import TensorFacts, kth_largest


@method(verb="merge", paper="2312.06795", changes="weights", memory="stream")
def breadcrumbs(
    base: Checkpoint,
    tuned: Sequence[Checkpoint],
    *,
    density: Annotated[float, Gt(0), Le(1)] = 0.09,
    outliers: Annotated[float, Ge(0), Lt(1)] = 0.01,
    mixing: Mixing = Mixing(),
    words: Words = Words(),
    ramp: Ramp = Ramp(scale=0.3),
    out: Path | None = None,
) -> Outcome:
    """Merge fine-tuned checkpoints of whose changes only those of middling size are kept.

    Args:
        base: the checkpoint from which all were tuned; config, tokenizer and dtype are taken from it.
        tuned: the fine-tuned checkpoints, with the same tensors.
        density: the share of each tensor's entries that is kept.
        outliers: the share of each tensor's entries, the largest ones, that is left out before; less where that would leave
            fewer than `density`.
        mixing: how several changes become one.
        words: which words the result knows.
        ramp: how much of that is added. The paper finds 0.3 good for several tasks.
        out: folder to write.

    Returns:
        The folder. Facts: the share of entries that were kept of each change, number of tensors, how many changed, how far
        each is from the base, in what the folders differ. Layers: the coefficient by depth.

    Raises:
        RequestError: the checkpoints do not correspond, or nothing would change.
        RunError: nothing changed, or a number is not finite.
    """
    mixture = Mixture.of("merge.breadcrumbs", base, tuned, words, mixing, ramp)
    count = len(tuned)

    def ranks(numbers: int) -> list[int]:
        kept = int(density * numbers)
        above = min(int(outliers * numbers), numbers - kept)
        return [above + 1] * count + [above + kept if kept else 0] * count

    def sizes(_: TensorFacts, models: list[Tensor]) -> list[Tensor]:
        return 2 * [(model - models[0]).abs_() for model in models[1:]]

    bounds = kth_largest(mixture.sources, sizes, ranks, by_tensor=True)

    def keep(tensor: TensorFacts, n: int, change: Tensor) -> Tensor:
        size, most, least = change.abs(), bounds[tensor.name][n], bounds[tensor.name][count + n]
        return torch.where((size <= most) & (size >= least), change, 0)

    return mixture.write(keep, out)
