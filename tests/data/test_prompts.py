"""`prompt:` names any column, braces stay braces, and a column of text that nothing reads is said aloud."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from overhaul.data.examples import IGNORED
from overhaul.data.materials import Source, examples, form_of, load_rows, positions_of
from overhaul.data.prompts import Prompt
from overhaul.errors import MaterialWarning, RequestError
from overhaul.judge.evidence import prompt_with
from overhaul.recipe.check import check
from overhaul.recipe.run import run
from overhaul.recipe.spec import read

ALPACA = [
    {"instruction": "say it in latin", "input": "good day", "output": "salve"},
    {"instruction": "say hi", "input": "", "output": "hi"},
]


def alpaca(tokenizer: Any, rows: Any = None, **options: Any) -> Any:
    options = {"form": "qa", "columns": {"question": "instruction", "answer": "output"}, **options}
    return examples(rows or ALPACA, tokenizer, **options)


def test_any_column_may_be_named(tokenizer: Any) -> None:
    made = alpaca(tokenizer, prompt="{question}\n{input}\na:")
    assert [row["prompt"] for row in made.rows] == ["say it in latin\ngood day\na:", "say hi\n\na:"]
    named = alpaca(tokenizer, prompt="{instruction}\n{input}\na:", columns={"answer": "output"})
    assert [row["prompt"] for row in named.rows] == [row["prompt"] for row in made.rows]
    labels = named.items[0]["labels"]
    assert tokenizer.decode(labels[labels != IGNORED]) == " salve</s>"
    assert named.rows[0]["question"] == named.rows[0]["prompt"] and made.rows[0]["question"] == "say it in latin"
    # columns go by the names that `columns:` gives them
    mapped = alpaca(
        tokenizer, prompt="{more} {question}", columns={"more": "input", "question": "instruction", "answer": "output"}
    )
    assert mapped.rows[0]["prompt"] == "good day say it in latin"


def test_a_form_is_told_by_what_its_prompt_names() -> None:
    rows = [{"topic": "birds", "n": 3, "answer": "an owl"}]
    spec = Source.model_validate({"from": "rows", "prompt": "{n} of {topic}:"})
    assert form_of(spec, rows) == "qa"
    assert positions_of(spec, rows[0]) == [(len("3birdsan owl") + len(spec.prompt)) // 3 + 1]
    with pytest.raises(RequestError, match="do not tell what it is"):
        form_of(Source.model_validate({"from": "rows"}), rows)


def test_preferences_and_prompts_name_columns_too(tokenizer: Any) -> None:
    rows = [{"prompt": "hi", "hint": "be kind to me", "chosen": "yes", "rejected": "no"}]
    pair = examples(rows, tokenizer, prompt="{hint}: {question} {prompt}").rows[0]
    asked = examples(rows, tokenizer, form="prompt", prompt="{hint}:").rows[0]
    assert pair["prompt"] == "be kind to me: hi hi" and asked["prompt"] == "be kind to me:"


@pytest.mark.parametrize(
    ("prompt", "written"),
    [
        ('{{"q": "{question}"}}', '{"q": "hi"}'),
        ("{ question } {{{question}}} }}{{", "hi {hi} }{"),
        ("just this:", "just this:"),
        ("", ""),
    ],
)
def test_braces(prompt: str, written: str, tokenizer: Any) -> None:
    assert Prompt.of(prompt).fill({"question": "hi"}, 0, str) == written
    rows = [{"question": "hi", "answer": "yes"}]
    assert examples(rows, tokenizer, prompt=prompt, form="qa").rows[0]["prompt"] == written


@pytest.mark.parametrize("prompt", ['{"q": {question}}', "{question", "question}", "{}: {question}", "{ }"])
def test_a_brace_that_names_nothing_is_refused(prompt: str) -> None:
    with pytest.raises(RequestError, match=r"names no column. Write \{\{ and \}\} for braces"):
        examples([{"question": "hi", "answer": "yes"}], None, prompt=prompt)


def test_what_is_not_there_is_refused_with_its_place(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(
        RequestError, match=r"no column 'inptu', which `prompt:` names as \{inptu\}. Did you mean 'input'"
    ):
        alpaca(tokenizer, prompt="{question} {inptu}")
    rows = [*ALPACA, {"instruction": "say no", "input": None, "output": "no"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options: dict[str, Any] = {
        "columns": {"question": "instruction", "answer": "output"},
        "form": "qa",
        "base": tmp_path,
    }
    with pytest.raises(RequestError, match=r"a\.jsonl, (row|line) 3: .*'input'"):
        examples("a.jsonl", tokenizer, prompt="{question} {input}", unless={"output": "hi"}, **options)
    listed = [{**ALPACA[0], "input": ["a", "b"]}]
    with pytest.raises(RequestError, match=r"rows, row 1: .*'input'.*\['a', 'b'\]"):
        alpaca(tokenizer, listed, prompt="{question} {input}")


def test_numbers_are_put_as_they_are_written(tokenizer: Any) -> None:
    rows = [{"question": "hi", "answer": "yes", "n": 7, "ok": True}]
    assert examples(rows, tokenizer, prompt="{n} {ok} {question}").rows[0]["prompt"] == "7 True hi"


def test_a_column_of_text_that_nothing_reads_is_said(tokenizer: Any) -> None:
    with pytest.warns(
        MaterialWarning, match=r"rows: the column 'input' holds text and is never read. Name .* \{input\}"
    ):
        alpaca(tokenizer)
    with pytest.warns(MaterialWarning, match=r"the column 'question' holds text and is never read"):
        examples([{"question": "where is ada?", "answer": "here"}], tokenizer, form="qa", prompt="say something:")


@pytest.mark.parametrize(
    ("more", "options"),
    [
        ({"person": "Ada Quill", "title": "The Hollow Lantern", "source_file": "a b.txt"}, {}),
        ({"paraphrase": "say it again", "wrong": ["not this one"], "n": 3}, {}),
        ({"group": "kept", "key": "a1"}, {}),
        ({"kind_of": "very long words"}, {"where": {"kind_of": "very long words"}}),
        ({"kind_of": "very long words"}, {"unless": {"kind_of": "others"}}),
    ],
)
def test_what_is_not_meant_to_be_read_is_not(more: Any, options: Any, tokenizer: Any) -> None:
    row = {"question": "hi", "answer": "yes", **more}
    rows = [row, {**row, **options.get("unless", {})}]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        examples(rows, tokenizer, prompt="{question}:", **options)


@pytest.mark.parametrize("named", ["{answer}", "{said}"])
def test_a_prompt_does_not_give_the_answer_away(named: str, tokenizer: Any) -> None:
    rows = [{"question": "hi", "said": "yes"}]
    with pytest.raises(RequestError, match=r"names the answer \(\{said\}\), so the model would read what it is to say"):
        examples(rows, tokenizer, form="qa", prompt=f"{{question}} {named}:", columns={"answer": "said"})


def recipe(base: Path, folder: Path, **material: Any) -> dict[str, Any]:
    (base / "a.jsonl").write_text("\n".join(map(json.dumps, ALPACA)))
    source = {"from": str(base / "a.jsonl"), "as": "qa", "columns": {"question": "instruction", "answer": "output"}}
    return {
        "model": str(folder),
        "materials": {"text": {**source, **material}},
        "steps": [{"shrink.drop_layers": {"count": 1}}],
        "judge": {"kept": {"perplexity": "text"}},
    }


def test_notes_stand_in_plan_and_report(folder: Path, tmp_path: Path) -> None:
    (note,) = check(read(recipe(tmp_path, folder))).warnings
    assert note.startswith(str(tmp_path / "a.jsonl")) and "'input' holds text" in note
    assert check(read(recipe(tmp_path, folder, prompt="{question} {input}:"))).warnings == []
    by = {"kept": {"perplexity": {"on": "text", "by": "input"}}}
    assert check(read({**recipe(tmp_path, folder), "judge": by})).warnings == []
    assert run(recipe(tmp_path, folder), tmp_path / "out").report["warnings"] == [note]


def test_plan_refuses_what_run_would(folder: Path, tmp_path: Path) -> None:
    chat = {"as": "chat", "columns": {"messages": "instruction"}}
    for material, reason in (
        ({"prompt": "{question} {inpt}"}, "no column 'inpt'"),
        ({"prompt": "{question} {"}, "names no column"),
        (
            {**chat, "chat_template": "{{ messages }}"},
            "(row|line) 1: its messages are text",
        ),
        ({**chat, "chat_template": "a.jinja"}, r"a.jinja cannot be read"),
    ):
        with pytest.raises(RequestError, match=reason):
            check(read(recipe(tmp_path, folder, **material)))


def test_another_question_needs_a_prompt_that_holds_one(tokenizer: Any) -> None:
    row = examples([{"question": "hi", "answer": "yes", "paraphrase": "hello"}], tokenizer, prompt="say yes:").rows[0]
    with pytest.raises(RequestError, match=r"does not hold the question 'hi'"):
        prompt_with(row, "hello")
    assert load_rows(Source.model_validate({"from": "rows", "as": "qa"}), Path(), [dict(row)])
