"""mergekit's configuration files as text: read one, and know every word in it. No model is touched here.

What a file says and mergekit would pass over in silence (a key that it does not have, a parameter that the method does not
use) is refused, with its line; a parameter that another method has is noted.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from overhaul.errors import RequestError, did_you_mean
from overhaul.mergekit.methods import METHODS, OF_MERGEKIT, Kind
from overhaul.mergekit.settings import Settings, check_setting
from overhaul.models import DTYPES
from overhaul.recipe.spec import WANTED, lines, loaded, text_of

Way = tuple[str | int, ...]
"""How to get to a part of the file: ("slices", 0, "sources")."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class Input(_Part):
    """An entry of `models:`."""

    model: str
    parameters: Settings | None = None


class Source(_Part):
    """An entry of a slice's `sources:`; its blocks are counted from 0, and the second number is the first left out."""

    model: str
    layer_range: tuple[int, int]
    parameters: Settings | None = None


class Slice(_Part):
    """An entry of `slices:`."""

    sources: list[Source]
    base_model: str | None = None
    parameters: Settings | None = None


class TokenRule(_Part):
    """Where the row of a word comes from, by itself: a model, {kind: zero}, or {kind: model_token, ...}."""

    source: str | dict[str, Any] | None = None
    force: bool = False


class Tokenizer(_Part):
    """`tokenizer:`, the longer form of `tokenizer_source:`."""

    source: str = "union"
    tokens: dict[str, TokenRule] | None = None
    pad_to_multiple_of: int | None = Field(default=None, gt=0)


class File(_Part):
    """What a file may say."""

    merge_method: str
    models: list[Input] | None = None
    slices: list[Slice] | None = None
    base_model: str | None = None
    dtype: str | None = None
    out_dtype: str | None = None
    tokenizer_source: str | None = None
    tokenizer: Tokenizer | None = None
    chat_template: str | None = None
    parameters: Settings | None = None


@dataclass(frozen=True)
class Document:
    """A file that has been read.

    Attributes:
        file: what it says.
        text: as it is written.
        name: of the file; "" where it is none.
        base: where relative paths of models are looked for after the working folder.
        notes: what a user should know of it.
    """

    file: File
    text: str
    name: str
    base: Path
    notes: list[str] = field(default_factory=list)

    @property
    def called(self) -> str:
        """For messages."""
        return _called(self.name)

    @property
    def kind(self) -> Kind:
        """Its method."""
        return METHODS[self.file.merge_method]

    @property
    def sha256(self) -> str:
        """Of its text."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    def place(self, named: str) -> str:
        """A model's folder beside the file, where there is none of that name in the working folder; else the name itself."""
        beside = self.base / named
        return str(beside) if not Path(named).is_dir() and beside.is_dir() else named

    def named(self) -> list[str]:
        """All models that it names, the base first, each once."""
        file = self.file
        inside = [one.model for one in file.models or ()]
        for part in file.slices or ():
            inside += [*([part.base_model] if part.base_model else []), *(one.model for one in part.sources)]
        return list(dict.fromkeys([*([file.base_model] if file.base_model else []), *inside]))


def read(source: str | Path | Mapping[str, Any]) -> Document:
    """Read a mergekit file, or a mapping that says the same.

    Raises:
        RequestError: no such file, not YAML, a word that mergekit does not have, or one that is not supported here.
    """
    if isinstance(source, Mapping):
        try:
            text = yaml.safe_dump(dict(source), sort_keys=False, allow_unicode=True)
        except (yaml.YAMLError, RecursionError) as error:
            raise RequestError(f"The mergekit configuration cannot be written down: {error}.") from None
        return _parsed(text, "", Path.cwd())
    path = Path(source)
    return _parsed(text_of(path, "mergekit file"), path.name, path.resolve().parent)


def _called(name: str) -> str:
    return f"The mergekit file {name}" if name else "The mergekit configuration"


def _parsed(text: str, name: str, base: Path) -> Document:
    called = _called(name)
    held = loaded(text, called)
    if not isinstance(held, dict):
        raise RequestError(f"{called} must be a mapping with `merge_method:` and `models:` or `slices:`.")
    where = lines(text) if name else {}

    def wrong(way: Way, said: str) -> RequestError:
        line = next((where[way[:n]] for n in range(len(way), 0, -1) if way[:n] in where), None)
        place = "".join(f"[{one}]" if isinstance(one, int) else f".{one}" for one in way).lstrip(".")
        return RequestError(f"{called}{f', line {line}' if line else ''}, {place}: {said}")

    if "modules" in held:
        raise wrong(
            ("modules",), "merging by modules is not supported. Write `models:`, which merges all modules alike."
        )
    if "merge_method" in held:
        _check_method(held["merge_method"], wrong)
    try:
        file = File.model_validate(held)
    except ValidationError as error:
        raise _in_words(error, wrong) from None
    if (file.models is None) == (file.slices is None):
        raise RequestError(f"{called} must have either `models:` or `slices:`.")
    if not (file.models or file.slices) or any(not part.sources for part in file.slices or ()):
        raise RequestError(f"{called} names no model to merge: a list of them is empty.")
    for key in ("dtype", "out_dtype"):
        given = getattr(file, key)
        if given is not None and given.removeprefix("torch.") not in DTYPES:
            raise wrong((key,), f"{given!r} is no dtype to merge in.{did_you_mean(given, DTYPES)}")
    if file.tokenizer_source is not None and file.tokenizer is not None:
        raise wrong(("tokenizer",), "`tokenizer_source` says the same. Write one of them.")
    return Document(file, text, name, base, list(_checked_settings(file, wrong)))


def _check_method(given: Any, wrong: Any) -> None:
    name = str(given)  # a list, for one, is in no mapping
    if name in METHODS:
        return
    known = f"there is no merge method {given!r}"
    if name in OF_MERGEKIT:
        known = f"mergekit's {name!r} is not among the methods here"
    raise wrong(("merge_method",), f"{known}.{did_you_mean(name, METHODS)}")


def _in_words(error: ValidationError, wrong: Any) -> RequestError:
    problem = error.errors()[0]
    way: Way = tuple(one for one in problem["loc"])
    if problem["type"] == "extra_forbidden":
        *_, key = way
        holder = next((kind for kind in _holders(way)), File)
        return wrong(way, f"mergekit's files have no {key!r} here.{did_you_mean(str(key), holder.model_fields)}")
    if problem["type"] == "missing":
        return wrong(way, f"{way[-1]!r} is missing.")
    if problem["type"] in ("model_type", "model_attributes_type"):
        example = _EXAMPLES.get(next((one for one in reversed(way) if one in _EXAMPLES), ""), "`name: ...`")
        return wrong(way, f"{problem['input']!r} will not do: a mapping is wanted here, such as {example}.")
    if way[-2:-1] == ("source",):  # the kinds that it can be of are counted to the place
        return wrong(way[:-1], f"{problem['input']!r} will not do: a text or a mapping is wanted here.")
    return wrong(way, f"{WANTED.get(problem['type']) or problem['msg']}.")


_EXAMPLES: Mapping[str | int, str] = {
    "sources": "{model: ..., layer_range: [0, 4]}",
    "tokens": "{source: ...}",
    "models": "{model: ..., parameters: {weight: 1}}",
    "slices": "{sources: [{model: ..., layer_range: [0, 4]}]}",
    "tokenizer": "{source: base} (or write `tokenizer_source: base`)",
}


def _holders(way: Way) -> Iterator[type[BaseModel]]:
    """The part of a file whose keys stand at a place."""
    words = [one for one in way[:-1] if isinstance(one, str)]
    parts: dict[str, type[BaseModel]] = {
        "sources": Source, "tokens": TokenRule, "models": Input, "slices": Slice, "tokenizer": Tokenizer,
    }  # fmt: skip
    yield from (kind for name, kind in parts.items() if name in words)


def _checked_settings(file: File, wrong: Any) -> Iterator[str]:
    """Refuse parameters that mean nothing; yield what a user should know of the others."""
    kind = METHODS[file.merge_method]
    every = {name for one in METHODS.values() for name in one.parameters}
    said: set[str] = set()
    for way, settings in _settings(file):
        for name, setting in (settings or {}).items():
            known = kind.parameters.get(name)
            if known is None and name not in every:
                raise wrong(
                    (*way, name),
                    f"{file.merge_method} has no parameter {name!r}.{did_you_mean(name, kind.parameters)}",
                )
            if known is None or name == "int8_mask":
                said.add(f"`{name}` has no effect with {file.merge_method}.")
            if known is not None:
                problem = check_setting(setting, known.kind)
                if problem:
                    raise wrong((*way, name), problem)
                if known.refused is not None and known.refused[0](setting):
                    raise wrong((*way, name), known.refused[1])
    yield from sorted(said)


def _settings(file: File) -> Iterator[tuple[Way, Settings | None]]:
    yield ("parameters",), file.parameters
    for n, one in enumerate(file.models or ()):
        yield ("models", n, "parameters"), one.parameters
    for n, part in enumerate(file.slices or ()):
        yield ("slices", n, "parameters"), part.parameters
        for m, one in enumerate(part.sources):
            yield ("slices", n, "sources", m, "parameters"), one.parameters


def model_and_adapter(named: str) -> tuple[str, str | None]:
    """A model's name and that of the adapter to be merged into it, as `model+adapter` has them.

    Raises:
        RequestError: there are more.
    """
    if named.count("+") > 1:
        raise RequestError(f"{named!r} names more than a model and an adapter. Merge the adapters one after the other.")
    model, _, adapter = (re.sub(r"^\s+|\s+$", "", one) for one in named.partition("+"))
    return model, adapter or None
