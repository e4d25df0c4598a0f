"""Questions with answers."""

from __future__ import annotations

from typing import Any

from overhaul.data.encode import encode_qa
from overhaul.data.examples import Examples
from overhaul.data.forms import Options, Rows, characters, form


@form(
    columns=("question", "answer"),
    kind="tokens",
    positions=characters("question", "answer"),
    told=30,
    asked="question",
)
def qa(rows: Rows, options: Options, processor: Any) -> Examples:
    """The question in the material's `prompt:`, the answer, EOS; only the answer and EOS carry loss."""
    question, answer = options.column("question"), options.column("answer")
    return encode_qa(rows, processor, question, answer, options.prompt, options.column)
