"""The two ways in which work can stop, and the spelling help that both use."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class OverhaulError(Exception):
    """What a user should read as one paragraph: what is wrong, where, and what to do instead."""

    exit_code = 1


class RequestError(OverhaulError):
    """The request is wrong. Nothing was started and nothing was written."""

    exit_code = 2


class RunError(OverhaulError):
    """The work was started and could not be finished. What was finished before is kept."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A hint that ends an error message: the nearest known word, or else all of them."""
    known = sorted(known)
    if not known:
        return ""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f" Did you mean {near[0]!r}?" if near else f" Known: {', '.join(known)}."
