"""Readers: which linear layers of a block are queries, keys, values, gates; found by running it, never by name.

    found = readers(stack, inputs, place, sites(stack, inputs, [place])[0])
    found["attention"]["transformer.h.0.attn.c_attn"]      # {"q": [range(0, 768)], "k": [range(768, 1536)], "v": ...}

All is told by the gradient of what the writing projection gives at the last position, with other contributions held:

1. A layer belongs to attention or to the MLP if that gradient reaches its output.
2. A query counts at its own position only. A value counts as much as attention says, which sums to one: over all positions
   its gradients sum to the same whatever queries, keys and values are. What is left is a key.
3. The gradient of what an MLP's activation is multiplied with ("up") does not change with its own value; a gate's does. An
   MLP without a gate has only "up".
4. A layer that gives several of them is told output by output (attention), or by its halves or every other one (MLP).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from overhaul.modes import at_rest
from overhaul.stack import LayerStack
from overhaul.stack.calls import Calls
from overhaul.trace import Replace, capture, intervene
from overhaul.trace.sites import BlockSites

Outputs = dict[str, list[range]]
"""Role -> which outputs of a layer have it."""

_DRAWS = 4
"""How often values are told from keys: chance passes a key now and then, not four times in a row."""
_SAME = 0.05
"""What rounding may do to a gradient, relative to its size; what is not the same changes by its size."""
_REACHED = 1e-4
"""The part of a gradient that rounding alone may put where there is none."""


def is_linear(module: nn.Module) -> bool:
    """Whether a module is `nn.Linear` or GPT-2's `Conv1D`, whose weight lies the other way round."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def linears(block: nn.Module) -> dict[str, nn.Module]:
    """The linear layers inside a block by their names in it, without those of adapters around them."""
    found: dict[str, nn.Module] = {}
    adapting: list[str] = []
    for name, module in block.named_modules():
        if hasattr(module, "adapter_layer_names"):  # peft's: the layer itself is its `base_layer`
            adapting.append(f"{name}.")
        own = [prefix for prefix in adapting if name.startswith(prefix)]
        if is_linear(module) and all(name == f"{prefix}base_layer" for prefix in own):
            found[name] = module
    return found


def readers(
    stack: LayerStack, inputs: Mapping[str, Any], place: int, sites: BlockSites
) -> dict[str, dict[str, Outputs]]:
    """What the linear layers of one block are that read for its attention, cross-attention and MLP.

    Args:
        stack: the stack.
        inputs: as for `sites`.
        place: of the block.
        sites: what is known of it.

    Returns:
        "attention", "cross_attention" and "mlp" -> layer -> "q", "k", "v" or "gate", "up" -> outputs. What cannot be told
        is left out.
    """
    if not sites.verified:
        return {}
    with at_rest(stack.model):
        recorded = Calls.record(stack, inputs)
    entering = tuple(part if part is None else _wide(part) for part in recorded.entering)
    calls = replace(recorded, entering=entering, calls=tuple(call.map(_wide) for call in recorded.calls))
    with at_rest(stack.model), _probed(stack.blocks[place]):
        terms = {"attention": sites.attention, "cross_attention": sites.cross_attention, "mlp": sites.mlp}
        modules = {name: term.module for name, term in terms.items() if term}
        held = _values(calls, place, list(modules.values()))
        found: dict[str, dict[str, Outputs]] = {}
        for name, term in terms.items():
            if term and term.projection:
                writer = term.projection.parameter.rpartition(".")[0]
                others = {module: held[module] for module in modules.values() if module != term.module}
                probe = _Probe(calls, place, sites.block, writer, others)
                if is_linear(stack.model.get_submodule(writer)):
                    found[name] = _mlp(probe) if name == "mlp" else _attention(probe)
        return found


Bump = Callable[[str, Tensor], Tensor]
"""(layer, its output) -> what is added to the output."""


@dataclass(frozen=True)
class _Probe:
    """How what a projection writes at the last position depends on what other layers of the block give."""

    calls: Calls
    place: int
    block: str
    writer: str
    held: Mapping[str, Tensor]

    def gradients(self, bump: Bump) -> dict[str, Tensor]:
        """The gradients by layer, [b, t, outputs], when something is added to what the layers give."""
        seen = _Seen()
        layers = linears(self.calls.stack.blocks[self.place])
        with ExitStack() as undo:
            undo.enter_context(torch.enable_grad())
            for name, layer in layers.items():
                whole = f"{self.block}.{name}"
                hook = seen.write if whole == self.writer else partial(seen.read, whole, bump)
                undo.callback(layer.register_forward_hook(hook).remove)
            undo.enter_context(intervene(self.calls.stack, {name: Replace(value) for name, value in self.held.items()}))
            self.calls.run(self.place, self.calls.entering)
            leaves = {name: leaf for name, leaf in seen.leaves.items() if seen.times[name] == 1}
            assert seen.written is not None
            found = torch.autograd.grad(seen.written, list(leaves.values()), allow_unused=True)
        return {
            name: gradient if gradient.ndim == 3 else gradient.view(seen.rows, -1, gradient.shape[-1])
            for name, gradient in zip(leaves, found, strict=True)
            if gradient is not None
            and bool(gradient.any())
            and gradient.numel() % (seen.rows * gradient.shape[-1]) == 0
        }


@dataclass
class _Seen:
    """One run of a block."""

    leaves: dict[str, Tensor] = field(default_factory=dict)
    times: dict[str, int] = field(default_factory=dict)
    written: Tensor | None = None
    rows: int = 1

    def read(self, name: str, bump: Bump, layer: nn.Module, args: Any, output: Tensor) -> Tensor:
        leaf = bump(name, output.detach()).requires_grad_()
        self.leaves[name] = leaf
        self.times[name] = self.times.get(name, 0) + 1
        return output + leaf

    def write(self, layer: nn.Module, args: Any, output: Tensor) -> None:
        last = output[:, -1] if output.ndim == 3 else output
        self.rows = len(last)
        self.written = (last * _noise(torch.ones_like(last), 0)).sum()


def _values(calls: Calls, place: int, modules: list[str]) -> dict[str, Tensor]:
    with torch.no_grad(), capture(calls.stack, modules, lambda rows, _: [rows.clone()]) as seen:
        calls.run(place, calls.entering)
    return {name: values[0] for name, values in seen.items()}


@contextmanager
def _probed(block: nn.Module) -> Iterator[None]:
    """Inside it, a block is in float32, so that rounding is no change, and its weights need no gradient."""
    needed = {parameter: parameter.requires_grad for parameter in block.parameters()}
    stored = {tensor: tensor.data for tensor in [*block.parameters(), *block.buffers()] if tensor.is_floating_point()}
    try:
        block.requires_grad_(False)
        for tensor in stored:
            tensor.data = tensor.data.float()
        yield
    finally:
        for tensor, data in stored.items():
            tensor.data = data
        for parameter, wanted in needed.items():
            parameter.requires_grad_(wanted)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def _attention(probe: _Probe) -> dict[str, Outputs]:
    """Queries, keys and values."""
    clean = probe.gradients(lambda _, output: torch.zeros_like(output))
    draws = [probe.gradients(lambda _, output, seed=seed: _noise(output, seed)) for seed in range(1, _DRAWS + 1)]
    found = {name: _ranges(_told(each, [draw[name] for draw in draws if name in draw])) for name, each in clean.items()}
    kinds = {role for outputs in found.values() for role in outputs}
    return found if kinds == {"q", "k", "v"} else {}


def _told(clean: Tensor, draws: list[Tensor]) -> list[str]:
    """For each output of a layer, "q", "k" or "v"; "" where nothing reaches it."""
    total = clean.sum(1)
    mass = sum((each.abs().sum((0, 1)) for each in draws), clean.abs().sum((0, 1)))
    elsewhere = sum((each[:, :-1].abs().sum((0, 1)) for each in draws), clean[:, :-1].abs().sum((0, 1)))
    query = elsewhere <= _REACHED * mass
    size = total.norm(dim=0)
    value = size > 1e-3 * clean.abs().sum((0, 1))  # without positions in them, keys' gradients sum to nothing
    for each in draws:
        value &= (each.sum(1) - total).norm(dim=0) <= _SAME * size
    return [
        "" if not reached else "q" if is_query else "v" if is_value else "k"
        for reached, is_query, is_value in zip((mass > 0).tolist(), query.tolist(), value.tolist(), strict=True)
    ]


def _mlp(probe: _Probe) -> dict[str, Outputs]:
    """Gates and what they gate."""
    clean = probe.gradients(lambda _, output: torch.zeros_like(output))
    inner = _inputs(probe.calls.stack.model.get_submodule(probe.writer))
    if [each.shape[-1] for each in clean.values()] == [inner]:
        return {name: {"up": [range(inner)]} for name in clean}
    if len(clean) == 2:
        linear = {name: _is_linear_in(probe, name, each, slice(None)) for name, each in clean.items()}
        if sorted(linear.values()) == [False, True]:
            return {name: {"up" if linear[name] else "gate": [range(inner)]} for name in clean}
    if [each.shape[-1] for each in clean.values()] == [2 * inner]:
        ((name, each),) = clean.items()
        for parts in ((slice(0, inner), slice(inner, None)), (slice(0, None, 2), slice(1, None, 2))):
            linear = [_is_linear_in(probe, name, each, part) for part in parts]
            if sorted(linear) == [False, True]:
                roles = ["up" if one else "gate" for one in linear]
                return {name: {role: [range(2 * inner)[part]] for role, part in zip(roles, parts, strict=True)}}
    return {}


def _is_linear_in(probe: _Probe, name: str, clean: Tensor, part: slice) -> bool:
    """Whether the gradient at some outputs of a layer does not change with their values."""

    def bump(layer: str, output: Tensor) -> Tensor:
        added = torch.zeros_like(output)
        if layer == name:
            added[..., part] = _noise(output, 1)[..., part]
        return added

    moved = probe.gradients(bump)[name]
    return float((moved - clean)[..., part].norm()) <= _SAME * float(clean[..., part].norm())


def _inputs(layer: nn.Module) -> int:
    weight: Any = layer.weight
    return weight.shape[0] if type(layer).__name__ == "Conv1D" else weight.shape[1]


def _ranges(roles: list[str]) -> Outputs:
    """Neighbours of one role as ranges; what nothing reaches (a pruned head) goes with what lies before it."""
    before = next((role for role in roles if role), "")
    filled: list[str] = []
    for role in roles:
        before = role or before
        filled.append(before)
    found: Outputs = {}
    start = 0
    for role, run in itertools.groupby(filled):
        end = start + len(list(run))
        found.setdefault(role, []).append(range(start, end))
        start = end
    return found


def _noise(value: Tensor, seed: int) -> Tensor:
    """Normal noise as large as the value and at least 1, where every activation is curved; from no generator of others."""
    draw = torch.randn(value.shape, generator=torch.Generator().manual_seed(seed)).to(value)
    return draw * value.float().square().mean().sqrt().clamp_min(1).to(value)
