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


KTO = [{"prompt": "q", "completion": f"a{n}", "label": label} for n, label in enumerate((True, False, True))]


@pytest.mark.parametrize("kind", ["texts", "turns", "cells"])
def test_answers_that_are_labelled_bad_are_learnt_only_where_that_is_asked_for(kind: str, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = KTO
    if kind == "turns":
        rows = [{**row, "prompt": [ASKED], "completion": [{**SAID, "content": row["completion"]}]} for row in KTO]
    if kind == "cells":
        lines = ["prompt,completion,label", *(",".join(map(str, row.values())) for row in KTO)]
        (tmp_path / "a.csv").write_text("\n".join(lines))
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    name = "a.csv" if kind == "cells" else "a.jsonl"

    def answers(**options: Any) -> list[str]:
        found = load_rows(Source.model_validate({"from": name, **options}), tmp_path)
        return [row["answer"] if "answer" in row else row["messages"][-1]["content"] for row in found]

    with pytest.raises(
        RequestError, match=rf"{name}, line {3 if kind == 'cells' else 2}: 'label' is false, .*where: {{label: true}}"
    ):
        answers()
    assert answers(where={"label": True}) == answers(unless={"label": False}) == ["a0", "a2"]
    assert answers(where={"label": False}) == ["a1"]
    assert answers(where={"label": [True, False]}) == ["a0", "a1", "a2"] and answers(limit=1) == ["a0"]


def test_turns_that_are_not_to_be_learnt_keep_saying_so(tmp_path: Path) -> None:
    said = {"from": "gpt", "value": "yes", "weight": 0}
    (tmp_path / "a.jsonl").write_text(json.dumps({"conversations": [{"from": "human", "value": "hi"}, said]}))
    (row,) = load_rows(Source.model_validate({"from": "a.jsonl"}), tmp_path)
    assert row["messages"][-1] == {**SAID, "weight": 0}


def test_squads_own_files_are_their_questions(tmp_path: Path) -> None:
    def asked(question: str, *answers: str, impossible: bool = False) -> dict[str, Any]:
        told = [{"text": text, "answer_start": n} for n, text in enumerate(answers)]
        return {"id": question, "question": question, "answers": told, "is_impossible": impossible}

    paragraphs = [
        {"context": "c", "qas": [asked("who?", "Ada", "Ada"), asked("why?", impossible=True)]},
        {"context": "d", "qas": [asked("where?", "here")]},
    ]
    whole = {
        "version": "2.0",
        "data": [{"title": "t", "paragraphs": paragraphs}, {"title": "u", "paragraphs": paragraphs[1:]}],
    }
    (tmp_path / "a.json").write_text(json.dumps(whole))
    rows = load_rows(Source.model_validate({"from": "a.json", "where": {"is_impossible": False}}), tmp_path)
    assert [(row["title"], row["context"], row["question"], row["answer"]) for row in rows] == [
        ("t", "c", "who?", "Ada"), ("t", "d", "where?", "here"), ("u", "d", "where?", "here")
    ]  # fmt: skip
    with pytest.raises(RequestError, match="a.json, row 1, paragraph 1, question 2: 'answer' is an empty list"):
        load_rows(Source.model_validate({"from": "a.json"}), tmp_path)
    (tmp_path / "a.json").write_text(
        json.dumps({"data": [{"paragraphs": [{"context": "c", "qas": [{"question": "who?"}]}]}]})
    )
    with pytest.raises(RequestError, match="a.json, row 1, paragraph 1: SQuAD's paragraphs have a `context` and `qas`"):
        load_rows(Source.model_validate({"from": "a.json"}), tmp_path)
