"""JSONL to encoded examples, against `datasets`: the same file, the same tokenizer, the same ids and labels, both on disk.

`datasets` is called as its documentation says: `load_dataset("json")`, then `map(batched=True)` with one call of the fast
tokenizer a batch for each column. Both sides begin with an empty cache in every round. Peaks are measured in processes of
their own.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from _timing import alternate, median_ratio, rounds, show

from overhaul import models
from overhaul.data import corpora
from overhaul.data.encode import QA_PROMPT
from overhaul.data.examples import IGNORED
from overhaul.data.materials import examples
from overhaul.recipe import machine

ROWS = 100_000
LENGTH = 256
TARGET = 0.8


def write(folder: Path) -> None:
    """Questions with answers, and passages of prose: rows of both, from the words of the reference."""
    words = " ".join(row["text"] for row in corpora.docs()).split()
    draw = random.Random(0)

    def said(count: int) -> str:
        start = draw.randrange(len(words) - count)
        return " ".join(words[start : start + count])

    with (folder / "qa.jsonl").open("w") as qa, (folder / "text.jsonl").open("w") as text:
        for n in range(ROWS):
            qa.write(json.dumps({"question": said(10) + "?", "answer": said(12), "n": n}) + "\n")
            text.write(json.dumps({"text": said(80), "n": n}) + "\n")


def ours(path: Path, tokenizer: Any) -> Any:
    """By `overhaul.examples`."""
    shutil.rmtree(path.parent / "ours", ignore_errors=True)
    os.environ["OVERHAUL_CACHE"] = str(path.parent / "ours")
    return examples(path, tokenizer, length=LENGTH)


def theirs(path: Path, tokenizer: Any) -> Any:
    """By `datasets.map`."""
    from datasets import disable_progress_bars, load_dataset

    disable_progress_bars()
    shutil.rmtree(path.parent / "theirs", ignore_errors=True)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id

    def qa(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        before = tokenizer([QA_PROMPT.format(question=one) for one in batch["question"]])["input_ids"]
        after = tokenizer([f" {one}" for one in batch["answer"]], add_special_tokens=False)["input_ids"]
        both = list(zip(before, after, strict=True))
        return {
            "input_ids": [[*b, *a, eos] for b, a in both],
            "labels": [[*[IGNORED] * len(b), *a, eos] for b, a in both],
        }

    def text(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        found = tokenizer(batch["text"], add_special_tokens=False)["input_ids"]
        cut = [
            (n, [bos, *ids[i : i + LENGTH - 1]])
            for n, ids in zip(batch["n"], found, strict=True)
            for i in range(0, len(ids), LENGTH - 1)
        ]
        pieces = [ids for _, ids in cut]
        return {"input_ids": pieces, "labels": pieces, "n": [n for n, _ in cut]}

    rows: Any = load_dataset("json", data_files=str(path), split="train", cache_dir=str(path.parent / "theirs"))
    change: Callable[..., Any] = qa if path.stem == "qa" else text
    return rows.map(change, batched=True, remove_columns=["text"] if change is text else None)


def agree(path: Path, tokenizer: Any) -> None:
    """Both make the same examples."""
    mine, other = ours(path, tokenizer), theirs(path, tokenizer)
    # a piece of one token, BOS and nothing to learn, is left out
    other = [row for row in other.select(range(2000)) if len(row["input_ids"]) > 1]
    for item, row in zip(mine.items[: len(other)], other, strict=True):
        if (item["input_ids"].tolist(), item["labels"].tolist()) != (row["input_ids"], row["labels"]):
            raise AssertionError(f"{path.stem}: {row} is encoded in another way")


def peak(side: str, path: Path) -> float:
    """MB that a process takes beyond its libraries while it encodes a file and reads it through once."""
    code = [sys.executable, __file__, "--peak", side, str(path)]
    return float(subprocess.run(code, check=True, capture_output=True, text=True).stdout.split()[-1])


def measure_peak(side: str, path: Path) -> None:
    """In the child: both sides load the same libraries first."""
    import datasets  # noqa: F401

    tokenizer = models.load_processor(models.facts("starter:docs-llama"))
    before = psutil.Process().memory_info().rss
    with machine.measured() as cost:
        made = {"ours": ours, "theirs": theirs}[side](path, tokenizer)
        for n in range(len(made)):
            made[n]
    print((cost.peak_bytes - before) / 1e6)


def main() -> None:
    if sys.argv[1:2] == ["--peak"]:
        return measure_peak(sys.argv[2], Path(sys.argv[3]))
    times = rounds(3, quick=1)
    tokenizer = models.load_processor(models.facts("starter:docs-llama"))
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        for name in ("qa", "text"):
            compare(Path(folder) / f"{name}.jsonl", tokenizer, times)


def compare(path: Path, tokenizer: Any, times: int) -> None:
    """One file by both sides."""
    agree(path, tokenizer)
    seconds = alternate({"overhaul": lambda: ours(path, tokenizer), "datasets": lambda: theirs(path, tokenizer)}, times)
    share = median_ratio(seconds["overhaul"], seconds["datasets"])
    peaks = {side: peak(side, path) for side in ("ours", "theirs")}
    size = path.stat().st_size / 1e6
    show(f"{ROWS:,} rows of {path.stem}, {size:.0f} MB of JSONL", seconds, ROWS // 1000, "1,000 rows", [
        (f"{share:.2f} of the time of datasets.map (target: at most {TARGET})", share <= TARGET),
        (f"{peaks['ours']:.0f} MB beyond the libraries, where datasets takes {peaks['theirs']:.0f} MB", None),
    ])  # fmt: skip


if __name__ == "__main__":
    main()
