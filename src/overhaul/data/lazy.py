"""Large data that is never held whole: sequences that read each element when it is asked for, and the files behind them.

JSONL is read through the places where its lines begin, a large text file in stretches of characters.
"""

from __future__ import annotations

import codecs
import hashlib
import mmap
import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar, overload

import numpy as np

T = TypeVar("T")

LARGE = 2**22
"""Bytes from which on a file is read lazily."""


def cache_folder(kind: str = "encoded") -> Path:
    """Where encoded or unpacked data is kept: OVERHAUL_CACHE, else the user's cache folder."""
    from platformdirs import user_cache_path

    return Path(os.environ.get("OVERHAUL_CACHE") or user_cache_path("overhaul")) / kind


class View(Sequence[T], Generic[T]):
    """A list-like sequence of which only the places are held; element i is read when it is asked for.

    Args:
        read: gives the element at a place.
        places: where the elements are, in order.
        key: what they are read from, as a hash: two views of one key and the same places hold the same.
        lengths: the length of what is at each place, where that is known without reading.
    """

    def __init__(
        self, read: Callable[[int], T], places: Sequence[int] | np.ndarray, key: str, lengths: np.ndarray | None = None
    ) -> None:
        self._read, self._key, self._lengths = read, key, lengths
        self._places = places if isinstance(places, range) else np.asarray(places, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> View[T]: ...
    def __getitem__(self, index: int | slice) -> T | View[T]:
        if isinstance(index, slice):
            return View(self._read, self._places[index], self._key, self._lengths)
        return self._read(int(self._places[index]))

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Sequence)
            and len(self) == len(other)
            and all(a == b for a, b in zip(self, other, strict=True))
        )

    __hash__ = None  # pyright: ignore[reportAssignmentType]

    def select(self, indices: Sequence[int] | np.ndarray) -> View[T]:
        """The elements at these indices, in this order."""
        places = (
            np.arange(self._places.start, self._places.stop, self._places.step)
            if isinstance(self._places, range)
            else self._places
        )
        return View(self._read, places[np.asarray(indices, dtype=np.int64)], self._key, self._lengths)

    def map(self, change: Callable[[int, T], Any], key: str, *, as_long: bool = False) -> View[Any]:
        """Every element changed when it is read: `change(index in this view, element)`; `as_long` if lengths stay."""
        return View(
            lambda i: change(i, self[i]), range(len(self)), sha(self.key, key), self.lengths if as_long else None
        )

    @property
    def lengths(self) -> np.ndarray | None:
        """The length of each element, if known."""
        return None if self._lengths is None else self._lengths[np.asarray(self._places)]

    @property
    def key(self) -> str:
        """A hash of what is here, without reading it."""
        return sha(self._key, np.asarray(self._places, dtype=np.int64).tobytes())


def chained(parts: Sequence[View[T]]) -> View[T]:
    """Several views, one after the other."""
    ends = np.cumsum([len(part) for part in parts])

    def read(place: int) -> T:
        part = int(np.searchsorted(ends, place, side="right"))
        return parts[part][place - (int(ends[part - 1]) if part else 0)]

    known = [part.lengths for part in parts]
    lengths = None if any(each is None for each in known) else np.concatenate(known)  # pyright: ignore[reportArgumentType,reportCallIssue]
    return View(read, range(int(ends[-1])), sha(*(part.key for part in parts)), lengths)


def sha(*parts: str | bytes) -> str:
    """SHA-256 of several parts, told apart."""
    hasher = hashlib.sha256()
    for part in parts:
        hasher.update(part.encode() if isinstance(part, str) else part)
        hasher.update(b"\0")
    return hasher.hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class TextFile:
    """A text file too large to be held. Its length is that of the file, in bytes."""

    def __init__(self, path: Path, encoding: str = "utf-8") -> None:
        self.path = path
        # a byte order mark at the beginning is no part of the text
        self.encoding = "utf-8-sig" if codecs.lookup(encoding).name == "utf-8" else encoding

    def __len__(self) -> int:
        return self.path.stat().st_size

    def __str__(self) -> str:
        return "".join(self.stretches(2**20))

    @cached_property
    def key(self) -> str:
        """A hash of what it holds."""
        return sha(file_digest(self.path), self.encoding)

    def stretches(self, size: int) -> Iterator[str]:
        """The text, `size` characters at a time."""
        with self.path.open(encoding=self.encoding) as file:
            while stretch := file.read(size):
                yield stretch


def json_lines(path: Path, parse: Callable[[int, bytes], dict[str, Any]]) -> View[dict[str, Any]]:
    """The rows of a JSON Lines file, each parsed when it is asked for; blank lines are left out.

    Args:
        path: of the file.
        parse: (number of the line, its bytes) -> its row. No line is parsed here: whoever reads a material walks through
            all of its rows before work begins, which finds what is wrong with them.
    """
    with path.open("rb") as file:
        text = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    bounds = array("q")
    place = 0
    for number, line in enumerate(iter(text.readline, b""), 1):
        if not line.isspace():
            bounds.extend((number, place, place + len(line)))
        place += len(line)

    def read(row: int) -> dict[str, Any]:
        number, start, end = bounds[3 * row : 3 * row + 3]
        return parse(number, text[start:end])

    return View(read, range(len(bounds) // 3), file_digest(path))
