"""Whole programs as sides of a benchmark: each a process of its own, as somebody at a command line would wait for it."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

LAUNCH = """\
import json, os, subprocess, sys, time
started = time.perf_counter()
child = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=sys.stderr)
_, status, usage = os.wait4(child.pid, 0)
seconds = time.perf_counter() - started
print(json.dumps([os.waitstatus_to_exitcode(status), seconds, usage.ru_utime, usage.ru_stime, usage.ru_maxrss * 1024]))
"""
"""Linux counts for a new process also what the one that started it held: so it is started by one that holds nothing."""


@dataclass(frozen=True)
class Run:
    """What one run took: seconds on the clock, of the processor in the program and in the system for it; peak bytes."""

    wall: float
    user: float
    system: float
    peak: int


@dataclass(frozen=True)
class Program:
    """A command that writes a folder.

    Attributes:
        command: with its arguments.
        out: the folder, removed before each run.
        plain: run it without PYTHONPATH, since it is no part of this project.
    """

    command: Sequence[str]
    out: Path
    plain: bool = False

    def run(self) -> Run:
        """Run it once; a failure ends the benchmark."""
        shutil.rmtree(self.out, ignore_errors=True)
        left_out = {"PYTHONPATH"} if self.plain else set[str]()
        surroundings = {name: value for name, value in os.environ.items() if name not in left_out}
        surroundings |= {"HF_HUB_OFFLINE": "1"}
        launched = [sys.executable, "-S", "-c", LAUNCH, *self.command]
        done = subprocess.run(launched, capture_output=True, text=True, env=surroundings)
        code, *taken = json.loads(done.stdout.splitlines()[-1]) if not done.returncode else [done.returncode]
        if code:
            sys.exit(f"{' '.join(self.command)[:200]} ended with {code}: {done.stderr[-2000:]}")
        return Run(*taken)


def in_turn(sides: Mapping[str, Program], times: int) -> dict[str, list[Run]]:
    """Each side `times` times, in turn, so that what disturbs the machine disturbs all alike."""
    runs: dict[str, list[Run]] = {name: [] for name in sides}
    for _ in range(times):
        for name, side in sides.items():
            runs[name].append(side.run())
    return runs


def median(runs: Sequence[Run], what: str) -> float:
    """Of one of the numbers of each run."""
    return statistics.median(getattr(run, what) for run in runs)


def ours(code: str, *arguments: object, out: Path) -> Program:
    """A few lines of Python, given the arguments and then the folder to write."""
    return Program([sys.executable, "-c", f"import sys; {code}", *map(str, arguments), str(out)], out)


def copy(source: Path, out: Path) -> Program:
    """A plain copy: what the disk allows."""
    return Program(["cp", "-r", str(source), str(out)], out)


def mergekit(python: str, recipe: str, out: Path) -> Program:
    """One of mergekit's recipes by itself, with the flags that are fastest for it; it is no part of this project."""
    path = out.with_suffix(".yaml")
    path.write_text(recipe)
    command = [python, "-m", "mergekit.scripts.run_yaml", str(path), str(out), "--quiet", "--no-copy-tokenizer"]
    return Program([*command, "--async-write", "--out-shard-size", "500M"], out, plain=True)


def asked() -> argparse.Namespace:
    """What `rounds`, which reads the rest of the command line, does not know: mergekit, times and parameters."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--mergekit", help="a Python interpreter that has mergekit")
    parser.add_argument("--times", type=int, help="how often each side runs")
    parser.add_argument("--parameters", type=float, help="of a model")
    options, sys.argv[1:] = parser.parse_known_args()
    return options
