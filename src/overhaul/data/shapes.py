"""Usual shapes of rows that are no form's own, read as one: ShareGPT, Alpaca, prompts with completions, SQuAD, and others.

1. ShareGPT's `conversations` are the turns of a chat: human is user, gpt is assistant.
2. Alpaca's question is the instruction, with the input behind an empty line where there is one; its answer is the output.
3. A prompt with a completion is a question with its answer, or a chat where both are turns.
4. SQuAD's `answers` are the answers.
5. Conversations that are chosen and rejected share their first turns, which are the prompt.

Columns that went into others are left out, except where the material's `prompt:` names them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from overhaul.data.values import as_text
from overhaul.errors import RequestError

Row = Mapping[str, Any]

ROLES: Mapping[str, str] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "system": "system",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
"""Who speaks in ShareGPT's rows, and who that is."""


@dataclass(frozen=True)
class Shape:
    """One of them.

    Attributes:
        columns: that a row has, by which it is told.
        form: as which it is read.
        make: (values of the columns, of `more` ones as well, the row's place) -> columns of the form.
        more: columns that are read where a row has them.
        fits: what else must hold of the first row's values.
    """

    columns: tuple[str, ...]
    form: str
    make: Callable[[Row, str], dict[str, Any]]
    more: tuple[str, ...] = ()
    fits: Callable[[Row], bool] = lambda _: True

    @property
    def reads(self) -> tuple[str, ...]:
        """All columns that it knows."""
        return (*self.columns, *self.more)

    def read(self, row: Row, column: Callable[[str], str], place: str, kept: Collection[str]) -> dict[str, Any]:
        """The row as its form has it.

        Args:
            row: as the file has it.
            column: what the file calls a column.
            place: of the row, for errors.
            kept: columns that stay, because a prompt names them.
        """
        names = {name: column(name) for name in self.reads if column(name) in row}
        made = self.make({name: row[file] for name, file in names.items()}, place)
        used = set(names.values()).difference(kept)
        return {**{name: value for name, value in row.items() if name not in used}, **made}


def _turns(value: Any, place: str, column: str) -> list[Any]:
    if not isinstance(value, list | tuple) or not value or not all(isinstance(turn, Mapping) for turn in value):
        raise RequestError(f"{place}: {column!r} is no list of turns of a conversation.")
    return list(value)


def _sharegpt(values: Row, place: str) -> dict[str, Any]:
    messages: list[Any] = []
    for turn in _turns(values["conversations"], place, "conversations"):
        if "role" in turn:
            messages.append(dict(turn))
            continue
        speaker = turn.get("from")
        if speaker not in ROLES or "value" not in turn:
            raise RequestError(
                f"{place}: a turn is {{from: human, value: ...}}, from one of {', '.join(ROLES)}, not {dict(turn)!r}."
            )
        text = as_text(turn["value"], place, "value", empty=True)
        said = {name: turn[name] for name in ("weight", "train") if name in turn}
        messages.append({"role": ROLES[speaker], "content": text, **said})
    return {"messages": messages}


def _alpaca(values: Row, place: str) -> dict[str, Any]:
    question = as_text(values["instruction"], place, "instruction")
    more = values.get("input")
    if more is not None and (text := as_text(more, place, "input", empty=True)).strip():
        question = f"{question}\n\n{text}"
    return {"question": question, "answer": values["output"]}


def _completed(values: Row, place: str) -> dict[str, Any]:
    return {"question": values["prompt"], "answer": values["completion"]}


def _talked(values: Row, place: str) -> dict[str, Any]:
    return {"messages": [turn for name in ("prompt", "completion") for turn in _turns(values[name], place, name)]}


def _squad(values: Row, place: str) -> dict[str, Any]:
    return {"question": values["question"], "answer": values["answers"]}


def _preferred(values: Row, place: str) -> dict[str, Any]:
    chosen, rejected = (_turns(values[name], place, name) for name in ("chosen", "rejected"))
    same = 0
    while same < min(len(chosen), len(rejected)) - 1 and chosen[same] == rejected[same]:
        same += 1
    if not same:
        raise RequestError(f"{place}: 'chosen' and 'rejected' share no first turn that could be the prompt of both.")
    return {"prompt": chosen[:same], "chosen": chosen[same:], "rejected": rejected[same:]}


def _are_turns(*names: str) -> Callable[[Row], bool]:
    return lambda values: all(isinstance(values[name], list | tuple) for name in names)


SHAPES: Sequence[Shape] = (
    Shape(("conversations",), "chat", _sharegpt),
    Shape(("prompt", "completion"), "chat", _talked, fits=_are_turns("prompt", "completion")),
    Shape(("prompt", "completion"), "qa", _completed, fits=lambda values: isinstance(values["prompt"], str)),
    Shape(("instruction", "output"), "qa", _alpaca, more=("input",)),
    Shape(("question", "answers"), "qa", _squad),
    Shape(("chosen", "rejected"), "preference", _preferred, fits=_are_turns("chosen", "rejected")),
)


def shape_of(row: Row, column: Callable[[str], str], form: str | None) -> Shape | None:
    """The first shape that a row has and that is read as `form`, if one is named."""
    for shape in SHAPES:
        names = {name: column(name) for name in shape.columns}
        there = form in (None, shape.form) and all(file in row for file in names.values())
        if there and shape.fits({name: row[file] for name, file in names.items()}):
            return shape
    return None
