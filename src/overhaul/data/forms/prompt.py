"""Prompts without an answer to learn: what sampling and rewards read. A verifier says what answers them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from overhaul.data.encode import before_answers, tokenised
from overhaul.data.examples import IGNORED, Encoded, Examples
from overhaul.data.forms import Options, Rows, characters, form
from overhaul.errors import RequestError


@form(columns=("prompt",), kind="tokens", positions=characters("prompt"))
def prompt(rows: Rows, options: Options, processor: Any) -> Examples:
    """The prompt in the material's `prompt:`, or turns of a chat by the tokenizer's template; nothing carries loss.

    Other columns stay in the rows, where the material's verifier finds them.
    """
    column = options.column("prompt")
    texts, put = prompts([row[column] for row in rows], options, processor)
    items: list[Encoded] = [{"input_ids": torch.tensor(ids), "labels": torch.full((len(ids),), IGNORED)} for ids in put]
    kept = [{**row, "question": row[column], "prompt": text} for row, text in zip(rows, texts, strict=True)]
    return Examples(items, kept, processor)


def prompts(given: Sequence[Any], options: Options, tokenizer: Any) -> tuple[list[str], list[list[int]]]:
    """What is put to the model, written out and in tokens: texts in the material's `prompt:`, chats by their template."""
    turns = [isinstance(one, Sequence) and not isinstance(one, str) for one in given]
    if any(turns) and not getattr(tokenizer, "chat_template", None):
        raise RequestError("Prompts that are turns of a chat need a tokenizer with a chat template; this one has none.")
    texts = [
        tokenizer.apply_chat_template(one, tokenize=False, add_generation_prompt=True)
        if chat
        else options.prompt.format(question=one)
        for one, chat in zip(given, turns, strict=True)
    ]
    plain = iter(before_answers(tokenizer, [text for text, chat in zip(texts, turns, strict=True) if not chat]))
    # a template writes the special tokens itself
    chats = iter(tokenised(tokenizer, [text for text, chat in zip(texts, turns, strict=True) if chat], special=False))
    return texts, [next(chats if chat else plain) for chat in turns]
