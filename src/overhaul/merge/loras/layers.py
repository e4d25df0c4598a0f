"""Linear layers with a pool of adapters beside them, in a model for as long as it is measured or trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from overhaul.adapter_folders import LowRank

Adapter = Mapping[str, LowRank]
"""What is added to each layer, by the layer's name."""


class Mixed(nn.Module):
    """y = inner(x) + b (strength * (a x)): one a, one b and a number for each rank, whatever is pooled.

    Args:
        inner: the layer of the model, `nn.Linear` or GPT-2's `Conv1D`.
        pool: what is beside it; its scale counts in `strength` alone.
        strength: a module that says the numbers, [r] or [..., r], from what enters the layer.
    """

    def __init__(self, inner: nn.Module, pool: LowRank, strength: nn.Module) -> None:
        super().__init__()
        device = next(inner.parameters()).device
        self.inner, self.strength = inner, strength.to(device)
        self.a, self.b = (nn.Parameter(each.to(device), requires_grad=False) for each in (pool.a, pool.b))

    @property
    def weight(self) -> Any:
        """The layer's own, for models that look at it."""
        return self.inner.weight

    @property
    def bias(self) -> Any:
        """As `weight`."""
        return self.inner.bias

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out], in the dtype of the layer."""
        out, x = self.inner(x), x.to(self.a.dtype)
        return out + F.linear(F.linear(x, self.a) * self.strength(x), self.b).to(out.dtype)


class Fixed(nn.Module):
    """Numbers that are given."""

    def __init__(self, scale: Float[Tensor, " r"]) -> None:
        super().__init__()
        self.scale = nn.Parameter(scale, requires_grad=False)

    def forward(self, _: Tensor) -> Float[Tensor, " r"]:
        """The same for every input."""
        return self.scale


@contextmanager
def exchanged(model: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """Inside the `with`, layers of a model are others; afterwards they are its own again."""
    before = {name: model.get_submodule(name) for name in layers}
    try:
        for name, layer in layers.items():
            layer.train(before[name].training)
            model.set_submodule(name, layer)
        yield
    finally:
        for name, layer in before.items():
            model.set_submodule(name, layer)


@contextmanager
def added(model: nn.Module, adapter: Adapter) -> Iterator[None]:
    """Inside the `with`, an adapter is beside the layers of a model, whose weights stay as they are."""
    layers = {name: Mixed(model.get_submodule(name), one, Fixed(one.scale)) for name, one in adapter.items()}
    with exchanged(model, layers):
        yield


@torch.no_grad()
def fold(model: nn.Module, adapter: Adapter) -> dict[str, tuple[float, float]]:
    """Add an adapter to the weights of a model, in place.

    Returns:
        Of each layer the squared length of the change, and that of the weight before it.
    """
    found: dict[str, tuple[float, float]] = {}
    for name, one in adapter.items():
        layer = model.get_submodule(name)
        weight: Any = layer.weight
        change = one.dense.to(weight.device)
        change = change.T if type(layer).__name__ == "Conv1D" else change
        found[name] = float(change.double().square().sum()), float(weight.double().square().sum())
        weight.copy_(weight.to(change.dtype) + change)  # rounded once
    return found


def concatenated(parts: Sequence[LowRank], scale: Tensor | None = None) -> LowRank:
    """The sum of several changes of one layer as one, whatever their ranks; with other numbers for their scale if given."""
    a = torch.cat([part.a for part in parts])
    b = torch.cat([part.b for part in parts], dim=1)
    return LowRank(a, b, torch.cat([part.scale for part in parts]) if scale is None else scale)


def changed_by(experts: Sequence[Adapter]) -> list[str]:
    """The layers that at least one of several adapters changes."""
    return list(dict.fromkeys(name for expert in experts for name in expert))
