"""What steps make beside the model, kept so that a later step reads it: examples, rows, tensors, checkpoints, plain JSON.

STEP/made/NAME.jsonl, NAME.safetensors, NAME.json, or the folder NAME of a checkpoint or of examples
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from overhaul import models
from overhaul.data.examples import Examples
from overhaul.errors import RunError
from overhaul.method import Product
from overhaul.outcome import plain

_ENDINGS: Mapping[Product, str] = {"rows": ".jsonl", "tensors": ".safetensors", "json": ".json"}
_ALONE = "value"


def place_of(folder: Path, name: str, kind: Product) -> Path:
    """Where a step keeps a product."""
    return folder / "made" / f"{name}{_ENDINGS.get(kind, '')}"


def write(value: Any, kind: Product, place: Path, processor: Any = None) -> int | None:
    """Keep a product at its place.

    Args:
        value: Examples; rows; a tensor or tensors by name; a network, or the folder of a checkpoint, which is moved; what
            JSON can hold.
        kind: which of these.
        place: must not exist.
        processor: of a network that is saved.

    Returns:
        How many there are, where that has a meaning.

    Raises:
        RunError: the value is not of its kind.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        return _WRITERS[kind](value, place, processor)
    except (TypeError, ValueError, AttributeError, KeyError, RuntimeError) as error:
        raise RunError(f"the product {place.stem!r} cannot be kept as {kind}: {error}") from error


def read(kind: Product, place: Path, processor: Any = None) -> Any:
    """What `write` kept; a checkpoint comes back as its folder with its facts, examples with `processor`."""
    if kind == "rows":
        return [json.loads(line) for line in place.read_text(encoding="utf-8").split("\n") if line]
    if kind == "json":
        return json.loads(place.read_text(encoding="utf-8"))
    if kind == "tensors":
        with safe_open(place, framework="pt") as file:
            alone = _ALONE in (file.metadata() or {})
        tensors = load_file(place)
        return tensors[_ALONE] if alone else tensors
    if kind == "checkpoint":
        return models.facts(place)
    return _read_examples(place, processor)


def _write_rows(rows: Sequence[Mapping[str, Any]], place: Path, _: Any) -> int:
    lines = [_json(dict(row), ensure_ascii=False) for row in rows]
    place.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return len(lines)


def _json(value: Any, **options: Any) -> str:
    """What reads back as it was: JSON would turn other keys into text, and NaN is none."""
    _check_keys(value)
    return json.dumps(value, allow_nan=False, **options)


def _check_keys(value: Any) -> None:
    if isinstance(value, Mapping):
        for key, one in value.items():
            if not isinstance(key, str):
                raise TypeError(f"the key {key!r} is no text")
            _check_keys(one)
    elif isinstance(value, list | tuple):
        for one in value:
            _check_keys(one)


def _write_json(value: Any, place: Path, _: Any) -> int | None:
    place.write_text(_json(value, indent=1) + "\n", encoding="utf-8")
    return len(value) if isinstance(value, list | dict) else None


def _write_tensors(value: Tensor | Mapping[str, Tensor], place: Path, _: Any) -> int:
    alone = isinstance(value, Tensor)
    tensors = {_ALONE: value} if alone else dict(value)
    # a copy each: several may be views of one
    copies = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    save_file(copies, place, {_ALONE: ""} if alone else None)
    return len(tensors)


def _write_checkpoint(value: Any, place: Path, processor: Any) -> None:
    if isinstance(value, nn.Module):
        models.save(value, processor, place)
    else:
        os.replace(getattr(value, "folder", value), place)


def _write_examples(examples: Examples, place: Path, _: Any) -> int:
    """Every column's values end to end with their shapes beside them; rows as JSON lines."""
    place.mkdir()
    rows = [{key: kept for key, value in row.items() if _is_plain(kept := _known(value))} for row in examples.rows]
    _write_rows(rows, place / "rows.jsonl", None)
    tensors: dict[str, Tensor] = {}
    for name in examples.items[0] if len(examples) else ():
        values = [item[name] for item in examples.items]
        if len(dtypes := {value.dtype for value in values}) > 1:
            raise ValueError(f"the column {name!r} is of several dtypes: {', '.join(sorted(map(str, dtypes)))}")
        tensors[name] = torch.cat([value.reshape(-1) for value in values])
        tensors[f"{name}.shape"] = torch.tensor([list(value.shape) for value in values], dtype=torch.int64)
    save_file(tensors or {"nothing": torch.zeros(0)}, place / "examples.safetensors")
    return len(examples)


def _known(value: Any) -> Any:
    """A value of a row as JSON has it: plain numbers, and None where a file of numbers had none (NaN)."""
    value = plain(value)
    return None if isinstance(value, float) and math.isnan(value) else value


def _is_plain(value: Any) -> bool:
    """Whether JSON holds it; a picture stands in the tensors already."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True


def _read_examples(place: Path, processor: Any) -> Examples:
    rows = read("rows", place / "rows.jsonl")
    items: list[dict[str, Tensor]] = [{} for _ in rows]
    with safe_open(place / "examples.safetensors", framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 (the file is no mapping)
            if f"{name}.shape" not in file.keys():  # noqa: SIM118
                continue
            values, shapes = file.get_tensor(name), file.get_tensor(f"{name}.shape")
            sizes = shapes.prod(dim=1).tolist()
            parts = values.split(sizes)
            for item, value, shape in zip(items, parts, shapes.tolist(), strict=True):
                item[name] = value.reshape(shape).clone()
    return Examples(items, rows, processor)


_WRITERS = {
    "rows": _write_rows,
    "json": _write_json,
    "tensors": _write_tensors,
    "checkpoint": _write_checkpoint,
    "examples": _write_examples,
}
