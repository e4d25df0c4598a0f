"""A recipe as text: read it, and know every name in it. No model, no data, no torch is touched here."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from annotated_types import Ge, Lt
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from overhaul.errors import SEE, RequestError, did_you_mean

WANTED = {
    "list_type": "a list is wanted here, one line with `- ...` for each thing",
    "dict_type": "a mapping is wanted here, one line with `name: ...` for each thing",
    "string_type": "a text is wanted here",
}
"""What to write instead, by pydantic's name for what is wrong."""


class Recipe(BaseModel):
    """What a recipe file may say.

    Attributes:
        model: a folder, a hub name (`owner/name@revision`), `starter:NAME`, or `new:FOLDER`: a config without weights, which
            the seed draws.
        title: for the report.
        seed: every step starts from it.
        dtype: how weights are held while they are worked on; the saved model keeps the dtype it came with.
        device: where it is worked on: `cpu`, `cuda`, `cuda:1`, `mps`; `auto` is the accelerator if there is one.
        track: where curves and measures also go when the run is done: `trackio` or `wandb`.
        trust_remote_code: run Python code that comes with the model.
        stack: the path of the blocks that steps and judge mean, where the model has several lists of them and no main one
            (`model.decoder.layers`), or where another than the main one is meant.
        materials: data by role, `{from: ...}` or a list of such; models, `{after: STEP}`, `{model: SOURCE}` or a list of
            such; and what a step makes beside the model, `{made: STEP, name: PRODUCT}`.
        steps: methods in order, each with its knobs.
        compare: methods with their knobs for `overhaul compare`, which take the place of the first step of their verb.
        judge: what to measure before and after: `group: {metric: role}`.
    """

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    model: str
    title: str = ""
    seed: Annotated[int, Ge(0), Lt(2**63)] = 0
    dtype: str = "float32"
    device: str = "auto"
    track: Literal["trackio", "wandb"] | None = None
    trust_remote_code: bool = False
    stack: str | None = None
    materials: dict[str, Any] = {}
    steps: list[Any] = []
    compare: list[Any] = []
    judge: dict[str, dict[str, Any]] = {}

    @property
    def on(self) -> str | None:
        """The device, None where the recipe leaves it open."""
        return None if self.device == "auto" else self.device

    @field_validator("steps", "compare")
    @classmethod
    def _steps_are_named(cls, steps: list[Any]) -> list[dict[str, Any]]:
        named = []
        for step in steps:
            entry = {step: {}} if isinstance(step, str) else step
            if not isinstance(entry, dict) or len(entry) != 1:
                raise ValueError(f"a step is `method: {{knob: value}}`, not {step!r}")
            ((name, knobs),) = entry.items()
            if knobs is not None and not isinstance(knobs, dict):
                raise ValueError(f"the knobs of {name} must be a mapping, not {knobs!r}")
            if not isinstance(name, str):
                raise ValueError(f"a step is named by its method, such as `forget.npo`, not by {name!r}")
            for knob in knobs or {}:
                if not isinstance(knob, str):
                    raise ValueError(f"the knobs of {name} are words, not {knob!r}")
            named.append({name: knobs or {}})
        return named


@dataclass(frozen=True)
class Document:
    """A recipe with where it came from: `base` is where its relative paths start."""

    recipe: Recipe
    text: str
    name: str
    base: Path

    @property
    def folder_name(self) -> str:
        """Its name as a folder can have it."""
        return re.sub(r"[^\w.-]+", "-", self.name).strip(".-")[:60] or "recipe"


MOST_NESTED = 50
"""How deep a recipe may be nested; YAML's own reader gives up at some hundreds with an error that says nothing."""


def read(source: str | Path | Mapping[str, Any]) -> Document:
    """Read a recipe from a YAML file or a mapping.

    Raises:
        RequestError: no such file, not YAML, or a field that no recipe has.
    """
    if isinstance(source, Mapping):
        try:
            text = yaml.safe_dump(dict(source), sort_keys=False)
        except (yaml.YAMLError, RecursionError) as error:
            what = " ".join(map(str, getattr(error, "args", ()))) or "it contains itself"
            raise RequestError(
                f"The recipe cannot be written down: {what}. Use text, numbers, lists and mappings."
            ) from None
        return _parse(text, "recipe", Path.cwd())
    path = Path(source)
    text = text_of(path, "recipe", " `overhaul demo` runs one that ships with the package.")
    return _parse(text, path.name, path.resolve().parent)


def text_of(path: Path, what: str, hint: str = "") -> str:
    """What a text file says; `what` it is and a `hint` where there is none are for messages.

    Raises:
        RequestError: there is none, or it cannot be read.
    """
    try:
        if not path.is_file():
            raise RequestError(f"There is no {what} at {path}.{hint}")
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"{path} is not a text file: {error}.") from None
    except OSError as error:
        raise RequestError(f"The {what} {str(path)[:80]!r} cannot be read: {error.strerror}.") from None


def loaded(text: str, named: str) -> Any:
    """A YAML text, with what is wrong with it in words; `named` is for messages: "The recipe a.yaml".

    Raises:
        RequestError: it is not YAML, or holds what has no meaning here.
    """
    try:
        found = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        said = str(error).replace('in "<unicode string>", ', "in ")
        raise RequestError(f"{named} is not valid YAML: {said}") from None
    except (ValueError, RecursionError) as error:  # a date or number that does not exist; nesting without end
        raise RequestError(f"{named} cannot be read: {error}.") from None
    _check_values(named, found)
    return found


def lines(text: str) -> dict[tuple[str | int, ...], int]:
    """In which line of a YAML text each of its parts begins, by the way to it: ("steps", 0)."""
    found: dict[tuple[str | int, ...], int] = {}

    def look(node: Any, way: tuple[str | int, ...]) -> None:
        found.setdefault(way, node.start_mark.line + 1)
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                found[(*way, str(key.value))] = key.start_mark.line + 1
                look(value, (*way, str(key.value)))
        elif isinstance(node, yaml.SequenceNode):
            for number, value in enumerate(node.value):
                look(value, (*way, number))

    look(yaml.compose(text, _Loader), ())
    return found


def _parse(text: str, name: str, base: Path) -> Document:
    loaded_recipe = loaded(text, f"The recipe {name}")
    if not isinstance(loaded_recipe, dict):
        raise RequestError(f"The recipe {name} must be a mapping with `model:` and `steps:`.")
    for field in loaded_recipe:
        if field not in Recipe.model_fields:
            raise RequestError(f"A recipe has no field {field!r}.{did_you_mean(str(field), Recipe.model_fields)}{SEE}")
    try:
        recipe = Recipe.model_validate(loaded_recipe)
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(map(str, problem["loc"]))
        message = WANTED.get(problem["type"]) or problem["msg"].removeprefix("Value error, ")
        raise RequestError(f"The recipe {name}, {place}: {message}.") from None
    return Document(recipe, text, recipe.title or Path(name).stem, base)


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, in which words stay words and a key that is written twice is an error.

    Of what stands without quotes, `true`, `false`, `null` and plain numbers alone are not text (as in YAML 1.2): `no` is the
    word, `007` an id, `12:30` a time, `2024-05-01` what it says.
    """

    yaml_implicit_resolvers: ClassVar[dict[str, list[Any]]] = {}  # pyright: ignore[reportIncompatibleVariableOverride]

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """As YAML does it, where each key stands once."""
        seen: set[str] = set()
        for key, _ in node.value:
            text = str(getattr(key, "value", key))
            if text in seen and getattr(key, "tag", "") != "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(
                    None, None, f"{text!r} is written twice, and only one of them would count", key.start_mark
                )
            seen.add(text)
        return super().construct_mapping(node, deep)

    def compose_node(self, parent: Any, index: Any) -> Any:
        """As YAML does it, down to a depth."""
        self.depth = getattr(self, "depth", 0) + 1
        if self.depth > MOST_NESTED:
            raise yaml.composer.ComposerError(None, None, "it is nested too deep", self.peek_event().start_mark)  # pyright: ignore
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1


for _tag, _pattern, _first in (
    ("bool", r"true|false|True|False|TRUE|FALSE", "tfTF"),
    ("null", r"null|Null|NULL|~|", "nN~\0"),
    ("int", r"[-+]?(?:0|[1-9][0-9]*)", "-+0123456789"),
    (
        "float",
        r"[-+]?(?:(?:0|[1-9][0-9]*)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
    ("merge", r"<<", "<"),
):
    _whole = re.compile(f"^(?:{_pattern})$")
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _whole, ["" if c == "\0" else c for c in _first])


def _check_values(where: str, value: Any, depth: int = 0) -> None:
    """Refuse numbers that are none, and whatever has no meaning in a recipe."""
    if depth > MOST_NESTED:
        raise RequestError(f"{where[:60]} ... is nested too deep, or contains itself.")
    if isinstance(value, str) and re.search(r"[\ud800-\udfff]", value):
        raise RequestError(f"{where}: {value[:80]!r} holds half a character. Write the character itself.")
    if isinstance(value, Mapping):
        for key, one in value.items():
            _check_values(where, key, depth + 1)
            _check_values(f"{where}, {key}", one, depth + 1)
    elif isinstance(value, list):
        for n, one in enumerate(value, 1):
            _check_values(f"{where}, {n}", one, depth + 1)
    elif isinstance(value, float) and not math.isfinite(value):
        raise RequestError(f"{where}: {value} is no number that can be worked with.")
    elif isinstance(value, bytes) or not isinstance(value, str | int | float | bool | None):
        raise RequestError(f"{where}: {value!r} is a {type(value).__name__}; write it as text, in quotes.")
