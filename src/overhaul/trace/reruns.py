"""One block as it ran on real inputs, and how to run it again with something changed: what `sites` finds out by."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from overhaul.stack.calls import Call, Calls, State, map_tensors
from overhaul.trace import capture
from overhaul.trace.flow import part

_EXACT = 1e-5
"""What float32 may lose in a sum, and more."""
_CHANGED = 1e-4
"""What a change may do to what does not depend on it: experts take other tokens together, which rounds differently."""


@dataclass(frozen=True)
class Run:
    """One call of a module inside a block."""

    name: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Any

    @property
    def input(self) -> Any:
        """The first argument."""
        return self.args[0] if self.args else next(iter(self.kwargs.values()), None)

    def again(self, value: Tensor) -> Tensor:
        """The output for another input, without the module's hooks."""
        if self.args:
            return self.module.forward(value, *self.args[1:], **self.kwargs)
        return self.module.forward(**{**self.kwargs, next(iter(self.kwargs)): value})


@dataclass(frozen=True)
class BlockRun:
    """One block as it ran: the state before and after, and the calls of all modules in it that were called once."""

    calls: Calls
    place: int
    name: str
    entered: State
    left: State
    runs: tuple[Run, ...]

    @classmethod
    def watch(cls, calls: Calls, place: int, name: str, entered: State) -> BlockRun:
        """Run a block, called `name` in the model, on a state."""
        runs: list[Run] = []
        with ExitStack() as undo:
            for path, module in calls.stack.blocks[place].named_modules():
                if path:
                    hook = _recorder(runs, f"{name}.{path}")
                    undo.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
            left = calls.run(place, entered)
        times = [run.name for run in runs]
        return cls(calls, place, name, entered, left, tuple(run for run in runs if times.count(run.name) == 1))

    @property
    def part(self) -> int:
        """Which part of the state is the stream."""
        return part(self.calls)

    @property
    def entering(self) -> Tensor:
        """The stream that enters."""
        value = self.entered[self.part]
        assert value is not None
        return value

    @property
    def leaving(self) -> Tensor:
        """The stream that leaves."""
        value = self.left[self.part]
        assert value is not None
        return value

    @property
    def exact(self) -> float:
        """How far from a sum rounding alone may lead."""
        return max(_EXACT, 4 * torch.finfo(self.entering.dtype).eps)

    @property
    def changed(self) -> float:
        """What part of a change rounding alone may make elsewhere."""
        return max(_CHANGED, 4 * torch.finfo(self.entering.dtype).eps)

    def is_stream(self, value: Any) -> bool:
        """Whether a tensor has a value for each element of the stream: its shape, or with positions flattened."""
        shape = self.entering.shape
        flat = (shape[0] * shape[1], shape[2])
        return isinstance(value, Tensor) and value.is_floating_point() and tuple(value.shape) in (tuple(shape), flat)

    def wide(self, value: Tensor) -> Tensor:
        """In the stream's shape and in float64, so that what is found is the model's rounding and not ours."""
        return value.reshape(self.entering.shape).double()

    def value(self, name: str, entering: Tensor | None = None, call: Call | None = None) -> Tensor:
        """What a module gives, [b, t, d], when the block runs on another state, with another call, or inside an edit."""
        state = list(self.entered)
        state[self.part] = self.entering if entering is None else entering
        with capture(self.calls.stack, [name], lambda rows, _: [rows.clone()]) as seen:
            self.calls.run(self.place, tuple(state), call=call)
        return seen[name][0]


def _recorder(runs: list[Run], name: str) -> Callable[..., None]:
    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        # some models go on working in what a module was given or returned (Falcon adds attention to it)
        runs.append(Run(name, module, map_tensors(args, Tensor.clone), kwargs, map_tensors(output, Tensor.clone)))

    return record
