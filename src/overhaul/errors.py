"""The two ways in which work can stop, the spelling help that both use, and the system's refusals in words."""

from __future__ import annotations

import contextlib
import difflib
import errno
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

_ENDLESS = re.compile(r"\S{400,}")


class OverhaulError(Exception):
    """What a user should read as one paragraph: what is wrong, where, and what to do instead.

    A word that no one reads to its end, such as a path of thousands of characters, is cut in its middle.
    """

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(_ENDLESS.sub(lambda word: f"{word[0][:100]}...{word[0][-40:]}", message))


class RequestError(OverhaulError):
    """The request is wrong. Nothing was started and nothing was written."""

    exit_code = 2


class RowError(RequestError):
    """A row of a material is wrong. The material says which file it is from, and as which row of it.

    Attributes:
        place: the row's index among those that were to be encoded.
        problem: what is wrong with it.
    """

    def __init__(self, place: int, problem: str) -> None:
        super().__init__(f"Row {place + 1}: {problem}")
        self.place, self.problem = place, problem


@contextlib.contextmanager
def shifted(by: int) -> Iterator[None]:
    """Rows of a part are so many places further on in the whole."""
    try:
        yield
    except RowError as error:
        raise RowError(error.place + by, error.problem) from None


class MaterialWarning(UserWarning):
    """What is odd about a material, and no reason to refuse it. `plan` and `run` list it among their notes."""


class RunError(OverhaulError):
    """The work was started and could not be finished. What was finished before is kept."""


SEE = " docs/recipes.md lists all that a recipe may say."
"""Ends what is said of a word that recipes do not have."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A hint that ends an error message: the nearest known word, or else all of them."""
    known = sorted(known)
    if not known:
        return ""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f" Did you mean {near[0]!r}?" if near else f" Known: {', '.join(known)}."


@contextlib.contextmanager
def reading(place: object) -> Iterator[None]:
    """Turn the operating system's refusals to look for something or to read it into one readable error."""
    try:
        yield
    except OverhaulError:
        raise
    except (OSError, ValueError, RuntimeError) as error:  # a path with a null byte; the home of nobody
        raise RequestError(f"{place} cannot be read: {getattr(error, 'strerror', None) or error}.") from None


@contextlib.contextmanager
def writing(place: Path) -> Iterator[None]:
    """Turn the operating system's refusals to write into one readable error."""
    try:
        yield
    except OSError as error:
        reasons = {
            errno.ENOSPC: "the disk is full",
            errno.EDQUOT: "the disk quota is used up",
            errno.EROFS: "the file system is read-only",
            errno.EACCES: "permission was denied",
            errno.EPERM: "permission was denied",
            errno.ENOTDIR: "part of the path is a file, not a folder",
            errno.EEXIST: "a file lies where a folder should be",
            errno.EISDIR: "a folder lies where a file should be",
            errno.ELOOP: "it is a link, which is not followed",
        }
        full = "No space left" in str(error)
        reason = reasons.get(errno.ENOSPC if full else error.errno or 0)
        if reason is None:
            raise
        raise RunError(
            f"Could not write {place}: {reason}. What was finished before is kept; make room or choose another folder "
            "with -o and give the same command again."
        ) from error
    except Exception as error:  # safetensors reports a full disk as its own kind of error
        if "No space left" in str(error) or "os error 28" in str(error):
            raise RunError(f"Could not write {place}: the disk is full. What was finished before is kept.") from error
        raise
