"""Paths over a stack, each run alone to compare with, and a network whose blocks do as they are told."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from overhaul.stack import LayerStack
from overhaul.stack.arrangement import Entry
from overhaul.stack.calls import invoke

Paths = list[list[Entry]]


def tensors(value: Any) -> list[Tensor]:
    """All tensors of a model's output, in order."""
    if isinstance(value, Tensor):
        return [value]
    parts = value.to_tuple() if hasattr(value, "to_tuple") else value
    return [tensor for part in parts for tensor in tensors(part)] if isinstance(parts, tuple | list) else []


def read(output: Any, _: Any) -> list[Tensor]:
    return tensors(output)


@torch.no_grad()
def alone(stack: LayerStack, path: Sequence[Entry], inputs: dict[str, Any]) -> list[Tensor]:
    with stack.following(path):
        return tensors(invoke(stack.model, inputs))


def close(found: list[Tensor], expected: list[Tensor]) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def other_blocks(stack: LayerStack) -> list[nn.Module]:
    """Blocks of another checkpoint of the same model."""
    blocks = copy.deepcopy(stack.blocks)
    with torch.no_grad():
        for parameter in (p for block in blocks for p in block.parameters()):
            parameter.add_(torch.randn(parameter.shape) * parameter.std(correction=0) / 2)
    return blocks


def restorations(stack: LayerStack) -> Paths:
    """Every interval of blocks taken from the other checkpoint."""
    own, other = list(range(len(stack))), other_blocks(stack)
    return [
        [(place, other[place]) if first <= place <= last else place for place in own]
        for first, last in itertools.combinations_with_replacement(own, 2)
    ]


def drops(stack: LayerStack) -> Paths:
    """Every path without one block that may go."""
    return [[place for place in range(len(stack)) if place != gone] for gone in stack.droppable]


def positions(stack: LayerStack) -> list[int]:
    """Rows that enter each call of a block from now on."""
    rows: list[int] = []
    for block in stack.blocks:
        block.register_forward_hook(lambda _, args, output: rows.append(args[0].shape[0]))
    return rows


class Block(nn.Module):
    """Adds what a function makes of the state and the block's argument."""

    def __init__(self, change: Any) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.change = change

    def forward(self, x: Tensor, extra: Tensor) -> Tensor:
        return x + self.change(self.inner(x), extra)


class Net(nn.Module):
    """Blocks that all get the same argument."""

    def __init__(self, change: Any) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(change) for _ in range(4)])

    def forward(self, x: Tensor, extra: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, extra)
        return x
