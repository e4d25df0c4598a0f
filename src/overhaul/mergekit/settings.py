"""A parameter of a mergekit file, for one tensor: a number, a line of them over depth, or the first filter that fits.

[a, b, c]                   a at the first block of the slice, c at its last, straight lines between
[{filter: mlp, value: a},   a where the tensor's name has "mlp" in it,
{value: b}]                b elsewhere
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import TypeAdapter, ValidationError

Settings = dict[str, Any]
"""What stands under `parameters:`."""
Scalar = bool | int | float | str


def value_of(name: str, kind: TypeAdapter[Any], scopes: Sequence[Settings | None], tensor: str, t: float) -> Any:
    """What the nearest scope says that says anything; None where none does.

    Args:
        name: of the parameter.
        kind: what it is: a number, or yes and no.
        scopes: from the nearest (a source) to the widest (the file).
        tensor: its name, for filters.
        t: its place over the blocks of its slice, from 0 to 1, for lines.
    """
    for scope in scopes:
        if scope is not None and name in scope:
            found = _at(scope[name], kind, tensor, t)
            if found is not None:
                return found
    return None


def _at(setting: Any, kind: TypeAdapter[Any], tensor: str, t: float) -> Any:
    if isinstance(setting, Mapping):
        setting = [setting]
    if not isinstance(setting, list):
        return kind.validate_python(setting)
    if all(isinstance(one, Scalar) for one in setting):
        return _on_line([kind.validate_python(one) for one in setting], t) if setting else None
    for one in setting:
        sought = one.get("filter")
        if sought in (None, "*") or sought in tensor:
            return _at(one["value"], kind, tensor, t)
    return None


def _on_line(values: Sequence[Any], t: float) -> Any:
    place = t * (len(values) - 1)
    first = int(place)
    if any(isinstance(one, bool | str) for one in values):
        return values[first]
    share = place - first
    return (1 - share) * values[first] + share * values[min(len(values) - 1, first + 1)]


def check_setting(setting: Any, kind: TypeAdapter[Any]) -> str:
    """What is wrong with the form of a setting; nothing if it is in order."""
    if isinstance(setting, Scalar):
        return _not_of(setting, kind)
    if isinstance(setting, Mapping):
        setting = [setting]
    if not isinstance(setting, list):
        return f"{setting!r} is no value. Write a number, a list of numbers, or a list of {{filter: ..., value: ...}}."
    if all(isinstance(one, Scalar) for one in setting):
        return next(filter(None, (_not_of(one, kind) for one in setting)), "")
    for one in setting:
        if not isinstance(one, Mapping) or "value" not in one or set(one) - {"filter", "value"}:
            return f"{one!r} is no {{filter: ..., value: ...}}. A list is of such, or of numbers."
        if not isinstance(one.get("filter"), str | None):
            return f"filter: {one['filter']!r} is no part of a name."
        inner = one["value"]
        if not isinstance(inner, Scalar) and not (
            isinstance(inner, list) and all(isinstance(v, Scalar) for v in inner)
        ):
            return f"value: {inner!r} is neither a value nor a list of values."
        if problem := check_setting(inner, kind):
            return problem
    return ""


def _not_of(value: Any, kind: TypeAdapter[Any]) -> str:
    try:
        kind.validate_python(value)
    except ValidationError as error:
        return f"{value!r} will not do: {error.errors()[0]['msg'].lower()}."
    return ""
