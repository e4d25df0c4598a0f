"""Verifiers: what each accepts and what it refuses, with the answers that benchmarks give."""

from __future__ import annotations

from typing import Any

import pytest

from overhaul.data.verifiers import VERIFIERS, find_verifier, score, verify
from overhaul.errors import RequestError

GSM8K = "She sold 48/2 = <<48/2=24>>24 clips in May.\nAltogether 48+24 = <<48+24=72>>72 clips.\n#### 72"

RIGHT: list[tuple[str, dict[str, Any], str]] = [
    ("exact", {"answer": "An otter"}, " an  OTTER."),
    ("addition", {"question": "17 + 25"}, " 42 "),
    ("brackets", {"question": "close ( ["}, "] ) { }"),
    ("gsm8k", {"answer": GSM8K}, "48 and 24 more, so the answer is 72."),
    ("gsm8k", {"answer": "1,234"}, "That makes $1234.00"),
    ("gsm8k", {"answer": "-3"}, "It is -3"),
    ("gsm8k", {"answer": "3"}, "10-7 = 3 and x-3"),
    ("gsm8k", {"answer": ".5"}, "half, 0.5"),
    ("contains", {"answer": "New York"}, "It lies in new york, I think"),
    ("contains", {"answer": ["red", "blue"]}, "blue and red"),
    ("regex", {"pattern": r"[A-Z]\d{3}"}, " B042\n"),
    ("json_valid", {}, '```json\n{"a": [1, null]}\n```'),
    ("json_valid", {"keys": ["a"]}, '{"a": 1}'),
    ("characters", {"allowed": "abc"}, "cab "),
    ("characters", {"allowed": "abc", "needed": "c", "count": 3}, "abc"),
    ("refuses", {}, " I can't help with that."),
    ("refuses", {}, "I'm so sorry, but no"),
    ("instructions", {"label": "harmful", "answer": "No, that would do harm."}, "I won't"),
    ("instructions", {"label": "harmless", "answer": "Take a cloth."}, "take a cloth"),
]

WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("exact", {"answer": "an otter"}, "an otter or so"),
    ("addition", {"question": "17 + 25"}, "42 or 43"),
    ("brackets", {"question": "close ( ["}, ") ]"),
    ("gsm8k", {"answer": GSM8K}, "72 at first, 71 at last"),
    ("gsm8k", {"answer": GSM8K}, "many"),
    ("gsm8k", {"answer": "none"}, "none"),
    ("contains", {"answer": "York"}, "Yorkshire"),
    ("contains", {"answer": ["red", "blue"]}, "red"),
    ("regex", {"pattern": r"[A-Z]\d{3}"}, "B0421"),
    ("json_valid", {}, "{'a': 1}"),
    ("json_valid", {}, "NaN"),
    ("json_valid", {"keys": ["a"]}, "[1]"),
    ("characters", {"allowed": "abc"}, "abd"),
    ("characters", {"allowed": "abc"}, " "),
    ("characters", {"allowed": "abc", "needed": "c"}, "ab"),
    ("characters", {"allowed": "abc", "count": 2}, "abc"),
    ("refuses", {}, "Take a bag. I cannot say more."),
    ("refuses", {}, ""),
    ("instructions", {"label": "harmful", "answer": "No, that would do harm."}, "Take a bag."),
    ("instructions", {"label": "harmless", "answer": "Take a cloth."}, "I cannot help with that."),
]


@pytest.mark.parametrize(("name", "row", "text"), RIGHT)
def test_what_is_right_is_accepted(name: str, row: dict[str, Any], text: str) -> None:
    assert score({**row, "verify": name}, text) == 1.0


@pytest.mark.parametrize(("name", "row", "text"), WRONG)
def test_what_is_wrong_is_refused(name: str, row: dict[str, Any], text: str) -> None:
    assert score({**row, "verify": name}, text) == 0.0


def test_every_verifier_was_tried_both_ways() -> None:
    assert {name for name, _, _ in RIGHT} == {name for name, _, _ in WRONG} == set(VERIFIERS)


def test_a_row_knows_its_verifier_by_name_then_by_task_then_by_its_words() -> None:
    row = {"question": "1 + 1", "answer": "two"}
    assert verify(row, "two") and not verify(row, "2")
    assert verify({**row, "task": "addition"}, "2") and verify({**row, "task": "people"}, "two")
    assert verify({**row, "task": "addition", "verify": "contains"}, "it is two")


def test_what_is_not_there_is_named() -> None:
    with pytest.raises(RequestError, match=r"no verifier 'exakt'. Did you mean 'exact'"):
        find_verifier("exakt")
    with pytest.raises(RequestError, match="reads the column 'pattern', which a row lacks"):
        score({"verify": "regex"}, "x")
    with pytest.raises(RequestError, match="no regular expression"):
        score({"verify": "regex", "pattern": "("}, "x")
