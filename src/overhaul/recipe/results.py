"""What a step gave back, put into its folder: the model if there is one, its products, and the record for the report."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from overhaul import models, processes
from overhaul.errors import RunError, writing
from overhaul.outcome import Outcome, OutcomeError
from overhaul.recipe import products
from overhaul.recipe.check import Checked, Step
from overhaul.versions import libraries
from overhaul.weights import relative_change


def save(step: Step, before: models.Checkpoint, outcome: Outcome, partial: Path, checked: Checked) -> dict[str, Any]:
    """Save what a step gave back into `partial`; the step's record.

    Args:
        step: what was run.
        before: the model that it was given.
        outcome: what it returned. A folder among it lies at `partial / "model"` already.
        partial: the step's folder, not complete yet.
        checked: the request.

    Raises:
        RunError: a step that should change the model did not, or something cannot be saved.
    """
    touched: dict[int, float] = {}
    if outcome.model is not None:
        if isinstance(outcome.model, nn.Module):
            with writing(partial):
                models.save(outcome.model, checked.processor, partial / "model", dtype=checked.model.dtype)
        touched = check_effect(step, before, models.facts(partial / "model"), outcome.facts)
    elif step.method.changes != "nothing":
        raise RunError(f"Step {step.number}, {step.name}, changes {step.method.changes}, but returned no model.")
    return {
        "name": step.name,
        "summary": step.method.summary,
        "paper": step.method.paper,
        "version": step.method.version,
        "libraries": libraries(),
        "knobs": dict(step.knobs),
        "facts": outcome.facts,
        "layers": {**outcome.layers, **({"relative change of the weights": touched} if touched else {})},
        "curves": outcome.curves,
        "tables": {title: asdict(table) for title, table in outcome.tables.items()},
        "made": _keep(step, outcome, partial, checked.processor),
    }


def _keep(step: Step, outcome: Outcome, partial: Path, processor: Any) -> dict[str, Any]:
    """Keep what a step made beside the model; what the report says of it."""
    listed = {}
    for name, value in outcome.made.items():
        kind = step.method.makes[name]
        place = products.place_of(partial, name, kind)
        try:
            with writing(place):
                count = products.write(value, kind, place, processor)
        except RunError as error:
            raise RunError(f"Step {step.number}, {step.name}: {error}{_put_aside(partial)}") from error
        listed[name] = {"kind": kind, "path": str(place.relative_to(partial)), "count": count}
    return listed


def _put_aside(partial: Path) -> str:
    """Keep the model of a step whose products cannot be kept, and say where."""
    if not (partial / "model").exists():
        return ""
    kept = partial.with_name(f"{partial.name.strip('.').removesuffix('.partial')}.refused")
    shutil.rmtree(kept, ignore_errors=True)
    os.replace(partial / "model", kept)
    return f" The model that it made is kept in {kept}."


def check_effect(
    step: Step, before: models.Checkpoint, after: models.Checkpoint, found: Mapping[str, Any]
) -> dict[int, float]:
    """How much the weights of each depth changed; empty where the tensors are others or there are several stacks.

    Args:
        step: what was run.
        before: the model that it was given.
        after: the model that it made.
        found: its facts, which tell why where it changed nothing.

    Raises:
        RunError: a step that should change the model did not.
    """
    if before.shapes != after.shapes or before.is_new:
        return {}
    change = relative_change(before.folder, after.folder)
    rebuilt = step.method.changes == "architecture" and before.built != after.built
    if not rebuilt and not any(change.by_tensor.values()):
        raise RunError(
            f"Step {step.number}, {step.name}, changed nothing that {after.dtype} weights can hold. Its knobs were "
            f"{dict(step.knobs)}, and it measured {dict(found)}. If nothing there says "
            "why, a higher learning rate, more steps or a lower threshold would change something."
        )
    one_stack = len({stack for stack, _ in change.by_depth}) == 1
    return {depth: value for (_, depth), value in change.by_depth.items()} if one_stack else {}


def without_name(step: Step, error: Exception) -> str:
    """What a method said of itself, where its name stands before it in any case."""
    return str(error).removeprefix(f"{step.name}: ")


def refused(step: Step, error: OutcomeError, kept: Path, checked: Checked) -> RunError:
    """What is said of an outcome that cannot be reported; the model in it is not lost but kept at `kept`."""
    where = ""
    if processes.is_main() and isinstance(error.outcome.model, nn.Module):
        shutil.rmtree(kept, ignore_errors=True)
        models.save(error.outcome.model, checked.processor, kept, dtype=checked.model.dtype)
        where = f" The model that it made is kept in {kept}."
    return RunError(f"Step {step.number}, {step.name}: {error}{where}")


def notes(step: Step, record: Mapping[str, Any], place: Path) -> list[str]:
    """What a report notes of a step that was done: what the method advises, and what is odd about the record."""
    advice = record["facts"].get("advice")
    advised = [f"Step {step.number}, {step.name}: {advice}"] if advice else []
    return [*advised, *_done_with_others(step, record.get("libraries") or {}, place)]


def _done_with_others(step: Step, then: Mapping[str, str], place: Path) -> list[str]:
    """What to say of a step that was done before with other versions of libraries: it may come out otherwise today."""
    differing = [f"{name} {then[name]} (now {now})" for name, now in libraries().items() if then.get(name, now) != now]
    if not differing:
        return []
    return [
        f"Step {step.number}, {step.name}, was done with {', '.join(differing)} and is kept. To do it again, remove its "
        f"folder under {place}."
    ]


def aligned(judged: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The measures of a report: each with its values, and what is known of their spread, over all judged stages."""
    found: list[dict[str, Any]] = []
    for first, *others in zip(*(one["measures"] for one in judged), strict=True):
        each = [first, *others]
        common = {name: value for name, value in first.items() if name not in ("value", "runs", "stderr")}
        spread = {"runs": [one["runs"] for one in each]} if first["runs"] else {}
        if any(one["stderr"] is not None for one in each):
            spread["stderrs"] = [one["stderr"] for one in each]
        found.append({**common, "values": [one["value"] for one in each], **spread})
    return found


def counted(judged: Mapping[str, Any], facts: models.Checkpoint) -> int:
    """How many parameters a judged model has; its files may hold buffers besides."""
    found = (one["value"] for one in judged["measures"] if one["metric"] == "parameters")
    return next(found, facts.parameters)
