"""What a recipe's `materials:` are: data from files, models, several models under one name, and what steps make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors import SafetensorError, safe_open

from overhaul import models
from overhaul.data.classes import Labels
from overhaul.data.materials import Row, Source, form_of, load_rows, with_files
from overhaul.errors import SEE, RequestError, did_you_mean, reading
from overhaul.recipe.spec import Document, Recipe

Reference = dict[str, Any]
"""A material that no file of rows holds: {"after": STEP}, {"model": SOURCE, "otherwise": ...}, {"tensors": FILE}, or what a
step made: {"made": STEP, "name": PRODUCT, ...}. `model_of` reads the second."""

REFERENCES: Mapping[str, frozenset[str]] = {
    "after": frozenset({"after"}),
    "model": frozenset({"model"}),
    "tensors": frozenset({"tensors"}),
    "made": frozenset(
        {"made", "name", "as", "where", "unless", "limit", "length", "prompt", "chat_template", "columns", "answers"}
    ),
}
"""What each kind of reference may say."""


@dataclass(frozen=True)
class Materials:
    """All materials of a recipe.

    Attributes:
        rows: of data, each source with its rows.
        references: models and products.
        lists: the names of several references under one.
        notes: what should be said about the data.
    """

    rows: Mapping[str, list[tuple[Source, Sequence[Row]]]]
    references: Mapping[str, Reference]
    lists: Mapping[str, tuple[str, ...]]
    notes: Sequence[str] = ()

    @classmethod
    def of(cls, recipe: Recipe, document: Document, labels: Labels | None = None) -> Materials:
        """Read every file of rows and the facts of every model; `labels` are the classes of the recipe's model.

        Raises:
            RequestError: a material says too little, or its file or model is not there.
        """
        data: dict[str, Any] = {}
        references: dict[str, Reference] = {}
        lists: dict[str, tuple[str, ...]] = {}
        for role, value in recipe.materials.items():
            if _is_reference(value):
                references[role] = _reference(role, value, document)
            elif isinstance(value, list) and any(_is_reference(part) or _names(part, references) for part in value):
                lists[role] = tuple(_listed(role, value, references, document))
            else:
                data[role] = value
        notes: list[str] = []
        return cls(_load(data, document, labels, notes), references, lists, list(dict.fromkeys(notes)))

    def names(self, wanted: str) -> tuple[str, ...]:
        """The materials that a name stands for: several where it is a list of models."""
        return self.lists.get(wanted, (wanted,))

    @property
    def known(self) -> list[str]:
        """Every name that a step may use."""
        inline = {name for names in self.lists.values() for name in names if "[" in name}
        return [*self.rows, *(name for name in self.references if name not in inline), *self.lists]


def _is_reference(value: Any) -> bool:
    return isinstance(value, dict) and bool(REFERENCES.keys() & value.keys())


def _names(part: Any, references: Mapping[str, Reference]) -> bool:
    return isinstance(part, str) and part in references


def _reference(role: str, value: Reference, document: Document) -> Reference:
    """One reference, checked as far as it can be without the steps; the model's folder is found."""
    (kind,) = [kind for kind in REFERENCES if kind in value][:1]
    for key in value:
        if key not in REFERENCES[kind]:
            raise RequestError(
                f"The material {role!r} has no option {key!r}.{did_you_mean(str(key), REFERENCES[kind])}{SEE}"
            )
    if kind == "after" and type(value[kind]) is int:  # a step's number
        value = {"after": str(value[kind])}
    for key in {kind, "name"} & value.keys():
        if not isinstance(value[key], str):
            raise RequestError(f"The material {role!r}, {key}: {value[key]!r} is no name; write `{key}: NAME`.")
    if kind == "made" and "name" not in value:
        raise RequestError(
            f"The material {role!r} must say which product it is: `{{made: {value['made']}, name: PRODUCT}}`."
        )
    if kind == "model":
        own = document.recipe.model  # `new:` has no weights that an adapter could be for
        beside = {} if own.startswith("new:") else {"otherwise": relative(own, document)}
        return {"model": model_of({"model": relative(value["model"], document), **beside}).source, **beside}
    if kind == "tensors":
        return {"tensors": str(_tensors(role, document.base / Path(value["tensors"]).expanduser()))}
    if kind == "made" and "chat_template" in value:
        spec = source_of(role, {"from": "rows", "chat_template": value["chat_template"]})
        return {**value, "chat_template": with_files(spec, document.base).chat_template}
    return dict(value)


def model_of(reference: Mapping[str, Any], trust_remote_code: bool = False) -> models.Checkpoint:
    """The model from outside the run that a material names; an adapter that names no base is one of the recipe's model."""
    otherwise = reference.get("otherwise")
    return models.facts(reference["model"], trust_remote_code=trust_remote_code, otherwise=otherwise)


def _tensors(role: str, path: Path) -> Path:
    """A safetensors file, if it is one."""
    try:
        with safe_open(path, framework="pt"):
            return path.absolute()
    except (OSError, SafetensorError) as error:
        raise RequestError(
            f"The material {role!r}, tensors: {path} is no safetensors file that can be read ({error}). Name one, or what a "
            "step makes: `{made: STEP, name: PRODUCT}`."
        ) from None


def _listed(role: str, value: Sequence[Any], references: dict[str, Reference], document: Document) -> list[str]:
    """The names of several references; those that are written out get names of their own."""
    names: list[str] = []
    for n, part in enumerate(value):
        if _names(part, references):
            names.append(part)
        elif _is_reference(part):
            names.append(f"{role}[{n}]")
            references[names[-1]] = _reference(names[-1], part, document)
        else:
            raise RequestError(
                f"The material {role!r} lists models, but {part!r} is none. Write `{{model: FOLDER}}`, or the "
                "name of a model above it."
            )
    return names


def relative(source: str, document: Document) -> str:
    """A model folder beside the recipe, else the source as it is (a hub name, a starter, or a path from here)."""
    kind, path = ("new:", source.removeprefix("new:")) if source.startswith("new:") else ("", source)
    if source.startswith("starter:") or not path:
        return source
    beside = document.base / path
    with reading(f"The model {source!r}"):
        return f"{kind}{beside}" if beside.is_dir() else source


def _load(
    data: Mapping[str, Any], document: Document, labels: Labels | None, notes: list[str]
) -> dict[str, list[tuple[Source, Sequence[Row]]]]:
    """The rows of every material that is data."""
    loaded: dict[str, list[tuple[Source, Sequence[Row]]]] = {}
    for role, value in data.items():
        parts: list[tuple[Source, Sequence[Row]]] = []
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, str) and isinstance(value, list):
                if part not in loaded:
                    hint = did_you_mean(part, loaded)
                    raise RequestError(
                        f"The material {role!r} includes {part!r}, which is not a material above it.{hint}"
                    )
                parts += loaded[part]
                continue
            spec = with_files(source_of(role, part), document.base)
            rows = load_rows(spec, document.base, labels=labels, said=notes)
            form_of(spec, rows)
            parts.append((spec, rows))
        if not parts:
            raise RequestError(f"The material {role!r} is an empty list; name a source: `{role}: {{from: FILE}}`.")
        loaded[role] = parts
    return loaded


def source_of(role: str, part: Any) -> Source:
    """A source as a recipe writes it, checked."""
    if not isinstance(part, dict) or "from" not in part:
        several = (
            f" To give the material {part!r} a second name, list it: `{role}: [{part}]`."
            if isinstance(part, str)
            else ""
        )
        raise RequestError(
            f"The material {role!r} must say where it comes from: `{role}: {{from: FILE}}` for data or "
            f"`{role}: {{model: FOLDER}}` for a model, not {part!r}.{several}"
        )
    fields = [info.alias or name for name, info in Source.model_fields.items()]
    for name in part:
        if name not in fields:
            raise RequestError(f"The material {role!r} has no option {name!r}.{did_you_mean(str(name), fields)}{SEE}")
    try:
        return Source.model_validate(part)
    except ValidationError as error:
        problem = error.errors()[0]
        raise RequestError(f"The material {role!r}, {'.'.join(map(str, problem['loc']))}: {problem['msg']}.") from None
