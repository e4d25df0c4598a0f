"""A mergekit file, carried out: what it makes is written by the same streams that all merges of Overhaul use.

A pass over the files may rank (what `ties` and `breadcrumbs` keep), another may measure (angles, and sizes before and after
what `rescale` grows); the last one writes. Memory is that of pieces of a tensor; but a `model+adapter` is opened, merged and
stored beside the new folder first, and removed at the end.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import threading
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from overhaul import session
from overhaul.adapter_folders import check_fits
from overhaul.errors import RequestError, RunError
from overhaul.merge._kinship import Kinship
from overhaul.mergekit import words
from overhaul.mergekit.document import Document, model_and_adapter, read
from overhaul.mergekit.formulas import Found, Part
from overhaul.mergekit.layout import Layout, laid_out
from overhaul.models import Checkpoint, facts, load_processor, planned, save
from overhaul.outcome import Outcome
from overhaul.recipe.plan import STREAMED_BYTES, STREAMED_BYTES_PER_SECOND, duration
from overhaul.report.numbers import humanise
from overhaul.weights import TensorFacts, cuts, differences, sums_of
from overhaul.weights.card import describe
from overhaul.weights.output import Storage, check_new, write_new

FILE = "mergekit_config.yml"
"""The file's text, in the new folder: so mergekit calls it too."""


@dataclass(frozen=True, repr=False)
class MergePlan:
    """What a file would make, by configs and headers alone.

    Attributes:
        method: mergekit's name of it.
        models: what is read, as the file names it, with its size in bytes.
        architecture: of the new model.
        blocks: how many it has; None where it has no single stack.
        parameters: how many numbers.
        written_bytes: size of its weights.
        passes: how often the files are read.
        peak_bytes: memory beside the interpreter and its libraries.
        seconds: at least.
        notes: what a user should know before.
    """

    method: str
    models: Mapping[str, int]
    architecture: str
    blocks: int | None
    parameters: int
    written_bytes: int
    passes: int
    peak_bytes: int
    seconds: float
    notes: tuple[str, ...]

    def print(self, console: Console) -> None:
        """As `overhaul merge --dry-run` prints it."""
        table = Table("reads", "on disk", box=None, pad_edge=False)
        for name, size in self.models.items():
            table.add_row(escape(name), humanise(size, "bytes"))
        console.print(table)
        blocks = "" if self.blocks is None else f" of {self.blocks} blocks"
        console.print(
            f"{self.method} makes a {self.architecture}{blocks}: {humanise(self.parameters, 'parameters')} parameters, "
            f"{humanise(self.written_bytes, 'bytes')} on disk."
        )
        console.print(
            f"Peak memory {humanise(self.peak_bytes, 'bytes')} beside the interpreter and its libraries; at "
            f"least {duration(self.seconds)} from and to a local disk, in {self.passes} passes."
        )
        for note in self.notes:
            console.print(f"[yellow]Note:[/] {escape(note)}")

    def __repr__(self) -> str:
        """As it is printed."""
        console = Console(width=110, file=io.StringIO())
        self.print(console)
        return console.file.getvalue().rstrip()  # pyright: ignore[reportAttributeAccessIssue]


def plan_config(
    source: str | Path | Mapping[str, Any], out: str | Path | None = None, *, trust_remote_code: bool = False
) -> MergePlan:
    """Check a mergekit file and say what it would make, before any weight is read.

    Args:
        source: the file, or a mapping that says the same.
        out: the folder that a merge would write, to be checked too.
        trust_remote_code: Python code that comes with the models may run.

    Raises:
        RequestError: as in `merge_config`.
    """
    document = read(source)
    known = _known(document, trust_remote_code, None if out is None else Path(out))
    words.chat_template(document, known)
    layout = _layout(document, known)
    parts = list(layout.parts.values())
    passes = 1 + 4 * any(_ranked(document, one) for one in parts) + any(document.kind.measured(one) for one in parts)
    reads = sum(one.bytes for one in known.values())
    merged = [2 * one.bytes for one in known.values() if one.is_adapter]
    tensors = layout.index.tensors.values()
    written = sum(one.bytes for one in tensors)
    stacks = list(layout.index.stacks.values())
    return MergePlan(
        document.file.merge_method,
        {name: one.bytes for name, one in known.items()},
        next(iter(known.values())).architecture,
        stacks[0] if len(stacks) == 1 else None,
        sum(one.numbers for one in tensors),
        written,
        passes,
        max([STREAMED_BYTES, *merged]),
        (reads * passes + written + sum(merged)) / STREAMED_BYTES_PER_SECOND,
        tuple(document.notes + [f"The configs differ: {one}." for one in differences(_plain_facts(known))]),
    )


def merge_config(
    source: str | Path | Mapping[str, Any], out: str | Path, *, seed: int = 0, trust_remote_code: bool = False
) -> Outcome:
    """Make what a mergekit configuration file describes: `overhaul merge` from Python.

    Args:
        source: the file, or a mapping that says the same. Models are folders, hub names, `starter:NAME`, or
            `model+adapter`.
        out: folder to write; must not exist.
        seed: of what `dare_*` and `della*` draw.
        trust_remote_code: Python code that comes with the models may run.

    Returns:
        The folder. Facts: the method, number of tensors, how many are not those of the base (or first model), in what the
        folders differ, the seed; where changes from a base are added, how far each model is from it.

    Raises:
        RequestError: the file says what mergekit does not know or what is not supported, or the models do not fit together.
            Nothing was written.
        RunError: a number is not finite, nothing changed, or the disk is full. Nothing is left behind.
    """
    document, out = read(source), Path(out)
    known = _known(document, trust_remote_code, out)
    template = words.chat_template(document, known)
    layout = _layout(document, known)
    for note in document.notes:
        warnings.warn(note, stacklevel=2)
    if said := differences(_plain_facts(known)):
        warnings.warn(f"The configs differ, and the result follows the first: {'; '.join(said)}.", stacklevel=2)
    session.begins()
    with _without_adapters(known, out) as plain:
        if any(plain[name] is not one for name, one in known.items()):
            layout = _layout(document, plain)
        return _written(document, plain, layout, out, seed, template)


def _known(document: Document, trusted: bool, out: Path | None) -> dict[str, Checkpoint]:
    """What the file names, the base first. An adapter keeps the name that the file gives to it and its model."""
    if out is not None:
        check_new(out)
    known: dict[str, Checkpoint] = {}
    names: dict[tuple[Path, ...], str] = {}
    for named in document.named():
        model, adapter = (named, None) if Path(named).is_dir() else model_and_adapter(named)
        one = facts(document.place(model), trust_remote_code=trusted)
        if adapter is not None:
            one = replace(facts(document.place(adapter), trust_remote_code=trusted, base=one), source=named)
            if not one.is_adapter:
                raise RequestError(f"{document.called}: {adapter} in {named!r} is no adapter.")
        if one.is_new:
            raise RequestError(f"{document.called}: {named} has no weights that could be merged.")
        known[named] = one
        folders = tuple(
            part.folder.resolve() for part in (one, one.base) if part is not None and part.folder is not None
        )
        if (same := names.setdefault(folders, named)) != named:
            raise RequestError(f"{document.called}: {same} and {named} are the same folder. Write one name for it.")
        for folder in folders:
            if out is not None and folder in out.resolve().parents:
                raise RequestError(f"{out} lies inside {named}, which is read. Choose a folder beside it.")
    return known


def _plain_facts(known: Mapping[str, Checkpoint]) -> list[Checkpoint]:
    """The models as they are without their adapters, which leave every tensor's name and shape as it is."""
    return [replace(one.base, source=one.source) if one.base is not None else one for one in known.values()]


def _layout(document: Document, known: Mapping[str, Checkpoint]) -> Layout:
    for one in known.values():
        if one.base is not None and (network := planned(one.base)) is not None:
            check_fits(one, network)
    plain = dict(zip(known, _plain_facts(known), strict=True))
    return laid_out(document, words.with_words(document, plain))


@contextlib.contextmanager
def _without_adapters(known: Mapping[str, Checkpoint], out: Path) -> Iterator[dict[str, Checkpoint]]:
    """The models, those with adapters as plain ones in a folder beside `out`, for as long as they are read."""
    folder = out.with_name(f".{out.name}.adapters")
    shutil.rmtree(folder, ignore_errors=True)
    try:
        plain = dict(known)
        for number, (name, one) in enumerate(known.items()):
            if one.base is not None:
                session.say(f"merging the adapter of {name}")
                made = save(one.open(one.dtype), load_processor(one.base), folder / str(number))
                plain[name] = replace(facts(made), source=name)
        yield plain
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _ranked(document: Document, part: Part) -> bool:
    changes = document.kind.changes
    return changes is not None and len(part.inputs) > 1 and changes.ranked(part)


def _found(document: Document, layout: Layout, seed: int) -> Found:
    """The passes before the last one."""
    kind, found = document.kind, Found(seed=seed)
    ranked = [layout.inputs[name] for name, part in layout.parts.items() if _ranked(document, part)]
    if kind.changes is not None and ranked:
        changes = kind.changes

        def sizes(tensor: TensorFacts, models: list[Tensor]) -> list[Tensor]:
            return changes.sizes(layout.parts[tensor.name], models)

        found.cuts = cuts(ranked, sizes, lambda tensor: changes.ranks(layout.parts[tensor.name]))
    measured = [layout.inputs[name] for name, part in layout.parts.items() if kind.measured(part)]
    if kind.sums is not None and measured:
        sums = kind.sums

        def sums_in(tensor: TensorFacts, models: list[Tensor]) -> Tensor:
            return sums(layout.parts[tensor.name], found, tensor, models)

        found.sums = sums_of(measured, sums_in, whole=kind.whole)
    return found


def _written(
    document: Document, known: Mapping[str, Checkpoint], layout: Layout, out: Path, seed: int, template: str | None
) -> Outcome:
    found = _found(document, layout, seed)
    method, combine = document.file.merge_method, document.kind.combine
    moved: set[str] = set()
    lock = threading.Lock()
    kin = {} if method == "slerp" else _kin(layout)  # slerp has two ends, and adds no changes

    def watched(tensor: TensorFacts, models: list[Tensor]) -> Tensor:
        part = layout.parts[tensor.name]
        for named, model in zip(part.named[1:], models[1:], strict=True):
            if named in kin:
                kin[named].note(tensor.name, len(tensor.shape) > 1, models[0], model)
        made = combine(part, found, tensor, models)
        stored = layout.index.tensors[tensor.name].dtype
        if tensor.name not in moved and not torch.equal(made.to(stored), models[0].to(stored)):
            with lock:
                moved.add(tensor.name)
        return made

    def described(folder: Path) -> None:
        if not moved and method != "passthrough":
            raise RunError(
                f"{method} changed nothing: every tensor is that of {next(iter(layout.parts.values())).named[0]}. Either "
                "the models are the same, or what is added is lost in rounding to the dtype that is counted in: write "
                "`dtype: float32`, or larger weights."
            )
        (folder / "config.json").write_text(json.dumps(dict(layout.config), indent=2) + "\n", encoding="utf-8")
        words.write_words(folder, layout.first, template)
        told = {"file": document.name, "sha256": document.sha256, "seed": seed, "text": document.text}
        describe(folder, list(known.values()), f"mergekit.{method}", told)
        (folder / FILE).write_text(document.text, encoding="utf-8")

    largest = max(path.stat().st_size for path in layout.first.weight_files)
    storage: Storage = {"shard_bytes": largest} if layout.laid else {}
    write_new(layout.index, layout.inputs, watched, out, document.kind.whole, storage, described)
    said = {
        "tensors": len(layout.parts),
        "tensors_changed": len(moved),
        "differences": differences(list(known.values())),
    }
    told = [one.facts(f"mergekit.{method}", [named]) for named, one in kin.items()]
    if told:
        said |= {key: [value for one in told for value in one[key]] for key in ("relative_change", "far_share")}
        said |= {"advice": advice} if (advice := " ".join(one["advice"] for one in told if "advice" in one)) else {}
    return Outcome(out, facts={"method": method, **said, "seed": seed})


def _kin(layout: Layout) -> dict[str, Kinship]:
    """For each model that should have come from the base, what is found of it; none where blocks lie on other blocks."""
    based = [part for part in layout.parts.values() if part.has_base]
    moved = {named for part in based if not part.one_place for named in part.named[1:]}
    return {named: Kinship() for part in based for named in part.named[1:] if named not in moved}
