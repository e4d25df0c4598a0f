"""Plain text, cut into pieces."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from overhaul.data.encode import text_parts
from overhaul.data.examples import IGNORED, Encoded, Examples
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
    frame = _frame(processor)
    for some in text_parts(
        rows, processor, options.length - (frame is not None) - _opens(frame, processor), options.column("text")
    ):
        yield some if frame is None else _framed(some, frame, processor)


@form(columns=("text",), kind="tokens", positions=pieces, told=20, parts=parts)
def text(rows: Rows, options: Options, processor: Any) -> Examples:
    """Pieces of `length` tokens, all of which carry loss; every piece begins with the tokenizer's BOS where it has one.

    Where the tokenizer puts [CLS] and [SEP] around a text, they stand around every piece, and carry no loss.
    """
    made = list(parts(rows, options, processor))
    items = [item for some in made for item in some.items]
    return Examples(items, [row for some in made for row in some.rows], processor)


def _frame(tokenizer: Any) -> tuple[int, int] | None:
    """The tokens before and behind every text of an encoder."""
    first, last = (getattr(tokenizer, name, None) for name in ("cls_token_id", "sep_token_id"))
    if first is None or last is None or tokenizer("", verbose=False)["input_ids"] != [first, last]:
        return None
    return first, last


def _opens(frame: tuple[int, int] | None, tokenizer: Any) -> int:
    """Tokens in front of a piece that cutting does not put there."""
    return int(frame is not None and tokenizer.bos_token_id is None)


def _framed(examples: Examples, frame: tuple[int, int], tokenizer: Any) -> Examples:
    """The same pieces within [CLS] and [SEP]; what carried loss carries it, and no more."""
    opening = [frame[0]][: _opens(frame, tokenizer)]
    around = ((opening, [frame[1]]), ([IGNORED] * len(opening), [IGNORED]))
    items: list[Encoded] = []
    for item in examples.items:
        ids, labels = item["input_ids"], item["labels"].clone()
        if opening:  # its bytes are not counted
            labels[0] = IGNORED
        pair = (
            torch.cat([torch.tensor(before), values, torch.tensor(behind)])
            for values, (before, behind) in zip((ids, labels), around, strict=True)
        )
        items.append(dict(zip(("input_ids", "labels"), (each.long() for each in pair), strict=True)))
    return Examples(items, examples.rows, tokenizer)
