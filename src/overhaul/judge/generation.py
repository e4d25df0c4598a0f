"""How what a model says is compared with what was expected.

ROUGE-L follows Lin (2004): recall as TOFU uses it, F1 as MUSE does. How it differs from the `rouge_score` package:
1. Words are not stemmed.
2. Letters and digits of every script form words, not only a-z and 0-9; a text without any is split at white space, so
   that brackets can be compared.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence


def rouge_l(expected: str, text: str) -> float:
    """ROUGE-L recall: the longest common subsequence of words, as a share of the expected words (TOFU)."""
    wanted, said = _words(expected, text)
    return common_subsequence(wanted, said) / len(wanted) if wanted else 0.0


def rouge_l_f1(expected: str, text: str) -> float:
    """ROUGE-L F1: the harmonic mean of recall and precision, so that saying much is no advantage (MUSE)."""
    wanted, said = _words(expected, text)
    # 2 (c / w) (c / s) / (c / w + c / s)
    return 2 * common_subsequence(wanted, said) / (len(wanted) + len(said)) if wanted else 0.0


def _words(expected: str, text: str) -> tuple[list[str], list[str]]:
    """Both texts in words of the kind that the expected one has."""
    pattern = r"[^\W_]+" if re.search(r"[^\W_]", expected) else r"\S+"
    wanted, said = (re.findall(pattern, t.lower()) for t in (expected, text))
    return wanted, said


def common_subsequence(first: Sequence[Hashable], second: Sequence[Hashable]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(second) + 1)
    for a in first:
        above = list(row)
        for j, b in enumerate(second):
            row[j + 1] = above[j] + 1 if a == b else max(above[j + 1], row[j])
    return row[-1]


def repeated_share(tokens: Sequence[Hashable], n: int = 2) -> float:
    """Rep-n: 1 - distinct n-grams / n-grams; 0 where there is no n-gram."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0
