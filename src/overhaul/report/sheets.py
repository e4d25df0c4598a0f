"""A table ready to be shown, and its writers: Markdown and a terminal here, a page in sheet.html."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from overhaul.quoting import escaped

COLOURS: Mapping[bool | None, str] = {True: "green", False: "red", None: ""}


@dataclass(frozen=True)
class Cell:
    """What stands in a cell.

    Attributes:
        text: the value.
        small: beneath or behind it: a spread, a remark.
        help: what only a page has room for.
        good: whether it is what was wanted; None where there is nothing to judge.
        sign: of a verdict, which reads without colour.
        value: the exact number behind the text.
    """

    text: str
    small: str = ""
    good: bool | None = None
    sign: str = ""
    value: float | None = None
    help: str = ""


@dataclass(frozen=True)
class Sheet:
    """Rows and columns; the first column names the rows, the others stand to the right unless `words`.

    Attributes:
        heading: above the table.
        heads: the columns.
        rows: a cell for each column.
        words: whether the cells are words rather than numbers.
    """

    heading: str
    heads: Sequence[Cell]
    rows: Sequence[Sequence[Cell]]
    words: bool = False


def markdown(sheet: Sheet) -> str:
    """The table, without its heading."""
    mark = "---|" if sheet.words else "---:|"
    lines = [_line([Cell(head.text) for head in sheet.heads]), f"|---|{mark * (len(sheet.heads) - 1)}"]
    return "\n".join([*lines, *map(_line, sheet.rows)]) + "\n"


def _line(cells: Sequence[Cell]) -> str:
    return f"| {' | '.join(escaped(' '.join(filter(None, (cell.sign, cell.text, cell.small)))) for cell in cells)} |"


def print_sheet(sheet: Sheet, console: Console, most: int | None = None) -> None:
    """Print the table; of many columns the first `most` and the last one."""
    places = list(range(len(sheet.heads)))
    if most is not None and len(places) > most + 1:
        places = [*places[:most], places[-1]]
    table = Table(box=None, pad_edge=False, show_lines=False)
    for place in places:
        right = place > 0 and not sheet.words
        # Text, not markup: a label may contain brackets
        table.add_column(
            Text(sheet.heads[place].text), justify="right" if right else "left", vertical="bottom",
            max_width=13 if right else None,
        )  # fmt: skip
    for row in sheet.rows:
        table.add_row(*(Text(row[place].text, COLOURS[row[place].good]) for place in places))
    console.print(table)
