"""Conversations."""

from __future__ import annotations

from typing import Any

from overhaul.data.encode import encode_chat
from overhaul.data.examples import Examples
from overhaul.data.forms import Options, Rows, characters, form


@form(columns=("messages",), kind="tokens", positions=characters("messages"), told=40, optional=("tools",))
def chat(rows: Rows, options: Options, processor: Any) -> Examples:
    """The chat template, the tokenizer's own or the material's; only the last assistant turn carries loss."""
    return encode_chat(rows, processor, options.column("messages"))
