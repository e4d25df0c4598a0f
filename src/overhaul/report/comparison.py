"""Models by measures, side by side: one object, and one writer each for a page, Markdown, JSON and the terminal.

A cell is the mean over seeds. Its colour is the verdict that a report gives a change from the model before to this one. Null
controls, baselines and retrained models are rows like any other, which say what they are.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from markupsafe import Markup
from rich.console import Console
from rich.text import Text

from overhaul import __version__
from overhaul.files import write_json, write_text
from overhaul.report import numbers, plots
from overhaul.report.html import draw
from overhaul.report.sheets import Cell, Sheet, markdown, print_sheet

Kind = Literal["before", "retrained", "null control", "method"]
Number = float | None
ARROWS: Mapping[str, str] = {"up": "↑", "down": "↓", "same": "=", "chance": "→ 0.5"}

NOTHING: Mapping[str, Any] = {"created": "", "machine": {}, "recipe": "", "model": None, "seeds": [], "warnings": []}
"""What a page says of a comparison that does not know it."""

WIDE = 8
"""Judged measures that share one table; of more, every group has its own."""


@dataclass(frozen=True)
class Row:
    """One model.

    Attributes:
        label: its name.
        kind: what it is to the others.
        values: for every measure one value a seed; None where it was not measured.
        seconds: that making it took, a mean over seeds.
        peak_bytes: the largest over seeds.
        facts: what else is known of it, plain JSON.
        samples: measure -> one value per example, where they are kept.
        stderrs: like `values`, the standard error of each; empty where none is known.
    """

    label: str
    kind: Kind
    values: list[list[Number]]
    seconds: float | None = None
    peak_bytes: float | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    samples: dict[str, list[Number]] = field(default_factory=dict)
    stderrs: list[list[Number]] = field(default_factory=list)

    def error(self, place: int) -> Number:
        """The standard error of a measure, a mean over seeds; None where it is not known."""
        return mean(self.stderrs[place]) if self.stderrs else None


@dataclass(frozen=True)
class Comparison:
    """All rows and what was measured.

    Attributes:
        title: above the tables.
        measures: as in a report: group, metric, label, help, on, unit, better, wanted, n; what is `aside` is in the JSON
            file alone.
        rows: the models.
        facts: what a page says besides: created, machine, recipe, model, seeds, warnings, settings.
    """

    title: str
    measures: list[dict[str, Any]]
    rows: list[Row]
    facts: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, label: str) -> Row:
        return next(row for row in self.rows if row.label == label)

    def of_kind(self, kind: Kind) -> Row | None:
        """The first row of a kind."""
        return next((row for row in self.rows if row.kind == kind), None)

    def place(self, metric: str, on: str | None = None) -> int:
        """Where a measure stands in `measures`."""
        return next(n for n, one in enumerate(self.measures) if one["metric"] == metric and on in (None, one["on"]))

    def ranked(self, metric: str, on: str | None = None) -> list[str]:
        """The methods and null controls from best to worst in one measure; what was not measured comes last."""
        place = self.place(metric, on)
        measure, anchor = self.measures[place], self._anchor(place)

        def badness(row: Row) -> float:
            value = mean(row.values[place])
            if not numbers.finite(value):
                return math.inf
            aims = {"up": -value, "down": value, "chance": abs(value - numbers.CHANCE)}
            if measure["wanted"] == "anchor" and anchor is not None:
                return abs(value - anchor)
            return aims.get(measure["wanted"], aims[measure["better"]])  # what is to stay: the less it lost, the better

        return [row.label for row in sorted(self.rows, key=badness) if row.kind in ("method", "null control")]

    def _anchor(self, place: int) -> Number:
        retrained = self.of_kind("retrained")
        return mean(retrained.values[place]) if retrained is not None else self.measures[place].get("anchor")

    def cell(self, row: Row, place: int) -> Cell:
        """A model's value of one measure as a reader sees it: the mean, the deviation over seeds, the verdict."""
        measure, found = self.measures[place], mean(row.values[place])
        seeds, error = _deviation(row.values[place]), row.error(place)
        seeded = sum(map(numbers.finite, row.values[place])) > 1
        apart = seeds if seeded else error
        spread = f"± {numbers.humanise(apart, measure['unit'])}" if apart is not None else ""
        text, before = numbers.humanise(found, measure["unit"]), self.of_kind("before")
        if row.kind in ("before", "retrained") or before is None or found is None:
            return Cell(text, spread)
        if measure["wanted"] == "anchor" and self._anchor(place) is None:
            return Cell(text, spread)
        change = {**measure, "values": [mean(before.values[place]), found], "anchor": self._anchor(place)}
        change["stderrs"] = [before.error(place), error]
        change["same_work"] = all(
            mean(before.values[n]) == mean(row.values[n])
            for n, one in enumerate(self.measures)
            if one["group"] == "cost" and not numbers.is_time(one)
        )
        return Cell(text, spread, numbers.verdict(change).good)

    def sheets(self, judged_only: bool = False) -> list[Sheet]:
        """The tables to be shown: all measures in one where they fit, else one for each group; costs have their own.

        Args:
            judged_only: leave the costs out, but for the time.
        """
        groups: dict[str, list[int]] = {}
        for place, measure in enumerate(self.measures):
            if not measure.get("aside"):
                groups.setdefault(measure["group"], []).append(place)
        costs = groups.pop("cost", [])
        judged = [place for places in groups.values() for place in places]
        if judged_only and len(judged) <= WIDE:
            return [self._sheet("", judged, costs=["time"])] if judged else []
        found = [self._sheet(numbers.heading(group), places) for group, places in groups.items()]
        if not judged_only and (costs or any(row.seconds is not None for row in self.rows)):
            found.append(self._sheet(numbers.heading("cost"), costs, costs=["time", "peak memory"]))
        return found

    def _sheet(self, heading: str, places: Sequence[int], costs: Sequence[str] = ()) -> Sheet:
        heads = [
            Cell("model"),
            *(Cell(arrowed(self.measures[n]), help=numbers.small_print(self.measures[n])) for n in places),
        ]
        rows = []
        for row in self.rows:
            said = {
                "time": numbers.MISSING if row.seconds is None else numbers.duration(row.seconds),
                "peak memory": numbers.humanise(row.peak_bytes, "bytes"),
            }
            named = Cell(row.label, "" if row.kind in ("method", row.label) else f"({row.kind})")
            rows.append([named, *(self.cell(row, n) for n in places), *(Cell(said[cost]) for cost in costs)])
        return Sheet(heading, [*heads, *map(Cell, costs)], rows)

    def by_seed(self, name: str, place: int = 0) -> Sheet:
        """One measure with a column for each seed."""
        count = max(len(row.values[place]) for row in self.rows)
        unit = self.measures[place]["unit"]
        rows = [
            [Cell(row.label), *(Cell(numbers.humanise(value, unit)) for value in row.values[place])]
            for row in self.rows
        ]
        return Sheet("", [Cell(name), *(Cell(f"seed {seed}") for seed in range(count))], rows)

    def to_markdown(self) -> str:
        """The judged measures: mean ± standard deviation over seeds; a table for each group where there are many."""
        return "\n".join(
            f"**{sheet.heading}**\n\n{markdown(sheet)}" if sheet.heading else markdown(sheet)
            for sheet in self.sheets(judged_only=True)
        )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; values per example are left out, `write` keeps them beside it."""
        rows = [{name: part for name, part in asdict(row).items() if name != "samples"} for row in self.rows]
        return _plain({**self.facts, "title": self.title, "measures": self.measures, "rows": rows})

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Comparison:
        """What `to_json` gave."""
        facts = {name: part for name, part in content.items() if name not in ("title", "measures", "rows")}
        rows = [Row(**row) for row in content["rows"]]
        like = {"like": next((row.label for row in rows if row.kind == "retrained"), "")}
        return cls(content["title"], [{**like, **one} for one in content["measures"]], rows, facts)

    def to_html(self) -> str:
        """A self-contained page."""
        runs = max((len(values) for row in self.rows for values in row.values), default=1)
        note = f"Means over {runs} seeds, ± their standard deviation." if runs > 1 else "One seed."
        said = {**NOTHING, "overhaul": __version__, **self.to_json()}
        return draw(
            "comparison.html", said, sheets=self.sheets(), spread_note=note, figure=self.scatter(), won=self.won()
        )

    def scatter(self) -> Markup:
        """What was to change against what was to stay: the first measure of each group; empty where one is missing."""

        def first(*groups: str) -> int | None:
            return next((n for group in groups for n, one in enumerate(self.measures) if one["group"] == group), None)

        x, y = first("forgotten", "learned", "cost"), first("kept")
        if x is None or y is None:
            return Markup("")
        points = {row.label: list(zip(row.values[x], row.values[y], strict=True)) for row in self.rows}
        names = [numbers.subject(self.measures[n]) for n in (x, y)]
        spans = [plots.SPANS.get(self.measures[n]["unit"]) for n in (x, y)]
        return plots.scatter(f"{names[1]}, against {names[0]}", points, *names, spans=spans)

    def won(self) -> str:
        """Who won, in one sentence: which method is ahead in every judged measure, beyond what chance explains.

        Ahead is who differs from the next one by more than what counts as moved, and by more than the deviations of both
        over seeds together.
        """
        judged = [n for n, one in enumerate(self.measures) if one["group"] != "cost" and not one.get("aside")]
        methods = [row for row in self.rows if row.kind == "method"]
        if len(methods) < 2 or not judged:
            return ""
        leads = {n: self._ahead(n) for n in judged}
        count = Counter(label for label in leads.values() if label is not None)
        if not count:
            return (
                f"Nobody won: in none of the {len(judged)} judged measures is one method clearly ahead.{self._chance()}"
            )
        names = {n: numbers.subject(self.measures[n]) for n in judged}
        said = "; ".join(f"{label} in {', '.join(names[n] for n in judged if leads[n] == label)}" for label in count)
        open_ = sum(label is None for label in leads.values())
        rest = f"; nobody in {'the other' if open_ == 1 else f'the other {open_}'}" if open_ else ""
        winner = next(iter(count)) if len(count) == 1 and not open_ else None
        lead = f"{winner} won" if winner else "Nobody won everywhere" if len(count) > 1 or open_ else ""
        return f"{lead}: clearly ahead is {said}{rest}.{self._chance()}"

    def _ahead(self, place: int) -> str | None:
        """The method that is clearly best in a measure; None where nobody is, or noise is as good."""
        measure = self.measures[place]
        first, second = (self[label] for label in self.ranked(measure["metric"], measure["on"])[:2])
        a, b = mean(first.values[place]), mean(second.values[place])
        if first.kind != "method" or not numbers.finite(a):
            return None
        if not numbers.finite(b):
            return first.label
        spread = sum(_deviation(row.values[place]) or row.error(place) or 0.0 for row in (first, second))
        apart = numbers.direction(b, a, measure["unit"]) != 0 and abs(a - b) > spread
        return first.label if apart else None

    def _chance(self) -> str:
        runs = max(len(values) for row in self.rows for values in row.values)
        return "" if runs > 1 else " It is one seed; another may say otherwise."

    def print(self, console: Console, most: int = 7) -> None:
        """Print the judged measures, as many as fit; the others are on the page."""
        for sheet in self.sheets(judged_only=True):
            if sheet.heading:
                console.print(Text(sheet.heading, "bold"))
            print_sheet(sheet, console, most + 1)
            if len(sheet.heads) > most + 2:
                console.print(f"{len(sheet.heads) - most - 2} more measures are on the page.")
        if won := self.won():
            console.print(Text(won))
        for warning in self.facts.get("warnings", []):
            console.print(Text(f"Note: {warning}", "yellow"))

    def write(self, folder: str | Path, name: str = "comparison") -> Path:
        """Write `NAME.json`, `NAME.md`, `NAME.html`, and the values per example of every row that has some.

        Raises:
            RunError: the place cannot be written.
        """
        folder = Path(folder)
        for place, row in enumerate(self.rows):
            if row.samples:
                write_json(folder / f"per-example-{place}.json", _plain({"label": row.label, "values": row.samples}))
        write_json(folder / f"{name}.json", self.to_json())
        write_text(folder / f"{name}.md", self.to_markdown())
        write_text(folder / f"{name}.html", self.to_html())
        return folder


def arrowed(measure: Mapping[str, Any]) -> str:
    """Label, role and the wanted direction: "answer probability on forget ↓"."""
    wanted = measure["better"] if measure["group"] == "cost" else measure["wanted"]
    return f"{numbers.subject(measure)} {ARROWS.get(wanted) or f'→ {numbers.like(measure)}'}"


def _deviation(values: Sequence[Number]) -> float:
    """The standard deviation over seeds; 0 of one."""
    known = [value for value in values if numbers.finite(value)]
    return statistics.stdev(known) if len(known) > 1 else 0.0


def mean(values: Sequence[Number]) -> Number:
    """None where a value is missing; not finite where one is not."""
    if not values or any(value is None for value in values):
        return None
    return math.fsum(value for value in values if value is not None) / len(values)


def read(path: Path) -> Comparison:
    """A comparison that was written."""
    return Comparison.from_json(json.loads(path.read_text(encoding="utf-8")))


def _plain(value: Any) -> Any:
    """The same with None in place of what JSON cannot hold."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): _plain(part) for name, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, list | tuple) else value
