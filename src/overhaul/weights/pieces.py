"""Tensors of several files, streamed side by side through a function: a piece at a time, in several threads.

1. Memory is pieces times threads, whatever the size of a tensor: every thread reads into buffers that it uses again.
2. Files are read into those buffers and never mapped: mapped pages count as the process's memory until they are dropped.
3. Reading, arithmetic and writing all release Python's lock, so threads that each do one after the other overlap them.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import TypeVar

import torch
from torch import Tensor

from overhaul import session
from overhaul.errors import RunError
from overhaul.weights.index import TensorFacts

Result = TypeVar("Result")

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
        raw = self.take(f"stored {number}", tensor.dtype, piece.count)
        assert tensor.file is not None
        place, view = tensor.offset + piece.start * tensor.dtype.itemsize, _bytes(raw)
        while view:
            done = os.preadv(self._opened[tensor.file], [view], place)
            if not done:
                raise RunError(
                    f"{tensor.file} was cut short while {tensor.name} was read from it. Fetch the file again."
                )
            place, view = place + done, view[done:]
        return raw

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
    inputs: Sequence[Sequence[TensorFacts]], work: Callable[[Piece, Workspace], Result], whole: bool, what: str
) -> Iterator[Result]:
    """What `work` makes of every piece, in order. The first error ends it; pieces not yet begun are then left.

    Args:
        inputs: for each tensor, where it lies in every model.
        work: is called in several threads, unless `whole`.
        whole: pieces are whole tensors: one after the other in this thread, so that memory holds one of them and torch
            may use all its threads on it.
        what: the work's name, for the session's progress.
    """
    size = sys.maxsize if whole else PIECE
    pieces = (piece for tensors in inputs for piece in _cut(tensors, size, whole))
    count = sum(-(-tensors[0].numbers // size) for tensors in inputs)
    threads = 1 if whole else min(THREADS, 2 * torch.get_num_threads())
    paths = {tensor.file for tensors in inputs for tensor in tensors if tensor.file}
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

        with contextlib.nullcontext() if whole else _pool(threads) as pool:
            results = _in_order(pool, one, pieces, 2 * threads) if pool else map(one, pieces)
            yield from session.progress(results, what, count)


def _cut(inputs: Sequence[TensorFacts], size: int, whole: bool) -> Iterator[Piece]:
    numbers = inputs[0].numbers
    for start in range(0, numbers, size):
        count = min(size, numbers - start)
        yield Piece(inputs, start, count, inputs[0].shape if whole else (count,))


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
