"""A run's own table: its stages side by side, and what became of each measure from the first to the last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from overhaul.report import numbers
from overhaul.report.sheets import Cell, Sheet


def sheets(report: Mapping[str, Any], places: Sequence[int] | None = None) -> list[Sheet]:
    """One table for each group of measures, all with the same columns.

    Args:
        report: the content of report.json.
        places: of the stages to be shown; all if None.
    """
    stages = report["stages"]
    places = range(len(stages)) if places is None else places
    heads = [Cell("measure"), Cell("n"), *(Cell(stages[place]) for place in places)]
    if len(stages) > 1:
        heads += [Cell("change"), Cell("verdict")]
    return [
        Sheet(numbers.heading(group), heads, [_row(row, places) for row in rows])
        for group, rows in numbers.by_group(report["measures"]).items()
    ]


def _row(measure: numbers.Measure, places: Sequence[int]) -> list[Cell]:
    unit, values = measure["unit"], [measure["values"][place] for place in places]
    cells = [
        Cell(numbers.subject(measure), help=numbers.small_print(measure, counted=False)),
        Cell(numbers.count(measure)),
    ]
    spreads = [numbers.spread(measure, place) for place in places]
    cells += [Cell(numbers.humanise(v, unit), spread, value=v) for v, spread in zip(values, spreads, strict=True)]
    if len(measure["values"]) < 2:
        return cells
    seen, near = numbers.verdict(measure), measure["wanted"] == "anchor" and numbers.finite(measure.get("anchor"))
    aim = f" ({numbers.humanise(measure['anchor'], unit)})" if near else ""
    return [
        *cells,
        Cell(numbers.change(measure), good=seen.good),
        Cell(f"{seen.word}{aim}", good=seen.good, sign=seen.sign),
    ]
