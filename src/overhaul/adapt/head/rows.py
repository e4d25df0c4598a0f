"""Curated rows: what of them counts alike, and which are held out to choose the penalty on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch

from overhaul.adapt.head.logistic import Part
from overhaul.data.examples import Examples
from overhaul.errors import RequestError, did_you_mean
from overhaul.intervals import numbered

Balance = Literal["none", "class", "group", "class_and_group"]


def cells(examples: Examples, groups: Mapping[str, Sequence[int]], balance: Balance) -> np.ndarray:
    """The cell of each row, as a number: rows of one cell share what the cell counts."""
    group = [""] * len(examples)
    for name, places in groups.items():
        for place in places:
            group[place] = name
    labels = [int(item["labels"]) for item in examples.items]
    named: Mapping[Balance, Sequence[Any]] = {
        "none": [0] * len(labels),
        "class": labels,
        "group": group,
        "class_and_group": list(zip(labels, group, strict=True)),
    }
    return numbered(named[balance])


def split(part: Part, groups: np.ndarray, classes: np.ndarray, units: Sequence[Any], share: float) -> tuple[Part, Part]:
    """What is fitted and what is held out: a share of the units of each group, spread over its classes, by torch's seed.

    Args:
        part: all rows.
        groups: of the rows, numbers; a unit lies in that of its first row.
        classes: of the rows, likewise.
        units: what of the rows stays together.
        share: of the units, at least one of a group that has two.

    Raises:
        RequestError: a group cannot be on both sides.
    """
    unit = numbered(units)
    first = np.unique(unit, return_index=True)[1]
    draw, held = np.random.default_rng(torch.initial_seed() % 2**63), list[int]()
    for group in np.unique(groups):
        own = draw.permutation(np.flatnonzero(groups[first] == group))
        own = own[np.argsort(classes[first][own], kind="stable")]
        count = min(max(1, round(share * len(own))), len(own) - 1)
        # every so many of them, class after class
        held += own[((np.arange(count) + draw.random()) * len(own) / max(1, count)).astype(int)].tolist()
    out = np.isin(unit, held)
    lost = part.seen & ~part.right[~out].any(axis=0)
    out &= ~np.isin(unit, unit[part.right[:, lost].any(axis=1)])  # a class must be there to be fitted
    kept, test = part.select(np.flatnonzero(~out)), part.select(np.flatnonzero(out))
    for name in sorted(part.groups.keys() - (kept.groups.keys() & test.groups.keys())):
        raise RequestError(
            f"adapt.head: the group {name!r} has too few rows to be both fitted and held out; give more of it, or a role "
            "`held_out`."
        )
    return kept, test


def units_of(examples: Examples, apart: str | None) -> Sequence[Any]:
    """What of the rows stays together: each row by itself, or all with one value in a column.

    Raises:
        RequestError: there is no such column.
    """
    if apart is None:
        return range(len(examples))
    if not all(apart in row for row in examples.rows):
        hint = did_you_mean(apart, examples.rows[0])
        raise RequestError(f"adapt.head: `apart: {apart}` names no column of every row of `curated`.{hint}")
    return [str(row[apart]) for row in examples.rows]
