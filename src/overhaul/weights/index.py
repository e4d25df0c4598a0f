"""What a checkpoint holds, by config.json and safetensors headers alone: where every tensor lies and at which depth.

1. What counts is what `from_pretrained` would read: the files that model.safetensors.index.json names, else
   model.safetensors, else all there are. Anything that could be read in two ways is refused.
2. A live model has the same index, so that one function serves files and models in memory.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from overhaul.checkpoints import Checkpoint
from overhaul.checkpoints import header as header_of
from overhaul.checkpoints import listed as _listed
from overhaul.errors import RequestError
from overhaul.models import facts, planned
from overhaul.weights.depths import Places

BY_WORDS = (
    "In a merge, write tokenizer: base (or union), in a mergekit file tokenizer_source: base (or union), which goes by the "
    "words."
)
LEAVE_WORDS = (
    "In functions of `weights`, leave these tensors as the first model has them: "
    "`only=lambda t: 0 <= t.depth < t.blocks`"
)
_SIZE = re.compile(r"size|layer|head|width|depth|expert|channel|rank|position|hidden|intermediate|dim|^n_|^d_|^num_")
Source = str | Path | Checkpoint
"""A checkpoint: a folder, a hub name, `starter:NAME`, or one whose facts are known already."""

DTYPE_CODES: Mapping[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def facts_of(source: Source) -> Checkpoint:
    """What is known of a checkpoint before any weight is read."""
    return source if isinstance(source, Checkpoint) else facts(source)


@dataclass(frozen=True)
class TensorFacts:
    """One tensor of a model.

    Attributes:
        name: as stored, or as the live model names it.
        shape: its sizes.
        dtype: as stored.
        places: of all tensors of its model.
        file: where it lies; None in a live model.
        offset: bytes from the start of the file to its first number.
        start: how many of its numbers lie before those that are given with it, where they are a piece of it.
        rows: where it is not stored so: tensors, each with the rows of it (-1 for none) whose mean is the row of this one.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    places: Places = field(repr=False)
    file: Path | None = None
    offset: int = 0
    start: int = 0
    rows: tuple[tuple[TensorFacts, Any], ...] = field(default=(), repr=False, compare=False)

    @property
    def stack(self) -> str:
        """Path of the stack it is counted to; "" where the model has none."""
        return self.places[self.name][0]

    @property
    def depth(self) -> int:
        """Its block, from 0; -1 before the first (embeddings), `blocks` after the last (final norm, head). See `share`."""
        return self.places[self.name][1]

    @property
    def blocks(self) -> int:
        """Number of blocks in its stack."""
        return self.places[self.name][2]

    @property
    def share(self) -> float:
        """The share of the blocks that lie before it, for ramps over depth: 0 before and at the first block, 1 after all."""
        return max(self.depth, 0) / self.blocks if self.blocks else 0.0

    @property
    def numbers(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Size where it is stored."""
        return self.numbers * self.dtype.itemsize


@dataclass(frozen=True)
class TensorIndex:
    """All tensors of a model, in the order in which they are stored. Create it with `of`.

    Attributes:
        source: as the user wrote it, or the class of a live model.
        folder: where the files lie; None for a live model.
        config: config.json.
        tensors: by name.
    """

    source: str
    folder: Path | None
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorFacts]

    @classmethod
    def of(cls, source: Source | nn.Module) -> TensorIndex:
        """Index a checkpoint by its headers, or a live model by its state dict.

        Raises:
            RequestError: files are missing, damaged or contradict each other, or a dtype is one to copy and not to count
                with (a quantised checkpoint).
        """
        if isinstance(source, nn.Module):
            return _of_model(source)
        known = facts_of(source)
        if known.is_adapter or known.is_new:
            kind = "an adapter" if known.is_adapter else "a config without weights"
            raise RequestError(
                f"{known.source} is {kind}. Open and save it first, and give that folder: its tensors are read."
            )
        found: dict[str, tuple[Path, int, dict[str, Any]]] = {}
        for path in known.weight_files:
            header = header_of(path)
            start = path.stat().st_size - max(entry["data_offsets"][1] for entry in header.values())
            for name in sorted(header, key=lambda name: header[name]["data_offsets"][0]):
                found[name] = (path, start, header[name])
        where = Places(found, lambda: planned(known), known.config)
        tensors = {name: _stored(name, *entry, where) for name, entry in found.items()}
        if known.config.get("quantization_config"):
            raise RequestError(
                f"{known.source} is quantised (`quantization_config` in config.json): its numbers are codes, and none to "
                "count with. Open it, save the plain model, and give that folder."
            )
        return cls(known.source, known.folder, known.config, tensors)

    @property
    def stacks(self) -> dict[str, int]:
        """Number of blocks of every stack, by its path."""
        return {tensor.stack: tensor.blocks for tensor in self.tensors.values() if tensor.stack}


def _of_model(model: nn.Module) -> TensorIndex:
    state = model.state_dict()
    where = Places(list(state), lambda: model)
    config: Any = getattr(model, "config", None)
    tensors = {name: TensorFacts(name, tuple(t.shape), t.dtype, where) for name, t in state.items()}
    return TensorIndex(type(model).__name__, None, config.to_dict() if config is not None else {}, tensors)


def _stored(name: str, path: Path, start: int, entry: Mapping[str, Any], where: Places) -> TensorFacts:
    dtype = DTYPE_CODES.get(entry["dtype"])
    if dtype is None:
        raise RequestError(
            f"{path}: {name} is stored as {entry['dtype']}, which is a code and not a number to count with. Load the model "
            "with transformers, dequantise it, save it, and give that folder."
        )
    return TensorFacts(name, tuple(entry["shape"]), dtype, where, path, start + entry["data_offsets"][0])


def check_alike(indexes: Sequence[TensorIndex], needed: Callable[[TensorFacts], bool]) -> None:
    """Refuse models whose tensors do not correspond.

    Args:
        indexes: the models; the others are compared with the first.
        needed: which tensors of the first have to have counterparts.

    Raises:
        RequestError: names, shapes or kinds of numbers differ.
    """
    first = indexes[0]
    ours = {name: tensor for name, tensor in first.tensors.items() if needed(tensor)}
    for other in indexes[1:]:
        lacking = [name for name in ours if name not in other.tensors]
        extra = [name for name, tensor in other.tensors.items() if name not in first.tensors and needed(tensor)]
        if lacking or extra:
            parts = [f"{other.source} lacks {_listed(lacking)}"] * bool(lacking)
            parts += [f"{first.source} lacks {_listed(extra)}"] * bool(extra)
            said = "".join(f"{one}. " for one in sizes_that_differ(first, other))
            raise RequestError(
                f"{first.source} and {other.source} do not have the same tensors: {'; '.join(parts)}. {said}Give "
                "checkpoints of one architecture, saved by the same class."
            )
        _check_shapes(first, other, [name for name in ours if ours[name].shape != other.tensors[name].shape])
        for name, tensor in ours.items():
            theirs = other.tensors[name].dtype
            if theirs != tensor.dtype and not (theirs.is_floating_point and tensor.dtype.is_floating_point):
                raise RequestError(
                    f"{name} is {tensor.dtype} in {first.source} and {theirs} in {other.source}, which cannot be counted "
                    "with together. Save both in the same dtype."
                )


def _check_shapes(first: TensorIndex, other: TensorIndex, differing: Sequence[str]) -> None:
    if not differing:
        return
    shapes = [(first.tensors[name].shape, other.tensors[name].shape) for name in differing]
    listed = [f"{name} {list(a)} and {list(b)}" for name, (a, b) in zip(differing, shapes, strict=True)]
    rows = vocabulary(first.config), vocabulary(other.config)
    if all(a[1:] == b[1:] and (a[:1], b[:1]) == (rows[:1], rows[1:]) for a, b in shapes):
        raise RequestError(
            f"{first.source} and {other.source} have vocabularies of {rows[0]} and {rows[1]} tokens: {_listed(listed)}. "
            f"{BY_WORDS} Else bring both to one size "
            f"(`model.resize_token_embeddings({max(filter(None, rows))})`, then save). {LEAVE_WORDS}."
        )
    said = "".join(f"{one}. " for one in sizes_that_differ(first, other))
    raise RequestError(
        f"{first.source} and {other.source} have tensors of different shapes: {_listed(listed)}. {said}Give checkpoints of "
        "one architecture and size."
    )


class Configured(Protocol):
    """What has a name and a config: a checkpoint, or its index."""

    @property
    def source(self) -> str:
        """As the user wrote it."""
        ...

    @property
    def config(self) -> Mapping[str, Any]:
        """config.json."""
        ...


def architecture(config: Mapping[str, Any]) -> str | None:
    """The class that a config names."""
    return (config.get("architectures") or [config.get("_class_name")])[0]


def sizes_that_differ(first: Configured, other: Configured) -> list[str]:
    """Architecture, widths and depths that two configs do not agree on, a sentence each with both numbers."""
    kinds = [architecture(one.config) for one in (first, other)]
    if kinds[0] != kinds[1]:
        return [f"{first.source} is a {kinds[0]}, {other.source} a {kinds[1]}"]
    ours, theirs = _sizes(first.config), _sizes(other.config)
    differing = [key for key in ours if key in theirs and ours[key] != theirs[key]]
    return [f"{key} is {ours[key]} in {first.source} and {theirs[key]} in {other.source}" for key in differing]


def _sizes(config: Mapping[str, Any], prefix: str = "") -> dict[str, int]:
    """The whole numbers of a config that say how large something is."""
    found: dict[str, int] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            found |= _sizes(value, f"{prefix}{key}.")
        elif type(value) is int and _SIZE.search(key) and not key.endswith("token_id"):
            found[prefix + key] = value
    return found


def vocabulary(config: Mapping[str, Any]) -> int | None:
    """How many rows of words a model has."""
    return config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")
