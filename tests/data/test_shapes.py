"""Usual shapes of rows are read as the forms that they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from overhaul.data.materials import Source, form_of, load_rows
from overhaul.errors import RequestError

ASKED = {"role": "user", "content": "hi"}
SAID, OTHER = ({"role": "assistant", "content": text} for text in ("yes", "no"))

CASES: list[tuple[dict[str, Any], str, dict[str, Any]]] = [
    (
        {"conversations": [{"from": f, "value": v} for f, v in (("system", "s"), ("human", "hi"), ("gpt", "yes"))]},
        "chat",
        {"messages": [{"role": "system", "content": "s"}, ASKED, SAID]},
    ),
    ({"conversations": [ASKED, SAID], "id": 3}, "chat", {"messages": [ASKED, SAID], "id": 3}),
    ({"instruction": "Translate.", "input": "Good day", "output": "Bonjour"}, "qa",
     {"question": "Translate.\n\nGood day", "answer": "Bonjour"}),
    ({"instruction": "Say hi.", "input": "", "output": "Hi"}, "qa", {"question": "Say hi.", "answer": "Hi"}),
    ({"instruction": "Say hi.", "output": "Hi"}, "qa", {"question": "Say hi.", "answer": "Hi"}),
    ({"prompt": "q", "completion": "a"}, "qa", {"question": "q", "answer": "a"}),
    ({"prompt": [ASKED], "completion": [SAID]}, "chat", {"messages": [ASKED, SAID]}),
    ({"prompt": "q", "chosen": "a", "rejected": "b"}, "preference", {"prompt": "q", "chosen": "a", "rejected": "b"}),
    ({"prompt": [ASKED], "chosen": [SAID], "rejected": [OTHER]}, "preference",
     {"prompt": [ASKED], "chosen": [SAID], "rejected": [OTHER]}),
    ({"chosen": [ASKED, SAID], "rejected": [ASKED, OTHER]}, "preference",
     {"prompt": [ASKED], "chosen": [SAID], "rejected": [OTHER]}),
    ({"question": "Where?", "context": "c", "answers": {"text": ["Paris"], "answer_start": [13]}}, "qa",
     {"question": "Where?", "context": "c", "answer": "Paris"}),
    ({"question": "Where?", "answers": ["Paris"]}, "qa", {"question": "Where?", "answer": "Paris"}),
]  # fmt: skip


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize(("row", "form", "expected"), CASES)
def test_a_shape_is_read_as_its_form(
    row: dict[str, Any], form: str, expected: dict[str, Any], named: bool, tmp_path: Path
) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    spec = Source.model_validate({"from": "a.jsonl", **({"as": form} if named else {})})
    rows = load_rows(spec, tmp_path)
    assert list(rows) == [expected] and form_of(spec, rows) == form


def test_columns_that_a_prompt_names_stay(tmp_path: Path) -> None:
    row = {"instruction": "Translate.", "input": "Good day", "output": "Bonjour"}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    spec = Source.model_validate({"from": "a.jsonl", "prompt": "{instruction}: {input}"})
    (found,) = load_rows(spec, tmp_path)
    assert found["instruction"] == "Translate." and found["input"] == "Good day" and "output" not in found


def test_a_shape_under_other_names(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"task": "Say hi.", "context": "now", "reply": "Hi"}))
    columns = {"instruction": "task", "input": "context", "output": "reply"}
    (found,) = load_rows(Source.model_validate({"from": "a.jsonl", "columns": columns}), tmp_path)
    assert found == {"question": "Say hi.\n\nnow", "answer": "Hi"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"conversations": "hi"}, "line 1: 'conversations' is no list of turns"),
        ({"conversations": [{"from": "bot", "value": "x"}]}, "line 1: a turn is .*not {'from': 'bot'"),
        ({"conversations": [{"from": "gpt", "value": None}]}, "line 1: 'value' is null"),
        ({"instruction": None, "output": "a"}, "line 1: 'instruction' is null"),
        ({"instruction": "i", "input": ["x"], "output": "a"}, "line 1: 'input' is a list"),
        ({"instruction": "i", "output": ""}, "line 1: 'answer' is empty"),
        ({"chosen": [ASKED, SAID], "rejected": [OTHER]}, "line 1: 'chosen' and 'rejected' share no first turn"),
        ({"prompt": "q", "chosen": None, "rejected": "b"}, "line 1: 'chosen' is null"),
        ({"prompt": ["q"], "chosen": "a", "rejected": "b"}, "line 1: turn 1 of its messages is 'q'"),
        ({"messages": None}, "line 1: its messages must be a list of turns, not None"),
        ({"messages": []}, "line 1: its messages must be a list of turns"),
        ({"question": "q", "answers": {"text": [], "answer_start": []}}, "line 1: 'answer' is an empty list"),
    ],
)
def test_a_shape_with_something_odd_is_refused_with_its_line(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    with pytest.raises(RequestError, match=f"a.jsonl, {message}"):
        load_rows(Source.model_validate({"from": "a.jsonl"}), tmp_path)
