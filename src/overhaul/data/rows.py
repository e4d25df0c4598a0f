"""One row of a source as its form reads it: its columns are there, its values can be read, shapes and names are undone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from overhaul.data import forms
from overhaul.data.classes import Classes, Labels, is_number, number_of, numbered, unnamed
from overhaul.data.examples import Row
from overhaul.data.forms import FORMS, Form
from overhaul.data.pictures import opened
from overhaul.data.prompts import QUESTION, Prompt
from overhaul.data.shapes import Shape
from overhaul.data.values import Choice, FileRow, answers_of, as_text, checked, is_value
from overhaul.errors import RequestError, did_you_mean

BESIDE = ("wrong", "paraphrase", "paraphrased_answer", "translation", "translated_answer", "group")
"""Columns that no form learns and that metrics, attacks or methods read of a row, under these names."""

UNWANTED = "label"
"""The column that says of an answer, by true or false, whether it is a good one."""


class Options(forms.Options, Protocol):
    """What is asked of a material here; `materials.Source` is one."""

    from_: str
    columns: dict[str, str]
    answers: Choice
    where: dict[str, Any]
    unless: dict[str, Any]


@dataclass(frozen=True)
class Reader:
    """How the rows of one source are read.

    Attributes:
        options: of the material.
        form: as which they are read.
        shape: which they have instead of the form's own columns.
        read_too: columns that something else reads of each row, a verifier.
        numbers: of the classes that have names.
        labels: of the model's classes.
    """

    options: Options
    form: Form
    shape: Shape | None
    read_too: tuple[str, ...]
    numbers: Mapping[str, int]
    labels: Labels | None

    @classmethod
    def of(
        cls,
        options: Options,
        form: Form,
        shape: Shape | None,
        read_too: tuple[str, ...],
        rows: Sequence[Row],
        classes: Classes | None,
        labels: Labels | None,
    ) -> tuple[Reader, str | None]:
        """A reader, and what should be said about the numbers of classes.

        Raises:
            RequestError: `columns:` names what nothing reads; the model does not know the classes.
        """
        put = Prompt.of(options.prompt).names if form.asked else ()
        if "answer" in form.columns and options.column("answer") in map(options.column, put):
            raise RequestError(
                f"{options.from_}: `prompt:` names the answer ({{{options.column('answer')}}}), so the model would read "
                "what it is to say. Take it out."
            )
        learnt = (*form.columns, *form.optional, *put, *(shape.reads if shape else ()), *read_too, *BESIDE)
        for name in options.columns:
            if name not in learnt and form.kind != "rows":
                raise RequestError(
                    f"{options.from_}: `columns:` gives a name to {name!r}, which nothing reads of {form.name} "
                    f"rows.{_forms_with(options.columns) or did_you_mean(name, learnt)}"
                )
        said = None
        numbers = classes.numbers if classes else {}
        if "label" in form.columns:
            column = options.column("label")
            given = (each for row in rows for each in _listed(row.get(column))) if classes is None else ()
            names = {name for name in given if isinstance(name, str) and name.strip()}
            if not all(map(is_number, names)):
                classes = Classes.named(names)
            if classes is not None:
                numbers, said = numbered(classes, labels, options.from_)
                _refuse_both(classes, labels, rows, column, options.from_)
        return cls(options, form, shape, read_too, numbers, labels), said

    def matches(self, row: Row, wanted: Mapping[str, Any]) -> bool:
        """Whether a row has these values; a class goes by its name, or by its number where no class has that name."""
        label = self.options.column("label")
        return all(
            self._class_is(row.get(column), value)
            if column == label and self.numbers
            else is_value(row.get(column), value)
            for column, value in wanted.items()
        )

    def _class_is(self, name: Any, wanted: Any) -> bool:
        if isinstance(wanted, list):
            return any(self._class_is(name, each) for each in wanted)
        if is_value(name, wanted) or str(wanted) in self.numbers:
            return is_value(name, wanted)
        return is_value(self.numbers.get(str(name)), wanted)

    def read(self, row: Row, place: str) -> tuple[list[Row], bool]:
        """What a row is to its form, several with `answers: all`; and whether its picture has more than one frame.

        Raises:
            RequestError: a column is missing, or holds what cannot be read; the place is named.
            Broken: its picture cannot be read.
        """
        self._complain(row, self._needed, place)
        self._refuse_unwanted(row, place)
        changed = self._renamed(row, place) if self.options.columns else {}
        made = row
        if self.shape:
            made = self._reshaped(row, place)
            self._complain(made, self.form.reads(self.options), place)
        frames, answers = False, [None]
        for name, file in self._columns:
            if file not in made:  # a question that the prompt does not name
                continue
            value = made[file]
            if name == "answer":
                answers = answers_of(value, place, file, self.options.answers)
            elif name == "image":
                changed[file], frames = opened(value, place)
            elif name == "label":
                numbers = [number_of(each, self.numbers, self.labels, place, file) for each in _listed(value)]
                if not numbers:
                    raise RequestError(f"{place}: {file!r} lists no class, so nothing is right. Leave such rows out.")
                changed[file] = numbers if isinstance(value, list | tuple) else numbers[0]
                if name not in made:  # `columns:` renames it; steps that ask for the label know it by either name
                    changed[name] = changed[file]
                if isinstance(value, str):
                    changed["class"] = value
            else:
                changed[file] = checked(name, value, place, file)
        answer = self.options.column("answer")
        said = [{} if each is None else {answer: each} for each in answers]
        return [FileRow(place, {**made, **changed, **each}) for each in said], frames

    def _complain(self, row: Row, names: Sequence[str], place: str) -> None:
        for name in names:
            if name not in row:
                put = f", which `prompt:` names as {{{name}}}" if name in self._put else ""
                raise RequestError(f"{place} has no column {name!r}{put}.{did_you_mean(name, row)}")

    def _refuse_unwanted(self, row: Row, place: str) -> None:
        """Refuse an answer of which its row says that it is a bad one (KTO's `label: false`), unless that was asked for."""
        learnt = {"answer", "messages"}.intersection(self.form.columns)
        chosen = UNWANTED in self.options.where or UNWANTED in self.options.unless
        if learnt and not chosen and is_value(row.get(UNWANTED), False):
            raise RequestError(
                f"{place}: {UNWANTED!r} is false, so its answer is a bad one, which would be learnt as a good one is. Write "
                f"`where: {{{UNWANTED}: true}}` in the material for the good ones, `where: {{{UNWANTED}: false}}` for the "
                f"bad ones, or `where: {{{UNWANTED}: [true, false]}}` for all."
            )

    @cached_property
    def _put(self) -> set[str]:
        """Columns that the prompt names."""
        named = Prompt.of(self.options.prompt).names if self.form.asked else ()
        return {self.options.column(name) for name in named if name != QUESTION}

    @cached_property
    def _needed(self) -> list[str]:
        """Columns of the file that every row must have."""
        column = self.options.column
        own = map(column, self.shape.columns) if self.shape else self.form.reads(self.options)
        return list(dict.fromkeys([*own, *map(column, self.read_too), *self.options.columns.values()]))

    @cached_property
    def _columns(self) -> list[tuple[str, str]]:
        """The form's columns, with what they are called in a row."""
        return [(name, self.options.column(name)) for name in self.form.columns]

    def _reshaped(self, row: Row, place: str) -> Row:
        assert self.shape is not None
        made = self.shape.read(row, self.options.column, place, self._put)
        return {self.options.column(name) if name in self.form.columns else name: value for name, value in made.items()}

    def _renamed(self, row: Row, place: str) -> dict[str, Any]:
        """What others than the form read under names of their own."""
        found: dict[str, Any] = {}
        for name, file in self.options.columns.items():
            if name in BESIDE:
                found[name] = _texts(row[file], place, file)
            elif name not in self.form.columns and (self.form.kind == "rows" or name in self.read_too):
                found[name] = row[file]
        return found


def _forms_with(columns: Mapping[str, str]) -> str:
    """The forms that read every column to which a name is given."""
    fitting = [f"`as: {one.name}`" for one in FORMS.values() if columns.keys() - {*BESIDE} <= {*one.columns}]
    return f" Write {' or '.join(fitting)}, which reads it." if fitting else ""


def _listed(value: Any) -> Sequence[Any]:
    """The classes of a row: several where any of them is right."""
    return value if isinstance(value, list | tuple) else [value]


def _refuse_both(classes: Classes, labels: Labels | None, rows: Sequence[Row], column: str, source: str) -> None:
    """Refuse numbers of classes beside names which nobody has given a number."""
    if classes.stated or (labels is not None and not unnamed(labels)):
        return
    numbers = (row[column] for row in rows if isinstance(row.get(column), int | float))
    if (number := next(numbers, None)) is not None:
        raise RequestError(
            f"{source}: {column!r} holds names of classes ({', '.join(list(classes.numbers)[:3])}) and numbers "
            f"({number}), and nothing says which is which. Write names alone, or numbers alone."
        )


def _texts(value: Any, place: str, column: str) -> str | list[str]:
    if isinstance(value, list | tuple):
        return [as_text(each, place, column) for each in value]
    return as_text(value, place, column)
