"""Run one block on several states in one call, where that gives what single calls give.

1. Which arguments of a block (masks, conditioning) belong to samples cannot be told from shapes alone. So a batch of a block
   is compared with single runs at its first use, and again whenever its arguments take other shapes or begin to differ
   between samples. A block whose batch differs runs on one state at a time.
2. Blocks that differ in nothing but weights treat their arguments alike and count as one.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor, nn

from overhaul.stack.calls import Call, Calls, State

BUDGET = 2**30
"""Bytes of states that are held at once: 1 GiB."""

_CPU_BATCH, _BATCH = 2**19, 2**25
"""Bytes of states in one batch. On a CPU, larger ones leave the cache and take longer than one state at a time."""

_OF_EVERY_MODULE = {*vars(nn.Module()), "layer_idx"}


class BatchedBlocks:
    """Runs a block on several states in one call, where that gives what single calls give."""

    def __init__(self) -> None:
        self._rules: dict[Hashable, _Rule | None] = {}
        self._kinds: dict[nn.Module, Hashable] = {}

    def run(self, calls: Calls, place: int, module: nn.Module | None, states: Sequence[State]) -> list[State]:
        """The block at `place`, or `module` in its stead, on every state.

        Args:
            calls: how the block is called on the inputs at hand.
            place: which block.
            module: what runs in its stead.
            states: of one shape.
        """
        call = calls.calls[place]

        def alone(state: State) -> State:
            return calls.run(place, state, module)

        def at_once(rule: _Rule) -> list[State]:
            together = joined(states)
            out = calls.run(place, together, module, _repeated(call, states, rule))
            return _split(out, together, states)

        if len(states) == 1:
            return [alone(states[0])]
        block = module or calls.stack.blocks[place]
        if block not in self._kinds:
            self._kinds[block] = _kind(block)
        use = (self._kinds[block], _signature(call, states))
        if use in self._rules:
            rule = self._rules[use]
            return [alone(state) for state in states] if rule is None else at_once(rule)
        for rule in (_by_rows, _by_multiples):
            try:
                found = at_once(rule)
            except (RuntimeError, ValueError, IndexError):  # repeated tensors that do not fit into the call
                continue
            if all(_same_state(found[n], alone(states[n])) for n in (0, -1)):
                self._rules[use] = rule
                return found
        self._rules[use] = None
        return [alone(state) for state in states]


def at_once(size: int, device: torch.device, most: int) -> int:
    """How many states of `size` bytes are run in one batch, at least one and at most `most`."""
    return max(1, min(most, (_CPU_BATCH if device.type == "cpu" else _BATCH) // size))


_Rule = Callable[[Tensor, int], bool]
"""(an argument, rows of a state) -> whether the argument belongs to samples and is repeated with them."""


def _by_rows(tensor: Tensor, rows: int) -> bool:
    return tensor.ndim > 0 and tensor.shape[0] == rows


def _by_multiples(tensor: Tensor, rows: int) -> bool:
    """Also tensors with several rows for each sample: Bloom's positions, one for each head."""
    return tensor.ndim > 0 and tensor.shape[0] % rows == 0


def _rows(state: State) -> int:
    return next(part.shape[0] for part in state if part is not None)


def _kind(block: nn.Module) -> Hashable:
    """All that its code can go by besides weights: blocks of the same kind treat their arguments alike."""
    return tuple(
        (path, type(part), name, value if isinstance(value, bool | int | float | str | None) else id(value))
        for path, part in block.named_modules()
        for name, value in [("", None), *vars(part).items()]
        if name not in _OF_EVERY_MODULE
    )


def _signature(call: Call, states: Sequence[State]) -> Hashable:
    """What a rule was tried on: the shapes, and whether an argument is the same for all samples, which hides mistakes."""
    arguments = tuple((tensor.shape, tensor.ndim > 0 and bool((tensor == tensor[:1]).all())) for tensor in call.tensors)
    return arguments, tuple(None if part is None else part.shape for part in states[0])


def _repeated(call: Call, states: Sequence[State], rule: _Rule) -> Call:
    rows, times = _rows(states[0]), len(states)
    return call.map(lambda value: value.repeat(times, *[1] * (value.ndim - 1)) if rule(value, rows) else value)


def joined(states: Sequence[State]) -> State:
    """States one after the other along dim 0; a part that all samples share (T5's position bias) stays one."""
    rows = _rows(states[0])
    found: list[Tensor | None] = []
    for parts in zip(*states, strict=True):
        first = parts[0]
        if first is None or (first.shape[0] != rows and all(part is first for part in parts)):
            found.append(first)
        elif any(part is None or part.shape[0] != rows for part in parts):
            raise ValueError("a part that samples share differs between the states")
        else:
            found.append(torch.cat(parts))
    return tuple(found)


def _split(out: State, joined: State, states: Sequence[State]) -> list[State]:
    """A batch taken apart again."""
    rows, times = _rows(states[0]), len(states)
    columns: list[Sequence[Tensor | None]] = []
    for part, entered in zip(out, joined, strict=True):
        shared = part is None or (entered is not None and entered.shape[0] != rows * times)
        columns.append([part] * times if shared or part is None else part.split(rows))
    return list(zip(*columns, strict=True))


def _same_state(one: State, other: State) -> bool:
    return all(a is b or (a is not None and b is not None and same(a, b)) for a, b in zip(one, other, strict=True))


def same(found: Tensor, expected: Tensor) -> bool:
    """Whether two tensors are equal up to the rounding of matrix products that were split in another way."""
    rounding = max(1e-5, 4 * torch.finfo(expected.dtype).eps)
    near = rounding * float(expected.float().abs().mean()) if expected.numel() else 0.0
    return found.shape == expected.shape and torch.allclose(found.float(), expected.float(), rtol=rounding, atol=near)
