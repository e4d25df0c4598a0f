"""A pattern."""

from __future__ import annotations

import re

from overhaul.data.verifiers import Row, verifier
from overhaul.errors import RequestError


@verifier("pattern")
def regex(row: Row, text: str) -> float:
    """The whole text, without spaces at its ends, matches the row's `pattern`."""
    try:
        return float(re.fullmatch(str(row["pattern"]), text.strip(), re.DOTALL) is not None)
    except re.error as error:
        raise RequestError(f"The pattern {row['pattern']!r} is no regular expression: {error}.") from None
