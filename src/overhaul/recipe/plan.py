"""What a recipe will take, from configs, headers and data alone: steps, peak memory, time.

The time is a floor: arithmetic at the speed of a short matrix multiplication on this machine. Memory counts weights,
gradients, optimizer state and the activations of one batch; the interpreter and its libraries are listed apart.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from overhaul.data.materials import Row, Source, form_of
from overhaul.models import DTYPES
from overhaul.recipe.check import Checked, Step

COPIES: Mapping[str, int] = {"forward": 0, "gradient": 3, "training": 3}
"""Float32 arrays of the model's size that a step holds beside its weights: none; the gradient and two importances; the
gradient and AdamW's two moments."""


@dataclass(frozen=True)
class Planned:
    """One step's estimate: bytes at the peak, and the least seconds."""

    name: str
    reads: dict[str, int]
    knobs: Mapping[str, Any]
    peak_bytes: int
    seconds: float


def plan(checked: Checked, flops_per_second: float | None = None) -> list[Planned]:
    """Estimate every step. `flops_per_second` is measured in a fraction of a second if not given."""
    speed = flops_per_second or matmul_speed()
    return [_estimate(step, checked, speed) for step in checked.steps]


def libraries_bytes() -> int:
    """What this process holds before any model: the interpreter and its libraries."""
    return psutil.Process().memory_info().rss


def matmul_speed(size: int = 512, repeats: int = 5) -> float:
    """FLOP per second of a float32 matrix product here: the best of a few, each a few milliseconds."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a = torch.ones(size, size, device=device)
    best = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        (a @ a)[0, 0].item()
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def tokens_of(spec: Source, row: Row) -> int:
    """About how many positions an example takes: three characters a token, text cut at its length, an image's patches."""
    form = form_of(spec, [row])
    if form == "text":
        return spec.length
    if form == "image":
        return 64
    said = (
        row[spec.column("messages")] if form == "chat" else [row[spec.column("question")], row[spec.column("answer")]]
    )
    return (len(str(said)) + len(spec.prompt)) // 3 + 1


def _estimate(step: Step, checked: Checked, speed: float) -> Planned:
    config, count = checked.model.config, checked.model.parameters
    weights = count * DTYPES[checked.recipe.dtype].itemsize
    models = 1 + any(m.kind == "model" and m.name in step.reads for m in step.method.roles)
    read = {role: checked.rows[name] for role, name in step.reads.items() if name in checked.rows}
    lengths = {role: [tokens_of(spec, row) for spec, rows in parts for row in rows] for role, parts in read.items()}
    longest = max([1, *(max(each) for each in lengths.values())])
    batch = int(step.knobs.get("batch_size") or 16)
    hidden, depth = config.get("hidden_size", 0) or config.get("n_embd", 0), config.get("num_hidden_layers", 1) or 1
    trains = step.method.memory != "forward"
    # about 16 activations of the hidden size are kept per block for a backward, 4 live at once without one; the
    # logits stand three times (raw, log-softmax, gradient)
    kept = 16 * depth if trains else 4
    activations = 4 * batch * longest * (kept * hidden + (3 if trains else 1) * config.get("vocab_size", 0))
    peak = weights * models + COPIES[step.method.memory] * 4 * count + activations
    means = [sum(each) / len(each) for each in lengths.values()]
    steps = step.knobs.get("steps")
    tokens = steps * batch * sum(means) if steps else sum(map(sum, lengths.values()))
    seconds = tokens * count * (6 if trains else 2) / speed
    return Planned(step.name, {role: len(each) for role, each in lengths.items()}, step.knobs, peak, seconds)
