"""How the changes of several models become one: what is kept of each, then their sum, or that of those that agree.

    tau_t = theta_t - theta_0
    tau   = sum_t w_t keep(tau_t)                                        "task_arithmetic"
    tau   = sum of those w_t keep(tau_t) whose sign is that of their sum       "ties"
    theta = theta_0 + lambda(l) tau                                      (lambda: `_ramp`)

What cancels exactly under "ties" has no sign and stays as it was; mergekit takes those above 0 there.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy
import torch
from torch import Tensor
from torch.nn.functional import hardshrink

from overhaul.errors import RequestError
from overhaul.merge._ramp import Ramp
from overhaul.merge._words import Words
from overhaul.merge._writing import by_depth, some, written
from overhaul.method import Outcome
from overhaul.models import Checkpoint
from overhaul.weights import Combine, TensorFacts, Whole, totals

Keep = Callable[[TensorFacts, int, Tensor], Tensor]
"""(tensor, number of the model among the tuned ones, its change) -> what is kept of the change, which may be overwritten."""


@dataclass(frozen=True)
class Mixing:
    """What becomes of the changes of several models.

    Attributes:
        merge: how they become one: their sum ("task_arithmetic"), or for every weight the sum of those that have the sign
            with the larger total size ("ties").
        weights: of each tuned checkpoint; 1 each if not given.
        normalize: divide by the weights of the checkpoints that a sum is of. If not given, "ties" does and
            "task_arithmetic" does not, as in their papers. (mergekit's `dare_ties` does not.)
    """

    merge: Literal["task_arithmetic", "ties"] = "task_arithmetic"
    weights: list[float] | None = None
    normalize: bool | None = None

    def checked(self, method: str, count: int) -> list[float]:
        """The weights of `count` checkpoints; `method` is for messages.

        Raises:
            RequestError: their number differs, they are all 0, or they cannot be divided by.
        """
        weights = [1.0] * count if self.weights is None else self.weights
        if len(weights) != count:
            raise RequestError(
                f"{method}: there are {count} tuned checkpoints and {len(weights)} weights. Give one for each."
            )
        if not all(map(math.isfinite, weights)) or not any(weights):
            raise RequestError(f"{method}: the weights {weights} would change nothing, or are not finite numbers.")
        if self.normalizes and min(weights) <= 0:
            raise RequestError(
                f"{method}: the weights {weights} cannot be divided by, since not all are above 0. Write normalize: false."
            )
        return weights

    @property
    def normalizes(self) -> bool:
        """Whether sums are divided."""
        return self.merge == "ties" if self.normalize is None else self.normalize


@dataclass
class Mixture:
    """A merge of kept changes, for one method. Create it with `of`, which checks its knobs.

    Attributes:
        method: for messages and the lineage.
        base: the model that all changes began from.
        tuned: the models with the changes.
        mixing: how they become one.
        ramp: how much of that is added.
        weights: of each change.
        counted: by name of a fact, how many entries counted and of how many, so far.
    """

    method: str
    base: Checkpoint
    tuned: Sequence[Checkpoint]
    mixing: Mixing
    ramp: Ramp
    weights: Sequence[float]
    counted: dict[str, tuple[list[int], int]] = field(default_factory=dict)
    _lock: Any = field(default_factory=threading.Lock, repr=False)

    @classmethod
    def of(
        cls, method: str, base: Checkpoint, tuned: Sequence[Checkpoint], words: Words, mixing: Mixing, ramp: Ramp
    ) -> Mixture:
        """A mixture of which nothing is written yet.

        Raises:
            RequestError: there is no tuned checkpoint, or the knobs cannot be.
        """
        weights = mixing.checked(method, some(method, base, tuned))
        ramp.check(method)
        return cls(method, *words.read(base, tuned), mixing, ramp, weights)

    @property
    def sources(self) -> list[Checkpoint]:
        """Base and tuned models."""
        return [self.base, *self.tuned]

    def change(self, keep: Keep, tensor: TensorFacts, models: list[Tensor]) -> Tensor:
        """The merged change of a piece: tau."""
        base, *tuned = models
        kept = [keep(tensor, n, model - base) for n, model in enumerate(tuned)]
        self.count("kept_share", kept)
        for change, weight in zip(kept, self.weights, strict=True):
            if weight != 1:
                change.mul_(weight)
        total = kept[0].clone()
        for change in kept[1:]:
            total += change
        if self.mixing.merge == "ties":
            return agreeing(kept, total.sign_(), self.weights if self.mixing.normalizes else None)
        return total.div_(sum(self.weights)) if self.mixing.normalizes else total

    def write(self, keep: Keep, out: Path | None, whole: Whole = False) -> Outcome:
        """theta, in a new folder; facts and layers are those that all merges have, and the share kept of each change."""

        def combine(tensor: TensorFacts, models: list[Tensor]) -> Tensor:
            return torch.add(models[0], self.change(keep, tensor, models), alpha=self.ramp(tensor))

        return self.written(combine, out, whole)

    def written(self, combine: Combine, out: Path | None, whole: Whole = False) -> Outcome:
        """As `write`, with a formula of the method's own, which calls `change` once for every piece."""
        assert out is not None
        facts = written(self.method, self.base, self.tuned, combine, out, whole)
        shares = {name: [one / total for one in counts] for name, (counts, total) in self.counted.items()}
        return Outcome(Path(out), facts={**facts, **shares}, layers=by_depth(self.base, self.ramp))

    def as_large(self, keep: Keep, whole: Whole = False) -> Keep:
        """What is kept of a tensor's change, grown to the size (L1 norm) that the whole change has, as mergekit does."""

        def sums(tensor: TensorFacts, models: list[Tensor]) -> Tensor:
            changes = [model - models[0] for model in models[1:]]
            before = [change.abs().sum() for change in changes]
            return torch.stack([*before, *(keep(tensor, n, one).abs().sum() for n, one in enumerate(changes))])

        sizes = totals(self.sources, sums, whole=whole).by_tensor

        def grown(tensor: TensorFacts, n: int, change: Tensor) -> Tensor:
            before, after = sizes[tensor.name].view(2, -1)[:, n].tolist()
            return keep(tensor, n, change).mul_(before / after if after else 1.0)

        return grown

    def count(self, name: str, tensors: Sequence[Tensor]) -> None:
        """Add to a fact: the share of entries that are not 0, of each of some tensors over all pieces."""
        found = [int(numpy.count_nonzero(tensor.numpy() != 0)) for tensor in tensors]  # of numbers a fifth of the time
        with self._lock:
            known, total = self.counted.get(name, ([0] * len(found), 0))
            self.counted[name] = ([a + b for a, b in zip(known, found, strict=True)], total + tensors[0].numel())


def agreeing(kept: Sequence[Tensor], sign: Tensor, weights: Sequence[float] | None) -> Tensor:
    """The sum of the changes that have a sign, divided by the sum of their weights if given; 0 where there is none.

    Args:
        kept: the changes, which are used up: written in the operations that are fast on a processor.
        sign: 1, -1 or 0 for each number.
        weights: above 0, one for each change.
    """
    total, shares = torch.zeros_like(sign), torch.zeros_like(sign)
    for n, change in enumerate(kept):
        own = change.mul_(sign).relu_()
        total += own
        if weights is not None:
            shares.add_(own.sign_(), alpha=weights[n])
    if weights is not None:
        total.div_(shares.clamp_(min=min(weights)))
    return total.mul_(sign)


def from_size(change: Tensor, threshold: float) -> Tensor:
    """A change with 0 where its size is below a threshold; float32 tells a size from the next smaller one."""
    # hardshrink keeps what is larger than its bound: just below the threshold
    return hardshrink(change, max(0.0, float(numpy.nextafter(numpy.float32(threshold), numpy.float32(-1)))))
