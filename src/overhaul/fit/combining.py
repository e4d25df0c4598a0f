"""Gradients of roles kept apart, for methods that combine them by more than a sum.

1. A combiner sees each role's gradient whole: over all micro-batches and all processes. Inner products of shards are summed
   over the processes (`Gradients.total`), so every process comes to the same direction.
2. All gradients but the last role's are kept beside the parameters: with two roles, one copy.
3. A combiner gives the direction parameter by parameter, in order, so that no further copy is made; clipping comes after.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from overhaul import processes
from overhaul.fit.parallel import Workers


@dataclass(frozen=True)
class Combined:
    """What a combiner makes of the gradients of one step.

    Attributes:
        direction: what the optimizer gets as the gradient: one tensor for each of `Gradients.parameters`, in order. It is
            used up one by one, so a generator needs no memory.
        curves: numbers about the step, recorded under these names.
    """

    direction: Iterable[Tensor]
    curves: Mapping[str, float]


@dataclass(frozen=True)
class Gradients:
    """The gradients of one step by role; of shards, this process's part.

    Attributes:
        parameters: those that some role has a gradient of.
        parts: role -> its gradient of each parameter, or None where it has none.
        optimizer: the one that will step.
        clip: to what norm the direction is scaled down afterwards; infinite for not at all.
        sharded: whether each process holds another part.
    """

    parameters: Sequence[Tensor]
    parts: Mapping[str, Sequence[Tensor | None]]
    optimizer: torch.optim.Optimizer
    clip: float
    sharded: bool

    def of(self, role: str) -> Iterator[Tensor]:
        """A role's gradient, float32, one parameter after the other; zeros where it has none."""
        for parameter, part in zip(self.parameters, self.parts[role], strict=True):
            yield torch.zeros_like(local(parameter), dtype=torch.float32) if part is None else local(part).float()

    def total(self, values: Tensor) -> list[float]:
        """Sums over this process's part of the parameters, made sums over all of them."""
        return (processes.total(values) if self.sharded else values).tolist()


Combine = Callable[[Gradients], Combined]


def local(tensor: Tensor) -> Tensor:
    """This process's part of a shard; any other tensor as it is."""
    part = getattr(tensor, "to_local", None)
    return tensor.detach() if part is None else part().detach()


class Apart:
    """Collects the gradients of one step, role by role, and puts their combination in their place."""

    def __init__(self, team: Workers, optimizer: torch.optim.Optimizer) -> None:
        self.team, self.optimizer = team, optimizer
        self.parameters = [parameter for _, parameter in team.named]
        self.kept: dict[str, list[Tensor | None]] = {}

    def put_aside(self, role: str) -> None:
        """Keep what has been accumulated as this role's gradient, and begin anew."""
        self.kept[role] = [parameter.grad for parameter in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None

    @torch.no_grad()
    def combine(self, combine: Combine, clip: float) -> Mapping[str, float]:
        """Make the combination the gradient of the parameters; the combiner's curves."""
        places = [n for n in range(len(self.parameters)) if any(part[n] is not None for part in self.kept.values())]
        used = [self.parameters[n] for n in places]
        parts = {role: [part[n] for n in places] for role, part in self.kept.items()}
        gradients = Gradients(used, parts, self.optimizer, clip, self.team.sharded)
        combined = combine(gradients)
        for n, (parameter, direction) in enumerate(zip(used, combined.direction, strict=True)):
            # written into a gradient that is there already: the last role's, or another's where that has none
            place = next(part[n] for part in reversed(parts.values()) if part[n] is not None)
            assert place is not None
            local(place).copy_(direction)
            parameter.grad = place
        return combined.curves
