"""The expected words and no others."""

from __future__ import annotations

from overhaul.data.verifiers import Row, verifier


@verifier("answer")
def exact(row: Row, text: str) -> float:
    """The row's `answer`, whatever its case, its spaces and the punctuation at its ends."""
    return float(normalise(text) == normalise(str(row["answer"])))


def normalise(text: str) -> str:
    """Lower case, single spaces, no punctuation at the ends: how exact answers are compared."""
    return " ".join(text.lower().split()).strip(" .,;:!?\"'")
