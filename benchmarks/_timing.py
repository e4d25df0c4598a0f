"""Alternating runs in one process: what disturbs the machine disturbs both sides alike."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping

import torch
from rich.console import Console
from rich.table import Table


def rounds(full: int, quick: int = 2) -> int:
    """How often each side runs: `full`, or `quick` with --quick, which shows only that the benchmark works."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="few rounds: a smoke test, no measurement")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    return quick if options.quick else full


def alternate(sides: Mapping[str, Callable[[], object]], times: int) -> dict[str, list[float]]:
    """Seconds of each side, run in turn `times` times after one round that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(times + 1):
        for name, side in sides.items():
            started = time.perf_counter()
            side()
            if turn:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def median_difference(ours: list[float], theirs: list[float]) -> float:
    """The median of the differences within a round, in seconds."""
    return statistics.median(a - b for a, b in zip(ours, theirs, strict=True))


def median_ratio(theirs: list[float], ours: list[float]) -> float:
    """How many times faster we are: the median of the ratios within a round."""
    return statistics.median(a / b for a, b in zip(theirs, ours, strict=True))


def show(
    title: str, seconds: Mapping[str, list[float]], per: int, unit: str, lines: list[tuple[str, bool | None]]
) -> None:
    """Print the medians, in milliseconds per unit, and below them what was to be reached.

    Args:
        title: what was measured.
        seconds: from `alternate`.
        per: units in one run.
        unit: what a unit is ("step").
        lines: sentences with a number and its target, and whether it was reached; None where there is no target.
    """
    console = Console(width=120)
    console.print(f"[bold]{title}[/]")
    table = Table("side", f"ms per {unit}, median", "lowest", "highest", box=None, pad_edge=False)
    for name, values in seconds.items():
        scaled = [1e3 * value / per for value in values]
        table.add_row(name, f"{statistics.median(scaled):.2f}", f"{min(scaled):.2f}", f"{max(scaled):.2f}")
    console.print(table)
    for text, reached in lines:
        word = {True: "[green]reached[/]", False: "[red]missed[/] ", None: "       "}[reached]
        console.print(f"{word}  {text}")
    console.print()
