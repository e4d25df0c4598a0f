"""Models of ours around a network of transformers (an ensemble, a bank of prompts): what their configs hold of it.

No derived class can describe them, so their configs name our module under `overhaul`, and the network's config and class.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from overhaul.conversions.classes import class_in


def describe(
    config: Any, module: str, inner: Mapping[str, Any] | None, inner_class: str, shown: Sequence[str] = ()
) -> None:
    """Let a config say where its class is defined and what it is built around.

    Args:
        config: a `PreTrainedConfig` of ours.
        module: under `overhaul`, with the class that the config names as its architecture.
        inner: the network's config; None where there is no network yet.
        inner_class: its class in transformers.
        shown: entries of the network's config that others read in this one.
    """
    config.overhaul = module
    config.inner, config.inner_class = dict(inner or {}), inner_class
    for name in shown:
        if config.inner.get(name) is not None:
            setattr(config, name, config.inner[name])


def class_within(config: Any) -> Any:
    """The network's class; a converted one where its config has records."""
    import transformers

    return class_in(config.inner) or getattr(transformers, config.inner_class)


def build_within(config: Any) -> nn.Module:
    """The network as its class builds it."""
    kind = class_within(config)
    return kind(kind.config_class.from_dict(config.inner))
