"""Metrics: what a recipe's `judge:` block can name. A new one is a decorated function in a file here, nothing else.

    @metric("accuracy", "right answers", unit="share", reads=("answers", "images"))
    def accuracy(role: Evidence) -> Value: ...

A metric takes the evidence of one role, or of two where it compares them; the names of its positional arguments are the
names of those roles in a recipe. An argument `anchor_NAME` receives what the model that it is compared with says about the
role NAME. Keyword-only arguments are options with defaults, which a recipe may set: `pass_at_k: {on: sums, k: 5}`. A metric
returns its value and the number of examples behind it.

A metric with `tasks=True` brings its own data: a recipe names its tasks where it would name roles, and it is called with the
model, its tokenizer and the name of one task. It returns several `Score`s.
"""

from __future__ import annotations

import importlib
import inspect
import math
import pkgutil
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from pydantic import TypeAdapter, ValidationError

from overhaul.errors import RequestError
from overhaul.judge.evidence import Kind

Better = Literal["up", "down"]
Wanted = Literal["up", "down", "same", "chance", "anchor"]
Value = tuple[float, int]
Function = TypeVar("Function", bound=Callable[..., Any])

ANCHOR = "anchor_"
"""How the name of an argument begins that reads the model which is compared with."""


@dataclass(frozen=True)
class Metric:
    """What the decorator learnt about a function.

    Attributes:
        label: the field's name for it.
        help: what it is in plain words, beneath the label.
        unit: "share" and "probability" lie between 0 and 1; "" is a plain number.
        better: which way a model improves that is to know the role.
        forgotten: which way it should go where the role is to be forgotten.
        reads: the kinds of data it can be measured on.
        columns: what every row must have besides.
        roles: what a recipe calls its roles; one metric of one role has ("role",), one with tasks of its own has none.
        anchored: those of them that it also reads on the model it compares with.
        options: what a recipe may set: the type and the default of each.
        tasks: whether it brings its own data, in tasks that a recipe names.
    """

    name: str
    label: str
    help: str
    unit: str
    better: Better
    forgotten: Wanted
    reads: tuple[Kind, ...]
    columns: tuple[str, ...]
    roles: tuple[str, ...]
    anchored: tuple[str, ...]
    options: Mapping[str, tuple[Any, Any]]
    doc: str
    call: Callable[..., Any]
    tasks: bool = False

    def check(self, where: str, options: Mapping[str, Any]) -> dict[str, Any]:
        """The options that were given, as what they are.

        Raises:
            RequestError: one is of the wrong type or out of range.
        """
        found: dict[str, Any] = {}
        for name, value in options.items():
            try:
                found[name] = TypeAdapter(self.options[name][0]).validate_python(value)
            except ValidationError as error:
                problem = error.errors()[0]["msg"]
                raise RequestError(f"{where}: {name}={value!r} is not possible: {problem}.") from None
        return found


METRICS: dict[str, Metric] = {}


def metric(
    label: str,
    help: str,
    *,
    unit: str = "",
    better: Better = "up",
    forgotten: Wanted | None = None,
    reads: tuple[Kind, ...],
    columns: tuple[str, ...] = (),
    tasks: bool = False,
) -> Callable[[Function], Function]:
    """Register a function under its own name; see `Metric` for the arguments. `forgotten` is the opposite of `better`."""

    def decorate(function: Function) -> Function:
        name, doc = function.__name__, inspect.cleandoc(function.__doc__ or "")
        worse: Wanted = forgotten or ("down" if better == "up" else "up")
        arguments = inspect.signature(function).parameters
        hints = typing.get_type_hints(function, include_extras=True)
        names = [name for name, one in arguments.items() if one.kind is not one.KEYWORD_ONLY]
        METRICS[name] = Metric(
            name,
            label,
            help,
            unit,
            better,
            worse,
            reads,
            columns,
            roles=tuple(each for each in names if not each.startswith(ANCHOR) and not tasks),
            anchored=tuple(each.removeprefix(ANCHOR) for each in names if each.startswith(ANCHOR)),
            options={name: (hints[name], arguments[name].default) for name in arguments if name not in names},
            doc=doc,
            call=function,
            tasks=tasks,
        )
        return function

    return decorate


def mean(values: Sequence[float]) -> Value:
    """The mean and the number of values; NaN of none."""
    return (math.fsum(values) / len(values) if values else math.nan), len(values)


for _file in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_file.name}")
