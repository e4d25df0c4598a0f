"""Tensors of several files, streamed side by side through a function: a piece at a time, in several threads.

1. Memory is pieces times threads, whatever the size of a tensor: every thread reads into buffers that it uses again.
2. Files are read into those buffers and never mapped: mapped pages count as the process's memory until they are dropped.
3. Reading, arithmetic and writing all release Python's lock, so threads that each do one after the other overlap them.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from typing import Literal, TypeVar

import numpy
import torch
from torch import Tensor

from overhaul import session
from overhaul.errors import RunError
from overhaul.weights.index import TensorFacts

Result = TypeVar("Result")

Whole = bool | Literal["rows"]
"""What is not cut: whole tensors (True), the rows of each ("rows"), or nothing."""

PIECE = 1 << 18
"""Numbers in a piece: small enough that the float32 copies of a few models stay in a core's cache between operations."""
THREADS = 8
"""Threads at most. Disks and memory are busy with fewer; two for each of torch's keep both sides going."""


@dataclass(frozen=True)
class Piece:
    """A stretch of the same tensor in several models: `count` numbers from number `start` on, seen in `shape`."""

    inputs: Sequence[TensorFacts]
    start: int
    count: int
    shape: tuple[int, ...]


class Workspace:
    """The buffers of one thread. What `take` and the reading methods return is good until the next piece."""

    def __init__(self, opened: dict[Path, int]) -> None:
        self._opened = opened
        self._buffers: dict[str, bytearray] = {}

    def take(self, slot: str, dtype: torch.dtype, count: int) -> Tensor:
        """A flat tensor over the buffer called `slot`, which grows when it has to."""
        needed = count * dtype.itemsize
        if len(self._buffers.get(slot, b"")) < needed:
            self._buffers.pop(slot, None)  # gives the smaller one back before the larger one is made
            self._buffers[slot] = bytearray(needed)
        return torch.frombuffer(self._buffers[slot], dtype=dtype, count=count)

    def stored(self, piece: Piece, number: int) -> Tensor:
        """Input `number` of a piece as it is stored, flat.

        Raises:
            RunError: the file has become shorter since its header was read.
        """
        tensor = piece.inputs[number]
        if tensor.rows:
            return self._gathered(piece, number)
        raw = self.take(f"stored {number}", tensor.dtype, piece.count)
        self._read(tensor, piece.start, raw)
        return raw

    def _gathered(self, piece: Piece, number: int) -> Tensor:
        """Input `number` of a piece whose rows lie apart: the mean of those that there are, in float32."""
        tensor = piece.inputs[number]
        width = math.prod(tensor.shape[1:])
        first, count = piece.start // width, piece.count // width
        total = self.take(f"stored {number}", torch.float32, piece.count).zero_().view(count, width)
        there = numpy.zeros((count, 1), numpy.float32)
        for source, places in tensor.rows:
            wanted = places[first : first + count]
            there[:, 0] += wanted >= 0
            # a run of neighbours is read at once; -1 is a neighbour of none
            cuts = [0, *(numpy.flatnonzero((numpy.diff(wanted) != 1) | (wanted[:-1] < 0)) + 1), count]
            for begin, end in itertools.pairwise(cuts):
                if wanted[begin] >= 0:
                    raw = self.take("rows", source.dtype, int(end - begin) * width)
                    self._read(source, int(wanted[begin]) * width, raw)
                    total[begin:end] += raw.view(-1, width)
        return total.div_(torch.from_numpy(numpy.maximum(there, 1))).view(-1)

    def _read(self, tensor: TensorFacts, start: int, into: Tensor) -> None:
        """Numbers of a stored tensor, from number `start` on."""
        assert tensor.file is not None
        place, view = tensor.offset + start * tensor.dtype.itemsize, _bytes(into)
        while view:
            done = os.preadv(self._opened[tensor.file], [view], place)
            if not done:
                raise RunError(
                    f"{tensor.file} was cut short while {tensor.name} was read from it. Fetch the file again."
                )
            place, view = place + done, view[done:]

    def floats(self, piece: Piece) -> list[Tensor]:
        """All inputs of a piece in float32 (float64 where one is stored so), in the piece's shape.

        Raises:
            RunError: a number is not finite.
        """
        wide = functools.reduce(torch.promote_types, (tensor.dtype for tensor in piece.inputs), torch.float32)
        tensors: list[Tensor] = []
        for number, tensor in enumerate(piece.inputs):
            values = self.stored(piece, number)
            if values.dtype != wide:
                values = self.take(f"wide {number}", wide, piece.count).copy_(values)
            if not all_finite(values):
                raise RunError(
                    f"{tensor.file}: {tensor.name} holds values that are not finite (NaN or infinity). The checkpoint is "
                    "damaged or its training diverged; use another one."
                )
            tensors.append(values.view(piece.shape))
        return tensors


def all_finite(values: Tensor) -> bool:
    """Whether every value is finite.

    One that is not makes the sum not finite, and a sum costs a fortieth of looking at each value. A sum can also be too
    large for its dtype; only then is each value looked at.
    """
    return math.isfinite(values.sum()) or bool(values.isfinite().all())


def mapped(tensor: TensorFacts) -> Tensor:
    """A stored tensor as a view of its file: read where it is used, and let go by the system where memory runs short.

    What is written to it does not reach the file.
    """
    assert tensor.file is not None
    raw = numpy.memmap(tensor.file, numpy.uint8, "c", tensor.offset, (max(1, tensor.bytes),))[: tensor.bytes]
    return torch.from_numpy(raw).view(tensor.dtype).view(tensor.shape)


def write(file: int, values: Tensor, place: int) -> None:
    """Write a contiguous tensor at byte `place` of an open file."""
    view = _bytes(values)
    while view:
        done = os.pwrite(file, view, place)
        place, view = place + done, view[done:]


def _bytes(values: Tensor) -> memoryview:
    return values.view(torch.uint8).numpy().data


@contextlib.contextmanager
def opened(paths: Iterable[Path], flags: int) -> Iterator[dict[Path, int]]:
    """File descriptors of all paths, closed at the end."""
    with contextlib.ExitStack() as stack:
        files: dict[Path, int] = {}
        for path in paths:
            files[path] = os.open(path, flags)
            stack.callback(os.close, files[path])
        yield files


def run(
    inputs: Sequence[Sequence[TensorFacts]], work: Callable[[Piece, Workspace], Result], whole: Whole, what: str
) -> Iterator[Result]:
    """What `work` makes of every piece, in order. The first error ends it; pieces not yet begun are then left.

    Args:
        inputs: for each tensor, where it lies in every model.
        work: is called in several threads, unless `whole`.
        whole: pieces are whole tensors: one after the other in this thread, so that memory holds one of them and torch
            may use all its threads on it; or "rows", as many whole ones as a piece has room for, [rows, numbers in a row].
        what: the work's name, for the session's progress.
    """
    pieces = (piece for tensors in inputs for piece in _cut(tensors, whole))
    count = sum(-(-tensors[0].numbers // _size(tensors[0], whole)) for tensors in inputs)
    alone = whole is True
    threads = 1 if alone else min(THREADS, 2 * torch.get_num_threads())
    stored = (one for tensors in inputs for tensor in tensors for one in (tensor, *(part for part, _ in tensor.rows)))
    paths = {tensor.file for tensor in stored if tensor.file}
    with opened(sorted(paths), os.O_RDONLY) as files:
        free: SimpleQueue[Workspace] = SimpleQueue()
        for _ in range(threads):
            free.put(Workspace(files))

        def one(piece: Piece) -> Result:
            space = free.get()
            try:
                return work(piece, space)
            finally:
                free.put(space)

        with contextlib.nullcontext() if alone else _pool(threads) as pool:
            results = _in_order(pool, one, pieces, 2 * threads) if pool else map(one, pieces)
            yield from session.progress(results, what, count)


def _cut(inputs: Sequence[TensorFacts], whole: Whole) -> Iterator[Piece]:
    first, *others = inputs
    size = _size(first, whole)
    for start in range(0, first.numbers, size):
        count = min(size, first.numbers - start)
        shape = first.shape if whole is True else (count,) if not whole else (count // _row(first), _row(first))
        yield Piece([replace(first, start=first.start + start), *others], start, count, shape)


def _size(tensor: TensorFacts, whole: Whole) -> int:
    """How many numbers of a tensor are in a piece."""
    if whole is True:
        return max(1, tensor.numbers)
    row = _row(tensor) if whole else max(1, math.prod(tensor.shape[1:])) if tensor.rows else 1
    return max(1, PIECE // row) * row


def _row(tensor: TensorFacts) -> int:
    """How many numbers make one output: a row of a matrix, also in a pile of them, or what a kernel of a convolution has."""
    inner = tensor.shape[1:] if len(tensor.shape) > 3 else tensor.shape[-1:]
    return max(1, math.prod(inner))


@contextlib.contextmanager
def _pool(threads: int) -> Iterator[ThreadPoolExecutor]:
    """Threads in which torch uses one core each; the caller's setting is what it was afterwards."""
    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)


def _in_order(
    pool: ThreadPoolExecutor, one: Callable[[Piece], Result], pieces: Iterable[Piece], ahead: int
) -> Iterator[Result]:
    """`pool.map` with at most `ahead` pieces waiting: a file of a large model has more than should be lined up."""
    pending: deque[Future[Result]] = deque()
    try:
        for piece in pieces:
            pending.append(pool.submit(one, piece))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()
