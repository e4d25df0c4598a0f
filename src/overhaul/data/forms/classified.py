"""Texts with a class."""

from __future__ import annotations

from typing import Any

import torch

from overhaul.data.boundary import tokenised
from overhaul.data.encode import encoded_class
from overhaul.data.examples import Encoded, Examples
from overhaul.data.forms import Options, Rows, characters, form
from overhaul.errors import RequestError


@form(columns=("text", "label"), kind="tokens", positions=characters("text"))
def classified(rows: Rows, options: Options, processor: Any) -> Examples:
    """The text with the tokenizer's special tokens, and its class or the list of them, for models that classify sequences.

    A text is never cut: one of more tokens than `length` is refused.
    """
    text, label = options.column("text"), options.column("label")
    items: list[Encoded] = []
    for row, ids in zip(rows, tokenised(processor, [str(row[text]) for row in rows]), strict=True):
        if len(ids) > options.length:
            raise RequestError(
                f"A text has {len(ids)} tokens, more than `length: {options.length}`: {str(row[text])[:60]!r}. Write a "
                "larger length, or leave such texts out; cut, it might lose what its class is told by."
            )
        try:
            number = encoded_class(row[label])
        except (TypeError, ValueError):
            raise RequestError(
                f"The class of a text must be a number, not {row[label]!r}; see {dict(row)!r}."
            ) from None
        items.append({"input_ids": torch.tensor(ids), **number})
    return Examples(items, list(rows), processor)
