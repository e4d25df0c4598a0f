"""Rows from one file: JSON, JSON Lines, CSV, TSV, Parquet, plain text, packed or not.

1. Values are what the file says: a cell of CSV is text, whatever is written there; an empty one is an empty text.
2. Lines of JSON end at the line feed alone. JSON Lines may lie in a file called .json.
3. Text is UTF-8, with or without a byte order mark, or in the material's `encoding:`. Lines of plain text end in a line
   feed, whatever the file has there.
4. What is packed (.gz, .bz2, .xz, .zst) is unpacked, into the cache where that is large.
5. A key or a column that stands twice, a row of another width than the header, and what no JSON may hold is an error with
   its line.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from overhaul.data import lazy
from overhaul.data.lazy import TextFile, cache_folder, file_digest, json_lines
from overhaul.data.parquet import parquet_rows
from overhaul.data.values import FileRow, Written
from overhaul.errors import RequestError, reading

Row = dict[str, Any]

UNPACKED_AT_LEAST, UNPACKED_TIMES = 2**28, 100
"""A packed file may hold so many bytes, or so many times its own size: what holds more is no data."""


def ending(path: Path) -> str:
    """The kind of a file by its name: ".jsonl" of "A.JSONL.GZ"."""
    name = path.name.lower()
    packed = next((end for end in PACKED if name.endswith(end)), "")
    return Path(name.removesuffix(packed)).suffix


def unpacked_name(path: Path) -> Path:
    """The file without the ending that says how it is packed."""
    return path.with_name(path.name.removesuffix(path.suffix)) if path.suffix.lower() in PACKED else path


def read_file(path: Path, encoding: str) -> Sequence[Row]:
    """The rows of a file; those of a large JSON Lines file, and a large text, are read when they are asked for.

    Raises:
        RequestError: it is no regular file, of no known kind, or damaged; with its name, and the line where there is one.
    """
    with reading(path):
        if path.is_symlink() and not path.exists():
            raise RequestError(f"{path} is a link to {os.readlink(path)}, which is not there.")
        if not path.is_file():
            raise RequestError(f"{path} is a folder or a device, no file that can be read.")
        if ending(path) not in READERS:
            raise RequestError(f"{path}: files of kind {path.suffix!r} are not read. Known: {' '.join(READERS)}.")
        content = _content(path)
        if content == b"" or (isinstance(content, bytes) and not content.strip()):
            raise RequestError(f"{path} is empty.")
        return READERS[ending(path)](path, content, encoding)


def check_encoding(name: str) -> str:
    """The name of an encoding of text.

    Raises:
        ValueError: there is none of this name.
    """
    try:
        codecs.lookup(name)
        "".encode(name)  # not what turns bytes into bytes
    except (LookupError, UnicodeError, ValueError):
        raise ValueError(f"there is no encoding {name!r}; usual ones are utf-8, utf-16, latin-1, cp1252") from None
    return name


def _content(path: Path) -> bytes | Path:
    """What a file holds, unpacked: bytes, or where a large one lies."""
    unpack = next((each for end, each in PACKED.items() if path.name.lower().endswith(end)), None)
    if unpack is None:
        return path if path.stat().st_size > lazy.LARGE else path.read_bytes()
    try:
        with unpack(path) as packed:
            begun = packed.read(lazy.LARGE + 1)
            return begun if len(begun) <= lazy.LARGE else _unpacked(path, begun, packed)
    except RequestError:
        raise
    except Exception as error:  # each library has its own errors for what is cut off or damaged
        raise RequestError(f"{path} cannot be unpacked: {error}. It is cut off, damaged or no such file.") from None


def _unpacked(path: Path, begun: bytes, packed: BinaryIO) -> Path:
    """Where in the cache the large content of a packed file lies; it is written there unless it is there."""
    place = cache_folder("unpacked") / file_digest(path)
    if place.exists():
        return place
    most = max(UNPACKED_AT_LEAST, UNPACKED_TIMES * path.stat().st_size)
    place.parent.mkdir(parents=True, exist_ok=True)
    partial_ = place.with_name(f".{place.name}.{os.getpid()}")
    try:
        with partial_.open("wb") as out:
            size = out.write(begun)
            while stretch := packed.read(2**20):
                size += out.write(stretch)
                if size > most:
                    raise RequestError(f"{path} unpacks to over {most} bytes, which no text does; it is refused.")
        partial_.replace(place)
    finally:
        partial_.unlink(missing_ok=True)
    return place


def _gzip(path: Path) -> BinaryIO:
    import gzip

    return gzip.open(path)  # pyright: ignore[reportReturnType]


def _bz2(path: Path) -> BinaryIO:
    import bz2

    return bz2.open(path)  # pyright: ignore[reportReturnType]


def _xz(path: Path) -> BinaryIO:
    import lzma

    return lzma.open(path)  # pyright: ignore[reportReturnType]


def _zst(path: Path) -> Any:
    import pyarrow as pa

    return pa.input_stream(str(path), compression="zstd")


PACKED: Mapping[str, Callable[[Path], Any]] = {".gz": _gzip, ".bz2": _bz2, ".xz": _xz, ".zst": _zst}


def decoded(path: Path, data: bytes, encoding: str, first: int = 1) -> str:
    """A stretch of a file as text; `first` is its line.

    Raises:
        RequestError: it is no text in this encoding.
    """
    utf8 = codecs.lookup(encoding).name == "utf-8"
    if utf8 and data.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        raise RequestError(f"{path} is written in UTF-32. Write `encoding: utf-32` in the material.")
    if utf8 and data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise RequestError(f"{path} is written in UTF-16. Write `encoding: utf-16` in the material.")
    if utf8 and data.startswith(b"\x1f\x8b"):
        raise RequestError(f"{path} is packed by gzip. End its name in .gz.")
    if b"\0" in data[:4096] and "16" not in encoding and "32" not in encoding:
        raise RequestError(
            f"{path} holds zero bytes, so it is no text in {encoding}. Text in UTF-16 is read by `encoding: utf-16-le` or "
            "utf-16-be."
        )
    try:
        return data.decode("utf-8-sig" if utf8 else encoding).removeprefix("\ufeff")
    except UnicodeError as error:
        line = first + data[: getattr(error, "start", 0)].count(b"\n")
        raise RequestError(
            f"{path}, line {line}: it is no text in {encoding} ({getattr(error, 'reason', error)}). If it is text in "
            "another encoding, write that in the material: `encoding: latin-1`, or utf-16, cp1252, ..."
        ) from None


def _bytes(content: bytes | Path) -> bytes:
    return content if isinstance(content, bytes) else content.read_bytes()


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} stands twice in one object")
    return found


def _fraction(text: str) -> float:
    value = float(text)
    return value if repr(value) == text else Written(text)


def _whole(text: str) -> int | float:
    return Written(text) if text == "-0" else int(text)


_JSON = json.JSONDecoder(object_pairs_hook=_once, parse_float=_fraction, parse_int=_whole)


def _parsed(place: str, text: str) -> Any:
    """JSON in one piece; `place` begins the error: one line, or a whole file, in which the line is counted."""
    try:
        return _JSON.decode(text)
    except json.JSONDecodeError as error:
        what = "not JSON" if ", line" in place else f"line {error.lineno} is not valid JSON"
        raise RequestError(f"{place}: {what} ({error.msg}, at character {error.colno}).") from None
    except (ValueError, RecursionError) as error:  # a key twice, a number of thousands of digits, nested without end
        raise RequestError(f"{place}: JSON that cannot be read ({error}).") from None


def _plain_object(line: bytes | str, encoding: str) -> dict[str, Any] | None:
    """The object that is a line of UTF-8; None for any other line, which is then looked at more closely."""
    try:
        text = line if isinstance(line, str) else str(line, encoding)
        row, end = _JSON.raw_decode(text)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and not text[end:].strip(" \t\r\n") else None


def _line(path: Path, encoding: str, number: int, line: bytes | str) -> Row:
    place = f"{path}, line {number}"
    if (row := _plain_object(line, encoding)) is not None:
        return FileRow(place, row)
    text = line if isinstance(line, str) else decoded(path, line, encoding, number)
    try:
        row = _parsed(place, text)
    except RequestError as error:
        raise RequestError(f"{error} JSON Lines are one object a line.") from None
    if not isinstance(row, dict):
        raise RequestError(f'{place}: {text[:40]!r} is not an object like {{"question": ...}}.')
    return FileRow(place, row)


def _json_lines(path: Path, content: bytes | Path, encoding: str) -> Sequence[Row]:
    if isinstance(content, Path) and codecs.lookup(encoding).name == "utf-8":
        return json_lines(content, partial(_line, path, encoding))
    return _lines(path, decoded(path, _bytes(content), encoding))


def _lines(path: Path, text: str) -> list[Row]:
    # only "\n" ends a line: JSON may hold the other characters at which `splitlines` breaks
    return [_line(path, "utf-8", number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def _json(path: Path, content: bytes | Path, encoding: str) -> Sequence[Row]:
    text = decoded(path, _bytes(content), encoding).strip("\n\r\t ")
    if text.startswith("{") and _several(text):
        return _lines(path, text)
    whole = _parsed(str(path), text)
    if isinstance(whole, dict):
        whole = _unwrapped(path, whole)
    if not isinstance(whole, list):
        raise RequestError(f"{path} must hold a list of objects, an object of columns, or one object a line.")
    for number, row in enumerate(whole, 1):
        if not isinstance(row, dict):
            raise RequestError(f'{path}, row {number}: {str(row)[:40]!r} is not an object like {{"question": ...}}.')
    if all(map(_is_squad, whole)):
        return [each for number, row in enumerate(whole, 1) for each in _squad(f"{path}, row {number}", row)]
    return [FileRow(f"{path}, row {number}", row) for number, row in enumerate(whole, 1)]


def _is_squad(row: dict[str, Any]) -> bool:
    """Whether this is one text of SQuAD's own files, with the questions below each of its paragraphs."""
    held = row.get("paragraphs")
    return isinstance(held, list) and bool(held) and all(isinstance(each, dict) and "qas" in each for each in held)


def _squad(place: str, text: dict[str, Any]) -> Iterator[Row]:
    """Its questions, each with the paragraph that it is about as `context`."""
    for n, paragraph in enumerate(text["paragraphs"], 1):
        try:
            for m, asked in enumerate(paragraph["qas"], 1):
                answers = [each["text"] for each in asked["answers"]]
                held = {"title": text.get("title"), "context": paragraph["context"], **asked, "answers": answers}
                yield FileRow(f"{place}, paragraph {n}, question {m}", held)
        except (KeyError, TypeError):
            raise RequestError(
                f"{place}, paragraph {n}: SQuAD's paragraphs have a `context` and `qas`, a list of questions with `answers` "
                'like [{"text": ...}].'
            ) from None


def _several(text: str) -> bool:
    """Whether these are JSON Lines: the first line is an object, and another one follows."""
    first, _, rest = text.partition("\n")
    try:
        return rest.lstrip().startswith("{") and isinstance(_JSON.decode(first), dict)
    except (ValueError, RecursionError):
        return False


_ROWS = frozenset(
    "data rows items records examples instances samples entries facts questions train test validation".split()
)
"""What a list of rows is called beside what is said of it (`{"version": "1.0", "data": [...]}`)."""


def _unwrapped(path: Path, whole: dict[str, Any]) -> list[Any]:
    """The rows that one object holds: under a key, in columns, or itself.

    A list of objects under a key are rows (`{"data": [...]}`), unless they are turns of a conversation, or part of one row:
    not alone, and under a name that is none of a set of rows. Where all values are lists of one length, or mappings from
    the same places as pandas writes them, they are columns.
    """
    lists = {key: value for key, value in whole.items() if isinstance(value, list)}
    objects = [key for key, value in lists.items() if value and all(isinstance(each, dict) for each in value)]
    if any({"role", "from"} & each.keys() for key in objects for each in lists[key]):
        return [whole]
    if 1 < len(objects) == len(lists):
        raise RequestError(
            f"{path} holds several lists of rows ({', '.join(objects)}). Write each into a file of its own."
        )
    if len(lists) == len(whole) > 0 and len(set(map(len, lists.values()))) == 1 and (len(lists) > 1 or not objects):
        return [dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True)]
    if len(objects) == 1 and (len(whole) == 1 or objects[0].lower() in _ROWS):
        return lists[objects[0]]
    places = [list(value) for value in whole.values() if isinstance(value, dict)]
    if len(places) == len(whole) > 0 and places[0] and all(each == places[0] for each in places):
        return [{key: column[place] for key, column in whole.items()} for place in places[0]]
    return [whole]


def _separated(separator: str, path: Path, content: bytes | Path, encoding: str) -> Sequence[Row]:
    """Rows of cells, quoted as spreadsheets do it."""
    text = decoded(path, _bytes(content), encoding)
    rows: list[Row] = []
    header: list[str] | None = None
    for number, cells in _cells(path, text, separator):
        if header is None:
            header = _header(f"{path}, line {number}", cells, separator)
        elif len(cells) != len(header):
            raise RequestError(
                f"{path}, line {number}: it has {len(cells)} cells, and the header {len(header)}. A cell that holds the "
                'separator or a line break stands in quotes ("a, b").'
            )
        else:
            rows.append(FileRow(f"{path}, line {number}", dict(zip(header, cells, strict=True))))
    return rows


def _cells(path: Path, text: str, separator: str) -> Iterator[tuple[int, list[str]]]:
    """The cells of each row, and the line where it begins; blank lines are left out."""
    begins, before = 1, csv.field_size_limit(sys.maxsize)
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
        for cells in reader:
            if cells:
                yield begins, cells
            begins = reader.line_num + 1
    except csv.Error as error:
        raise RequestError(f"{path}, line {begins}: the row that begins here cannot be read ({error}).") from None
    finally:
        csv.field_size_limit(before)


def _header(place: str, cells: list[str], separator: str) -> list[str]:
    twice = next((name for name in cells if cells.count(name) > 1), None)
    if twice is not None:
        raise RequestError(f"{place}: two columns are called {twice!r}.")
    other = next((sign for sign in (";", "\t", ",") if len(cells) == 1 and sign in cells[0]), None)
    if other is not None:
        kind = {",": ".csv", "\t": ".tsv"}
        way_out = f"End the file's name in {kind[other]}." if other in kind else "Write it with commas."
        raise RequestError(
            f"{place}: cells are separated by {separator!r} in this kind of file, not {other!r}. {way_out}"
        )
    return cells


def _text(path: Path, content: bytes | Path, encoding: str) -> Sequence[Row]:
    if isinstance(content, Path):
        held: Any = TextFile(content, encoding)
        try:
            for stretch in held.stretches(2**20):
                if "\0" in stretch:
                    raise UnicodeError("it holds NUL characters")
        except UnicodeError as error:
            raise RequestError(
                f"{path} is no text in {encoding} ({error}). Write its encoding in the material: `encoding: latin-1`, or "
                "utf-16, cp1252, ..."
            ) from None
    else:
        held = decoded(path, content, encoding).replace("\r\n", "\n").replace("\r", "\n")
    return [FileRow(str(path), {"title": path.name, "text": held})]


READERS: Mapping[str, Callable[[Path, Any, str], Sequence[Row]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": partial(_separated, ","),
    ".tsv": partial(_separated, "\t"),
    ".parquet": parquet_rows,
    ".txt": _text,
    ".md": _text,
}
"""Kinds of files by how their names end, in lower case."""

TEXTS = (".txt", ".md")
"""Those that are one row each."""
