"""A comparison of methods: one table and one scatter, as a page, in the terminal and as Markdown.

A cell is the mean over seeds. Its colour is the verdict that a report gives a change from the model before to this one.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup
from rich.console import Console
from rich.table import Table
from rich.text import Text

from overhaul.recipe.store import write_text
from overhaul.report import numbers, plots
from overhaul.report.html import draw
from overhaul.report.terminal import COLOURS

Report = Mapping[str, Any]
"""The content of comparison.json."""

ARROWS: Mapping[str, str] = {"up": "↑", "down": "↓", "same": "=", "chance": "→ 0.5", "anchor": "→ retrained"}


@dataclass(frozen=True)
class Cell:
    """One model's value of one measure as a reader sees it: the mean, the deviation over seeds, the verdict."""

    text: str
    spread: str
    good: bool | None


@dataclass(frozen=True)
class Column:
    """One measure: what it is, and the cell of every model by its label."""

    measure: dict[str, Any]
    cells: dict[str, Cell]

    @property
    def heading(self) -> str:
        """Label, role and the wanted direction: "probability of the answer on forget ↓"."""
        wanted = self.measure["better"] if self.measure["group"] == "cost" else self.measure["wanted"]
        return f"{numbers.subject(self.measure)} {ARROWS.get(wanted, wanted)}"


def columns(report: Report) -> list[Column]:
    """The table by measures."""
    first = report["rows"][0]
    found: list[Column] = []
    for n, measure in enumerate(report["measures"]):
        before = _mean(first["values"][n])
        cells = {
            row["label"]: _cell(measure, before, row["values"][n], row is first or row["label"] == "retrained")
            for row in report["rows"]
        }
        found.append(Column(measure, cells))
    return found


def _cell(measure: Mapping[str, Any], before: float | None, values: Sequence[float | None], is_anchor: bool) -> Cell:
    mean, known = _mean(values), [value for value in values if numbers.finite(value)]
    spread = numbers.humanise(statistics.stdev(known), measure["unit"]) if len(known) > 1 else ""
    good = None if is_anchor else numbers.verdict({**measure, "values": [before, mean]}).good
    return Cell(numbers.humanise(mean, measure["unit"]), spread, good)


def _mean(values: Sequence[float | None]) -> float | None:
    """None where a value is missing; not finite where one is not."""
    if any(value is None for value in values):
        return None
    return math.fsum(value for value in values if value is not None) / len(values)


def write_comparison(report: Report, path: Path) -> None:
    """Draw `report` as one self-contained page at `path`.

    Raises:
        RunError: the place cannot be written.
    """
    groups: dict[str, list[Column]] = {}
    for column in columns(report):
        groups.setdefault(column.measure["group"], []).append(column)
    runs = len(report["seeds"])
    note = f"Means over {runs} seeds, ± their standard deviation." if runs > 1 else "One seed."
    page = draw(
        "comparison.html",
        report,
        groups=groups,
        last_group=list(groups)[-1] if groups else "",
        spread_note=note,
        figure=scatter(report),
    )
    write_text(path, page)


def scatter(report: Report) -> Markup:
    """What was to change against what was to stay: the first measure of each group; empty where one is missing."""
    measures = report["measures"]

    def first(*groups: str) -> int | None:
        return next((n for group in groups for n, one in enumerate(measures) if one["group"] == group), None)

    x, y = first("forgotten", "learned", "cost"), first("kept")
    if x is None or y is None:
        return Markup("")
    points = {row["label"]: list(zip(row["values"][x], row["values"][y], strict=True)) for row in report["rows"]}
    names = [numbers.subject(measures[n]) for n in (x, y)]
    return plots.scatter(f"{names[1]}, against {names[0]}", points, *names)


def print_comparison(report: Report, console: Console, most: int = 7) -> None:
    """Print the table: a row for each model, and as many judged measures as fit; the others are on the page."""
    judged = [column for column in columns(report) if column.measure["group"] != "cost"]
    table = Table("model", box=None, pad_edge=False, show_lines=False)
    for column in judged[:most]:
        table.add_column(Text(column.heading), justify="right", vertical="bottom", max_width=13)
    table.add_column("time", justify="right", vertical="bottom")
    for row in report["rows"]:
        cells = [column.cells[row["label"]] for column in judged[:most]]
        texts = [Text(cell.text, COLOURS[cell.good]) for cell in cells]
        seconds = numbers.MISSING if row["seconds"] is None else numbers.duration(row["seconds"])
        table.add_row(Text(row["label"]), *texts, seconds)
    console.print(table)
    if len(judged) > most:
        console.print(f"{len(judged) - most} more measures are on the page.")
    for warning in report["warnings"]:
        console.print(Text(f"Note: {warning}", "yellow"))


def markdown(report: Report) -> str:
    """The judged measures as a Markdown table: mean ± standard deviation over seeds."""
    judged = [column for column in columns(report) if column.measure["group"] != "cost"]
    lines = [
        f"| model | {' | '.join(column.heading for column in judged)} | time |",
        f"|---|{'---:|' * (len(judged) + 1)}",
    ]
    for row in report["rows"]:
        cells = [column.cells[row["label"]] for column in judged]
        texts = [f"{cell.text} ± {cell.spread}" if cell.spread else cell.text for cell in cells]
        seconds = numbers.MISSING if row["seconds"] is None else numbers.duration(row["seconds"])
        lines.append(f"| {row['label']} | {' | '.join(texts)} | {seconds} |")
    return "\n".join(lines) + "\n"
