"""The k-th largest of all the numbers of a checkpoint, exactly, with the memory of a few pieces of a tensor.

1. A sample says between which two numbers the wanted one should lie. A pass over everything counts what lies above them
   and, number by number, what lies between. A sample that misled costs a further pass, never a wrong answer.
2. Non-negative float32 numbers are in the order of their bits read as integers, so a count of bits is a count of numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy
import torch
from torch import Tensor

from overhaul.weights.agreement import aligned
from overhaul.weights.index import Source, TensorFacts, check_alike
from overhaul.weights.pieces import Piece, Workspace, run

SAMPLE = 1 << 20
"""Numbers in a sample: the share of numbers above one is then known to a thousandth."""
STRETCHES = 4
"""Places in a tensor from which its part of the sample is read."""
SPREAD = 0.005
"""The sample's bracket reaches this share of all numbers to either side: ten times its standard error."""
BINS = 1 << 20
_END = 0x7F800000
"""The bits of infinity, which no number reaches."""

Sizes = Callable[[TensorFacts, list[Tensor]], Sequence[Tensor]]
"""(facts of the first model's tensor, pieces of the same tensor in each model) -> non-negative numbers to rank, of one
piece each."""
Ranks = Callable[[int], int | Sequence[int]]
"""(how many numbers there are) -> the rank that is wanted, in each ranking if they differ: 1 is the largest, 0 or less is
above all of them."""


@dataclass
class _Search:
    """Where the number with the wanted rank (1 is the largest) lies: its bits are in [low, high)."""

    rank: int
    low: int = 0
    high: int = _END
    first: tuple[int, int] | None = None  # the bracket to try first
    above: int = 0
    counts: Tensor | None = None

    @property
    def done(self) -> bool:
        return self.high - self.low == 1

    @property
    def bracket(self) -> tuple[int, int]:
        return self.first or (self.low, self.high)

    @property
    def shift(self) -> int:
        low, high = self.bracket
        return max(0, (high - low - 1).bit_length() - BINS.bit_length() + 1)

    def begin(self) -> None:
        low, high = self.bracket
        self.above, self.counts = 0, torch.zeros(((high - low - 1) >> self.shift) + 1, dtype=torch.int64)

    def narrow(self) -> None:
        """Draw the conclusion from a pass."""
        assert self.counts is not None
        low, high = self.bracket
        shift = self.shift
        self.first = None
        reached = self.above + self.counts.flip(0).cumsum(0)
        if self.above >= self.rank:
            self.low = high
        elif int(reached[-1]) < self.rank:
            self.high = low
        else:
            place = len(self.counts) - 1 - int(torch.searchsorted(reached, self.rank))
            self.low = low + (place << shift)
            self.high = min(self.low + (1 << shift), high)


def kth_largest(
    sources: Sequence[Source], sizes: Sizes, ranks: Ranks, *, by_tensor: bool = False
) -> dict[str, list[float]]:
    """The number of a rank among all numbers of a model, or among those of each tensor.

    Args:
        sources: checkpoints with the same tensors; integers and booleans are left out.
        sizes: makes what is ranked, a list for each ranking; it is called in several threads. Numbers are ranked in
            float32.
        ranks: which numbers are wanted.
        by_tensor: rank within each tensor, not within the model.

    Returns:
        By name of a tensor, one number for each ranking: the same for all tensors unless `by_tensor`; infinity where the
        rank is 0 or less, 0 where there are fewer numbers than the rank.

    Raises:
        RequestError: the checkpoints do not correspond.
        RunError: a number is not finite.
    """
    indexes = aligned(sources)
    check_alike(indexes, lambda tensor: tensor.dtype.is_floating_point)
    inputs = [
        [index.tensors[name] for index in indexes]
        for name, tensor in indexes[0].tensors.items()
        if tensor.dtype.is_floating_point and tensor.numbers
    ]
    found: dict[str, list[float]] = {}
    for group in [[tensors] for tensors in inputs] if by_tensor else [inputs]:
        values = _of_group(group, sizes, ranks)
        found |= {tensors[0].name: values for tensors in group}
    return found


@dataclass(frozen=True)
class Cut:
    """Where a ranking within a tensor ends: after so many numbers, of equal ones those that come first.

    Attributes:
        least: the smallest number that is still in; infinity where none is.
        equal: how many that are equal to it are in.
        before: how many of those lie before a piece, by where it starts.
    """

    least: float
    equal: int
    before: Mapping[int, int]

    def inside(self, sizes: Tensor, start: int) -> Tensor:
        """Which numbers of a piece are in (bool).

        Args:
            sizes: what was ranked, of the piece.
            start: of the piece in its tensor.
        """
        left = self.equal - self.before[start]
        if left <= 0:
            return sizes > self.least
        same = sizes == self.least
        if int(same.sum()) > left:  # the ranking ends in this piece
            same &= (same.flatten().cumsum(0) <= left).view(same.shape)
        return (sizes > self.least) | same


def cuts(
    inputs: Sequence[Sequence[TensorFacts]], sizes: Sizes, ranks: Callable[[TensorFacts], Sequence[int]]
) -> dict[str, list[Cut]]:
    """Where rankings within tensors end, to the number, also where many numbers are equal. Two passes and more.

    Args:
        inputs: for each tensor, where it lies in every model; not all need be of as many.
        sizes: as for `kth_largest`.
        ranks: of a tensor (the first model's), for each ranking how many numbers are in.

    Returns:
        By name of a tensor, a cut for each ranking.

    Raises:
        RunError: a number is not finite.
    """
    least = {tensors[0].name: _of_group([tensors], sizes, lambda _, one=tensors[0]: ranks(one)) for tensors in inputs}
    counted: dict[str, list[tuple[int, list[tuple[int, int]]]]] = {}

    def work(piece: Piece, space: Workspace) -> tuple[TensorFacts, list[tuple[int, int]]]:
        tensor = piece.inputs[0]
        held = zip(sizes(tensor, space.floats(piece)), least[tensor.name], strict=True)
        return tensor, [(int((one > value).sum()), int((one == value).sum())) for one, value in held]

    for tensor, counts in run(inputs, work, False, "ranking"):
        counted.setdefault(tensor.name, []).append((tensor.start, counts))
    return {
        one.name: [
            _cut(value, rank, [(start, *counts[n]) for start, counts in counted[one.name]])
            for n, (value, rank) in enumerate(zip(least[one.name], ranks(one), strict=True))
        ]
        for one, *_ in inputs
    }


def _cut(least: float, rank: int, counted: Sequence[tuple[int, int, int]]) -> Cut:
    """A cut, by (start of a piece, how many are larger in it, how many equal)."""
    before: dict[int, int] = {}
    same = 0
    for start, _, equal in counted:
        before[start], same = same, same + equal
    return Cut(least, rank - sum(above for _, above, _ in counted), before)


def _of_group(group: Sequence[Sequence[TensorFacts]], sizes: Sizes, ranks: Ranks) -> list[float]:
    numbers = sum(tensors[0].numbers for tensors in group)
    sample = [torch.cat(parts) for parts in zip(*_sizes_of(_sampled(group, numbers), sizes), strict=True)]
    wanted = ranks(numbers)
    wanted = [wanted] * len(sample) if isinstance(wanted, int) else wanted
    beyond = [math.inf if rank <= 0 else 0.0 for rank in wanted]
    if len(sample[0]) == numbers:  # of a small tensor the sample is all
        return [
            _number(*_ordered(taken, rank - 1)) if 0 < rank <= numbers else end
            for rank, taken, end in zip(wanted, sample, beyond, strict=True)
        ]
    searches = [
        _Search(rank, first=_bracket(taken, rank / numbers)) if 0 < rank <= numbers else None
        for rank, taken in zip(wanted, sample, strict=True)
    ]
    while open := {place: search for place, search in enumerate(searches) if search and not search.done}:
        _pass(group, sizes, open)
    return [_number(search.low) if search else end for search, end in zip(searches, beyond, strict=True)]


def _bracket(taken: Tensor, share: float) -> tuple[int, int]:
    """Bits between which a sample says that the number lies above which there is a share of all."""
    spread = SPREAD + 2 / len(taken)
    first, last = (round((share + way * spread) * len(taken)) for way in (-1, 1))
    found = _ordered(taken, max(first, 0), min(last, len(taken) - 1))
    return found[1] if last < len(taken) else 0, found[0] + 1 if first >= 0 else _END


def _ordered(taken: Tensor, *places: int) -> list[int]:
    """What would stand at these places if the bits were sorted from the largest on."""
    wanted = [len(taken) - 1 - place for place in places]
    parted = numpy.partition(taken.numpy(), wanted)
    return [int(parted[place]) for place in wanted]


def _sampled(group: Sequence[Sequence[TensorFacts]], numbers: int) -> list[list[TensorFacts]]:
    """Stretches of all tensors, about `SAMPLE` numbers in all, as if they were tensors."""
    stretches: list[list[TensorFacts]] = []
    for tensors in group:
        total = tensors[0].numbers
        count = math.ceil(total * min(1.0, SAMPLE / numbers) / STRETCHES)
        for start in range(0, total, max(count, math.ceil(total / STRETCHES))):
            stretches.append([_stretch(tensor, start, min(count, total - start)) for tensor in tensors])
    return stretches


def _stretch(tensor: TensorFacts, start: int, count: int) -> TensorFacts:
    """Some of a tensor's numbers, or the rows that they begin in, as if they were a tensor."""
    if not tensor.rows:
        return replace(tensor, shape=(count,), offset=tensor.offset + start * tensor.dtype.itemsize, start=start)
    width = math.prod(tensor.shape[1:])
    first, rows = start // width, max(1, count // width)
    parts = tuple((one, places[first : first + rows]) for one, places in tensor.rows)
    return replace(tensor, shape=(rows, *tensor.shape[1:]), rows=parts, start=first * width)


def _sizes_of(group: Sequence[Sequence[TensorFacts]], sizes: Sizes) -> Iterator[list[Tensor]]:
    """The bits of what is ranked, piece by piece."""

    def work(piece: Piece, space: Workspace) -> list[Tensor]:
        return [_bits(made).clone() for made in sizes(piece.inputs[0], space.floats(piece))]

    return run(group, work, False, "sampling")


def _pass(group: Sequence[Sequence[TensorFacts]], sizes: Sizes, searches: Mapping[int, _Search]) -> None:
    """Count once, for every search by the place of what it ranks."""

    def work(piece: Piece, space: Workspace) -> list[tuple[int, Tensor]]:
        made = sizes(piece.inputs[0], space.floats(piece))
        return [_count(_bits(made[place]), *search.bracket) for place, search in searches.items()]

    for search in searches.values():
        search.begin()
    waiting: list[list[Tensor]] = [[] for _ in searches]
    for counted in run(group, work, False, "ranking"):
        for search, kept, (above, inside) in zip(searches.values(), waiting, counted, strict=True):
            search.above += above
            kept.append(inside)
            if sum(map(len, kept)) > BINS:
                _add(search, kept)
    for search, kept in zip(searches.values(), waiting, strict=True):
        _add(search, kept)
        search.narrow()


def _count(bits: Tensor, low: int, high: int) -> tuple[int, Tensor]:
    """How many lie above a bracket, and those inside, from its lower end on."""
    held = bits.numpy()  # whose comparisons and choices are several times as fast as torch's
    reached, beyond = held >= low, held >= high
    return int(numpy.count_nonzero(beyond)), torch.from_numpy(held[reached ^ beyond] - numpy.int32(low))


def _add(search: _Search, kept: list[Tensor]) -> None:
    assert search.counts is not None
    if kept:
        bins = torch.cat(kept) >> search.shift
        search.counts += torch.bincount(bins, minlength=len(search.counts))
        kept.clear()


def _bits(values: Tensor) -> Tensor:
    return values.reshape(-1).float().view(torch.int32)


def _number(bits: int) -> float:
    return torch.tensor(bits, dtype=torch.int32).view(torch.float32).item()
