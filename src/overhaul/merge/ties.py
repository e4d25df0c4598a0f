"""TIES: trim each change to its largest entries, elect a sign for every weight, and average those that agree.

Yadav et al., "TIES-Merging: Resolving Interference When Merging Models", NeurIPS 2023, arXiv:2306.01708.

    tau_t   = theta_t - theta_0
    trim    : of each tau_t, keep the entries whose size is among the largest `density` of all, and set the others to 0
    elect   : sigma = sign(sum_t tau_t)            (the sign with the larger total size)
    merge   : tau = mean of those tau_t[p] != 0 whose sign is sigma[p]
    theta   = theta_0 + lambda(l) tau              (`scale` in every block, unless `beta` makes it grow over depth)

Several passes over the files: one finds the sizes from which entries are kept (`weights.kth_largest`), one counts the signs,
one writes. Memory is that of a few pieces of a tensor.

How it differs from the paper and its code:

1. Released code and paper agree that sizes are ranked over the whole model. mergekit ranks them within every tensor:
   `scope="tensor"`.
2. Where sizes are kept from the (int(density * n) + 1)-th largest on and where trimmed changes that cancel exactly take the
   sign that most weights have, that is `rule="released"`. In the paper as many as int(density * n) are kept, and what
   cancels has no sign and stays as it was: `rule="paper"`. Entries of equal size at the threshold are all kept by both.
3. A density of 1 keeps everything; the released code fails on it.
4. `sign="count"` elects by the number of models on either side, not by their total size, as peft's "frequency".
5. Sizes are ranked in float32, and tied tensors once.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy
import torch
from annotated_types import Gt, Le
from torch import Tensor

from overhaul.merge._mixing import agreeing, from_size
from overhaul.merge._ramp import Ramp
from overhaul.merge._words import Words
from overhaul.merge._writing import by_depth, some, written
from overhaul.method import Outcome, method
from overhaul.models import Checkpoint
from overhaul.weights import TensorFacts, corresponding, kth_largest, totals

Rule = Literal["released", "paper"]
Scope = Literal["model", "tensor"]
Sign = Literal["size", "count"]


@method(verb="merge", paper="2306.01708", changes="weights", memory="stream")
def ties(
    base: Checkpoint,
    tuned: Sequence[Checkpoint],
    *,
    density: Annotated[float, Gt(0), Le(1)] = 0.2,
    sign: Sign = "size",
    scope: Scope = "model",
    rule: Rule = "released",
    words: Words = Words(),
    ramp: Ramp = Ramp(),
    out: Path | None = None,
) -> Outcome:
    """Merge fine-tuned checkpoints so that small changes and those against the majority do not disturb.

    Args:
        base: the checkpoint from which all were tuned; config, tokenizer and dtype are taken from it.
        tuned: the fine-tuned checkpoints, with the same tensors.
        density: the share of each checkpoint's changes that is kept, the largest ones.
        sign: what decides on the sign of a weight: the total "size" of the changes on either side, or their "count".
        scope: the changes are ranked over the whole "model", or within each "tensor".
        rule: details in which the released code and the paper differ; see above.
        words: which words the result knows.
        ramp: how much of the merged change is added. The paper tries 0.8 to 1.8 on held-out data; 1 is its choice without
            such data.
        out: folder to write.

    Returns:
        The folder. Facts: share of entries that were kept of each checkpoint, of the weights that any of them changes the
        share on whose sign they disagree, the share of weights that are changed, number of tensors, how far each checkpoint
        is from the base. Layers: that share of disagreement by depth, and the coefficient.

    Raises:
        RequestError: the checkpoints do not correspond, or nothing would change.
        RunError: nothing changed, or a number is not finite.
    """
    some("merge.ties", base, tuned)
    ramp.check("merge.ties")
    assert out is not None
    base, tuned = words.read(base, tuned)
    election = elect(base, tuned, density, sign, scope, rule)

    def combine(tensor: TensorFacts, models: list[Tensor]) -> Tensor:
        return torch.add(models[0], election.change(tensor, models), alpha=ramp(tensor))

    facts = written("merge.ties", base, tuned, combine, out)
    layers = {**election.layers, **by_depth(base, ramp)}
    return Outcome(Path(out), facts={**facts, **election.facts}, layers=layers)


@dataclass(frozen=True)
class Election:
    """All that trimming and the election need to know of the whole model.

    Attributes:
        thresholds: by tensor, the size from which each model's changes are kept.
        sign: as in `ties`.
        undecided: the sign of what has none: 1, -1, or 0.
        facts: as `ties` returns them.
        layers: as `ties` returns them.
    """

    thresholds: Mapping[str, Sequence[float]]
    sign: Sign
    undecided: int = 0
    facts: Mapping[str, Any] = field(default_factory=dict)
    layers: Mapping[str, dict[int, float]] = field(default_factory=dict)

    def change(self, tensor: TensorFacts, models: list[Tensor]) -> Tensor:
        """The merged change of a piece of a tensor."""
        kept = self.trimmed(tensor, models)
        sign = self.votes(kept).sign_()
        if self.undecided:
            sign.add_(1 - sign.abs(), alpha=self.undecided)  # 0 becomes the majority's
        return agreeing(kept, sign, [1.0] * len(kept))

    def trimmed(self, tensor: TensorFacts, models: list[Tensor]) -> list[Tensor]:
        """tau_t with 0 where it is below its threshold."""
        base, *tuned = models
        return [from_size(one - base, least) for one, least in zip(tuned, self.thresholds[tensor.name], strict=True)]

    def votes(self, kept: Sequence[Tensor]) -> Tensor:
        """What has the sign that is elected."""
        votes = torch.zeros_like(kept[0])
        for change in kept:
            votes += change if self.sign == "size" else change.sign()
        return votes


def elect(
    base: Checkpoint, tuned: Sequence[Checkpoint], density: float, sign: Sign, scope: Scope, rule: Rule
) -> Election:
    """Find thresholds and the majority's sign.

    Args:
        base: as in `ties`.
        tuned: as in `ties`.
        density: as in `ties`.
        sign: as in `ties`.
        scope: as in `ties`.
        rule: as in `ties`.

    Raises:
        RequestError: as in `ties`.
        RunError: as in `ties`.
    """
    corresponding([base, *tuned])

    def rank(numbers: int) -> int:
        return int(density * numbers) + 1 if rule == "released" else max(int(density * numbers), 1)

    def sizes(_: TensorFacts, models: list[Tensor]) -> list[Tensor]:
        return [(model - models[0]).abs_() for model in models[1:]]

    thresholds = kth_largest([base, *tuned], sizes, rank, by_tensor=scope == "tensor")
    election = Election(thresholds, sign)
    found = totals([base, *tuned], functools.partial(_census, election))
    numbers, majority, above, below, changed, *kept = found.total.tolist()
    several = len({stack for stack, _ in found.by_depth}) > 1
    layers: dict[str, dict[int, float]] = {}
    for (stack, depth), part in found.by_depth.items():
        name = f"disagreement, {stack}" if several else "disagreement"
        layers.setdefault(name, {})[depth] = _share(*part[2:5].tolist())
    facts = {
        "kept_share": [count / numbers for count in kept],
        "disagreement": _share(above, below, changed),
        "merged_share": changed / numbers,
    }
    # the released code takes the side below 0 where as many weights have either sign
    undecided = 0 if rule == "paper" else 1 if majority > 0 else -1
    return replace(election, undecided=undecided, facts=facts, layers=layers)


def _census(election: Election, tensor: TensorFacts, models: list[Tensor]) -> Tensor:
    """Counts of a piece.

    Returns:
        Weights; signs above 0 less those below; weights that some model moves up, down, either way; entries kept by model.
    """
    kept = election.trimmed(tensor, models)
    majority = election.votes(kept).sign_().sum()
    highest, lowest = torch.zeros_like(kept[0]), torch.zeros_like(kept[0])
    for change in kept:
        torch.maximum(highest, change, out=highest)
        torch.minimum(lowest, change, out=lowest)
    either = numpy.count_nonzero(highest.numpy() > lowest.numpy())
    counts = [_moved(one) for one in (highest, lowest)]
    return torch.tensor(
        [highest.numel(), majority.item(), *counts, either, *map(_moved, kept)], dtype=torch.float64
    )  # fmt: skip


def _moved(change: Tensor) -> int:
    return int(numpy.count_nonzero(change.numpy() != 0))  # a fifth of the time of torch's count


def _share(above: float, below: float, either: float) -> float:
    """Weights that models move both ways, of those that are moved."""
    return (above + below - either) / either if either else 0.0
