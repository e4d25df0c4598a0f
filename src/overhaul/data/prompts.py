"""How a row is put to the model: a material's `prompt:`, in which any column may be named.

1. `{question}` is what the form asks, whatever its column is called.
2. Any other name is a column of the rows, by the name that `columns:` gives it where it gives one.
3. `{{` and `}}` are braces.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from overhaul.errors import RequestError, RowError

QUESTION = "question"
"""What a prompt calls the column that a form asks with."""

_PIECE = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


@dataclass(frozen=True)
class Prompt:
    """A prompt, read: what stands in it as it is, and the columns between.

    Attributes:
        pieces: a text, and the name after it; None after the last.
    """

    pieces: tuple[tuple[str, str | None], ...]

    @staticmethod
    @functools.lru_cache(maxsize=64)
    def of(text: str) -> Prompt:
        """Read a prompt.

        Raises:
            RequestError: a brace stands alone, or a name between braces is empty.
        """
        pieces: list[tuple[str, str | None]] = []
        literal, place = "", 0
        for found in _PIECE.finditer(text):
            literal, place, name = literal + text[place : found.start()], found.end(), found[1]
            if name is not None and name.strip():
                pieces.append((literal, name.strip()))
                literal = ""
            elif found[0] in ("{{", "}}"):
                literal += found[0][0]
            else:
                raise RequestError(
                    f"prompt: {found[0]!r} at character {found.start() + 1} of {text!r} names no column. Write {{{{ and "
                    "}} for braces that are to stay."
                )
        return Prompt((*pieces, (literal + text[place:], None)))

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """The names in it, each once."""
        return tuple(dict.fromkeys(name for _, name in self.pieces if name is not None))

    def fill(self, row: Mapping[str, Any], place: int, column: Callable[[str], str]) -> str:
        """The prompt of one row.

        Args:
            row: the row.
            place: its index, for errors.
            column: what the rows call what the prompt names.

        Raises:
            RowError: the row has nothing there, or what is no text.
        """
        said: list[str] = []
        for literal, name in self.pieces:
            said.append(literal)
            if name is not None:
                value = row.get(column(name))
                if type(value) is not str:
                    value = _written(value, column(name), place)
                said.append(value)
        return "".join(said)


def _written(value: Any, column: str, place: int) -> str:
    """A number or a truth value as text."""
    if value is not None and not hasattr(value, "__len__") and value == value:
        return str(value)
    what = f"{value!r}" if hasattr(value, "__len__") else "nothing"
    raise RowError(place, f"its column {column!r} holds {what}, and `prompt:` puts it to the model as text.")
