"""What the surroundings offer to a running method: a seed, a place for checkpoints, and somewhere to show progress.

A method never asks for these; the bench does (`fit`, judges). Outside a run every part has a quiet default, so the
same method works in a notebook.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from overhaul.errors import writing
from overhaul.quoting import shown

Item = TypeVar("Item")

Report = Callable[[str, int, int, str], None]
"""(what, done, total, detail): called as work proceeds."""

Say = Callable[[str], None]
"""Called with a line that is to stand: a step begins, or was done before."""

LINE_SECONDS = 60
"""How often a line says how far the work is, where lines are all there is."""


def _quiet(what: str, done: int, total: int, detail: str) -> None:
    pass


def _silent(text: str) -> None:
    pass


@dataclass(frozen=True)
class Session:
    """The surroundings of one step.

    Attributes:
        scratch: where `fit` keeps its checkpoints, or None for none.
        report: receives progress.
        say: receives lines that are to stand.
        device: where models are worked on; None is the accelerator if there is one.
        checkpoint_seconds: how often a long training writes a checkpoint.
        stack: the path of the stack that counts as the main one of models that have it, see `LayerStack.of`.
        planning: whether the work itself is left out, see `begins`.
    """

    scratch: Path | None = None
    report: Report = _quiet
    say: Say = _silent
    device: str | None = None
    checkpoint_seconds: float = 30.0
    stack: str | None = None
    planning: bool = False


class WorkBegins(BaseException):
    """All that can be wrong has been looked at, and the work would begin now.

    Attributes:
        hands_on: the network that a later step would be given, as far as it is built; None where that is not known.
    """

    def __init__(self, hands_on: Any = None) -> None:
        super().__init__()
        self.hands_on = hands_on


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


def begins(hands_on: Callable[[], Any] | None = None) -> None:
    """Where checks end and work begins: `overhaul plan` goes so far and no further.

    Args:
        hands_on: makes the network that the work will hand on, with whatever numbers, so that later steps can be planned;
            for a method that builds another one.

    Raises:
        WorkBegins: the session only plans.
    """
    if current().planning:
        raise WorkBegins(None if hands_on is None else hands_on())


def progress(items: Iterable[Item], what: str, total: int) -> Iterator[Item]:
    """Pass `items` through, telling the session how many of `total` are done."""
    begins()
    report = current().report
    for done, item in enumerate(items):
        report(what, done, total, "")
        yield item
    report(what, total, total, "")


def say(text: str) -> None:
    """A line for whoever watches: what begins, or was done before."""
    current().say(text)


class Lines:
    """Progress for what is no terminal: what is said, and once a minute how far the work is."""

    def __init__(self, write: Say) -> None:
        self.write, self.last = write, time.monotonic()

    def say(self, text: str) -> None:
        """A line that stands."""
        self.write(text)
        self.last = time.monotonic()

    def report(self, what: str, done: int, total: int, detail: str) -> None:
        """A line, if the last one is a minute old."""
        if time.monotonic() - self.last >= LINE_SECONDS:
            self.say(f"  {what}: {done} of {total}{f', {detail}' if detail else ''}")


@contextmanager
def logged(path: Path) -> Iterator[None]:
    """What is said and reported inside also goes to the end of a file, with the time of day. A link is not followed."""
    outer = current()
    with writing(path):
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0)
        file = os.fdopen(os.open(path, flags, 0o666), "w", encoding="utf-8")

    def write(text: str) -> None:
        with writing(path):
            print(time.strftime("%Y-%m-%d %H:%M:%S"), shown(text).replace("\n", "\n" + 20 * " "), file=file, flush=True)

    lines = Lines(write)

    def say(text: str) -> None:
        lines.say(text)
        outer.say(text)

    def report(what: str, done: int, total: int, detail: str) -> None:
        lines.report(what, done, total, detail)
        outer.report(what, done, total, detail)

    with file, using(say=say, report=report):
        yield
