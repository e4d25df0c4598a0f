"""Optimizers for `fit`: built from the model, so that one may treat parameters by the module and depth they belong to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

OptimizerFactory = Callable[[nn.Module, Mapping[str, nn.Parameter]], torch.optim.Optimizer]
"""(model, the parameters that train, by name) -> optimizer.

A parameter's module is `model.get_submodule(name.rpartition(".")[0])`, its depth `LayerStack.of(model).depth(name)`; a
tied one comes under its first name. The `lr` of a group is a factor on the schedule's rate: 1 for the rate itself. The
parameters are exchanged for shards when a training is sharded: an optimizer keeps what it knows of one in its group or
its state, not under the parameter's identity.
"""


def adamw(betas: tuple[float, float] = (0.9, 0.999), weight_decay: float = 0.0) -> OptimizerFactory:
    """AdamW; matrices decay, vectors (norms, biases) do not."""

    def build(model: nn.Module, trained: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(_groups(trained, weight_decay), lr=1.0, betas=betas, fused=True)

    return build


def sgd(weight_decay: float = 0.0) -> OptimizerFactory:
    """Plain descent without momentum, whose step is the rate times the gradient; matrices decay, vectors do not."""

    def build(model: nn.Module, trained: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(_groups(trained, weight_decay), lr=1.0)

    return build


def _groups(trained: Mapping[str, nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    matrices = [p for p in trained.values() if p.ndim >= 2]
    vectors = [p for p in trained.values() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
