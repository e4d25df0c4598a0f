"""The sizes that torch's layers, and GPT-2's, keep beside their weights."""

from __future__ import annotations

from typing import Any

from torch import nn

_BY_AXIS: tuple[tuple[Any, tuple[str, ...]], ...] = (
    (nn.Linear, ("out_features", "in_features")),
    (nn.modules.conv._ConvTransposeNd, ("in_channels", "out_channels")),
    (nn.modules.conv._ConvNd, ("out_channels", "in_channels")),
    (nn.Embedding, ("", "embedding_dim")),
    (nn.modules.batchnorm._NormBase, ("num_features",)),
)


def fit_sizes(module: nn.Module) -> None:
    """Let a layer's sizes be those of its weight."""
    own: Any = module
    weight = getattr(module, "weight", None)
    if weight is None:
        return
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        own.normalized_shape = tuple(weight.shape)
    elif type(module).__name__ == "Conv1D":
        own.nx, own.nf = weight.shape
    elif isinstance(module, nn.modules.conv._ConvNd) and own.groups > 1:  # each channel on its own
        own.in_channels = own.out_channels = own.groups = weight.shape[0]
    else:
        names = next((names for kind, names in _BY_AXIS if isinstance(module, kind)), ())
        for axis, name in enumerate(names):
            if name:
                setattr(module, name, weight.shape[axis])
