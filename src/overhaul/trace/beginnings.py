"""The beginning of texts, read once: what many runs have in common before their first change is not computed again.

In a causal model a change at one position reaches no position before it. So keys and values of the tokens before the first
change are kept, as in decoding, and runs go on from there: as often as wanted, since nothing is added to what is kept.
Whether that gives what whole runs give is tried.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from overhaul.forward import caches, forward
from overhaul.stack import LayerStack

_TEXT = {"input_ids", "attention_mask", "labels"}


def after_beginning(stack: LayerStack, batch: Mapping[str, Tensor], start: int) -> dict[str, Any] | None:
    """A batch whose first `start` positions are read already, to be run as often as wanted, with any multiple of its rows.

    Args:
        stack: of a language model, in eval mode.
        batch: collated, on the model's device; no padding before `start`.
        start: the first position that runs.

    Returns:
        The batch from there on, with what was read; None where the model keeps no keys and values of that kind, or gives
        something else so.
    """
    model: Any = stack.model
    if start < 1 or not set(batch) <= _TEXT or not caches(model):
        return None
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
    read = model(input_ids=batch["input_ids"][:, :start], attention_mask=mask[:, :start], use_cache=True)
    cache = getattr(read, "past_key_values", None)
    layers = getattr(cache, "layers", [])
    if len(layers) != len(stack) or not all(isinstance(getattr(layer, "keys", None), Tensor) for layer in layers):
        return None
    rest: dict[str, Any] = {name: batch[name][:, start:] for name in ("input_ids", "labels")}
    rest |= {"attention_mask": mask, "past_key_values": _kept(cache)}
    return rest if _alike(forward(model, rest), forward(model, batch)[:, start:], mask[:, start:].bool()) else None


def _kept(cache: Any) -> Any:
    """The cache, which from now on hands out what it holds with what comes, and keeps none of it."""

    def update(keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        layer = copy.copy(cache.layers[layer_idx])
        times = len(keys) // len(layer.keys)
        if times > 1:
            layer.keys, layer.values = (each.repeat(times, 1, 1, 1) for each in (layer.keys, layer.values))
        return layer.update(keys, values, *args, **kwargs)

    cache.update, cache.nothing_is_added = update, True
    return cache


def _alike(found: Tensor, expected: Tensor, mask: Tensor) -> bool:
    if found.shape != expected.shape:
        return False
    ours, theirs = found[mask].float(), expected[mask].float()
    rounding = max(1e-4, 8 * torch.finfo(found.dtype).eps)
    return float((ours - theirs).norm()) <= rounding * float(theirs.norm())
