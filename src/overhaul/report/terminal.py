"""The before/after table for a terminal: readable at 100 columns, and without colour or Unicode."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from overhaul.report import sentences, stages, tables
from overhaul.report.sheets import COLOURS

STAGE_WIDTH, OTHER_WIDTH = 9, 62
LONGEST_WORD = 14
PLAIN = str.maketrans({"✓": "+", "✗": "!", "○": "o", "−": "-", "–": "-", "×": "x", "→": ">", "±": "+-"})


def print_table(report: dict[str, Any], console: Console) -> None:
    """Print the measures before and after, by group, and one sentence on each group.

    Stages that do not fit the width are left out from the middle, which is said; the first and the last always stand.
    """
    shown = _stages_that_fit(report["stages"], console.width)

    def text(words: str, style: str = "") -> Text:
        if console.options.ascii_only:
            words = words.translate(PLAIN).encode("ascii", "replace").decode()
        # Text, not markup: a label or a stage may contain brackets
        return Text(words, style, overflow="fold")

    found = stages.sheets(report, shown)
    table = Table(
        box=box.ASCII if console.options.ascii_only else box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0)
    )
    for place, head in enumerate(found[0].heads if found else ()):
        name = "" if head.text == "measure" else _broken(head.text)
        width = max(STAGE_WIDTH - 1, _widest(name)) if 1 < place < 2 + len(shown) else None
        left = head.text in ("measure", "verdict")
        table.add_column(text(name), justify="left" if left else "right", max_width=width)
    for sheet in found:
        table.add_row(text(sheet.heading, "bold"))
        for row in sheet.rows:
            cells = [text(f"{cell.sign} {cell.text}".strip(), COLOURS[cell.good]) for cell in row[1:]]
            table.add_row(Padding(text(row[0].text), (0, 0, 0, 2)), *cells)
    console.print(table)
    left_out = [stage for place, stage in enumerate(report["stages"]) if place not in shown]
    if left_out:
        console.print(text(f"Left out here for width: {', '.join(left_out)}.\n", "dim"))
    for said in sentences.group_verdicts(report["measures"]):
        console.print(
            Text.assemble(
                text(f"{said.overall.sign} {said.heading}. ", f"bold {COLOURS[said.overall.good]}"), text(said.sentence)
            )
        )
    _print_findings(tables.told_apart(report["steps"]), console, text)
    for warning in report["warnings"]:
        console.print(text(f"Note: {warning}", "yellow"))


def _print_findings(steps: Sequence[Mapping[str, Any]], console: Console, text: Callable[..., Text]) -> None:
    """Facts and small tables of the steps, how many more there are on the page, and what the steps left."""
    larger = 0
    for step in steps:
        known = {name: value for name, value in step.get("facts", {}).items() if name != "advice"}  # it is a note
        plain = {name: value for name, value in known.items() if isinstance(value, int | float | str)}
        if plain:
            shown = zip(plain, tables.texts(tuple(plain.values()), ""), strict=True)
            said = "; ".join(f"{name.replace('_', ' ')} {value}" for name, value in shown)
            console.print(text(f"\n{step['name']}: {said}", "dim"))
        for title, one in step.get("tables", {}).items():
            if not tables.small(one):
                larger += 1
                continue
            numeric = [all(not isinstance(row[n], str) for row in one["rows"]) for n in range(len(one["columns"]))]
            table = Table(box=box.ASCII if console.options.ascii_only else None, pad_edge=False)
            for name, is_number in zip(one["columns"], numeric, strict=True):
                table.add_column(text(str(name)), justify="right" if is_number else "left")
            for row in one["rows"]:
                table.add_row(*map(text, tables.texts(row, one["unit"])))
            console.print(text(f"\n{step['name']}: {title}", "bold"))
            console.print(table)
    if larger:
        console.print(
            text(f"{larger} {'table or figure is' if larger == 1 else 'tables and figures are'} on the page.", "dim")
        )
    for step, what, path in tables.products(steps):
        console.print(text(f"{step} left {what} ({path})"))


def _broken(stage: str) -> str:
    """A stage's name over several lines, so that its column is hardly wider than its numbers."""
    return stage.replace(".", ".\n").replace("_", "_\n")


def _widest(broken: str) -> int:
    """The longest of the lines, up to a width that a table can bear."""
    return min(LONGEST_WORD, max(map(len, broken.split("\n"))))


def _stages_that_fit(stages: Sequence[str], width: int) -> Sequence[int]:
    """Places of the stages to show: the first, and as many of the last as there is room for."""
    widths = [1 + max(STAGE_WIDTH - 1, _widest(_broken(stage))) for stage in stages]
    room, shown = width - OTHER_WIDTH - widths[0], [0]
    for place in range(len(stages) - 1, 0, -1):
        room -= widths[place]
        if room < 0 and len(shown) > 1:
            break
        shown.insert(1, place)
    return shown
