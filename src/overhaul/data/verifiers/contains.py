"""The expected words, somewhere."""

from __future__ import annotations

from overhaul.data.verifiers import Row, verifier
from overhaul.data.verifiers.exact import normalise


@verifier("answer")
def contains(row: Row, text: str) -> float:
    """The row's `answer` (or all of several) stands in the text, as whole words, whatever the case."""
    answers = row["answer"] if isinstance(row["answer"], list | tuple) else [row["answer"]]
    return float(all(f" {_words(str(answer))} " in f" {_words(text)} " for answer in answers))


def _words(text: str) -> str:
    return normalise("".join(character if character.isalnum() else " " for character in text))
