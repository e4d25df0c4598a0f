"""What a method gives back: a model or none, numbers, tables and products; checked where it is returned.

A number is finite or None. A product can be stored, so that a later step of a recipe reads it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy
import torch
from torch import Tensor

from overhaul.errors import RunError

Cell = float | int | str | bool | None
Drawn = Literal["table", "heat", "points"]


@dataclass(frozen=True)
class Table:
    """Rows and columns of a report.

    Attributes:
        columns: their names.
        rows: one value for each column.
        drawn: as a "table"; as a "heat" map, whose first column names the rows; or as "points" (a name, x, y).
        along: what the rows are ("block that is left out"), where they are drawn.
        across: what the columns are.
        unit: of the values; "" is a plain number.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    drawn: Drawn = "table"
    along: str = ""
    across: str = ""
    unit: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "columns", tuple(self.columns))
        object.__setattr__(self, "rows", tuple(tuple(row) for row in self.rows))
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"a row has {len(row)} values for the columns {list(self.columns)}: {row}")
        if self.drawn == "points" and len(self.columns) != 3:
            raise ValueError(f"points have a name, x and y, not the columns {list(self.columns)}")

    @classmethod
    def grid(
        cls,
        values: Tensor | Sequence[Sequence[Cell]],
        rows: Sequence[Any],
        columns: Sequence[Any],
        *,
        along: str = "",
        across: str = "",
        unit: str = "",
    ) -> Table:
        """A matrix, drawn as a heat map; a value that does not exist is None."""
        cells = values.tolist() if isinstance(values, Tensor) else values
        named = [(str(row), *line) for row, line in zip(rows, cells, strict=True)]
        return cls(("", *map(str, columns)), tuple(named), "heat", along, across, unit)

    @classmethod
    def points(cls, points: Sequence[tuple[str, float, float]], *, x: str, y: str, unit: str = "") -> Table:
        """Named points in a plane, drawn as a scatter plot."""
        return cls(("", x, y), tuple(points), "points", unit=unit)


@dataclass
class Outcome:
    """What a method did.

    Attributes:
        model: the changed network (nn.Module), the same object where that was possible; the folder (Path) of a checkpoint
            that was written; None where nothing was changed.
        facts: scalars worth knowing ({"selected_share": 0.024}).
        layers: per-depth values, drawn in the report ({"selected share": {0: 0.1, 1: 0.0}}); depth -1 is what comes
            before the first block, depth = number of blocks what comes after the last.
        curves: one value per training step, drawn in the report ({"loss": [...]}).
        tables: tables, heat maps and scatter plots, by title.
        made: other products, by the names that the method declares: Examples, rows, tensors, checkpoints, plain JSON.
    """

    model: Any = None
    facts: dict[str, Any] = field(default_factory=dict)
    layers: dict[str, dict[int, float]] = field(default_factory=dict)
    curves: dict[str, list[float]] = field(default_factory=dict)
    tables: dict[str, Table] = field(default_factory=dict)
    made: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        """What was made in a line, each fact in one, and the names of the rest."""
        made = "no model" if self.model is None else str(self.model) if isinstance(self.model, Path) else ""
        lines = [f"Outcome: {made or type(self.model).__name__}"]
        for name, value in self.facts.items():
            lines.append(f"  {name}: {value:.4g}" if isinstance(value, float) else f"  {name}: {value}")
        rest = {"layers": self.layers, "curves": self.curves, "tables": self.tables, "made": self.made}
        return "\n".join([*lines, *(f"  {name} of {', '.join(map(str, held))}" for name, held in rest.items() if held)])


class OutcomeError(RunError):
    """A method returned something that no report can hold; what it made is in `outcome`."""

    def __init__(self, message: str, outcome: Outcome) -> None:
        super().__init__(message)
        self.outcome = outcome


def checked(outcome: Any, name: str, makes: Mapping[str, str]) -> Outcome:
    """The same outcome with plain Python numbers in it.

    Args:
        outcome: what the method called `name` returned.
        name: for messages.
        makes: the products that it declares.

    Raises:
        OutcomeError: a number is not finite, a value is no number or text, or a product is not declared.
        TypeError: it is no Outcome.
    """
    if not isinstance(outcome, Outcome):
        raise TypeError(f"{name} must return an Outcome, not {type(outcome).__name__}")
    try:
        outcome.facts = {
            _name(key, "facts"): _fact(value, f"facts[{key!r}]") for key, value in _mapping(outcome.facts, "facts")
        }
        outcome.layers = {
            _name(key, "layers"): {
                _depth(depth, f"layers[{key!r}]"): _number(value, f"layers[{key!r}][{depth}]")
                for depth, value in _mapping(values, f"layers[{key!r}]")
            }
            for key, values in _mapping(outcome.layers, "layers")
        }
        outcome.curves = {
            _name(key, "curves"): [
                _number(value, f"curves[{key!r}][{n}]") for n, value in enumerate(_values(values, f"curves[{key!r}]"))
            ]
            for key, values in _mapping(outcome.curves, "curves")
        }
        outcome.tables = {
            _name(key, "tables"): _table(table, f"tables[{key!r}]") for key, table in _mapping(outcome.tables, "tables")
        }
        for product, _ in _mapping(outcome.made, "made"):
            if product not in makes:
                raise ValueError(f"made[{product!r}] is not among what it declares: {sorted(makes)}")
    except (ValueError, RuntimeError) as error:  # a tensor without memory has no value
        raise OutcomeError(f"{name} returned a value that cannot be reported: {error}.", outcome) from None
    return outcome


def plain(value: Any) -> Any:
    """A numpy or torch scalar as a Python number; anything else as it is."""
    if isinstance(value, numpy.generic) or (isinstance(value, Tensor | numpy.ndarray) and value.ndim == 0):
        return value.item()
    return value


def _mapping(value: Any, where: str) -> Iterable[tuple[Any, Any]]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} is a {type(value).__name__}, not a dict")
    return value.items()


def _values(value: Any, where: str) -> Iterable[Any]:
    if not isinstance(value, list | tuple) and not (isinstance(value, Tensor | numpy.ndarray) and value.ndim == 1):
        raise ValueError(f"{where} is a {type(value).__name__}, not a list of numbers")
    return value


def _name(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where} has the name {value!r}, which is no text")
    return str(value)  # a numpy text is one too


def _depth(value: Any, where: str) -> int:
    value = plain(value)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{where} has the depth {value!r}, which is no whole number")
    return value


def _cell(value: Any, where: str) -> Any:
    value = plain(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} is {value}; a number must be finite, and one that does not exist is None")
    if value is not None and not isinstance(value, bool | int | float | str):
        raise ValueError(f"{where} is a {type(value).__name__}, which is neither a number nor text")
    return value


def _number(value: Any, where: str) -> Any:
    value = _cell(value, where)
    if isinstance(value, str):
        raise ValueError(f"{where} is text, not a number")
    return value


def _fact(value: Any, where: str) -> Any:
    if isinstance(value, numpy.ndarray | torch.Tensor) and value.ndim == 1:
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_cell(item, f"{where}[{n}]") for n, item in enumerate(value)]
    return _cell(value, where)


def _table(table: Any, where: str) -> Table:
    if not isinstance(table, Table):
        raise ValueError(f"{where} is a {type(table).__name__}, not a Table")
    rows = tuple(
        tuple(_cell(cell, f"{where}, row {n}, column {name!r}") for name, cell in zip(table.columns, row, strict=True))
        for n, row in enumerate(table.rows)
    )
    for name in (*table.columns, table.along, table.across, table.unit):
        _name(name, where)
    return Table(table.columns, rows, table.drawn, table.along, table.across, table.unit)
