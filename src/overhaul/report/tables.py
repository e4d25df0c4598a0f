"""What a step found, beside what it did: its tables, heat maps and scatter plots, and the products that it left.

"tables": {title: {"columns": [...], "rows": [[...], ...], "drawn": "table" | "heat" | "points", "along", "across", "unit"}}
"made":   {name: {"kind": "rows", "path": "made/kept.jsonl", "count": 1204}}
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from overhaul.report import heat, numbers, plots

Table = Mapping[str, Any]
Step = Mapping[str, Any]

MOST_ROWS = 60
"""Of a table on the page: the rest is in report.json."""

SMALL_ROWS, SMALL_COLUMNS, SMALL_CELL = 12, 7, 60
"""What a terminal shows of a table at most: rows, columns, characters of a cell."""


@dataclass(frozen=True)
class Finding:
    """One table of one step, ready for a page.

    Attributes:
        step: the step's name.
        title: the table's.
        figure: its drawing; empty for a plain table.
        heads: the columns' names.
        rows: the cells as text, at most `MOST_ROWS`.
        numeric: which columns hold numbers, and stand to the right.
        left_out: how many rows are not shown.
    """

    step: str
    title: str
    figure: Markup
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    numeric: Sequence[bool]
    left_out: int


def told_apart(steps: Sequence[Step]) -> list[Step]:
    """The steps; those whose method runs more than once are named with their place: "inspect.depth_use, step 4"."""
    count = Counter(step["name"] for step in steps)
    return [
        {**step, "name": f"{step['name']}, step {place}"} if count[step["name"]] > 1 else step
        for place, step in enumerate(steps, start=1)
    ]


def findings(steps: Sequence[Step]) -> list[Finding]:
    """Everything that the steps tabulated, in their order."""
    return [_finding(step["name"], title, table) for step in steps for title, table in step.get("tables", {}).items()]


def _finding(step: str, title: str, table: Table) -> Finding:
    figure = _figure(step, title, table)
    columns, rows = table["columns"], table["rows"]
    numeric = [all(_is_number(row[n]) for row in rows) for n in range(len(columns))]
    shown = [] if figure else [texts(row, table["unit"]) for row in rows[:MOST_ROWS]]
    return Finding(step, title, figure, columns, shown, numeric, max(0, len(rows) - MOST_ROWS) if not figure else 0)


def _figure(step: str, title: str, table: Table) -> Markup:
    caption = f"{step}: {title}"
    if table["drawn"] == "heat":
        names, values = [str(row[0]) for row in table["rows"]], [row[1:] for row in table["rows"]]
        return heat.heat(caption, values, names, table["columns"][1:], table["along"], table["across"], table["unit"])
    if table["drawn"] == "points":
        _, x_name, y_name = table["columns"]
        points: dict[str, list[tuple[float | None, float | None]]] = {}
        for name, x, y in table["rows"]:
            points.setdefault(str(name), []).append((x, y))
        unit = f" ({table['unit']})" if table["unit"] else ""
        return plots.scatter(caption, points, x_name, y_name + unit)
    return Markup("")


def texts(row: Sequence[Any], unit: str) -> list[str]:
    """The cells of a row as a reader wants them."""
    return [_text(value, unit) for value in row]


def _text(value: Any, unit: str) -> str:
    if isinstance(value, float):
        return numbers.humanise(value, unit)
    return numbers.MISSING if value is None else numbers.plain(value)


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def small(table: Table) -> bool:
    """Whether a terminal has room for it."""
    fits = len(table["rows"]) <= SMALL_ROWS and len(table["columns"]) <= SMALL_COLUMNS
    short = all(len(str(cell)) <= SMALL_CELL for row in table["rows"] for cell in row)
    return fits and short and table["drawn"] in ("table", "points")


def products(steps: Sequence[Step]) -> list[tuple[str, str, str]]:
    """What the steps left: (step, "kept: 1,204 rows", where it lies)."""
    return [
        (step["name"], f"{name}: {_amount(one)}", str(one["path"]))
        for step in steps
        for name, one in step.get("made", {}).items()
    ]


def _amount(one: Mapping[str, Any]) -> str:
    count, kind = one.get("count"), str(one["kind"])
    return kind if count is None else f"{count:,} {kind}"
