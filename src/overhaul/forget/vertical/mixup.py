"""Mixing embeddings of samples: all pairs of one label, or each sample with a random member of its class."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

WEIGHTS = (0.25, 0.5, 0.75)
"""Of the first sample of a pair."""


class Mixing(NamedTuple):
    """Which embeddings are mixed, alike in every party: row r is weight * H[first] + (1 - weight) * H[second].

    Attributes:
        first: [m] a sample; the row has its label.
        second: [m] another one of that label.
        weight: [m] of the first.
        credited: [m] whose gradient the released code counts the row's as.
    """

    first: Int[Tensor, " m"]
    second: Int[Tensor, " m"]
    weight: Float[Tensor, " m"]
    credited: Int[Tensor, " m"]


def pair_mixing(labels: Int[Tensor, " n"]) -> Mixing:
    """All pairs within each label, each with every weight: 3 n (n - 1) / 2 rows of n samples; one alone stays itself."""
    parts: list[Mixing] = []
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        if len(members) == 1:
            parts.append(Mixing(members, members, torch.ones(1, device=labels.device), members))
            continue
        first, second = torch.combinations(members).repeat_interleave(len(WEIGHTS), dim=0).T
        weight = torch.tensor(WEIGHTS, device=labels.device).repeat(len(first) // len(WEIGHTS))
        chunks = first.clone().tensor_split(len(members))
        credited = [part.fill_(sample) for sample, part in zip(members, chunks, strict=True)]
        parts.append(Mixing(first, second, weight, torch.cat(credited)))
    return Mixing(*(torch.cat(column) for column in zip(*parts, strict=True)))


def class_mixing(labels: Int[Tensor, " n"]) -> Mixing:
    """Each sample with a random member of its own class; one that is alone stays itself."""
    every = torch.arange(len(labels), device=labels.device)
    second, weight = every.clone(), torch.rand(len(labels)).to(labels.device)  # Beta(1, 1) is uniform
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        second[members] = members[torch.randperm(len(members)).to(labels.device)]
        if len(members) == 1:
            weight[members] = 1.0
    return Mixing(every, second, weight, every)


def mix(embedded: Float[Tensor, "n d"], mixing: Mixing) -> Float[Tensor, "m d"]:
    """The mixed rows; autograd through it is the chain rule."""
    weight = mixing.weight[:, None].to(embedded.dtype)
    return weight * embedded[mixing.first] + (1 - weight) * embedded[mixing.second]


class LegacyMix(torch.autograd.Function):
    """`mix` whose gradient is the released code's: each sample gets the mean over the rows it is credited with."""

    @staticmethod
    def forward(ctx: Any, embedded: Tensor, mixing: Mixing) -> Tensor:
        """As `torch.autograd.Function` asks."""
        ctx.credited, ctx.shape = mixing.credited, embedded.shape
        return mix(embedded, mixing)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """As `torch.autograd.Function` asks."""
        rows = torch.bincount(ctx.credited, minlength=ctx.shape[0]).clamp(min=1).to(gradient.dtype)
        return gradient.new_zeros(ctx.shape).index_add_(0, ctx.credited, gradient) / rows[:, None], None
