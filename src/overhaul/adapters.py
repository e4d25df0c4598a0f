"""Low-rank adapters in the blocks of a model for as long as it trains, merged into its weights at the end.

peft does the work. How it differs from peft's "all-linear": only projections inside the blocks are adapted, found by
structure, so embeddings, heads and classifiers stay as they are in every family. Over a base below float32 they are float32.

Experts that are stacked in one parameter, [experts, in, out] or [experts, out, in], are adapted too, each by a product of
its own of the same rank, without dropout: what enters an expert is not seen there. Routers stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from overhaul.adapter_folders import LowRank
from overhaul.errors import RequestError
from overhaul.selectors import select
from overhaul.stack import LayerStack


@contextmanager
def adapters(
    model: nn.Module, rank: int, alpha: int, dropout: float, names: list[str] | None = None
) -> Iterator[nn.Module]:
    """Inside the `with`, only adapters on the blocks' projections train; afterwards they are part of the weights.

    Args:
        model: changed in place; it is the same plain object of its class when the `with` ends, also by an error.
        rank: of the adapters, which add (alpha / rank) * B @ A to a weight.
        alpha: their scale.
        dropout: of their input.
        names: of the projections to adapt; all of the blocks if None.

    Raises:
        RequestError: the blocks hold no linear projection (a ResNet).
    """
    from peft import LoraConfig, LoraModel

    stacks = stacked_experts(model) if names is None else []
    names = projections(model) if names is None else names
    kinds = {type(model.get_submodule(name)).__name__ for name in names}
    transposed = kinds == {"Conv1D"}
    options: dict[str, Any] = {"r": rank, "lora_alpha": alpha}
    modules = LoraConfig(target_modules=names, lora_dropout=dropout, fan_in_fan_out=transposed, **options)
    needed = {name: p.requires_grad for name, p in model.named_parameters()}
    with _without_model_type(model):
        wrapped = LoraModel(model, modules, PROJECTIONS)
        if stacks:
            wrapped.peft_config[EXPERTS] = LoraConfig(target_modules=[], target_parameters=stacks, **options)
            wrapped.inject_adapter(model, EXPERTS)
            wrapped.set_adapter([PROJECTIONS, EXPERTS])
    for kind in wrapped.peft_config:  # float32 over a base of less, as in every other way to make one with peft
        wrapped._cast_adapter_dtype(kind)
    try:
        yield wrapped
    finally:
        wrapped.merge_and_unload()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(needed[name])


@torch.no_grad()
def taken(wrapped: Any) -> dict[str, LowRank]:
    """The adapters on dense projections, by name; they are 0 afterwards, so that `adapters` leaves the weights alone."""
    from peft.tuners.lora import LoraLayer

    found: dict[str, LowRank] = {}
    modules: Mapping[str, Any] = dict(wrapped.model.named_modules())
    for name, layer in modules.items():
        if isinstance(layer, LoraLayer) and PROJECTIONS in layer.lora_A:
            sides: Any = layer.lora_A, layer.lora_B
            a, b = (side[PROJECTIONS].weight for side in sides)
            scale = torch.full((len(a),), layer.scaling[PROJECTIONS], device=a.device)
            found[name] = LowRank(a.detach().clone(), b.detach().clone(), scale)
            b.zero_()
    return found


def of_adapters(knobs: Mapping[str, Any]) -> int | None:
    """What `overhaul plan` asks of a method with the knobs `weights` and `rank`: the rank, where adapters train."""
    return knobs["rank"] if knobs["weights"] == "lora" else None


def projections(model: nn.Module) -> list[str]:
    """The names of all linear layers inside the main stack's blocks (`nn.Linear`, and GPT-2's transposed `Conv1D`)."""
    try:
        found = select(model, "projections").modules
    except RequestError as error:
        raise RequestError(
            f'{error} There are no linear projections for LoRA to adapt. Write weights: "all".'
        ) from None
    # a router that gives more than its product is none
    return [name for name in found if _gives_a_product(model.get_submodule(name))]


def _gives_a_product(layer: nn.Module) -> bool:
    return type(layer).__name__ == "Conv1D" or type(layer).forward is nn.Linear.forward


PROJECTIONS, EXPERTS = "default", "experts"


@contextmanager
def _without_model_type(model: Any) -> Iterator[None]:
    """Inside it, peft does not take dense projections for experts of that name, which it expects by the model's type."""
    config = getattr(model, "config", None)
    known = hasattr(config, "model_type")
    if known:
        vars(config)["model_type"] = ""
    try:
        yield
    finally:
        if known:
            del vars(config)["model_type"]


def stacked_experts(model: nn.Module) -> list[str]:
    """The names of all parameters inside the main stack's blocks that hold one matrix for each expert."""
    names = {module: name for name, module in model.named_modules()}
    return [
        f"{names[module]}.{name}"
        for block in LayerStack.of(model).blocks
        for module in block.modules()
        if not isinstance(module, nn.modules.conv._ConvNd)
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 3 and min(parameter.shape[1:]) > 1
    ]
