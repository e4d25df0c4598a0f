"""Parts of a network that have one role: found by structure; of attention and MLP, by a run of one block of each kind."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from overhaul.errors import RequestError
from overhaul.stack import LayerStack
from overhaul.trace.readers import is_linear, linears, readers
from overhaul.trace.sites import sites

READERS = {
    "attention": ("q", "k", "v", "out"),
    "cross_attention": ("q", "k", "v", "out"),
    "mlp": ("gate", "up", "down"),
}
TRACED = [f"{term}.{part}" for term, parts in READERS.items() for part in parts]
PLAIN = ("projections", "norms", "biases", "adapters", "all", "embedding", "head")


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


class Finder:
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
        if role in TRACED or role == "experts":
            return [part for part in self.traced if part.role == role]
        return list(getattr(self, f"_{role}")())

    def missing(self, role: str) -> str:
        """Why a role was not found."""
        none = f"{type(self.stack.model).__name__} has no {role} in the blocks {self.places} of {self.stack.path}."
        if role in PLAIN:
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
            kind = kind_of(block)
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
                    found.append((f"{term}.{READERS[term][-1]}", path, None))
                elif term == "mlp":
                    found.append(("experts", path, None))
        return found


def kind_of(block: nn.Module) -> tuple[Any, ...]:
    """What blocks have in common of which one shows what is in all: their modules by name, class and shapes."""
    return tuple((name, type(module), _shapes(module)) for name, module in block.named_modules())


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
