"""TIES: trim each change to its largest entries, elect a sign for every weight, and average those that agree.

Yadav et al., "TIES-Merging: Resolving Interference When Merging Models", NeurIPS 2023, arXiv:2306.01708.

    tau_t   = theta_t - theta_0
    trim    : of each tau_t, keep the entries whose size is among the largest `density` of all, and set the others to 0
    elect   : sigma = sign(sum_t tau_t)            (the sign with the larger total size)
    merge   : tau = mean of those tau_t[p] != 0 whose sign is sigma[p]
    theta   = theta_0 + scale * tau

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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from annotated_types import Gt, Le
from torch import Tensor

from overhaul.errors import RequestError
from overhaul.merge._writing import by_depth, some, written
from overhaul.method import Outcome, method
from overhaul.models import Checkpoint
from overhaul.weights import TensorFacts, kth_largest, totals

Rule = Literal["released", "paper"]
Scope = Literal["model", "tensor"]
Sign = Literal["size", "count"]


@method(verb="merge", paper="2306.01708", changes="weights", memory="stream")
def ties(
    base: Checkpoint,
    tuned: Sequence[Checkpoint],
    *,
    density: Annotated[float, Gt(0), Le(1)] = 0.2,
    scale: float = 1.0,
    sign: Sign = "size",
    scope: Scope = "model",
    rule: Rule = "released",
    out: Path | None = None,
) -> Outcome:
    """Merge fine-tuned checkpoints so that small changes and those against the majority do not disturb.

    Args:
        base: the checkpoint from which all were tuned; config, tokenizer and dtype are taken from it.
        tuned: the fine-tuned checkpoints, with the same tensors.
        density: the share of each checkpoint's changes that is kept, the largest ones.
        scale: of the merged change. The paper tries 0.8 to 1.8 on held-out data; 1 is its choice without such data.
        sign: what decides on the sign of a weight: the total "size" of the changes on either side, or their "count".
        scope: the changes are ranked over the whole "model", or within each "tensor".
        rule: details in which the released code and the paper differ; see above.
        out: folder to write.

    Returns:
        The folder. Facts: share of entries that were kept of each checkpoint, of the weights that any of them changes the
        share on whose sign they disagree, the share of weights that are changed, number of tensors. Layers: that share of
        disagreement by depth, and the coefficient.

    Raises:
        RequestError: the checkpoints do not correspond, or `scale` is 0.
        RunError: nothing changed, or a number is not finite.
    """
    some("merge.ties", tuned)
    if not scale:
        raise RequestError("merge.ties: scale 0 would change nothing.")
    assert out is not None
    merge = elect(base, tuned, density, sign, scope, rule)

    def combine(tensor: TensorFacts, models: list[Tensor]) -> Tensor:
        return torch.add(models[0], merge.election.change(tensor, models), alpha=scale)

    facts = written("merge.ties", base, tuned, combine, out)
    return Outcome(out, facts={**facts, **merge.facts}, layers={**merge.layers, **by_depth(base, lambda _: scale)})


@dataclass(frozen=True)
class Sides:
    """What the models say on a piece of a tensor.

    Attributes:
        votes: their sign is elected.
        up: mean of the changes above 0.
        down: mean of those below 0.
        conflict: where there are both.
        kept: entries that trimming left, by model.
    """

    votes: Tensor
    up: Tensor
    down: Tensor
    conflict: Tensor
    kept: Sequence[Tensor]


@dataclass(frozen=True)
class Election:
    """All that trimming and the election need to know of the whole model.

    Attributes:
        thresholds: by tensor, the size from which each model's changes are kept.
        sign: as in `ties`.
        rule: as in `ties`.
        majority: the sign that most weights have: above 0, below 0, or 0.
    """

    thresholds: Mapping[str, Sequence[float]]
    sign: Sign
    rule: Rule
    majority: float = 0

    def sides(self, tensor: TensorFacts, models: list[Tensor]) -> Sides:
        """Trim, and take both sides apart."""
        base, *tuned = models
        total, up, down, ups, downs = (torch.zeros_like(base) for _ in range(5))
        kept: list[Tensor] = []
        for model, threshold in zip(tuned, self.thresholds[tensor.name], strict=True):
            change = model - base
            change.masked_fill_(change.abs() < threshold, 0)
            above, below = change > 0, change < 0
            kept.append(above.sum() + below.sum())
            total += change
            up += change.clamp(min=0)
            down += change.clamp(max=0)
            ups += above
            downs += below
        votes = total if self.sign == "size" else ups - downs
        return Sides(votes, up / ups.clamp(min=1), down / downs.clamp(min=1), (ups > 0) & (downs > 0), kept)

    def change(self, tensor: TensorFacts, models: list[Tensor]) -> Tensor:
        """The merged change of a piece of a tensor."""
        sides = self.sides(tensor, models)
        upwards = sides.votes > 0
        if self.majority > 0:
            upwards |= sides.votes == 0
        made = torch.where(upwards, sides.up, sides.down)
        return made.masked_fill_(sides.votes == 0, 0) if self.rule == "paper" else made


@dataclass(frozen=True)
class Elected:
    """An election and what it says for a report.

    Attributes:
        election: gives the merged change.
        facts: as `ties` returns them.
        layers: as `ties` returns them.
        ratio: the total size of the sum of all changes, untrimmed, over that of the merged change.
    """

    election: Election
    facts: Mapping[str, Any]
    layers: Mapping[str, dict[int, float]]
    ratio: float


def elect(
    base: Checkpoint, tuned: Sequence[Checkpoint], density: float, sign: Sign, scope: Scope, rule: Rule
) -> Elected:
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

    def rank(numbers: int) -> int:
        return int(density * numbers) + 1 if rule == "released" else max(int(density * numbers), 1)

    def sizes(_: TensorFacts, models: list[Tensor]) -> list[Tensor]:
        return [(model - models[0]).abs_() for model in models[1:]]

    thresholds = kth_largest([base, *tuned], sizes, rank, by_tensor=scope == "tensor")
    election = Election(thresholds, sign, rule)
    found = totals([base, *tuned], functools.partial(_census, election))
    numbers, majority, conflicts, changed, decided, up, down, whole, *kept = found.total.tolist()
    undecided = 0.0 if rule == "paper" else up if majority > 0 else down
    shares = {path: numbers.tolist() for path, numbers in found.by_depth.items()}
    several = len({stack for stack, _ in shares}) > 1
    layers: dict[str, dict[int, float]] = {}
    for (stack, depth), (_, _, conflict, any_change, *_) in shares.items():
        name = f"disagreement, {stack}" if several else "disagreement"
        layers.setdefault(name, {})[depth] = conflict / any_change if any_change else 0.0
    facts = {
        "kept_share": [count / numbers for count in kept],
        "disagreement": conflicts / changed if changed else 0.0,
        "merged_share": changed / numbers,
    }
    merged = decided + undecided
    majority = majority if rule == "released" else 0
    return Elected(replace(election, majority=majority), facts, layers, whole / merged if merged else 0.0)


def _census(election: Election, tensor: TensorFacts, models: list[Tensor]) -> Tensor:
    """Sums over a piece: numbers, signs, weights on whose sign models disagree, weights that any model changes, the size
    of the change where a sign is elected and on either side where none is, the size of the untrimmed sum, entries kept."""
    sides = election.sides(tensor, models)
    none = sides.votes == 0
    upwards = sides.votes > 0
    decided = torch.where(upwards, sides.up, sides.down).masked_fill_(none, 0)
    whole = models[1] - models[0]
    for model in models[2:]:
        whole += model - models[0]
    sums = [
        upwards.sum() - (sides.votes < 0).sum(),
        sides.conflict.sum(),
        ((sides.up > 0) | (sides.down < 0)).sum(),
        decided.abs_().sum(),
        sides.up[none].sum(),
        -sides.down[none].sum(),
        whole.abs_().sum(),
        *sides.kept,
    ]
    return torch.stack([torch.tensor(float(none.numel()), dtype=torch.float64), *(one.double() for one in sums)])
