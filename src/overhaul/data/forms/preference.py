"""Pairs of answers to one prompt, of which one is preferred."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from overhaul.data.boundary import Found, Span, closed, find, joined, learnable
from overhaul.data.chats import Turn, Writer, tools_of, turns_of
from overhaul.data.encode import overlap_of
from overhaul.data.examples import CLOSING, Encoded, Examples
from overhaul.data.forms import CHARACTERS_PER_TOKEN, Options, Row, Rows, form
from overhaul.data.forms.prompt import is_chat, prompts
from overhaul.errors import RowError

SIDES = ("chosen", "rejected")


def two(options: Options, row: Row) -> list[int]:
    """A pair is two sequences, each with the prompt."""
    prompt, *answers = (len(str(row.get(options.column(name), ""))) for name in ("prompt", *SIDES))
    return [sum((len(options.prompt) + prompt + each) // CHARACTERS_PER_TOKEN + 1 for each in answers)]


@form(
    columns=("prompt", *SIDES), kind="pairs", positions=two, told=60, asked="prompt", optional=("tools",)
)  # fmt: skip
def preference(rows: Rows, options: Options, processor: Any) -> Examples:
    """The prompt with the chosen answer, and beside it (`other_...`) with the rejected one; answers alone carry loss.

    A prompt is a text in the material's `prompt:`, or turns of a chat. An answer is a text, or turns of which the last is
    the assistant's: after the prompt's own turns, where they begin with those. Rows keep `prompt` as it was put,
    `answer` and `rejected`.
    """
    column = options.column("prompt")
    chats = [is_chat(row.get(column)) for row in rows]
    texts = prompts(rows, chats, options, processor)
    writer = Writer(processor) if any(chats) else None
    said = [[_said(row[options.column(side)], place) for side in SIDES] for place, row in enumerate(rows)]
    written: list[tuple[str, Span]] = []
    for place, (row, text, pair) in enumerate(zip(rows, texts, said, strict=True)):
        for side, answer in zip(SIDES, pair, strict=True):
            if writer is None or not chats[place]:
                written.append(joined(text, answer))
            else:
                turns = _turns(row[column], row[options.column(side)], place)
                written.append(writer.answer(turns, place, tools_of(row, place)))
    found = _found(processor, written, [chat for chat in chats for _ in SIDES])
    firsts, others = learnable(found[::2]), learnable(found[1::2])
    items: list[Encoded] = [
        {**first, **{f"other_{name}": value for name, value in other.items()}}
        for first, other in zip(firsts, others, strict=True)
    ]
    kept: list[Row] = []
    for n, (row, text, (chosen, rejected)) in enumerate(zip(rows, texts, said, strict=True)):
        closing = {CLOSING: found[2 * n].until - found[2 * n].last} if chats[n] else {}
        asked = {"question": row.get(column, text), "prompt": text, **closing, **overlap_of(found[2 * n])}
        kept.append({**row, "answer": chosen, "rejected": rejected, **asked})
    return Examples(items, kept, processor)


def _said(answer: Any, place: int) -> str:
    """The text of an answer, which may be given as turns."""
    if is_chat(answer):
        last = turns_of(answer, place)[-1]
        if last["role"] != "assistant":
            raise RowError(place, f"an answer given as a chat must end with an assistant turn, not {last!r}.")
        answer = last.get("content", "")
    if answer is None or not str(answer).strip():
        raise RowError(place, "a preference lacks an answer.")
    return str(answer)


def _turns(prompt: Any, answer: Any, place: int) -> list[Turn]:
    """The whole chat: the prompt's turns, and those of the answer that are not among them."""
    before = turns_of(prompt, place)
    if not is_chat(answer):
        return [*before, {"role": "assistant", "content": str(answer)}]
    turns = turns_of(answer, place)
    if turns[: len(before)] == before:
        return turns
    if turns[0]["role"] == before[-1]["role"]:
        raise RowError(
            place,
            f"an answer given as a chat begins with a turn of {turns[0]['role']!r} that is not the prompt's last one.",
        )
    return [*before, *turns]


def _found(tokenizer: Any, written: Sequence[tuple[str, Span]], chats: Sequence[bool]) -> list[Found]:
    """The tokens of every text; those of chats have their special tokens from the template."""
    places = {chat: [n for n, each in enumerate(chats) if each is chat] for chat in (False, True)}
    found: dict[int, Found] = {}
    for chat, chosen in places.items():
        try:
            made = find(tokenizer, [written[n][0] for n in chosen], [written[n][1] for n in chosen], special=not chat)
        except RowError as error:
            raise RowError(chosen[error.place] // len(SIDES), error.problem) from None
        found |= zip(chosen, made if chat else closed(made, tokenizer), strict=True)
    return [found[n] for n in range(len(written))]
