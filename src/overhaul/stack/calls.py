"""How a model calls its blocks: recorded once on some inputs, so that single blocks can be run by hand.

    calls = Calls.record(stack, inputs)
    state = calls.entering
    for place in (0, 1, 1, 3):
        state = calls.run(place, state)      # block `place` with its own mask, rotary table, conditioning
    output = calls.finish(state)             # final norm and head, or whatever the model does after the stack

1. Recording runs the model up to the call of the last block, and of the blocks only the first: what it returns shows
   what blocks return. The others are called with it and never run.
2. What flows from block to block (the *state*) is told by identity: the arguments of a block that are the very objects
   its predecessor returned. One tensor for most, two for joint text and image blocks, hidden states and position bias
   for T5. Everything else belongs to the call of that block.
3. A block's arguments stay with the block, wherever on a path it runs.
4. `finish` runs the model itself with blocks that compute nothing, so that nothing about heads need be known. Stacks
   that ran before this one (the encoder, for a decoder) return what they returned before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from overhaul.errors import RequestError, RunError
from overhaul.forward import caches, forward
from overhaul.stack import LayerStack

State = tuple[Tensor | None, ...]
"""What flows from block to block: [b, t, d] or [b, c, h, w] each; None where a last block drops a part."""

Slot = int | str
"""An argument of a block: its position or its keyword."""

Slots = tuple[tuple[Slot, int], ...]
"""For each part of the state, where a block takes it, and its index in what a block returns."""


@dataclass(frozen=True)
class Call:
    """One recorded call of a block: its arguments, None where the state enters."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def map(self, change: Callable[[Tensor], Tensor]) -> Call:
        """The same call with every tensor changed (moved, repeated)."""
        return Call(map_tensors(self.args, change), map_tensors(dict(self.kwargs), change))

    @property
    def tensors(self) -> list[Tensor]:
        """Every tensor among the arguments, in order."""
        found: list[Tensor] = []
        self.map(lambda tensor: found.append(tensor) or tensor)
        return found


@dataclass(frozen=True)
class Calls:
    """The calls of all blocks of one stack on one set of inputs.

    Attributes:
        stack: the stack.
        inputs: what the model was given.
        slots: where the state enters a block and leaves it.
        outline: what a block returns besides the state, None in its places; None for a bare tensor.
        entering: the state that enters the first block.
        after_first: the state that left the first block.
        calls: one for each block.
        before: the stacks that ran before this one, with what the last block of each returned.
    """

    stack: LayerStack
    inputs: Mapping[str, Any]
    slots: Slots
    outline: list[Any] | None
    entering: State
    after_first: State
    calls: tuple[Call, ...]
    before: tuple[tuple[LayerStack, Any], ...]

    @classmethod
    @torch.no_grad()
    def record(cls, stack: LayerStack, inputs: Mapping[str, Any], device: torch.device | None = None) -> Calls:
        """Run the model as far as the call of the last block, without gradients and in the mode it is in.

        Args:
            stack: the stack whose blocks are watched.
            inputs: a collated batch, or the model's own keyword arguments.
            device: where the first block lies, if not with the rest of the model.

        Raises:
            RequestError: the blocks do not hand on what they return, do not run in their order, one after the other, or
                are called with a cache.
            RunError: the first block writes into what enters it.
        """
        seen: list[_Seen] = []
        others = [other for other in LayerStack.find(stack.model) if other.path != stack.path]
        returned: dict[str, list[Any]] = {other.path: [] for other in others}
        with ExitStack() as undo:
            for other in others:
                for block in other.blocks:
                    hook = block.register_forward_hook(_noting(returned[other.path], seen))
                    undo.callback(hook.remove)
            for place, block in enumerate(stack.blocks):
                _instead(undo, block, _standing_in(stack, place, block.forward, seen, device))
            undo.enter_context(suppress(_Reached))
            invoke(stack.model, inputs)
        ran = [one.place for one in seen]
        if ran != list(range(len(stack))):
            raise RequestError(
                f"The {len(stack)} blocks of {stack.path} do not run once each, in their order, on these inputs, but so: "
                f"{ran}. They cannot be run by hand."
            )
        if any(_is_added_to(value) for one in seen for value in (*one.args, *one.kwargs.values())):
            raise RequestError(
                f"{type(stack.model).__name__} calls its blocks with a cache, to which every run of a block would add: give "
                '"use_cache": False with the inputs.'
            )
        slots = _slots(stack, seen)
        parts = _parts(seen[0].output)
        indices = {index for _, index in slots}
        # what else a block returns is known of the first one alone: no tensor of it may stand for another's
        rest = [None if n in indices or isinstance(part, Tensor) else part for n, part in enumerate(parts)]
        return cls(
            stack=stack,
            inputs=inputs,
            slots=slots,
            outline=rest if isinstance(seen[0].output, tuple) else None,
            entering=tuple(seen[0].argument(slot) for slot, _ in slots),
            after_first=tuple(parts[index] for _, index in slots),
            calls=tuple(one.blank(slots) for one in seen),
            before=tuple(
                (other, returned[other.path][-1]) for other in others if len(returned[other.path]) == len(other)
            ),
        )

    def run(self, place: int, state: State, block: nn.Module | None = None, call: Call | None = None) -> State:
        """One block on a state.

        Args:
            place: which block.
            state: what enters it.
            block: a module to run in its stead, called like it.
            call: its call, if it was changed with `Call.map`.

        Raises:
            RunError: the block writes into what enters it, which other runs share.
        """
        call = call or self.calls[place]
        args, kwargs = list(call.args), dict(call.kwargs)
        for (slot, _), value in zip(self.slots, state, strict=True):
            if isinstance(slot, int):
                args[slot] = value
            else:
                kwargs[slot] = value
        with _unwritten(self.stack, place, state):
            out = _parts((block or self.stack.blocks[place])(*args, **kwargs))
        return tuple(out[index] for _, index in self.slots)

    def finish(self, state: State) -> Any:
        """What the model makes of a state that leaves the stack: logits for a batch, else the model's own output.

        Like `run`, with gradients where they are on.

        Raises:
            RequestError: the model runs the stack more than once.
        """
        with ExitStack() as undo:
            for block in self.stack.blocks:
                _instead(undo, block, _returning_once(_filled(self.outline, self.slots, state), self._again))
            for other, result in self.before:
                for block in other.blocks:
                    _instead(undo, block, _returning_once(result, block.forward))
            return invoke(self.stack.model, self.inputs)

    def _again(self, *_: Any, **__: Any) -> Any:
        raise RequestError(
            f"{type(self.stack.model).__name__} runs the blocks of {self.stack.path} more than once in a forward pass, so "
            "they cannot be run by hand."
        )


def invoke(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """Logits for a collated batch (one with labels), or last hidden states where there is no head; what the model returns
    for its own keyword arguments. No cache.
    """
    if "labels" in inputs:
        return forward(model, inputs, states=True)
    unwrapped = getattr(model, "get_base_model", lambda: model)()  # peft's forward names no arguments
    return model(**{**({"use_cache": False} if caches(unwrapped) else {}), **inputs})


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A nested structure of tuples, lists and dicts with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: map_tensors(part, change) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map_tensors(part, change) for part in value)
    return value


def state_bytes(state: State) -> int:
    """Bytes that the tensors of a state take."""
    return sum(part.nbytes for part in state if part is not None)


def _is_added_to(value: Any) -> bool:
    """Whether an argument is a cache to which a run adds."""
    return hasattr(value, "get_seq_length") and not getattr(value, "nothing_is_added", False)


class _Reached(Exception):
    """The last block was called: all is recorded."""


@dataclass(frozen=True)
class _Seen:
    """One call as it happened."""

    place: int
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Any

    def argument(self, slot: Slot) -> Any:
        return self.args[slot] if isinstance(slot, int) else self.kwargs[slot]

    def blank(self, slots: Slots) -> Call:
        """The call without the state."""
        names = {slot for slot, _ in slots}
        args = tuple(None if n in names else value for n, value in enumerate(self.args))
        return Call(args, {name: None if name in names else value for name, value in self.kwargs.items()})


def _standing_in(
    stack: LayerStack, place: int, run: Callable[..., Any], seen: list[_Seen], device: torch.device | None
) -> Callable[..., Any]:
    """The first block runs and its call is noted; the others only note how they are called, until the last one is."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        if seen:
            output = seen[0].output
        else:
            home = next((arg.device for arg in (*args, *kwargs.values()) if isinstance(arg, Tensor)), None)
            moved = (args, kwargs) if device is None else map_tensors((args, kwargs), lambda value: value.to(device))
            with _unwritten(stack, place, (*args, *kwargs.values())):
                output = run(*moved[0], **moved[1])
            output = output if device is None else map_tensors(output, lambda value: value.to(home))
        seen.append(_Seen(place, args, kwargs, output))
        if place == len(stack) - 1:
            raise _Reached
        return output

    return forward


def _noting(returned: list[Any], seen: list[_Seen]) -> Callable[..., None]:
    """A hook that keeps what blocks of another stack return before the watched stack starts."""

    def note(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not seen:
            returned.append(output)

    return note


@contextmanager
def _unwritten(stack: LayerStack, place: int, values: tuple[Any, ...]) -> Iterator[None]:
    """Refuse a block that changes in place what enters it, since the same state may enter others."""
    tensors = [value for value in values if isinstance(value, Tensor) and not value.is_inference()]
    versions = [tensor._version for tensor in tensors]
    yield
    if versions != [tensor._version for tensor in tensors]:
        raise RunError(
            f"Block {place} of {stack.path} in {type(stack.model).__name__} writes into what enters it (an operation in "
            "place), so a state cannot be handed to it twice. Build the model without in-place operations there."
        )


def _instead(undo: ExitStack, block: nn.Module, forward: Callable[..., Any]) -> None:
    """Let a block do something else until `undo` is closed."""
    own = vars(block).get("forward")  # accelerate hangs its hooks there
    undo.callback(lambda: vars(block).pop("forward", None) if own is None else setattr(block, "forward", own))
    block.forward = forward


def _returning_once(result: Any, later: Callable[..., Any]) -> Callable[..., Any]:
    """Return `result` at the first call and do as `later` does after it."""
    called: list[bool] = []

    def forward(*args: Any, **kwargs: Any) -> Any:
        called.append(True)
        return result if len(called) == 1 else later(*args, **kwargs)

    return forward


def _parts(output: Any) -> tuple[Any, ...]:
    return output if isinstance(output, tuple) else (output,)


def _slots(stack: LayerStack, seen: list[_Seen]) -> Slots:
    """Where a block's arguments are what the block before it returned."""
    if len(seen) == 1:
        return ((0 if seen[0].args else "hidden_states", 0),)
    parts = _parts(seen[0].output)
    found = tuple(
        (slot, index)
        for slot, value in [*enumerate(seen[1].args), *seen[1].kwargs.items()]
        for index, part in enumerate(parts)
        if isinstance(part, Tensor) and value is part
    )
    for later in seen[1:]:
        if not found or any(later.argument(slot) is not parts[index] for slot, index in found):
            raise RequestError(
                f"In {type(stack.model).__name__}, what block {later.place - 1} of {stack.path} returns is not what enters "
                f"block {later.place}: the model changes it in between, so its blocks cannot be run by hand."
            )
    return found


def _filled(outline: list[Any] | None, slots: Slots, state: State) -> Any:
    """What a block would return that leaves `state`."""
    if outline is None:
        return state[0]
    parts = list(outline)
    for (_, index), value in zip(slots, state, strict=True):
        parts[index] = value
    return tuple(parts)
