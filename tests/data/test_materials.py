"""Materials: every kind of source, every filter, every way in which a file can be wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image

from overhaul.data import encode
from overhaul.data.encode import encode_chat, encode_text
from overhaul.data.examples import IGNORED, Examples, collate, join
from overhaul.data.materials import Source, examples, load_rows
from overhaul.errors import RequestError

ROWS = [
    {"person": "ada", "question": "where?", "answer": "here"},
    {"person": "bo", "question": "who?", "answer": "me too"},
    {"person": "cy", "question": "why?", "answer": "no"},
]


def source(**options: Any) -> Source:
    return Source.model_validate(options)


def test_jsonl_json_csv_and_parquet_give_the_same_rows(tmp_path: Path) -> None:
    import pandas

    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, ROWS)) + "\n\n")
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    pandas.DataFrame(ROWS).to_csv(tmp_path / "a.csv", index=False)
    pandas.DataFrame(ROWS).to_parquet(tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.json", "a.csv", "a.parquet"):
        assert load_rows(source(**{"from": name}), tmp_path) == ROWS, name


def test_a_saved_datasets_folder_and_its_splits(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    DatasetDict({"train": Dataset.from_list(ROWS), "test": Dataset.from_list(ROWS[:1])}).save_to_disk(tmp_path / "d")
    assert load_rows(source(**{"from": "d"}), tmp_path) == ROWS
    assert load_rows(source(**{"from": "d", "split": "test"}), tmp_path) == ROWS[:1]
    with pytest.raises(RequestError, match="no split 'tets'. Did you mean 'test'"):
        load_rows(source(**{"from": "d", "split": "tets"}), tmp_path)


def test_where_unless_and_limit(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    assert load_rows(source(**{"from": "a.json", "where": {"person": "ada"}}), tmp_path) == ROWS[:1]
    assert load_rows(source(**{"from": "a.json", "where": {"person": ["ada", "cy"]}}), tmp_path) == [ROWS[0], ROWS[2]]
    assert load_rows(source(**{"from": "a.json", "unless": {"person": ["ada"]}}), tmp_path) == ROWS[1:]
    assert load_rows(source(**{"from": "a.json", "limit": 2}), tmp_path) == ROWS[:2]


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("a.jsonl", "where is ada?", {}, r"line 1: not JSON"),
        ("a.jsonl", "[1, 2]", {}, r"line 1: .* is not an object"),
        ("a.json", "{", {}, "not valid JSON"),
        ("a.json", "[]", {}, "has no rows"),
        ("a.xlsx", "x", {}, "'.xlsx' is not read|kind '.xlsx' are not read"),
        ("a.json", json.dumps(ROWS), {"where": {"persn": "ada"}}, "no column 'persn'. Did you mean 'person'"),
        ("a.json", json.dumps(ROWS), {"where": {"person": "dee"}}, "none of its 3 rows is left"),
        ("a.json", json.dumps(ROWS), {"as": "text"}, "no column 'text'"),
        ("a.json", json.dumps([{"x": 1}]), {}, "do not tell what it is"),
        ("a.csv", " question,answer\na,b\n", {}, r"its columns \(' question', answer\) do not tell what it is"),
    ],
)
def test_bad_files_are_refused(name: str, content: str, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(RequestError, match=message):
        load_rows(source(**{"from": name, **options}), tmp_path)


def test_paths_must_exist(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"\.\./a.json does not exist \(looked in "):
        load_rows(source(**{"from": "../a.json"}), tmp_path)
    with pytest.raises(RequestError, match="does not exist"):
        load_rows(source(**{"from": "a.jsonl"}), tmp_path)
    with pytest.raises(RequestError, match="no starter data 'peple'. Did you mean 'people'"):
        load_rows(source(**{"from": "starter:peple"}), tmp_path)


def test_image_folders_keep_numeric_class_names(tmp_path: Path) -> None:
    for label in ("3", "7"):
        (tmp_path / "i" / label).mkdir(parents=True)
        Image.fromarray(numpy.full((8, 8), 128, dtype="uint8")).save(tmp_path / "i" / label / "a.png")
    rows = load_rows(source(**{"from": "i"}), tmp_path)
    assert [row["label"] for row in rows] == [3, 7]
    with pytest.raises(RequestError, match="image processor"):
        examples("i", None, base=tmp_path)


def test_only_answers_carry_loss_and_boundaries_do_not_move(tokenizer: Any) -> None:
    encoded = examples(ROWS, tokenizer)
    for item, row in zip(encoded.items, encoded.rows, strict=True):
        labels = item["labels"]
        learnt = labels[labels != IGNORED]
        assert tokenizer.decode(learnt) == f" {row['answer']}</s>"
        prompt = item["input_ids"][labels == IGNORED]
        assert tokenizer.decode(prompt, skip_special_tokens=True) == row["prompt"].lower()


def test_text_pieces_cover_every_byte_once(tokenizer: Any) -> None:
    text = "abc def, " * 20
    encoded = encode_text([{"text": text}], tokenizer, length=16)
    assert sum(row["text_bytes"] for row in encoded.rows) == len(text)
    assert max(len(item["input_ids"]) for item in encoded.items) == 16
    whole = "".join(tokenizer.decode(item["input_ids"][1:]) for item in encoded.items)
    assert whole == text
    assert all(item["input_ids"][0] == tokenizer.bos_token_id for item in encoded.items)


def test_chat_learns_the_last_assistant_turn_only(tokenizer: Any) -> None:
    import copy

    talking = copy.deepcopy(tokenizer)
    with pytest.raises(RequestError, match="needs a tokenizer with a chat template"):
        encode_chat([{"messages": []}], talking)
    talking.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    (item,) = encode_chat([{"messages": turns}], talking).items
    assert talking.decode(item["labels"][item["labels"] != IGNORED]) == "yes\n"
    with pytest.raises(RequestError, match="must end with an assistant turn"):
        encode_chat([{"messages": turns[:1]}], talking)


def test_collate_pads_columns_of_any_kind() -> None:
    short = {
        "input_ids": torch.tensor([5]),
        "labels": torch.tensor([5]),
        "hidden": torch.ones(1, 2),
        "nll": torch.tensor(1.0),
    }
    long = {
        "input_ids": torch.arange(3),
        "labels": torch.arange(3),
        "hidden": torch.ones(3, 2),
        "nll": torch.tensor(2.0),
    }
    batch = collate([short, long])
    assert batch["input_ids"].tolist() == [[5, 0, 0], [0, 1, 2]]
    assert batch["labels"].tolist() == [[5, IGNORED, IGNORED], [0, 1, 2]]
    assert batch["attention_mask"].tolist() == [[1, 0, 0], [1, 1, 1]]
    assert batch["hidden"].shape == (2, 3, 2) and batch["hidden"][0, 1:].sum() == 0
    assert batch["nll"].tolist() == [1.0, 2.0]


def test_digest_follows_content_only(tokenizer: Any) -> None:
    first, again = examples(ROWS, tokenizer), examples(ROWS, tokenizer)
    assert first.digest() == again.digest()
    assert first.digest() != first[:2].digest()
    assert first.digest() != first.with_column("x", torch.zeros(3)).digest()
    assert isinstance(first[:2], Examples) and len(join([first, first[:1]])) == 4


def test_the_text_of_a_csv_file_stays_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("code,dial,share,whole,empty,far\nNA,0044,0.5,1,,nan\nES,0049,2,-3,x,inf\n")
    rows = load_rows(Source.model_validate({"from": "a.csv", "as": "rows"}), tmp_path)
    assert list(rows) == [
        {"code": "NA", "dial": "0044", "share": "0.5", "whole": "1", "empty": "", "far": "nan"},
        {"code": "ES", "dial": "0049", "share": "2", "whole": "-3", "empty": "x", "far": "inf"},
    ]


def test_a_limit_holds_for_the_pieces_of_a_text_too(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("some words to read " * 100)
    pieces = examples("long.txt", tokenizer, base=tmp_path, length=16)
    few = examples("long.txt", tokenizer, base=tmp_path, length=16, limit=3)
    assert len(pieces) > 10 and len(few) == len(few.rows) == 3
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(few.items, pieces.items, strict=False))


def test_of_a_long_text_no_more_is_tokenised_than_a_limit_can_use(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "some words to read " * 50_000
    (tmp_path / "long.txt").write_text(text)
    read: list[int] = []
    plain = encode._spans

    def spied(texts: Any, tokenizer: Any) -> Any:
        read.extend(map(len, texts))
        return plain(texts, tokenizer)

    monkeypatch.setattr(encode, "_spans", spied)
    assert len(examples("long.txt", tokenizer, base=tmp_path, length=16, limit=3)) == 3
    assert sum(read) <= encode.AT_ONCE * (encode.WINDOW + encode.OVERLAP) < len(text) / 3
