"""Examples: encoded data in one role, with the rows it was made from.

A language example is `input_ids` and `labels` of one length; a label of -100 carries no loss, so a prompt is read and
only its answer is learnt. A text with a class has one `labels` integer instead; where any of several classes is right,
`label_set` holds them all and `labels` the first. A pair is two of them, the second under
names that begin with `other_`. An image example is `pixel_values`, and one `labels` integer where it has a class.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, overload

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from overhaul.data.lazy import View, chained, sha
from overhaul.errors import RequestError, did_you_mean
from overhaul.files import contents

IGNORED = -100
"""The label of a position that carries no loss (the convention of `torch.nn.functional.cross_entropy`)."""

CLOSING = "closing_tokens"
"""The column of a row that says how many of its last tokens with loss a chat template wrote behind the answer."""

TOLD_FROM = 100
"""Examples from which it is told how a template ends answers."""

PROMPT_OVERLAP = "prompt_overlap"
"""The column of a row with the characters of its prompt that the answer's first token holds, where there are some."""

LABEL_SET = "label_set"
"""The column of an example with all classes that count as right, where its row lists several."""

Kind = Literal["tokens", "pairs", "images", "image_text", "rows", "tensors"]
"""What a model can read of examples: token sequences, two of them each, images, both, nothing (raw rows), or what else
their columns hold."""

Encoded = dict[str, Tensor]
Row = dict[str, Any]
Rows = Sequence[Row]
"""Raw rows of a role, as the file has them."""
Tensors = Mapping[str, Tensor]
"""Tensors by name: a safetensors file, or what a step made."""
Batch = dict[str, Tensor]

PADDING: Mapping[str, int] = {"labels": IGNORED, "other_labels": IGNORED, LABEL_SET: IGNORED}
"""What fills a column up where it is not 0."""

SEQUENCES: Mapping[str, str] = {"": "input_ids", "other_": "other_input_ids"}
"""How the columns of a sequence begin, and which of them tells its length."""


@dataclass(frozen=True)
class Examples(Sequence[Encoded]):
    """Encoded examples of one role.

    Attributes:
        items: one dict of tensors per example: `input_ids` [t] and `labels` [t], or `pixel_values` [c, h, w] and
            `labels` []; pairs have `other_input_ids` [u] and `other_labels` [u] besides. A method may add columns with
            `with_column`.
        rows: the raw row behind each example (question, answer, person, ...; `bytes` for text).
        processor: the tokenizer or image processor that encoded them.
    """

    items: Sequence[Encoded]
    rows: Sequence[Mapping[str, Any]]
    processor: Any = None

    def __post_init__(self) -> None:
        if len(self.items) != len(self.rows):
            raise ValueError(f"{len(self.items)} items but {len(self.rows)} rows")

    def __repr__(self) -> str:
        if not len(self):
            return "Examples: none"
        shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in self.items[0].items())
        first = f"{len(self)}, {self.kind}\n  first: {shapes or 'nothing encoded'}"
        return f"Examples: {first}\n  rows: {', '.join(self.rows[0])}"

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
    def kind(self) -> Kind:
        """What a model can read of these, told from the columns of the first; no examples are "rows"."""
        return kind_of_item(self.items[0]) if len(self.items) else "rows"

    @property
    def classified(self) -> bool:
        """Whether each has one label, its class: images and texts of classifiers."""
        return bool(len(self.items)) and "labels" in self.items[0] and self.items[0]["labels"].ndim == 0

    def select(self, indices: Sequence[int] | np.ndarray) -> Examples:
        """The examples at these places, in this order."""
        return replace(self, items=_chosen(self.items, indices), rows=_chosen(self.rows, indices))

    def filter(self, keep: Callable[[Mapping[str, Any]], bool]) -> Examples:
        """The examples whose row satisfies `keep`."""
        return self.select([i for i, row in enumerate(self.rows) if keep(row)])

    def shuffled(self, seed: int) -> Examples:
        """The same examples in an order drawn from `seed`."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        return self.select(order.numpy() if isinstance(self.items, View) else order.tolist())

    def with_column(self, name: str, values: Sequence[Tensor] | Tensor) -> Examples:
        """A copy in which every example also carries `values[i]` under `name` (cached reference outputs, for one)."""
        if len(values) != len(self):
            raise ValueError(f"column {name!r} has {len(values)} values for {len(self)} examples")
        if isinstance(self.items, View):
            held = [value.detach().cpu() for value in values]
            items = self.items.map(lambda i, item: {**item, name: held[i]}, sha(name, *map(_bytes, held)))
            return replace(self, items=items)
        return replace(self, items=[{**item, name: value} for item, value in zip(self.items, values, strict=True)])

    def batches(self, size: int) -> Iterator[Batch]:
        """Padded batches of `size` examples in order; the last may be smaller."""
        for start in range(0, len(self), size):
            yield collate(self.items[start : start + size])

    def by_length(self) -> list[int]:
        """Indices ordered by length, longest first, so that batches waste little padding."""
        known = self.items.lengths if isinstance(self.items, View) else None
        sizes = [length(item) for item in self.items] if known is None else known.tolist()
        return sorted(range(len(self)), key=lambda i: -sizes[i])

    def beyond(self, most: int) -> tuple[int, int] | None:
        """An example that has more than `most` tokens in one sequence, and how many; None where there is none."""
        for place in self.by_length():
            item = self.items[place]
            if length(item) <= most:  # both sequences of a pair together, and those that follow are no longer
                return None
            if (size := max(len(item[ids]) for ids in SEQUENCES.values() if ids in item)) > most:
                return place, size
        return None

    def largest_token(self) -> int:
        """The largest number of a token, -1 where there is none. Of data in a file every example is read for it."""
        texts = (item[ids] for item in self.items for ids in SEQUENCES.values() if ids in item)
        return max((int(text.max()) for text in texts if text.numel()), default=-1)

    def digest(self) -> str:
        """SHA-256 over every tensor and row: what a step's key uses to know that its data is unchanged.

        Of large data that lies in a file, over the file, the options and the tokenizer that it was made with.
        """
        if isinstance(self.items, View):
            rows = self.rows.key if isinstance(self.rows, View) else json.dumps(list(self.rows), default=contents)
            return sha(self.items.key, rows)
        hasher = hashlib.sha256()
        for item, row in zip(self.items, self.rows, strict=True):
            for name in sorted(item):
                hasher.update(name.encode())
                hasher.update(_bytes(item[name]))
            hasher.update(json.dumps(dict(row), sort_keys=True, default=contents).encode())
        return hasher.hexdigest()


def _chosen(values: Sequence[Any], indices: Sequence[int] | np.ndarray) -> Sequence[Any]:
    return values.select(indices) if isinstance(values, View) else [values[i] for i in indices]


def _bytes(value: Tensor) -> bytes:
    return value.reshape(-1).view(torch.uint8).numpy().tobytes()


def answers_alone(examples: Examples) -> Examples:
    """The same, but what a chat template wrote behind an answer carries no loss, and rows do not tell of it."""
    if examples.kind != "tokens":
        return examples
    if isinstance(examples.items, View):
        rows = examples.rows
        items = examples.items.map(lambda i, item: _answer_alone(item, rows[i]), "answers alone", as_long=True)
        told = rows.map(lambda _, row: _untold(row), "answers alone") if isinstance(rows, View) else map(_untold, rows)
        return replace(examples, items=items, rows=told if isinstance(told, View) else list(told))
    if not any(row.get(CLOSING) for row in examples.rows):
        return examples
    items = [_answer_alone(*each) for each in zip(examples.items, examples.rows, strict=True)]
    return replace(examples, items=items, rows=list(map(_untold, examples.rows)))


def _answer_alone(item: Encoded, row: Mapping[str, Any]) -> Encoded:
    closing = row.get(CLOSING, 0)
    if not closing:
        return item
    labels = item["labels"].clone()
    labels[(labels != IGNORED).nonzero()[-closing:]] = IGNORED
    return {**item, "labels": labels}


def _untold(row: Mapping[str, Any]) -> Row:
    return {name: value for name, value in row.items() if name != CLOSING}


def turn_ends(examples: Examples) -> set[int]:
    """The tokens of their own with which the chat template ends answers, told from the first examples."""
    marks = getattr(examples.processor, "added_tokens_decoder", {})
    pairs = zip(examples.items[:TOLD_FROM], examples.rows[:TOLD_FROM], strict=True)
    ends = (int(item["labels"][item["labels"] != IGNORED][-row[CLOSING]]) for item, row in pairs if row.get(CLOSING))
    return {end for end in ends if end in marks}


def kind_of_item(item: Encoded) -> Kind:
    """What a model can read of one example."""
    if "pixel_values" in item:
        return "image_text" if "input_ids" in item else "images"
    if "input_ids" in item:
        return "pairs" if "other_input_ids" in item else "tokens"
    return "tensors" if item else "rows"


def length(item: Encoded) -> int:
    """Tokens of an example, both sequences of a pair together; 1 for what has none, an image."""
    return sum(item[ids].shape[0] for ids in SEQUENCES.values() if ids in item) or 1


def wrong_label(examples: Examples, count: int) -> tuple[int, int] | None:
    """A label that is none of `count` classes, with the place of its example; None where all are."""
    for place, item in enumerate(examples.items):
        if "labels" in item and not item["labels"].ndim:
            labels = item.get(LABEL_SET, item["labels"][None])
            if bool((wrong := labels[(labels < 0) | (labels >= count)]).numel()):
                return place, int(wrong[0])
    return None


def right_classes(batch: Batch, count: int) -> Tensor:
    """Which of `count` classes are right for each example of a batch, [b, count], from `label_set` or else `labels`.

    Raises:
        RequestError: a label is no class of so many.
    """
    labels = batch[LABEL_SET] if LABEL_SET in batch else batch["labels"][:, None]
    known = labels != IGNORED
    if bool((wrong := labels[known & ((labels < 0) | (labels >= count))]).numel()):
        raise RequestError(
            f"The data has the label {int(wrong[0])}, but the model tells {count} classes apart, 0 to {count - 1}. Correct "
            "the labels, or leave such rows out."
        )
    right = torch.zeros(len(labels), count + 1, dtype=torch.bool, device=labels.device)
    return right.scatter_(1, labels.masked_fill(~known, count), True)[:, :count]


def places_by(rows: Sequence[Mapping[str, Any]], columns: str | Sequence[str]) -> dict[str, list[int]]:
    """The places of the rows that have one value in a column, or in several ("Africa, low"), in the order of its name.

    Values are in quotes where two groups would have one name without: 'x, y', 'z' and 'x', 'y, z'.
    """
    columns = [columns] if isinstance(columns, str) else columns
    found: dict[tuple[str, ...], list[int]] = {}
    for place, row in enumerate(rows):
        found.setdefault(tuple(str(row[column]) for column in columns), []).append(place)
    named = {", ".join(values): places for values, places in found.items()}
    if len(named) < len(found):
        named = {", ".join(map(repr, values)): places for values, places in found.items()}
    return {name: named[name] for name in sorted(named)}


def groups_of(
    where: str, rows: Sequence[Mapping[str, Any]], columns: str | Sequence[str], least: int
) -> dict[str, list[int]]:
    """`places_by` where groups are to be compared.

    Args:
        where: whose rows they are, for messages ("inspect.groups: the role `data`").
        rows: the rows.
        columns: one or several.
        least: rows that a group needs.

    Raises:
        RequestError: no column is named or one twice, a row has nothing in it, there is one group, or one is too small.
    """
    listed = [columns] if isinstance(columns, str) else list(columns)
    if not listed:
        raise RequestError(f"{where} is to be grouped by no column: `by` is empty. Name one, or several.")
    if twice := [column for n, column in enumerate(listed) if column in listed[:n]]:
        raise RequestError(f"{where} is to be grouped by the column {twice[0]!r} twice: name each once in `by`.")
    for column in listed:
        for place, row in enumerate(rows, 1):
            if row.get(column) is None or row[column] == "":
                hint = "" if column in row else did_you_mean(column, row)
                raise RequestError(f"{where} has nothing in the column {column!r} of row {place}, the group.{hint}")
    found = places_by(rows, columns)
    said = columns if isinstance(columns, str) else ", ".join(columns)
    if len(found) < 2:
        raise RequestError(f"{where} is of one group, {said} {next(iter(found), '')!r}; there is nothing to compare.")
    small = {name: len(places) for name, places in found.items() if len(places) < least}
    if small:
        shown = ", ".join(f"{name!r} ({count} row{'s' * (count > 1)})" for name, count in list(small.items())[:5])
        raise RequestError(
            f"{where} has groups of fewer than {least} rows by {said}: {shown}. They say next to nothing: leave them out "
            f"(`unless: {{COLUMN: VALUE}}` in the material), or join them with others."
        )
    return found


def join(parts: Sequence[Examples]) -> Examples:
    """All examples of several parts, in order. Only what is of one kind can be joined."""
    parts = [part for part in parts if len(part)]
    if len(kinds := sorted({part.kind for part in parts})) > 1:
        raise RequestError(f"A role cannot mix {' and '.join(kinds)}; name them as two materials.")
    if not parts:
        return Examples([], [])
    if len(parts) == 1:
        return parts[0]
    if not any(isinstance(part.items, View) for part in parts):
        items = [item for part in parts for item in part.items]
        return Examples(items, [row for part in parts for row in part.rows], parts[0].processor)
    parts = [_as_view(part) for part in parts]
    items, rows = (chained([getattr(part, name) for part in parts]) for name in ("items", "rows"))
    return Examples(items, rows, parts[0].processor)


def _as_view(part: Examples) -> Examples:
    """Examples that are held, read like those that are not."""
    if isinstance(part.items, View) and isinstance(part.rows, View):
        return part
    key, places = part.digest(), range(len(part))
    items, rows = (
        View(part.items.__getitem__, places, sha(key, "items")),
        View(part.rows.__getitem__, places, sha(key, "rows")),
    )
    return Examples(items, rows, part.processor)


def collate(items: Sequence[Encoded]) -> Batch:
    """Stack examples, padding sequences on the right.

    Sequences get an `attention_mask` [b, t], the second ones of pairs an `other_attention_mask` [b, u]. Columns as long as
    their sequence are padded along their first dimension, and so are others that differ in length (what is known of answer
    tokens alone), with the value in `PADDING`, 0 if not named there.
    """
    batch: Batch = {}
    if any(LABEL_SET in item for item in items):  # one class is a set too
        items = [item if LABEL_SET in item else {**item, LABEL_SET: item["labels"][None]} for item in items]
    for prefix, ids in SEQUENCES.items():
        if ids in items[0]:
            batch |= _padded(items, prefix, ids)
    for name in items[0]:
        if name not in batch:
            values = [item[name] for item in items]
            ragged = len({value.shape for value in values}) > 1  # a value for each position that carries loss
            fill = PADDING.get(name, 0)
            batch[name] = pad_sequence(values, True, fill) if ragged else torch.stack(values)
    return batch


def _padded(items: Sequence[Encoded], prefix: str, ids: str) -> Batch:
    """The columns that run along one of the sequences, and its mask."""
    lengths = [item[ids].shape[0] for item in items]
    width, batch = max(lengths), dict[str, Tensor]()
    for name in items[0]:
        values = [item[name] for item in items]
        others = name.startswith("other_") != (prefix == "other_")
        if others or any(not v.ndim or v.shape[0] != n for v, n in zip(values, lengths, strict=True)):
            continue
        batch[name] = values[0].new_full((len(values), width, *values[0].shape[1:]), PADDING.get(name, 0))
        for row, value in zip(batch[name], values, strict=True):
            row[: value.shape[0]] = value
    if f"{prefix}attention_mask" not in batch:
        batch[f"{prefix}attention_mask"] = (torch.arange(width)[None, :] < torch.tensor(lengths)[:, None]).long()
    return batch
