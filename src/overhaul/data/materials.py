"""Materials: rows from a file, folder, hub dataset or starter, filtered and encoded for one role."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from annotated_types import Ge, Gt
from pydantic import BaseModel, ConfigDict, Field, model_validator

from overhaul.data import corpora, tasks
from overhaul.data.arrow import cache_folder, opened, store
from overhaul.data.encode import QA_PROMPT
from overhaul.data.examples import Examples, Row
from overhaul.data.forms import FORMS, find_form, told_from
from overhaul.data.lazy import LARGE, TextFile, View, json_lines, sha
from overhaul.data.verifiers import find_verifier
from overhaul.errors import RequestError, did_you_mean, reading
from overhaul.versions import version_of

STARTER_DATA: Mapping[str, Callable[[tasks.Split], list[Row]]] = {
    "docs": corpora.docs,
    "code": corpora.code,
    "people": tasks.people,
    "addition": tasks.addition,
    "brackets": tasks.brackets,
    "digits": corpora.digits,
    "digits-32": partial(corpora.digits, enlarge=4),
}


class Source(BaseModel):
    """One source of a material, as a recipe writes it.

    Attributes:
        from_: a file, a folder, a hub name, or `starter:NAME`; relative to the recipe.
        as_: the form of its rows; told from the columns if it is not given.
        split: of a data set that has several.
        where: only rows with these values: `{column: value}`, or a list of values of which one must be there.
        unless: only rows without them.
        limit: most rows, and most pieces of text.
        length: most tokens of a piece of text; a longer one is cut into several.
        prompt: how a question is put, with `{question}` in its place.
        columns: what the file calls a column: `{question: its name}`.
        verify: what decides whether an answer is right.
    """

    model_config = ConfigDict(extra="forbid", populate_by_name=True)

    from_: str = Field(alias="from")
    as_: str | None = Field(default=None, alias="as")
    split: str = "train"
    where: dict[str, Any] = {}
    unless: dict[str, Any] = {}
    limit: Annotated[int, Gt(0)] | None = None
    length: Annotated[int, Ge(8)] = 256
    prompt: str = QA_PROMPT
    columns: dict[str, str] = {}
    verify: str | None = None

    @model_validator(mode="after")
    def _names_are_known(self) -> Source:
        if self.as_ is not None:
            find_form(self.as_)
        if self.verify is not None:
            find_verifier(self.verify)
        return self

    def column(self, name: str) -> str:
        """What the source calls the column that a form knows as `name`."""
        return self.columns.get(name, name)


def examples(
    source: str | Path | Sequence[Mapping[str, Any]],
    processor: Any = None,
    *,
    form: str | None = None,
    base: Path | None = None,
    **options: Any,
) -> Examples:
    """Examples for a role, for use from Python.

    Args:
        source: a JSONL, JSON, CSV or Parquet file, an image folder, a saved `datasets` folder, a hub dataset,
            `starter:NAME`, or rows.
        processor: the model's tokenizer or image processor.
        form: how rows are read, such as "text", "qa" or "preference"; told from the columns if None.
        base: where relative paths start.
        **options: `split`, `where`, `unless`, `limit`, `length`, `prompt`, `columns`, `verify`, as in a recipe.

    Raises:
        RequestError: the file is missing or malformed, a column is missing, or no row is left.
    """
    given = source if isinstance(source, str | Path) else "rows"
    try:
        spec = Source.model_validate({"from": str(given), "as": form, **options})
    except ValueError as error:
        raise RequestError(f"These options do not describe a material: {error}") from None
    rows = None if isinstance(source, str | Path) else [dict(row) for row in source]
    return encode(load_rows(spec, base or Path.cwd(), rows), spec, processor)


def load_rows(spec: Source, base: Path, rows: Sequence[Row] | None = None) -> Sequence[Row]:
    """The rows of one source after `where`, `unless` and `limit`; never empty.

    Those of a large file are read when they are asked for.
    """
    if rows is None:
        rows = _read(spec, base)
    if not rows:
        raise RequestError(f"{spec.from_} has no rows.")
    known = rows[0].keys()
    read = [] if spec.verify is None else find_verifier(spec.verify).columns
    form = find_form(form_of(spec, rows))
    for wanted in [*map(spec.column, [*form.columns, *read]), *spec.where, *spec.unless]:
        if wanted not in known:
            raise RequestError(f"{spec.from_} has no column {wanted!r}.{did_you_mean(wanted, known)}")
    places = range(len(rows))
    if spec.where or spec.unless:
        places = [
            n
            for n, row in enumerate(rows)
            if _matches(row, spec.where) and not (spec.unless and _matches(row, spec.unless))
        ]
    if not places:
        raise RequestError(
            f"{spec.from_}: none of its {len(rows)} rows is left after where={spec.where} unless={spec.unless}. "
            "Filters compare whole values; a list means any of them."
        )
    return rows.select(places[: spec.limit]) if isinstance(rows, View) else [rows[n] for n in places[: spec.limit]]


def form_of(spec: Source, rows: Sequence[Row]) -> str:
    """The form the recipe names, or the first one whose columns the rows have."""
    if spec.as_ is not None:
        return spec.as_
    form = told_from(rows[0], spec)
    if form is None:
        raise RequestError(
            f"{spec.from_}: its columns ({', '.join(rows[0])}) do not tell what it is. Add `as:` and one of "
            f"{', '.join(sorted(FORMS))}, and `columns: {{question: YOUR_NAME}}` where names differ."
        )
    return form.name


def positions_of(spec: Source, row: Row) -> list[int]:
    """About how many positions the examples made of a row take, before anything is encoded."""
    return find_form(form_of(spec, [row])).positions(spec, row)


def _matches(row: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    return all(
        row.get(column) in value if isinstance(value, list) else row.get(column) == value
        for column, value in wanted.items()
    )


def encode(rows: Sequence[Row], spec: Source, processor: Any) -> Examples:
    """Encode rows in their form. What comes from a large file is written to the cache and mapped into memory."""
    form = find_form(form_of(spec, rows))
    if form.needs == "tokenizer" and not hasattr(processor, "encode"):
        raise RequestError(f"{spec.from_} is {form.name}, which needs a tokenizer; the model folder has none.")
    source = _source_of(rows)
    if source is None or form.kind not in ("tokens", "pairs"):
        return _with_verifier(form.encode(rows, spec, processor), spec)
    options = spec.model_dump_json(exclude={"from_", "split", "where", "unless", "limit", "verify"})
    key = sha(source, form.name, options, version_of(__name__), processor.backend_tokenizer.to_str(), repr(processor))
    path = cache_folder() / f"{key}.arrow"
    if not path.exists():
        store(form.parts(rows, spec, processor), path)
    items, kept = opened(path, key)
    return _with_verifier(Examples(items, kept, processor), spec)


def _with_verifier(examples: Examples, spec: Source) -> Examples:
    """The rows say which verifier is theirs."""
    if spec.verify is None:
        return examples
    named = {"verify": spec.verify}
    if isinstance(examples.rows, View):
        return replace(examples, rows=examples.rows.map(lambda _, row: {**row, **named}, spec.verify))
    return replace(examples, rows=[{**row, **named} for row in examples.rows])


def _source_of(rows: Sequence[Row]) -> str | None:
    """A hash of what rows of a large file were read from; None for rows that are held."""
    if isinstance(rows, View):
        return rows.key
    files = [value for row in rows[:2] for value in row.values() if isinstance(value, TextFile)]
    return files[0].key if files else None


def _read(spec: Source, base: Path) -> Sequence[Row]:
    if spec.from_.startswith("starter:"):
        name = spec.from_.removeprefix("starter:")
        if name not in STARTER_DATA:
            raise RequestError(f"There is no starter data {name!r}.{did_you_mean(name, STARTER_DATA)}")
        if spec.split not in get_args(tasks.Split):
            raise RequestError(f"starter:{name} has no split {spec.split!r}. Known: train, validation.")
        return STARTER_DATA[name](spec.split)  # pyright: ignore[reportArgumentType]
    with reading(spec.from_):
        path = _inside(spec.from_, base)
        is_file, is_folder = path.is_file(), path.is_dir()
    if is_file:
        with reading(path):
            return _read_file(path)
    if is_folder:
        return _read_folder(path, spec)
    if spec.from_.count("/") == 1 and not spec.from_.startswith("."):
        return _read_hub(spec)
    raise RequestError(f"{spec.from_} does not exist (looked in {base}).")


def _inside(source: str, base: Path) -> Path:
    """A recipe may name files beside it or below it, or an absolute path; not climb out with `..`."""
    path = Path(source).expanduser()
    if ".." in path.parts:
        raise RequestError(
            f"{source}: a recipe's paths may not climb out of its folder with '..'. Use an absolute path."
        )
    return path if path.is_absolute() else base / path


def _read_file(path: Path) -> Sequence[Row]:
    if path.suffix in {".jsonl", ".json"}:
        return _read_json(path)
    if path.suffix in {".csv", ".parquet"}:
        import pandas

        if path.suffix == ".csv":  # as text: "NA" is no gap, and "0044" no 44
            cells = pandas.read_csv(path, dtype=str, keep_default_na=False, na_filter=False)
            columns = {str(name): _plain(list(column)) for name, column in cells.items()}
            return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        frame = pandas.read_parquet(path)
        return [{str(k): v for k, v in row.items()} for row in frame.to_dict("records")]
    if path.suffix in {".txt", ".md"}:
        large = path.stat().st_size > LARGE
        return [{"title": path.name, "text": TextFile(path) if large else path.read_text(encoding="utf-8")}]
    raise RequestError(
        f"{path}: files of kind {path.suffix!r} are not read. Known: .jsonl .json .csv .parquet .txt .md."
    )


def _plain(column: list[str]) -> list[Any]:
    """A column of a CSV file: numbers or truth values where all its cells would be written just so, else text."""
    for read in (_truth, _number):
        values = [read(cell) for cell in column]
        if all(value is not None and str(value) == cell for value, cell in zip(values, column, strict=True)):
            return values
    return column


def _truth(cell: str) -> bool | None:
    return {"True": True, "False": False}.get(cell)


def _number(cell: str) -> float | None:
    for kind in (int, float):
        with suppress(ValueError):
            value = kind(cell)
            return value if math.isfinite(value) else None
    return None


def _read_json(path: Path) -> Sequence[Row]:
    if path.suffix == ".jsonl" and path.stat().st_size > LARGE:
        return json_lines(path, partial(_line, path))
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        try:
            rows = json.loads(text)
        except json.JSONDecodeError as error:
            raise RequestError(f"{path} is not valid JSON: {error}.") from None
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise RequestError(f"{path} must hold a list of objects.")
        return rows
    # only "\n" ends a line: JSON may hold the other characters at which `splitlines` breaks
    return [_line(path, number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def _line(path: Path, number: int, line: str) -> Row:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise RequestError(f"{path}, line {number}: not JSON ({error.msg}). JSONL is one object a line.") from None
    if not isinstance(row, dict):
        raise RequestError(f'{path}, line {number}: {line[:40]!r} is not an object like {{"question": ...}}.')
    return row


def _read_folder(path: Path, spec: Source) -> Sequence[Row]:
    if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
        from datasets import DatasetDict, load_from_disk

        loaded = load_from_disk(str(path))
        if isinstance(loaded, DatasetDict):
            if spec.split not in loaded:
                raise RequestError(f"{path} has no split {spec.split!r}.{did_you_mean(spec.split, map(str, loaded))}")
            loaded = loaded[spec.split]
        return [dict(row) for row in loaded]  # pyright: ignore[reportArgumentType,reportCallIssue]
    pictures = sorted(p for p in path.glob("*/*") if p.suffix.lower() in {".png", ".jpg", ".jpeg", ".bmp", ".webp"})
    if not pictures:
        raise RequestError(
            f"{path} is neither a saved `datasets` folder nor a folder of image folders (LABEL/file.png)."
        )
    from PIL import Image

    labels = sorted({p.parent.name for p in pictures})
    numbers: Literal[True] | bool = all(label.isdigit() for label in labels)
    rows: list[Row] = []
    for picture in pictures:
        with Image.open(picture) as image:
            image.load()
            name = picture.parent.name
            label = int(name) if numbers else labels.index(name)
            rows.append({"image": image.copy(), "label": label, "class": name, "file": picture.name})
    return rows


def _read_hub(spec: Source) -> Sequence[Row]:
    from datasets import load_dataset

    try:
        return [dict(row) for row in load_dataset(spec.from_, split=spec.split)]  # pyright: ignore[reportArgumentType,reportCallIssue]
    except Exception as error:  # the hub client raises many kinds; the user needs one message
        raise RequestError(f"{spec.from_!r} is no file here, and no dataset could be fetched: {error}") from error
