"""What the tests of `trace` and `sites` share: a small model, batches, and ways to look at states, outputs and hooks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from conftest import tiny_llama
from overhaul.stack import LayerStack
from overhaul.stack.calls import invoke
from overhaul.trace import measure

WIDTH, ROWS, LENGTH = 32, 2, 9


def llama() -> LayerStack:
    """The stack of a tiny Llama with four blocks."""
    return LayerStack.of(tiny_llama())


def batch(rows: int = ROWS, length: int = LENGTH, seed: int = 1, padded: int = 0) -> dict[str, Tensor]:
    """Random tokens; the last row ends in padding."""
    ids = torch.randint(3, 64, (rows, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[-1, length - padded :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def drawn(*shape: int, seed: int = 3) -> Tensor:
    """Normal numbers, the same at each call."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def keep(*states_and_mask: Tensor) -> list[tuple[Tensor, ...]]:
    """A reduction that reduces nothing: lists grow under +."""
    return [tuple(state.clone() for state in states_and_mask)]


def states_of(stack: LayerStack, inputs: Any, site: str = "leaving") -> list[Tensor]:
    """The states at a site of each block, or at the one site, [b, t, d]."""
    return [kept[0][0] for kept in measure(stack, [inputs], [site], keep).values()]


@torch.no_grad()
def outputs(stack: LayerStack, inputs: Any) -> list[Tensor]:
    """Every tensor that the model returns."""
    out = invoke(stack.model, inputs)
    values = [out] if isinstance(out, Tensor) else list(out.values())
    return [value for value in values if isinstance(value, Tensor)]


def output(stack: LayerStack, inputs: Any) -> Tensor:
    """The first tensor that the model returns: logits, or a sample."""
    return outputs(stack, inputs)[0]


def hooks_of(model: nn.Module) -> list[Any]:
    """Every hook on any module, by its number."""
    places = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_forward_hooks_with_kwargs")
    return [
        (name, place, list(vars(m)[place])) for name, m in model.named_modules() for place in places if vars(m)[place]
    ]
