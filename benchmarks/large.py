"""A check with a model of 1.1 billion parameters inside 12 GiB of memory: `make large`.

Every part is a process of its own with a limit on its memory, so that its peak is its own and too much of it fails. The
part "recipe" also holds the memory of real steps against what `overhaul plan` had said.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _large import make_llama
from rich.console import Console
from rich.table import Table

LIMIT = 12 * 2**30
SHARDS = 5


def drop(first: Path, _: Path, out: Path) -> str:
    from overhaul import models
    from overhaul.stack import LayerStack

    model, _processor = models.open_model(first, dtype="bfloat16")
    stack = LayerStack.of(model)
    stack.drop([9, 12, 15, 18])
    models.save(model, None, out)
    return f"{len(stack)} blocks left"


def blend(first: Path, second: Path, out: Path) -> str:
    from overhaul import weights

    weights.blend([first, second], [0.5, 0.5], out)
    return f"{len(list(out.glob('*.safetensors')))} shards written"


def lines(first: Path, second: Path, out: Path) -> str:
    from overhaul import merge

    done = merge.lines(first, [second], alpha=0.3, out=out)
    return f"{done.facts['tensors_changed']} of {done.facts['tensors']} tensors changed"


def ties(first: Path, second: Path, out: Path) -> str:
    from overhaul import merge

    done = merge.ties(first, [second, second], out=out)
    return f"{done.facts['merged_share']:.1%} of the weights changed"


def capture(first: Path, _: Path, out: Path) -> str:
    import torch

    from overhaul import models
    from overhaul.stack import LayerStack
    from overhaul.trace import measure, statistics, turn, windows

    model, _processor = models.open_model(first, dtype="bfloat16")
    stack = LayerStack.of(model)
    batches = [{"input_ids": torch.arange(n, n + 64)[None]} for n in (3, 100)]
    norms = measure(stack, batches, ["entering"], statistics)
    turns = measure(stack, batches, windows(stack), turn)
    assert len(norms) == len(turns) == len(stack)
    first_norm, last_norm = (float(norms[f"entering.{n}"].norm_mean) for n in (0, len(stack) - 1))
    return f"norm {first_norm:.2f} enters the first block, {last_norm:.2f} the last"


def patches(first: Path, second: Path, out: Path) -> str:
    """Each block's state of one model into each block of the other, in the memory of one of them."""
    import torch

    from overhaul.data.examples import IGNORED, collate
    from overhaul.pairs import corresponding
    from overhaul.recipe.plan import libraries_bytes
    from overhaul.stack import LayerStack
    from overhaul.trace import Patch, patch_grid, states_of

    ids = torch.arange(100, 133)
    labels = torch.full_like(ids, IGNORED)
    labels[-1] = ids[-1]
    true, false = ids.clone(), ids.clone()
    false[26:29] += 1000
    batches = [collate([{"input_ids": one, "labels": labels}]) for one in (true, false)]
    chosen = torch.zeros(1, len(ids), dtype=torch.bool)
    chosen[0, 28] = True
    pair = corresponding("patches", {"first": first, "second": second})
    with pair["first"].opened("stored") as model:
        kept = [state[chosen].clone() for state in states_of(LayerStack.of(model), batches[0]).states]
    with pair["second"].opened("stored") as model:
        blocks = range(len(kept))
        grid = [Patch(into, chosen, kept[source]) for source in blocks for into in blocks]
        found = patch_grid(LayerStack.of(model), batches[1], grid, lambda logits: float(logits[0, 0]))
    one = sum(path.stat().st_size for path in first.glob("*.safetensors"))
    taken = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - libraries_bytes()
    if taken > 1.25 * one:
        raise SystemExit(f"{taken / 1e9:.2f} GB beside the libraries, and one model has {one / 1e9:.2f} GB")
    return f"{len(found)} patches; {taken / one:.2f} times one model's {one / 1e9:.2f} GB, beside the libraries"


def recipe(first: Path, _: Path, out: Path) -> str:
    from overhaul.recipe.check import check
    from overhaul.recipe.plan import libraries_bytes, plan
    from overhaul.recipe.run import run
    from overhaul.recipe.spec import read

    text = {"from": "starter:addition", "limit": 4}
    wanted: dict[str, Any] = {
        "model": str(first),
        "dtype": "bfloat16",
        "materials": {"text": text},
        "steps": [
            {"shrink.drop_layers": {"count": 2, "batch_size": 2}},
            {"shrink.heal": {"steps": 1, "batch_size": 2, "weights": "lora"}},
        ],
    }
    planned = [libraries_bytes() + step.peak_bytes for step in plan(check(read(wanted)), 1e9)]
    steps = run(wanted, out).report["steps"]
    pairs = [(step["name"], ours, step["peak_bytes"]) for step, ours in zip(steps, planned, strict=True)]
    for name, ours, taken in pairs:
        if not 0.75 <= ours / taken <= 1.25:
            raise SystemExit(f"{name}: planned {ours / 1e9:.2f} GB, took {taken / 1e9:.2f} GB")
    return "; ".join(f"{name}: planned {ours / 1e9:.2f} GB, took {taken / 1e9:.2f} GB" for name, ours, taken in pairs)


PARTS: dict[str, Callable[[Path, Path, Path], str]] = {
    each.__name__: each for each in (drop, blend, lines, ties, capture, patches, recipe)
}  # fmt: skip


def child(part: str, folder: Path) -> None:
    """Do one part in this process, with its memory limited; print seconds, peak bytes and what it says."""
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT, LIMIT))
    started = time.perf_counter()
    said = PARTS[part](folder / "first", folder / "second", folder / part)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps([time.perf_counter() - started, peak, said]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parameters", type=float, default=1.1e9)
    parser.add_argument("--part", choices=PARTS, help="only this one")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child[0], Path(options.child[1]))
        return
    table = Table("part", "seconds", "peak memory", "", box=None, pad_edge=False)
    failed = False
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        started = time.perf_counter()
        for seed, name in enumerate(("first", "second")):
            make_llama(folder / name, int(options.parameters), SHARDS, seed)
            _add_tokenizer(folder / name)
        print(f"two checkpoints made in {time.perf_counter() - started:.0f} s", flush=True)
        for part in [options.part] if options.part else PARTS:
            command = [sys.executable, __file__, "--child", part, str(folder)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
            if done.returncode:
                failed = True
                table.add_row(part, "", "", f"[red]failed ({done.returncode})[/]")
            else:
                seconds, peak, said = json.loads(done.stdout.splitlines()[-1])
                table.add_row(part, f"{seconds:.1f}", f"{peak / 1e9:.2f} GB", said)
            shutil.rmtree(folder / part, ignore_errors=True)
    console = Console(width=140)
    console.print(
        f"A Llama of {options.parameters:.3g} parameters in bfloat16, {SHARDS} shards, at most {LIMIT / 2**30:.0f} GiB"
    )
    console.print(table)
    sys.exit(failed)


def _add_tokenizer(folder: Path) -> None:
    from overhaul.models import starters

    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(starters()["docs-llama"] / name, folder / name)


if __name__ == "__main__":
    main()
