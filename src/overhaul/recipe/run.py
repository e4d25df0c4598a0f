"""`overhaul run`: run a recipe, go on with it where it stopped, or say again what a finished run found.

A run that is finished is known by its stored stamps, before anything heavy is imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from overhaul.recipe import finished
from overhaul.recipe.spec import read


@dataclass(frozen=True)
class Run:
    """A finished run: its folder and the report's numbers (the content of report.json)."""

    folder: Path
    report: dict[str, Any]


def run(source: str | Path | Mapping[str, Any], out: str | Path | None = None, *, device: str | None = None) -> Run:
    """Run a recipe, or go on with it where it stopped.

    Args:
        source: a recipe file, or the same as a mapping.
        out: the run folder; `runs/NAME` if None.
        device: in place of the recipe's.

    Raises:
        RequestError: the recipe, its data or the folder is wrong; nothing was started.
        RunError: a step failed; the steps before it are kept.
    """
    document = read(source)
    if device is not None:
        document = replace(document, recipe=document.recipe.model_copy(update={"device": device}))
    root = Path(out) if out is not None else Path("runs") / document.folder_name
    report = finished.found(root, document)
    if report is None:
        from overhaul.recipe.runner import start

        report = start(document, root)
    return Run(root, report)
