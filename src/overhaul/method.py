"""`@method`: a plain function becomes a step of a recipe, an entry of the listing and a page of the documentation.

Positional arguments are materials (models and data, by role); keyword-only arguments are knobs with the paper's
default. Everything else, schema, validation, help and docs, is derived from the signature and the docstring.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import inspect
import pkgutil
import re
import sys
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, ParamSpec

from pydantic import ConfigDict, ValidationError, create_model
from torch import nn

from overhaul.data.examples import Examples
from overhaul.errors import RequestError, did_you_mean

Verb = Literal["inspect", "forget", "shrink", "merge", "rewire", "adapt", "pretrain", "align"]
Changes = Literal["weights", "architecture", "nothing"]
Memory = Literal["forward", "gradient", "training"]
VERBS: tuple[str, ...] = typing.get_args(Verb)

P = ParamSpec("P")


@dataclass
class Outcome:
    """What a method did.

    Attributes:
        model: the changed model: the same object where that was possible.
        facts: scalars worth knowing ({"selected_share": 0.024}).
        layers: per-depth values, drawn in the report ({"selected share": {0: 0.1, 1: 0.0}}); depth -1 is what comes
            before the first block, depth = number of blocks what comes after the last.
        curves: one value per training step, drawn in the report ({"loss": [...]}).
        made: other products (adapters, plans, datasets, directions).
    """

    model: nn.Module
    facts: dict[str, float | int | str | list[int]] = field(default_factory=dict)
    layers: dict[str, dict[int, float]] = field(default_factory=dict)
    curves: dict[str, list[float]] = field(default_factory=dict)
    made: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Material:
    """A positional argument: a model or examples, found in a recipe by its name."""

    name: str
    kind: Literal["model", "examples"]
    required: bool
    doc: str


@dataclass(frozen=True)
class Knob:
    """A keyword-only argument. One without a default is `required`."""

    name: str
    type: str
    default: Any
    doc: str
    required: bool = False


@dataclass(frozen=True)
class Method:
    """What the decorator learnt about a function."""

    name: str
    verb: str
    paper: str
    changes: Changes
    memory: Memory
    summary: str
    doc: str
    materials: tuple[Material, ...]
    knobs: tuple[Knob, ...]
    version: str
    call: Callable[..., Outcome]
    schema: Any = field(repr=False)

    @property
    def roles(self) -> list[Material]:
        """The materials apart from the model that is changed."""
        return [material for material in self.materials if material.name != "model"]

    def check(self, knobs: Mapping[str, Any]) -> dict[str, Any]:
        """All knobs with defaults filled in; a RequestError names what is unknown or out of range."""
        known = [knob.name for knob in self.knobs]
        for name in knobs:
            if name not in known:
                raise RequestError(f"{self.name} has no knob {name!r}.{did_you_mean(name, known)}")
        try:
            return dict(self.schema(**knobs))
        except ValidationError as error:
            problem = error.errors()[0]
            name = str(problem["loc"][0])
            kind = next(knob.type for knob in self.knobs if knob.name == name)
            if problem["type"] == "missing":
                raise RequestError(f"{self.name} needs the knob {name!r} ({kind}); it has no default.") from None
            raise RequestError(
                f"{self.name}: {name}={knobs.get(name)!r} is not possible: {problem['msg']} ({name} is {kind})."
            ) from None

    def listing(self) -> dict[str, Any]:
        """Everything a machine may want to know about the method, as JSON."""
        return {
            "name": self.name,
            "paper": f"arXiv:{self.paper}" if self.paper else None,
            "changes": self.changes,
            "memory": self.memory,
            "summary": self.summary,
            "version": self.version,
            "materials": [vars(material) for material in self.materials],
            "knobs": [vars(knob) for knob in self.knobs],
        }


def method(
    *, verb: Verb, paper: str = "", changes: Changes, memory: Memory = "training"
) -> Callable[[Callable[P, Outcome]], Callable[P, Outcome]]:
    """Make a function a method.

    Args:
        verb: the shelf it stands on; its name is `verb.function`.
        paper: the arXiv number.
        changes: what it does to the model. A step that "changes weights" and leaves them as they were is an error.
        memory: what it holds per parameter, for `overhaul plan`: activations only ("forward"), gradients and one
            float32 accumulator or two ("gradient"), or gradients and optimizer state ("training").
    """

    def decorate(function: Callable[P, Outcome]) -> Callable[P, Outcome]:
        described = _describe(function, verb, paper, changes, memory)

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> Outcome:
            materials = {material.name for material in described.materials}
            knobs = {name: value for name, value in kwargs.items() if name not in materials}
            given = {name: value for name, value in kwargs.items() if name in materials}
            outcome = function(*args, **given, **described.check(knobs))  # pyright: ignore[reportCallIssue]
            return outcome

        call.method = described  # pyright: ignore[reportAttributeAccessIssue]
        return call

    return decorate


def _describe(function: Callable[..., Outcome], verb: str, paper: str, changes: Changes, memory: Memory) -> Method:
    hints = typing.get_type_hints(function, include_extras=True)
    docs = _argument_docs(function.__doc__ or "")
    materials: list[Material] = []
    knobs: list[Knob] = []
    fields: dict[str, Any] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        hint = hints[name]
        required = parameter.default is inspect.Parameter.empty
        if name not in docs:
            raise TypeError(f"{verb}.{function.__name__}: the docstring's Args does not mention {name!r}")
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            default = None if required else parameter.default
            knobs.append(Knob(name, _type_text(hint), default, docs[name], required))
            fields[name] = (hint, ... if required else default)
        else:
            kind = "examples" if Examples in (hint, *typing.get_args(hint)) else "model"
            materials.append(Material(name, kind, required, docs[name]))
    schema = create_model(
        function.__name__, __config__=ConfigDict(extra="forbid", arbitrary_types_allowed=True, validate_default=True),
        **fields,
    )  # fmt: skip
    doc = inspect.cleandoc(function.__doc__ or "")
    module = sys.modules[function.__module__]
    source = Path(module.__file__).read_bytes() if module.__file__ else b""
    return Method(
        name=f"{verb}.{function.__name__}",
        verb=verb,
        paper=paper,
        changes=changes,
        memory=memory,
        summary=doc.partition("\n\n")[0].replace("\n", " "),
        doc=inspect.cleandoc(module.__doc__ or "") + "\n\n" + doc,
        materials=tuple(materials),
        knobs=tuple(knobs),
        version=hashlib.sha256(source).hexdigest()[:12],
        call=function,
        schema=schema,
    )


def _argument_docs(doc: str) -> dict[str, str]:
    """The `Args:` section of a Google-style docstring; `a, b: text` documents both."""
    section = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", inspect.cleandoc(doc), re.M | re.S)
    found: dict[str, str] = {}
    if section:
        for entry in re.split(r"\n(?=    \S)", "\n" + section[1]):
            names, _, text = entry.strip().partition(":")
            for name in names.split(","):
                found[name.strip()] = " ".join(text.split())
    return found


def _type_text(hint: Any) -> str:
    """A type as a reader would write it: `float > 0`, `"batch" | "sample"`, `int | None`."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return " | ".join(repr(choice) for choice in arguments)
    if origin in (typing.Union, types.UnionType):
        return " | ".join(_type_text(argument) for argument in arguments)
    if origin is typing.Annotated:
        signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
        bounds = [f"{s} {getattr(mark, k)}" for mark in arguments[1:] for k, s in signs.items() if hasattr(mark, k)]
        return f"{_type_text(arguments[0])} {' and '.join(bounds)}".strip()
    if hint is type(None):
        return "None"
    if origin is not None:
        return f"{origin.__name__}[{', '.join(_type_text(argument) for argument in arguments)}]"
    return getattr(hint, "__name__", str(hint))


class _Shelf(types.ModuleType):
    """A verb's package: each method is imported when it is first asked for, and the name stands for the function.

    The import system would put the file's module under that name.
    """

    def __getattr__(self, name: str) -> Any:
        if name not in self.__all__:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        importlib.import_module(f"{self.__name__}.{name}")
        return vars(self)[name]

    def __setattr__(self, name: str, value: Any) -> None:
        is_method = isinstance(value, types.ModuleType) and name in self.__all__
        super().__setattr__(name, getattr(value, name) if is_method else value)


def shelve(package: str) -> list[str]:
    """Offer every method file of a verb's package by the name of its function; files that begin with _ are help."""
    module = sys.modules[package]
    module.__class__ = _Shelf
    return [info.name for info in pkgutil.iter_modules(module.__path__) if not info.name.startswith("_")]


@functools.cache
def methods() -> dict[str, Method]:
    """Every method by its full name."""
    found: dict[str, Method] = {}
    for verb in VERBS:
        if importlib.util.find_spec(f"overhaul.{verb}") is None:
            continue
        package = importlib.import_module(f"overhaul.{verb}")
        for name in package.__all__:
            described: Method = getattr(package, name).method
            found[described.name] = described
    return found


def find(name: str) -> Method:
    """The method called `name` ("forget.ssd", or "ssd" where that is unambiguous)."""
    verb, _, function = name.partition(".")
    if verb in VERBS and importlib.util.find_spec(f"overhaul.{verb}") is not None:
        package = importlib.import_module(f"overhaul.{verb}")
        if function in package.__all__:  # no other method has to be imported
            return getattr(package, function).method
    known = methods()
    if name in known:
        return known[name]
    short = [full for full in known if full.endswith(f".{name}")]
    if len(short) == 1:
        return known[short[0]]
    raise RequestError(f"There is no method {name!r}.{did_you_mean(name, [*known, *(n.split('.')[1] for n in known)])}")
