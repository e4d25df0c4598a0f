"""A text file that is far larger than what training on it holds: `python benchmarks/large_text.py --gb 2`.

States the peak of a process while it encodes the file, trains some steps on it and opens it again. "Own" is memory that
cannot be given back; the rest of the peak is the mapped file, which the system takes back when it needs room.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from overhaul import models
from overhaul.data import corpora
from overhaul.data.materials import examples
from overhaul.fit import fit
from overhaul.objectives import cross_entropy
from overhaul.recipe import machine

STEPS, BATCH = 30, 8


def write(path: Path, size: float) -> None:
    """Reference prose over and over, each time from another place on."""
    text = "\n\n".join(row["text"] for row in corpora.docs())
    with path.open("w", encoding="utf-8") as file:
        copy = 0
        while file.tell() < size:
            file.write(f"Copy {copy}. {text[copy % 5000 :]}\n")
            copy += 1


def megabytes(name: str) -> float:
    """One line of Linux's account of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith(name))


@contextmanager
def watched(what: str, console: Console) -> Iterator[None]:
    """Print seconds and peaks of a block."""
    before, own, running = megabytes("VmRSS"), [megabytes("RssAnon")], True

    def watch() -> None:
        while running:
            own.append(megabytes("RssAnon"))
            time.sleep(0.02)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        with machine.measured() as cost:
            yield
    finally:
        running = False
        watcher.join()
    console.print(
        f"{what}: {cost.seconds:.0f} s, peak {cost.peak_bytes / 1e6:.0f} MB where the process held {before:.0f} MB before; "
        f"own memory {own[0]:.0f} MB, at most {max(own):.0f} MB"
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gb", type=float, default=2.0, help="size of the text")
    size = 1e9 * parser.parse_args().gb
    console = Console(width=140)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["OVERHAUL_CACHE"] = folder
        path = Path(folder) / "large.txt"
        write(path, size)
        model, tokenizer = models.open_model("starter:docs-llama")
        with watched(f"encoding {path.stat().st_size / 1e9:.2f} GB of text", console):
            data = examples(path, tokenizer)
        with watched(f"{STEPS} steps on {len(data):,} examples", console):
            fit(model, [cross_entropy("text")], {"text": data}, steps=STEPS, batch_size=BATCH, lr=1e-4)
        with watched("opening it again", console):
            examples(path, tokenizer)


if __name__ == "__main__":
    main()
