"""JSON, with what must be in it."""

from __future__ import annotations

import json

from overhaul.data.verifiers import Row, verifier


@verifier()
def json_valid(row: Row, text: str) -> float:
    """The text is one JSON value, in a code fence or not; an object with the row's `keys`, if it has some."""
    inside = text.strip().removeprefix("```json").removeprefix("```").removesuffix("```")
    try:
        value = json.loads(inside, parse_constant=_refused)
    except ValueError:
        return 0.0
    keys = row.get("keys") or ()
    return float(not keys or (isinstance(value, dict) and all(key in value for key in keys)))


def _refused(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
