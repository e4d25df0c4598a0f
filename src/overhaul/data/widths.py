"""Where answers begin, told from how many bytes each token stands for.

The tokens of a byte-level tokenizer stand for the bytes of a text, one after the other, so that offsets, which take a third
of the time of tokenising, are needed only where the bytes do not add up or an answer begins inside a token.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

SPECIAL, UNKNOWN = 0, 2**32
"""The bytes of a token that is put beside the text, or that stands for no bytes: the sum over a text is then another one."""

_BYTES = frozenset(map(chr, (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x144))))
"""The characters by which byte-level tokenizers write bytes."""

_KNOWN: WeakKeyDictionary[Any, np.ndarray] = WeakKeyDictionary()


def first_tokens(tokenizer: Any, texts: Sequence[str], begins: Sequence[int], special: bool) -> list[Any] | None:
    """The token ids of each text, and the token at which the character `begins` begins; None where that is not certain.

    None for all where the tokenizer is none of bytes.
    """
    backend = tokenizer.backend_tokenizer
    if backend.normalizer is not None or type(backend.decoder).__name__ != "ByteLevel":
        return None
    ids = [found.ids for found in backend.encode_batch_fast(texts, add_special_tokens=special)]
    lengths = np.array(list(map(len, ids)))
    widths = _widths(tokenizer)[np.fromiter(itertools.chain.from_iterable(ids), dtype=np.int64, count=lengths.sum())]
    ends = np.concatenate([[0], np.cumsum(widths)])
    rows = np.concatenate([[0], np.cumsum(lengths)])
    sizes = [(n, len(text)) if text.isascii() else _bytes(text, n) for text, n in zip(texts, begins, strict=True)]
    before, whole = np.array(sizes).T
    places = np.searchsorted(ends[:-1], ends[rows[:-1]] + before, side="right") - 1
    exact = (ends[rows[1:]] - ends[rows[:-1]] == whole) & (ends[places] - ends[rows[:-1]] == before) & (before < whole)
    firsts = (places - rows[:-1]).tolist()
    return [(one, first) if sure else None for one, first, sure in zip(ids, firsts, exact.tolist(), strict=True)]


def _bytes(text: str, begin: int) -> tuple[int, int]:
    before = len(text[:begin].encode())
    return before, before + len(text[begin:].encode())


def _widths(tokenizer: Any) -> np.ndarray:
    """The bytes of every token."""
    backend = tokenizer.backend_tokenizer
    words = backend.get_vocab(with_added_tokens=True)
    known = _KNOWN.get(tokenizer)
    if known is not None and len(known) == 1 + max(words.values()):
        return known
    found = np.full(1 + max(words.values()), UNKNOWN, dtype=np.int64)
    for word, number in words.items():
        if _BYTES.issuperset(word):
            found[number] = len(word)
    found[list(backend.get_added_tokens_decoder())] = SPECIAL
    return _KNOWN.setdefault(tokenizer, found)
