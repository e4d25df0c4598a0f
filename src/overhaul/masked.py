"""Weights of which some are held at zero while something trains: all others, or a change of low rank, merged at the end.

W is a layer's weight, M its mask (1 where it may be other than 0), c = alpha / rank, B and A the factors that train:

    weights       W_eff = M * W                                W itself trains
    mask_lora     W_eff = W + c M * (B A)                      B = 0 at the start
    scale_lora    W_eff = W * (B A)                            all entries 1 / sqrt(rank) at the start, so that B A = 1
    lora_prune    W_eff = W + c B A, merged as M * (B A)       what the mask takes away at the end was trained for nothing
    lora          W_eff = W + c B A                            merging fills the zeros

Inside the `with` the model is a network like any other: whatever trains it, reads it or copies it sees W_eff. Factors are
float32 whatever the weights are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

Form = Literal["weights", "mask_lora", "scale_lora", "lora_prune", "lora"]


@contextmanager
def masked(
    model: nn.Module,
    names: Sequence[str],
    form: Form,
    masks: Mapping[str, Tensor],
    *,
    rank: int = 16,
    alpha: float = 32.0,
) -> Iterator[None]:
    """Inside the `with`, layers have W_eff and their factors (or, with "weights", they themselves) require gradients.

    Afterwards, also by an error, W_eff is their weight, in the parameter that was there before; a tied one stays tied.

    Args:
        model: whose other parameters are left as they are.
        names: of layers with a `weight` of two dimensions.
        form: see above.
        masks: by name of the parameter ("NAME.weight"), 0 where it stays 0; a layer without one is free.
        rank: of the factors.
        alpha: their scale; not used by "scale_lora".
    """
    layers: dict[str, Any] = {name: model.get_submodule(name) for name in names}
    needed = {name: layer.weight.requires_grad for name, layer in layers.items()}
    holders = _holders(model, layers)
    try:
        for name, layer in layers.items():
            mask = masks.get(f"{name}.weight")
            made = _effective(layer, form, mask, rank, alpha)
            layer.weight.requires_grad_(form == "weights")
            for holder in holders[name]:
                parametrize.register_parametrization(holder, "weight", made)
        yield
    finally:
        for name, layer in layers.items():
            _merge([one for one in holders[name] if parametrize.is_parametrized(one, "weight")])
            layer.weight.requires_grad_(needed[name])


def _holders(model: nn.Module, layers: Mapping[str, Any]) -> dict[str, list[Any]]:
    """For every layer the modules that hold its weight: several where it is tied."""
    found: dict[int, list[Any]] = {}
    for module in model.modules():
        if isinstance(weight := getattr(module, "weight", None), nn.Parameter):
            found.setdefault(id(weight), []).append(module)
    return {name: found[id(layer.weight)] for name, layer in layers.items()}


@torch.no_grad()
def _merge(holders: Sequence[Any]) -> None:
    """W_eff becomes the weight."""
    value: Tensor | None = None
    for module in holders:
        if value is None:
            (change,) = module.parametrizations["weight"]
            change.merging = True
            value = module.weight.detach().clone()
        parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
        for later in [name for name in module._parameters if name != "weight"]:  # a weight comes first, as it did
            module._parameters[later] = module._parameters.pop(later)
    if value is not None:
        holders[0].weight.data.copy_(value)


class _Effective(nn.Module):
    """W_eff of a weight; `merging` is set when it is about to replace the weight."""

    mask: Tensor | None

    def __init__(self, mask: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("mask", None if mask is None else mask.bool(), persistent=False)
        self.merging = False

    def kept(self, value: Tensor) -> Tensor:
        """With zeros where the mask has them."""
        return value if self.mask is None else value.masked_fill(~self.mask, 0)

    def forward(self, weight: Tensor) -> Tensor:
        return self.kept(weight)


class _Product(_Effective):
    """W_eff with factors; B A is the layer's outputs by its inputs, however it stores its weight."""

    def __init__(self, layer: Any, mask: Tensor | None, rank: int, scale: float, form: Form) -> None:
        super().__init__(mask)
        weight: Tensor = layer.weight
        self.transposed = type(layer).__name__ == "Conv1D"
        outputs, inputs = weight.T.shape if self.transposed else weight.shape
        self.form, self.scale = form, scale
        start = rank**-0.5
        options = {"dtype": torch.float32, "device": weight.device}
        self.A = nn.Parameter(torch.full((rank, inputs), start, **options))
        self.B = nn.Parameter(torch.full((outputs, rank), start, **options))
        if form != "scale_lora":
            nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))  # as LoRA begins
            nn.init.zeros_(self.B)

    def forward(self, weight: Tensor) -> Tensor:
        product = self.B @ self.A
        product = product.T if self.transposed else product
        if self.form == "scale_lora":
            return (weight * product).to(weight.dtype)
        if self.form == "mask_lora" or (self.form == "lora_prune" and self.merging):
            product = self.kept(product)
        return (weight + self.scale * product).to(weight.dtype)


def _effective(layer: Any, form: Form, mask: Tensor | None, rank: int, alpha: float) -> _Effective:
    mask = None if mask is None else mask.to(layer.weight.device)
    return _Effective(mask) if form == "weights" else _Product(layer, mask, rank, alpha / rank, form)
