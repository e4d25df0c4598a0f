"""Blending two checkpoints of 1.1 billion parameters: at most half of mergekit's time, 1.3 GB of memory, libraries included.

Every side is a process of its own, timed from its start to its end, as somebody at a command line would wait for it.
mergekit is a program beside ours and no part of the project: `--mergekit PATH` names a Python that has it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from _large import make_llama
from _timing import alternate, median_ratio, rounds, show

from overhaul import weights

OURS = "import sys; from overhaul import weights; weights.blend(sys.argv[1:3], [0.5, 0.5], sys.argv[3])"
LINEAR = """\
models:
  - {{model: "{0}", parameters: {{weight: 0.5}}}}
  - {{model: "{1}", parameters: {{weight: 0.5}}}}
merge_method: linear
dtype: bfloat16
"""


def mergekit_python() -> str | None:
    """The value of --mergekit, which is taken from the command line: the rest is read by `rounds`."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--mergekit", help="a Python interpreter that has mergekit")
    options, sys.argv[1:] = parser.parse_known_args()
    return options.mergekit


def program(command: list[str], out: Path, peaks: list[int]) -> Callable[[], None]:
    """A side that runs a command which writes `out`, and adds its peak resident bytes to `peaks`.

    Linux counts for a new process also what this one held when it started it, so the peak is that (half a GB) at least.
    """

    def run() -> None:
        shutil.rmtree(out, ignore_errors=True)
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        assert child.stderr is not None
        said = child.stderr.read()
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            sys.exit(f"{command[0]} ended with {child.returncode}: {said.decode()[-2000:]}")
        peaks.append(usage.ru_maxrss * 1024)

    return run


def copying(source: Path, out: Path) -> Callable[[], None]:
    """A side that only copies as many bytes as the others write: what the disk allows."""

    def run() -> None:
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(source, out)

    return run


def main() -> None:
    mergekit = mergekit_python()
    quick = "--quick" in sys.argv
    times = rounds(5, quick=1)
    parameters, shards = (5_000_000, 3) if quick else (1_100_000_000, 5)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        models = [make_llama(folder / name, parameters, shards, seed) for seed, name in enumerate(("first", "second"))]
        ours, other = folder / "ours", folder / "other"
        recipe = folder / "linear.yaml"
        recipe.write_text(LINEAR.format(*models))
        peaks: dict[str, list[int]] = {"blend": [], "mergekit": []}
        command = [sys.executable, "-c", OURS, *map(str, models), str(ours)]
        sides = {"blend": program(command, ours, peaks["blend"]), "plain copy": copying(models[0], other)}
        if mergekit:
            command = [mergekit, "-m", "mergekit.scripts.run_yaml", str(recipe), str(other), "--quiet"]
            sides["mergekit"] = program([*command, "--no-copy-tokenizer"], other, peaks["mergekit"])
        seconds = alternate(sides, times)
        memory = max(peaks["blend"]) / 1e9
        lines = [
            (f"{memory:.2f} GB of memory at most (target: at most 1.3)", memory <= 1.3),
            (f"{median_ratio(seconds['blend'], seconds['plain copy']):.1f} times as long as the copy", None),
        ]
        if mergekit:
            faster = median_ratio(seconds["mergekit"], seconds["blend"])
            distance = weights.delta_norms(other, ours).total
            lines += [
                (f"{faster:.2f} times as fast as mergekit (target: at least 2)", None if quick else faster >= 2.0),
                (f"{max(peaks['mergekit']) / 1e9:.2f} GB of memory for mergekit", None),
                (f"{distance:.3g} is the distance between the two results (target: 0)", distance == 0.0),
            ]
        else:
            lines.append(("mergekit was not measured; name a Python that has it with --mergekit", None))
        show(f"mean of two Llamas of {parameters / 1e9:.3g}e9 parameters, bfloat16", seconds, 1, "blend", lines)


if __name__ == "__main__":
    main()
