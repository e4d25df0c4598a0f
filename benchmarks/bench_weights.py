"""Merging checkpoints of 1.1 billion parameters, libraries included.

A mean of two: at most half of mergekit's time, 1.3 GB of memory. A change scaled by depth: at most 5 s. TIES of two: at most
30 s and 2 GB. Scaling and TIES are also held against what anyone would write first, which holds the models in memory and so
is measured at 100 million parameters.

Every side is a process of its own, timed from its start to its end, as somebody at a command line would wait for it.
mergekit is a program beside ours and no part of the project: `--mergekit PATH` names a Python that has it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
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


LINES = "import sys; from overhaul import merge; merge.lines(sys.argv[1], sys.argv[2:3], alpha=0.3, out=sys.argv[4])"
TIES = "import sys; from overhaul import merge; merge.ties(sys.argv[1], sys.argv[2:4], density=0.2, out=sys.argv[4])"
MERGEKIT_TIES = """\
models:
  - {{model: "{1}", parameters: {{weight: 1.0, density: 0.2}}}}
  - {{model: "{2}", parameters: {{weight: 1.0, density: 0.2}}}}
merge_method: ties
base_model: "{0}"
parameters: {{normalize: true}}
dtype: bfloat16
"""
OBVIOUS = """\
import os, re, shutil, sys, torch
from pathlib import Path
from safetensors.torch import load_file, save_file
def load(folder):
    return {k: v for p in sorted(Path(folder).glob("*.safetensors")) for k, v in load_file(p).items()}
def flat(state):
    return torch.cat([state[k].float().flatten() for k in sorted(state)])
*inputs, out = map(Path, sys.argv[1:])
states = list(map(load, inputs))
base = states[0]
"""
OBVIOUS_LINES = (
    OBVIOUS
    + """\
def factor(name):
    found = re.match(r"model\\.layers\\.(\\d+)\\.", name)
    return 0.3 + 0.7 * int(found[1]) / 21 if found else 0.3
made = {k: (base[k].float() + factor(k) * (states[1][k].float() - base[k].float())).bfloat16() for k in base}
"""
)
OBVIOUS_TIES = (
    OBVIOUS
    + """\
tau = torch.stack([flat(state) - flat(base) for state in states[1:]])
d = tau.shape[1]
tau = torch.where(tau.abs() >= tau.abs().kthvalue(d - int(d * 0.2), dim=1, keepdim=True).values, tau, 0)
sign = tau.sum(0).sign()
sign = torch.where(sign == 0, sign.sum().sign(), sign)
tau = torch.where(torch.where(sign > 0, tau > 0, tau < 0), tau, 0)
merged = flat(base) + tau.sum(0) / (tau != 0).sum(0).clamp(min=1)
made, start = {}, 0
for k in sorted(base):
    made[k] = merged[start : start + base[k].numel()].view(base[k].shape).bfloat16()
    start += base[k].numel()
"""
)
WRITE = """\
out.mkdir()
save_file(made, out / "model.safetensors", {"format": "pt"})
shutil.copy(inputs[0] / "config.json", out)
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
    sizes = (5_000_000, 5_000_000) if quick else (100_000_000, 1_100_000_000)
    with tempfile.TemporaryDirectory() as place:
        small, large = (Path(place) / name for name in ("small", "large"))
        for folder, parameters, shards in ((small, sizes[0], 1), (large, sizes[1], 3 if quick else 5)):
            for seed, name in enumerate(("first", "second", "third")):
                make_llama(folder / name, parameters, shards, seed)
        mean(large, sizes[1], times, mergekit, quick)
        against_obvious(small, sizes[0], times)
        alone(large, sizes[1], min(times, 3), mergekit, quick)


def mean(folder: Path, parameters: int, times: int, mergekit: str | None, quick: bool) -> None:
    """The mean of two against mergekit's and a plain copy."""
    models = [folder / "first", folder / "second"]
    ours, other = folder / "ours", folder / "other"
    peaks: dict[str, list[int]] = {"blend": [], "mergekit": []}
    command = [sys.executable, "-c", OURS, *map(str, models), str(ours)]
    sides = {"blend": program(command, ours, peaks["blend"]), "plain copy": copying(models[0], other)}
    if mergekit:
        sides["mergekit"] = by_mergekit(mergekit, LINEAR.format(*models), folder, other, peaks["mergekit"])
    seconds = alternate(sides, times)
    memory = max(peaks["blend"]) / 1e9
    lines: list[tuple[str, bool | None]] = [
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


def by_mergekit(python: str, recipe: str, folder: Path, out: Path, peaks: list[int]) -> Callable[[], None]:
    """A side that runs mergekit on a recipe, with the flags that are fastest for it."""
    path = folder / f"{out.name}.yaml"
    path.write_text(recipe)
    command = [python, "-m", "mergekit.scripts.run_yaml", str(path), str(out), "--quiet", "--no-copy-tokenizer"]
    return program([*command, "--async-write", "--out-shard-size", "500M"], out, peaks)


def against_obvious(folder: Path, parameters: int, times: int) -> None:
    """Scaling by depth and TIES against a script that holds everything in memory."""
    inputs = [str(folder / name) for name in ("first", "second", "third")]
    for title, ours, theirs in (("lines", LINES, OBVIOUS_LINES), ("ties", TIES, OBVIOUS_TIES)):
        peaks: dict[str, list[int]] = {"ours": [], "obvious": []}
        outs = {name: folder / name for name in peaks}
        sides = {
            name: program([sys.executable, "-c", code, *inputs, str(outs[name])], outs[name], peaks[name])
            for name, code in (("ours", ours), ("obvious", theirs + WRITE))
        }
        seconds = alternate(sides, times)
        distance = (
            weights.delta_norms(outs["obvious"], outs["ours"]).total
            / weights.delta_norms(inputs[0], outs["ours"]).total
        )
        faster = median_ratio(seconds["obvious"], seconds["ours"])
        smaller = max(peaks["obvious"]) / max(peaks["ours"])
        lines: list[tuple[str, bool | None]] = [
            (f"{faster:.2f} times as fast as the obvious script", None),
            (f"{smaller:.2f} times as little memory", None),
            (f"{distance:.2g} is the distance between the results, of the change (target: 1e-3)", distance <= 1e-3),
        ]
        show(f"{title}, {parameters / 1e9:.3g}e9 parameters, bfloat16", seconds, 1, "merge", lines)


def alone(folder: Path, parameters: int, times: int, mergekit: str | None, quick: bool) -> None:
    """Scaling by depth and TIES at full size, and mergekit's TIES, which ranks within each tensor."""
    inputs = [folder / name for name in ("first", "second", "third")]
    for title, code, most, room in (("lines", LINES, 5.0, 1.3), ("ties", TIES, 30.0, 2.0)):
        peaks: dict[str, list[int]] = {"ours": [], "mergekit": []}
        out = folder / title
        command = [sys.executable, "-c", code, *map(str, inputs), str(out)]
        sides = {"ours": program(command, out, peaks["ours"])}
        if mergekit and title == "ties":
            other = folder / "mergekit"
            sides["mergekit"] = by_mergekit(mergekit, MERGEKIT_TIES.format(*inputs), folder, other, peaks["mergekit"])
        seconds = alternate(sides, times)
        took, memory = statistics.median(seconds["ours"]), max(peaks["ours"]) / 1e9
        lines: list[tuple[str, bool | None]] = [
            (f"{took:.1f} s (target: at most {most:g})", None if quick else took <= most),
            (f"{memory:.2f} GB of memory at most (target: at most {room:g})", memory <= room),
        ]
        if len(sides) > 1:
            faster = median_ratio(seconds["mergekit"], seconds["ours"])
            lines.append((f"{faster:.2f} times as fast as mergekit, which ranks within each tensor", None))
            lines.append((f"{max(peaks['mergekit']) / 1e9:.2f} GB of memory for mergekit", None))
        show(f"{title}, {parameters / 1e9:.3g}e9 parameters, bfloat16", seconds, 1, "merge", lines)


if __name__ == "__main__":
    main()
