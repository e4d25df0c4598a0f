"""Verifiers: whether a generated text answers a row. A new one is a function in a file here, nothing else.

    @verifier("answer")
    def gsm8k(row: Row, text: str) -> float: ...

A material names its verifier (`verify: gsm8k`); rows of generated tasks know theirs by their column `task`; anything else is
compared word by word. A verifier returns a score from 0 (wrong) to 1 (right), which rewards use as it is and accuracy
counts as right from one half on.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from overhaul.errors import SEE, RequestError, did_you_mean

Row = Mapping[str, Any]
Check = Callable[[Row, str], float]


@dataclass(frozen=True)
class Verifier:
    """What the decorator learnt about a function.

    Attributes:
        name: what a recipe writes after `verify:`.
        doc: what it accepts.
        columns: that it reads of a row.
        check: (row, text) -> a score from 0 to 1.
    """

    name: str
    doc: str
    columns: tuple[str, ...]
    check: Check


VERIFIERS: dict[str, Verifier] = {}


def verifier(*columns: str) -> Callable[[Check], Check]:
    """Register a function under its own name, with the columns of a row that it reads."""

    def decorate(function: Check) -> Check:
        name = function.__name__
        VERIFIERS[name] = Verifier(name, inspect.cleandoc(function.__doc__ or ""), columns, function)
        return function

    return decorate


def find_verifier(name: str) -> Verifier:
    """The verifier called `name`.

    Raises:
        RequestError: there is none.
    """
    if name not in VERIFIERS:
        raise RequestError(f"There is no verifier {name!r}.{did_you_mean(name, VERIFIERS)}{SEE}")
    return VERIFIERS[name]


def score(row: Row, text: str) -> float:
    """How right `text` is, from 0 to 1, by the row's verifier, its task's, or word by word.

    Raises:
        RequestError: the row names a verifier that is not there, or lacks a column that it reads.
    """
    task = row.get("task")
    found = find_verifier(str(row["verify"])) if row.get("verify") else VERIFIERS.get(str(task), VERIFIERS["exact"])
    for column in found.columns:
        if column not in row:
            raise RequestError(
                f"The verifier {found.name!r} reads the column {column!r}, which a row lacks: {dict(row)!r}."
            )
    return float(found.check(row, text))


def verify(row: Row, text: str) -> bool:
    """Whether `text` is right: a score of at least one half."""
    return score(row, text) >= 0.5


for _file in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_file.name}")
