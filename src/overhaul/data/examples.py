"""Examples: encoded data in one role, with the rows it was made from.

A language example is `input_ids` and `labels` of one length; a label of -100 carries no loss, so a prompt is read and
only its answer is learnt. An image example is `pixel_values` and one `labels` integer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from overhaul.errors import RequestError

IGNORED = -100
"""The label of a position that carries no loss (the convention of `torch.nn.functional.cross_entropy`)."""

Form = Literal["text", "qa", "chat", "image"]
Encoded = dict[str, Tensor]
Row = dict[str, Any]
Rows = Sequence[Row]
"""Raw rows of a role, as the file has them."""
Batch = dict[str, Tensor]

PADDING: Mapping[str, int] = {"input_ids": 0, "labels": IGNORED, "attention_mask": 0}


@dataclass(frozen=True)
class Examples(Sequence[Encoded]):
    """Encoded examples of one role.

    Attributes:
        items: one dict of tensors per example: `input_ids` [t] and `labels` [t], or `pixel_values` [c, h, w] and
            `labels` []. A method may add columns with `with_column`.
        rows: the raw row behind each example (question, answer, person, ...; `bytes` for text).
        processor: the tokenizer or image processor that encoded them.
    """

    items: Sequence[Encoded]
    rows: Sequence[Mapping[str, Any]]
    processor: Any = None

    def __post_init__(self) -> None:
        if len(self.items) != len(self.rows):
            raise ValueError(f"{len(self.items)} items but {len(self.rows)} rows")

    def __len__(self) -> int:
        return len(self.items)

    @overload
    def __getitem__(self, index: int) -> Encoded: ...
    @overload
    def __getitem__(self, index: slice) -> Examples: ...
    def __getitem__(self, index: int | slice) -> Encoded | Examples:
        if isinstance(index, slice):
            return replace(self, items=self.items[index], rows=self.rows[index])
        return self.items[index]

    @property
    def is_image(self) -> bool:
        """Whether these are images with a class label, rather than token sequences."""
        return bool(self.items) and "pixel_values" in self.items[0]

    def select(self, indices: Sequence[int]) -> Examples:
        """The examples at these places, in this order."""
        return replace(self, items=[self.items[i] for i in indices], rows=[self.rows[i] for i in indices])

    def filter(self, keep: Callable[[Mapping[str, Any]], bool]) -> Examples:
        """The examples whose row satisfies `keep`."""
        return self.select([i for i, row in enumerate(self.rows) if keep(row)])

    def shuffled(self, seed: int) -> Examples:
        """The same examples in an order drawn from `seed`."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        return self.select(order.tolist())

    def with_column(self, name: str, values: Sequence[Tensor] | Tensor) -> Examples:
        """A copy in which every example also carries `values[i]` under `name` (cached reference outputs, for one)."""
        if len(values) != len(self):
            raise ValueError(f"column {name!r} has {len(values)} values for {len(self)} examples")
        return replace(self, items=[{**item, name: value} for item, value in zip(self.items, values, strict=True)])

    def batches(self, size: int) -> Iterator[Batch]:
        """Padded batches of `size` examples in order; the last may be smaller."""
        for start in range(0, len(self), size):
            yield collate(self.items[start : start + size])

    def by_length(self) -> list[int]:
        """Indices ordered by length, longest first, so that batches waste little padding."""
        sizes = [item["input_ids"].shape[0] if "input_ids" in item else 0 for item in self.items]
        return sorted(range(len(self)), key=lambda i: -sizes[i])

    def digest(self) -> str:
        """SHA-256 over every tensor and row: what a step's key uses to know that its data is unchanged."""
        hasher = hashlib.sha256()
        for item, row in zip(self.items, self.rows, strict=True):
            for name in sorted(item):
                hasher.update(name.encode())
                hasher.update(item[name].reshape(-1).view(torch.uint8).numpy().tobytes())
            hasher.update(json.dumps(dict(row), sort_keys=True, default=str).encode())
        return hasher.hexdigest()


def join(parts: Sequence[Examples]) -> Examples:
    """All examples of several parts, in order. Images and text cannot be joined."""
    parts = [part for part in parts if len(part)]
    if len({part.is_image for part in parts}) > 1:
        raise RequestError("A role cannot mix images and text; name them as two materials.")
    if not parts:
        return Examples([], [])
    items = [item for part in parts for item in part.items]
    rows = [row for part in parts for row in part.rows]
    return Examples(items, rows, parts[0].processor)


def collate(items: Sequence[Encoded]) -> Batch:
    """Stack examples, padding sequences on the right.

    Sequences get an `attention_mask` [b, t]. One-dimensional columns are padded with the value in `PADDING` (0 if not
    named there); columns of more dimensions, and of other lengths than the sequences', with zeros along their first.
    """
    batch: Batch = {}
    is_text = "input_ids" in items[0]
    width = max(item["input_ids"].shape[0] for item in items) if is_text else 0
    for name in items[0]:
        values = [item[name] for item in items]
        along_time = (
            is_text
            and values[0].ndim > 0
            and all(value.shape[0] == item["input_ids"].shape[0] for value, item in zip(values, items, strict=True))
        )
        if not along_time:
            ragged = len({value.shape for value in values}) > 1  # a value for each position that carries loss
            batch[name] = pad_sequence(values, batch_first=True) if ragged else torch.stack(values)
            continue
        padded = values[0].new_full((len(values), width, *values[0].shape[1:]), PADDING.get(name, 0))
        for row, value in zip(padded, values, strict=True):
            row[: value.shape[0]] = value
        batch[name] = padded
    if is_text:
        lengths = torch.tensor([item["input_ids"].shape[0] for item in items])
        batch["attention_mask"] = (torch.arange(width)[None, :] < lengths[:, None]).long()
    return batch
