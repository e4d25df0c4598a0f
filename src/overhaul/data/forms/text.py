"""Plain text, cut into pieces."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from overhaul.data.encode import encode_text, text_parts
from overhaul.data.examples import Examples
from overhaul.data.forms import CHARACTERS_PER_TOKEN, Options, Row, Rows, form
from overhaul.data.lazy import TextFile


def _size(text: Any) -> int:
    return len(text if isinstance(text, TextFile) else str(text))


def pieces(options: Options, row: Row) -> list[int]:
    """Whole pieces, and what is left over."""
    tokens = _size(row[options.column("text")]) // CHARACTERS_PER_TOKEN + 1
    whole, rest = divmod(tokens, options.length)
    return [options.length] * whole + [rest] * (rest > 1)


def parts(rows: Rows, options: Options, processor: Any) -> Iterator[Examples]:
    """As the form, without holding a long text."""
    return text_parts(rows, processor, options.length, options.column("text"))


@form(columns=("text",), kind="tokens", positions=pieces, told=20, parts=parts)
def text(rows: Rows, options: Options, processor: Any) -> Examples:
    """Pieces of `length` tokens, all of which carry loss; every piece begins with the tokenizer's BOS where it has one."""
    return encode_text(rows, processor, options.length, options.column("text"))
