"""A recipe as text: read it, and know every name in it. No model, no data, no torch is touched here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from overhaul.errors import RequestError, did_you_mean


class Recipe(BaseModel):
    """What a recipe file may say.

    Attributes:
        model: a folder, a hub name, or `starter:NAME`.
        title: for the report.
        seed: every step starts from it.
        dtype: how weights are held while they are worked on; the saved model keeps the dtype it came with.
        trust_remote_code: run Python code that comes with the model.
        materials: data by role, and models: `{from: ...}`, a list of such, `{after: STEP}` or `{model: SOURCE}`.
        steps: methods in order, each with its knobs.
        compare: methods with their knobs for `overhaul compare`, which take the place of the first step of their verb.
        judge: what to measure before and after: `group: {metric: role}`.
    """

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    model: str
    title: str = ""
    seed: int = 0
    dtype: str = "float32"
    trust_remote_code: bool = False
    materials: dict[str, Any] = {}
    steps: list[Any] = []
    compare: list[Any] = []
    judge: dict[str, dict[str, Any]] = {}

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
            named.append({str(name): knobs or {}})
        return named


@dataclass(frozen=True)
class Document:
    """A recipe with where it came from: `base` is where its relative paths start."""

    recipe: Recipe
    text: str
    name: str
    base: Path


def read(source: str | Path | Mapping[str, Any]) -> Document:
    """Read a recipe from a YAML file, a packaged name ("demo"), or a mapping.

    Raises:
        RequestError: no such file, not YAML, or a field that no recipe has.
    """
    if isinstance(source, Mapping):
        return _parse(yaml.safe_dump(dict(source), sort_keys=False), "recipe", Path.cwd())
    path = Path(source)
    if not path.is_file():
        raise RequestError(f"There is no recipe at {path}. `overhaul demo` runs one that ships with the package.")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"{path} is not a text file: {error}.") from None
    return _parse(text, path.stem, path.resolve().parent)


def _parse(text: str, name: str, base: Path) -> Document:
    try:
        loaded = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RequestError(f"The recipe {name} is not valid YAML: {error}") from None
    if not isinstance(loaded, dict):
        raise RequestError(f"The recipe {name} must be a mapping with `model:` and `steps:`.")
    for field in loaded:
        if field not in Recipe.model_fields:
            raise RequestError(f"A recipe has no field {field!r}.{did_you_mean(str(field), Recipe.model_fields)}")
    try:
        recipe = Recipe.model_validate(loaded)
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(map(str, problem["loc"]))
        raise RequestError(f"The recipe {name}, {place}: {problem['msg']}.") from None
    return Document(recipe, text, recipe.title or name, base)
