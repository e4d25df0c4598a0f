"""Materials: rows from files, folders, hub datasets or starters, filtered, checked and encoded for one role."""

from __future__ import annotations

import json
import warnings
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, Gt
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from overhaul.data.arrow import opened, store
from overhaul.data.chats import is_template, with_template
from overhaul.data.classes import Labels
from overhaul.data.encode import QA_PROMPT
from overhaul.data.examples import Examples, Row, join
from overhaul.data.folders import Found, key_of, large_text
from overhaul.data.forms import FORMS, Form, find_form, told_from
from overhaul.data.lazy import View, cache_folder, sha
from overhaul.data.notes import filters, notes, other_values
from overhaul.data.pictures import Broken
from overhaul.data.prompts import Prompt
from overhaul.data.readers import check_encoding
from overhaul.data.rows import Reader
from overhaul.data.shapes import Shape, shape_of
from overhaul.data.sources import inside, read
from overhaul.data.values import Choice, place_of
from overhaul.data.verifiers import find_verifier
from overhaul.errors import MaterialWarning, RequestError, RowError, did_you_mean, reading
from overhaul.versions import version_of


class Source(BaseModel):
    """One source of a material, as a recipe writes it.

    Attributes:
        from_: a file, a folder, a pattern such as `shards/*.jsonl`, a hub name, or `starter:NAME`; relative to the recipe.
        as_: the form of its rows; told from the columns if it is not given.
        split: of a data set or a folder that has several.
        where: only rows with these values: `{column: value}`, or a list of values of which one must be there; a class by its
            name or its number.
        unless: only rows without them.
        limit: most rows, and most examples that are made of them: a long text is several.
        length: most tokens of a piece of text; a longer one is cut into several.
        prompt: how a question is put, with `{question}` in its place.
        chat_template: instead of the tokenizer's own: a Jinja template, or a file that holds one.
        columns: what the file calls a column: `{question: its name}`.
        answers: where a row lists several answers, the `first`, or `all`, which makes a row of each.
        encoding: of files of text that are not UTF-8: `latin-1`, `utf-16`, ...
        skip_broken: leave out pictures that cannot be read, and say how many.
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
    chat_template: str | None = None
    columns: dict[str, str] = {}
    answers: Choice = None
    encoding: Annotated[str, AfterValidator(check_encoding)] = "utf-8"
    skip_broken: bool = False
    verify: str | None = None

    @model_validator(mode="after")
    def _names_are_known(self) -> Source:
        if self.as_ is not None:
            find_form(self.as_)
        if self.verify is not None:
            find_verifier(self.verify)
        Prompt.of(self.prompt)
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
    labels: Labels | None = None,
    **options: Any,
) -> Examples:
    """Examples for a role, for use from Python.

    Args:
        source: a file of rows or text, a folder of them or of pictures, a pattern such as `shards/*.jsonl`, a saved
            `datasets` folder, a hub dataset, `starter:NAME`, or rows.
        processor: the model's tokenizer or image processor.
        form: how rows are read, such as "text", "qa" or "preference"; told from the columns if None.
        base: where relative paths start; the current folder if None.
        labels: `model.config.label2id`, by which classes with names are numbered and numbers are checked.
        **options: `split`, `where`, `unless`, `limit`, `length`, `prompt`, `chat_template`, `columns`, `answers`,
            `encoding`, `skip_broken`, `verify`, as in a recipe.

    Warns:
        MaterialWarning: what is odd about the data: a column of text that nothing reads, a prompt that ends inside a token,
            pictures that are left out, classes that are numbered in order.

    Raises:
        RequestError: the file is missing or malformed, a column is missing, or no row is left.
    """
    rows: list[Row] | None = None
    given = "rows"
    if isinstance(source, str | Path):
        given = str(source)
    else:
        rows = list(map(dict, _mappings(source)))
    try:
        spec = Source.model_validate({"from": given, "as": form, **options})
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        unknown = problem["type"] == "extra_forbidden"
        fields = {info.alias or name for name, info in Source.model_fields.items()} - {"from", "as"} | {
            "form",
            "labels",
        }
        reason = (
            f"there is none.{did_you_mean(where, fields)}" if unknown else problem["msg"].removeprefix("Value error, ")
        )
        raise RequestError(f"The option {where!r} of a material: {reason}") from None
    said: list[str] = []
    spec = with_files(spec, base or Path.cwd())
    loaded = load_rows(spec, base or Path.cwd(), rows, labels, said)
    made = encode(loaded, spec, processor)
    for note in [*said, *notes(loaded, spec, made)]:
        warnings.warn(note, MaterialWarning, stacklevel=2)
    return made


def _mappings(rows: Sequence[Any]) -> Sequence[Mapping[str, Any]]:
    for number, row in enumerate(rows, 1):
        if not isinstance(row, Mapping):
            raise RequestError(f"rows, row {number}: {str(row)[:40]!r} is no mapping of columns.")
    return rows


def load_rows(
    spec: Source,
    base: Path,
    rows: Sequence[Row] | None = None,
    labels: Labels | None = None,
    said: list[str] | None = None,
) -> Sequence[Row]:
    """The rows of one source after `where`, `unless` and `limit`, as their form reads them; never empty.

    Those of a large file are read when they are asked for, and looked at here.

    Args:
        spec: the source.
        base: where its path starts.
        rows: instead of what the source leads to.
        labels: the names and numbers of the model's classes.
        said: gets what should be known about the data.

    Raises:
        RequestError: something cannot be read, a column is missing or holds what it should not, or no row is left.
    """
    found = Found(rows) if rows is not None else read(spec.from_, spec.split, spec.encoding, base)
    rows, said = found.rows, [] if said is None else said
    if not len(rows):
        raise RequestError(f"{spec.from_} has no rows.")
    for name, file in spec.columns.items():
        if file not in rows[0] and not any(file in row for row in rows):
            raise RequestError(
                f"{spec.from_} has no column {file!r}, which `columns:` names for {name!r}.{did_you_mean(file, rows[0])}"
            )
    read_too = () if spec.verify is None else find_verifier(spec.verify).columns
    form, shape = _form_and_shape(spec, rows[0])
    reader, note = Reader.of(spec, form, shape, read_too, rows, found.classes.get(spec.column("label")), labels)
    said += [*found.said, *([] if note is None else [note])]
    chosen = _choose(spec, rows, reader, said)
    if not isinstance(rows, View):
        return chosen.rows
    which = chosen.which
    key = f"{form.name} {spec.columns} {spec.answers} {spec.prompt}"
    return rows.select(chosen.places).map(lambda i, row: reader.read(row, place_of(row, spec.from_))[0][which[i]], key)


@dataclass
class Taken:
    """Which rows are taken: by their places and which one of each, for a view; and themselves otherwise."""

    places: array[int] = field(default_factory=lambda: array("q"))
    which: array[int] = field(default_factory=lambda: array("q"))
    rows: list[Row] = field(default_factory=list)


def _choose(spec: Source, rows: Sequence[Row], reader: Reader, said: list[str]) -> Taken:
    """Walk through all rows; check those that are taken."""
    chosen, lazily, known = Taken(), isinstance(rows, View), set[str]()
    broken: list[str] = []
    moving, full = 0, False
    wanted = {(say, column, str(each)): {column: each} for say, column, each in _values(spec)}
    for n, row in enumerate(rows):
        known.update(row)
        for name in [name for name, each in wanted.items() if reader.matches(row, each)]:
            del wanted[name]
        full = spec.limit is not None and len(chosen.places) >= spec.limit
        if full and known.issuperset((*spec.where, *spec.unless)):
            break  # the rest is not taken, and nothing is left to be found out
        left_out = (spec.where and not reader.matches(row, spec.where)) or (
            spec.unless and reader.matches(row, spec.unless)
        )
        if full or left_out:
            continue
        place = place_of(row, f"{spec.from_}, row {n + 1}")
        try:
            made, frames = reader.read(row, place)
        except Broken as error:
            if not spec.skip_broken:
                raise
            broken.append(str(error).partition(" is no ")[0])
            continue
        moving += frames
        for k, each in enumerate(made if spec.limit is None else made[: spec.limit - len(chosen.places)]):
            chosen.places.append(n)
            chosen.which.append(k)
            if not lazily:
                chosen.rows.append(each)
    for column in (*spec.where, *spec.unless):
        if column not in known:
            raise RequestError(f"{spec.from_} has no column {column!r}.{did_you_mean(column, known)}")
    if chosen.places and not full:
        said += [f"{spec.from_}: no row has the {column} {each!r} of `{say}:`." for say, column, each in wanted]
    if broken:
        listed = ", ".join(broken[:3]) + (", ..." if len(broken) > 3 else "")
        said.append(
            f"{spec.from_}: {len(broken)} of its {len(rows)} pictures cannot be read and are left out: {listed}."
        )
    if moving:
        said.append(f"{spec.from_}: {moving} of its pictures are of several frames; the first of each is read.")
    if not chosen.places:
        named = spec.column("label") in (*spec.where, *spec.unless) and reader.numbers
        known_as = (
            f" Its classes are {', '.join(list(reader.numbers)[:20])}." if named else other_values(spec.where, rows)
        )
        raise RequestError(
            f"{spec.from_}: none of its {len(rows)} rows is left after {filters(spec.where, spec.unless)}"
            f"{' and what is broken' if broken else ''}. Filters compare whole values; a list means any of them.{known_as}"
        )
    return chosen


def _values(spec: Source) -> Iterator[tuple[str, str, Any]]:
    """Every single value that a filter names, each of which some row should have."""
    for say, filtered in (("where", spec.where), ("unless", spec.unless)):
        for column, value in filtered.items():
            yield from ((say, column, each) for each in (value if isinstance(value, list) else [value]))


def _form_and_shape(spec: Source, row: Row) -> tuple[Form, Shape | None]:
    """As what rows are read: by their own columns, or by a shape that is turned into them."""
    form = find_form(spec.as_) if spec.as_ is not None else told_from(row, spec)
    own = () if form is None else (form.reads(spec), [*map(spec.column, form.columns)])
    if form is not None and any(all(name in row for name in names) for names in own):
        return form, None
    shape = shape_of(row, spec.column, spec.as_)
    if shape is not None:
        return find_form(shape.form), shape
    return form or find_form(form_of(spec, [row])), None


def with_files(spec: Source, base: Path) -> Source:
    """The same source with the text of what it names in files: a chat template that is no template itself.

    Raises:
        RequestError: the file cannot be read, or holds no template.
    """
    named = spec.chat_template
    if named is None or is_template(named):
        return spec
    path = inside(named, base)
    with reading(f"chat_template: {path}"):
        text = path.read_text(encoding="utf-8")
    if not is_template(text):
        raise RequestError(f"chat_template: {path} holds no Jinja template.")
    return spec.model_copy(update={"chat_template": text})


def form_of(spec: Source, rows: Sequence[Row]) -> str:
    """The form the recipe names, or the first one whose columns the rows have."""
    if spec.as_ is not None:
        return spec.as_
    form = told_from(rows[0], spec)
    if form is None:
        place = place_of(rows[0], spec.from_)
        raise RequestError(
            f"{place}: its columns ({', '.join(map(_column, rows[0]))}) do not tell what it is. Add `as:` and one of "
            f"{', '.join(sorted(FORMS))}, and `columns: {{question: YOUR_NAME}}` where names differ."
        )
    return form.name


def _column(name: Any) -> str:
    """A column's name; in quotes where it could not be seen whole."""
    return str(name) if str(name) == str(name).strip() != "" else repr(name)


def positions_of(spec: Source, row: Row) -> list[int]:
    """About how many positions the examples made of a row take, before anything is encoded."""
    return find_form(form_of(spec, [row])).positions(spec, row)


def encode(rows: Sequence[Row], spec: Source, processor: Any) -> Examples:
    """Encode rows in their form. What comes from a large file is written to the cache and mapped into memory.

    Raises:
        RequestError: a row cannot be encoded; it names the file and the row.
    """
    form = find_form(form_of(spec, rows))
    if form.needs == "tokenizer" and not hasattr(processor, "encode"):
        raise RequestError(f"{spec.from_} is {form.name}, which needs a tokenizer; the model folder has none.")
    words_only = hasattr(processor, "encode") and not hasattr(processor, "image_processor")
    if form.needs == "image processor" and words_only and hasattr(rows[0][spec.column("image")], "convert"):
        raise RequestError(f"{spec.from_} holds pictures, which need an image processor; the model has a tokenizer.")
    processor = with_template(processor, spec.chat_template)
    source = _source_of(rows)
    parts = partial(_parts, form, rows, spec, processor)
    # a class is one number an example, which the cache has no place for, and another model's is another one
    if source is None or form.kind not in ("tokens", "pairs") or "label" in form.columns:
        with _naming(rows, spec):
            made = form.encode(rows, spec, processor) if spec.limit is None else join([*parts()])
            return _with_verifier(made[: spec.limit], spec)
    options = spec.model_dump_json(exclude={"from_", "split", "where", "unless", "verify"})
    key = sha(source, form.name, options, version_of(__name__), written(processor), repr(processor))
    path = cache_folder() / f"{key}.arrow"
    if not path.exists():
        with _naming(rows, spec):
            store(parts(), path)
    items, kept = opened(path, key)
    return _with_verifier(Examples(items, kept, processor)[: spec.limit], spec)


def _parts(form: Form, rows: Sequence[Row], spec: Source, processor: Any) -> Iterator[Examples]:
    """The examples, some at a time, until there are as many as are wanted."""
    count = 0
    for part in form.parts(rows, spec, processor):
        yield part
        count += len(part)
        if spec.limit is not None and count >= spec.limit:
            return


@contextmanager
def _naming(rows: Sequence[Row], spec: Source) -> Iterator[None]:
    """Say of a row that is wrong where it is from."""
    try:
        yield
    except RowError as error:
        where = place_of(rows[error.place], f"{spec.from_}, row {error.place + 1}")
        raise RequestError(f"{where}: {error.problem}") from None


def written(tokenizer: Any) -> str:
    """All that a tokenizer is, as text: its chat template too. Padding and truncation are those of the last call."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    own: Any = sorted(tokenizer.get_vocab().items())
    if backend is not None:
        own = json.loads(backend.to_str()) | {"padding": None, "truncation": None}
    return json.dumps(own) + str(getattr(tokenizer, "chat_template", None))


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
    return key_of(rows) if large_text(rows) else None
