"""Where rows come from: what ships with the package, a file, a folder, a pattern of files, or the hub."""

from __future__ import annotations

import glob
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import get_args

from overhaul.data import corpora, tasks
from overhaul.data.examples import Row
from overhaul.data.folders import Found, check_one, from_dataset, read_files, read_folder, stated_classes
from overhaul.data.instructions import instructions
from overhaul.data.readers import read_file
from overhaul.data.statements import statements
from overhaul.errors import RequestError, did_you_mean, reading
from overhaul.files import matching, pattern_of

STARTER_DATA: Mapping[str, Callable[[tasks.Split], list[Row]]] = {
    "docs": corpora.docs,
    "code": corpora.code,
    "people": tasks.people,
    "newcomers": tasks.newcomers,
    "addition": tasks.addition,
    "brackets": tasks.brackets,
    "characters": tasks.characters,
    "instructions": instructions,
    "statements": statements,
    "digits": corpora.digits,
    "digits-32": partial(corpora.digits, enlarge=4),
}


def read(source: str, split: str, encoding: str, base: Path) -> Found:
    """What lies at a source, as its files say it.

    Raises:
        RequestError: nothing is there, or what is there cannot be read.
    """
    if source.startswith("starter:"):
        name = source.removeprefix("starter:")
        if name not in STARTER_DATA:
            raise RequestError(f"There is no starter data {name!r}.{did_you_mean(name, STARTER_DATA)}")
        if split not in get_args(tasks.Split):
            raise RequestError(f"starter:{name} has no split {split!r}. Known: train, validation.")
        return Found(STARTER_DATA[name](split))  # pyright: ignore[reportArgumentType]
    with reading(source):
        path = inside(source, base)
        if path.is_dir():
            return read_folder(path, split, encoding)
        several = [] if path.exists() else matching(pattern_of(source, base))
        files = [path] if path.exists() else several
        if files and split != "train":
            raise RequestError(
                f"{source} has no split {split!r}: files are named one by one. Name the file that is meant, or the "
                "folder of splits."
            )
        if files:
            check_one(files, source)
            rows = read_files(files, encoding, path.parent) if several else read_file(path, encoding)
            return Found(rows, stated_classes(files))
    if source.partition("@")[0].count("/") == 1 and not source.startswith(".") and not glob.has_magic(source):
        return _read_hub(source, split)
    raise RequestError(f"{source} does not exist (looked in {base}).")


def inside(source: str, base: Path) -> Path:
    """Where a file lies that a recipe names: below the recipe's folder, or an absolute path."""
    return base / Path(source).expanduser()


def _read_hub(source: str, split: str) -> Found:
    from datasets import load_dataset

    name, _, revision = source.partition("@")
    try:
        loaded = load_dataset(name, split=split, revision=revision or None)
    except Exception as error:  # the hub client raises many kinds; the user needs one message
        raise RequestError(f"{source!r} is no file here, and no dataset could be fetched: {error}") from error
    return from_dataset(loaded, source)
