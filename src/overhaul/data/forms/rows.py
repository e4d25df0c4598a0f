"""Rows as they are, for methods that read rows and make rows."""

from __future__ import annotations

from typing import Any

from overhaul.data.examples import Examples
from overhaul.data.forms import Options, Row, Rows, form


def nothing(options: Options, row: Row) -> list[int]:
    """No model reads them."""
    return []


@form(columns=(), kind="rows", positions=nothing, needs="nothing")
def rows(rows: Rows, options: Options, processor: Any) -> Examples:
    """Nothing is encoded: examples without columns, whose `rows` are the file's."""
    return Examples([{}] * len(rows), rows, processor)
