"""What mergekit makes of one tensor of several models, method by method, as sums, ranks and an element-wise formula.

    linear           sum_i w_i m_i / sum_i w_i
    slerp, nuslerp   sin((1 - t) omega) / sin(omega) a + sin(t omega) / sin(omega) b          omega: between a and b
    model_stock      t mean_i(m_i) + (1 - t) m_0,   t = k c / (1 + (k - 1) c)                 c: mean cosine of the changes
    passthrough      s m
    all others       m_0 + lambda sum_i w_i keep(m_i - m_0)                                   (`Changes`)

All is counted in the dtype that mergekit counts in: `dtype`, or that of the models' files. Where that is bfloat16, changes
are rounded to it before they are weighed, as mergekit rounds them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from overhaul.merge.della import chances
from overhaul.merge.slerp import PARALLEL
from overhaul.weights import Cut, TensorFacts, uniform

TINY = 1e-7
"""A tensor whose L1 norm is smaller is not grown."""


@dataclass(frozen=True)
class Part:
    """A tensor of the new model, and all that is needed to make it.

    Attributes:
        inputs: where it lies in each model, by the name that it gets; the base first where the method has one.
        named: the models, as the file names them.
        shared: parameters that are one for all models.
        own: by name, the parameters that are one for each model (but the base, where the method says so).
        dtype: in which it is counted.
        has_base: whether the first of the inputs is the base.
        one_place: whether it lies at the same place in all of them; slices can lay a block on another one.
    """

    inputs: tuple[TensorFacts, ...]
    named: tuple[str, ...]
    shared: Mapping[str, Any]
    own: Mapping[str, Sequence[Any]]
    dtype: torch.dtype
    has_base: bool
    one_place: bool

    @property
    def facts(self) -> TensorFacts:
        """The first input."""
        return self.inputs[0]

    def changes(self, models: Sequence[Tensor]) -> list[Tensor]:
        """m_i - m_0 of a piece, in the dtype that is counted in."""
        base, *tuned = self.held(models)
        return [model - base for model in tuned]

    def held(self, models: Sequence[Tensor]) -> list[Tensor]:
        """A piece of the models in the dtype that is counted in."""
        return [model.to(self.dtype) for model in models]


@dataclass
class Found:
    """What passes over the files found before the last one writes.

    Attributes:
        cuts: by tensor, where the rankings of changes end.
        sums: by tensor, what `Formula.sums` adds up to.
        seed: of the random draws.
    """

    cuts: Mapping[str, Sequence[Cut]] = field(default_factory=dict)
    sums: Mapping[str, Sequence[float]] = field(default_factory=dict)
    seed: int = 0


def linear(part: Part, _: Found, tensor: TensorFacts, models: list[Tensor]) -> Tensor:
    """The mean, or the sum where `normalize` is false."""
    held = [one.to(torch.promote_types(part.dtype, torch.float32)) for one in part.held(models)]
    total = torch.zeros_like(held[0])
    for model, weight in zip(held, part.own["weight"], strict=True):
        total.add_(model, alpha=weight)
    if part.shared["normalize"]:
        total.div_(torch.tensor(part.own["weight"], dtype=total.dtype).sum())
    return total.to(part.dtype)


def passthrough(part: Part, _: Found, tensor: TensorFacts, models: list[Tensor]) -> Tensor:
    """The model itself, times `scale`."""
    (scale,) = part.own["scale"]
    (model,) = part.held(models)
    return model if scale is None else model * scale


def products(part: Part, _: Found, tensor: TensorFacts, models: list[Tensor]) -> Tensor:
    """Sums for an angle: <a, b>, <a, a>, <b, b>; of changes where there is a base beside the two."""
    a, b = (one.double() for one in (part.changes(models) if len(models) == 3 else part.held(models)))
    return torch.stack([(a * b).sum(), a.square().sum(), b.square().sum()])


def slerp(part: Part, found: Found, tensor: TensorFacts, models: list[Tensor]) -> Tensor:
    """On the arc from the base; nearly parallel tensors on the line."""
    wide = torch.promote_types(part.dtype, torch.float32)
    a, b = (one.to(wide) for one in part.held(models))
    product, *squares = found.sums[tensor.name]
    lengths = [length if (length := math.sqrt(one)) > 1e-8 else 1.0 for one in squares]
    turn = torch.tensor(product / lengths[0] / lengths[1], dtype=wide).clamp(-1, 1)
    t = torch.tensor(part.shared["t"], dtype=wide)
    if turn.abs() > PARALLEL:
        return ((1 - t) * a + t * b).to(part.dtype)
    angle = turn.acos()
    ours, theirs = ((share * angle).sin() / angle.sin() for share in (1 - t, t))
    return (ours * a + theirs * b).to(part.dtype)


def nuslerp(part: Part, found: Found, tensor: TensorFacts, models: list[Tensor]) -> Tensor:
    """On the arc between two models or, with a base, between their changes; the weights say where."""
    held = part.held(models)
    a, b = part.changes(models) if part.has_base else held
    product, *squares = found.sums[tensor.name]
    lengths = [max(math.sqrt(one), TINY) for one in squares]
    turn = torch.tensor(product / lengths[0] / lengths[1], dtype=part.dtype).clamp(-1, 1)
    first, second = part.own["weight"]
    t = 0.5 if abs(first + second) < 1e-6 else second / (first + second)
    if 1 - turn.square() <= 1e-16:
        made = (1 - t) * a + t * b
    else:
        angle = turn.acos()
        made = (((1 - t) * angle).sin() * a + (t * angle).sin() * b) / angle.sin()
    return held[0] + made if part.has_base else made


def pairs(part: Part, _: Found, tensor: TensorFacts, models: list[Tensor]) -> Tensor:
    """Sums for the angles between all changes: their squares, then the product of each pair."""
    changes = [one.double() for one in part.changes(models)]
    squares = [one.square().sum() for one in changes]
    return torch.stack([*squares, *((a * b).sum() for a, b in itertools.combinations(changes, 2))])


def model_stock(part: Part, found: Found, tensor: TensorFacts, models: list[Tensor]) -> Tensor:
    """Between the base and the mean of the others, the nearer to the base the wider the angles between the changes."""
    base, *tuned = part.held(models)
    count = len(tuned)
    sums = found.sums[tensor.name]
    lengths, dots = [math.sqrt(one) for one in sums[:count]], sums[count:]
    sizes = [max(a * b, 1e-6) for a, b in itertools.combinations(lengths, 2)]
    turns = [max(-1.0, min(1.0, dot / size)) for dot, size in zip(dots, sizes, strict=True)]
    turn = torch.tensor(turns, dtype=part.dtype).mean()
    divisor = 1 + (count - 1) * turn
    t = torch.zeros_like(turn) if divisor.abs() < 1e-6 else count * turn / divisor
    mean = sum(tuned[1:], tuned[0]) / count
    return t * mean + (1 - t) * base


Keeping = Literal["all", "largest", "middling", "drawn", "drawn by size"]


@dataclass(frozen=True)
class Changes:
    """The family of task arithmetic: what is kept of each change, weighed, summed, and added to the base.

    Attributes:
        keeping: which entries of a change are kept.
        elect: count only those that have the sign of the weighed sum; 0 counts as positive.
    """

    keeping: Keeping
    elect: bool

    def combine(self, part: Part, found: Found, tensor: TensorFacts, models: list[Tensor]) -> Tensor:
        """m_0 + lambda sum_i w_i keep(m_i - m_0), divided by the weights that count where `normalize` is true."""
        base = models[0].to(part.dtype)
        if len(models) == 1:
            return base
        kept = torch.stack([self._grown(part, found, tensor, n, one) for n, one in enumerate(part.changes(models))])
        weights = torch.tensor(part.own["weight"], dtype=part.dtype).view(-1, *[1] * base.ndim)
        kept.mul_(weights)
        if self.elect:
            sign = torch.copysign(torch.ones((), dtype=part.dtype), kept.sum(0))
            total = kept.mul_(sign).relu_().sum(0).mul_(sign)
            divisor = kept.sign_().mul_(weights).sum(0)  # of those that are left
            divisor[divisor == 0] = 1
        else:
            total, divisor = kept.sum(0), weights.sum(0)
            divisor[divisor.abs() < 1e-8] = 1
        if part.shared["normalize"]:
            total /= divisor
        if part.shared["lambda"] != 1:
            total *= part.shared["lambda"]
        return base + total

    def sizes(self, part: Part, models: list[Tensor]) -> list[Tensor]:
        """What is ranked: the sizes of the changes, once for every end of what is kept."""
        sizes = [one.abs().float() for one in part.changes(models)]
        return 2 * sizes if self.keeping == "middling" else sizes

    def ranks(self, part: Part) -> list[int]:
        """How many of the largest are in, for each model; for "middling", then also how many of these are too large."""
        count = part.facts.numbers
        kept = [int(density * count) for density in part.own["density"]]
        if self.keeping == "largest":
            return [max(1, one) if density > 0 else 0 for one, density in zip(kept, part.own["density"], strict=True)]
        above = [int(gamma * count) for gamma in part.own["gamma"]]
        last = [min(count, a + b) for a, b in zip(kept, above, strict=True)]
        return [*last, *(end - one for end, one in zip(last, kept, strict=True))]

    def ranked(self, part: Part) -> bool:
        """Whether a ranking is needed."""
        return self.keeping in ("largest", "middling") and any(one < 1 for one in part.own["density"])

    def measured(self, part: Part) -> bool:
        """Whether what is kept is grown, and so has to be measured before."""
        return self.keeping != "all" and part.shared["rescale"] and any(one < 1 for one in part.own["density"])

    def sums(self, part: Part, found: Found, tensor: TensorFacts, models: list[Tensor]) -> Tensor:
        """L1 norms of the changes, then of what is kept of each."""
        changes = part.changes(models)
        kept = [self._kept(part, found, tensor, n, one) for n, one in enumerate(changes)]
        return torch.stack([one.abs().double().sum() for one in (*changes, *kept)])

    def _grown(self, part: Part, found: Found, tensor: TensorFacts, n: int, change: Tensor) -> Tensor:
        """What is kept of a change; with `rescale`, at the L1 norm that the whole change has."""
        if self.keeping == "all" or part.own["density"][n] >= 1:
            return change
        kept = self._kept(part, found, tensor, n, change)
        if not part.shared["rescale"]:
            return kept
        exact = torch.float32 if self.keeping.startswith("drawn") and part.dtype == torch.float16 else part.dtype
        sums, count = found.sums[tensor.name], len(part.inputs) - 1
        before, after = (torch.tensor(sums[one], dtype=exact) for one in (n, count + n))
        return kept if before < TINY or after < TINY else (kept.to(exact) * (before / after)).to(part.dtype)

    def _kept(self, part: Part, found: Found, tensor: TensorFacts, n: int, change: Tensor) -> Tensor:
        density = part.own["density"][n]
        if self.keeping == "all" or density >= 1:
            return change
        if density <= 0:
            return torch.zeros_like(change)
        if self.keeping == "drawn":
            # the chance is a number of the dtype that is counted in: in bfloat16, 0.3 is 0.3008
            chance = torch.tensor(density, dtype=change.dtype if change.dtype == torch.bfloat16 else torch.float32)
            mask = uniform(found.seed, n, tensor, change) < chance
        elif self.keeping == "drawn by size":
            chance = chances(change.float(), density, part.own["epsilon"][n])
            mask = uniform(found.seed, n, tensor, change) < chance
        else:
            cuts, sizes = found.cuts[tensor.name], change.abs().float()
            mask = cuts[n].inside(sizes, tensor.start)
            if self.keeping == "middling":
                mask &= ~cuts[len(part.inputs) - 1 + n].inside(sizes, tensor.start)
        return change * mask.to(change.dtype)


Combine = Callable[[Part, Found, TensorFacts, list[Tensor]], Tensor]
