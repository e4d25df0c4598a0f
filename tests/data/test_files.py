"""Files of rows and texts, whatever they are called, packed and encoded; folders, shards and patterns of them."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from overhaul.data import lazy, readers
from overhaul.data.examples import join
from overhaul.data.lazy import TextFile, View
from overhaul.data.materials import Source, encode, examples, load_rows
from overhaul.errors import RequestError

ROWS = [{"question": "Où?", "answer": "à Genève"}, {"question": "who?", "answer": "a\u2028b\u2029c\u0085d\x0be"}]
LINES = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)


def read(folder: Path, name: str, **options: Any) -> list[dict[str, Any]]:
    return list(load_rows(Source.model_validate({"from": name, **options}), folder))


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("OVERHAUL_CACHE", str(tmp_path_factory.mktemp("cache")))


COLUMNS = {name: [row[name] for row in ROWS] for name in ("question", "answer")}


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", LINES),
        ("A.JSONL", LINES + "\n"),
        ("a.ndjson", LINES.replace("\n", "\r\n") + "\r\n\r\n"),
        ("a.json", LINES),
        ("a.JSON", json.dumps(ROWS, indent=1)),
        ("data.json", json.dumps({"version": "1.1", "data": ROWS})),
        ("columns.json", json.dumps(COLUMNS)),
        ("pandas.json", json.dumps({name: dict(enumerate(values)) for name, values in COLUMNS.items()})),
        ("bom.jsonl", "\ufeff" + LINES),
        ("bom.json", "\ufeff" + LINES),
    ],
)
def test_the_same_rows_come_from_every_kind_of_json(
    name: str, content: str, large: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lazy, "LARGE", 8 if large else 2**22)
    (tmp_path / name).write_text(content, newline="")
    assert read(tmp_path, name) == ROWS


def test_one_object_is_one_row(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    for row in (ROWS[0], {"messages": turns}):
        (tmp_path / "a.json").write_text(json.dumps(row))
        assert read(tmp_path, "a.json") == [row]
    (tmp_path / "a.json").write_text(json.dumps({"train": ROWS, "test": ROWS}))
    with pytest.raises(RequestError, match=r"several lists of rows \(train, test\)"):
        read(tmp_path, "a.json")


def _zst(data: bytes) -> bytes:
    return pa.Codec("zstd").compress(data, asbytes=True)


PACK: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".GZ": gzip.compress, ".zst": _zst,
}  # fmt: skip


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("end", PACK)
def test_packed_files_are_unpacked(end: str, large: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lazy, "LARGE", 8 if large else 2**22)
    (tmp_path / f"a.jsonl{end}").write_bytes(PACK[end](LINES.encode()))
    (tmp_path / f"a.txt{end}").write_bytes(PACK[end](b"some words\r\n and more"))
    assert read(tmp_path, f"a.jsonl{end}") == ROWS
    (row,) = read(tmp_path, f"a.txt{end}")
    assert str(row["text"]) == "some words\n and more" and isinstance(row["text"], TextFile) is large
    (tmp_path / f"a.jsonl{end}").write_bytes(PACK[end](LINES.encode())[:-9])
    with pytest.raises(RequestError, match=rf"a.jsonl{end} cannot be unpacked"):
        read(tmp_path, f"a.jsonl{end}")


def test_what_unpacks_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "UNPACKED_AT_LEAST", 2**23)
    for end in (".gz", ".xz", ".zst"):
        (tmp_path / f"a.jsonl{end}").write_bytes(PACK[end](bytes(2**25)))
        with pytest.raises(RequestError, match="unpacks to over 8388608 bytes"):
            read(tmp_path, f"a.jsonl{end}")
    assert not list(lazy.cache_folder("unpacked").iterdir())


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "utf-16-le", "cp1252"])
def test_other_encodings_are_named_or_refused(
    encoding: str, large: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: Any
) -> None:
    monkeypatch.setattr(lazy, "LARGE", 8 if large else 2**22)
    row = ROWS[0]
    texts = {
        "a.jsonl": json.dumps(row, ensure_ascii=False), "a.json": json.dumps([row], ensure_ascii=False),
        "a.csv": "question,answer\n" + ",".join(row.values()),
    }  # fmt: skip
    for name, text in texts.items():
        (tmp_path / name).write_bytes(text.encode(encoding))
        assert read(tmp_path, name, encoding=encoding) == [row]
        with pytest.raises(RequestError, match=rf"{name}.*`encoding: {'utf-16' if '16' in encoding else 'latin-1'}"):
            read(tmp_path, name)
    (tmp_path / "a.txt").write_bytes("à Genève".encode(encoding))
    (found,) = read(tmp_path, "a.txt", encoding=encoding)
    assert str(found["text"]) == "à Genève"
    with pytest.raises(RequestError, match=r"a.txt.*`encoding:"):
        read(tmp_path, "a.txt")


def test_the_line_of_a_wrong_byte_is_told_and_an_encoding_must_be_one(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"question,answer\nq,a\nq,\xe0 b\n")
    with pytest.raises(RequestError, match="a.csv, line 3: it is no text in utf-8"):
        read(tmp_path, "a.csv")
    for name in ("latin", "base64", "rot13", ""):
        if name != "latin":
            with pytest.raises(ValueError, match="there is no encoding"):
                Source.model_validate({"from": "a.csv", "encoding": name})


def test_a_large_text_that_begins_with_a_mark_is_encoded_without_it(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lazy, "LARGE", 100)
    text = "the heron stood by the water. " * 20
    (tmp_path / "a.txt").write_text("\ufeff" + text, encoding="utf-8")
    made = examples("a.txt", tokenizer, base=tmp_path, length=32)
    assert isinstance(made.items, View) and sum(row["text_bytes"] for row in made.rows) == len(text)


def test_folders_of_shards_and_patterns_are_read_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"question": "q", "answer": f"a{n}"} for n in range(6)]
    (tmp_path / "data").mkdir()
    (tmp_path / "README.md").write_text("About.")
    (tmp_path / ".hidden").write_text("x")
    for n in range(3):
        (tmp_path / "data" / f"part-{n}.jsonl").write_text("\n".join(map(json.dumps, rows[2 * n : 2 * n + 2])))
    assert read(tmp_path, ".") == read(tmp_path, "data/*.jsonl") == read(tmp_path, "**/part-?.jsonl") == rows
    monkeypatch.setattr(lazy, "LARGE", 8)
    assert read(tmp_path, "data") == rows and read(tmp_path, "data", where={"answer": "a5"}) == rows[5:]
    with pytest.raises(RequestError, match="has no split 'test'. Did you mean|has no split 'test'. Known: train"):
        read(tmp_path, "data", split="test")
    with pytest.raises(RequestError, match=r"does not exist"):
        read(tmp_path, "data/*.csv")
    (tmp_path / "data" / "part-1.jsonl").write_text('{"question": "q"}')
    with pytest.raises(RequestError, match=r"part-1.jsonl, line 1 has no column 'answer'"):
        read(tmp_path, "data")
    (tmp_path / "data" / "notes.docx").write_text("x")
    with pytest.raises(RequestError, match=r"notes.docx is among the files of .* and is not read"):
        read(tmp_path, "data")


@pytest.mark.parametrize("names", ["{}-00000-of-00001.parquet", "{}.parquet", "{}/0.parquet", "facts_{}.parquet"])
def test_splits_of_a_folder(names: str, tmp_path: Path) -> None:
    for split in ("train", "val", "test"):
        place = (
            tmp_path / "hub" / "data" / names.format(split)
            if "/" not in names
            else tmp_path / "hub" / names.format(split)
        )
        place.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"question": ["q"], "answer": [split]}), place)
    for split, answer in (("train", "train"), ("validation", "val"), ("val", "val"), ("test", "test")):
        assert [row["answer"] for row in read(tmp_path, "hub", split=split)] == [answer]
    with pytest.raises(RequestError, match="has no split 'tst'. Did you mean 'test'"):
        read(tmp_path, "hub", split="tst")
    pq.write_table(pa.table({"question": ["q"], "answer": ["x"]}), tmp_path / "hub" / "more.parquet")
    with pytest.raises(RequestError, match=r"more.parquet is in none of them"):
        read(tmp_path, "hub")


def test_a_file_has_no_splits(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(LINES)
    with pytest.raises(RequestError, match="has no split 'test'"):
        read(tmp_path, "a.jsonl", split="test")


def test_a_folder_of_texts_is_a_row_of_each(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for n, name in enumerate(("b/one.txt", "b/two.md", "a.TXT", "test drive.txt")):
        (tmp_path / "t" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "t" / name).write_text(f"text number {n}. " * 5)
    held = load_rows(Source.model_validate({"from": "t"}), tmp_path)
    assert [row["title"] for row in held] == ["a.TXT", "b/one.txt", "b/two.md", "test drive.txt"]
    (tmp_path / "t" / "README.md").write_text("What these are.")
    said: list[str] = []
    assert load_rows(Source.model_validate({"from": "t"}), tmp_path, said=said) == held
    assert len(said) == 1 and "README.md is taken for a description of the data and passed over" in said[0]
    monkeypatch.setattr(lazy, "LARGE", 20)
    spec = Source.model_validate({"from": "t", "length": 16})
    large = encode(load_rows(spec, tmp_path), spec, tokenizer)
    small = join([encode([row], spec, tokenizer) for row in held])
    assert isinstance(large.items, View)
    assert [item["input_ids"].tolist() for item in large] == [item["input_ids"].tolist() for item in small]
    before = large.digest()
    (tmp_path / "t" / "test drive.txt").write_text("text number 9. " * 5)  # the last of them counts as the first does
    assert encode(load_rows(spec, tmp_path), spec, tokenizer).digest() != before


def test_what_is_no_file_is_refused_and_nothing_waits(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    for name, message in (
        ("pipe.jsonl", "no file that can be read"),
        ("folder.jsonl", "is empty"),
        ("/dev/zero", "device"),
    ):
        with pytest.raises(RequestError, match=message):
            read(tmp_path, name)
    (tmp_path / "folder.jsonl" / "a.jsonl").write_text(LINES)
    os.mkfifo(tmp_path / "folder.jsonl" / "b.jsonl")
    with pytest.raises(RequestError, match=r"b.jsonl is a folder or a device"):
        read(tmp_path, "folder.jsonl")


def test_a_saved_data_set_keeps_the_names_of_its_classes(tmp_path: Path) -> None:
    from datasets import ClassLabel, Dataset, Features, Value

    from overhaul.data.classes import Labels

    features = Features({"image": Value("string"), "label": ClassLabel(names=["zebra", "cat"])})
    rows = Dataset.from_dict({"image": ["a", "b"], "label": [1, 0]}, features=features)
    rows.remove_columns("image").add_column("text", ["a", "b"], new_fingerprint="x").save_to_disk(tmp_path / "d")  # pyright: ignore
    labels: Labels = {"cat": 0, "dog": 1, "zebra": 2}
    spec = Source.model_validate({"from": "d", "as": "rows", "where": {"label": "cat"}})
    assert [row["text"] for row in load_rows(spec, tmp_path, labels=labels)] == ["a"]


LINE = '{"question": "q", "answer": "a"}'


def test_links_to_folders_are_followed_and_rings_refused(tmp_path: Path) -> None:
    for name in ("elsewhere", "data"):
        (tmp_path / name).mkdir()
    (tmp_path / "elsewhere" / "b.jsonl").write_text(LINE)
    (tmp_path / "data" / "a.jsonl").write_text(LINE)
    (tmp_path / "data" / "more").symlink_to(tmp_path / "elsewhere")
    assert len(read(tmp_path, "data")) == 2
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "data")
    with pytest.raises(RequestError, match="more/back is a link to a folder that it lies in"):
        read(tmp_path, "data")
    (tmp_path / "elsewhere" / "back").unlink()
    (tmp_path / "data" / "c.jsonl").symlink_to("gone.jsonl")
    with pytest.raises(RequestError, match=r"c.jsonl is a link to gone.jsonl, which is not there"):
        read(tmp_path, "data")


def test_a_file_beside_its_packed_self_is_not_read_twice(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(LINE)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(LINE.encode()))
    for name in (".", "a.*"):
        with pytest.raises(RequestError, match=r"a.jsonl and .*a.jsonl.gz are one file, of which one is packed"):
            read(tmp_path, name)


def test_patterns_work_below_a_folder_of_any_name(tmp_path: Path) -> None:
    odd = tmp_path / "run [1] of *"
    odd.mkdir()
    (odd / "a.jsonl").write_text(LINE)
    assert len(read(odd, "*.jsonl")) == 1


def test_a_list_inside_of_one_row_is_no_set_of_rows(tmp_path: Path) -> None:
    row = {"question": "q", "answer": "a", "choices": [{"text": "a"}, {"text": "b"}]}
    (tmp_path / "a.json").write_text(json.dumps(row))
    assert read(tmp_path, "a.json") == [row]
    (tmp_path / "a.json").write_text(json.dumps({"version": "1", "data": [row]}))
    assert read(tmp_path, "a.json") == [row]
    (tmp_path / "a.csv").write_bytes("question,answer\nq,é\n".encode("utf-32"))
    with pytest.raises(RequestError, match=r"written in UTF-32. Write `encoding: utf-32`"):
        read(tmp_path, "a.csv")
    assert read(tmp_path, "a.csv", encoding="utf-32")[0]["answer"] == "é"


@pytest.mark.parametrize(
    ("names", "kind", "marks"),
    [
        ("forget/a.jsonl retain/b.jsonl", "roles", "forget, retain"),
        ("forget01.json retain99.json", "roles", "forget, retain"),
        ("forget.txt holdout/1.txt", "roles", "forget, holdout"),
        ("train/forget_a.jsonl train/retain_a.jsonl", "roles", "forget, retain"),
        ("en/train/a.jsonl en/test/b.jsonl", "splits", "test, train"),
    ],
)
def test_what_is_named_for_several_roles_or_splits_is_no_one_material(
    names: str, kind: str, marks: str, tmp_path: Path
) -> None:
    for name in names.split():
        place = tmp_path / "d" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(json.dumps(ROWS[0]))
    for source in ("d", "d/**/*.*"):
        with pytest.raises(
            RequestError, match=rf"^{re.escape(source)}|d holds files of several {kind} \({marks}\)"
        ) as error:
            read(tmp_path, source)
        (named,) = re.findall(r"`from: (\S+)`", str(error.value))
        assert len(read(tmp_path, named)) == 1


def test_names_that_only_begin_like_a_role_are_none(tmp_path: Path) -> None:
    for name in ("forgetful.jsonl", "retainer.jsonl", "train.jsonl"):
        (tmp_path / name).write_text(json.dumps(ROWS[0]))
    assert len(read(tmp_path, "*.jsonl")) == 3
