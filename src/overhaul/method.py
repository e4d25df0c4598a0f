"""`@method`: a plain function becomes a step of a recipe, an entry of the listing and a page of the documentation.

1. Positional arguments are materials, and what they are is what their annotation says. The first is what a stage hands on.
2. Keyword-only arguments are knobs with the paper's default. One whose type is a frozen dataclass stands for its fields:
   they are written like other knobs, and documented where the dataclass is.
3. A keyword-only `out` is no knob: the folder that a method writes.

Everything else, schema, validation, help and docs, is derived from the signature and the docstring.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import pkgutil
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError
from torch import nn

from overhaul.errors import RequestError, did_you_mean
from overhaul.models import facts
from overhaul.outcome import Outcome as Outcome
from overhaul.outcome import Table as Table
from overhaul.outcome import checked
from overhaul.signatures import OUT, Signature
from overhaul.signatures import Knob as Knob
from overhaul.signatures import Material as Material
from overhaul.versions import version_of

Verb = Literal["inspect", "forget", "shrink", "merge", "rewire", "adapt", "pretrain", "align"]
Changes = Literal["weights", "architecture", "nothing"]
Memory = Literal["stream", "forward", "gradient", "training"]
Knobs = Mapping[str, Any]
Product = Literal["examples", "rows", "tensors", "checkpoint", "json"]
VERBS: tuple[str, ...] = typing.get_args(Verb)


@dataclass(frozen=True)
class Method:
    """What the decorator learnt about a function."""

    name: str
    verb: str
    paper: str
    changes: Changes
    memory: Memory | Mapping[str, Mapping[str, Memory]]
    copies: Callable[[Knobs], int] = field(repr=False)
    headless: Callable[[Knobs], bool] = field(repr=False)
    rank: Callable[[Knobs], int | None] = field(repr=False)
    singly: Callable[[Knobs], bool] = field(repr=False)
    summary: str
    doc: str
    materials: tuple[Material, ...]
    knobs: tuple[Knob, ...]
    makes: Mapping[str, Product]
    only: Mapping[str, Mapping[str, Sequence[str]]]
    alone: bool | Mapping[str, Sequence[str]]
    module: str
    writes: bool
    call: Callable[..., Outcome] = field(repr=False)
    schema: Any = field(repr=False)
    groups: Mapping[str, type] = field(repr=False)

    @functools.cached_property
    def version(self) -> str:
        """A hash of all code that it runs."""
        inside = self.module.startswith("overhaul.")
        return version_of(self.module if inside else Path(sys.modules[self.module].__file__ or ""))

    @property
    def subject(self) -> Material | None:
        """The model that a stage hands on: the first material, if it is one model."""
        first = self.materials[0]
        return first if first.is_model and not first.many else None

    @property
    def roles(self) -> list[Material]:
        """The materials apart from the model that a stage hands on."""
        return [material for material in self.materials if material is not self.subject]

    def makes_with(self, product: str, knobs: Knobs) -> str:
        """What knobs would have to be for it to make a product that it does not make with these; "" where it does."""
        wanted = self.only.get(product, {})
        lacking = {name: values for name, values in wanted.items() if knobs[name] not in values}
        return ", ".join(f"{name}: {' or '.join(values)}" for name, values in lacking.items())

    def memory_with(self, knobs: Knobs) -> Memory:
        """What it holds per parameter, with these knobs."""
        if isinstance(self.memory, str):
            return self.memory
        ((name, values),) = self.memory.items()
        return values[knobs[name]]

    def runs_alone(self, knobs: Knobs) -> bool:
        """Whether it runs blocks by themselves, with these knobs."""
        if isinstance(self.alone, bool):
            return self.alone
        return any(knobs[name] in values for name, values in self.alone.items())

    def check(self, knobs: Mapping[str, Any]) -> dict[str, Any]:
        """All knobs with defaults filled in; a RequestError names what is unknown or out of range."""
        known = [knob.name for knob in self.knobs]
        knobs = self._ungrouped(knobs)
        for name in knobs:
            if name not in known:
                raise RequestError(f"{self.name} has no knob {name!r}.{did_you_mean(name, known)}")
        try:
            checked = dict(self.schema(**knobs))
        except ValidationError as error:
            problem = error.errors()[0]
            name = str(problem["loc"][0])
            kind = next(knob.type for knob in self.knobs if knob.name == name)
            if problem["type"] == "missing":
                raise RequestError(f"{self.name} needs the knob {name!r} ({kind}); it has no default.") from None
            raise RequestError(
                f"{self.name}: {name}={knobs.get(name)!r} is not possible: {problem['msg']} ({name} is {kind})."
            ) from None
        for name, given in knobs.items():
            if isinstance(given, bool) and not isinstance(checked[name], bool):  # it would count as 0 or 1
                raise RequestError(f"{self.name}: {name}={given} is not possible: write a number, not {given}.")
        return checked

    def arguments(self, knobs: Mapping[str, Any]) -> dict[str, Any]:
        """What the function takes: all knobs, checked, those of a group in their dataclass."""
        values = self.check(knobs)
        found = {knob.name: values[knob.name] for knob in self.knobs if not knob.group}
        for group, kind in self.groups.items():
            found[group] = kind(**{knob.name: values[knob.name] for knob in self.knobs if knob.group == group})
        return found

    def _ungrouped(self, knobs: Mapping[str, Any]) -> dict[str, Any]:
        """Knobs by name where some were given as the dataclass that they are fields of."""
        flat: dict[str, Any] = {}
        for name, value in knobs.items():
            inside = (
                {one.name: getattr(value, one.name) for one in fields(value)} if name in self.groups else {name: value}
            )
            for key, one in inside.items():
                if key in flat:
                    raise RequestError(f"{self.name}: {key} is given twice, by itself and in a {name}.")
                flat[key] = one
        return flat

    def listing(self) -> dict[str, Any]:
        """Everything a machine may want to know about the method, as JSON."""
        return {
            "name": self.name,
            "paper": f"arXiv:{self.paper}" if self.paper else None,
            "changes": self.changes,
            "memory": self.memory,
            "summary": self.summary,
            "makes": dict(self.makes),
            "materials": [vars(material) for material in self.materials],
            "knobs": [vars(knob) for knob in self.knobs],
        }


@dataclass(frozen=True)
class Step:
    """One checked step of a recipe: its method, all its knobs, and which materials its roles read."""

    number: int
    method: Method
    knobs: Mapping[str, Any]
    reads: Mapping[str, str | tuple[str, ...]]

    @property
    def materials(self) -> list[str]:
        """The names of all materials that it reads."""
        return [name for role in self.reads for name in self.names(role)]

    @property
    def name(self) -> str:
        """The method's name, as the report shows it."""
        return self.method.name

    def names(self, role: str) -> tuple[str, ...]:
        """The names of the materials that a role reads."""
        read = self.reads.get(role, ())
        return (read,) if isinstance(read, str) else read

    def goes_by(self, name: str) -> bool:
        """Whether a recipe may call it so: "forget.npo", "npo", or its number."""
        return name in (self.name, self.name.partition(".")[2], str(self.number))


def method(
    *,
    verb: Verb,
    paper: str = "",
    changes: Changes,
    memory: Memory | Mapping[str, Mapping[str, Memory]] = "training",
    copies: Callable[[Knobs], int] = lambda knobs: 0,
    makes: Mapping[str, Product] | None = None,
    alone: bool | Mapping[str, Sequence[str]] = False,
    headless: Callable[[Knobs], bool] = lambda knobs: False,
    only: Mapping[str, Mapping[str, Sequence[str]]] | None = None,
    rank: Callable[[Knobs], int | None] = lambda knobs: None,
    singly: Callable[[Knobs], bool] = lambda knobs: False,
) -> Callable[[Callable[..., Outcome]], Callable[..., Outcome]]:
    """Make a function a method.

    Args:
        verb: the shelf it stands on; its name is `verb.function`.
        paper: the arXiv number.
        changes: what it does to the model. A step that "changes weights" and leaves them as they were is an error.
        memory: what it holds per parameter, for `overhaul plan`: some pieces of a tensor ("stream"), activations only
            ("forward"), gradients and one float32 accumulator or two ("gradient"), or gradients and optimizer state
            ("training"). Where it depends on a knob: {knob: {value: memory}}, for every value.
        copies: of its knobs, how many copies of the weights it makes beside the models that it is given.
        alone: whether it runs blocks by themselves, which some conversions rule out: always, or with these values of a knob.
        makes: the products in `Outcome.made` and what they are, so that a recipe's later steps can be checked beforehand.
        headless: of its knobs, whether with these it reads examples through a model without a head, which gives no logits.
        only: products that it makes with some values of a knob alone: {product: {knob: values}}.
        rank: of its knobs, the rank of adapters that train in place of the weights; None where the weights train.
        singly: of its knobs, whether it holds gradients of single examples.

    Raises:
        TypeError: an argument is not documented, or a material is of no kind that a recipe can give.
    """

    def decorate(function: Callable[..., Outcome]) -> Callable[..., Outcome]:
        signature = Signature.of(function, f"{verb}.{function.__name__}")
        doc = inspect.cleandoc(function.__doc__ or "")
        described = Method(
            name=f"{verb}.{function.__name__}",
            verb=verb,
            paper=paper,
            changes=changes,
            memory=memory,
            copies=copies,
            headless=headless,
            rank=rank,
            singly=singly,
            summary=doc.partition("\n\n")[0].replace("\n", " "),
            doc=inspect.cleandoc(sys.modules[function.__module__].__doc__ or "") + "\n\n" + doc,
            makes=dict(makes or {}),
            only=dict(only or {}),
            alone=alone,
            module=function.__module__,
            call=function,
            **vars(signature),
        )
        materials = {material.name: material for material in described.materials}

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Outcome:
            given = dict(zip(materials, args, strict=False))
            if len(args) > len(materials):
                raise TypeError(f"{described.name} takes {len(materials)} materials, not {len(args)}; knobs go by name")
            given |= {name: value for name, value in kwargs.items() if name in materials}
            given = {name: _as_asked(described.name, materials[name], value) for name, value in given.items()}
            knobs = {name: value for name, value in kwargs.items() if name not in materials}
            if described.writes:
                given[OUT] = knobs.pop(OUT, None)
                if given[OUT] is None:
                    raise RequestError(f"{described.name} writes a folder: say where, with out=FOLDER.")
            outcome = checked(function(**given, **described.arguments(knobs)), described.name, described.makes)
            if changes == "nothing" and outcome.model is not None:
                raise TypeError(f"{described.name} changes nothing, so its Outcome has no model")
            return outcome

        described = replace(described, call=call)
        call.method = described  # pyright: ignore[reportAttributeAccessIssue]
        return call

    return decorate


def _as_asked(method: str, material: Material, value: Any) -> Any:
    """A folder, hub name or starter as the checkpoint that a method reads; a model must be opened by the caller."""
    if material.many and not isinstance(value, str | Path | nn.Module):
        return [_as_asked(method, replace(material, many=False), one) for one in value]
    if material.many:
        raise RequestError(f"{method}: {material.name} is several; write {material.name}=[...].")
    if material.kind == "checkpoint" and isinstance(value, str | Path):
        return facts(value)
    if material.kind in ("checkpoint", "model") and isinstance(value, list | tuple):
        raise RequestError(f"{method}: {material.name} is one {material.kind}, and {len(value)} are given in a list.")
    if material.kind == "checkpoint" and isinstance(value, nn.Module):
        raise RequestError(
            f"{method}: {material.name} is a folder or a name, and a model in memory is given. Save it first: "
            f"{material.name}=oh.save(model, processor, FOLDER)."
        )
    if material.kind == "model" and isinstance(value, str | Path):
        raise RequestError(f"{method}: {material.name} is a model; open {str(value)!r} first: model, _ = oh.open(...).")
    return value


class _Shelf(types.ModuleType):
    """A verb's package: each method is imported when it is first asked for, and the name stands for the function.

    The import system would put the file's module under that name.
    """

    def __getattr__(self, name: str) -> Any:
        if name not in self.__all__:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        importlib.import_module(f"{self.__name__}.{name}")
        return vars(self)[name]

    def __dir__(self) -> list[str]:
        return sorted(self.__all__)

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
    if short:
        raise RequestError(f"{name!r} may be {' or '.join(short)}; write the verb with it.")
    raise RequestError(f"There is no method {name!r}.{did_you_mean(name, [*known, *(n.split('.')[1] for n in known)])}")
