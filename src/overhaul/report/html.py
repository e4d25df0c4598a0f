"""report.html: one file with everything in it, drawn from the numbers of report.json.

No script, no font, no picture is fetched, and the page's own policy forbids it. Every text of the report is escaped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from overhaul.files import write_text
from overhaul.quoting import shown
from overhaul.report import numbers, plots, sentences, stages, tables

ASIDE = ("lr", "gradient norm")
"""Curves of how the training was driven rather than of what it reached; drawn on demand."""

SAMPLES_SHOWN = 6

FIGURES_SHOWN = 4
"""Of each step, by depth and of what it found; the others are folded."""


def write_html(report: dict[str, Any], path: Path) -> None:
    """Draw `report` (the content of report.json) as one self-contained page at `path`.

    Raises:
        RunError: the place cannot be written.
    """
    write_text(path, render(report))


def render(report: Mapping[str, Any]) -> str:
    """The page as text."""
    steps = tables.told_apart(report["steps"])
    found = tables.findings(steps)
    return draw(
        "template.html",
        report,
        verdicts=sentences.group_verdicts(report["measures"]),
        sheets=stages.sheets(report),
        uncertainty=sentences.uncertainty(report["measures"]),
        depth_plots=_folded(_depth_plots(steps)),
        loss_plots=_loss_plots(steps),
        aside_plots=_aside_plots(steps),
        findings=found,
        finding_plots=_folded([(one.step, one.figure) for one in found if one.figure]),
        products=tables.products(steps),
        samples=_samples(report["samples"]),
        samples_shown=SAMPLES_SHOWN,
    )


def draw(template: str, report: Mapping[str, Any], **parts: Any) -> str:
    """A page of this package's templates as text."""
    environment = Environment(
        loader=PackageLoader("overhaul", "report"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"plain": numbers.plain, "duration": numbers.duration, "words": _words}
    page = environment.get_template(template)
    return shown(page.render(report=report, numbers=numbers, created=_date(report["created"]), **parts))


def _words(name: str) -> str:
    """A fact's or measure's name as words."""
    return name.replace("_", " ")


def _date(created: str) -> str:
    try:
        return f"{datetime.fromisoformat(created):%d %B %Y, %H:%M}".lstrip("0")
    except ValueError:
        return created


def _folded(figures: Sequence[tuple[str, Markup]]) -> tuple[list[Markup], list[Markup]]:
    """The first figures of each step, which a method names first because they matter most, and all others."""
    first: list[Markup] = []
    rest: list[Markup] = []
    shown = Counter[str]()
    for step, figure in figures:
        shown[step] += 1
        (first if shown[step] <= FIGURES_SHOWN else rest).append(figure)
    return first, rest


def _depth_plots(steps: Sequence[Mapping[str, Any]]) -> list[tuple[str, Markup]]:
    return [
        (step["name"], figure)
        for step in steps
        for label, values in step["layers"].items()
        if (figure := plots.bars(step["name"], {int(depth): value for depth, value in values.items()}, _words(label)))
    ]


def _loss_plots(steps: Sequence[Mapping[str, Any]]) -> list[Markup]:
    figures = []
    for step in steps:
        curves = {name: values for name, values in step["curves"].items() if name not in ASIDE}
        total = curves.get("loss")
        # a loss of one term is that term: one line says it
        distinct = {name: values for name, values in curves.items() if name == "loss" or values != total}
        figures.append(plots.lines(step["name"], distinct, "loss"))
    return [figure for figure in figures if figure]


def _aside_plots(steps: Sequence[Mapping[str, Any]]) -> list[Markup]:
    wanted = [(step, name) for step in steps for name in ASIDE if name in step["curves"]]
    titles = {"lr": "learning rate"}
    figures = [plots.lines(step["name"], {name: step["curves"][name]}, titles.get(name, name)) for step, name in wanted]
    return [figure for figure in figures if figure]


def _samples(samples: Sequence[Mapping[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Samples under the heading of their group and role; each output with whether it equals what was expected."""
    headed: dict[str, list[dict[str, Any]]] = {}
    for sample in samples:
        expected = sample["expected"]
        outputs = [
            (output, None if output is None or not expected else output.strip() == expected.strip())
            for output in sample["outputs"]
        ]
        heading = (
            f"{numbers.heading(sample['group'])}: {sample['on']}" if sample["on"] else numbers.heading(sample["group"])
        )
        headed.setdefault(heading, []).append({**sample, "outputs": outputs})
    return headed
