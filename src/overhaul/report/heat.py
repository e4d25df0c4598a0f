"""A heat map as inline SVG: one cell for each value, names along both sides, a colour bar with its unit.

Values of one sign run from the page's colour to one hue; of both signs from one hue through the page's colour, which is 0,
to another, equally far to both sides. A value that does not exist is grey and struck through.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from overhaul.report.numbers import finite, humanise
from overhaul.report.plots import WIDTH, clipped, drawing

WIDE = 2 * WIDTH
"""Of a map with more than `MANY` columns: it takes a whole line of the page."""

MANY = 24
LETTER = 6.1
LONGEST_NAME = 22
CELL = 22.0
BAR = 62
MOST = 128
"""Rows or columns that are drawn one by one; beyond them, means of neighbours are."""

Grid = Sequence[Sequence[float | None]]


def heat(
    title: str, values: Grid, rows: Sequence[Any], columns: Sequence[Any], along: str, across: str, unit: str
) -> Markup:
    """A figure with a cell for each value; empty if no value is finite.

    Args:
        title: what the caption says.
        values: by row, then by column; None (or what is not finite) does not exist.
        rows: the rows' names.
        columns: the columns' names.
        along: what the rows are.
        across: what the columns are.
        unit: of the values; "" is a plain number.
    """
    known = [value for line in values for value in line if finite(value)]
    if not known:
        return Markup("")
    by_rows, by_columns = (math.ceil(len(names) / MOST) or 1 for names in (rows, columns))
    values = _means(values, by_rows, by_columns)
    row_names, column_names = _named(rows, by_rows), _named(columns, by_columns)
    width = WIDE if len(column_names) > MANY else WIDTH
    left = 10 + LETTER * max(map(len, row_names))
    cell = min((width - left - BAR) / len(column_names), 3 * CELL)
    height = min(CELL, max(6.0, 300 / len(row_names)))
    shade = _Shade(min(known), max(known))
    top, base = 20.0, 20.0 + height * len(row_names)
    parts = [_cells(values, row_names, column_names, shade, unit, (left, top), (cell, height))]
    parts += _side(row_names, left, top, height)
    feet, depth = _feet(column_names, left, base, cell)
    parts += feet
    middle = left + cell * len(column_names) / 2
    parts.append(Markup('<text class="name" x="0" y="11">{}</text>').format(clipped(along)))
    parts.append(
        Markup('<text class="name" x="{:.1f}" y="{:.1f}" text-anchor="middle">{}</text>').format(
            middle, base + depth + 13, across
        )
    )
    parts.append(_bar(shade, unit, left + cell * len(column_names) + 14, top, max(60.0, base - top), width))
    note = f"each cell is the mean of up to {by_rows} × {by_columns} values" if by_rows * by_columns > 1 else ""
    missing = sum(not finite(value) for line in values for value in line)
    note = "; ".join(part for part in (note, "grey: no value" if missing else "") if part)
    ends = " to ".join(humanise(end(known), unit) for end in (min, max))
    said = f"{len(row_names)} by {len(column_names)} values from {ends}"
    size = (width, max(base + depth + 20, top + 84))
    return drawing(title, parts, said, [], note, size, "wide" if width == WIDE else "")


class _Shade:
    """The class and opacity of a value's colour."""

    def __init__(self, low: float, high: float) -> None:
        self.both = low < 0 < high
        size = max(abs(low), abs(high))
        self.low, self.high = (-size, size) if self.both else (low, high)

    def __call__(self, value: float) -> tuple[str, float]:
        if self.both:
            return ("warm" if value < 0 else "cold"), abs(value) / self.high
        spread = self.high - self.low
        # the least value still shows that there is one
        return "cold", 0.06 + 0.94 * ((value - self.low) / spread if spread else 1.0)


def _cells(
    values: Grid, rows: Sequence[str], columns: Sequence[str], shade: _Shade, unit: str,
    corner: tuple[float, float], size: tuple[float, float],
) -> Markup:  # fmt: skip
    parts: list[Markup] = []
    for i, line in enumerate(values):
        for j, value in enumerate(line):
            x, y = corner[0] + j * size[0], corner[1] + i * size[1]
            box = Markup('x="{:.1f}" y="{:.1f}" width="{:.2f}" height="{:.2f}"').format(x, y, *size)
            where = f"{rows[i]}, {columns[j]}"
            if finite(value):
                hue, opacity = shade(value)
                parts.append(
                    Markup('<rect class="{}" fill-opacity="{:.3f}" {}><title>{}: {}</title></rect>').format(
                        hue, opacity, box, where, humanise(value, unit)
                    )
                )
            else:
                parts.append(Markup('<rect class="missing" {}><title>{}: no value</title></rect>').format(box, where))
                parts.append(
                    Markup('<line class="struck" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>').format(
                        x, y + size[1], x + size[0], y
                    )
                )
    return Markup("").join(parts)


def _side(names: Sequence[str], left: float, top: float, height: float) -> list[Markup]:
    """Names of rows, as many as do not touch."""
    every = math.ceil(12 / height)
    return [
        Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="end">{}</text>').format(
            left - 5, top + (i + 0.5) * height + 4, name
        )
        for i, name in enumerate(names)
        if i % every == 0
    ]


def _feet(names: Sequence[str], left: float, base: float, cell: float) -> tuple[list[Markup], float]:
    """Names of columns and how deep they hang: level where they fit, else slanted."""
    longest = LETTER * max(map(len, names))
    every = math.ceil((longest + 6) / cell)
    slanted = every > 1 and longest > 3 * LETTER
    if slanted:
        every = math.ceil(12 / cell)
    parts: list[Markup] = []
    for j, name in enumerate(names):
        if j % every:
            continue
        x, y = left + (j + 0.5) * cell, base + (10 if slanted else 14)
        how = Markup('text-anchor="middle"')
        if slanted:
            how = Markup('text-anchor="end" transform="rotate(-50 {:.1f} {:.1f})"').format(x, y)
        parts.append(Markup('<text x="{:.1f}" y="{:.1f}" {}>{}</text>').format(x + 3 * slanted, y, how, name))
    return parts, 16 + 0.78 * longest if slanted else 18.0


def _bar(shade: _Shade, unit: str, x: float, top: float, height: float, right: float) -> Markup:
    """The colours from the highest value down to the lowest, with the unit above."""
    steps, height = 32, min(height, 220.0)
    parts = [
        Markup('<text class="name" x="{:.1f}" y="11" text-anchor="end">{}</text>').format(right, clipped(unit, 30))
    ]
    for n in range(steps):
        hue, opacity = shade(shade.high - (n + 0.5) / steps * (shade.high - shade.low))
        parts.append(
            Markup('<rect class="{}" fill-opacity="{:.3f}" x="{:.1f}" y="{:.2f}" width="9" height="{:.2f}"/>').format(
                hue, opacity, x, top + n * height / steps, height / steps
            )
        )
    for share in (0.0, 0.5, 1.0):
        value = shade.high - share * (shade.high - shade.low)
        parts.append(
            Markup('<text x="{:.1f}" y="{:.1f}">{}</text>').format(
                x + 13, top + share * height + (8 if share == 0 else 4 if share == 0.5 else 0), humanise(value, unit)
            )
        )
    return Markup("").join(parts)


def _means(values: Grid, by_rows: int, by_columns: int) -> list[list[float | None]]:
    """Means of the values that exist in blocks of so many rows and columns."""
    coarse: list[list[float | None]] = []
    for i in range(0, len(values), by_rows):
        line: list[float | None] = []
        for j in range(0, len(values[0]), by_columns):
            block = [v for row in values[i : i + by_rows] for v in row[j : j + by_columns] if finite(v)]
            line.append(math.fsum(block) / len(block) if block else None)
        coarse.append(line)
    return coarse


def _named(names: Sequence[Any], every: int) -> list[str]:
    return [clipped(str(name), LONGEST_NAME) for name in names[::every]]
