"""What stands in the columns of a row: text that may be learnt, answers, classes; anything else is refused with its place.

1. A whole number is its digits, a fraction what the file has written (`0.10` stays so). Null, NaN, true, false, lists and
   mappings are no text.
2. An answer may be a list, or SQuAD's mapping with a list under `text`: of one entry, however often it stands there, it is
   that; of several the material says `answers: first` or `answers: all`, which makes a row of each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import date
from decimal import Decimal, InvalidOperation
from typing import Any, Literal

from overhaul.data.chats import turns_of
from overhaul.data.lazy import TextFile
from overhaul.errors import RequestError, RowError

Row = Mapping[str, Any]
Choice = Literal["first", "all"] | None


class FileRow(dict[str, Any]):
    """A row that knows where it was read: "facts.jsonl, line 3"."""

    __slots__ = ("place",)

    def __init__(self, place: str, values: Mapping[str, Any]) -> None:
        super().__init__(values)
        self.place = place


def place_of(row: Row, otherwise: str) -> str:
    """Where a row was read, if it knows that."""
    return getattr(row, "place", otherwise)


class Written(float):
    """A number that its file writes in another way than Python does."""

    __slots__ = ("text",)

    def __new__(cls, text: str) -> Written:
        """From its text."""
        made = super().__new__(cls, text)
        made.text = text
        return made

    def __str__(self) -> str:
        return self.text


def as_text(value: Any, place: str, column: str, empty: bool = False) -> str:
    """A text as it is, a number as it is written.

    Raises:
        RequestError: it is anything else, or empty where it may not be.
    """
    if not isinstance(value, str):
        if hasattr(value, "item") and not getattr(value, "shape", ()):  # numpy's numbers
            value = value.item()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            value = str(value)
    if not isinstance(value, str):
        raise RequestError(f"{place}: {column!r} is {_named(value)}, and a text is needed. {_way_out(value, column)}")
    if not empty and not value.strip():
        raise RequestError(f"{place}: {column!r} is empty, and a text is needed. {_way_out(value, column)}")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise RequestError(
                f"{place}: {column!r} holds half a character, \\u{ord(value[error.start]):04x}. Write both halves, or the "
                "character itself."
            ) from None
    return value


def _way_out(value: Any, column: str) -> str:
    written = "null" if value is None else '""' if value == "" else None
    such = "" if written is None else f", and all like it by `unless: {{{column}: {written}}}`"
    return f"Write one, or take the row out{such}."


def _named(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return f"the truth value {str(value).lower()}"
    if isinstance(value, float):
        return "no finite number (NaN or infinite)"
    kinds = ((Mapping, "a mapping"), (bytes, "bytes"), (Sequence, "a list"))
    return next((name for kind, name in kinds if isinstance(value, kind)), f"a {type(value).__name__}")


def answers_of(value: Any, place: str, column: str, choice: Choice) -> list[str]:
    """The answers that a row gives: one, unless the material says `answers: all`.

    Raises:
        RequestError: there is none, one is no text, or there are several and the material does not say which.
    """
    if isinstance(value, Mapping) and "text" in value:
        value = value["text"]
    if not isinstance(value, list | tuple):
        return [as_text(value, place, column)]
    found = list(dict.fromkeys(as_text(each, place, column) for each in value))
    if not found:
        raise RequestError(f"{place}: {column!r} is an empty list, and an answer is needed. {_way_out(value, column)}")
    if len(found) > 1 and choice is None:
        raise RequestError(
            f"{place}: {column!r} lists {len(found)} answers. Write `answers: first` in the material, or `answers: all` to "
            "make a row of each."
        )
    return found if choice == "all" else found[:1]


def checked(name: str, value: Any, place: str, column: str) -> Any:
    """The value of a column that a form knows as `name`, if that is something which a form can read.

    Raises:
        RequestError: it is not.
    """
    if name == "text":
        return value if isinstance(value, TextFile) else as_text(value, place, column, empty=True)
    if name == "messages" or (name in TURNS and isinstance(value, list | tuple)):
        try:
            turns_of(value, 0)
        except RowError as error:
            raise RequestError(f"{place}: {error.problem}") from None
        return value
    return as_text(value, place, column)


TURNS = frozenset({"prompt", "chosen", "rejected"})
"""Columns that may hold turns of a conversation, beside `messages`."""


def is_value(value: Any, wanted: Any) -> bool:
    """Whether a row's value is the one that `where` means: equal, or written so where one of the two is text.

    `where: {id: 7}` finds the cell `7`, and `where: {id: "007"}` the cell `007`.
    """
    if isinstance(wanted, list):
        return any(is_value(value, each) for each in wanted)
    if isinstance(value, date | Decimal) or isinstance(wanted, date | Decimal):
        return _as_written(value) == _as_written(wanted)
    if isinstance(value, str) is not isinstance(wanted, str):
        text, other = (value, wanted) if isinstance(value, str) else (wanted, value)
        if isinstance(other, bool):
            return text in (str(other), str(other).lower())
        return isinstance(other, int | float) and text == str(other)
    return isinstance(value, bool) is isinstance(wanted, bool) and bool(value == wanted)


def _as_written(value: Any) -> Any:
    """What days and exact fractions are compared by: 2024-01-01 is a text in CSV, and a day in Parquet and YAML."""
    if isinstance(value, date):  # and moments, which are days too
        return str(value)
    try:
        return Decimal(str(value))
    except InvalidOperation:
        return str(value)
