"""Characters that must and must not be there: a constraint that random search meets at a known rate."""

from __future__ import annotations

from overhaul.data.verifiers import Row, verifier


@verifier("allowed")
def characters(row: Row, text: str) -> float:
    """The text, without spaces at its ends, is made of the row's `allowed` characters alone and is not empty.

    Where the row has them: `needed` characters all occur, and there are `count` characters.
    """
    said = text.strip()
    fits = bool(said) and set(said) <= set(str(row["allowed"])) and set(str(row.get("needed") or "")) <= set(said)
    return float(fits and (row.get("count") is None or len(said) == int(row["count"])))
