"""`track: trackio` (or wandb): a run's curves and measures in an experiment tracker, once the run is done."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from typing import Any

from overhaul.errors import RequestError, RunError

LONGEST = 128
"""Characters that a run's name may have there."""


def tracker(name: str) -> Any:
    """The tracker's module; both have `init`, `log` and `finish`.

    Raises:
        RequestError: it is not installed, or breaks when it is imported.
    """
    try:
        return importlib.import_module(name)
    except Exception as error:  # a broken installation raises whatever it comes across
        extra = "the extra `overhaul[track]` has it" if name == "trackio" else "install it beside Overhaul"
        raise RequestError(
            f"`track: {name}` needs the package {name}, which cannot be imported ({error}); {extra}."
        ) from None


def track(name: str, report: Mapping[str, Any]) -> None:
    """Log a finished run: every curve point by point, then what was measured of every stage.

    Args:
        name: of the tracker.
        report: the content of report.json; its title is the run, its recipe the run's configuration.

    Raises:
        RunError: the tracker refused; the run itself is done and kept.
    """
    module = tracker(name)
    config = {key: report[key] for key in ("recipe", "seed", "model", "overhaul")}
    try:
        module.init(project="overhaul", name=report["title"][:LONGEST], config=config)
        try:
            for values in logged(report):
                module.log(values)
        finally:
            module.finish()
    except Exception as error:  # trackers raise whatever their services say
        said = " ".join(str(error).split())
        raise RunError(
            f"The run is done and kept, but `track: {name}` could not be told of it: {type(error).__name__}: {said}. The "
            "same command tells it again, and does nothing else; without `track:` it is not told."
        ) from error


def logged(report: Mapping[str, Any]) -> Iterator[dict[str, float]]:
    """What is logged at once, in order: the curves of a step side by side, the measures of a stage together."""
    for n, step in enumerate(report["steps"], 1):
        curves = {f"{n} {step['name']}/{curve}": values for curve, values in step["curves"].items()}
        for place in range(max(map(len, curves.values()), default=0)):
            yield {curve: values[place] for curve, values in curves.items() if place < len(values)}
    for place in range(len(report["stages"])):
        found = {f"{m['group']}/{m['metric']} on {m['on']}": m["values"][place] for m in report["measures"]}
        yield {"stage": float(place), **{label: value for label, value in found.items() if value is not None}}
