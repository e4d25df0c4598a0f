"""Value vectors: what the MLPs of a language model can write into the stream, one by one, found by structure.

    s = E v          T_k(v) = the k tokens with the largest s

v is what one inner unit of an MLP adds for each unit of its activation: a column of `nn.Linear` [d, inner], a row of
GPT-2's `Conv1D` [inner, d], of a mixture one of an expert's [experts, d, inner] or [experts, inner, d]. E is the
unembedding, the output head. `search` tells which vectors stand for some words.

1. Which weight writes an MLP's contribution, and which way round it lies, is told by a run of one block of each kind.
2. The same vectors of a checkpoint are read from its files, a matrix at a time: no second model is held.
3. The final norm is left out of s, or its gain g taken in as E diag(g) v. The gain is what the norm does to a vector of unit
   size, so that Gemma's is 1 + w.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from overhaul.errors import RequestError
from overhaul.finite import check_given, is_finite
from overhaul.models import Checkpoint
from overhaul.parts import kind_of, probe
from overhaul.selectors import select
from overhaul.stack import LayerStack
from overhaul.trace.sites import Orientation, sites
from overhaul.weights import TensorIndex, mapped
from overhaul.weights.depths import built_names

LOGITS = 2**24
"""Logits that are held at once, when many vectors are projected."""


@dataclass(frozen=True, order=True)
class Location:
    """Where a value vector lies: block, inner unit, and in a mixture the expert."""

    layer: int
    index: int
    expert: int | None = None

    def __str__(self) -> str:
        expert = "" if self.expert is None else f"{self.expert}:"
        return f"{self.layer}:{expert}{self.index}"

    def row(self) -> dict[str, int]:
        """As a row that `located` reads."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class Writer:
    """The weight that holds the value vectors of one block: its name, which way round it lies, its sizes."""

    parameter: str
    orientation: Orientation
    shape: tuple[int, ...]

    @property
    def module(self) -> str:
        """The module that it belongs to."""
        return self.parameter.rpartition(".")[0]

    @property
    def inner(self) -> int:
        """Inner units, of one expert."""
        return self.shape[-1] if self.orientation == "out, in" else self.shape[-2]

    @property
    def experts(self) -> int | None:
        """How many experts there are; None where there is one MLP."""
        return self.shape[0] if len(self.shape) == 3 else None

    def place(self, location: Location) -> tuple[Any, ...]:
        """The place of a vector in the weight, to index it with."""
        at = (slice(None), location.index) if self.orientation == "out, in" else (location.index,)
        return at if location.expert is None else (location.expert, *at)

    def rows(self, weight: Tensor) -> Float[Tensor, "n d"]:
        """All vectors, those of an expert after those of the one before."""
        return (weight.transpose(-1, -2) if self.orientation == "out, in" else weight).flatten(0, -2)

    def number(self, location: Location) -> int:
        """The place of a vector in `rows`."""
        return (location.expert or 0) * self.inner + location.index


class ValueVectors:
    """The value vectors of a model in memory, or of a checkpoint of the same class (`stored`)."""

    def __init__(
        self, stack: LayerStack, writers: Mapping[int, Writer], head: str, weight: Callable[[str], Tensor]
    ) -> None:
        """What `of` and `stored` found; `weight` gives a tensor by the name of the model's parameter."""
        self.stack, self.writers, self.head, self.weight = stack, writers, head, weight

    @classmethod
    def of(cls, model: nn.Module, method: str) -> ValueVectors:
        """Of a language model in memory; `method` is for messages.

        Raises:
            RequestError: it reads no tokens, no weight writes what its MLPs add, or it has no single output head.
        """
        stack = LayerStack.of(model)
        if getattr(model, "main_input_name", "") != "input_ids":
            raise RequestError(
                f"{method}: {type(model).__name__} reads no tokens, and a value vector is read by the tokens that it makes "
                "likely. Give a causal language model."
            )
        return cls(stack, _writers(stack, method), _head(stack, method), lambda name: model.get_parameter(name).data)

    def stored(self, checkpoint: Checkpoint) -> ValueVectors:
        """The same of a checkpoint of this class, read from its files where it is asked for.

        Raises:
            RequestError: it holds no such tensors, or others, or numbers in them that are none.
        """
        model: Any = self.stack.model
        index = TensorIndex.of(checkpoint)
        ties = dict(getattr(model, "all_tied_weights_keys", None) or {})
        held: dict[str, list[str]] = {}
        for name, built in built_names(model, index.tensors).items():
            held.setdefault(built, []).append(name)
        for one, other in ties.items():
            known = held.get(one) or held.get(other)
            if known:
                held[one] = held.get(one, known)
                held[other] = held.get(other, known)

        def weight(name: str) -> Tensor:
            names, wanted = held.get(name, []), model.get_parameter(name).shape
            found = [mapped(index.tensors[one]) for one in sorted(names, key=_numbers)]
            if len(found) > 1 and found[0].shape != wanted:  # files may hold each expert by itself
                found = [torch.stack(found)]
            if not found or found[0].shape != wanted:
                is_there = f"{list(found[0].shape)}" if found else "not there"
                raise RequestError(
                    f"{checkpoint.source} does not correspond to {type(model).__name__}: {name} is {is_there}, and "
                    f"{list(wanted)} in the model."
                )
            return found[0]

        for name in (*(writer.parameter for writer in self.writers.values()), self.head):
            if not is_finite(weight(name)):
                raise RequestError(
                    f"{checkpoint.source}: {name} holds values that are not finite (NaN or infinite), so nothing can be "
                    "compared with it. Fetch or save that model again."
                )
        return ValueVectors(self.stack, self.writers, self.head, weight)

    def vector(self, location: Location) -> Float[Tensor, " d"]:
        """One vector, in float32 on the CPU, a copy."""
        writer = self.writers[location.layer]
        return self.weight(writer.parameter)[writer.place(location)].to("cpu", torch.float32, copy=True)

    def all(self, layer: int) -> Float[Tensor, "n d"]:
        """All vectors of a block, as they are stored."""
        writer = self.writers[layer]
        return writer.rows(self.weight(writer.parameter))

    def norms(self, layer: int) -> Float[Tensor, " n"]:
        """The Euclidean length of each vector of a block."""
        return torch.linalg.vector_norm(self.all(layer), dim=1, dtype=torch.float32).cpu()

    def at(self, layer: int, number: int) -> Location:
        """The location of a vector by its place among all of a block."""
        expert, index = divmod(number, self.writers[layer].inner)
        return Location(layer, index, expert if self.writers[layer].experts else None)

    def unembedding(self, gain: bool = False) -> Unembedding:
        """What reads vectors as tokens: the output head, with the final norm's gain or without."""
        return Unembedding(self.weight(self.head), self.gain if gain else None)

    @cached_property
    def gain(self) -> Float[Tensor, " d"]:
        """What the final norm multiplies each feature with."""
        after = [one for one in select(self.stack, "norms").parts if one.depth == len(self.stack)]
        if not after:
            raise RequestError(
                f"{type(self.stack.model).__name__} has no norm after its last block, so it has no gain."
            )
        module = self.stack.model.get_submodule(after[-1].module)
        own = {name: self.weight(f"{after[-1].module}.{name}").float() for name, _ in module.named_parameters()}
        (width,) = next(iter(own.values())).shape
        # of mean 0 and mean square 1: LayerNorm and RMSNorm leave it, but for gain and bias
        sign = torch.ones(width, device=next(iter(own.values())).device)
        sign[1::2] = -1
        with torch.no_grad():
            up, down = (torch.func.functional_call(module, own, (way * sign[None, None],)) for way in (1, -1))
        return ((up - down) / (2 * sign)).flatten()

    def located(self, given: Sequence[Mapping[str, Any]], what: str) -> list[Location]:
        """Locations from rows with `layer`, `index` and, of a mixture, `expert`; each once.

        Raises:
            RequestError: a row is none, or lies outside the model; `what` says where the rows come from.
        """
        found: dict[Location, None] = {}
        for number, row in enumerate(given, 1):
            values = [row.get(name) if isinstance(row, Mapping) else None for name in ("layer", "index", "expert")]
            if any(type(value) is not int for value in values[:2]) or type(values[2]) not in (int, type(None)):
                raise RequestError(
                    f"{what}, vector {number}: {row!r} is no place of a value vector. Give whole numbers `layer` and "
                    "`index`, and `expert` for a mixture of experts."
                )
            found[self._inside(Location(*values), f"{what}, vector {number}")] = None  # pyright: ignore[reportArgumentType]
        return list(found)

    def _inside(self, location: Location, what: str) -> Location:
        writer = self.writers.get(location.layer)
        if writer is None:
            raise RequestError(
                f"{what}: block {location.layer} is none of the blocks {_runs(self.writers)} whose MLP has value vectors."
            )
        if (writer.experts is None) != (location.expert is None):
            wanted = "layer:expert:index" if writer.experts else "layer:index"
            raise RequestError(
                f"{what}: block {location.layer} has {writer.experts or 'no'} experts, so a vector in it is {wanted}."
            )
        if not 0 <= (location.expert or 0) < (writer.experts or 1):
            raise RequestError(
                f"{what}: block {location.layer} has the experts 0 to {(writer.experts or 1) - 1}, and none "
                f"{location.expert}."
            )
        if not 0 <= location.index < writer.inner:
            raise RequestError(
                f"{what}: the MLP of block {location.layer} has the value vectors 0 to {writer.inner - 1}, and none "
                f"{location.index}."
            )
        return location


class Unembedding:
    """Reads vectors as tokens."""

    def __init__(self, weight: Float[Tensor, "v d"], gain: Float[Tensor, " d"] | None) -> None:
        """Keep the output head as it is stored, and what each feature is multiplied with before."""
        self.weight, self.gain = weight, gain

    @property
    def words(self) -> int:
        """Rows of words."""
        return len(self.weight)

    def logits(self, vectors: Float[Tensor, "n d"]) -> Float[Tensor, "n v"]:
        """E v in float32, on the unembedding's device; a part of its rows at a time."""
        moved = vectors.to(self.weight.device, torch.float32)
        moved = moved if self.gain is None else moved * self.gain.to(moved.device)
        step = max(1, LOGITS // self.weight.shape[1])
        return torch.cat([moved @ rows.float().T for rows in self.weight.split(step)], dim=1)

    def top(self, vectors: Float[Tensor, "n d"], k: int) -> tuple[Int[Tensor, "n k"], Int[Tensor, "n k"]]:
        """The k tokens with the largest logits, most likely first, of each vector and of its negative."""
        step = max(1, LOGITS // self.words)
        found = [
            (logits.topk(k, dim=1).indices.cpu(), logits.topk(k, dim=1, largest=False).indices.cpu())
            for logits in map(self.logits, vectors.split(step))
        ]
        up, down = zip(*found, strict=True)
        return torch.cat(up), torch.cat(down)


def parsed(text: str, knob: str) -> list[dict[str, int]]:
    """Places written as "20:10513, 3:2:17", as rows of layer, expert and index.

    Raises:
        RequestError: it is written otherwise.
    """
    found: list[dict[str, int]] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,9}):(?:(\d{1,9}):)?(\d{1,9})", part.strip())
        if match is None:
            raise RequestError(
                f"{knob}={text!r:.60}: {part.strip()!r:.60} names no value vector. Write layer:index, such as 20:10513, or "
                "layer:expert:index, several with commas between them."
            )
        layer, expert, index = match.groups()
        found.append({"layer": int(layer), "index": int(index)} | ({"expert": int(expert)} if expert else {}))
    return found


def _writers(stack: LayerStack, method: str) -> dict[int, Writer]:
    names = {module: name for name, module in stack.model.named_modules()}
    known: dict[Any, tuple[str, Orientation] | None] = {}
    found: dict[int, Writer] = {}
    for place, block in enumerate(stack.blocks):
        kind = kind_of(block)
        if kind not in known:
            (seen,) = sites(stack, probe(stack.model), [place])
            writes = seen.mlp.projection if seen.mlp else None
            known[kind] = writes and (writes.parameter.removeprefix(f"{seen.block}."), writes.orientation)
        if (one := known[kind]) is not None:
            name = f"{names[block]}.{one[0]}"
            found[place] = Writer(name, one[1], tuple(stack.model.get_parameter(name).shape))
    if not found:
        check_given(method, stack.model)  # what NaN hides is not missing
        raise RequestError(
            f"{method}: no weight of {type(stack.model).__name__} is known to write what its MLPs add to the stream, so it "
            "has no value vectors."
        )
    return found


def _head(stack: LayerStack, method: str) -> str:
    """The name of the parameter that is the unembedding."""
    found = {
        name: value.shape
        for name, value in select(stack, "head").tensors.items()
        if value.ndim == 2 and value.shape[0] > 1
    }
    if len(found) != 1:
        raise RequestError(
            f"{method}: {type(stack.model).__name__} has {len(found)} matrices after its last block, so which of them gives "
            "tokens is not known. Open it as a causal language model (`architectures` in config.json)."
        )
    return next(iter(found))


def _numbers(name: str) -> list[int]:
    return [int(part) for part in name.split(".") if part.isdecimal()]


def _runs(layers: Iterable[int]) -> str:
    listed = sorted(layers)
    whole = listed == list(range(listed[0], listed[-1] + 1))
    return f"{listed[0]} to {listed[-1]}" if whole else ", ".join(map(str, listed))
