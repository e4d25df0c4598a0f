"""What is left of value vectors: the same places before and after, by direction and by the tokens that they are read by.

    cosine     <v, v'> / (||v|| ||v'||), at most 1            distance   ||v - v'||
    Jaccard    |T_k(v) & T_k(v')| / |T_k(v) | T_k(v')|,  0 where v or v' is zero
    kept       of the concept's tokens in T_k(v), the share in T_k(v')
    trace      mean of   n(max(cosine, 0) min(1, ||v'|| / ||v||))   and   n(Jaccard)
               n(x) = max(0, (x - r) / (1 - r)),   r = what random vectors as long as v have in place of v'

1 is unchanged, 0 is what a random vector keeps. T_k(v') is read by the unembedding of the model before, and once more by its
own: a method that turns the output head would else pass for one that erases.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from overhaul.value_vectors import Location, Unembedding, ValueVectors
from overhaul.value_vectors.search import Words


@dataclass(frozen=True)
class Trace:
    """One vector before and after.

    Attributes:
        location: where it lies.
        cosine: between the two, 0 where one is zero.
        distance: the length of their difference.
        relative: the same, as a share of the length before; None where that is zero.
        jaccard: of tokens, both read by the unembedding of before.
        jaccard_own: of tokens, each read by the unembedding of its own model.
        kept: share of the concept's tokens that are still there, by the unembedding of its own model; None where there were
            none, or no concept is given.
        retained: the one number, 1 for unchanged and 0 for a random vector.
    """

    location: Location
    cosine: float
    distance: float
    relative: float | None
    jaccard: float
    jaccard_own: float
    kept: float | None
    retained: float


@dataclass(frozen=True)
class Chance:
    """What random vectors have in common with one: mean of max(cosine, 0), and mean Jaccard."""

    cosine: float
    jaccard: float


def traces(
    before: ValueVectors,
    after: ValueVectors,
    locations: Sequence[Location],
    signs: Sequence[int],
    k: int,
    draws: int,
    draw: torch.Generator,
    gain: bool,
    words: Words | None,
) -> tuple[list[Trace], list[Chance]]:
    """Compare the vectors of two models at some places.

    Args:
        before: of the original.
        after: of the edited model.
        locations: of the vectors.
        signs: of each, 1 or -1: whether it or its negative is read.
        k: tokens that a vector is read by.
        draws: random vectors for each, that the one number is held against.
        draw: they are drawn from it.
        gain: read them with each model's own gain of the final norm.
        words: of the concept, or None.

    Returns:
        Of each vector its trace, and what random ones have.
    """
    old = torch.stack([sign * before.vector(one) for one, sign in zip(locations, signs, strict=True)])
    new = torch.stack([sign * after.vector(one) for one, sign in zip(locations, signs, strict=True)])
    first, second = before.unembedding(gain), after.unembedding(gain)
    noise = torch.randn(draws, *old.shape, generator=draw)
    noise *= old.norm(dim=1, keepdim=True) / noise.norm(dim=2, keepdim=True)
    tops, news, owns = first.top(old, k)[0], first.top(new, k)[0], second.top(new, k)[0]
    chances = _chances(old, tops, noise, first, k)
    found: list[Trace] = []
    for n, location in enumerate(locations):
        v, w, zero = old[n].double(), new[n].double(), not (bool(old[n].any()) and bool(new[n].any()))
        cosine = 0.0 if zero else min(1.0, float(v @ w / (v.norm() * w.norm())))
        distance, length = float((v - w).norm()), float(v.norm())
        same, own = (0.0 if zero else jaccard(tops[n], one) for one in (news[n], owns[n]))
        direction = 0.0 if zero else max(cosine, 0.0) * min(1.0, float(w.norm()) / length)
        shares = ((direction, chances[n].cosine), (same, chances[n].jaccard))
        retained = sum(normalised(x, r) for x, r in shares) / 2
        relative = distance / length if length else None
        kept = None if words is None else _kept(tops[n], owns[n], words, bool(new[n].any()))
        found.append(Trace(location, cosine, distance, relative, same, own, kept, retained))
    return found, chances


def jaccard(first: Int[Tensor, " k"], second: Int[Tensor, " k"]) -> float:
    """Of two sets of tokens, the share that both have."""
    both = int(torch.isin(first, second).sum())
    return both / (len(first) + len(second) - both)


def normalised(value: float, chance: float) -> float:
    """1 stays 1, chance becomes 0, and less than chance 0 as well."""
    return max(0.0, (value - chance) / (1 - chance)) if chance < 1 else 0.0


def _chances(
    old: Float[Tensor, "n d"], tops: Int[Tensor, "n k"], noise: Float[Tensor, "r n d"], read_by: Unembedding, k: int
) -> list[Chance]:
    """Of each vector, what the random ones that are drawn for it have in common with it."""
    cosines = torch.nn.functional.cosine_similarity(noise, old[None], dim=2).clamp_min(0).mean(dim=0)
    drawn = read_by.top(noise.flatten(0, 1), k)[0].view(*noise.shape[:2], k)
    return [
        Chance(float(cosines[n]), sum(jaccard(tops[n], one[n]) for one in drawn) / len(drawn)) for n in range(len(old))
    ]


def _kept(old: Int[Tensor, " k"], new: Int[Tensor, " k"], words: Words, there: bool) -> float | None:
    of_concept = old[words[old]]
    if not len(of_concept):
        return None
    return float(torch.isin(of_concept, new).double().mean()) if there else 0.0
