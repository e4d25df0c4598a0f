"""How many tokens a model has positions for.

Tables like RoBERTa's begin behind the padding's number, which no token of a text gets: of 514 positions 512 can be used.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn


def declared(config: Any) -> int | None:
    """The positions that a config names, a mapping or an object."""
    entries: Mapping[str, Any] = config if isinstance(config, Mapping) else {}
    for name in ("max_position_embeddings", "n_positions"):
        named = entries.get(name, getattr(config, name, None))
        if isinstance(named, int) and named > 0:
            return named
    return None


def left_out(config: Mapping[str, Any]) -> int:
    """The most positions that a model of such a config may leave out."""
    padding = config.get("pad_token_id")
    return 1 + (padding if isinstance(padding, int) and padding >= 0 else 1)


def most_positions(model: nn.Module) -> int | None:
    """The longest text that a model reads; None where nothing says so."""
    most = declared(getattr(model, "config", None))
    tables = [
        module.num_embeddings - 1 - module.padding_idx
        for name, module in model.named_modules()
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None
    ]
    return most if most is None else min([most, *tables])
