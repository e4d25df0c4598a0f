"""Everything that can be wrong with a request, found before any weight is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import yaml
from pydantic import ValidationError

from overhaul import method as methods
from overhaul import models
from overhaul.data.examples import Examples, join
from overhaul.data.forms import find_form
from overhaul.data.materials import Row, Source, encode, form_of, load_rows
from overhaul.errors import RequestError, did_you_mean
from overhaul.judge import judge as judging
from overhaul.recipe.roles import check_roles
from overhaul.recipe.spec import Document, Recipe

ModelReference = dict[str, str]
"""`{"after": step}` or `{"model": source}`."""

RETRAINED = "retrained"
"""The material that is a model trained without what is to be forgotten."""


@dataclass(frozen=True)
class Step:
    """One checked step: its method, all its knobs, and which material each of its roles reads."""

    number: int
    method: methods.Method
    knobs: Mapping[str, Any]
    reads: Mapping[str, str]

    @property
    def name(self) -> str:
        """The method's name, as the report shows it."""
        return self.method.name

    def goes_by(self, name: str) -> bool:
        """Whether a recipe may call it so: "forget.npo" or "npo"."""
        return name in (self.name, self.name.partition(".")[2])


@dataclass(frozen=True)
class Checked:
    """A request in which nothing is known to be wrong."""

    document: Document
    model: models.Checkpoint
    processor: Any
    steps: list[Step]
    rows: Mapping[str, list[tuple[Source, Sequence[Row]]]]
    references: Mapping[str, ModelReference]
    requests: list[judging.Request]
    used: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def recipe(self) -> Recipe:
        """The recipe that was checked."""
        return self.document.recipe

    @property
    def compares_with_retrained(self) -> bool:
        """Whether what is measured is to be held against a retrained model, which the recipe names."""
        named = "model" in self.references.get(RETRAINED, {})
        return named and any(request.against_retrained for request in self.requests)

    def encode(self) -> dict[str, Examples]:
        """The examples of every role that a step or the judge reads.

        Raises:
            RequestError: nothing is left to learn from, or a token is not in the model's vocabulary.
        """
        data = {
            role: join([encode(rows, spec, self.processor) for spec, rows in self.rows[role]]) for role in self.used
        }
        for role, examples in data.items():
            if not len(examples):
                raise RequestError(f"The material {role!r} has rows, but no example is left once they are encoded.")
            if examples.kind in ("tokens", "pairs"):
                _check_tokens(role, examples, self.model.config)
        return data


def _check_tokens(role: str, examples: Examples, config: Mapping[str, Any]) -> None:
    """Whether the model can read these tokens: they are in its vocabulary, and their number within its positions."""
    top = max(int(item["input_ids"].max()) for item in examples.items)
    if top >= (size := config.get("vocab_size", top + 1)):
        raise RequestError(
            f"The material {role!r} has token {top}, but the model's vocabulary ends at {size - 1}: tokenizer and model do "
            "not belong together."
        )
    longest = examples.by_length()[0]
    length, positions = len(examples.items[longest]["input_ids"]), _positions(config)
    if positions is not None and length > positions:
        asked = examples.rows[longest].get("question")
        which = f"number {longest + 1}" if asked is None else f"the question {str(asked)[:60]!r}"
        way_out = f"Write `length: {positions}`." if asked is None else "Shorten such rows or leave them out."
        raise RequestError(
            f"The material {role!r} has an example of {length} tokens ({which}), but the model ends at {positions} "
            f"positions: cut there, its answer would be lost. {way_out}"
        )


def _positions(config: Mapping[str, Any]) -> int | None:
    return config.get("max_position_embeddings", config.get("n_positions"))


def check(document: Document, *, shapes: bool = True) -> Checked:
    """Check a recipe from its names to its files, columns and roles.

    Args:
        document: the recipe.
        shapes: also compare the shapes of the weights with those that the model's config describes.

    Raises:
        RequestError: with what is wrong, where, and what to write instead.
    """
    recipe = document.recipe
    known = models.facts(recipe.model if recipe.model.startswith("starter:") else _relative(recipe.model, document))
    if recipe.dtype not in models.DTYPES:
        raise RequestError(f"dtype {recipe.dtype!r} is not possible.{did_you_mean(recipe.dtype, models.DTYPES)}")
    references = {k: v for k, v in recipe.materials.items() if isinstance(v, dict) and {"after", "model"} & v.keys()}
    rows = _load(recipe, document, list(references))
    if not recipe.steps and not recipe.compare:
        raise RequestError("The recipe has no steps. `overhaul methods` lists what a step can be.")
    steps, warnings = _steps(recipe.steps, rows, references)
    requests = judging.check(
        recipe.judge, rows, anchors=[RETRAINED] if "model" in references.get(RETRAINED, {}) else []
    )
    used = _used(steps, requests, rows)
    if shapes:
        models.check_shapes(known)
    processor = models.load_processor(known)
    for role in used:
        read = any(find_form(form_of(*source)).needs == "tokenizer" for source in rows[role])
        if read and not hasattr(processor, "encode"):
            raise RequestError(
                f"The material {role!r} is text, but {known.source} has no tokenizer. Put its tokenizer.json beside the "
                "weights (`tokenizer.save_pretrained(folder)`)."
            )
    return Checked(document, known, processor, steps, rows, references, requests, used, warnings)


def with_steps(checked: Checked, entries: Sequence[Mapping[str, Any]]) -> Checked:
    """The same request with other steps, of which everything is checked that depends on steps.

    Raises:
        RequestError: as `check`.
    """
    recipe = checked.recipe.model_copy(update={"steps": list(entries)})
    steps, warnings = _steps(recipe.steps, checked.rows, checked.references)
    used = _used(steps, checked.requests, checked.rows)
    text = yaml.safe_dump(recipe.model_dump(exclude_defaults=True), sort_keys=False)
    document = replace(checked.document, recipe=recipe, text=text)
    return replace(checked, document=document, steps=steps, used=used, warnings=warnings)


def _steps(
    entries: Sequence[Mapping[str, Any]], rows: Mapping[str, Any], references: Mapping[str, ModelReference]
) -> tuple[list[Step], list[str]]:
    """All steps, and what is odd about the roles they read."""
    steps = [_step(n, entry, rows, references) for n, entry in enumerate(entries, 1)]
    _check_references(references, steps)
    warnings = [
        warning
        for step in steps
        for warning in check_roles(f"Step {step.number}, {step.name}", step.reads, step.method.changes, rows)
    ]
    return steps, warnings


def _used(steps: Sequence[Step], requests: Sequence[judging.Request], rows: Mapping[str, Any]) -> list[str]:
    read = [role for step in steps for role in step.reads.values() if role in rows]
    return list(dict.fromkeys([*read, *(role for request in requests for role in request.roles.values())]))


def _relative(source: str, document: Document) -> str:
    """A model folder beside the recipe, else the source as it is (a hub name or a path from here)."""
    beside = document.base / source
    return str(beside) if beside.is_dir() else source


def _load(
    recipe: Recipe, document: Document, references: Sequence[str]
) -> dict[str, list[tuple[Source, Sequence[Row]]]]:
    loaded: dict[str, list[tuple[Source, Sequence[Row]]]] = {}
    for role, value in recipe.materials.items():
        if role in references:
            continue
        loaded[role] = []
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, str):
                if part not in loaded:
                    hint = did_you_mean(part, loaded)
                    raise RequestError(
                        f"The material {role!r} includes {part!r}, which is not a material above it.{hint}"
                    )
                loaded[role] += loaded[part]
                continue
            spec = _source(role, part)
            rows = load_rows(spec, document.base)
            form_of(spec, rows)
            loaded[role].append((spec, rows))
    return loaded


def _source(role: str, part: Any) -> Source:
    if not isinstance(part, dict) or "from" not in part:
        raise RequestError(
            f"The material {role!r} must say where it comes from: `{role}: {{from: FILE}}`, not {part!r}."
        )
    fields = [info.alias or name for name, info in Source.model_fields.items()]
    for name in part:
        if name not in fields:
            raise RequestError(f"The material {role!r} has no option {name!r}.{did_you_mean(str(name), fields)}")
    try:
        return Source.model_validate(part)
    except ValidationError as error:
        problem = error.errors()[0]
        raise RequestError(f"The material {role!r}, {'.'.join(map(str, problem['loc']))}: {problem['msg']}.") from None


def _step(
    number: int, entry: Mapping[str, Mapping[str, Any]], rows: Mapping[str, Any], references: Mapping[str, Any]
) -> Step:
    """Find the method; tell its roles from its knobs; `ROLE: MATERIAL` among the knobs reads another material."""
    ((name, given),) = entry.items()
    found = methods.find(name)
    roles = {material.name: material for material in found.roles}
    renamed = {key: value for key, value in given.items() if key in roles}
    knobs = {key: value for key, value in given.items() if key not in roles}
    known = {knob.name for knob in found.knobs}
    for key in knobs:
        if key not in known:
            raise RequestError(f"{found.name} has no knob {key!r}.{did_you_mean(key, [*known, *roles])}")
    reads: dict[str, str] = {}
    for role, material in roles.items():
        wanted = renamed.get(role, role)
        there = rows if material.kind == "examples" else references
        if wanted in there:
            reads[role] = wanted
        elif role in renamed or material.required:
            raise RequestError(
                f"Step {number}, {found.name}, needs {'a model' if material.kind == 'model' else 'the material'} {wanted!r} "
                f"({material.doc or role}), and the recipe's materials have none.{did_you_mean(wanted, there)}"
            )
    return Step(number, found, found.check(knobs), reads)


def _check_references(references: Mapping[str, ModelReference], steps: Sequence[Step]) -> None:
    for name, reference in references.items():
        if "after" in reference:
            target = reference["after"]
            places = [step.number for step in steps if step.goes_by(target)]
            if target != "start" and not places:
                hint = did_you_mean(target, ["start", *(step.name for step in steps)])
                raise RequestError(f"The model {name!r} is `after: {target}`, which is no step.{hint}")
            users = [step for step in steps if name in step.reads.values()]
            if places and any(step.number <= places[0] for step in users):
                raise RequestError(f"The model {name!r} is the one after {target}, but a step before that reads it.")
        else:
            models.facts(reference["model"])
