"""Stack: a deeper or shorter model out of runs of blocks of several models, or of one, as they are.

Kim et al., "SOLAR 10.7B: Scaling Large Language Models with Simple yet Effective Depth Up-Scaling", NAACL 2024,
arXiv:2312.15166, which lays one model over itself; mergekit's `passthrough` with `slices` lays one over another.

    blocks   the first slice's, then the second's, ..., each as it stands in its model; one may stand twice
    others   embeddings, final norm, head, config and tokenizer: the base's

The config's number of blocks and its lists that speak of each block follow them. No weight is changed: the paper trains
the result afterwards (`shrink.heal`), and without that it says less than any of its models.

How it differs from mergekit:

1. Blocks are counted from 0, and both ends belong to a slice: `blocks: 0-23` is mergekit's `layer_range: [0, 24]`.
2. What lies outside the blocks is the base's, not the first and last slice's.
3. Blocks that the class would not build from the config at their new place (other widths, another kind of attention) are
   refused before anything is read.
4. Numbers get the base's dtype.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge
from pydantic import ConfigDict
from torch import Tensor
from typing_extensions import TypedDict  # pydantic asks for it below Python 3.12

from overhaul.errors import RequestError
from overhaul.method import Outcome, method
from overhaul.models import Checkpoint
from overhaul.weights import TensorFacts, TensorIndex, aligned, differences
from overhaul.weights.card import describe
from overhaul.weights.depths import Places, list_of
from overhaul.weights.output import write_new
from overhaul.weights.restacked import path_in, restacked, stack_without_weights

NAME = "merge.stack"


class Slice(TypedDict):
    """A run of blocks of one model: 0 is the base, 1 the first of the others; `blocks` is "3-7", or 3."""

    __pydantic_config__ = ConfigDict(extra="forbid")  # pyright: ignore[reportGeneralTypeIssues]
    model: Annotated[int, Ge(0)]
    blocks: str | int


@method(verb="merge", paper="2312.15166", changes="architecture", memory="stream")
def stack(
    base: Checkpoint, others: Sequence[Checkpoint] = (), *, slices: list[Slice], out: Path | None = None
) -> Outcome:
    """Lay runs of blocks of several models one on another.

    Args:
        base: gives all that lies outside the blocks: embeddings, final norm, head, config, tokenizer and dtype.
        others: further models of its architecture and width; they may be of another depth.
        slices: the runs, from the first block of the new model to its last: `{model: 0, blocks: 0-5}` is the first six
            blocks of the base, `{model: 1, blocks: 3-7}` five of the first of the others.
        out: folder to write.

    Returns:
        The folder, a plain checkpoint of the base's class. Facts: blocks before and after, in what the configs differ.
        Layers: for each block of the new model the model it came from, and its place there.

    Raises:
        RequestError: a model or block does not exist, a model is not used, the models do not fit together, or the class
            cannot have these blocks.
        RunError: a number is not finite.
    """
    assert out is not None
    sources = [base, *others]
    stacks = [stack_without_weights(NAME, one) for one in sources]
    count = len(stacks[0])
    places = _places(slices, sources, [len(one) for one in stacks])
    config, model = restacked(NAME, sources, stacks, places)
    indexes = aligned(sources)
    paths = [path_in(index, one) for index, one in zip(indexes, stacks, strict=True)]
    made, inputs = _laid(indexes, paths, places, model)

    def described(folder: Path) -> None:
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        describe(folder, sources, NAME, {"slices": slices})

    size = max(path.stat().st_size for path in base.weight_files)
    write_new(made, inputs, _as_it_is, Path(out), False, {"shard_bytes": size}, described)
    return Outcome(
        Path(out),
        facts={"blocks_before": count, "blocks_after": len(places), "differences": differences(sources)},
        layers={
            "model it came from": {k: float(n) for k, (n, _) in enumerate(places)},
            "its place there": {k: float(b) for k, (_, b) in enumerate(places)},
        },
    )


def _as_it_is(_: TensorFacts, models: list[Tensor]) -> Tensor:
    return models[0]


def _places(slices: Sequence[Slice], sources: Sequence[Checkpoint], sizes: Sequence[int]) -> list[tuple[int, int]]:
    """(model, block) of every block of the new model."""
    found: list[tuple[int, int]] = []
    for part in slices:
        number, blocks = part["model"], str(part["blocks"])
        if number >= len(sources):
            raise RequestError(
                f"{NAME}: a slice names model {number}, but there are {len(sources)}: 0 is the base"
                f"{f', {len(sources) - 1} the last of the others' if len(sources) > 1 else '; give `others`'}."
            )
        ends = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", blocks)
        if ends is None:
            raise RequestError(f"{NAME}: blocks: {blocks!r} is no run of blocks. Write the first and the last: 3-7.")
        first, last = int(ends[1]), int(ends[2] or ends[1])
        if not first <= last < sizes[number]:
            raise RequestError(
                f"{NAME}: blocks: {blocks}, but {sources[number].source} has the blocks 0 to {sizes[number] - 1}, and both "
                "ends belong to a slice."
            )
        found += [(number, block) for block in range(first, last + 1)]
    unused = [one.source for n, one in enumerate(sources) if n and n not in {number for number, _ in found}]
    if unused:
        raise RequestError(f"{NAME}: no slice takes a block of {unused[0]}. Leave it out of `others`, or add one.")
    if found == [(0, block) for block in range(sizes[0])] or not found:
        raise RequestError(f"{NAME}: the slices are {'the base as it is' if found else 'empty'}; name other blocks.")
    return found


def _laid(
    indexes: Sequence[TensorIndex], paths: Sequence[str], places: Sequence[tuple[int, int]], model: Any
) -> tuple[TensorIndex, dict[str, list[TensorFacts]]]:
    """The index of the new model, and where each of its tensors lies."""
    base = indexes[0]
    lists = [
        list_of({name: tensor.places[name] for name, tensor in index.tensors.items()}, path)
        for index, path in zip(indexes, paths, strict=True)
    ]
    prefix, own = lists[0]
    inside = {name for blocks in own.values() for name in blocks}
    dtypes = {rest: base.tensors[name].dtype for blocks in own.values() for name, rest in blocks.items()}
    found = {name: (tensor, tensor.dtype) for name, tensor in base.tensors.items() if name not in inside}
    for position, (number, block) in enumerate(places):
        for name, rest in lists[number][1][block].items():
            tensor = indexes[number].tensors[name]
            found[".".join(filter(None, (prefix, str(position), rest)))] = tensor, dtypes.get(rest, tensor.dtype)
    where = Places(list(found), lambda: model)
    inputs = {name: replace(tensor, name=name, places=where) for name, (tensor, _) in found.items()}
    tensors = {name: replace(inputs[name], dtype=dtype) for name, (_, dtype) in found.items()}
    return replace(base, tensors=tensors), {name: [tensor] for name, tensor in inputs.items()}
