"""Prompt and answer as one string, and where among its tokens the answer stands.

In use a model reads one text, so prompt and answer are tokenised as one; apart, many tokenizers begin the answer with a
space that it does not have, or miss the token that spans both.

1. The answer begins at the first token that holds any of its characters: by the tokenizer's offsets, or, where it has none,
   where the tokens of the prompt alone and of the whole part.
2. Where the boundary falls inside a token (`"A: "` before `"yes"`, whose space belongs to "Ġyes"), that token counts as the
   answer's: read as part of the prompt it would give the answer's beginning away. It carries loss, answers are generated
   from the tokens before it, and the prompt's characters in it (`overlap`) are cut from what is generated.
3. Special tokens are those that the tokenizer itself puts around a text. A prompt that writes BOS itself gets no second one.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from overhaul.data.examples import IGNORED, PROMPT_OVERLAP, Encoded
from overhaul.data.widths import first_tokens
from overhaul.errors import RowError

SPACES = ("Ġ", "▁")
"""How tokens begin that hold the space before them."""

MANY = 100
"""Texts from which on it is worth to know how many bytes each token stands for."""

FOLLOWED = "a"
"""A word that stands for any answer where none is given."""


class Span(NamedTuple):
    """Characters of an answer within a text, and up to where what follows it is learnt too."""

    begin: int
    end: int
    until: int


class Found(NamedTuple):
    """The tokens of a text; those from `first` to `last` hold its answer, those up to `until` are learnt.

    `overlap`: the characters before the answer that its first token holds too.
    """

    ids: list[int]
    first: int
    last: int
    until: int
    overlap: str


def joined(prompt: str, answer: str) -> tuple[str, Span]:
    """Prompt and answer as one text: a space between them, where neither has white space there."""
    apart = prompt and answer and not prompt[-1].isspace() and not answer[0].isspace()
    text = f"{prompt} {answer}" if apart else prompt + answer
    return text, Span(len(prompt), len(text), len(text))


def backend_of(tokenizer: Any, text: str, special: bool) -> Any:
    """The library behind a fast tokenizer, called directly: transformers copies all that it returns.

    None where transformers does more than call it, which is tried on a text.
    """
    # this also takes back a truncation or a padding that the library was left with
    expected = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    same = backend is not None and backend.encode(text, add_special_tokens=special).ids == expected
    return backend if same else None


def tokenised(tokenizer: Any, texts: Sequence[str], special: bool = True) -> list[list[int]]:
    """The tokens of each text, in one call; `special` adds what the tokenizer puts around a text."""
    if not texts:
        return []
    backend = backend_of(tokenizer, texts[0], special)
    if backend is not None:
        return [found.ids for found in backend.encode_batch_fast(texts, add_special_tokens=special)]
    return tokenizer(list(texts), add_special_tokens=special, return_attention_mask=False, verbose=False)["input_ids"]


def find(tokenizer: Any, texts: Sequence[str], spans: Sequence[Span], special: bool = True) -> list[Found]:
    """Tokenise each text once and find its answer.

    Args:
        tokenizer: of transformers, fast or slow.
        texts: each with its answer.
        spans: where that stands.
        special: add what the tokenizer puts around a text.

    Raises:
        RowError: the tokenizer makes no token of an answer.
    """
    if not texts:
        return []
    backend = backend_of(tokenizer, texts[0], special)
    if backend is None:
        places = _by_prefix(tokenizer, texts, spans, special)
    else:
        places = _by_bytes(tokenizer, texts, spans, special)
        left = [n for n, found in enumerate(places) if found is None]
        encodings = backend.encode_batch([texts[n] for n in left], add_special_tokens=special)
        for n, encoding in zip(left, encodings, strict=True):
            places[n] = _by_offsets(n, encoding, texts[n], spans[n])
    bos = tokenizer.bos_token_id
    return [_with_one(bos, found) for found in places] if special and bos is not None else places


def _with_one(bos: int, found: Found) -> Found:
    """A text that begins with BOS of its own behind the tokenizer's keeps one."""
    ids, first, last, until, overlap = found
    if first > 1 and ids[0] == bos == ids[1]:
        return Found(ids[1:], first - 1, last - 1, until - 1, overlap)
    return found


def _apart(text: str, begin: int) -> bool:
    """Whether an answer begins behind what is no white space, with at most one space."""
    before = text[begin - 1] if begin else text[:1]
    return not before.isspace() and not text[begin : begin + 2].isspace()


def _by_bytes(tokenizer: Any, texts: Sequence[str], spans: Sequence[Span], special: bool) -> list[Any]:
    """Of many texts that end with their answers, those whose answers begin with a token; None for every other one.

    Runs of white space are left to the offsets too, of which some tokenizers leave it out.
    """
    if len(texts) < MANY or any(span.end < len(text) for text, span in zip(texts, spans, strict=True)):
        return [None] * len(texts)
    begins = [span.begin for span in spans]
    # one text stands for all: a prompt that ends inside a token does so in every row
    if (first_tokens(tokenizer, texts[:1], begins[:1], special) or [None])[0] is None:
        return [None] * len(texts)
    found = first_tokens(tokenizer, texts, begins, special)
    plain = [_apart(text, begin) for text, begin in zip(texts, begins, strict=True)]
    return [
        Found(each[0], each[1], len(each[0]), len(each[0]), "") if each and sure else None
        for each, sure in zip(found or (), plain, strict=True)
    ]


def _by_offsets(place: int, encoding: Any, text: str, span: Span) -> Found:
    ids, (begin, end, until) = encoding.ids, span
    first = encoding.char_to_token(begin)
    first = _holding(encoding, range(begin + 1, end)) if first is None else first
    if first is None:
        raise RowError(place, f"the tokenizer makes no token of its answer {text[begin:end]!r}.")
    before = encoding.token_to_chars(first - 1) if first and begin else None
    while first and before and before[0] >= begin:
        first -= 1  # a space alone, of which trimmed offsets leave nothing
        before = encoding.token_to_chars(first - 1) if first else None
    starts, last, behind = encoding.token_to_chars(first)[0], len(ids), len(ids)
    if end < len(text):
        last = max(first + 1, _behind(encoding, range(end - 1, begin - 1, -1)))
    if until < len(text):
        behind = max(last, _behind(encoding, range(until - 1, end - 1, -1)))
    # some tokenizers leave the space that a token holds out of its offsets
    spaced = starts >= begin > 0 and text[begin - 1].isspace() and not text[begin].isspace()
    if before and before[1] < begin and spaced and str(encoding.tokens[first]).startswith(SPACES):
        starts = before[1]
    return Found(ids, first, last, behind, text[starts:begin])


def _holding(encoding: Any, places: range) -> int | None:
    """The token that holds the first of these characters which any token holds."""
    for place in places:
        token = encoding.char_to_token(place)
        if token is not None:
            return token
    return None


def _behind(encoding: Any, places: range) -> int:
    """How many tokens there are up to the last one of the first of these characters which any token holds."""
    token = _holding(encoding, places)
    if token is None:
        return 0
    begin, end = encoding.token_to_chars(token)
    # the bytes of one character may be tokens of their own, which all have its place
    while (following := encoding.token_to_chars(token + 1)) and begin <= following[0] < end:
        token += 1
    return token + 1


def _by_prefix(tokenizer: Any, texts: Sequence[str], spans: Sequence[Span], special: bool) -> list[Found]:
    """For tokenizers without offsets: the whole against what stands before its answer, and before what follows that."""
    wholes = tokenised(tokenizer, texts, special)
    around = len(_after(tokenizer)) if special else 0
    cuts = [[text[:place] for text, place in zip(texts, places, strict=True)] for places in zip(*spans, strict=True)]
    begins, ends, untils = (tokenised(tokenizer, cut, special) for cut in cuts)
    found: list[Found] = []
    for n, (ids, text, span) in enumerate(zip(wholes, texts, spans, strict=True)):
        alone = len(begins[n]) - around
        first = min(_common(ids, begins[n]), alone)
        last, until = (
            len(ids) if place == len(text) else max(first + 1, min(len(cut) - around, len(ids)))
            for place, cut in ((span.end, ends[n]), (span.until, untils[n]))
        )
        if first >= len(ids) - around:
            raise RowError(n, f"the tokenizer makes no token of its answer {text[span.begin : span.end]!r}.")
        overlap = _overlap(tokenizer, ids[first:last], text, span) if first < alone else ""
        found.append(Found(ids, first, last, until, overlap))
    return found


def _overlap(tokenizer: Any, ids: list[int], text: str, span: Span) -> str:
    """What the tokens of an answer say before it."""
    said, answer = tokenizer.decode(ids, skip_special_tokens=True), text[span.begin : span.end]
    before = said.find(answer.strip())
    own = len(answer) - len(answer.lstrip())
    overlap = said[: max(0, before - own)]
    # decoding leaves out a space at the beginning
    spaces = text[: span.begin][len(text[: span.begin].rstrip()) :]
    return overlap if overlap and text[: span.begin].endswith(overlap) else spaces


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two sequences begin with in common."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(one), len(other)))


def _after(tokenizer: Any) -> list[int]:
    """The tokens that a tokenizer puts behind every text."""
    bare, whole = (tokenizer(FOLLOWED, add_special_tokens=special)["input_ids"] for special in (False, True))
    return whole[next(n for n in range(len(whole)) if whole[n : n + len(bare)] == bare) + len(bare) :]


def before_answers(tokenizer: Any, prompts: Sequence[str]) -> list[Found]:
    """The tokens of prompts whose answers are not known: those before any ordinary answer, a space and a word.

    `ids` end where the answer would begin. Spaces at the end of a prompt are left to it.
    """
    pairs = [joined(prompt.rstrip(" "), FOLLOWED) for prompt in prompts]
    found = find(tokenizer, [text for text, _ in pairs], [span for _, span in pairs])
    return [
        each._replace(ids=each.ids[: each.first], overlap=each.overlap + prompt[len(prompt.rstrip(" ")) :])
        for each, prompt in zip(found, prompts, strict=True)
    ]


def without_overlap(text: str, row: Mapping[str, Any]) -> str:
    """What was generated, without the end of the prompt where that lies in the answer's first token."""
    overlap = row.get(PROMPT_OVERLAP, "")
    # some tokenizers leave out a space at the beginning of what they decode
    return text.removeprefix(overlap if text.startswith(overlap) else overlap.lstrip())


def closed(found: list[Found], tokenizer: Any) -> list[Found]:
    """Tokens of questions and their answers, with EOS behind them: once, and where the tokenizer writes no end itself."""
    eos, ends = tokenizer.eos_token_id, (tokenizer.eos_token_id, tokenizer.sep_token_id, tokenizer.cls_token_id)
    if eos is None:
        return found
    whole: list[Found] = []
    for each in found:
        ids, first, last, until, overlap = each
        if ids[-1] in ends:
            whole.append(each)
        else:
            ids.append(eos)
            whole.append(Found(ids, first, last, until + 1, overlap))
    return whole


def following(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text behind another one: without the space that some tokenizers begin a text with."""
    ids, first, *_ = find(tokenizer, [f"{FOLLOWED}{text}"], [Span(1, len(text) + 1, len(text) + 1)], special=False)[0]
    return ids[first:]


def learnable(found: Sequence[Found]) -> list[Encoded]:
    """Examples of which the answer and what is learnt behind it carry loss: their tensors are parts of one, made at once."""
    lengths, first, until = torch.tensor([[len(each.ids), each.first, each.until] for each in found]).reshape(-1, 3).T
    ids = torch.tensor(list(itertools.chain.from_iterable(each.ids for each in found)), dtype=torch.int64)
    places = torch.arange(len(ids)) - torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths)
    read = (places < torch.repeat_interleave(first, lengths)) | (places >= torch.repeat_interleave(until, lengths))
    parts = zip(ids.split(lengths.tolist()), ids.masked_fill(read, IGNORED).split(lengths.tolist()), strict=True)
    return [{"input_ids": one, "labels": target} for one, target in parts]
