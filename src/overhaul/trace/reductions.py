"""What `trace.capture` keeps of the states it sees: a few numbers that add up over batches.

A reduction is a function (state [b, t, d], mask [b, t]) -> result. Results of batches are joined with `+`, and so are whole
captures: the sum of two is what one capture of both would have given. A batch is reduced in float32 and joined in float64:
thousands of small batches would lose digits otherwise.

A function of your own is used in the same way: whatever it returns is added up (a tensor [d, d] is summed, a list grows).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from overhaul.errors import RequestError


def counted(state: Float[Tensor, "b t d"], mask: Bool[Tensor, "b t"]) -> Float[Tensor, "n d"]:
    """The states of the positions that count, without a copy where all do."""
    return state.flatten(0, 1) if bool(mask.all()) else state[mask]


def wide(value: Tensor) -> Tensor:
    """In float64, which Apple's devices lack."""
    return (value.cpu() if value.device.type == "mps" else value).double()


@dataclass(frozen=True, eq=False)
class Statistics:
    """What a state is like, over all positions that count. In float64.

    Attributes:
        count: number of positions.
        mean: of each feature, [d].
        second_moment: mean of squares of each feature, [d].
        max_abs: largest magnitude of each feature, [d].
        norm_mean: mean Euclidean norm of a position, [].
        norm_variance: its variance (divided by `count`), [].
        norm_max: the largest norm, [].
    """

    count: int
    mean: Float[Tensor, " d"]
    second_moment: Float[Tensor, " d"]
    max_abs: Float[Tensor, " d"]
    norm_mean: Float[Tensor, ""]
    norm_variance: Float[Tensor, ""]
    norm_max: Float[Tensor, ""]

    def __repr__(self) -> str:
        norms = f"norm {self.norm_mean:.4g} +- {self.norm_std:.4g}, at most {self.norm_max:.4g}"
        return f"Statistics: {self.count} positions, {len(self.mean)} features, {norms}"

    @property
    def norm_std(self) -> Float[Tensor, ""]:
        """Standard deviation of the norm."""
        return self.norm_variance.sqrt()

    def __add__(self, other: Statistics) -> Statistics:
        count = self.count + other.count
        share = other.count / count
        apart = other.norm_mean - self.norm_mean
        return Statistics(
            count,
            self.mean.lerp(other.mean, share),
            self.second_moment.lerp(other.second_moment, share),
            torch.maximum(self.max_abs, other.max_abs),
            self.norm_mean + share * apart,
            self.norm_variance.lerp(other.norm_variance, share) + share * (1 - share) * apart.square(),
            torch.maximum(self.norm_max, other.norm_max),
        )


def statistics(state: Float[Tensor, "b t d"], mask: Bool[Tensor, "b t"]) -> Statistics:
    """Mean, second moment, largest magnitude and norms: the reduction that one asks for first."""
    rows = counted(state, mask)
    squares = rows.square()  # all else but the mean comes from them: reductions of other kinds down a column are slow
    norms = squares.sum(1).sqrt()
    variance, norm_mean = torch.var_mean(norms, correction=0)
    moments = (rows.mean(0), squares.mean(0), squares.amax(0).sqrt(), norm_mean, variance, norms.amax())
    return Statistics(len(rows), *map(wide, moments))


@dataclass(frozen=True, eq=False)
class Turn:
    """How far a state was turned between two sites. In float64.

    Attributes:
        count: number of positions.
        mean: mean of 1 - cosine, in [0, 2] and exactly 0 where nothing moved, [].
    """

    count: int
    mean: Float[Tensor, ""]

    @property
    def cosine(self) -> Float[Tensor, ""]:
        """The mean cosine."""
        return 1 - self.mean

    def __add__(self, other: Turn) -> Turn:
        share = other.count / (self.count + other.count)
        return Turn(self.count + other.count, self.mean.lerp(other.mean, share))


def turn(first: Float[Tensor, "b t d"], second: Float[Tensor, "b s e"], mask: Bool[Tensor, "b t"]) -> Turn | None:
    """1 - cosine between two sites, as half the squared distance of unit vectors; None where their shapes differ."""
    if first.shape != second.shape:
        return None
    apart = F.normalize(counted(first, mask), dim=1) - F.normalize(counted(second, mask), dim=1)
    return Turn(len(apart), wide(apart.square().sum(dim=1).mean() / 2))


@dataclass(frozen=True, eq=False)
class Largest:
    """The positions with the largest norm, largest first.

    Attributes:
        limit: how many are kept.
        norms: [k], fewer than `limit` if fewer positions were seen.
        samples: which sample each lies in, counted over all batches in the order in which they ran, [k].
        positions: where in it, [k].
        seen: number of samples so far.
    """

    limit: int
    norms: Float[Tensor, " k"]
    samples: Int[Tensor, " k"]
    positions: Int[Tensor, " k"]
    seen: int

    def __add__(self, other: Largest) -> Largest:
        norms = torch.cat([self.norms, other.norms])
        best = norms.argsort(descending=True, stable=True)[: self.limit]
        samples = torch.cat([self.samples, other.samples + self.seen])[best]
        positions = torch.cat([self.positions, other.positions])[best]
        return Largest(self.limit, norms[best], samples, positions, self.seen + other.seen)


def largest(limit: int) -> Callable[[Tensor, Tensor], Largest]:
    """The `limit` positions with the largest norm: where massive activations lie.

    Raises:
        RequestError: `limit` is below 1.
    """
    if limit < 1:
        raise RequestError(f"largest({limit}) keeps nothing; ask for at least one position.")

    def reduce(state: Tensor, mask: Tensor) -> Largest:
        norms = torch.linalg.vector_norm(counted(state, mask), dim=1)
        samples, positions = mask.nonzero(as_tuple=True)
        best = norms.argsort(descending=True, stable=True)[:limit]
        return Largest(limit, norms[best], samples[best], positions[best], len(mask))

    return reduce


@dataclass(frozen=True, eq=False)
class LastTokens:
    """One state for each sample, in the order in which they ran.

    Attributes:
        states: [n, d].
    """

    states: Float[Tensor, "n d"]

    def __repr__(self) -> str:
        return f"LastTokens: states {list(self.states.shape)}"

    def __add__(self, other: LastTokens) -> LastTokens:
        return LastTokens(torch.cat([self.states, other.states]))


def last_token(state: Float[Tensor, "b t d"], mask: Bool[Tensor, "b t"]) -> LastTokens:
    """The state at the last position of each sample that counts.

    Raises:
        RequestError: a sample has no such position.
    """
    if not bool(mask.any(dim=1).all()):
        row = int((~mask.any(dim=1)).nonzero()[0])
        raise RequestError(f"Sample {row} of a batch has no position that counts, so no last one. Leave it out.")
    last = mask.shape[1] - 1 - mask.int().flip(1).argmax(dim=1)
    return LastTokens(state[torch.arange(len(state), device=state.device), last].clone())
