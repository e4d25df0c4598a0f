"""What a mergekit file makes: for every tensor of the new model where its inputs lie, its parameters, and its dtype.

1. `models:` takes every tensor of the base (or first) model from all. A line over depth runs over the blocks of its stack.
2. `slices:` lays runs of blocks one on another. What comes before the blocks is merged as the first slice says, what comes
   after them as the last one. A line over depth runs over the blocks of its slice.
3. Outside the blocks a line has its first value, after them too: so mergekit has it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from overhaul.errors import RequestError
from overhaul.mergekit.document import Document
from overhaul.mergekit.formulas import Part
from overhaul.mergekit.methods import REQUIRED
from overhaul.mergekit.settings import Settings, value_of
from overhaul.models import DTYPES, Checkpoint
from overhaul.weights import TensorFacts, TensorIndex, aligned
from overhaul.weights.agreement import check_words
from overhaul.weights.depths import Places, list_of
from overhaul.weights.index import check_alike, sizes_that_differ
from overhaul.weights.output import with_dtype
from overhaul.weights.restacked import path_in, restacked, stack_without_weights
from overhaul.weights.vocabularies import Reworded


@dataclass(frozen=True)
class Layout:
    """The new model, before any weight is read.

    Attributes:
        index: its tensors as they are to be stored.
        inputs: where each tensor's inputs lie.
        parts: what becomes of them; of whole numbers there is none, they have to agree.
        config: its config.json.
        laid: whether it is laid of slices.
        first: the model that gives everything else, as it is read.
    """

    index: TensorIndex
    inputs: Mapping[str, Sequence[TensorFacts]]
    parts: Mapping[str, Part]
    config: Mapping[str, Any]
    laid: bool
    first: Checkpoint


@dataclass(frozen=True)
class Run:
    """Blocks of several models, merged side by side: a slice, or all there is.

    Attributes:
        named: the models.
        starts: the first block of each.
        count: how many blocks.
        settings: of each model.
        shared: of the slice.
        base: of its models the one that is the base; None where the method has none.
        where: in the file, for messages.
    """

    named: tuple[str, ...]
    starts: tuple[int, ...]
    count: int
    settings: tuple[Settings | None, ...]
    shared: Settings | None
    base: str | None
    where: str


def laid_out(document: Document, known: Mapping[str, Checkpoint]) -> Layout:
    """Find out what the file makes of these models.

    Args:
        document: the file.
        known: every model that it names, in that order.

    Raises:
        RequestError: the models do not correspond, a method lacks a parameter or a model, or a slice is not there.
    """
    indexes = dict(zip(known, aligned(list(known.values())), strict=True))
    make = _of_models if document.file.models else _of_slices
    layout = make(document, known, indexes)
    _check_effect(document, list(layout.parts.values()))
    dtypes = [one.dtype for one in layout.index.tensors.values() if one.dtype.is_floating_point]
    main = max(set(dtypes), key=dtypes.count, default=None)
    given = document.file.dtype or document.file.out_dtype
    if main is not None and (given or str(main) != f"torch.{layout.first.dtype}"):
        key = "torch_dtype" if "torch_dtype" in layout.config else "dtype"
        stored = str(main).removeprefix("torch.")
        return replace(layout, config={**with_dtype(layout.config, stored), key: stored})
    return layout


def _of_models(document: Document, known: Mapping[str, Checkpoint], indexes: Mapping[str, TensorIndex]) -> Layout:
    file = document.file
    assert file.models
    named, settings = [one.model for one in file.models], [one.parameters for one in file.models]
    if file.base_model and file.base_model not in named:
        named.append(file.base_model)
        settings.append(None)
    run = _checked(document, Run(tuple(named), (0,) * len(named), 0, tuple(settings), None, file.base_model, "models"))
    first = next(iter(indexes.values()))
    used = [first, *(indexes[one] for one in named if indexes[one] is not first)]
    check_alike(used, lambda _: True)
    _check_words(known, used)
    inputs: dict[str, Sequence[TensorFacts]] = {}
    parts: dict[str, Part] = {}
    for name, tensor in first.tensors.items():
        found = [indexes[one].tensors[name] for one in run.named]
        part = _part(document, run, name, [name] * len(found), found, functools.partial(_share, tensor))
        inputs[name] = part.inputs if part else found
        parts |= {name: part} if part else {}
    stored = {name: replace(one, dtype=_stored(document, parts.get(name), one)) for name, one in first.tensors.items()}
    return Layout(replace(first, tensors=stored), inputs, parts, first.config, False, next(iter(known.values())))


def _check_words(known: Mapping[str, Checkpoint], indexes: Sequence[TensorIndex]) -> None:
    """Refuse tokenizers that number words differently, unless the file asks for one vocabulary."""
    if not isinstance(next(iter(known.values())), Reworded):
        check_words(indexes, list(indexes[0].tensors.values()))


def _share(tensor: TensorFacts) -> float:
    """The place of a tensor over the blocks of its stack, as lines have it."""
    if not 0 <= tensor.depth < tensor.blocks:
        return 0.0
    return tensor.depth / (tensor.blocks - 1) if tensor.blocks > 1 else 1.0


def _of_slices(document: Document, known: Mapping[str, Checkpoint], indexes: Mapping[str, TensorIndex]) -> Layout:
    names = list(known)
    sources = list(known.values())
    stacks = [stack_without_weights(f"{document.called}", one) for one in sources]
    sizes = {name: len(stack) for name, stack in zip(names, stacks, strict=True)}
    runs = list(_runs(document, sizes))
    first = indexes[names[0]]
    paths = {name: path_in(indexes[name], stack) for name, stack in zip(names, stacks, strict=True)}
    lists = {
        name: list_of({key: one.places[key] for key, one in index.tensors.items()}, paths[name])
        for name, index in indexes.items()
    }
    places = [(names.index(run.named[0]), run.starts[0] + n) for run in runs for n in range(run.count)]
    config, model = first.config, stacks[0].model
    if places != [(0, block) for block in range(sizes[names[0]])]:
        config, model = restacked(f"{document.called}", sources, stacks, places)
    outer = dict.fromkeys([names[0], *runs[0].named, *runs[-1].named])
    _check_words(known, [indexes[name] for name in outer])
    made: dict[str, tuple[Part | None, Sequence[TensorFacts]]] = {}
    for name, run, originals, t in _tensors(runs, first, indexes, lists):
        found = [indexes[one].tensors[original] for one, original in zip(run.named, originals, strict=True)]
        part = _part(document, run, name, originals, found, lambda t=t: t)
        _check_shapes(document, name, run.named, found, indexes)
        made[name] = part, part.inputs if part else found
    where = Places(list(made), lambda: model)
    inputs = {name: [replace(one, name=name, places=where) for one in found] for name, (_, found) in made.items()}
    parts = {name: replace(part, inputs=tuple(inputs[name])) for name, (part, _) in made.items() if part}
    stored = {
        name: replace(found[0], dtype=_stored(document, parts.get(name), found[0])) for name, found in inputs.items()
    }
    return Layout(replace(first, tensors=stored, config=config), inputs, parts, config, True, sources[0])


def _tensors(
    runs: Sequence[Run], first: TensorIndex, indexes: Mapping[str, TensorIndex], lists: Mapping[str, Any]
) -> Iterator[tuple[str, Run, list[str], float]]:
    """Every tensor of a model of slices: its name, its slice, what it is called in the models of it, its place there."""
    prefix, own = next(iter(lists.values()))
    inside = {name for blocks in own.values() for name in blocks}
    for name, tensor in first.tensors.items():
        if name not in inside:
            run = runs[-1] if tensor.depth >= tensor.blocks else runs[0]
            lacking = [one for one in run.named if name not in indexes[one].tensors]
            if lacking:
                raise RequestError(
                    f"{first.source} has {name}, and {lacking[0]} lacks it. {_said(first, indexes[lacking[0]])}"
                )
            yield name, run, [name] * len(run.named), 0.0
    position = 0
    for run in runs:
        for n in range(run.count):
            blocks = [
                {rest: name for name, rest in lists[one][1][start + n].items()}
                for one, start in zip(run.named, run.starts, strict=True)
            ]
            for rest in blocks[0]:
                lacking = [one for one, block in zip(run.named, blocks, strict=True) if rest not in block]
                if lacking or any(len(block) != len(blocks[0]) for block in blocks):
                    other = lacking[0] if lacking else run.named[-1]
                    raise RequestError(
                        f"{run.where}: the blocks of {run.named[0]} and {other} do not have the same tensors, such as "
                        f"{rest}. {_said(indexes[run.named[0]], indexes[other])}"
                    )
                name = ".".join(filter(None, (prefix, str(position), rest)))
                yield name, run, [block[rest] for block in blocks], n / (run.count - 1) if run.count > 1 else 1.0
            position += 1


def _said(first: TensorIndex, other: TensorIndex) -> str:
    return "".join(f"{one}. " for one in sizes_that_differ(first, other)) + "Give models of one architecture."


def _runs(document: Document, sizes: Mapping[str, int]) -> Iterator[Run]:
    for number, part in enumerate(document.file.slices or ()):
        where = f"{document.called}, slices[{number}]"
        for source in part.sources:
            start, end = source.layer_range
            if not 0 <= start < end <= sizes[source.model]:
                raise RequestError(
                    f"{where}: layer_range: [{start}, {end}], but {source.model} has {sizes[source.model]} blocks, from 0 "
                    f"on. The second number is the first block left out: at most [0, {sizes[source.model]}]."
                )
        lengths = [source.layer_range[1] - source.layer_range[0] for source in part.sources]
        if len(set(lengths)) > 1:
            raise RequestError(f"{where}: its sources have {lengths} blocks. Give the same number of each.")
        run = Run(
            tuple(one.model for one in part.sources),
            tuple(one.layer_range[0] for one in part.sources),
            lengths[0],
            tuple(one.parameters for one in part.sources),
            part.parameters,
            part.base_model or document.file.base_model,
            where,
        )
        yield _checked(document, run)


def _checked(document: Document, run: Run) -> Run:
    """A run with what its method needs: the base first, where it has one."""
    kind, method = document.kind, document.file.merge_method
    where = run.where if run.where != "models" else f"{document.called}, models"
    twice = [name for name in run.named if run.named.count(name) > 1]
    if twice:
        raise RequestError(f"{where}: {twice[0]} is named twice. Give it once, with the sum of its weights.")
    base = run.base if kind.base != "ignored" and run.base in run.named else None
    if kind.base == "required" and base is None:
        lacks = f"its base_model {run.base} is not among its sources" if run.base else "there is no `base_model:`"
        raise RequestError(f"{where}: {method} needs the model from which the others were tuned, and {lacks}.")
    count, others = len(run.named), len(run.named) - (base is not None)
    least, most = (kind.least, kind.most) if kind.base != "optional" else (2 + bool(base), 2 + bool(base))
    if count < least or (most is not None and count > most):
        wanted = f"at least {least} models" if most is None else "one model" if most == 1 else f"{most} models"
        raise RequestError(
            f"{where}: {method} merges {wanted}{' (the base counted)' if base else ''}, and there are {count}: "
            f"{', '.join(run.named)}."
        )
    if kind.base == "required" and not others:
        raise RequestError(f"{where}: there is nothing to merge into the base {base}.")
    if base is None:
        return replace(run, base=None)
    order = sorted(range(count), key=lambda n: run.named[n] != base)
    taken = {key: tuple(getattr(run, key)[n] for n in order) for key in ("named", "starts", "settings")}
    return replace(run, base=base, **taken)


def _part(
    document: Document, run: Run, name: str, originals: Sequence[str], found: Sequence[TensorFacts], share: Any
) -> Part | None:
    """What becomes of a tensor; None if it is of whole numbers."""
    if not all(one.dtype.is_floating_point for one in found):
        return None
    file, kind = document.file, document.kind
    shared: dict[str, Any] = {}
    own: dict[str, list[Any]] = {}
    scopes = [run.shared, file.parameters]
    for key, known in kind.parameters.items():
        places = range(run.base is not None and known.of == "each but the base", len(run.named))
        if known.of == "all":
            shared[key] = _value(document, key, scopes, name, share, name)
        else:
            own[key] = [
                _value(
                    document, key, [run.settings[n], *scopes], originals[n], share, f"{run.named[n]}: {originals[n]}"
                )
                for n in places
            ]
    given = DTYPES[file.dtype.removeprefix("torch.")] if file.dtype else None
    dtype = given or functools.reduce(torch.promote_types, (one.dtype for one in found))
    part = Part(tuple(found), run.named, shared, own, dtype, run.base is not None, len(set(originals)) == 1)
    _check_values(document, part, name)
    return part


def _value(document: Document, key: str, scopes: Sequence[Settings | None], tensor: str, share: Any, what: str) -> Any:
    known = document.kind.parameters[key]
    given = [scope for scope in scopes if scope is not None and key in scope]
    # without a line the depth need not be known: to find it may import for seconds
    value = value_of(key, known.kind, given, tensor, share() if given else 0.0)
    if value is None and known.default is REQUIRED:
        raise RequestError(
            f"{document.called}: {document.file.merge_method} needs the parameter {key!r}, and nothing says "
            f"it for {what}. Write it under `parameters:` of the model, of the slice, or of the file."
        )
    return known.default if value is None else value


def _check_values(document: Document, part: Part, name: str) -> None:
    """Refuse numbers that no formula can use."""
    where = f"{document.called}, {document.file.merge_method}, {name}"
    weights = part.own.get("weight", ())
    # 0.1 + 0.2 - 0.3 is not 0 in binary numbers, and the quotient would be noise
    if document.file.merge_method == "linear" and part.shared["normalize"] and _is_zero(weights):
        raise RequestError(f"{where}: the weights {list(weights)} sum to 0 and cannot be divided by. See `normalize`.")
    for density, epsilon in zip(part.own.get("density", ()), part.own.get("epsilon", ()), strict=False):
        if 0 < density < 1 and not (density - epsilon > 0 and density + epsilon < 1):
            raise RequestError(
                f"{where}: with density {density} and epsilon {epsilon}, entries would be kept with chances from "
                f"{density - epsilon:.3g} to {density + epsilon:.3g}. They have to be above 0 and below 1."
            )


def _is_zero(weights: Sequence[float]) -> bool:
    """Whether a sum is 0 to the precision of float32."""
    return abs(math.fsum(weights)) <= 10 * torch.finfo(torch.float32).eps * math.fsum(map(abs, weights))


def _check_effect(document: Document, parts: Sequence[Part]) -> None:
    """Refuse numbers with which every tensor stays as it is."""
    idle = document.kind.idle
    if idle is not None and parts and all(map(idle[0], parts)):
        raise RequestError(
            f"{document.called}: with these parameters {document.file.merge_method} changes nothing: every tensor would be "
            f"that of {parts[0].named[0]}. {idle[1]}"
        )


def _stored(document: Document, part: Part | None, tensor: TensorFacts) -> torch.dtype:
    if part is None:
        return tensor.dtype
    return DTYPES[document.file.out_dtype.removeprefix("torch.")] if document.file.out_dtype else part.dtype


def _check_shapes(
    document: Document,
    name: str,
    named: Sequence[str],
    found: Sequence[TensorFacts],
    indexes: Mapping[str, TensorIndex],
) -> None:
    for other, tensor in zip(named, found, strict=True):
        if tensor.shape != found[0].shape:
            raise RequestError(
                f"{document.called}: {name} is {list(found[0].shape)} in {named[0]} and "
                f"{list(tensor.shape)} in {other}. {_said(indexes[named[0]], indexes[other])} Where only their numbers of "
                "words differ, write tokenizer_source: base (or union)."
            )
