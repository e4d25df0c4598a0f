"""Encoded examples in an Arrow stream that is mapped into memory; `datasets.Dataset.from_file` opens it too.

Token ids are 32-bit integers, the places where loss begins and ends stand for the labels, and a row is JSON. A stream lies
in the cache under the hash of the file, the options and the tokenizer that it was made with: a second run encodes nothing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from overhaul.data.examples import IGNORED, SEQUENCES, Encoded, Examples
from overhaul.data.lazy import View, sha
from overhaul.errors import RequestError


def store(parts: Iterator[Examples], path: Path) -> None:
    """Write examples part by part as an Arrow stream; a file that was begun and not finished does not count."""
    import pyarrow as pa

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    writer = None
    try:
        with pa.OSFile(str(partial), "wb") as sink:
            for part in parts:
                if not len(part.items):
                    continue
                batch = _record_batch(pa, part)
                writer = writer or pa.ipc.new_stream(sink, batch.schema)
                writer.write_batch(batch)
            if writer is None:  # nothing is left once encoded
                writer = pa.ipc.new_stream(sink, pa.schema([("row", pa.large_string())]))
            writer.close()
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _record_batch(pa: Any, part: Examples) -> Any:
    columns: dict[str, Any] = {}
    for ids in (name for name in SEQUENCES.values() if name in part.items[0]):
        labels = ids.replace("input_ids", "labels")
        tokens, targets = (torch.cat([item[name] for item in part.items]).numpy() for name in (ids, labels))
        ends = np.cumsum([0, *(item[ids].shape[0] for item in part.items)], dtype=np.int32)
        columns[ids] = pa.ListArray.from_arrays(ends, tokens.astype(np.int32))
        for name, places in zip(("from", "until"), _bounds(tokens, targets, ends), strict=True):
            columns[f"{labels}_{name}"] = pa.array(places, pa.int32())
    columns["row"] = pa.array(map(_json, part.rows), pa.large_string())
    return pa.record_batch(columns)


_json = json.JSONEncoder(ensure_ascii=False).encode


def _bounds(tokens: np.ndarray, labels: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where loss begins and ends in each example: labels are the tokens between, and ignored elsewhere."""
    lengths, counts = np.diff(ends), np.concatenate([[0], np.cumsum(labels != IGNORED)])
    learnt = counts[ends[1:]] - counts[ends[:-1]]
    places = np.concatenate([np.flatnonzero(labels != IGNORED), [len(labels)]])
    first = np.where(learnt > 0, places[counts[ends[:-1]]] - ends[:-1], lengths)
    here = np.arange(len(tokens)) - np.repeat(ends[:-1], lengths)
    ignored = (here < np.repeat(first, lengths)) | (here >= np.repeat(first + learnt, lengths))
    if not np.array_equal(labels, np.where(ignored, IGNORED, tokens)):
        raise RequestError(
            "A large material can only be of a form in which loss falls on tokens that follow each other."
        )
    return first, first + learnt


def opened(path: Path, key: str) -> tuple[View[Encoded], View[dict[str, Any]]]:
    """What `store` wrote, mapped into memory: items and rows."""
    import pyarrow as pa

    table = pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
    batches = table.to_batches()
    ends = np.cumsum([batch.num_rows for batch in batches]) if batches else np.zeros(1, dtype=np.int64)
    names = [name for name in SEQUENCES.values() if name in table.column_names]
    held = [
        {
            name: (
                batch.column(name).values.to_numpy(),
                batch.column(name).offsets.to_numpy(),
                *(batch.column(f"{name.replace('input_ids', 'labels')}_{end}").to_numpy() for end in ("from", "until")),
            )
            for name in names
        }
        for batch in batches
    ]

    def where(place: int) -> tuple[int, int]:
        batch = int(np.searchsorted(ends, place, side="right"))
        return batch, place - (int(ends[batch - 1]) if batch else 0)

    def item(place: int) -> Encoded:
        batch, n = where(place)
        found: Encoded = {}
        for name, (values, offsets, starts, stops) in held[batch].items():
            ids = values[offsets[n] : offsets[n + 1]].astype(np.int64)
            labels = ids.copy()
            labels[: starts[n]] = labels[stops[n] :] = IGNORED
            found[name], found[name.replace("input_ids", "labels")] = torch.from_numpy(ids), torch.from_numpy(labels)
        return found

    def row(place: int) -> dict[str, Any]:
        batch, n = where(place)
        return json.loads(batches[batch].column("row")[n].as_py())

    each = [sum(np.diff(offsets) for _, offsets, *_ in columns.values()) for columns in held]
    lengths = np.concatenate(each) if each else np.zeros(0, dtype=np.int64)
    places = range(table.num_rows)
    return View(item, places, sha(key, "items"), lengths), View(row, places, sha(key, "rows"))
