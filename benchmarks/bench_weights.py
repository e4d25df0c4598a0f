"""Merging checkpoints of 1.1 billion parameters, libraries included; against other programs see `bench_merge`.

A mean of two: at most 1.3 GB. A change scaled by depth: at most 5 s. TIES of two: at most 30 s and 2 GB. Scaling and TIES
are also held against what anyone would write first, which holds the models in memory and so is measured at 100 million
parameters. Every side is a program of its own.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from _large import make_llama
from _programs import Program, Run, copy, in_turn, median, ours
from _timing import median_ratio, rounds, show

from overhaul import weights

MEAN = "from overhaul import weights; weights.blend(sys.argv[1:3], [0.5, 0.5], sys.argv[4])"
LINES = "from overhaul import merge; merge.lines(sys.argv[1], sys.argv[2:3], alpha=0.3, out=sys.argv[4])"
TIES = "from overhaul import merge; merge.ties(sys.argv[1], sys.argv[2:4], density=0.2, out=sys.argv[4])"
OBVIOUS = """\
import os, re, shutil, torch
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


def main() -> None:
    quick = "--quick" in sys.argv
    times = rounds(5, quick=1)
    sizes = (5_000_000, 5_000_000) if quick else (100_000_000, 1_100_000_000)
    with tempfile.TemporaryDirectory() as place:
        small, large = (Path(place) / name for name in ("small", "large"))
        for folder, parameters, shards in ((small, sizes[0], 1), (large, sizes[1], 3 if quick else 5)):
            for seed, name in enumerate(("first", "second", "third")):
                make_llama(folder / name, parameters, shards, seed)
        against_obvious(small, sizes[0], times)
        alone(large, sizes[1], min(times, 3), quick)


def walls(runs: dict[str, list[Run]]) -> dict[str, list[float]]:
    return {name: [run.wall for run in each] for name, each in runs.items()}


def against_obvious(folder: Path, parameters: int, times: int) -> None:
    """Scaling by depth and TIES against a script that holds everything in memory."""
    inputs = [folder / name for name in ("first", "second", "third")]
    for title, code, theirs in (("lines", LINES, OBVIOUS_LINES), ("ties", TIES, OBVIOUS_TIES)):
        out, other = folder / "ours", folder / "obvious"
        sides = {"ours": ours(code, *inputs, out=out), "obvious": ours(theirs + WRITE, *inputs, out=other)}
        runs = in_turn(sides, times)
        distance = weights.delta_norms(other, out).total / weights.delta_norms(inputs[0], out).total
        seconds = walls(runs)
        smaller = median(runs["obvious"], "peak") / median(runs["ours"], "peak")
        lines: list[tuple[str, bool | None]] = [
            (f"{median_ratio(seconds['obvious'], seconds['ours']):.2f} times as fast as the obvious script", None),
            (f"{smaller:.2f} times as little memory", None),
            (f"{distance:.2g} is the distance between the results, of the change (target: 1e-3)", distance <= 1e-3),
        ]
        show(f"{title}, {parameters / 1e9:.3g}e9 parameters, bfloat16", seconds, 1, "merge", lines)


def alone(folder: Path, parameters: int, times: int, quick: bool) -> None:
    """The mean, scaling by depth and TIES at full size, beside a plain copy of as many bytes as they write."""
    inputs = [folder / name for name in ("first", "second", "third")]
    for title, code, most, room in (("mean", MEAN, None, 1.3), ("lines", LINES, 5.0, 1.3), ("ties", TIES, 30.0, 2.0)):
        sides: dict[str, Program] = {
            "ours": ours(code, *inputs, out=folder / title), "plain copy": copy(inputs[0], folder / "copy")
        }  # fmt: skip
        runs = in_turn(sides, times)
        took, memory = median(runs["ours"], "wall"), median(runs["ours"], "peak") / 1e9
        longer = median_ratio(*(walls(runs)[name] for name in sides))
        wanted = "no target" if most is None else f"target: at most {most:g}"
        lines: list[tuple[str, bool | None]] = [
            (f"{took:.1f} s ({wanted})", None if quick or most is None else took <= most),
            (f"{memory:.2f} GB of memory (target: at most {room:g})", memory <= room),
            (f"{longer:.1f} times as long as the copy", None),
        ]
        show(f"{title}, {parameters / 1e9:.3g}e9 parameters, bfloat16", walls(runs), 1, "merge", lines)


if __name__ == "__main__":
    main()
