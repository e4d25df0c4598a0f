"""Merges of checkpoints of 1.1 billion parameters against mergekit and a plain copy: time, processor and memory.

A mean of two: at least twice as fast as mergekit, in a quarter of its memory. TIES and DARE of two: at least three times as
fast, in 0.8 of its memory. Slerp, and blocks of two models on one another: no slower.

Every side is a program of its own, from its start to its end, with its libraries. mergekit is a program beside ours and no
part of the project: `--mergekit PATH` names a Python that has it. Its TIES ranks within each tensor, as ours does with
`scope="tensor"`; ours as it is by default ranks over the whole model, which takes a pass more.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from _large import make_llama
from _programs import Program, Run, asked, copy, in_turn, median, mergekit, ours
from _timing import rounds
from rich.console import Console
from rich.table import Table

from overhaul import weights


@dataclass(frozen=True)
class Merge:
    """One merge as both sides write it.

    Attributes:
        ours: by name of a side, Python that is given the folders of three models and the one to write.
        theirs: mergekit's recipe, in which the folders are to be put.
        faster: how many times as fast as mergekit's ours has to be.
        memory: the share of its memory that ours may take; None for no target.
        alike: the result of our first side is to be mergekit's, up to roundings of bfloat16.
    """

    ours: Mapping[str, str]
    theirs: str
    faster: float
    memory: float | None = None
    alike: bool = False


def call(name: str, several: bool, more: str = "") -> str:
    """Python that merges the second and third model with the first as their base."""
    models = "[second, third]" if several else "second"
    read = "from overhaul import merge; base, second, third, out = sys.argv[1:]"
    return f"{read}; merge.{name}(base, {models}, {more}out=out)"


def recipe(method: str, models: str, base: bool = True, more: str = "") -> str:
    """One of mergekit's."""
    given = 'base_model: "{first}"\n' * base
    return f"models:\n{models}merge_method: {method}\n{given}{more}dtype: bfloat16\n"


def two(one: str, other: str, each: str) -> str:
    """Models of a recipe, with the same parameters."""
    lines = [f'  - {{{{model: "{{{name}}}", parameters: {{{{{each}}}}}}}}}\n' for name in (one, other)]
    return "".join(lines)


SLICES = """\
slices:
  - sources: [{{model: "{first}", layer_range: [0, 11]}}]
  - sources: [{{model: "{second}", layer_range: [11, 22]}}]
merge_method: passthrough
dtype: bfloat16
"""
STACK = """\
from overhaul import merge
slices = [{"model": 0, "blocks": "0-10"}, {"model": 1, "blocks": "11-21"}]
merge.stack(sys.argv[1], sys.argv[2:3], slices=slices, out=sys.argv[4])"""
ROUNDING = 4e-3
"""Half a step of bfloat16, as a share of a number."""
NOT_SCALED = "parameters: {{normalize: false}}\n"
MERGES = {
    "linear": Merge(
        {
            "blend": "from overhaul import weights; weights.blend(sys.argv[1:3], [0.5, 0.5], sys.argv[4])",
            "soup, reads the base too": call("soup", several=True),
        },
        recipe("linear", two("first", "second", "weight: 0.5"), base=False),
        faster=2.0, memory=0.25, alike=True,
    ),
    "ties": Merge(
        {
            "ties": call("ties", several=True),
            "ties in each tensor": call("ties", several=True, more='scope="tensor", rule="paper", '),
        },
        recipe("ties", two("second", "third", "weight: 1.0, density: 0.2")), faster=3.0, memory=0.8,
    ),
    "dare": Merge(
        {"dare": call("dare", several=True)},
        recipe("dare_linear", two("second", "third", "weight: 1.0, density: 0.1"), more=NOT_SCALED),
        faster=3.0, memory=0.8,
    ),
    "slerp": Merge(
        {"slerp": call("slerp", several=False)},
        recipe("slerp", two("first", "second", ""), more="parameters: {{t: 0.5}}\n"), faster=1.0, alike=True,
    ),
    "stack": Merge({"stack": STACK}, SLICES, faster=1.0),
}  # fmt: skip


def main() -> None:
    """Make the models, and measure the merges that are named, or all."""
    options = asked()
    only = [sys.argv.pop(n) for n in reversed(range(1, len(sys.argv))) if sys.argv[n] in MERGES]
    quick = "--quick" in sys.argv
    times = rounds(options.times or 3, quick=1)
    parameters = int(options.parameters or (5e6 if quick else 1.1e9))
    shards = 3 if quick else 5
    with tempfile.TemporaryDirectory() as place:
        names = ("first", "second", "third")
        models = {name: make_llama(Path(place) / name, parameters, shards, n) for n, name in enumerate(names)}
        console = Console(width=120)
        console.print(f"[bold]Merges of Llamas of {parameters:.3g} parameters, bfloat16, {shards} shards[/]\n")
        for name in reversed(only) if only else MERGES:
            against(console, MERGES[name], models, options.mergekit, times, quick)


def against(
    console: Console, merge: Merge, models: dict[str, Path], python: str | None, times: int, quick: bool
) -> None:
    """One merge by ours, by mergekit and beside a plain copy, and what was to be reached."""
    place = models["first"].parent
    sides: dict[str, Program] = {
        name: ours(code, *models.values(), out=place / f"ours{n}") for n, (name, code) in enumerate(merge.ours.items())
    }
    if python:
        sides["mergekit"] = mergekit(python, merge.theirs.format(**models), place / "mergekit")
    sides["plain copy"] = copy(models["first"], place / "copy")
    runs = in_turn(sides, times)
    table = Table(
        "median", "seconds", "of a processor", "of the system", "GB at the peak", "copies", box=None, pad_edge=False
    )
    for side, taken in runs.items():
        wall, user, system, peak = (median(taken, what) for what in ("wall", "user", "system", "peak"))
        copies = wall / median(runs["plain copy"], "wall")
        table.add_row(side, f"{wall:.2f}", f"{user:.2f}", f"{system:.2f}", f"{peak / 1e9:.2f}", f"{copies:.1f}")
    console.print(table)
    lines = [line for name in merge.ours for line in judged(merge, name, runs, quick)] if python else []
    if python and merge.alike:
        apart = weights.delta_norms(place / "mergekit", place / "ours0").total
        apart /= weights.delta_norms(models["first"], place / "ours0").total
        lines.append((f"{apart:.2g} of the change lies between the results (target: {ROUNDING:g})", apart <= ROUNDING))
    for text, reached in lines or [("mergekit was not measured; name a Python that has it with --mergekit", None)]:
        word = {True: "[green]reached[/]", False: "[red]missed[/] ", None: "       "}[reached]
        console.print(f"{word}  {text}")
    console.print()
    for side in sides.values():
        shutil.rmtree(side.out)


def judged(merge: Merge, name: str, runs: dict[str, list[Run]], quick: bool) -> list[tuple[str, bool | None]]:
    """Ratios with their targets; the models of --quick are too small for these."""
    ratios = {what: median(runs["mergekit"], what) / median(runs[name], what) for what in ("wall", "user", "peak")}
    faster, memory = ratios["wall"], 1 / ratios["peak"]
    lines: list[tuple[str, bool | None]] = [
        (
            f"{name}: {faster:.2f} times as fast (target: at least {merge.faster:g}), {ratios['user']:.2f} by the time of "
            "the processor",
            None if quick else faster >= merge.faster,
        ),
    ]
    if merge.memory is not None:
        reached = None if quick else memory <= merge.memory
        lines.append((f"{name}: {memory:.2f} of its memory (target: at most {merge.memory:g})", reached))
    return lines


if __name__ == "__main__":
    main()
