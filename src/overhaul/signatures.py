"""The signature and docstring of a method, read: what it is given, what can be set, and the schema that checks it."""

from __future__ import annotations

import inspect
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, create_model
from torch import nn

from overhaul.data.examples import Examples, Rows, Tensors
from overhaul.models import Checkpoint

Kind = Literal["model", "checkpoint", "examples", "rows", "tensors"]

KINDS: Mapping[Any, Kind] = {
    nn.Module: "model", Checkpoint: "checkpoint", Examples: "examples", Rows: "rows", Tensors: "tensors"
}  # fmt: skip
OUT = "out"
"""The name of the one argument that is neither a material nor a knob: the folder that a method writes."""


@dataclass(frozen=True)
class Material:
    """A positional argument, found in a recipe by its name.

    Attributes:
        name: of the role.
        kind: an opened "model", a "checkpoint" (a folder with its facts), encoded "examples", raw "rows", or
            "tensors" by name.
        many: a sequence of such.
        required: whether there must be one.
        doc: its description.
    """

    name: str
    kind: Kind
    many: bool
    required: bool
    doc: str

    @property
    def is_model(self) -> bool:
        """Whether it is a network, opened or not."""
        return self.kind in ("model", "checkpoint")


@dataclass(frozen=True)
class Knob:
    """A keyword-only argument. One without a default is `required`; `group` is the dataclass whose field it is."""

    name: str
    type: str
    default: Any
    doc: str
    required: bool = False
    group: str = ""


@dataclass(frozen=True)
class Signature:
    """What a function takes.

    Attributes:
        materials: its positional arguments.
        knobs: its keyword-only arguments, those of a dataclass one by one.
        schema: checks the knobs.
        groups: the dataclasses, by the name of their argument.
        writes: whether it has an `out`.
    """

    materials: tuple[Material, ...]
    knobs: tuple[Knob, ...]
    schema: type[BaseModel]
    groups: Mapping[str, type]
    writes: bool

    @classmethod
    def of(cls, function: Callable[..., Any], method: str) -> Signature:
        """Read it; `method` is what the function is called in errors.

        Raises:
            TypeError: an argument is not documented, or a material is of no kind that a recipe can give.
        """
        hints = typing.get_type_hints(function, include_extras=True)
        docs = argument_docs(function.__doc__ or "")
        materials: list[Material] = []
        knobs: list[Knob] = []
        typed: dict[str, Any] = {}
        groups: dict[str, type] = {}
        parameters = inspect.signature(function).parameters
        for name, parameter in parameters.items():
            hint = hints[name]
            required = parameter.default is inspect.Parameter.empty
            if name not in docs:
                raise TypeError(f"{method}: the docstring's Args does not mention {name!r}")
            if parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
                materials.append(_material(method, name, hint, required, docs[name]))
            elif name == OUT:
                continue
            elif is_dataclass(hint):
                groups[name] = hint  # pyright: ignore[reportArgumentType]
                for knob, type_ in _fields(name, hint, parameter.default):
                    knobs.append(knob)
                    typed[knob.name] = (type_, ... if knob.required else knob.default)
            else:
                default = None if required else parameter.default
                knobs.append(Knob(name, type_text(hint), default, docs[name], required))
                typed[name] = (hint, ... if required else default)
        checks = create_model(
            function.__name__,
            __config__=ConfigDict(
                extra="forbid", arbitrary_types_allowed=True, validate_default=True, allow_inf_nan=False
            ),
            **typed,
        )  # fmt: skip
        return cls(tuple(materials), tuple(knobs), checks, groups, OUT in parameters)


def _material(method: str, name: str, hint: Any, required: bool, doc: str) -> Material:
    """What an annotation asks for: a kind, a sequence of such, or either or None."""
    wanted = hint
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        (wanted,) = [one for one in typing.get_args(hint) if one is not type(None)] or [None]
    many = wanted != Rows and typing.get_origin(wanted) is Sequence
    if many:
        (wanted,) = typing.get_args(wanted)
    kind = KINDS.get(wanted)
    if kind is None:
        known = "nn.Module, Checkpoint, Examples, Rows, Tensors, a Sequence of one of these"
        raise TypeError(
            f"{method}: the material {name!r} is {hint}, which no recipe can give; it must be {known}, or None"
        )
    return Material(name, kind, many, required, doc)


def _fields(group: str, kind: Any, default: Any) -> list[tuple[Knob, Any]]:
    """The knobs that a dataclass stands for, each with its type."""
    hints = typing.get_type_hints(kind, include_extras=True)
    docs = argument_docs(kind.__doc__ or "", "Attributes")
    found = []
    for one in fields(kind):
        if one.name not in docs:
            raise TypeError(f"{kind.__name__}: the docstring's Attributes does not mention {one.name!r}")
        value = getattr(default, one.name)
        found.append((Knob(one.name, type_text(hints[one.name]), value, docs[one.name], group=group), hints[one.name]))
    return found


def argument_docs(doc: str, section_name: str = "Args") -> dict[str, str]:
    """The `Args:` section of a Google-style docstring; `a, b: text` documents both."""
    section = re.search(rf"^{section_name}:\n(.*?)(?=^\S|\Z)", inspect.cleandoc(doc), re.M | re.S)
    found: dict[str, str] = {}
    if section:
        for entry in re.split(r"\n(?=    \S)", "\n" + section[1]):
            names, _, text = entry.strip().partition(":")
            for name in names.split(","):
                found[name.strip()] = " ".join(text.split())
    return found


def type_text(hint: Any) -> str:
    """A type as a reader would write it: `float > 0`, `"batch" | "sample"`, `int | None`."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return " | ".join(repr(choice) for choice in arguments)
    if origin in (typing.Union, types.UnionType):
        return " | ".join(type_text(argument) for argument in arguments)
    if origin is typing.Annotated:
        signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
        bounds = [f"{s} {getattr(mark, k)}" for mark in arguments[1:] for k, s in signs.items() if hasattr(mark, k)]
        return f"{type_text(arguments[0])} {' and '.join(bounds)}".strip()
    if hint is type(None):
        return "None"
    if origin is not None:
        return f"{origin.__name__}[{', '.join(type_text(argument) for argument in arguments)}]"
    return getattr(hint, "__name__", str(hint))
