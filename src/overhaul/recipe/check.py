"""Everything that can be wrong with a request, found before any weight is read."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from overhaul import method as methods
from overhaul import models, processes, session
from overhaul.conversions.records import bound_together, recorded_by
from overhaul.data.classes import labels_of
from overhaul.data.examples import Examples
from overhaul.data.forms import find_form
from overhaul.data.materials import Row, Source, encode, form_of, load_rows
from overhaul.errors import MaterialWarning, RequestError, did_you_mean
from overhaul.judge import judge as judging
from overhaul.method import Step as Step
from overhaul.recipe import oddities, outputs, verbs
from overhaul.recipe.encoded import check_encoded, encoded, opening
from overhaul.recipe.materials import Materials, Reference, model_of, relative, source_of
from overhaul.recipe.spec import Document, Recipe
from overhaul.recipe.track import tracker
from overhaul.stack import LayerStack


@dataclass(frozen=True)
class Checked:
    """A request in which nothing is known to be wrong."""

    document: Document
    model: models.Checkpoint
    steps: list[Step]
    materials: Materials
    requests: list[judging.Request]
    used: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    loaded: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def processor(self) -> Any:
        """The model's tokenizer or image processor, which is loaded when it is first asked for."""
        if "processor" not in self.loaded:
            with opening(self.model):
                self.loaded["processor"] = models.load_processor(self.model)
        return self.loaded["processor"]

    @property
    def recipe(self) -> Recipe:
        """The recipe that was checked."""
        return self.document.recipe

    @property
    def rows(self) -> Mapping[str, list[tuple[Source, Sequence[Row]]]]:
        """The materials that are data."""
        return self.materials.rows

    @property
    def references(self) -> Mapping[str, Reference]:
        """The materials that are models or products of steps."""
        return self.materials.references

    def references_read(self) -> list[models.Checkpoint]:
        """The models that come from outside the run."""
        return [model_of(one) for one in self.references.values() if "model" in one]

    @property
    def anchors(self) -> list[str]:
        """The models that what is measured is to be held against, those that the recipe names."""
        compared = dict.fromkeys(request.compared_with for request in self.requests)
        return [name for name in compared if name is not None and "model" in self.references.get(name, {})]

    def positions(self, spec: Source, rows: Sequence[Row]) -> list[list[int]]:
        """About how many positions the examples made of each row of a source take; its rows are read for it once."""
        counted: dict[int, list[list[int]]] = self.loaded.setdefault("positions", {})
        if id(rows) not in counted:
            form = find_form(form_of(spec, rows))
            counted[id(rows)] = [form.positions(spec, row) for row in rows]
        return counted[id(rows)]

    def examples(self, rows: Sequence[Row], spec: Source) -> Examples:
        """The examples of a source, which is encoded once; `rows` are those that the materials hold."""
        known: dict[int, Examples] = self.loaded.setdefault("examples", {})
        if id(rows) not in known:
            known[id(rows)] = encode(rows, spec, self.processor)
        return known[id(rows)]

    def raw_rows(self) -> dict[str, list[Mapping[str, Any]]]:
        """The rows of every material that a step reads as they are."""
        return {
            name: [row for _, rows in self.rows[name] for row in rows]
            for step in self.steps
            for role in step.method.roles
            if role.kind == "rows"
            for name in step.names(role.name)
            if name in self.rows
        }

    def encode(self) -> dict[str, Examples]:
        """The examples of every role that a step or the judge reads.

        Raises:
            RequestError: nothing is left to learn from, or a token is not in the model's vocabulary.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", MaterialWarning)  # they are among the notes
            data = {role: encoded(role, self.rows[role], self.examples) for role in self.used}
        check_encoded(data, self.model)
        return data


def check(document: Document) -> Checked:
    """Check a recipe from its names to its files, columns and roles.

    Args:
        document: the recipe.

    Raises:
        RequestError: with what is wrong, where, and what to write instead.
    """
    recipe = document.recipe
    trust = recipe.trust_remote_code
    known = models.facts(relative(recipe.model, document), seed=recipe.seed, trust_remote_code=trust)
    if recipe.dtype not in models.DTYPES:
        raise RequestError(f"dtype {recipe.dtype!r} is not possible.{did_you_mean(recipe.dtype, models.DTYPES)}")
    with session.using(device=recipe.on):
        processes.device()  # refuses what is not there
    if recipe.track:
        tracker(recipe.track)
    materials = Materials.of(recipe, document, labels_of(known.config))
    if not recipe.steps and not recipe.compare:
        raise RequestError("The recipe has no steps. `overhaul methods` lists what a step can be.")
    steps, odd = _steps(recipe.steps, materials, known)
    anchors = [name for name, one in materials.references.items() if "model" in one]
    requests = judging.check(recipe.judge, materials.rows, anchors=anchors, base=document.base, trust=trust)
    used = _used(steps, requests, materials)
    if not recipe.model.startswith("starter:"):  # what ships has been built; building takes seconds of imports
        model = models.check_shapes(known)
        outputs.check_head(model, steps, used, requests)
        for role in used:
            outputs.check_classes(role, model, [find_form(form_of(*source)) for source in materials.rows[role]])
    compared = [request.compared_with for request in requests]
    outputs.check_opened(steps, materials.references, [name for name in compared if name is not None], trust)
    if recipe.stack is not None and (network := models.planned(known)) is not None:
        LayerStack.at(network, recipe.stack)  # refuses what is not there
    with opening(known):
        words = models.count_tokens(known)
    for role in used:
        read = any(find_form(form_of(*source)).needs == "tokenizer" for source in materials.rows[role])
        if read and words is None:
            raise RequestError(
                f"The material {role!r} is text, but {known.source} has no tokenizer. Put its tokenizer.json beside the "
                "weights (`tokenizer.save_pretrained(folder)`)."
            )
    if any(request.task for request in requests):
        outputs.check_speaks(known, words)
    odd += [
        f"The material {name!r} is read by no step and no metric." for name in oddities.unread(recipe, steps, requests)
    ]
    checked = Checked(document, known, steps, materials, requests, used)
    return replace(checked, warnings=[*odd, *oddities.of_data(checked)])


def with_steps(checked: Checked, entries: Sequence[Mapping[str, Any]]) -> Checked:
    """The same request with other steps, of which everything is checked that depends on steps.

    Raises:
        RequestError: as `check`.
    """
    recipe = checked.recipe.model_copy(update={"steps": list(entries)})
    steps, odd = _steps(recipe.steps, checked.materials, checked.model)
    used = _used(steps, checked.requests, checked.materials)
    text = yaml.safe_dump(recipe.model_dump(exclude_defaults=True), sort_keys=False)
    document = replace(checked.document, recipe=recipe, text=text)
    changed = replace(checked, document=document, steps=steps, used=used)
    return replace(changed, warnings=[*odd, *oddities.of_data(changed)])


def _steps(
    entries: Sequence[Mapping[str, Any]], materials: Materials, model: models.Checkpoint
) -> tuple[list[Step], list[str]]:
    """All steps, and what is odd about the roles they read."""
    steps: list[Step] = []
    for number, entry in enumerate(entries, 1):
        steps.append(_step(number, entry, materials, steps))
    _check_alone(steps, model)
    if steps:
        _check_after(materials.references, steps)
    return steps, [*materials.notes, *(one for step in steps for one in verbs.ask("check", step, materials.rows))]


def _check_alone(steps: Sequence[Step], model: models.Checkpoint) -> None:
    """Whether blocks that a step runs by themselves can be run so, after what was built onto the network."""
    content = model.config.get("overhaul")
    records = content.get("conversions", []) if isinstance(content, Mapping) else []
    built = [recorded_by(record).name for record in records]
    for step in steps:
        bound = [name for name in built if bound_together(name)]
        if bound and step.method.runs_alone(step.knobs):
            raise RequestError(
                f"Step {step.number}, {step.name}, runs blocks by themselves, but those of a network with {bound[0]} read "
                "what all blocks before them wrote. Put the step before that one, or leave it out."
            )
        if step.method.changes == "architecture":
            built.append(step.name.partition(".")[2])


def _used(steps: Sequence[Step], requests: Sequence[judging.Request], materials: Materials) -> list[str]:
    """The materials that have to be encoded: examples that a step reads, and what the judge measures on."""
    read = [
        name
        for step in steps
        for role in step.method.roles
        if role.kind == "examples"
        for name in step.names(role.name)
        if name in materials.rows
    ]
    return list(dict.fromkeys([*read, *(role for request in requests for role in request.roles.values())]))


def _step(number: int, entry: Mapping[str, Mapping[str, Any]], materials: Materials, before: Sequence[Step]) -> Step:
    """Find the method; tell its roles from its knobs; `ROLE: MATERIAL` among the knobs reads another material."""
    ((name, given),) = entry.items()
    found = methods.find(name)
    roles = {material.name: material for material in found.roles}
    subject = found.subject
    if subject is not None and subject.name in given:
        raise RequestError(
            f"Step {number}, {found.name}: {subject.name!r} is the model that the step before hands on; it cannot be named."
        )
    renamed = {key: value for key, value in given.items() if key in roles}
    knobs = {key: value for key, value in given.items() if key not in roles}
    known = {knob.name for knob in found.knobs}
    for key in knobs:
        if key not in known:
            raise RequestError(f"{found.name} has no knob {key!r}.{did_you_mean(str(key), [*known, *roles])}")
    where = f"Step {number}, {found.name}"
    reads: dict[str, str | tuple[str, ...]] = {}
    for role, material in roles.items():
        wanted = renamed.get(role, role)
        names = _names(where, material, wanted, materials)
        lacking = [one for one in names if one not in materials.rows and one not in materials.references]
        if lacking and role not in renamed and not material.required:
            continue
        if lacking:
            what = (material.doc or role).rstrip(".")
            raise RequestError(
                f"{where}, needs {_described(material)} {lacking[0]!r} ({what}), and the recipe's materials "
                f"have none.{did_you_mean(lacking[0], materials.known)}"
            )
        for one in names:
            _check_kind(where, material, one, materials, before)
        reads[role] = names if material.many else names[0]
    return Step(number, found, found.check(knobs), reads)


def _described(material: methods.Material) -> str:
    return "a model" if material.is_model else "the material"


def _names(where: str, material: methods.Material, wanted: Any, materials: Materials) -> tuple[str, ...]:
    """The names of the materials that a role reads."""
    several = list(wanted) if isinstance(wanted, list) else [wanted]
    for one in several:
        if not isinstance(one, str):
            raise RequestError(
                f"{where}: {material.name} reads a material by its name, not {one!r}. Put it under `materials:` and name it "
                "here."
            )
    names = tuple(name for one in several for name in materials.names(one))
    if not names:
        raise RequestError(f"{where}: {material.name} is an empty list; name at least one material.")
    if len(names) > 1 and not material.many:
        listed = ", ".join(names)
        join = "" if material.is_model else f" To read several as one, list them there: `{material.name}: [{listed}]`."
        raise RequestError(f"{where}: {material.name} reads one of `materials:`, not {len(names)} ({listed}).{join}")
    return names


def _check_kind(
    where: str, material: methods.Material, name: str, materials: Materials, before: Sequence[Step]
) -> None:
    """Whether a material is what the role reads: a model, data, or tensors."""
    reference = materials.references.get(name, {})
    kind = "model" if reference else "data"
    if "made" in reference:
        kind = product_of(where, name, reference, before)
    elif "tensors" in reference:
        kind = "tensors"
    allowed = {
        "model": ("model", "checkpoint"),
        "checkpoint": ("model", "checkpoint"),
        "examples": ("data", "examples", "rows"),
        "rows": ("data", "rows"),
        "tensors": ("tensors",),
    }
    if kind not in allowed[material.kind]:
        needs = "a model" if material.is_model else "tensors" if material.kind == "tensors" else "data"
        raise RequestError(f"{where}: {material.name} reads {needs}, but the material {name!r} is {_named(kind)}.")


def _named(kind: str) -> str:
    return {"data": "data", "model": "a model", "json": "plain JSON", "checkpoint": "a checkpoint"}.get(kind, kind)


def maker_of(reference: Reference, steps: Sequence[Step]) -> Step | None:
    """The last of these steps that goes by the name of the one that makes a product."""
    return next((step for step in reversed(steps) if step.goes_by(reference["made"])), None)


def product_of(where: str, name: str, reference: Reference, before: Sequence[Step]) -> methods.Product:
    """What kind of product a reference means.

    Raises:
        RequestError: no step before makes it.
    """
    step = maker_of(reference, before)
    if step is None:
        hint = did_you_mean(reference["made"], [one.name for one in before]) if before else " There is none."
        raise RequestError(
            f"{where}: the material {name!r} is made by {reference['made']!r}, which is no step before.{hint}"
        )
    makes = step.method.makes
    if reference["name"] not in makes:
        raise RequestError(
            f"{where}: {step.name} makes no {reference['name']!r} for the material {name!r}."
            f"{did_you_mean(reference['name'], makes) or ' It makes nothing beside the model.'}"
        )
    options = [key for key in reference if key not in ("made", "name")]
    if options and makes[reference["name"]] != "rows":
        raise RequestError(
            f"{where}: {step.name} makes {reference['name']!r} as {makes[reference['name']]}, and `{options[0]}:` is for "
            f"rows alone. Leave it out of the material {name!r}."
        )
    if lacking := step.method.makes_with(reference["name"], step.knobs):
        raise RequestError(
            f"{where}: {step.name} makes {reference['name']!r} for the material {name!r} only with {lacking}, and step "
            f"{step.number} has other knobs."
        )
    source_of(name, _as_source(reference))
    return makes[reference["name"]]


def _as_source(reference: Reference) -> dict[str, Any]:
    """The options with which rows that a step made are encoded."""
    options = {key: value for key, value in reference.items() if key not in ("made", "name")}
    return {"from": f"made by {reference['made']}", **options}


def encode_made(role: str, reference: Reference, rows: list[Row], processor: Any) -> Examples:
    """Rows that a step made, filtered and encoded as their material says."""
    spec = source_of(role, _as_source(reference))
    return encode(load_rows(spec, Path.cwd(), rows), spec, processor)


def _check_after(references: Mapping[str, Reference], steps: Sequence[Step]) -> None:
    """Whether the steps that make something, or after which a model is taken, are there and before those that read it."""
    for name, reference in references.items():
        if "made" in reference and maker_of(reference, steps) is None:
            hint = did_you_mean(reference["made"], [step.name for step in steps])
            raise RequestError(f"The material {name!r} is made by {reference['made']!r}, which is no step.{hint}")
        if "after" not in reference:
            continue
        target = reference["after"]
        places = [step.number for step in steps if step.goes_by(target)]
        if target != "start" and not places:
            hint = did_you_mean(target, ["start", *(step.name for step in steps)])
            raise RequestError(f"The model {name!r} is `after: {target}`, which is no step.{hint}")
        if len(places) > 1:
            raise RequestError(
                f"The model {name!r} is `after: {target}`, which the steps {', '.join(map(str, places))} are. Write the "
                f"number of the one that is meant: `after: {places[0]}`."
            )
        users = [step for step in steps if name in step.materials]
        if places and any(step.number <= places[0] for step in users):
            raise RequestError(f"The model {name!r} is the one after {target}, but a step before that reads it.")
