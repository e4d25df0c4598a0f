"""Numbers about checkpoints: norms and cosines by tensor and by depth, with the memory of a few pieces of a tensor."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from overhaul.weights.agreement import aligned
from overhaul.weights.index import Source, TensorFacts, check_alike
from overhaul.weights.pieces import Piece, Whole, Workspace, run


@dataclass(frozen=True)
class Reduction:
    """One number for every tensor, for all tensors of a depth together, and for the model as one vector.

    Attributes:
        by_tensor: by name.
        by_depth: by (path of the stack, depth), from the first block to the last.
        total: of all tensors.
    """

    by_tensor: Mapping[str, float]
    by_depth: Mapping[tuple[str, int], float]
    total: float


@dataclass(frozen=True)
class Totals:
    """Sums over the weights [k], float64: by tensor, by (path of the stack, depth), and over all."""

    by_tensor: Mapping[str, Tensor]
    by_depth: Mapping[tuple[str, int], Tensor]
    total: Tensor


def totals(
    sources: Sequence[Source], sums: Callable[[TensorFacts, list[Tensor]], Tensor], *, whole: Whole = False
) -> Totals:
    """Sums over the weights. Integers and booleans are left out.

    Args:
        sources: checkpoints with the same tensors.
        sums: of the same tensor or piece of it in all models, the sums to add up [k]; is called in several threads.
        whole: as in `stream`, for sums that are not taken number by number.

    Raises:
        RequestError: as in `stream`.
        RunError: a number is not finite.
    """
    indexes = aligned(sources)
    check_alike(indexes, lambda tensor: tensor.dtype.is_floating_point)
    inputs = [
        [index.tensors[name] for index in indexes]
        for name, tensor in indexes[0].tensors.items()
        if tensor.dtype.is_floating_point and tensor.numbers
    ]

    def work(piece: Piece, space: Workspace) -> tuple[TensorFacts, Tensor]:
        return piece.inputs[0], sums(piece.inputs[0], space.floats(piece)).to(torch.float64, copy=True)

    by_tensor: dict[str, Tensor] = {}
    by_depth: dict[tuple[str, int], Tensor] = {}
    for file, group in itertools.groupby(inputs, lambda tensors: tensors[0].file):
        for tensor, part in run(list(group), work, whole, f"comparing {file.name if file else ''}"):
            by_tensor[tensor.name] = by_tensor.get(tensor.name, 0) + part
            place = (tensor.stack, tensor.depth)
            by_depth[place] = by_depth.get(place, 0) + part
    return Totals(
        by_tensor, {place: by_depth[place] for place in sorted(by_depth)}, torch.stack(list(by_tensor.values())).sum(0)
    )


def sums_of(
    inputs: Sequence[Sequence[TensorFacts]],
    sums: Callable[[TensorFacts, list[Tensor]], Tensor],
    *,
    whole: Whole = False,
) -> dict[str, list[float]]:
    """Sums over single tensors, by name of the first: of tensors that need not be of whole models.

    Args:
        inputs: for each tensor, where it lies in every model; not all need be of as many.
        sums: as for `totals`; how many there are may differ between tensors.
        whole: as in `totals`.

    Raises:
        RunError: a number is not finite.
    """

    def work(piece: Piece, space: Workspace) -> tuple[str, Tensor]:
        return piece.inputs[0].name, sums(piece.inputs[0], space.floats(piece)).to(torch.float64, copy=True)

    found: dict[str, Tensor] = {}
    for name, part in run(inputs, work, whole, "measuring"):
        found[name] = found[name] + part if name in found else part
    return {name: total.tolist() for name, total in found.items()}


def reduction(
    sources: Sequence[Source],
    sums: Callable[[TensorFacts, list[Tensor]], Tensor],
    finish: Callable[[Tensor], float],
    *,
    whole: Whole = False,
) -> Reduction:
    """Numbers that come from sums over the weights: norms, cosines, counts. For the other arguments and errors see `totals`.

    Args:
        sources: checkpoints with the same tensors.
        sums: the sums to add up [k].
        finish: makes the number out of the sums [k], float64.
        whole: as in `totals`.
    """
    found = totals(sources, sums, whole=whole)
    return Reduction(
        {name: finish(value) for name, value in found.by_tensor.items()},
        {place: finish(value) for place, value in found.by_depth.items()},
        finish(found.total),
    )


def delta_norms(base: Source, tuned: Source) -> Reduction:
    """||tuned - base||, the Euclidean length of what training did. For errors see `reduction`."""
    return reduction([base, tuned], lambda _, m: (m[1] - m[0]).square().sum()[None], lambda total: total.sqrt().item())


def relative_change(base: Source, tuned: Source) -> Reduction:
    """||tuned - base|| / ||base||; 0 where the base is zero. For errors see `reduction`."""

    def sums(_: TensorFacts, models: list[Tensor]) -> Tensor:
        return torch.stack([(models[1] - models[0]).square().sum(), models[0].square().sum()])

    def finish(totals: Tensor) -> float:
        moved, size = totals.tolist()
        return math.sqrt(moved / size) if size else 0.0

    return reduction([base, tuned], sums, finish)


def cosine(a: Source, b: Source, base: Source | None = None) -> Reduction:
    """The cosine between two models, or between their changes since `base`; 0 where one of them is zero.

    Raises:
        RequestError: as in `stream`.
        RunError: a number is not finite.
    """

    def sums(_: TensorFacts, models: list[Tensor]) -> Tensor:
        x, y = (model - models[2] for model in models[:2]) if base is not None else models
        return torch.stack([(x * y).sum(), x.square().sum(), y.square().sum()])

    def finish(totals: Tensor) -> float:
        product, x, y = totals.tolist()
        return product / math.sqrt(x * y) if x and y else 0.0

    return reduction([a, b] if base is None else [a, b, base], sums, finish)
