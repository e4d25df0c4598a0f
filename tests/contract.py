"""The case by which a method's tests join the battery of `test_contract`, and what the battery tries it with.

    CASE = Case(
        method=npo,
        materials=lambda: {"model": tiny_llama(), "forget": some_facts(0, 8), "retain": some_facts(8, 8)},
        knobs={"steps": 3, "lr": 1e-3},                  # small: it is called some dozens of times
        varied={"beta": (0.1, 2.0), "lr": (1e-3, 1e-2)}, # for every knob two values that must give different results
        idle={"epochs": "steps is given"},               # knobs that cannot matter in this case, and why
    )

A third entry in `varied` holds the other knobs that this one needs to matter: `"rank": (2, 4, {"weights": "lora"})`.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import importlib.util
import inspect
import json
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import learnt
from conftest import tiny_tokenizer
from overhaul import models
from overhaul.data.encode import encode_images, encode_qa
from overhaul.data.examples import IGNORED, Examples
from overhaul.data.tasks import people
from overhaul.method import Method, Outcome
from overhaul.models import Checkpoint
from overhaul.rollouts import prompt_of

TESTS = Path(__file__).parent


@dataclass(frozen=True)
class Case:
    """How a method is tried.

    Attributes:
        method: the function.
        materials: makes them anew, in an empty folder if it takes one; or each by name, a value or a function that makes it.
        knobs: those of the call that all others vary.
        varied: two values of every other knob that must give different results.
        idle: knobs that cannot matter here, each with the reason.
        moves: which tensors of the model may change, by a regular expression on their names. If None, every parameter and
            no buffer; what has another name or shape than before is always new.
        apart: what of the battery does not hold, and why: "modes", "hooks", "requires_grad", "random state", "goes on",
            "peak".
    """

    method: Callable[..., Outcome]
    materials: Callable[..., Mapping[str, Any]] | Mapping[str, Any]
    knobs: Mapping[str, Any] = field(default_factory=dict)
    varied: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    idle: Mapping[str, str] = field(default_factory=dict)
    moves: str | None = None
    apart: Mapping[str, str] = field(default_factory=dict)

    @property
    def known(self) -> Method:
        """What the decorator learnt."""
        return self.method.method  # pyright: ignore[reportFunctionMemberAccess]

    def made(self) -> dict[str, Any]:
        """The materials, from the seed 0."""
        torch.manual_seed(0)
        given = self.materials
        if callable(given):
            wants_a_folder = inspect.signature(given).parameters
            given = given(Path(tempfile.mkdtemp(dir=learnt.place))) if wants_a_folder else given()
        return {name: _fresh(value) for name, value in given.items()}

    def run(self, out: Path, materials: Mapping[str, Any] | None = None, **knobs: Any) -> Outcome:
        """Call it from the seed 0; `out` is written where it writes a folder."""
        given = self.made() if materials is None else materials
        where = {"out": out} if self.known.writes else {}
        torch.manual_seed(0)
        return self.method(**given, **{**self.knobs, **knobs}, **where)


def _fresh(value: Any) -> Any:
    if isinstance(value, nn.Module):
        return copy.deepcopy(value)
    if callable(value):
        return value()
    return [_fresh(one) for one in value] if isinstance(value, list) else value


def cases(methods: Mapping[str, Method]) -> dict[str, Case]:
    """The CASE in the test file of every method that has one."""
    found: dict[str, Case] = {}
    for name in methods:
        case = getattr(_tests_of(name), "CASE", None)
        if case is not None:
            found[name] = Case(**case) if isinstance(case, Mapping) else case
    return found


@functools.cache
def _tests_of(name: str) -> Any:
    """tests/VERB/test_NAME.py; by its path, since `inspect` is a name of Python's own."""
    verb, _, function = name.partition(".")
    path = TESTS / verb / f"test_{function}.py"
    if not path.exists():
        return None
    spec = importlib.util.spec_from_file_location(f"case_of_{verb}_{function}", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# materials that are small and that a recipe can name


def some_facts(start: int, count: int) -> Examples:
    """Questions about made-up people with their answers, for `tiny_llama`."""
    return encode_qa(people()[start : start + count], tiny_tokenizer(), prompt="{question}")


def pictures(labels: Sequence[int], seed: int = 0, **columns: Sequence[Any]) -> Examples:
    """Noise around one picture of 8 x 8 for every label, which `tiny_vit` can learn; `columns` are added to the rows."""
    means = torch.randn(10, 8, 8, generator=torch.Generator().manual_seed(7))
    draw = torch.Generator().manual_seed(seed)
    rows = [
        {"image": (means[y] + 0.3 * torch.randn(8, 8, generator=draw)).tolist(), "label": y, "n": n}
        | {name: values[n] for name, values in columns.items()}
        for n, y in enumerate(labels)
    ]
    return encode_images(rows)


# what came out


def marks(outcome: Outcome, subject: Any = None) -> dict[str, str]:
    """Every part of what a method gave back, by name, as text that can be compared.

    Args:
        outcome: what it returned.
        subject: the model that it was given, which counts where it returned none.
    """
    found = {
        f"{kind}/{name}": json.dumps(value, sort_keys=True, default=vars)
        for kind in ("facts", "layers", "curves", "tables")
        for name, value in getattr(outcome, kind).items()
    }
    result = subject if outcome.model is None else outcome.model
    for name, value in [("model", result), *((f"made/{name}", value) for name, value in outcome.made.items())]:
        found |= {f"{name}/{part}": mark for part, mark in _marks(value)}
    return found


def _marks(value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, Checkpoint):
        value = value.folder
    if isinstance(value, nn.Module):
        value = value.state_dict()
    if isinstance(value, Path):
        for path in sorted(value.rglob("*")):
            if path.suffix == ".safetensors":
                for name, mark in _marks(load_file(path)):
                    yield f"{path.relative_to(value)}/{name}", mark
            elif path.name == "config.json":
                yield str(path.relative_to(value)), path.read_text()
    elif isinstance(value, Examples):
        yield "examples", value.digest()
    elif isinstance(value, Tensor):
        yield "", f"{tuple(value.shape)} {hashlib.sha256(_bytes(value)).hexdigest()}"
    elif isinstance(value, Mapping):
        for name, one in value.items():
            for part, mark in _marks(one):
                yield f"{name}/{part}", mark
    else:
        yield "", json.dumps(value, sort_keys=True, default=str)


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


class Held(TorchDispatchMode):
    """The most bytes of tensors that lived at once, with those of the materials; exact, and the same everywhere."""

    def __init__(self, materials: Mapping[str, Any]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: dict[int, Any] = {}
        for value in materials.values():
            if isinstance(value, nn.Module):
                for tensor in value.state_dict().values():
                    self.note(tensor.untyped_storage())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, Tensor) and value.device.type == "cpu":
                self.note(value.untyped_storage())
        return out

    def note(self, storage: Any) -> None:
        """Count memory from now until it is let go."""
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return

        def gone(_: Any) -> None:
            self.now -= size
            del self.known[key]

        self.known[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


# a recipe


def as_recipe(case: Case, folder: Path) -> dict[str, Any]:
    """A recipe whose one step is the case, with its materials as files in `folder`."""
    known, given = case.known, case.made()
    subject = known.subject
    named: dict[str, Any] = {}
    for material in known.materials:
        if material is subject or given.get(material.name) is None:
            continue
        value = given[material.name]
        parts = [
            _as_source(one, folder / f"{material.name}-{n}", material.kind)
            for n, one in enumerate(value if material.many else [value])
        ]
        named[material.name] = parts if material.many else parts[0]
    if subject is not None:
        model = _saved(given[subject.name], folder / "model")
    else:
        first = named[known.materials[0].name]
        model = Path((first[0] if isinstance(first, list) else first)["model"])
    return {"model": str(model), "materials": named, "steps": [{known.name: dict(case.knobs)}]}


def _as_source(value: Any, path: Path, kind: str) -> dict[str, Any]:
    if isinstance(value, Mapping):
        save_file(dict(value), path.with_suffix(".safetensors"))
        return {"tensors": str(path.with_suffix(".safetensors"))}
    if isinstance(value, nn.Module | Checkpoint | str | Path):
        return {"model": str(_saved(value, path))}
    pairs = isinstance(value, Examples) and value.kind == "pairs"
    rows = (
        rows_of(value)
        if isinstance(value, Examples) and not pairs
        else [dict(row) for row in (value.rows if pairs else value)]
    )
    path.with_suffix(".jsonl").write_text("".join(json.dumps(row, default=str) + "\n" for row in rows))
    source: dict[str, Any] = {"from": str(path.with_suffix(".jsonl"))}
    if kind == "rows":
        return {**source, "as": "rows"}
    if pairs:
        return {**source, "as": "preference", "prompt": "{question}"}
    return {**source, "as": "qa", "prompt": "{question}"} if "question" in rows[0] else source


def rows_of(examples: Examples) -> list[dict[str, Any]]:
    """Rows that a recipe can read in place of the examples: pictures, or questions with answers."""
    if examples.kind == "images":
        pixels = ({"image": item["pixel_values"].tolist(), "label": int(item["labels"])} for item in examples)
        return [{**row, **shown} for row, shown in zip(examples.rows, pixels, strict=True)]
    if "question" in examples.rows[0]:
        return [dict(row) for row in examples.rows]
    told = tiny_tokenizer()
    return [
        {
            **row,
            "question": told.decode(prompt_of(item)) or "a",  # no row may be without one
            "answer": told.decode(item["labels"][item["labels"] != IGNORED]),
        }
        for row, item in zip(examples.rows, examples, strict=True)
    ]


def _saved(value: Any, folder: Path) -> Path:
    if isinstance(value, Checkpoint):
        return value.folder
    if not isinstance(value, nn.Module):
        return Path(value)
    config: Any = getattr(value, "config", None)
    return models.save(value, tiny_tokenizer() if hasattr(config, "vocab_size") else None, folder)
