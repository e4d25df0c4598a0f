"""A claim: one small experiment for one paper, with margins stated before it is run, and a verdict for each.

1. A check holds if it passes on every seed. What passes on some seeds only is reported as such ("holds on 2 of 3").
2. Every run also measures the paper's baselines and a null control, so that a check can compare.
3. A result of three seeds or more is stored beside the claims, with machine, versions, date and seconds;
   `docs/claims.md` is written from what is stored, whether it holds or not.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib
import json
import math
import pkgutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import overhaul
from overhaul import session
from overhaul.errors import RequestError, RunError, did_you_mean
from overhaul.files import write_json
from overhaul.recipe import machine
from overhaul.report.comparison import Comparison, Row
from overhaul.report.sheets import Cell, Sheet, markdown, print_sheet

RESULTS = Path(__file__).parent / "results"
SEEDS_TO_STORE = 3

Numbers = dict[str, float]
Result = dict[str, Any]


@dataclass(frozen=True)
class Check:
    """One thing that must be true of the numbers of a run.

    Attributes:
        text: what is checked, with its margin, for a reader.
        passes: whether the numbers of one seed satisfy it.
    """

    text: str
    passes: Callable[[Numbers], bool]


@dataclass(frozen=True)
class Claim:
    """What a paper says, and how it is tried here.

    Attributes:
        slug: the paper's short name ("retrain-equivalence"); its file is named so, with underscores.
        paper: the arXiv number.
        title: a line.
        statement: what the paper claims, in a sentence or two.
        checks: what must be true for it to hold here, stated before it is run.
        run: seed -> measured numbers by name, baselines and null control among them.
        remarks: written after the run: what did not hold, and the best explanation there is.
    """

    slug: str
    paper: str
    title: str
    statement: str
    checks: tuple[Check, ...]
    run: Callable[[int], Numbers]
    remarks: str = ""


def slugs() -> list[str]:
    """The short names of all papers with a claim."""
    here = sys.modules[__package__ or "overhaul.claims"].__path__
    return sorted(info.name.replace("_", "-") for info in pkgutil.iter_modules(here) if not info.name.startswith("_"))


def find(names: Sequence[str]) -> list[Claim]:
    """The claims with these short names; `all` stands for every one.

    Raises:
        RequestError: a name is not known.
    """
    known = slugs()
    wanted = known if "all" in names else [name.replace("_", "-") for name in names]
    for name in wanted:
        if name not in known:
            raise RequestError(f"There is no claim {name!r}.{did_you_mean(name, known)}")
    modules = [importlib.import_module(f"overhaul.claims.{name.replace('-', '_')}") for name in dict.fromkeys(wanted)]
    return [module.CLAIM for module in modules]


def reproduce(claim: Claim, seeds: int) -> Result:
    """Run a claim with the seeds 0 to `seeds` - 1 and judge it; the result is stored if there are three or more.

    Returns:
        What was measured, as JSON: numbers and seconds by seed, verdicts, machine, versions and date.
    """
    runs: list[Numbers] = []
    seconds: list[float] = []
    for seed in session.progress(range(seeds), claim.slug, seeds):
        started = time.perf_counter()
        torch.manual_seed(seed)
        # a training inside must not go on from a checkpoint of another seed
        with session.using(scratch=None):
            runs.append(claim.run(seed))
        seconds.append(round(time.perf_counter() - started, 1))
    result = {
        "slug": claim.slug,
        "paper": claim.paper,
        "title": claim.title,
        "statement": claim.statement,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "overhaul": overhaul.__version__,
        "machine": machine.describe(),
        "seconds": seconds,
        "numbers": {name: [_number(run[name]) for run in runs] for name in runs[0]},
        "checks": [
            {"text": check.text, "passed": [bool(check.passes(numbers)) for numbers in runs]} for check in claim.checks
        ],
    }
    if seeds >= SEEDS_TO_STORE:
        with contextlib.suppress(
            OSError, RunError
        ):  # an installed package may be read-only; the result is printed all the same
            _store(result)
    return result


def _number(value: float) -> float | None:
    """Six digits, and None for what JSON cannot hold."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _store(result: Result) -> None:
    write_json(RESULTS / f"{result['slug']}.json", result)


def stored() -> list[Result]:
    """The stored results, by slug."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*.json"))]


def verdict(passed: Sequence[bool]) -> str:
    """`holds`, or on how many seeds it does."""
    return "holds" if all(passed) else f"holds on {sum(passed)} of {len(passed)} seeds"


def print_result(result: Result, console: Any) -> None:
    """Show a result in the terminal: the claim, the verdicts, the numbers.

    Args:
        result: from `reproduce`.
        console: a `rich.console.Console`.
    """
    from rich.markup import escape

    console.print(f"[bold]{escape(result['title'])}[/]  arXiv:{result['paper']}\n{escape(result['statement'])}\n")
    print_sheet(_checks(result), console)
    console.print()
    print_sheet(_measured(result).by_seed("measured"), console)
    console.print(f"\n{escape(_circumstances(result))}\n", style="dim")


def claims_page() -> str:
    """The page `docs/claims.md`, written from the stored results."""
    lines = [
        "# Claims",
        "",
        "One small experiment for each paper, run by `overhaul reproduce NAME`. The margins were stated before the runs. A",
        "check holds if it passes on every seed; what does not hold here is reported as not holding. Every experiment",
        "measures baselines and a null control beside the method. This page is generated from the stored results.",
        "",
    ]
    remarks = {claim.slug: claim.remarks for claim in find(["all"])}
    for result in stored():
        held = sum(all(check["passed"]) for check in result["checks"])
        lines += [
            f"## {result['title']}",
            "",
            f"`overhaul reproduce {result['slug']}`, [arXiv:{result['paper']}](https://arxiv.org/abs/{result['paper']}): "
            f"{held} of {len(result['checks'])} checks hold.",
            "",
            result["statement"],
            "",
            markdown(_checks(result)),
            *([remarks[result["slug"]], ""] if remarks.get(result["slug"]) else []),
            markdown(_measured(result).by_seed("measured")),
            _circumstances(result),
            "",
        ]
    return "\n".join(lines)


def _checks(result: Result) -> Sheet:
    said = [(check["text"], verdict(check["passed"]), all(check["passed"])) for check in result["checks"]]
    return Sheet(
        "", [Cell("check"), Cell("verdict")], [[Cell(a), Cell(b, good=held)] for a, b, held in said], words=True
    )


def _measured(result: Result) -> Comparison:
    """Every number of a claim as a row, its seeds side by side; what JSON could not hold was not finite."""
    measure = {"metric": "measured", "group": "measured", "label": "measured", "on": "", "unit": "", "n": None}
    rows = [
        Row(name, "method", [[math.nan if value is None else value for value in values]])
        for name, values in result["numbers"].items()
    ]
    return Comparison(result["title"], [measure], rows)


def _circumstances(result: Result) -> str:
    """Where, with what and how long it ran."""
    its = result["machine"]
    per_seed = sum(result["seconds"]) / len(result["seconds"])
    return (
        f"{result['date']}, {its['cpu']} ({its['cores']} cores, {its['device']}), Python {its['python']}, "
        f"torch {its['torch']}, transformers {its['transformers']}, Overhaul {result['overhaul']}; "
        f"{per_seed:.0f} s a seed."
    )
