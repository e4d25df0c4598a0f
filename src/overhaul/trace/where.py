"""Which part of a state an edit reaches: positions of a sequence, however it is padded and cut into forwards, and samples.

1. Positions are counted in the whole sequence: a forward that goes on from a cache holds the last ones alone. Those that it
   does not hold are left for another forward.
2. Negative ones are counted back from the end of each sample's own text, so that -1 is its last token on whichever side
   the padding lies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad

from overhaul.errors import RequestError
from overhaul.trace.watch import Shape

Select = int | slice | Sequence[int] | Tensor | None
"""A number (negative from the end), a slice, numbers, or a mask of booleans; None selects all."""


@dataclass(frozen=True, eq=False)
class Where:
    """The part of a state that an edit reaches.

    Attributes:
        positions: tokens or image positions, counted in the sequence, padding and what a cache holds included. Negative
            ones count from the end of each sample's own text: -1 is its last token, also where padding follows it; in
            generation, of what is said so far. A mask is [t], or [b, t] for other positions in each sample.
        samples: rows of the batch; a mask is [b].
    """

    positions: Select = None
    samples: Select = None

    @property
    def everything(self) -> bool:
        """Whether nothing is left out."""
        return self.positions is None and self.samples is None

    def region(self, shape: torch.Size, site: Site, device: torch.device) -> Tensor | None:
        """The selected positions of a state [b, t, d] as a mask [b, t], or None where all are.

        Raises:
            RequestError: the selection does not fit, or selects nothing. With a cache, the positions may lie in another
                forward: the mask is then empty.
        """
        if self.everything:
            return None
        extent = Extent.of(shape, site.shape)
        positions = _positions(self.positions, extent, site)
        samples = _selected(self.samples, extent.batch, f"samples for {site.name}")[:, None]
        if not bool((positions & samples).any()) and not extent.cached:
            raise RequestError(
                f"The edit of {site.name} selects none of {extent.batch} samples with {extent.total} positions."
            )
        return (positions & samples)[:, extent.start :].to(device)


@dataclass(frozen=True)
class Extent:
    """Where a state [b, t, d] lies in its sequences.

    Attributes:
        batch: samples.
        start: positions that a cache holds before it.
        total: positions until its end.
        ends: of each sample, positions until the end of its last real token [b].
        cached: whether more may come in other forwards.
    """

    batch: int
    start: int
    total: int
    ends: Tensor
    cached: bool

    @classmethod
    def of(cls, state: torch.Size, shape: Shape) -> Extent:
        """Of a state, by what is known of the forward that runs; of one of another length, by itself."""
        batch, length = state[:2]
        of_stream = shape.value is not None and len(shape.value) == 3 and shape.value[1] == length
        start = shape.start if of_stream else 0
        total = start + length
        ends = torch.full((batch,), total)
        if of_stream and shape.mask is not None and tuple(shape.mask.shape) == (batch, total):
            ends = (shape.mask.cpu().bool() * torch.arange(1, total + 1)).amax(dim=1)
        return cls(batch, start, total, ends, shape.cached and of_stream)


@dataclass(frozen=True)
class Site:
    """A site while forwards run: its name, what is known of the stream, and which edits were done, by site and number."""

    name: str
    shape: Shape = field(default_factory=Shape)
    reached: set[tuple[str, int]] = field(default_factory=set[tuple[str, int]])


EVERYWHERE = Where()


def _positions(select: Select, extent: Extent, site: Site) -> Tensor:
    """A selection of positions as a mask over whole sequences, [b, total], or [1, total] for all samples."""
    what = f"positions for {site.name}"
    if select is None:
        return torch.ones(1, extent.total, dtype=torch.bool)
    if isinstance(select, slice):
        counted_back = any(bound is not None and bound < 0 for bound in (select.start, select.stop))
        ends = extent.ends.tolist() if counted_back else [extent.total]
        return torch.stack([pad(_selected(select, end, what), (0, extent.total - end)) for end in ends])
    numbers = torch.as_tensor([select] if isinstance(select, int) else select).cpu()
    if numbers.dtype == torch.bool or numbers.ndim == 2:
        return _masked(numbers, extent, site)
    _check_numbers(numbers, extent.total, what)
    found = torch.zeros(extent.batch, extent.total, dtype=torch.bool)
    forwards, back = numbers[numbers >= 0].long(), numbers[numbers < 0].long()
    some = extent.ends[extent.ends > 0]  # of a sample that is nothing but padding there is no last token
    short = back[back < -(int(some.min()) if len(some) else 0)]
    outside = [*short.tolist(), *([] if extent.cached else forwards[forwards >= extent.total].tolist())]
    if outside:
        size = int(some.min()) if len(short) and len(some) else extent.total
        raise RequestError(
            f"The {what} name {outside[0]}, but there are only {size} in this forward (0 to {size - 1})."
        )
    found[:, forwards[forwards < extent.total]] = True
    for row, end in enumerate(extent.ends.tolist()):
        found[row, end + back if end else []] = True
    return found


def _masked(mask: Tensor, extent: Extent, site: Site) -> Tensor:
    """A mask of positions over whole sequences; what came after it was made is not selected."""
    lacking = extent.total - mask.shape[-1]
    fits = lacking == 0 or (lacking > 0 and extent.start > 0)
    if mask.ndim == 1 and not fits:
        raise RequestError(
            f"The mask of positions for {site.name} is {described(mask)}, but there are {extent.total}: give "
            f"[{extent.total}]."
        )
    if mask.dtype != torch.bool or mask.ndim > 2 or not fits or (mask.ndim == 2 and len(mask) != extent.batch):
        raise RequestError(
            f"The mask of positions for {site.name} is {described(mask)}, but the state has {extent.batch} samples with "
            f"{extent.total} positions: give booleans [{extent.batch}, {extent.total}], or [{extent.total}] for all samples."
        )
    return pad(torch.atleast_2d(mask), (0, lacking))


def _selected(select: Select, size: int, what: str) -> Tensor:
    """A selection along one dimension as a mask [size]."""
    mask = torch.zeros(size, dtype=torch.bool)
    if select is None:
        return ~mask
    if isinstance(select, slice):
        mask[select] = True
        return mask
    numbers = torch.as_tensor([select] if isinstance(select, int) else select).cpu()
    if numbers.dtype == torch.bool:
        if tuple(numbers.shape) != (size,):
            raise RequestError(f"The mask of {what} is {described(numbers)}, but there are {size}: give [{size}].")
        return numbers
    _check_numbers(numbers, size, what)
    outside = numbers[(numbers < -size) | (numbers >= size)].tolist()
    if outside:
        raise RequestError(
            f"The {what} name {outside[0]}, but there are only {size} in this forward (0 to {size - 1})."
        )
    mask[numbers.long()] = True
    return mask


def _check_numbers(numbers: Tensor, size: int, what: str) -> None:
    if numbers.is_floating_point() or numbers.ndim != 1:
        raise RequestError(f"The {what} are {described(numbers)}: give whole numbers [k], or booleans [{size}].")


def described(value: object) -> str:
    """A value in a message: its kind, of a tensor its shape and dtype."""
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)} of {str(value.dtype).removeprefix('torch.')}"
    return f"{type(value).__name__}"
