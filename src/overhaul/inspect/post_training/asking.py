"""How models are asked whether a statement is true, and which tokens of the prompt are which, by offsets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from annotated_types import Ge
from torch import Tensor

from overhaul.data.examples import IGNORED, Encoded
from overhaul.errors import RequestError

NAME = "inspect.post_training"


@dataclass(frozen=True)
class Asking:
    """How a model is asked whether a statement is true.

    Attributes:
        question: what follows each statement.
        true_word: the answer to a true one.
        false_word: the answer to a false one.
        shots: answered examples before each statement, half of them true, in an order drawn for each; 0 for none.
    """

    question: str = "This statement is:"
    true_word: str = "TRUE"
    false_word: str = "FALSE"
    shots: Annotated[int, Ge(0)] = 4


@dataclass(frozen=True)
class Prompt:
    """A statement that is asked about.

    Attributes:
        ids: the tokens, up to where the answer is predicted.
        yes: the token with which the true answer goes on, where it differs from the false one.
        no: that of the false one.
        statement: the tokens of the statement.
        object: those of its object, where that is known.
    """

    ids: Sequence[int]
    yes: int
    no: int
    statement: Sequence[int]
    object: Sequence[int]

    @property
    def last(self) -> int:
        """The token at which the answer is predicted."""
        return len(self.ids) - 1

    @property
    def item(self) -> Encoded:
        """With its answer, on which alone loss falls."""
        ids = torch.tensor([*self.ids, self.yes])
        labels = torch.full_like(ids, IGNORED)
        labels[-1] = self.yes
        return {"input_ids": ids, "labels": labels}


class Asker:
    """Writes prompts for one tokenizer."""

    def __init__(self, tokenizer: Any, asking: Asking) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise RequestError(
                f"{NAME}: the places of words are read from a fast tokenizer's offsets, and there is "
                f"{'no tokenizer' if tokenizer is None else 'a slow one'} in the post-trained folder. Save one "
                "(tokenizer.json) with the model."
            )
        self.tokenizer, self.asking = tokenizer, asking

    def prompt(self, statement: str, object: str | None = None, shots: Sequence[tuple[str, bool]] = ()) -> Prompt:
        """The prompt of a statement behind answered examples.

        Args:
            statement: the statement.
            object: a part of it whose place is wanted.
            shots: statements with their truth.

        Raises:
            RequestError: the object is not in it, or the two answers begin alike.
        """
        before = "".join(f"{self._asked(text)} {self._word(truth)}\n" for text, truth in shots)
        text = before + self._asked(statement)
        ids, offsets = self._encoded(text)
        answered = [self._encoded(f"{text} {self._word(truth)}")[0] for truth in (True, False)]
        shared = next((n for n, (a, b) in enumerate(zip(*answered, strict=False)) if a != b), None)
        if shared is None or answered[0][: len(ids)] != ids or shared < len(ids):
            raise RequestError(
                f"{NAME}: behind {self.asking.question!r} this tokenizer does not tell {self.asking.true_word!r} from "
                f"{self.asking.false_word!r} by a token of its own. Choose other words (`true_word`, `false_word`)."
            )
        begin = len(before)
        place = None if object is None else statement.rfind(object)
        if place == -1:
            raise RequestError(f"{NAME}: the object {object!r} is not in the statement {statement!r}.")
        return Prompt(
            answered[0][:shared],
            answered[0][shared],
            answered[1][shared],
            _within(offsets, begin, begin + len(statement)),
            [] if object is None or place is None else _within(offsets, begin + place, begin + place + len(object)),
        )

    def statement(self, text: str) -> Tensor:
        """The tokens of a statement alone, up to its end."""
        return torch.tensor(self._encoded(text)[0])

    def _asked(self, statement: str) -> str:
        return f"{statement} {self.asking.question}" if self.asking.question else statement

    def _word(self, truth: bool) -> str:
        return self.asking.true_word if truth else self.asking.false_word

    def _encoded(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        found = self.tokenizer(text, return_offsets_mapping=True, verbose=False)
        offsets = list(found["offset_mapping"])
        end = _within(offsets, 0, len(text))[-1] + 1  # some tokenizers end every text with a token of no characters
        return list(found["input_ids"])[:end], offsets[:end]


def _within(offsets: Sequence[tuple[int, int]], begin: int, end: int) -> list[int]:
    """The tokens that hold a character from `begin` to `end`."""
    return [n for n, (start, stop) in enumerate(offsets) if start < end and stop > begin]


def named(row: Mapping[str, Any], column: str) -> str | None:
    """What a row says in a column that it may lack, as text: the number 0 is a name like any other."""
    value = row.get(column)
    return None if value is None or value == "" else str(value)


def needed(rows: Sequence[Mapping[str, Any]], role: str, columns: Sequence[str]) -> Sequence[Mapping[str, Any]]:
    """The rows of a role.

    Raises:
        RequestError: there is none, or a row lacks a column: it is named.
    """
    if not len(rows):
        raise RequestError(f"{NAME}: the role {role!r} has no rows. Leave the role out to leave its part out.")
    for number, row in enumerate(rows, 1):
        for column in columns:
            if column not in row or row[column] is None or row[column] == "":
                raise RequestError(
                    f"{NAME}: row {number} of {role!r} has no {column!r}. Each row needs {', '.join(columns)}."
                )
    return rows


def drawn(count: int, tag: int) -> Tensor:
    """An order of `count` things, from the seed and a tag alone."""
    return torch.randperm(count, generator=generator(tag))


def generator(tag: int) -> torch.Generator:
    """A generator from the seed and a tag alone."""
    return torch.Generator().manual_seed((torch.initial_seed() + 7919 * tag) % 2**63)


def shots_of(statements: Sequence[tuple[str, bool]], count: int, tag: int) -> list[tuple[str, bool]]:
    """Answered examples, half of them true, in an order of their own.

    Raises:
        RequestError: there are too few true or false statements.
    """
    mixed = [statements[n] for n in drawn(len(statements), 2 * tag).tolist()]
    chosen = [
        one for truth, half in ((True, (count + 1) // 2), (False, count // 2)) for one in _some(mixed, truth, half)
    ]
    if len(chosen) < count:
        raise RequestError(
            f"{NAME}: shots={count} needs as many other statements, half of them true, and {len(chosen)} could be found. "
            "Give more rows, or fewer shots."
        )
    return [chosen[n] for n in drawn(count, 2 * tag + 1).tolist()]


def _some(statements: Sequence[tuple[str, bool]], truth: bool, count: int) -> list[tuple[str, bool]]:
    return [one for one in statements if one[1] == truth][:count]
