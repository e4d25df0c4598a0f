"""From rows to Examples: plain text, question and answer, chat, images."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from overhaul.data.boundary import Found, backend_of, closed, find, joined, learnable
from overhaul.data.chats import Writer, tools_of, turns_of
from overhaul.data.examples import CLOSING, LABEL_SET, PROMPT_OVERLAP, Encoded, Examples
from overhaul.data.lazy import TextFile
from overhaul.data.prompts import QUESTION, Prompt
from overhaul.errors import RequestError, RowError, shifted

Rows = Sequence[Mapping[str, Any]]

QA_PROMPT = "Question: {question}\nAnswer:"
"""How a question is put to the model unless the material says otherwise (`prompt:`)."""


BATCH = 1000
"""Rows that are tokenised in one call."""

WINDOW, OVERLAP, AGREEING = 2**17, 2**12, 32
"""Long texts are tokenised in windows of so many characters, which overlap by so many; where two windows agree on so many
tokens in a row, the later one goes on for the earlier."""

AT_ONCE = 2
"""Windows that are tokenised in one call."""

T = TypeVar("T")


def encode_text(rows: Rows, tokenizer: Any, length: int = 256, column: str = "text") -> Examples:
    """Cut each text into pieces of `length` tokens; every piece begins with the tokenizer's BOS where it has one.

    A text that writes BOS itself gets no second one. Each row keeps `text_bytes`, the UTF-8 bytes behind the tokens that
    carry loss, so that bits per byte are exact.
    """
    items: list[Encoded] = []
    kept: list[Mapping[str, Any]] = []
    for part in text_parts(rows, tokenizer, length, column):
        items += part.items
        kept += part.rows
    return Examples(items, kept, tokenizer)


def text_parts(rows: Rows, tokenizer: Any, length: int = 256, column: str = "text") -> Iterator[Examples]:
    """`encode_text`, some texts or some windows of a long one at a time."""
    bos = tokenizer.bos_token_id
    room, written = length - (bos is not None), getattr(tokenizer, "bos_token", None) or ""
    for group in _together(rows, column):
        others = [{k: v for k, v in row.items() if k != column} for row in group]
        if len(group) == 1:
            text = group[0][column]
            text = text if isinstance(text, TextFile) else str(text).removeprefix(written)
            for pieces in _pieces(_read_on(text, tokenizer), room):
                yield _examples([(*piece, others[0]) for piece in _sized(pieces, bos)], bos, tokenizer)
        else:
            texts = [str(row[column]).removeprefix(written) for row in group]
            cut = zip(others, _cut_each(texts, tokenizer, room, bos), strict=True)
            yield _examples([(*piece, row) for row, pieces in cut for piece in pieces], bos, tokenizer)


def _examples(pieces: Iterable[tuple[np.ndarray, int, Mapping[str, Any]]], bos: int | None, tokenizer: Any) -> Examples:
    """One example of each piece that has something to learn: its tokens, the bytes behind those with loss, its row."""
    begin = np.array([] if bos is None else [bos], dtype=np.int64)
    found = [piece for piece in pieces if len(begin) + len(piece[0]) > 1]
    if not found:
        return Examples([], [], tokenizer)
    # their tensors are parts of one, which is made at once
    ids = torch.from_numpy(np.concatenate([part for piece, _, _ in found for part in (begin, piece)]))
    lengths = [len(begin) + len(piece) for piece, _, _ in found]
    pairs = zip(ids.split(lengths), ids.clone().split(lengths), strict=True)
    items: list[Encoded] = [{"input_ids": one, "labels": target} for one, target in pairs]
    return Examples(items, [{**row, "text_bytes": size} for _, size, row in found], tokenizer)


def _cut_each(
    texts: Sequence[str], tokenizer: Any, room: int, bos: int | None
) -> Iterator[list[tuple[np.ndarray, int]]]:
    """The pieces of each text, with the bytes behind what carries loss; only the places at their ends are looked up."""
    first, backend = int(bos is None), backend_of(tokenizer, texts[0], special=False)
    if backend is None:
        yield from (_sized(_cut(spans, room)[0], bos) for spans in _spans(texts, tokenizer))
        return
    short = [text for text in texts if bos is not None and _one_piece(text, room)]
    whole = {
        text: one.ids
        for text, one in zip(short, backend.encode_batch_fast(short, add_special_tokens=False), strict=True)
    }
    whole = {text: ids for text, ids in whole.items() if len(ids) <= room}
    longer = iter(backend.encode_batch([text for text in texts if text not in whole], add_special_tokens=False))
    for text in texts:
        if text in whole:
            yield [(np.array(whole[text], dtype=np.int64), len(text) if text.isascii() else len(text.encode()))]
            continue
        found = next(longer)
        ids, plain = np.array(found.ids, dtype=np.int64), text.isascii()
        pieces: list[tuple[np.ndarray, int]] = []
        for start in range(0, len(ids), room):
            piece = ids[start : start + room]
            begin = found.token_to_chars(min(start + first, len(ids) - 1))[0]
            end = found.token_to_chars(start + len(piece) - 1)[1]
            pieces.append((piece, max(0, end - begin) if plain else len(text[begin:end].encode())))
        yield pieces


def _one_piece(text: str, room: int) -> bool:
    """Whether a text is likely to be one piece, all of it: it ends in characters that no tokenizer leaves out."""
    ends = text[:1] + text[-1:]
    return 0 < len(text) <= 3 * room and ends.isascii() and ends.isprintable() and not any(map(str.isspace, ends))


Spans = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Token ids, and where each begins and ends in its text: in UTF-8 bytes."""


def _sized(pieces: Sequence[Spans], bos: int | None) -> list[tuple[np.ndarray, int]]:
    first = int(bos is None)
    return [(ids, max(0, int(ends[-1] - starts[min(first, len(ids) - 1)]))) for ids, starts, ends in pieces]


def _together(rows: Rows, column: str) -> Iterator[list[Mapping[str, Any]]]:
    """Rows whose texts are tokenised in one call; a text longer than a window stands alone."""
    group: list[Mapping[str, Any]] = []
    size = 0
    for row in rows:
        text = row[column]
        many = len(text) if isinstance(text, str | TextFile) else 0
        if group and (size + many > WINDOW or len(group) == BATCH):
            yield group
            group, size = [], 0
        group.append(row)
        size += many
    if group:
        yield group


def _spans(texts: Sequence[str], tokenizer: Any) -> Iterator[Spans]:
    encoding = tokenizer(
        list(texts), add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False, verbose=False
    )
    for text, ids, offsets in zip(texts, encoding["input_ids"], encoding["offset_mapping"], strict=True):
        places = np.array(offsets, dtype=np.int64).reshape(-1, 2)
        if not text.isascii():
            codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
            sizes = 1 + (codes > 0x7F).astype(np.int64) + (codes > 0x7FF) + (codes > 0xFFFF)
            places = np.concatenate([[0], np.cumsum(sizes)])[places]
        yield np.array(ids, dtype=np.int64), places[:, 0], places[:, 1]


def _cut(spans: Spans, room: int, whole: bool = True) -> tuple[list[Spans], Spans]:
    """Pieces of `room` tokens, and the rest; the last piece may be shorter, if this is the `whole` text."""
    ids, starts, ends = spans
    last = len(ids) if whole else len(ids) // room * room
    pieces = [(ids[n : n + room], starts[n : n + room], ends[n : n + room]) for n in range(0, last, room)]
    return pieces, (ids[last:], starts[last:], ends[last:])


def _pieces(stretches: Iterable[Spans], room: int) -> Iterator[list[Spans]]:
    """Pieces of `room` tokens across stretches of one text."""
    empty = np.zeros(0, dtype=np.int64)
    left: Spans = (empty, empty, empty)
    for stretch in stretches:
        joined = tuple(np.concatenate(pair) for pair in zip(left, stretch, strict=True))
        pieces, left = _cut(joined, room, whole=False)  # pyright: ignore[reportArgumentType]
        yield pieces
    yield _cut(left, room)[0]


def _read_on(text: Any, tokenizer: Any) -> Iterator[Spans]:
    """One text's tokens, stretch by stretch: those that it has as a whole, however long it is.

    A tokenizer reads what is near, so windows that overlap agree away from their ends. Two that do not are read as one.
    """
    window, begins, spans, done = "", 0, None, 0
    for group in _grouped(_windows(text), AT_ONCE):
        for (later, at), found in zip(group, _spans([later for later, _ in group], tokenizer), strict=True):
            following = _moved(found, at)
            if spans is not None:
                place = _agreement(spans, following)
                if place is None:
                    window += later[OVERLAP:]
                    spans = _moved(next(_spans([window], tokenizer)), begins)
                    continue
                yield _from(spans, done, place)
                done = int(spans[1][place])
            window, begins, spans = later, at, following
    if spans is not None:
        yield _from(spans, done, len(spans[0]))


def _windows(text: Any) -> Iterator[tuple[str, int]]:
    """Stretches of a text, each behind the end of the one before, and the byte at which each begins."""
    if isinstance(text, TextFile):
        stretches = text.stretches(WINDOW)
    else:
        whole = str(text)
        stretches = (whole[n : n + WINDOW] for n in range(0, len(whole), WINDOW))
    tail, ends = "", 0
    for stretch in stretches:
        window, begins = tail + stretch, ends - len(tail.encode())
        yield window, begins
        ends, tail = begins + len(window.encode()), window[-OVERLAP:]


def _agreement(earlier: Spans, later: Spans) -> int | None:
    """The token of the earlier window, well within both, at which the two begin to agree."""
    (ids, starts, ends), (other_ids, other_starts, _) = earlier, later
    begin, end = int(other_starts[0]), int(ends[-1])
    first = int(np.searchsorted(starts, begin + (end - begin) // 3))
    last = int(np.searchsorted(starts, end - (end - begin) // 4)) - AGREEING
    for n in range(max(1, first), last):
        m = int(np.searchsorted(other_starts, starts[n]))
        ours, theirs = slice(n, n + AGREEING), slice(m, m + AGREEING)
        same = np.array_equal(starts[ours], other_starts[theirs]) and np.array_equal(ids[ours], other_ids[theirs])
        if starts[n] > starts[n - 1] and same:
            return n
    return None


def _moved(spans: Spans, by: int) -> Spans:
    return spans[0], spans[1] + by, spans[2] + by


def _from(spans: Spans, done: int, last: int) -> Spans:
    """The tokens from byte `done` on, before the token `last`."""
    first = int(np.searchsorted(spans[1], done)) if done else 0
    return spans[0][first:last], spans[1][first:last], spans[2][first:last]


def _grouped(values: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size`; the last may be shorter."""
    rest = iter(values)
    while group := list(itertools.islice(rest, size)):
        yield group


def encode_qa(
    rows: Rows,
    tokenizer: Any,
    question: str = "question",
    answer: str = "answer",
    prompt: str = QA_PROMPT,
    named: Callable[[str], str] = str,
) -> Examples:
    """Prompt, a space where neither side has white space, the answer, EOS; only the answer and EOS carry loss.

    Prompt and answer are tokenised as one text (`data.boundary`).

    Args:
        rows: each with an answer, and with what the prompt names.
        tokenizer: of transformers.
        question: the column that the prompt calls {question}.
        answer: the column of answers.
        prompt: any column may be named in it (`data.prompts`).
        named: what the rows call any other column that it names.

    Raises:
        RowError: a row lacks an answer, or what the prompt names.
    """
    asked, items, kept = Prompt.of(prompt), list[Encoded](), list[Mapping[str, Any]]()

    def column(name: str) -> str:
        return question if name == QUESTION else named(name)

    for group in _grouped(enumerate(rows), BATCH):
        for place, row in group:
            if not str(row[answer]).strip():
                raise RowError(place, f"a question has no answer: {dict(row)!r}.")
        texts = [asked.fill(row, place, column) for place, row in group]
        with shifted(group[0][0]):
            made, overlaps = with_answers(tokenizer, texts, [str(row[answer]) for _, row in group])
        items += made
        for (_, row), text, overlap in zip(group, texts, overlaps, strict=True):
            kept.append({**row, "question": row.get(question, text), "answer": row[answer], "prompt": text, **overlap})
    return Examples(items, kept, tokenizer)


def with_answers(
    tokenizer: Any, prompts: Sequence[str], answers: Sequence[str]
) -> tuple[list[Encoded], list[dict[str, str]]]:
    """Examples of prompts with their answers and EOS, and what each row has to say of where the answer begins."""
    pairs = [joined(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
    places = find(tokenizer, [text for text, _ in pairs], [span for _, span in pairs])
    places = closed(places, tokenizer)
    return learnable(places), list(map(overlap_of, places))


def overlap_of(found: Found) -> dict[str, str]:
    """What a row says where the boundary of its prompt falls inside a token."""
    return {PROMPT_OVERLAP: found.overlap} if found.overlap else {}


def answered(prompt: Sequence[int], answer: Sequence[int], eos: int | None) -> Encoded:
    """One example from token ids: the prompt is read, the answer (and EOS) is learnt."""
    ids = [*prompt, *answer, *([] if eos is None else [eos])]
    return learnable([Found(ids, len(prompt), len(ids), len(ids), "")])[0]


def encode_chat(rows: Rows, tokenizer: Any, column: str = "messages") -> Examples:
    """The tokenizer's own chat template; only the last assistant turn, and what the template writes behind it, carry loss.

    A row's `tools`, if it has some, are given to the template. Its `closing_tokens` are how many tokens behind the answer
    carry loss: they are learnt, and no part of what is measured. `prompt` is what the template writes before the answer.

    Raises:
        RowError: the messages are no chat that ends with an answer, or the template does not write them.
    """
    writer, items, kept = Writer(tokenizer), list[Encoded](), list[Mapping[str, Any]]()
    for group in _grouped(enumerate(rows), BATCH):
        chats = [turns_of(row[column], place) for place, row in group]
        written = [
            writer.answer(chat, place, tools_of(row, place)) for chat, (place, row) in zip(chats, group, strict=True)
        ]
        with shifted(group[0][0]):
            found = find(tokenizer, [text for text, _ in written], [span for _, span in written], special=False)
        items += learnable(found)
        for (_, row), chat, (text, span), each in zip(group, chats, written, found, strict=True):
            answer, wrote = chat[-1]["content"], text[span.begin : span.end]
            asked = {
                "question": chat[-2].get("content", "") if len(chat) > 1 else "",
                "answer": answer if answer.strip() == wrote.strip() else wrote,
            }
            said = {"prompt": text[: span.begin], CLOSING: each.until - each.last, **overlap_of(each)}
            kept.append({**row, "messages": chat, **asked, **said})
    return Examples(items, kept, tokenizer)


def encode_images(rows: Rows, processor: Any = None, image: str = "image", label: str | None = "label") -> Examples:
    """Images as float tensors [c, h, w] with an integer label, or several, or none where `label` is None.

    Arrays of two dimensions become one channel. A processor, if given, turns PIL images into pixel values; arrays are
    taken as they are.
    """
    items: list[Encoded] = []
    for row in rows:
        item = {"pixel_values": pixels(row[image], processor)}
        items.append(item if label is None else {**item, **encoded_class(row[label])})
    kept = [{k: v for k, v in row.items() if k != image} for row in rows]
    return Examples(items, kept, processor)


def encoded_class(value: Any) -> Encoded:
    """The number of a class as `labels` []; of several that all are right, `labels` is the first and `label_set` [k] all.

    Raises:
        RequestError: the list is empty.
    """
    if not isinstance(value, list | tuple):
        return {"labels": torch.tensor(int(value))}
    if not value:
        raise RequestError("A row lists no class at all, so nothing would be right for it. Leave such rows out.")
    numbers = torch.tensor([int(one) for one in value])
    return {"labels": numbers[0], LABEL_SET: numbers}


def pixels(value: Any, processor: Any) -> Tensor:
    """One image, a PIL one or an array, as a float tensor [c, h, w]."""
    if hasattr(value, "convert"):  # a PIL image
        if processor is None:
            raise RequestError("Image files need the model's image processor; the model folder has none.")
        processor = getattr(processor, "image_processor", processor)
        return processor(images=value.convert("RGB"), return_tensors="pt")["pixel_values"][0]
    array = torch.as_tensor(value, dtype=torch.float32)
    return array[None] if array.ndim == 2 else array
