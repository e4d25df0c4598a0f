"""A model on a batch: it is given what its signature names of it, and its logits are taken from what it returns."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def forward(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Logits of a Hugging Face model, or of any module that takes these inputs and returns logits or an object with them.

    A module is given the columns of the batch that its signature names, labels apart, or those in its attribute `reads`.
    A batch of pairs (`other_input_ids` [b, t'] and `other_attention_mask` beside the rest) gives [2b, max(t, t'), v]: first
    the b sequences, then the b others.
    """
    if "other_input_ids" in batch:
        batch = _one_below_the_other(batch)
    out: Any = model(**read_by(model, batch))
    if isinstance(out, Tensor):
        return out
    held = out if isinstance(out, Mapping) else vars(out)
    return next(held[name] for name in LOGITS if name in held)


LOGITS = ("logits", "logits_per_image", "sample")
"""What a model calls its main output: classifiers and language models, CLIP, the networks of diffusers."""


def read_by(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Any]:
    """What of a batch the model is given, without a cache."""
    if reads := getattr(model, "reads", ()):
        return {name: batch[name] for name in reads}
    inner = getattr(model, "module", model)  # of a distributed wrapper
    inner = getattr(inner, "get_base_model", lambda: inner)()  # peft's forward names no arguments
    named = inspect.signature(inner.forward).parameters
    given: dict[str, Any] = {name: value for name, value in batch.items() if name in named and name != "labels"}
    if not given:  # it takes whatever it is given
        given = {name: batch[name] for name in ("pixel_values", "input_ids", "attention_mask") if name in batch}
    if "attention_mask" in named:
        given.setdefault("attention_mask", None)
    return {**given, **({"use_cache": False} if "use_cache" in named else {})}


def _one_below_the_other(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # the others are padded to one width over all data, of which a batch may need less
    lengths = {"": batch["input_ids"].shape[1], "other_": int(batch["other_attention_mask"].sum(dim=1).max())}
    width = max(lengths.values())
    return {
        name: torch.cat(
            [F.pad(batch[side + name][:, :length], (0, width - length)) for side, length in lengths.items()]
        )
        for name in ("input_ids", "attention_mask")
    }
