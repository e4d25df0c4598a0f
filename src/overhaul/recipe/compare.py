"""Several methods from one checkpoint, side by side: same materials, same judge, same seeds, one table.

1. The methods take the place of the recipe's first step of their verb; its other steps stay as they are.
2. Everything that the variants share is done once: the data is read once, and the model before, the retrained model and
   every common step are kept in one folder by the hash of all they depend on. So a comparison that was stopped goes on.
   Times are taken at the end, of all models of the table in turn.
3. Beside them stands a null control: noise on every tensor as large as what the first method changed there. What the
   noise reaches as well is not the method's merit.
4. A material `retrained: {model: FOLDER}` is judged as one row: a model that never saw what is to be forgotten.
"""

from __future__ import annotations

import hashlib
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from overhaul import __version__, method, models, processes, session
from overhaul.data.examples import Examples
from overhaul.errors import OverhaulError, RequestError
from overhaul.judge.requests import RETRAINED
from overhaul.recipe import machine
from overhaul.recipe.ahead import look_ahead
from overhaul.recipe.check import Checked, check, with_steps
from overhaul.recipe.materials import model_of
from overhaul.recipe.plan import disk_bytes
from overhaul.recipe.results import counted
from overhaul.recipe.run import Run
from overhaul.recipe.runner import Runner
from overhaul.recipe.spec import read
from overhaul.recipe.store import RunFolder, Stage, key_of
from overhaul.report.comparison import Comparison, Kind, Row
from overhaul.weights import TensorFacts, delta_norms, stream

Entry = Mapping[str, Mapping[str, Any]]


LONGEST = 50
"""Characters of a method's folder: a knob may be a list of hundreds."""


@dataclass(frozen=True)
class Variant:
    """One method in its place: what the table calls it, where its model goes, and the request that runs it."""

    label: str
    folder: str
    place: int
    checked: Checked


def compare(
    source: str | Path | Mapping[str, Any],
    names: Sequence[str] = (),
    out: str | Path | None = None,
    *,
    seeds: int = 1,
) -> Run:
    """Run several methods on the same request, or go on with it.

    Args:
        source: a recipe file, or the same as a mapping. Its `compare:` lists methods with their knobs, as `steps:` does.
        names: methods of one verb; all of `compare:` if empty. Knobs are those of `compare:`, else of the step that is
            replaced if it is of the same method, else the defaults.
        out: folder; `runs/NAME-compared` if None. Every method's model, report and lineage go into a folder of its own.
        seeds: how often each method runs, with the recipe's seed and the ones after it.

    Returns:
        The folder and the content of its comparison.json.

    Raises:
        RequestError: a method is unknown or of another verb, or its request is wrong; nothing was started.
        RunError: every method failed. Where only some did, the report's `warnings` say which and why.
    """
    processes.start()
    document = read(source)
    base = check(document)
    variants = [
        _seeded(variant, base.recipe.seed + n, seeds > 1) for variant in variants_of(base, names) for n in range(seeds)
    ]
    used = dict.fromkeys(role for variant in variants for role in variant.checked.used)
    data = replace(base, used=list(used)).encode()
    for variant in variants[::seeds]:
        look_ahead(variant.checked, {role: data[role] for role in variant.checked.used})
    root = Path(out) if out is not None else Path("runs") / f"{document.folder_name}-compared"
    needed = sum(disk_bytes(variant.checked) for variant in variants)
    folder = RunFolder(root)
    if processes.is_main():
        folder = RunFolder.claim(root, f"{document.name} (compared)", needed, [base.model, *base.references_read()])
    processes.wait()
    with folder.held(), folder.logged(), session.using(device=base.recipe.on, stack=base.recipe.stack):
        return _Comparison(base, variants, folder, data).go()


def variants_of(base: Checked, names: Sequence[str] = ()) -> list[Variant]:
    """The request of every method, checked.

    Raises:
        RequestError: there are no two methods of one verb, or a request is wrong.
    """
    if "after" in base.references.get(RETRAINED, {}):
        raise RequestError(f"The model {RETRAINED!r} must come from a folder: `{RETRAINED}: {{model: FOLDER}}`.")
    listed: list[Entry] = base.recipe.compare
    steps: list[Entry] = base.recipe.steps
    entries = [entry for name in names for entry in _entries(name, listed, steps)] if names else listed
    if len(entries) < 2:
        raise RequestError(
            "A comparison needs at least two methods: `--methods forget.ssd,forget.npo`, or a list `compare:` in the recipe."
        )
    found = [method.find(next(iter(entry))) for entry in entries]
    verbs = list(dict.fromkeys(one.verb for one in found))
    if len(verbs) > 1:
        raise RequestError(f"Methods are compared within one verb, but these are of {' and '.join(verbs)}.")
    place = next((n for n, entry in enumerate(steps) if method.find(next(iter(entry))).verb == verbs[0]), None)
    before, after = (steps[:place], steps[place + 1 :]) if place is not None else ([], steps)
    labels = _labels(entries, [one.name for one in found])
    folders = _folders(labels)
    if place is not None:
        base = _by_number(base, place)
    return [
        Variant(label, folder, len(before), with_steps(base, [*before, entry, *after]))
        for label, folder, entry in zip(labels, folders, entries, strict=True)
    ]


def _by_number(base: Checked, place: int) -> Checked:
    """The request in which a model `after` the step that is replaced is the one after whatever stands there."""
    step, number = base.steps[place], str(place + 1)

    def moved(reference: Any) -> Any:
        if isinstance(reference, list):
            return [moved(part) for part in reference]
        after = reference.get("after") if isinstance(reference, Mapping) else None
        return {**reference, "after": number} if after is not None and step.goes_by(str(after)) else reference

    references = {name: moved(one) for name, one in base.references.items()}
    recipe = base.recipe.model_copy(update={"materials": {k: moved(v) for k, v in base.recipe.materials.items()}})
    materials, document = replace(base.materials, references=references), replace(base.document, recipe=recipe)
    return replace(base, materials=materials, document=document)


def _entries(name: str, listed: Sequence[Entry], steps: Sequence[Entry]) -> list[Entry]:
    """How the recipe says that a method is to be run: as `compare:` has it, as a step has it, or with its defaults."""
    full = method.find(name).name

    def of_this_method(entries: Sequence[Entry]) -> list[Entry]:
        return [entry for entry in entries if method.find(next(iter(entry))).name == full]

    return of_this_method(listed) or of_this_method(steps)[:1] or [{full: {}}]


def _labels(entries: Sequence[Entry], names: Sequence[str]) -> list[str]:
    """The method's name; with its knobs where a method is named more than once."""
    labels: list[str] = []
    for entry, name in zip(entries, names, strict=True):
        (knobs,) = entry.values()
        said = ", ".join(f"{knob}={value}" for knob, value in knobs.items())
        label = f"{name} {said}".strip() if names.count(name) > 1 else name
        if label in labels:
            raise RequestError(f"The comparison names {label!r} twice with the same knobs.")
        labels.append(label)
    return labels


def _folders(labels: Sequence[str]) -> list[str]:
    """A folder's name for each: without what leads elsewhere, and apart also where case does not count."""
    names = [re.sub(r"[^\w.=,+-]+", "-", label).rstrip(".-")[:LONGEST] for label in labels]
    folded = [name.casefold() for name in names]
    alike = [folded.count(one) > 1 for one in folded]
    return [f"{name}-{n}" if same else name for n, (name, same) in enumerate(zip(names, alike, strict=True), 1)]


def _seeded(variant: Variant, seed: int, named: bool) -> Variant:
    recipe = variant.checked.recipe.model_copy(update={"seed": seed})
    checked = replace(variant.checked, document=replace(variant.checked.document, recipe=recipe))
    return replace(variant, folder=f"{variant.folder}-seed-{seed}" if named else variant.folder, checked=checked)


class _Comparison:
    """One walk through all variants."""

    def __init__(
        self, base: Checked, variants: Sequence[Variant], folder: RunFolder, data: Mapping[str, Examples]
    ) -> None:
        self.base, self.variants, self.folder, self.data = base, variants, folder, data

    def go(self) -> Run:
        """Every variant's run, the table and the page."""
        rows: dict[str, list[_Judged]] = {}
        anchored: dict[str, Any] = {}
        failed: list[tuple[str, OverhaulError]] = []
        walked: Runner | None = None
        for n, variant in enumerate(self.variants, 1):
            session.say(f"{variant.label}, {n} of {len(self.variants)}, seed {variant.checked.recipe.seed}")
            runner = Runner(variant.checked, self.folder, self.data, RunFolder(self.folder.root / variant.folder))
            runner.anchored = anchored
            try:
                stages, judged, _ = runner.walk()
            except OverhaulError as error:  # one method that cannot must not hide what the others did
                failed.append((variant.label, error))
                continue
            if not rows:
                rows["before"] = [_Judged("before", judged[0], stages[0], variant.checked.recipe.model)]
                if RETRAINED in self.base.references:
                    anchor = self.retrained(runner, stages)
                    judgement = runner.judge(anchor)
                    source = self.base.references[RETRAINED]["model"]
                    rows[RETRAINED] = [_Judged("retrained", judgement, anchor, source)]
            record = stages[variant.place + 1].record
            done = _Judged("method", judged[-1], stages[-1], f"{variant.folder}/model", record)
            rows.setdefault(variant.label, []).append(done)
            if "null control" not in rows and (noisy := self.null_control(stages, variant.place)):
                what = f"noise as large as {variant.label}'s change"
                rows["null control"] = [_Judged("null control", runner.judge(noisy), noisy, what)]
            walked = runner
        if walked is None:
            raise failed[0][1]
        rows = _timed(walked, rows)
        first = rows["before"][0].judgement["measures"]
        measures = [{k: v for k, v in one.items() if k not in ("value", "runs", "stderr")} for one in first]
        found = self.comparison(measures, rows, [f"{label} is missing: {error}" for label, error in failed])
        if processes.is_main():
            self.folder.tidy()
            found.write(self.folder.root)
        processes.wait()
        return Run(self.folder.root, found.to_json())

    def retrained(self, runner: Runner, stages: Sequence[Stage]) -> Stage:
        """The model that never saw what is to be forgotten."""
        known = model_of(self.base.references[RETRAINED])
        return Stage(RETRAINED, runner.reference_key(RETRAINED, list(stages)), known)

    def null_control(self, stages: Sequence[Stage], place: int) -> Stage | None:
        """The model before the step with noise as large as the step's change of each tensor; None if a shape changed."""
        before, after = stages[place], stages[place + 1]
        if not after.changed or before.facts.shapes != after.facts.shapes:
            return None
        key = key_of(after.key, "noise")
        target = self.folder.step(0, "null-control", key)
        if processes.is_main() and not target.exists():
            sizes = delta_norms(before.facts.folder, after.facts.folder).by_tensor
            stream([before.facts.folder], _noise(sizes, key), target, whole=True)
        processes.wait()
        return Stage("null control", key, models.facts(target))

    def comparison(
        self, measures: list[dict[str, Any]], found: Mapping[str, list[_Judged]], missing: list[str]
    ) -> Comparison:
        """A row for each model, its values aligned with `measures`, one a seed."""
        recipe, facts = self.base.recipe, self.base.model
        steps = {variant.label: variant.checked.recipe.steps[variant.place] for variant in self.variants}
        # the same roles are odd for every method that reads them
        odd = {warning.partition(": ")[2]: warning for v in self.variants for warning in v.checked.warnings}
        rows = [_row(label, runs, steps.get(label)) for label, runs in found.items()]
        start = found["before"][0].judgement
        about = {
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "overhaul": __version__,
            "machine": machine.describe(),
            "recipe": self.base.document.text,
            "model": {
                "source": recipe.model,
                "class": facts.architecture,
                "parameters": counted(start, facts),
            },
            "seeds": sorted({variant.checked.recipe.seed for variant in self.variants}),
            "warnings": [*odd.values(), *missing],
        }
        # what the methods are held against comes first
        return Comparison(self.base.document.name, measures, sorted(rows, key=lambda row: row.kind == "method"), about)


@dataclass(frozen=True)
class _Judged:
    """What was found of one model with one seed."""

    kind: Kind
    judgement: Mapping[str, Any]
    stage: Stage
    model: str
    record: Mapping[str, Any] | None = None


def _timed(runner: Runner, rows: Mapping[str, Sequence[_Judged]]) -> dict[str, list[_Judged]]:
    """The same with times: all models of the table take turns, whichever run made them."""
    runs = [run for each in rows.values() for run in each]
    said = iter(runner.timed([run.stage for run in runs], [run.judgement for run in runs]))
    return {label: [replace(run, judgement=next(said)) for run in each] for label, each in rows.items()}


def _row(label: str, runs: Sequence[_Judged], step: Entry | None) -> Row:
    """One row of all seeds."""
    records = [run.record for run in runs if run.record is not None]
    judged = [run.judgement["measures"] for run in runs]
    values, stderrs = ([[m[part] for m in each] for each in zip(*judged, strict=True)] for part in ("value", "stderr"))
    return Row(
        label,
        runs[0].kind,
        values,
        statistics.mean(record["seconds"] for record in records) if records else None,
        max(record["peak_bytes"] for record in records) if records else None,
        {"step": step, "models": [run.model for run in runs]},
        stderrs=stderrs if any(one is not None for each in stderrs for one in each) else [],
    )


def _noise(sizes: Mapping[str, float], seed: str) -> Any:
    """Gaussian noise whose expected norm is each tensor's in `sizes`; a tensor's own draw depends on its name alone."""

    def combine(tensor: TensorFacts, held: list[Tensor]) -> Tensor:
        (value,) = held
        size = sizes.get(tensor.name, 0.0)
        if not size:
            return value
        number = int(hashlib.sha256(f"{seed} {tensor.name}".encode()).hexdigest()[:12], 16)
        drawn = torch.randn(value.shape, generator=torch.Generator().manual_seed(number), dtype=value.dtype)
        return value + drawn * (size / value.numel() ** 0.5)

    return combine
