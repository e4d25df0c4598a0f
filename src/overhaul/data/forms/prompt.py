"""Prompts without an answer to learn: what sampling and rewards read. A verifier says what answers them."""

from __future__ import annotations

from typing import Any

import torch

from overhaul.data.boundary import Found, before_answers, tokenised
from overhaul.data.chats import Writer, tools_of, turns_of
from overhaul.data.encode import overlap_of
from overhaul.data.examples import IGNORED, Encoded, Examples
from overhaul.data.forms import Options, Row, Rows, characters, form
from overhaul.data.prompts import QUESTION, Prompt


@form(columns=("prompt",), kind="tokens", positions=characters("prompt"), asked="prompt", optional=("tools",))
def prompt(rows: Rows, options: Options, processor: Any) -> Examples:
    """The prompt in the material's `prompt:`, or turns of a chat by the chat template; nothing carries loss.

    Its tokens are those that stand before an answer: where its last characters would join an answer's first token, they
    are left to the answer. Other columns stay in the rows, where the material's verifier finds them.
    """
    column = options.column("prompt")
    chats = [is_chat(row.get(column)) for row in rows]
    texts = prompts(rows, chats, options, processor)
    plain = iter(before_answers(processor, [text for text, chat in zip(texts, chats, strict=True) if not chat]))
    # a template writes the special tokens itself
    turns = iter(tokenised(processor, [text for text, chat in zip(texts, chats, strict=True) if chat], special=False))
    found = [Found(next(turns), 0, 0, 0, "") if chat else next(plain) for chat in chats]
    items: list[Encoded] = [
        {"input_ids": torch.tensor(each.ids), "labels": torch.full((len(each.ids),), IGNORED)} for each in found
    ]
    kept: list[Row] = [
        {**row, "question": row.get(column, text), "prompt": text, **overlap_of(each)}
        for row, text, each in zip(rows, texts, found, strict=True)
    ]
    return Examples(items, kept, processor)


def is_chat(value: Any) -> bool:
    """Whether a prompt is turns of a chat, and no text."""
    return isinstance(value, list | tuple)


def prompts(rows: Rows, chats: list[bool], options: Options, tokenizer: Any) -> list[str]:
    """What is put to the model, written out: texts in the material's `prompt:`, chats by their template."""
    column, asked = options.column("prompt"), Prompt.of(options.prompt)
    writer = Writer(tokenizer, "Prompts that are turns of a chat need") if any(chats) else None
    return [
        asked.fill(row, place, lambda name: column if name == QUESTION else options.column(name))
        if writer is None or not chat
        else writer.prompt(turns_of(row[column], place), place, tools_of(row, place))
        for place, (row, chat) in enumerate(zip(rows, chats, strict=True))
    ]
