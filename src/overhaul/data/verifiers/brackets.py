"""Balanced brackets."""

from __future__ import annotations

from overhaul.data.verifiers import Row, verifier

OPENERS, CLOSERS = "([{", ")]}"


@verifier("question")
def brackets(row: Row, text: str) -> float:
    """Any brackets that close those of the row's `question` ("close ( [") in the right order."""
    return float(balanced(str(row["question"]).removeprefix("close ") + text))


def balanced(text: str) -> bool:
    """Whether every bracket in `text` is closed by its own kind in the right order. Other characters make it False."""
    stack: list[str] = []
    for character in text.replace(" ", ""):
        if character in OPENERS:
            stack.append(CLOSERS[OPENERS.index(character)])
        elif not stack or stack.pop() != character:
            return False
    return not stack
