"""What a saved model says of its own making: lineage.json for machines, README.md for people."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from overhaul import __version__
from overhaul.checkpoints import Checkpoint
from overhaul.quoting import code, escaped
from overhaul.recipe.check import Checked
from overhaul.recipe.materials import model_of
from overhaul.recipe.store import Stage
from overhaul.report.sheets import markdown
from overhaul.report.stages import sheets
from overhaul.versions import libraries


def lineage(
    checked: Checked, stages: Sequence[Stage], digests: Mapping[str, str], report: Mapping[str, Any]
) -> dict[str, Any]:
    """Where a model comes from: source and its hash, every step with version, knobs, key and the hashes of its data."""
    return {
        "overhaul": __version__,
        "created": report["created"],
        "source": checked.recipe.model,
        "source_sha256": checked.model.digest(),
        "model_sha256": stages[-1].facts.digest(),
        "seed": checked.recipe.seed,
        "dtype": {"computed": checked.recipe.dtype, "stored": checked.model.dtype},
        "materials_sha256": dict(digests),
        "models": {
            name: {"source": source, "sha256": model_of(checked.references[name]).digest()}
            for name, source in read_beside(checked).items()
        },
        "steps": [
            {
                "name": step.name,
                "version": step.method.version,
                "libraries": (stage.record or {}).get("libraries"),
                "paper": step.method.paper,
                "knobs": dict(step.knobs),
                "reads": dict(step.reads),
                "key": stage.key,
            }
            for step, stage in zip(checked.steps, stages[1:], strict=True)
        ],
        "libraries": libraries(),
        "machine": report["machine"],
    }


def read_beside(checked: Checked) -> dict[str, str]:
    """The checkpoints that steps and the judge read beside the model: their names, and where they come from."""
    used = {name for step in checked.steps for role in step.reads for name in step.names(role)} | set(checked.anchors)
    start = f"{checked.document.base}/"
    return {
        name: reference["model"].removeprefix(start)
        for name, reference in checked.references.items()
        if "model" in reference and name in used
    }


def history(folder: Path) -> dict[str, Any] | None:
    """What the model in `folder` says of its own making; None if it says nothing."""
    path = folder / "lineage.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def model_card(checked: Checked, report: Mapping[str, Any], result: Checkpoint) -> str:
    """The README.md of a saved model: what was done to it, and what it measured before and after.

    What it quotes, a title or a source, is text: it means nothing to Markdown, to HTML or to the front matter.
    """
    source = checked.recipe.model
    front: dict[str, Any] = {"library_name": "transformers", "tags": ["overhaul"]}
    if source.count("/") == 1 and not source.startswith((".", "/")):
        front["base_model"] = source
    lines = ["---", yaml.safe_dump(front, sort_keys=False).strip(), "---", "", f"# {escaped(report['title'])}", ""]
    made = f"{code(source)} ({escaped(report['model']['class'])})"
    lines += [f"Made from {made} by Overhaul {__version__}, seed {report['seed']}.", ""]
    others = [f"- {code(name)}: {code(source)}" for name, source in read_beside(checked).items()]
    if others:
        lines += ["Read beside it:", "", *others, ""]
    lines += [_loads(result), "", "## What was done", ""]
    for step in report["steps"]:
        paper = f" ([arXiv:{step['paper']}](https://arxiv.org/abs/{step['paper']}))" if step["paper"] else ""
        knobs = ", ".join(code(f"{name}={value}") for name, value in step["knobs"].items())
        lines.append(f"1. {code(step['name'])}{paper}: {escaped(step['summary'])} Knobs: {knobs}.")
    lines += ["", "## What it measured", ""]
    for sheet in sheets(report):
        lines += [f"### {escaped(sheet.heading)}", "", markdown(sheet)]
    lines += ["The recipe is in `recipe.yaml`, hashes of everything that went in are in `lineage.json`.", ""]
    return "\n".join(lines)


def _loads(result: Checkpoint) -> str:
    """How a saved model is opened: what was built onto its class needs the code that built it."""
    built = result.config.get("overhaul")
    if not isinstance(built, Mapping) or "conversions" not in built:
        return "It loads with `from_pretrained`; nothing else is needed."
    names = ", ".join(f"`{one['name']}`" for one in built["conversions"])
    return (
        f"It is no plain {built.get('class')}: {names} is recorded in its config. It loads with `overhaul.open`, or with "
        "`from_pretrained` after `import overhaul`; without Overhaul it is refused."
    )
