"""Pairs of answers to one prompt, of which one is preferred."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from overhaul.data.encode import answered
from overhaul.data.examples import Encoded, Examples
from overhaul.data.forms import CHARACTERS_PER_TOKEN, Options, Row, Rows, form
from overhaul.data.forms.prompt import prompts
from overhaul.errors import RequestError


def two(options: Options, row: Row) -> list[int]:
    """A pair is two sequences, each with the prompt."""
    prompt, *answers = (len(str(row[options.column(name)])) for name in ("prompt", "chosen", "rejected"))
    return [sum((len(options.prompt) + prompt + each) // CHARACTERS_PER_TOKEN + 1 for each in answers)]


@form(columns=("prompt", "chosen", "rejected"), kind="pairs", positions=two, told=60)
def preference(rows: Rows, options: Options, processor: Any) -> Examples:
    """The prompt with the chosen answer, and beside it (`other_...`) with the rejected one; answers alone carry loss.

    A prompt is a text in the material's `prompt:`, or turns of a chat. An answer is a text, or turns of which the last is
    the assistant's: after the prompt's own turns, where they begin with those. Rows keep `prompt` as it was put,
    `answer` and `rejected`.
    """
    texts, before = prompts([row[options.column("prompt")] for row in rows], options, processor)
    items: list[Encoded] = []
    kept: list[Row] = []
    for row, text, ids in zip(rows, texts, before, strict=True):
        chat = not isinstance(row[options.column("prompt")], str)
        sides = {name: _said(row[options.column(name)], row) for name in ("chosen", "rejected")}
        first, other = (
            _with_answer(ids, said, row[options.column("prompt")], text, chat, processor) for said in sides.values()
        )
        items.append({**first, **{f"other_{name}": value for name, value in other.items()}})
        answers = {"answer": sides["chosen"], "rejected": sides["rejected"]}
        kept.append({**row, **answers, "question": row[options.column("prompt")], "prompt": text})
    return Examples(items, kept, processor)


def _said(answer: Any, row: Row) -> str:
    """The text of an answer, which may be given as turns."""
    if isinstance(answer, Sequence) and not isinstance(answer, str):
        if not answer or answer[-1]["role"] != "assistant":
            raise RequestError(f"An answer given as a chat must end with an assistant turn; see {dict(row)!r}.")
        answer = answer[-1]["content"]
    if not str(answer).strip():
        raise RequestError(f"A preference lacks an answer: {dict(row)!r}.")
    return str(answer)


def _with_answer(ids: list[int], said: str, prompt: Any, text: str, chat: bool, tokenizer: Any) -> Encoded:
    if not chat:
        return answered(ids, tokenizer(f" {said}", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id)
    whole = tokenizer.apply_chat_template([*prompt, {"role": "assistant", "content": said}], tokenize=False)
    if not whole.startswith(text):
        raise RequestError("This chat template rewrites earlier turns, so the answer cannot be told from its prompt.")
    return answered(ids, tokenizer(whole[len(text) :], add_special_tokens=False)["input_ids"], None)
