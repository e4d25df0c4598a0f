"""What stands in a file is what is learnt: text as it is written, and nothing that is no text."""

from __future__ import annotations

import json
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from overhaul.data import lazy
from overhaul.data.examples import IGNORED
from overhaul.data.lazy import View
from overhaul.data.materials import Source, examples, load_rows
from overhaul.errors import MaterialWarning, RequestError


def read(folder: Path, name: str, **options: Any) -> Any:
    return load_rows(Source.model_validate({"from": name, **options}), folder)


def answers(folder: Path, name: str, **options: Any) -> list[Any]:
    return [row["answer"] for row in read(folder, name, **options)]


def jsonl(folder: Path, *rows: Any) -> Path:
    (folder / "a.jsonl").write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return folder


def parquet(folder: Path, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), folder / "a.parquet")
    return folder


def test_words_for_nothing_and_leading_zeros_stay_text(tmp_path: Path, tokenizer: Any) -> None:
    words = ["NA", "None", "null", "nan", "007", "1.50", "True", " x ", "-"]
    (tmp_path / "a.csv").write_text("question,answer\n" + "".join(f"q,{word}\n" for word in words))
    (tmp_path / "a.tsv").write_text("question\tanswer\n" + "".join(f"q\t{word}\n" for word in words))
    assert answers(tmp_path, "a.csv") == answers(tmp_path, "a.tsv") == words
    learnt = examples("a.csv", tokenizer, base=tmp_path, where={"answer": "007"})
    (item,) = learnt.items
    assert tokenizer.decode(item["labels"][item["labels"] != IGNORED]) == " 007</s>"


def test_where_finds_text_and_numbers_as_they_are_written(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("id,kept,question,answer\n007,true,q,a\n7,false,q,b\n")
    assert answers(tmp_path, "a.csv", where={"id": "007"}) == ["a"]
    assert answers(tmp_path, "a.csv", where={"id": 7}) == answers(tmp_path, "a.csv", unless={"id": "007"}) == ["b"]
    assert answers(tmp_path, "a.csv", where={"kept": True}) == ["a"]
    jsonl(tmp_path, {"id": 7, "question": "q", "answer": "a"}, {"id": True, "question": "q", "answer": "b"})
    assert answers(tmp_path, "a.jsonl", where={"id": "7"}) == ["a"]
    with pytest.raises(RequestError, match="none of its 2 rows"):  # true is not 1
        read(tmp_path, "a.jsonl", where={"id": 1})


def test_quotes_line_breaks_and_line_ends_inside_cells(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(
        b'\xef\xbb\xbfquestion,answer\r\n"a, b","say ""hi""\r\nand go"\r\n\r\nplain,in "the" middle\r\n'
    )
    assert list(read(tmp_path, "a.csv")) == [
        {"question": "a, b", "answer": 'say "hi"\r\nand go'},
        {"question": "plain", "answer": 'in "the" middle'},
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("question,answer\nq,a\nq,\n", r"a.csv, line 3: 'answer' is empty"),
        ("question,answer\nq,   \n", r"a.csv, line 2: 'answer' is empty"),
        ("question,answer\n,a\n", r"a.csv, line 2: 'question' is empty"),
        ('question,answer\n"q\n\n",a\nq,a,b\n', r"a.csv, line 5: it has 3 cells, and the header 2"),
        ("question,answer\nq,a\nwhere\n", r"a.csv, line 3: it has 1 cells"),
        ('question,answer\nq,a\nq,"a\nq,b\n', r"a.csv, line 3: the row that begins here cannot be read"),
        ("question,answer,answer\nq,a,b\n", r"a.csv, line 1: two columns are called 'answer'"),
        ("question;answer\nq;a\n", r"a.csv, line 1: cells are separated by ',' in this kind of file, not ';'"),
        ("question\tanswer\nq\ta\n", r"not '\\t'. End the file's name in .tsv"),
        ("question,answer\n", "has no rows"),
        ("", "a.csv is empty"),
    ],
)
def test_tables_are_refused_with_their_line(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(RequestError, match=message):
        read(tmp_path, "a.csv")


ODD: list[tuple[Any, str]] = [
    (None, "is null"),
    (float("nan"), "is no finite number"),
    (float("inf"), "is no finite number"),
    (True, "is the truth value true"),
    ("", "is empty"),
    (" \n", "is empty"),
    ([], "is an empty list"),
    (["a", None], "is null"),
    (["a", ["b"]], "is a list"),
    (["a", "b"], "lists 2 answers. Write `answers: first`"),
    ({"text": ["a", "b"]}, "lists 2 answers"),
    ({"text": []}, "is an empty list"),
    ({"value": "a"}, "is a mapping"),
    ("\ud83e", "holds half a character"),
]


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize(("value", "message"), ODD)
def test_what_is_no_text_is_refused_with_its_line(
    value: Any, message: str, large: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lazy, "LARGE", 1 if large else 2**22)
    jsonl(tmp_path, {"question": "q", "answer": "a"}, "", {"question": "q", "answer": value})
    with pytest.raises(RequestError, match=f"a.jsonl, line 3: 'answer' {message}"):
        read(tmp_path, "a.jsonl")
    assert answers(tmp_path, "a.jsonl", limit=1) == ["a"]  # what is not taken is nobody's concern
    if not isinstance(value, list | dict):
        with pytest.raises(RequestError, match="a.jsonl, line 3: 'question'"):
            jsonl(tmp_path, {"question": "q", "answer": "a"}, "", {"question": value, "answer": "a"})
            read(tmp_path, "a.jsonl")


@pytest.mark.parametrize("value", [None, ["a", "b"], [], {"x": "y"}])
def test_parquet_says_the_same(value: Any, tmp_path: Path) -> None:
    parquet(
        tmp_path, question=["q", "q"], answer=pa.array([value if value is None else type(value)("") or value, value])
    )
    with pytest.raises(RequestError, match="a.parquet, row 1: 'answer'"):
        read(tmp_path, "a.parquet")


def test_parquet_keeps_whole_numbers_and_lists(tmp_path: Path) -> None:
    parquet(tmp_path, question=["q", "r"], answer=[["a"], ["b", "b"]], n=pa.array([7, None]), wrong=[["x", "y"], ["z"]])
    assert list(read(tmp_path, "a.parquet")) == [
        {"question": "q", "answer": "a", "n": 7, "wrong": ["x", "y"]},
        {"question": "r", "answer": "b", "n": None, "wrong": ["z"]},
    ]
    with pytest.raises(RequestError, match="row 2: 'question' is null"):
        parquet(tmp_path, question=["q", None], answer=["a", "b"])
        read(tmp_path, "a.parquet")
    with pytest.raises(RequestError, match="row 1: 'answer' is bytes"):
        parquet(tmp_path, question=["q"], answer=[b"a"])
        read(tmp_path, "a.parquet")


def test_numbers_are_learnt_as_they_are_written(tmp_path: Path) -> None:
    written = ["7", "-3", "0.10", "1e-5", "3.0", "123456789012345678901234567890"]
    jsonl(tmp_path, *(f'{{"question": "q", "answer": {each}}}' for each in written))
    assert answers(tmp_path, "a.jsonl") == written


def test_several_answers_are_a_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jsonl(
        tmp_path,
        {"question": "q", "answer": ["a", "b", "a"]},
        {"question": "r", "answer": {"text": ["c", "c"], "answer_start": [1, 9]}},
        {"question": "s", "answer": "d"},
    )
    for large in (2**22, 1):
        monkeypatch.setattr(lazy, "LARGE", large)
        assert answers(tmp_path, "a.jsonl", answers="first") == ["a", "c", "d"]
        every = read(tmp_path, "a.jsonl", answers="all")
        assert [(row["question"], row["answer"]) for row in every] == [("q", "a"), ("q", "b"), ("r", "c"), ("s", "d")]
        assert isinstance(every, View) is (large == 1)
        assert [row["answer"] for row in every[1:3]] == ["b", "c"]
        assert answers(tmp_path, "a.jsonl", answers="all", limit=2) == ["a", "b"]


def test_a_key_that_stands_twice_and_a_missing_one_are_refused(tmp_path: Path) -> None:
    jsonl(tmp_path, {"question": "q", "answer": "a"}, '{"question": "q", "answer": "a", "answer": "b"}')
    with pytest.raises(RequestError, match="a.jsonl, line 2: .*the key 'answer' stands twice"):
        read(tmp_path, "a.jsonl")
    jsonl(tmp_path, {"question": "q", "answer": "a"}, {"question": "q", "anser": "a"})
    with pytest.raises(RequestError, match="a.jsonl, line 2 has no column 'answer'. Did you mean 'anser'"):
        read(tmp_path, "a.jsonl")


def test_columns_are_mapped_or_refused(tmp_path: Path) -> None:
    row = {
        "question": "q", "answer": "a", "paraphrased_question": "p", "paraphrased_answer": "pa",
        "perturbed_answer": ["x", "y"],
    }  # fmt: skip
    jsonl(tmp_path, row)
    named = {"wrong": "perturbed_answer", "paraphrase": "paraphrased_question"}
    (found,) = read(tmp_path, "a.jsonl", columns=named)
    assert found == {**row, "wrong": ["x", "y"], "paraphrase": "p"}
    with pytest.raises(RequestError, match="'wrng', which nothing reads of qa rows. Did you mean 'wrong'"):
        read(tmp_path, "a.jsonl", columns={"wrng": "perturbed_answer"})
    jsonl(tmp_path, {"satz": "a text", "urteil": 1, "land": "a"})
    german = {"text": "satz", "label": "urteil"}
    said = "'label', which nothing reads of text rows. Write `as: classified`, which reads it"
    with pytest.raises(RequestError, match=said):
        read(tmp_path, "a.jsonl", columns=german)
    (found,) = read(tmp_path, "a.jsonl", columns=german, as_="classified")
    assert found == {"satz": "a text", "urteil": 1, "land": "a", "label": 1}, "the class goes by either name"
    jsonl(tmp_path, {**row, "label": True})
    with pytest.raises(RequestError, match="no column 'perturbed', which .* Did you mean 'perturbed_answer'"):
        read(tmp_path, "a.jsonl", columns={"wrong": "perturbed"})
    with pytest.raises(
        RequestError, match="no column 'qestion', which `columns:` names for 'question'. Did you mean 'q"
    ):
        read(tmp_path, "a.jsonl", columns={"question": "qestion"})
    jsonl(tmp_path, {**row, "perturbed_answer": ["x", None]})
    with pytest.raises(RequestError, match="line 1: 'perturbed_answer' is null"):
        read(tmp_path, "a.jsonl", columns=named)


def test_every_column_that_a_metric_reads_can_be_mapped() -> None:
    from overhaul.data.forms import FORMS
    from overhaul.data.rows import BESIDE
    from overhaul.judge.metrics import METRICS

    of_forms = {name for form in FORMS.values() for name in form.columns}
    read = {name for metric in METRICS.values() for name in metric.columns} - {"text_bytes"}  # which encoding adds
    assert read <= of_forms | set(BESIDE)


def test_rows_without_an_answer_are_taken_out_as_the_error_says(tmp_path: Path) -> None:
    for odd, written in ((None, "null"), ("", '""')):
        jsonl(tmp_path, {"question": "q", "answer": odd}, {"question": "q", "answer": "a"})
        with pytest.raises(RequestError, match=f"all like it by `unless: {{answer: {written}}}`"):
            read(tmp_path, "a.jsonl")
        assert answers(tmp_path, "a.jsonl", unless={"answer": odd}) == ["a"]


def test_rows_from_python_are_looked_at_as_files_are(tokenizer: Any) -> None:
    with pytest.raises(RequestError, match="rows, row 2: 'answer' is null"):
        examples([{"question": "q", "answer": "a"}, {"question": "q", "answer": None}], tokenizer)
    with pytest.raises(RequestError, match="rows, row 1: 'abc' is no mapping"):
        examples(["abc"], tokenizer)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limt": 3}, "The option 'limt' of a material: there is none. Did you mean 'limit'"),
        ({"limit": 0}, "The option 'limit' of a material: Input should be greater than 0"),
        ({"answers": "last"}, "The option 'answers' of a material: Input should be 'first' or 'all'"),
        ({"encoding": "latin-one"}, "The option 'encoding' of a material: there is no encoding 'latin-one'"),
    ],
)
def test_options_from_python_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        examples([{"question": "q", "answer": "a"}], None, **options)


def test_paths_may_climb(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    jsonl(tmp_path, {"question": "q", "answer": "a"})
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    for source in ("../a.jsonl", Path("..") / "a.jsonl", "..", "../*.jsonl"):
        assert [row["answer"] for row in examples(source, tokenizer).rows] == ["a"], source
    assert [row["answer"] for row in read(tmp_path / "notebooks", "../a.jsonl")] == ["a"]


def test_short_fractions_and_a_negative_nought_stay_as_they_are_written(tmp_path: Path) -> None:
    for kind in (pa.float16(), pa.float32(), pa.float64()):
        held = pa.array([0.1, None, 2.5], pa.float64()).cast(kind) if kind != pa.float16() else None
        held = pa.array(np.array([0.1, 2.5, 2.5], np.float16)) if held is None else held
        parquet(tmp_path, question=["q"] * 3, answer=held)
        assert answers(tmp_path, "a.parquet", unless={"answer": None})[0] == "0.1"
    assert answers(jsonl(tmp_path, '{"question": "q", "answer": -0}'), "a.jsonl") == ["-0"]


def test_days_and_exact_fractions_are_found_as_they_are_written(tmp_path: Path) -> None:
    days = [date(2024, 1, 1), date(2024, 1, 2)]
    parquet(tmp_path, question=["q", "q"], answer=["a", "b"], day=days, part=[Decimal("1.10"), Decimal("2.00")])
    (tmp_path / "a.csv").write_text("question,answer,day,part\nq,a,2024-01-01,1.10\nq,b,2024-01-02,2\n")
    for name in ("a.parquet", "a.csv"):
        for wanted in ({"day": days[0]}, {"day": "2024-01-01"}, {"part": Decimal("1.1")}):
            assert answers(tmp_path, name, where=wanted) == ["a"] and answers(tmp_path, name, unless=wanted) == ["b"]


def test_a_value_of_a_filter_that_no_row_has_is_said(tmp_path: Path) -> None:
    jsonl(tmp_path, *({"question": "q", "answer": name, "person": name} for name in ("ada", "bea")))
    spec = {"from": "a.jsonl", "where": {"person": ["ada", "adda"]}, "unless": {"answer": ["bea", "ceo"]}}
    said: list[str] = []
    assert [row["answer"] for row in load_rows(Source.model_validate(spec), tmp_path, said=said)] == ["ada"]
    assert said == [
        "a.jsonl: no row has the person 'adda' of `where:`.",
        "a.jsonl: no row has the answer 'ceo' of `unless:`.",
    ]


def test_choices_that_nothing_reads_are_said(tokenizer: Any) -> None:
    rows = [{"question": "who?", "answer": "ada", "choices": ["ada quill", "bea marsh"], "more": {"a": ["very long"]}}]
    with pytest.warns(MaterialWarning, match="the columns 'choices', 'more' hold text and are never read"):
        examples(rows, tokenizer)
