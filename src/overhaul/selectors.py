"""Selectors: parts of a network by role and depth, found by structure, never by name.

    chosen = select(model, "attention.out, mlp.down", blocks="first:10,last:2")
    fit(model, ..., trainable=chosen)                                   # trains these and nothing else
    with adapters(model, rank, alpha, dropout, chosen.modules): ...     # adapters on these
    for parameter in chosen.tensors.values(): parameter.requires_grad_(False)
    groups = [{"params": [*select(model, role).tensors.values()], "lr": lr} for role, lr in rates.items()]

Roles, several with commas between them:

    attention   attention.q  .k  .v  .out  .qkv     and the same of cross_attention
    mlp         mlp.gate  .up  .down  .gate_up      with experts where the MLP has them
    experts     the weights of a mixture of experts, all at once
    projections every linear layer in the blocks, whatever it does
    norms       weights and biases of norms
    biases      all biases but those of norms
    adapters    what peft has added
    all         whole blocks
    embedding   what comes before the first block: tokens, positions, patches, the stem of a ResNet (without norms)
    head        what comes after the last block (without norms); in a tied model the parameter is the embedding's

1. Attention, MLP and what writes for them are told by `trace.sites`, queries, keys, values and gates by `trace.readers`: one
   block of each kind runs on a few random inputs. The other roles need no run.
2. A layer that gives queries, keys and values at once (GPT-2, Falcon, GPT-NeoX) is selected whole, or by rows: with
   `attention.q` alone, `parts` says which rows, and `modules` and `parameters` refuse. `attention.qkv` is always whole.
3. `blocks` holds for what lies in blocks. `embedding` and `head` lie in none; norms and biases outside of blocks belong to a
   selection of all blocks.
"""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from overhaul.errors import RequestError, did_you_mean
from overhaul.stack import LayerStack
from overhaul.trace.readers import is_linear, linears, readers
from overhaul.trace.sites import sites

_READERS = {
    "attention": ("q", "k", "v", "out"),
    "cross_attention": ("q", "k", "v", "out"),
    "mlp": ("gate", "up", "down"),
}
_TRACED = [f"{term}.{part}" for term, parts in _READERS.items() for part in parts]
_TOGETHER: dict[str, tuple[str, ...]] = {
    **{term: tuple(f"{term}.{part}" for part in parts) for term, parts in _READERS.items()},
    **{f"{term}.qkv": tuple(f"{term}.{part}" for part in "qkv") for term in ("attention", "cross_attention")},
    "mlp.gate_up": ("mlp.gate", "mlp.up"),
}
_TOGETHER["mlp"] = (*_TOGETHER["mlp"], "experts")
_PLAIN = ("projections", "norms", "biases", "adapters", "all", "embedding", "head")
ROLES = (*_TOGETHER, *_TRACED, "experts", *_PLAIN)


@dataclass(frozen=True)
class Part:
    """One module, or some outputs of one.

    Attributes:
        role: its own ("attention.q"); "attention.qkv" for a layer that has several and is selected whole.
        depth: of its block; -1 before the blocks, their number after them.
        module: its name.
        parameters: the names of its parameters.
        rows: which of its outputs have the role; None for all.
        axis: of its weight, along which outputs are counted: 1 for `Conv1D`, whose weight is transposed, else 0.
    """

    role: str
    depth: int
    module: str
    parameters: tuple[str, ...]
    rows: tuple[range, ...] | None = None
    axis: int = 0


@dataclass(frozen=True)
class Selection:
    """Parts of a network.

    Attributes:
        model: the network.
        parts: in the order in which the network defines them.
    """

    model: nn.Module = field(repr=False)
    parts: tuple[Part, ...]

    @cached_property
    def modules(self) -> list[str]:
        """The names of the modules.

        Raises:
            RequestError: only some outputs of one are selected.
        """
        self._check_whole()
        return list(dict.fromkeys(part.module for part in self.parts))

    @cached_property
    def parameters(self) -> list[str]:
        """The names of the parameters; a tied one stands under its first name.

        Raises:
            RequestError: only some outputs of a layer are selected.
        """
        self._check_whole()
        return list(dict.fromkeys(name for part in self.parts for name in part.parameters))

    @property
    def tensors(self) -> dict[str, nn.Parameter]:
        """The parameters by name."""
        return {name: self.model.get_parameter(name) for name in self.parameters}

    def __call__(self, name: str) -> bool:
        """Whether a parameter is selected: what `fit(trainable=...)` asks."""
        return name in self.parameters

    def _check_whole(self) -> None:
        for part in self.parts:
            if part.rows is not None:
                listed = ", ".join(f"{rows.start} to {rows.stop - 1}" for rows in part.rows[:3])
                whole = "mlp.gate_up" if part.role.startswith("mlp") else f"{part.role.partition('.')[0]}.qkv"
                raise RequestError(
                    f"{part.role} of block {part.depth} is only a part of {part.module}: its outputs {listed}"
                    f"{', ...' if len(part.rows) > 3 else ''}. The layer cannot be taken by halves: select {whole!r}, or "
                    "read the rows from `parts`."
                )


def select(
    model: nn.Module | LayerStack,
    roles: str | Sequence[str],
    blocks: str | Sequence[int] = "all",
    *,
    inputs: Mapping[str, Any] | None = None,
) -> Selection:
    """Find parts of a network by what they do.

    Args:
        model: the network, or one of its stacks where it has several.
        roles: one or more of those above ("attention.out, mlp").
        blocks: "all", places of blocks ("3", "1-4", "first:10,last:2"), or a list of them.
        inputs: what the model is run on, if random tokens or images will not do: its keyword arguments, two samples of 8 to
            64 positions. It is in eval mode meanwhile; weights, modes and random state are as before afterwards.

    Raises:
        RequestError: an unknown role or block; a role that this network does not have, or whose place cannot be told.
    """
    stack = model if isinstance(model, LayerStack) else LayerStack.of(model)
    wanted = _leaves(roles)
    places = blocks_of(stack, blocks)
    finder = _Finder(stack, places, blocks == "all", inputs)
    found = [part for role in wanted for part in finder.find(role)]
    for asked in _split(roles):
        if not any(part.role in _TOGETHER.get(asked, (asked,)) for part in found):
            raise RequestError(finder.missing(asked))
    order = {name: n for n, (name, _) in enumerate(stack.model.named_modules())}
    return Selection(stack.model, tuple(sorted(_whole(stack.model, found), key=lambda part: order[part.module])))


def blocks_of(stack: LayerStack, blocks: str | Sequence[int]) -> list[int]:
    """The places that a text or a list of numbers names, in order, each once.

    Raises:
        RequestError: it does not, or there is no such block.
    """
    count = len(stack)
    found: set[int] = set()
    for item in blocks.split(",") if isinstance(blocks, str) else blocks:
        text = str(item).strip()
        edge = re.fullmatch(r"(first|last):(\d+)", text)
        run = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
        if text == "all":
            asked = range(count)
        elif edge:
            asked = range(int(edge[2])) if edge[1] == "first" else range(count - int(edge[2]), count)
        elif run:
            asked = range(int(run[1]), int(run[2] or run[1]) + 1)
        else:
            near = did_you_mean(text.partition(":")[0], ["all", "first", "last"]) if text[:1].isalpha() else ""
            raise RequestError(
                f'blocks={blocks!r}: {text!r} names no blocks.{near} Write "all", "3", "1-4", "first:10", "last:2", several '
                "with commas between them, or a list of numbers."
            )
        if not asked or asked[0] < 0 or asked[-1] >= count:
            none = f"there is no block {text}" if text.isdecimal() else f"{text!r} asks for none, or for others"
            raise RequestError(f"blocks={blocks!r}: {stack.path} has the blocks 0 to {count - 1}; {none}.")
        found |= set(asked)
    if not found:
        raise RequestError(f"blocks={blocks!r} names no block of {stack.path}, which has {count}.")
    return sorted(found)


def _split(roles: str | Sequence[str]) -> list[str]:
    return [role.strip() for role in (roles.split(",") if isinstance(roles, str) else roles)]


def _leaves(roles: str | Sequence[str]) -> list[str]:
    """The single roles that are asked for, each once."""
    for role in _split(roles):
        if role not in ROLES:
            near = difflib.get_close_matches(role, ROLES, n=1)
            raise RequestError(f"There is no role {role!r}.{did_you_mean(role, near or ROLES)}")
    return list(dict.fromkeys(leaf for role in _split(roles) for leaf in _TOGETHER.get(role, (role,))))


def _whole(model: nn.Module, found: Sequence[Part]) -> Iterator[Part]:
    """The same parts, each module once for a role, and the rows of one layer joined where they make it whole."""
    for (module, _), group in itertools.groupby(sorted(found, key=_kin), _kin):
        parts = list(group)
        weight: Any = getattr(model.get_submodule(module), "weight", None)
        rows = {row for part in parts for rows in part.rows or () for row in rows}
        if rows and len(rows) < weight.shape[parts[0].axis]:
            yield from parts
        else:
            role = _joined([part.role for part in parts]) if rows else parts[0].role
            names = dict.fromkeys(name for part in parts for name in part.parameters)
            yield replace(parts[0], role=role, parameters=tuple(names), rows=None)


def _kin(part: Part) -> tuple[str, str]:
    """Parts that may be joined: of one module, and of one role or rows."""
    return part.module, part.role if part.rows is None else ""


def _joined(roles: Sequence[str]) -> str:
    term = roles[0].partition(".")[0]
    return "mlp.gate_up" if term == "mlp" else f"{term}.qkv"


class _Finder:
    """Finds the parts of one role."""

    def __init__(
        self, stack: LayerStack, places: list[int], everywhere: bool, inputs: Mapping[str, Any] | None
    ) -> None:
        self.stack, self.places, self.everywhere, self.inputs = stack, places, everywhere, inputs
        self.names = {module: name for name, module in stack.model.named_modules()}
        first = {id(parameter): name for name, parameter in reversed(list(stack.model.named_parameters()))}
        self.parameters = {n: first[id(p)] for n, p in stack.model.named_parameters(remove_duplicate=False)}

    def find(self, role: str) -> list[Part]:
        """All parts of one role."""
        if role in _TRACED or role == "experts":
            return [part for part in self.traced if part.role == role]
        return list(getattr(self, f"_{role}")())

    def missing(self, role: str) -> str:
        """Why a role was not found."""
        none = f"{type(self.stack.model).__name__} has no {role} in the blocks {self.places} of {self.stack.path}."
        if role in _PLAIN:
            return none
        known = ", ".join(dict.fromkeys(part.role for part in self.traced))
        told = f"What is found there: {known}." if known else "What attention and MLP are cannot be told there."
        return f'{none} {told} "projections" is every linear layer.'

    # what needs no run of the model

    @cached_property
    def norms(self) -> set[str]:
        """The names of all norms."""
        _check_loaded(self.stack.model)
        return {name for name, module in self.stack.model.named_modules() if is_norm(module)}

    def _projections(self) -> Iterator[Part]:
        for place in self.places:
            block = self.stack.blocks[place]
            for name, layer in linears(block).items():
                yield self._part("projections", f"{self.names[block]}.{name}", layer)

    def _norms(self) -> Iterator[Part]:
        for name in sorted(self.norms):
            if self._within(name):
                yield self._part("norms", name, self.stack.model.get_submodule(name))

    def _biases(self) -> Iterator[Part]:
        for name, parameter in self.stack.model.named_parameters():
            module = name.rpartition(".")[0]
            if name.endswith("bias") and parameter.ndim == 1 and module not in self.norms and self._within(name):
                yield Part("biases", self.stack.depth(name), module, (name,))

    def _adapters(self) -> Iterator[Part]:
        for name, module in self.stack.model.named_modules():
            added = tuple(f"{name}.{attribute}." for attribute in getattr(module, "adapter_layer_names", ()))
            own = tuple(parameter for parameter in self.parameters if added and parameter.startswith(added))
            if own and self._within(name):
                yield Part("adapters", self.stack.depth(name), name, own)

    def _all(self) -> Iterator[Part]:
        for place in self.places:
            block = self.stack.blocks[place]
            yield self._part("all", self.names[block], block)

    def _embedding(self) -> Iterator[Part]:
        return self._outside("embedding", -1)

    def _head(self) -> Iterator[Part]:
        return self._outside("head", len(self.stack))

    def _outside(self, role: str, depth: int) -> Iterator[Part]:
        if len(LayerStack.find(self.stack.model)) > 1:
            raise RequestError(
                f"{type(self.stack.model).__name__} has several stacks of blocks, so what comes before or after one of them "
                f"is no {role}. Name the parameters instead."
            )
        for name, first in self.parameters.items():
            module = name.rpartition(".")[0]
            if module not in self.norms and self.stack.depth(name) == depth:
                yield Part(role, depth, module, (first,))

    def _within(self, name: str) -> bool:
        depth = self.stack.depth(name)
        return depth in self.places or (self.everywhere and not 0 <= depth < len(self.stack))

    def _part(self, role: str, name: str, module: nn.Module, rows: tuple[range, ...] | None = None) -> Part:
        own = tuple(self.parameters[f"{name}.{path}"] for path, _ in module.named_parameters(remove_duplicate=False))
        return Part(role, self.stack.depth(name), name, own, rows, int(type(module).__name__ == "Conv1D"))

    # what a run shows

    @cached_property
    def traced(self) -> list[Part]:
        """The parts of attention and MLP in all blocks asked for; one block of each kind is run."""
        known: dict[Any, list[tuple[str, str, tuple[range, ...] | None]]] = {}
        found: list[Part] = []
        for place in self.places:
            block = self.stack.blocks[place]
            kind = tuple((name, type(module), _shapes(module)) for name, module in block.named_modules())
            if kind not in known:
                known[kind] = self._run(place)
            for role, path, rows in known[kind]:
                found.append(self._part(role, f"{self.names[block]}.{path}", block.get_submodule(path), rows))
        return found

    def _run(self, place: int) -> list[tuple[str, str, tuple[range, ...] | None]]:
        """The roles of the modules of one block: (role, name in the block, rows)."""
        inputs = self.inputs if self.inputs is not None else probe(self.stack.model)
        (known,) = sites(self.stack, inputs, [place])
        found: list[tuple[str, str, tuple[range, ...] | None]] = []
        block = self.stack.blocks[place]
        for term, layers in readers(self.stack, inputs, place, known).items():
            for layer, outputs in layers.items():
                whole = len(outputs) == 1
                path = layer.removeprefix(f"{known.block}.")
                found += [(f"{term}.{role}", path, None if whole else tuple(rows)) for role, rows in outputs.items()]
        for term, contribution in (
            ("attention", known.attention),
            ("cross_attention", known.cross_attention),
            ("mlp", known.mlp),
        ):
            if contribution and contribution.projection:
                path = contribution.projection.parameter.removeprefix(f"{known.block}.").rpartition(".")[0]
                if is_linear(block.get_submodule(path)):
                    found.append((f"{term}.{_READERS[term][-1]}", path, None))
                elif term == "mlp":
                    found.append(("experts", path, None))
        return found


def _shapes(module: nn.Module) -> tuple[Any, ...]:
    return tuple((name, tuple(parameter.shape)) for name, parameter in module.named_parameters(recurse=False))


@torch.no_grad()
def is_norm(module: nn.Module) -> bool:
    """Whether a module without parts has only vectors as weights and gives the same for an input and for twice the input."""
    own = [parameter for parameter in module.parameters() if parameter.ndim == 1]
    if next(module.children(), None) is not None or not own or len(own) < len(list(module.parameters())):
        return False
    if isinstance(module, nn.modules.batchnorm._NormBase | nn.GroupNorm | nn.LayerNorm | nn.RMSNorm):
        return True
    given = torch.randn(1, 4, own[0].numel(), generator=torch.Generator().manual_seed(0)).to(own[0])
    try:
        once, twice = module(8 * given), module(16 * given)
    except Exception:  # it takes other inputs, as no norm does
        return False
    same = isinstance(once, torch.Tensor) and once.shape == given.shape
    return same and torch.allclose(once, twice, rtol=1e-2, atol=1e-2) and not torch.allclose(once, module(-8 * given))


def _check_loaded(model: nn.Module) -> None:
    if any(parameter.is_meta for parameter in model.parameters()):
        raise RequestError(f"{type(model).__name__} has no weights yet (it lies on the meta device); open it first.")


def probe(model: nn.Module) -> dict[str, Any]:
    """Random inputs of a model that reads tokens or images: two samples.

    Raises:
        RequestError: the model reads something else, or has no weights yet.
    """
    config: Any = getattr(model, "config", None)
    device = next(model.parameters()).device
    name = getattr(model, "main_input_name", "")
    _check_loaded(model)
    draw = torch.Generator().manual_seed(0)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    if name == "input_ids" and hasattr(text, "vocab_size"):
        tokens = torch.randint(text.vocab_size, (2, 9), generator=draw).to(device)
        decoded = {"decoder_input_ids": tokens.flip(1)} if getattr(config, "is_encoder_decoder", False) else {}
        return {"input_ids": tokens, **decoded}
    if name == "pixel_values" and hasattr(config, "num_channels"):
        size: Any = getattr(config, "image_size", 224)
        height, width = (size, size) if isinstance(size, int) else size
        dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
        return {"pixel_values": torch.randn(2, config.num_channels, height, width, generator=draw).to(device, dtype)}
    raise RequestError(
        f"{type(model).__name__} reads neither tokens nor images alone, so it cannot be run on random ones to see what its "
        "parts do: give inputs=, two samples as keyword arguments of the model."
    )
