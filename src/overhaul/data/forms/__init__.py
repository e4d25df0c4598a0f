"""Forms: what the rows of a material are, and how a model is given them. A new one is a file here, nothing else.

    @form(columns=("question", "answer"), kind="tokens", positions=...)
    def qa(rows: Rows, options: Options, processor: Any) -> Examples: ...

A form encodes each row by itself, so that a large material can be encoded piece by piece.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from overhaul.data.encode import BATCH
from overhaul.data.examples import Examples, Kind
from overhaul.data.prompts import QUESTION, Prompt
from overhaul.errors import SEE, RequestError, did_you_mean, shifted

Row = Mapping[str, Any]
Rows = Sequence[Row]

CHARACTERS_PER_TOKEN = 3
"""How a length in tokens is estimated before anything is encoded."""


class Options(Protocol):
    """What a form may ask of the material that it encodes; `materials.Source` is one."""

    @property
    def length(self) -> int:
        """Most tokens of a piece of text."""
        ...

    @property
    def prompt(self) -> str:
        """How a question is put: `{question}` stands for what the form asks, any other name for a column."""
        ...

    def column(self, name: str, /) -> str:
        """What the material calls the column that a form knows as `name`."""
        ...


Encode = Callable[[Rows, Any, Any], Examples]
Parts = Callable[[Rows, Any, Any], Iterator[Examples]]
Positions = Callable[[Any, Row], list[int]]


@dataclass(frozen=True)
class Form:
    """What the decorator learnt about a function.

    Attributes:
        name: what a recipe writes after `as:`.
        doc: what it makes of a row.
        columns: that it reads, under the names they have unless `columns:` says otherwise.
        kind: what a model can read of the examples it makes.
        needs: what of the model must be there to encode: its tokenizer, its image processor for files of images, both in
            one processor, or nothing.
        told: its turn when the form is told from the columns that rows have; None must be named.
        asked: which of the columns `{question}` in a prompt stands for; rows lack it where their prompt does not name it.
            None, and the form reads no prompt, or in a way of its own.
        optional: columns that it reads where there are some.
        positions: about how many positions the examples made of one row take, one number each: (options, row) -> lengths.
        encode: (rows, options, processor) -> examples; `options` is the material's `Source`.
        parts: the same, some at a time, so that a large material is never held.
    """

    name: str
    doc: str
    columns: tuple[str, ...]
    kind: Kind
    needs: Literal["tokenizer", "image processor", "processor", "nothing"]
    told: int | None
    positions: Positions
    encode: Encode
    parts: Parts
    asked: str | None = None
    optional: tuple[str, ...] = ()

    def reads(self, options: Options) -> tuple[str, ...]:
        """The columns that rows must have, under the names that the material gives them.

        Raises:
            RequestError: the prompt cannot be read.
        """
        if self.asked is None:
            return tuple(map(options.column, self.columns))
        named = [options.column(self.asked if name == QUESTION else name) for name in Prompt.of(options.prompt).names]
        own = [options.column(name) for name in self.columns if name != self.asked]
        return tuple(dict.fromkeys([*named, *own]))


FORMS: dict[str, Form] = {}


def form(
    *,
    columns: tuple[str, ...],
    kind: Kind,
    positions: Positions,
    needs: Literal["tokenizer", "image processor", "processor", "nothing"] = "tokenizer",
    told: int | None = None,
    parts: Parts | None = None,
    asked: str | None = None,
    optional: tuple[str, ...] = (),
) -> Callable[[Encode], Encode]:
    """Register a function under its own name; see `Form` for the arguments."""

    def decorate(function: Encode) -> Encode:
        name, doc = function.__name__, inspect.cleandoc(function.__doc__ or "")
        by_rows = parts or _by_rows(function)
        FORMS[name] = Form(name, doc, columns, kind, needs, told, positions, function, by_rows, asked, optional)
        return function

    return decorate


def _by_rows(encode: Encode) -> Parts:
    def parts(rows: Rows, options: Options, processor: Any) -> Iterator[Examples]:
        for start in range(0, len(rows), BATCH):
            with shifted(start):
                yield encode(list(rows[start : start + BATCH]), options, processor)

    return parts


def find_form(name: str) -> Form:
    """The form called `name`.

    Raises:
        RequestError: there is none.
    """
    if name not in FORMS:
        raise RequestError(f"There is no form {name!r}.{did_you_mean(name, FORMS)}{SEE}")
    return FORMS[name]


def told_from(columns: Mapping[str, Any] | Sequence[str], options: Options) -> Form | None:
    """The first form whose columns are all there, under the names that the options give them."""
    turns = sorted((form.told, form.name) for form in FORMS.values() if form.told is not None)
    for _, name in turns:
        if all(column in columns for column in FORMS[name].reads(options)):
            return FORMS[name]
    return None


def characters(*names: str) -> Positions:
    """Positions of one sequence made of the prompt around these columns, and of what else the prompt names."""

    def positions(options: Options, row: Row) -> list[int]:
        read = {options.column(name) for name in (*names, *Prompt.of(options.prompt).names)}
        written = sum(len(str(row.get(column, ""))) for column in read) + len(options.prompt)
        return [written // CHARACTERS_PER_TOKEN + 1]

    return positions


for _file in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_file.name}")
