"""What a recipe will take, from configs, headers and data alone: steps, peak memory, time.

1. The time is a range. Its floor is arithmetic at the speed of a short matrix multiplication on this machine, in the
   dtype of the run.
2. Memory counts weights, gradients, optimizer state, the activations of the largest of some batches, and outputs that are
   cached. In a training on one role, activations and gradients take turns: one grows as the other falls; the terms on a
   second role run while the first one's gradients are there. A mask on every weight takes a byte for each. With AdamW a
   trained parameter takes 16 bytes (weight, gradient, two moments, all in float32); of bfloat16 18, with a float32 master
   beside the weight. A float16 model is float32 while it trains, what is frozen in it too. Adapters are always float32.
3. The interpreter and its libraries are listed apart; on an accelerator they do not count.
"""

from __future__ import annotations

import io
import math
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import add
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from overhaul.importance import VALUES_AT_ONCE
from overhaul.judge.likelihood import CPU_BATCH_TOKENS, LOGITS
from overhaul.models import DTYPES, Checkpoint
from overhaul.recipe.ahead import look_ahead
from overhaul.recipe.check import Checked, Step, check
from overhaul.recipe.materials import model_of
from overhaul.recipe.spec import read
from overhaul.report.numbers import humanise

DRAWN_BATCHES, MOST_DRAWN = 32, 4096  # examples of a batch; a larger one is as many times as large
STREAMED_BYTES_PER_SECOND = 1e9  # from and to a local disk that has them at hand
STREAMED_BYTES = 300_000_000  # pieces of tensors and the pages of their files, whatever the size of the models
LIBRARIES_BYTES = (
    350_000_000  # after importing torch, transformers' generation, accelerate and what runs a recipe: 351 MB
)
SLOWER, SETUP_SECONDS = 5, 5.0
"""How many times its floor a step may take, as small matrices leave a processor waiting; what comes before its work."""
KERNELS_BYTES = 40_000_000  # code of kernels and libraries that only the first steps page in, seen over several runs


@dataclass(frozen=True)
class Planned:
    """One step's estimate: bytes at the peak, and the least seconds.

    Attributes:
        name: the step's.
        reads: of data, how many examples.
        others: the names of the checkpoints and products that it reads; how many examples a product has is not known.
        knobs: the step's.
    """

    name: str
    reads: dict[str, int]
    others: dict[str, tuple[str, ...]]
    knobs: Mapping[str, Any]
    peak_bytes: int
    seconds: float

    @property
    def said_time(self) -> str:
        """The floor, and what small matrices and a busy machine make of it."""
        return f"{duration(self.seconds)} to {duration(SLOWER * self.seconds + SETUP_SECONDS)}"


def duration(seconds: float) -> str:
    """In the unit that a person would say it in."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


@dataclass(frozen=True)
class Plan:
    """A recipe that is in order: what it starts from, an estimate for each step, and what is odd about it.

    Attributes:
        model: what it starts from.
        steps: the estimates.
        around_bytes: what opening, judging and saving a model takes between the steps.
        warnings: what is no error.
    """

    model: Checkpoint
    steps: list[Planned]
    around_bytes: int
    warnings: list[str]

    def print(self, console: Console) -> None:
        """As `overhaul plan` prints it."""
        table = Table("step", "reads", "peak memory", "time, estimated", box=None, pad_edge=False)
        for step in self.steps:
            reads = [f"{role} ({count})" for role, count in step.reads.items()]
            reads += [role if names == (role,) else f"{role}: {' '.join(names)}" for role, names in step.others.items()]
            peak = humanise(step.peak_bytes, "bytes")
            table.add_row(step.name, escape(", ".join(reads)), peak, step.said_time)
        facts = self.model
        console.print(
            f"{escape(facts.source)}: {facts.architecture}, {humanise(facts.parameters, 'parameters')} parameters in "
            f"{facts.dtype}, {humanise(facts.bytes, 'bytes')} on disk"
        )
        console.print(table)
        between = humanise(self.around_bytes, "bytes")
        console.print(f"Between the steps, opening, judging and saving the model take {between}.")
        console.print(
            f"Beside each peak, the interpreter and its libraries take {humanise(libraries_bytes(), 'bytes')}."
        )
        for warning in self.warnings:
            console.print(f"[yellow]Note:[/] {escape(warning)}")

    def __repr__(self) -> str:
        console = Console(width=110, file=io.StringIO())
        self.print(console)
        return console.file.getvalue().rstrip()  # pyright: ignore[reportAttributeAccessIssue]


def planned(source: str | Path | Mapping[str, Any]) -> Plan:
    """Check a recipe and estimate its steps, before any weight is read: `overhaul plan` from Python.

    Raises:
        RequestError: the recipe or its data is wrong; the message says what to write instead.
    """
    checked = check(read(source))
    return Plan(checked.model, plan(checked), around_bytes(checked), checked.warnings)


def plan(checked: Checked, flops_per_second: float | None = None) -> list[Planned]:
    """Look ahead at every step and estimate it. `flops_per_second` is measured in a fraction of a second if not given.

    Raises:
        RequestError: a run would refuse it, or a comparison one of its methods.
    """
    look_ahead(checked)
    if checked.recipe.compare:
        from overhaul.recipe.compare import variants_of

        for variant in variants_of(checked):
            look_ahead(variant.checked)
    speed = flops_per_second or matmul_speed(dtype=DTYPES[checked.recipe.dtype])
    return [_estimate(step, checked, speed) for step in checked.steps]


def disk_bytes(checked: Checked) -> int:
    """What a run of the recipe writes: a model for each step and one more, two checkpoints of the largest training."""
    checkpoints = [
        _checkpoint_bytes(step, checked) for step in checked.steps if step.method.memory_with(step.knobs) == "training"
    ]
    return checked.model.bytes * (1 + len(checked.steps)) + 2 * max([0, *checkpoints])


def _checkpoint_bytes(step: Step, checked: Checked) -> int:
    """Weights, two moments and, below float32, masters of what a step trains; the new one is written beside the old."""
    width = DTYPES[checked.recipe.dtype].itemsize
    rank, trained = _trained(step, checked.model)
    return trained * ((4 if rank or width == 4 else width + 4) + 8)


def around_bytes(checked: Checked) -> int:
    """What opening, judging and saving a model takes between the steps: its weights, and a copy of its files or a batch."""
    model, shape = checked.model, Shape.of(checked.model.config)
    width = DTYPES[checked.recipe.dtype].itemsize
    tokens = min(CPU_BATCH_TOKENS, LOGITS // max(1, shape.logits)) if checked.requests else 0
    judged = tokens * (width * shape.live + shape.logits * (width + 8))
    return model.parameters * width + max(model.bytes, judged)


def libraries_bytes() -> int:
    """What a run's process holds before any model: this one's libraries, a training's at the least, and its kernels."""
    return max(psutil.Process().memory_info().rss, LIBRARIES_BYTES) + KERNELS_BYTES


def matmul_speed(size: int = 512, repeats: int = 5, dtype: torch.dtype = torch.float32) -> float:
    """FLOP per second of a matrix product here: the best of a few, each a few milliseconds."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a = torch.ones(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        (a @ a)[0, 0].item()
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def largest_batch(lengths: Sequence[int], size: int) -> int:
    """Positions in the largest forward among some batches, which are split so that none is padded to twice its length."""
    draw = random.Random(0)
    largest = 1
    drawn = min(size, MOST_DRAWN)
    for _ in range(DRAWN_BATCHES):
        batch = sorted(draw.choices(lengths, k=drawn), reverse=True)
        while batch:
            part = [length for length in batch if 2 * length >= batch[0]]
            largest = max(largest, len(part) * part[0])
            batch = batch[len(part) :]
    return largest * size // drawn


@dataclass(frozen=True)
class Shape:
    """What a network keeps per position, in numbers.

    Attributes:
        kept: for a backward pass, in all blocks together.
        live: at once, in one block.
        logits: the vocabulary, or 0.
        hidden: the width.
    """

    kept: int
    live: int
    logits: int
    hidden: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Shape:
        """From config.json, by the names that transformers uses. What is not named there counts as a usual ratio."""
        config = {**config, **config.get("text_config", {})}
        hidden = config.get("hidden_size") or config.get("n_embd") or config.get("d_model") or 0
        hidden = hidden or sum(config.get("hidden_sizes", ()))
        depth = config.get("num_hidden_layers") or config.get("n_layer") or config.get("num_layers") or 0
        depth = depth or sum(config.get("depths", ())) or 1
        inner = config.get("intermediate_size") or config.get("d_ff") or 4 * hidden
        # kept: two norms' inputs and outputs, queries, keys, values, the attention's output; four of the MLP's width
        return cls(depth * (8 * hidden + 4 * inner), 4 * hidden + 3 * inner, config.get("vocab_size", 0), hidden)


def _estimate(step: Step, checked: Checked, speed: float) -> Planned:
    model, shape = checked.model, Shape.of(checked.model.config)
    dtype, memory = checked.recipe.dtype, step.method.memory_with(step.knobs)
    width = DTYPES[dtype].itemsize
    computed = 4 if dtype == "float16" and memory == "training" else width
    read = {
        role: [part for name in step.names(role) for part in checked.rows[name]]
        for role in step.reads
        if all(name in checked.rows for name in step.names(role))
    }
    lengths = {
        role: [
            n for spec, rows in parts for n in list(chain.from_iterable(checked.positions(spec, rows)))[: spec.limit]
        ]
        for role, parts in read.items()
    }
    size = int(step.knobs.get("batch_size") or 16)
    positions = max([1, *(largest_batch(each, size) for each in lengths.values() if each)])
    trains = memory in ("gradient", "training")
    # logits stand several times: raw, shifted, log-softmax and its gradient in float32
    logits = shape.logits * (16 if trains else width + 4)
    activations = positions * (computed * (shape.kept if trains else shape.live) + logits)
    models = sum(len(step.names(role.name)) for role in step.method.roles if role.kind == "model")
    if memory != "stream":  # its own model, and of those that are opened one by one the one at hand
        models += 1 + any(role.kind == "checkpoint" and role.name in step.reads for role in step.method.roles)
    models += step.method.copies(step.knobs)
    rank, trained = _trained(step, model)
    beside = 4 if rank or dtype == "bfloat16" else 0  # adapters beside the model, masters beside its weights
    single = step.method.singly(step.knobs) and 2 * trained <= VALUES_AT_ONCE
    held = {
        "stream": STREAMED_BYTES,
        "forward": activations,
        # gradients of single examples, and their squares
        "gradient": 8 * trained + max(width * trained, activations, 8 * VALUES_AT_ONCE * single),
        "training": (8 + beside) * trained + (max, add)[len(lengths) > 1](4 * trained, activations),
    }[memory]
    cached = width * shape.hidden * sum(map(sum, lengths.values())) if models > 1 else 0
    steps = step.knobs.get("steps")
    means = [sum(each) / max(1, len(each)) for each in lengths.values()]
    tokens = steps * size * sum(means) if steps else sum(map(sum, lengths.values()))
    seconds = tokens * model.parameters * (6 if trains else 2) / speed
    if memory == "stream":
        read_bytes = sum(models_read.bytes for models_read in _streamed(step, checked))
        seconds = (read_bytes + model.bytes) / STREAMED_BYTES_PER_SECOND
    masks = model.parameters * ("tensors" in step.method.makes.values())
    peak = model.parameters * (width * models + computed - width) + held + cached + masks
    raw = {role.name for role in step.method.roles if role.kind == "rows"}  # read as they are: no examples are made
    counts = {role: sum(len(rows) for _, rows in read[role]) if role in raw else len(lengths[role]) for role in read}
    others = {role: tuple(step.names(role)) for role in step.reads if role not in counts}
    return Planned(step.name, counts, others, step.knobs, peak, seconds)


def _streamed(step: Step, checked: Checked) -> list[Checkpoint]:
    """The checkpoints that a step reads from their files."""
    names = [name for role in step.method.roles if role.is_model for name in step.names(role.name)]
    outside = [model_of(checked.references[name]) for name in names if "model" in checked.references[name]]
    return [checked.model, *outside]


def _trained(step: Step, model: Checkpoint) -> tuple[int | None, int]:
    """The rank of the adapters that a step trains, None where it trains the weights; how many numbers train."""
    rank = step.method.rank(step.knobs)
    return rank, model.parameters if rank is None else _adapters(model.shapes, rank)


def _adapters(shapes: Mapping[str, tuple[int, ...]], rank: int) -> int:
    """Numbers in adapters of this rank on every matrix of the blocks."""
    inside = (
        shape
        for name, shape in shapes.items()
        if len(shape) in (2, 3) and any(part.isdigit() for part in name.split("."))
    )
    return sum(rank * math.prod(shape[:-2]) * sum(shape[-2:]) for shape in inside)
