"""What all merges do: write the folder, count what moved, and refuse a merge that changes nothing."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from overhaul import weights
from overhaul.errors import RequestError, RunError
from overhaul.merge._kinship import Kinship
from overhaul.models import Checkpoint
from overhaul.weights import Combine, TensorFacts, TensorIndex, Whole

LARGEST = torch.finfo(torch.float32).max
"""What weights are multiplied with is no larger."""


def written(
    method: str, base: Checkpoint, tuned: Sequence[Checkpoint], combine: Combine, out: Path, whole: Whole = False
) -> dict[str, Any]:
    """Stream `combine` into a new folder.

    Args:
        method: for messages.
        base: gives what is not merged: config, tokenizer, integers.
        tuned: the others.
        combine: as for `weights.stream`.
        out: folder to write.
        whole: as for `weights.stream`.

    Returns:
        Facts: how many tensors there are and how many are not the base's, how far the tuned models are from it, and in what
        the folders differ.

    Raises:
        RequestError: as in `weights.stream`.
        RunError: as there, or nothing differs from the base: the folder is then removed.
    """
    moved: set[str] = set()
    lock = threading.Lock()
    kinship = Kinship()

    def watched(tensor: TensorFacts, models: list[Tensor]) -> Tensor:
        kinship.note(tensor.name, len(tensor.shape) > 1, *models)
        made = combine(tensor, models)
        if tensor.name.endswith("running_var") and bool((made < 0).any()):
            raise RunError(
                f"{method}: {tensor.name} became negative, and a variance cannot be. Use smaller coefficients; running "
                "statistics of batch norms are to be measured anew after a merge in any case."
            )
        if tensor.name not in moved and not torch.equal(made.to(tensor.dtype), models[0].to(tensor.dtype)):
            with lock:
                moved.add(tensor.name)
        return made

    weights.stream([base, *tuned], watched, out, whole=whole, told={"name": method})
    if not moved:
        shutil.rmtree(out)
        raise RunError(
            f"{method} changed nothing: every tensor is the base's, {base.source}. Either the tuned checkpoints are the "
            "base, or what is added is lost in rounding to its dtype; check the folders or use larger coefficients."
        )
    index = TensorIndex.of(base)
    numbers = sum(tensor.dtype.is_floating_point for tensor in index.tensors.values())
    names = [f"tuned checkpoint {n + 1}" for n in range(len(tuned))] if len(tuned) > 1 else ["the tuned checkpoint"]
    kin = kinship.facts(method, names, _twice(tuned, names))
    return {
        "tensors": numbers, "tensors_changed": len(moved), **kin, "differences": weights.differences([base, *tuned])
    }  # fmt: skip


def _twice(tuned: Sequence[Checkpoint], names: Sequence[str]) -> list[str]:
    """What is to be said of checkpoints that are one."""
    known = [(one.folder.resolve(), one.seed) for one in tuned]  # a config alone gives a model for each seed
    return [
        f"{names[n]} is {names[known.index(one)]} again, and its change counts once more. Name each folder once, or let "
        "`weights` say so."
        for n, one in enumerate(known)
        if one in known[:n]
    ]


def by_depth(base: Checkpoint, value: Callable[[TensorFacts], float]) -> dict[str, dict[int, float]]:
    """A coefficient at every depth, for `Outcome.layers`: a line for each stack."""
    index = TensorIndex.of(base)
    found: dict[str, dict[int, float]] = {}
    for tensor in index.tensors.values():
        if tensor.dtype.is_floating_point:
            name = "coefficient" if len(index.stacks) < 2 else f"coefficient, {tensor.stack}"
            found.setdefault(name, {})[tensor.depth] = value(tensor)
    return {name: dict(sorted(values.items())) for name, values in found.items()}


def some(method: str, base: Checkpoint, tuned: Sequence[Checkpoint], **factors: float | None) -> int:
    """How many tuned checkpoints there are, for a merge with these numbers.

    Raises:
        RequestError: there is none, all are the base itself, or a number is larger than weights can be.
    """
    if not tuned:
        raise RequestError(f"{method}: there is no tuned checkpoint. Give at least one: tuned=[...].")
    if all((one.source, one.folder) == (base.source, base.folder) for one in tuned):
        raise RequestError(
            f"{method}: the tuned checkpoints are the base itself, {base.source}, so nothing would change. Name the folders "
            "that were fine-tuned from it."
        )
    check_sizes(method, **factors)
    return len(tuned)


def check_sizes(method: str, **factors: float | None) -> None:
    """Refuse factors that no weight can be multiplied with.

    Raises:
        RequestError: one is larger than a weight can be.
    """
    for name, value in factors.items():
        if value is not None and not abs(value) <= LARGEST:
            raise RequestError(f"{method}: {name}={value:g} is larger than a weight can be ({LARGEST:.3g}).")
