"""Rows that are the same, and rows that nearly are: exact ones by hash, near ones by the words they share.

Near duplicates are found without comparing all pairs: two sets of words can only overlap by the share `threshold` if they
share one of the rarest words of each (the prefix filter of Bayardo, Ma and Srikant, WWW 2007). The result is exact.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Rows = Sequence[Mapping[str, Any]]

NEAR = 0.8
"""Words two rows must share, as a share of all their words, to count as near duplicates."""


def identity(row: Mapping[str, Any]) -> str:
    """A hash of all that a row holds, whichever source it came from and in whatever order its columns stand."""
    hasher = hashlib.sha256()
    for name in sorted(row):
        value = row[name]
        hasher.update(f"\0{name}\0".encode())
        pixels = np.asarray(value) if hasattr(value, "__array_interface__") or hasattr(value, "__array__") else None
        hasher.update(str(value).encode() if pixels is None else np.ascontiguousarray(pixels).tobytes())
    return hasher.hexdigest()


def near_duplicates(rows: Rows, others: Rows, threshold: float = NEAR) -> list[tuple[int, int]]:
    """Pairs (place in `rows`, place in `others`) whose words overlap by at least `threshold` (Jaccard), one for each row.

    Args:
        rows: looked up, one by one.
        others: where they are looked for.
        threshold: |shared words| / |all words|, above 0, at most 1.

    Returns:
        For each row that has a near duplicate, the nearest; exact duplicates among them. Rows without words have none.
    """
    ours, theirs = [_words(row) for row in rows], [_words(row) for row in others]
    frequency = Counter(word for words in (*ours, *theirs) for word in words)

    def rarest(words: frozenset[str]) -> list[str]:
        # whatever reaches the threshold shares at least ceil(threshold * n) words, so one of the n - that + 1 rarest
        count = len(words) - math.ceil(threshold * len(words) - 1e-9) + 1
        return sorted(words, key=lambda word: (frequency[word], word))[:count] if words else []

    holders: dict[str, list[int]] = defaultdict(list)
    for place, words in enumerate(theirs):
        for word in rarest(words):
            holders[word].append(place)
    found: list[tuple[int, int]] = []
    for place, words in enumerate(ours):
        candidates = {other for word in rarest(words) for other in holders.get(word, ())}
        near = [(len(words & theirs[other]) / len(words | theirs[other]), -other) for other in candidates]
        if near and max(near)[0] >= threshold - 1e-9:
            found.append((place, -max(near)[1]))
    return found


def said(row: Mapping[str, Any]) -> str:
    """What a model reads of a row: its text, question and answer, or what is asked and answered last in a conversation.

    Earlier turns and the system's are often the same in all rows. All texts where a row has none of these.
    """
    read = [row[name] for name in ("text", "question", "answer") if name in row]
    for turn in row.get("messages", ())[-2:]:
        read.append(turn["content"] if isinstance(turn, Mapping) and "content" in turn else turn)
    return " ".join(map(str, read or [value for value in row.values() if isinstance(value, str)]))


def _words(row: Mapping[str, Any]) -> frozenset[str]:
    return frozenset(re.findall(r"\w+", said(row).lower()))
