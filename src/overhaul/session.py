"""What the surroundings offer to a running method: a seed, a place for checkpoints, and somewhere to show progress.

A method never asks for these; the bench does (`fit`, judges). Outside a run every part has a quiet default, so the
same method works in a notebook.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

Item = TypeVar("Item")

Report = Callable[[str, int, int, str], None]
"""(what, done, total, detail): called as work proceeds."""


def _quiet(what: str, done: int, total: int, detail: str) -> None:
    pass


@dataclass(frozen=True)
class Session:
    """The surroundings of one step.

    Attributes:
        scratch: where `fit` keeps its checkpoints, or None for none.
        report: receives progress.
        checkpoint_seconds: how often a long training writes a checkpoint.
        stack: the path of the stack that counts as the main one of models that have it, see `LayerStack.of`.
    """

    scratch: Path | None = None
    report: Report = _quiet
    checkpoint_seconds: float = 30.0
    stack: str | None = None


_OUTSIDE = Session()
_current: ContextVar[Session] = ContextVar("overhaul_session", default=_OUTSIDE)


def current() -> Session:
    """The session in force here."""
    return _current.get()


@contextmanager
def using(**changes: object) -> Iterator[Session]:
    """Change parts of the session for the duration of a block."""
    session = replace(_current.get(), **changes)  # pyright: ignore[reportArgumentType]
    token = _current.set(session)
    try:
        yield session
    finally:
        _current.reset(token)


def progress(items: Iterable[Item], what: str, total: int) -> Iterator[Item]:
    """Pass `items` through, telling the session how many of `total` are done."""
    report = current().report
    for done, item in enumerate(items):
        report(what, done, total, "")
        yield item
    report(what, total, total, "")
