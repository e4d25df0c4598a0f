"""Whatever happens to a file of data: it is read, or one error names it. Nothing else comes out, and nothing waits."""

from __future__ import annotations

import io
import json
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data.test_files import PACK
from data.test_pictures import processor
from overhaul.data.materials import examples
from overhaul.errors import RequestError

ROWS = [{"question": f"Où est {n}?", "answer": f"à {n}, côté «{n}»", "n": n, "more": [n, None, 0.5]} for n in range(20)]
LINES = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS).encode()
LONGEST = 20.0
"""Seconds that one file may take, on a busy machine."""


def _table(separator: str) -> bytes:
    rows = [["question", "answer"], *(['"Où?"', f'"à{separator} ""{n}"""'] for n in range(20))]
    return "\n".join(separator.join(row) for row in rows).encode()


def _parquet(table: pa.Table, **options: Any) -> bytes:
    held = io.BytesIO()
    pq.write_table(table, held, **options)
    return held.getvalue()


def _picture(kind: str, **options: Any) -> bytes:
    held = io.BytesIO()
    levels = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    Image.fromarray(levels).save(held, kind, **options)
    return held.getvalue()


PLAIN = pa.table({"question": [row["question"] for row in ROWS], "answer": [row["answer"] for row in ROWS]})
FILES: dict[str, bytes] = {
    "a.jsonl": LINES,
    "lines.json": LINES,
    "list.json": json.dumps(ROWS, indent=1).encode(),
    "wrapped.json": json.dumps({"data": ROWS}).encode(),
    "columns.json": json.dumps({"question": ["a", "b"], "answer": ["c", "d"]}).encode(),
    "a.csv": _table(","),
    "a.tsv": _table("\t"),
    "a.txt": "\n".join(row["answer"] for row in ROWS).encode(),
    "a.parquet": _parquet(PLAIN),
    "raw.parquet": _parquet(PLAIN, compression="none", use_dictionary=False, write_page_checksum=True),
    **{f"a.jsonl{end}": pack(LINES) for end, pack in PACK.items()},
    "a.parquet.gz": PACK[".gz"](_parquet(PLAIN)),
    "shots.parquet": _parquet(
        pa.table({"image": [{"bytes": _picture("PNG"), "path": "a.png"}] * 3, "label": [0, 1, 2]})
    ),
    **{
        f"folder/x/a.{kind.lower()}": _picture(kind)
        for kind in ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "TGA")
    },
    "folder/x/packed.tif": _picture("TIFF", compression="tiff_lzw"),
    "folder/x/a.avif": _picture("AVIF"),
    "folder/x/a.jp2": _picture("JPEG2000"),
    "folder/x/a.ico": _picture("ICO"),
    "folder/metadata.csv": b"file_name,label\nb.png,dog\nx/c.png,cat\n",
    "folder/metadata.jsonl": b'{"file_name": "b.png", "label": "dog"}\n{"file_name": "x/c.png", "label": "cat"}',
}
"""Files by where they lie; what lies in a folder is read with it."""


def damaged(whole: bytes, draw: random.Random, count: int) -> Iterator[tuple[str, bytes]]:
    """The same file cut off, with other bytes, in another encoding, as another kind of file."""
    for _ in range(count):
        place, end = sorted(draw.randrange(len(whole)) for _ in range(2))
        yield "cut off", whole[:place]
        yield "begun late", whole[place:]
        yield "a stretch lost", whole[:place] + whole[end:]
        yield "a stretch twice", whole[:end] + whole[place:]
        yield "a stretch of zeros", whole[:place] + bytes(end - place) + whole[end:]
        flipped = bytearray(whole)
        for _ in range(draw.choice((1, 1, 3, 30))):
            flipped[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        yield "bits turned", bytes(flipped)
        yield "noise", draw.randbytes(draw.randrange(1, 300))
        yield "noise behind its beginning", whole[:16] + draw.randbytes(200)
        yield "another kind", FILES[draw.choice(list(FILES))]
    for text in (
        "",
        " ",
        "\n",
        "\0" * 50,
        "\ufeff",
        "[",
        "{}",
        "[]",
        "null",
        "NaN",
        "[" * 100_000,
        '{"a":' * 50_000,
        '"\\ud800"',
    ):
        yield f"only {text[:9]!r}", text.encode()
    yield "a number without end", b'{"question": "q", "answer": ' + b"9" * 6000 + b"}"
    yield "half a character", b'{"question": "q", "answer": "\\ud83e"}'
    for encoding in ("utf-16", "utf-16-le", "utf-32", "latin-1", "cp037"):
        yield f"in {encoding}", whole.decode("utf-8", "replace").encode(encoding, "replace")


def _lay(place: Path, content: bytes) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(content)


def read(name: str, base: Path, tokenizer: Any) -> None:
    source, pictures = name.partition("/")[0], "folder" in name or "shots" in name
    examples(source, processor if pictures else tokenizer, base=base)


def tried(name: str, base: Path, tokenizer: Any, content: bytes | Callable[[Path], None]) -> str:
    """Whether a damaged file is read or refused by its name; anything else is an error of ours."""
    place = base / name
    if name.startswith("folder/metadata"):
        for picture in ("b.png", "x/c.png"):
            _lay(base / "folder" / picture, FILES["folder/x/a.png"])
    if callable(content):
        place.parent.mkdir(parents=True, exist_ok=True)
        place.unlink(missing_ok=True)
        content(place)
    else:
        _lay(place, content)
    began = time.monotonic()
    try:
        read(name, base, tokenizer)
        end = "right"
    except RequestError as error:
        text = str(error)
        assert place.name in text or (name.startswith("folder/") and "folder" in text), text
        assert "\n" not in text.strip() and len(text) < 2000, text
        end = "refused"
    assert time.monotonic() - began < LONGEST, "it waited"
    return end


def suite(names: list[str], count: int, base: Path, tokenizer: Any) -> Counter[str]:
    ends: Counter[str] = Counter()
    for number, name in enumerate(names):
        draw = random.Random(f"{name} {count}")
        where = base / str(number)
        assert tried(name, where, tokenizer, FILES[name]) == "right", name
        for what, content in damaged(FILES[name], draw, count):
            try:
                ends[tried(name, where, tokenizer, content)] += 1
            except Exception as error:
                raise AssertionError(f"{name}, {what}: {type(error).__name__}: {error}") from error
        for make in (Path.mkdir, os.mkfifo):
            place = base / f"{number}-{make.__name__}"
            try:
                ends[tried(name, place, tokenizer, make)] += 1
            except Exception as error:
                raise AssertionError(f"{name}, {make.__name__}: {type(error).__name__}: {error}") from error
    return ends


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OVERHAUL_CACHE", str(tmp_path / "cache"))


def told(ends: Counter[str], capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        print(f"\n{ends.total()} damaged files tried: {ends['right']} right, {ends['refused']} refused, 0 wrong")


@pytest.mark.parametrize("kind", ["rows", "packed", "pictures"])
def test_some_damaged_files_are_read_or_refused_by_name(kind: str, tmp_path: Path, tokenizer: Any) -> None:
    packed = [name for name in FILES if name.lower().endswith(tuple(end.lower() for end in PACK))]
    pictures = [name for name in FILES if "folder" in name or "shots" in name]
    names = {
        "packed": packed,
        "pictures": pictures,
        "rows": [n for n in FILES if n not in packed and n not in pictures],
    }[kind]
    ends = suite(names, 2, tmp_path, tokenizer)
    assert ends["refused"] > 10 * len(names)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_thousands_of_damaged_files_are_read_or_refused_by_name(
    tmp_path: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    ends = suite(list(FILES), 30, tmp_path, tokenizer)
    told(ends, capsys)
    assert ends.total() > 8000 and ends["refused"] > ends.total() / 3
