"""Rows from several files: a saved data set, a folder of pictures, of shards or of texts, or all that a pattern names.

1. Folders or files called train, validation (valid, val, dev) or test (eval) are splits; `split:` chooses one. A folder
   without such names is all "train".
2. Pictures lie in a folder for each class, or anywhere beside a metadata.csv or metadata.jsonl with a column `file_name`.
3. Files that are named for several roles (forget, retain, holdout), or lie deeper in folders of several splits, are no one
   material: they are refused.
4. Hidden files and what describes a data set (README, LICENSE, *.yaml, ...) are passed over. Any other file that is not read
   is an error: nobody would notice that it is missing.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from overhaul.data.classes import Classes, is_number
from overhaul.data.lazy import TextFile, View, chained, sha
from overhaul.data.parquet import class_names, name_classes
from overhaul.data.pictures import is_picture
from overhaul.data.readers import READERS, TEXTS, ending, read_file, unpacked_name
from overhaul.data.values import FileRow
from overhaul.errors import RequestError, did_you_mean

Row = dict[str, Any]

SPLITS: Mapping[str, tuple[str, ...]] = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""What a split is called in names of folders and files."""

SPLIT_OF = {name: split for split, names in SPLITS.items() for name in names}

DESCRIBES = re.compile(
    r"(readme|license|licence|notice|citation|dataset_infos?|dataset_dict|state|thumbs|desktop|checksums?|sha256sums)"
    r"(\..*)?|.*\.(ya?ml|bib|py|ini|md5|sha256)",
    re.IGNORECASE,
)
"""Names of files that say something about data and are none."""

METADATA = ("metadata.csv", "metadata.jsonl")

ROLES = re.compile(r"(forget|retain|holdout)(?![a-z])")
"""How names of folders and files begin that say what their rows are for: `forget01.json`, `retain/`."""


@dataclass(frozen=True)
class Found:
    """What a source holds: rows, the classes that it says a column has, in all its splits, and what should be said of it."""

    rows: Sequence[Row]
    classes: Mapping[str, Classes] = field(default_factory=dict)
    said: tuple[str, ...] = ()


def read_folder(path: Path, split: str, encoding: str) -> Found:
    """The rows of a folder.

    Raises:
        RequestError: it holds nothing that is read, or something that is not; or has no such split.
    """
    if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
        return _saved(path, split)
    every = [each for each in _files_below(path) if not _hidden(each.relative_to(path))]
    files = [each for each in every if not DESCRIBES.fullmatch(each.name)]
    if not files:
        raise RequestError(f"{path} is empty: neither pictures (CLASS/file.png) nor files of rows or texts.")
    if any(each.name.lower() in METADATA or is_picture(each) for each in files):
        return _pictures(path, files, split, encoding)
    chosen = _of_split(path, files, split)
    check_one(chosen, path)
    over = [each.relative_to(path).as_posix() for each in every if each not in files and ending(each) in TEXTS]
    texts = over and any(ending(each) in TEXTS for each in chosen)
    said = (f"{path}: {', '.join(over)} is taken for a description of the data and passed over.",) if texts else ()
    return Found(read_files(chosen, encoding, path), stated_classes(chosen), said)


def _files_below(root: Path) -> list[Path]:
    """All files in a folder, also where a link leads to a folder.

    Raises:
        RequestError: a link leads to a folder that it lies in.
    """
    found: list[Path] = []
    todo: list[tuple[Path, frozenset[Path]]] = [(root, frozenset())]
    while todo:
        folder, above = todo.pop()
        real = folder.resolve()
        if real in above:
            raise RequestError(f"{folder} is a link to a folder that it lies in, so its files have no end. Remove it.")
        for each in folder.iterdir():
            if each.is_dir():
                todo.append((each, above | {real}))
            else:
                found.append(each)
    return sorted(found)


def _hidden(name: Path) -> bool:
    return any(part.startswith((".", "__MACOSX")) for part in name.parts)


def read_files(paths: Sequence[Path], encoding: str, base: Path) -> Sequence[Row]:
    """The rows of several files, in order; texts are called by their way from `base`."""
    first: dict[Path, Path] = {}
    for path in paths:
        if (other := first.setdefault(unpacked_name(path), path)) != path:
            raise RequestError(f"{other} and {path} are one file, of which one is packed. Take one of them out.")
    parts: list[Sequence[Row]] = []
    for path in paths:
        if path.is_file() and ending(path) not in READERS:
            raise RequestError(
                f"{path} is among the files of {base} and is not read. Known: {' '.join(READERS)}, or pictures in a folder "
                "for each class. Take it out, or name the files that are meant: `from: FOLDER/*.jsonl`."
            )
        rows = read_file(path, encoding)
        if isinstance(rows, list) and ending(path) in TEXTS and path.is_relative_to(base):
            rows = [FileRow(str(path), {**row, "title": path.relative_to(base).as_posix()}) for row in rows]
        parts.append(rows)
    if not any(isinstance(part, View) for part in parts):
        return [row for part in parts for row in part]
    return chained([part if isinstance(part, View) else _viewed(part) for part in parts if len(part)])


def _viewed(rows: Sequence[Row]) -> View[Row]:
    return View(rows.__getitem__, range(len(rows)), key_of(rows))


def key_of(rows: Sequence[Row]) -> str:
    """A hash of rows that are held, of which some texts may lie in files."""
    return sha(*(json.dumps(row, default=lambda value: getattr(value, "key", None) or str(value)) for row in rows))


def large_text(rows: Sequence[Row]) -> bool:
    """Whether some of these rows are texts that lie in files."""
    return any(isinstance(value, TextFile) for row in rows for value in row.values())


def _split_of(name: Path, by_folder: bool) -> str | None:
    """The split that a file belongs to, by the folder that it is in or by its own name; None where neither says it."""
    if len(name.parts) > 1 and name.parts[0].lower() in SPLIT_OF:
        return SPLIT_OF[name.parts[0].lower()]
    if by_folder or ending(name) in TEXTS:
        return None
    words = re.split(r"[^a-z]+", name.name.lower().partition(".")[0])  # train-00000-of-00002, facts_test
    return next((SPLIT_OF[word] for word in (words[0], words[-1]) if word in SPLIT_OF), None)


def _of_split(root: Path, files: Sequence[Path], split: str, by_folder: bool = False) -> list[Path]:
    """The files of one split; all of them where none is marked."""
    marks = {each: _split_of(each.relative_to(root), by_folder) for each in files}
    known = {mark for mark in marks.values() if mark}
    wanted = SPLIT_OF.get(split.lower(), split)
    if not known and wanted == "train":
        return list(files)
    if wanted not in known:
        raise RequestError(f"{root} has no split {split!r}.{did_you_mean(wanted, known or {'train'})}")
    if None in marks.values():
        odd = next(each for each, mark in marks.items() if mark is None)
        raise RequestError(
            f"{root} has splits ({', '.join(sorted(known))}), and {odd} is in none of them. Take it out."
        )
    return [each for each, mark in marks.items() if mark == wanted]


def check_one(files: Sequence[Path], source: str | Path, pictures: bool = False) -> None:
    """Whether these files are one material by what they and their folders are called.

    Args:
        files: all of them.
        source: as it was named.
        pictures: their folders are classes, one of which may be called like a split.

    Raises:
        RequestError: they are of several roles, or of several splits.
    """
    root = Path(os.path.commonpath([each.parent for each in files]))
    ways = {each: each.relative_to(root).parts for each in files}
    parts = [(part.lower(), each) for each in files for part in ways[each]]
    roles = {found[1]: each for part, each in parts if (found := ROLES.match(part))}
    splits = {SPLIT_OF[part]: each for part, each in parts if part in SPLIT_OF and not pictures}
    for kind, marks in (("roles", roles), ("splits", splits)):
        if len(marks) > 1:
            one = marks[min(marks)]
            raise RequestError(
                f"{source} holds files of several {kind} ({', '.join(sorted(marks))}), which would be read as one material. "
                f"Name what is meant: `from: {root / ways[one][0]}`, or a list of several."
            )


def _pictures(root: Path, files: Sequence[Path], split: str, encoding: str) -> Found:
    chosen = _of_split(root, files, split, by_folder=True)
    check_one(chosen, root, pictures=True)
    marked = any(each.relative_to(root).parts[0].lower() in SPLIT_OF for each in files if each.parent != root)
    tables = {each.parent: each for each in chosen if each.name.lower() in METADATA}
    pictures = [each for each in chosen if each.name.lower() not in METADATA]
    odd = next((each for each in pictures if not is_picture(each)), None)
    if odd is not None:
        raise RequestError(f"{odd} is among the pictures of {root} and is none. Take it out, or hide it (.{odd.name}).")
    said = {file: row for table in tables.values() for file, row in _metadata(table, encoding).items()}
    known = set(pictures)
    for file, row in said.items():
        if file not in known:
            raise RequestError(f"{row.place}: {row['file_name']!r} is no picture in {file.parent}.")
    rows: list[Row] = []
    for picture in pictures:
        way = picture.relative_to(root).parts[marked:]
        rows.append(_row(picture, way, said, bool(tables)))
    if tables:  # in a table a number is a number
        labels = {label for row in rows if isinstance(label := row.get("label"), str) and label.strip()}
        for row in rows if not all(map(is_number, labels)) else ():
            row |= {"class": row["label"]} if row.get("label") in labels else {}
    classes = {str(row["class"]) for row in rows if "class" in row}
    if not tables and classes and not all("class" in row for row in rows):
        odd = next(row.place for row in rows if "class" not in row)  # pyright: ignore[reportAttributeAccessIssue]
        raise RequestError(f"{odd} lies in no folder of a class, while other pictures of {root} do.")
    if classes and marked and not tables:  # one numbering for all splits
        classes |= {each.relative_to(root).parts[1] for each in files if len(each.relative_to(root).parts) == 3}
    return Found(rows, {"label": Classes.named(classes)} if classes else {})


def _row(picture: Path, way: Sequence[str], said: Mapping[Path, FileRow], tabled: bool) -> FileRow:
    """A picture's row: what the metadata say of it, else the class whose folder it is in."""
    if tabled:
        if picture not in said:
            raise RequestError(f"{picture} has no line in its folder's metadata.")
        row = said[picture]
        held = {name: value for name, value in row.items() if name != "file_name"}
        return FileRow(str(picture), {"image": picture, **held, "file": picture.name})
    if len(way) > 2:
        raise RequestError(f"{picture} lies deeper than CLASS/file or SPLIT/CLASS/file.")
    named = {"label": way[0], "class": way[0]} if len(way) == 2 else {}
    return FileRow(str(picture), {"image": picture, **named, "file": picture.name})


def _metadata(table: Path, encoding: str) -> dict[Path, FileRow]:
    """The rows of a table of pictures, by their files."""
    found: dict[Path, FileRow] = {}
    for row in read_file(table, encoding):
        assert isinstance(row, FileRow)
        name = row.get("file_name")
        if not isinstance(name, str) or not name or ".." in Path(name).parts or Path(name).is_absolute():
            raise RequestError(f"{row.place}: `file_name` must name a picture in this folder or below, not {name!r}.")
        if table.parent / name in found:
            raise RequestError(f"{row.place}: {name!r} has a line already.")
        found[table.parent / name] = row
    return found


def _saved(path: Path, split: str) -> Found:
    from datasets import DatasetDict, load_from_disk

    try:
        loaded = load_from_disk(str(path))
    except Exception as error:  # of many kinds: what is missing, what is no Arrow file
        raise RequestError(f"{path} is no saved data set that can be read: {error}.") from None
    if isinstance(loaded, DatasetDict):
        if split not in loaded:
            raise RequestError(f"{path} has no split {split!r}.{did_you_mean(split, map(str, loaded))}")
        loaded = loaded[split]
    return from_dataset(loaded, str(path))


def from_dataset(loaded: Any, name: str) -> Found:
    """The rows of a `datasets.Dataset`: pictures as bytes, and the names of classes beside their numbers."""
    from datasets import ClassLabel, Image

    try:
        for column, feature in loaded.features.items():
            if isinstance(feature, Image):
                loaded = loaded.cast_column(column, Image(decode=False))
        rows: list[Row] = [FileRow(f"{name}, row {number}", row) for number, row in enumerate(loaded, 1)]
    except Exception as error:
        raise RequestError(f"{name} cannot be read: {error}.") from None
    named = {name: feature.names for name, feature in loaded.features.items() if isinstance(feature, ClassLabel)}
    name_classes(rows, named)
    return Found(rows, _numbered(named))


def stated_classes(paths: Sequence[Path]) -> dict[str, Classes]:
    """The classes that Parquet files of the hub say their columns have.

    Raises:
        RequestError: they say different ones.
    """
    found: dict[str, list[str]] = {}
    for path in paths:
        for column, names in class_names(path).items():
            if found.setdefault(column, names) != names:
                raise RequestError(f"{path} numbers the classes of {column!r} in another way than the files before it.")
    return _numbered(found)


def _numbered(named: Mapping[str, Sequence[str]]) -> dict[str, Classes]:
    return {
        column: Classes({name: number for number, name in enumerate(names)}, stated=True)
        for column, names in named.items()
    }
