"""Conversations."""

from __future__ import annotations

from typing import Any

from overhaul.data.encode import encode_chat
from overhaul.data.examples import Examples
from overhaul.data.forms import Options, Rows, characters, form


@form(columns=("messages",), kind="tokens", positions=characters("messages"), told=40)
def chat(rows: Rows, options: Options, processor: Any) -> Examples:
    """The tokenizer's own chat template; only the last assistant turn carries loss."""
    return encode_chat(rows, processor, options.column("messages"))
