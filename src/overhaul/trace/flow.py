"""The state of a stack that is run by hand (`Calls`): layer by layer, and the residual stream in it as rows.

A layer is a number of blocks: 0 is what enters the first, the last one what leaves all of them.
"""

from __future__ import annotations

from collections.abc import Iterator

from jaxtyping import Float
from torch import Tensor

from overhaul.stack.calls import Calls, State
from overhaul.trace.streams import MAIN, as_rows, from_rows


def states(calls: Calls) -> Iterator[State]:
    """The state at every layer, one at a time."""
    yield calls.entering
    state = calls.after_first
    yield state
    for place in range(1, len(calls.stack)):
        state = calls.run(place, state)
        yield state


def part(calls: Calls) -> int:
    """Which part of a state is the residual stream."""
    return next((n for n, (slot, _) in enumerate(calls.slots) if slot in (0, MAIN)), 0)


def stream(calls: Calls, state: State) -> Float[Tensor, "b t d"]:
    """The residual stream of a state."""
    value = state[part(calls)]
    assert value is not None
    return as_rows(value, None, calls.stack.path)


def with_stream(calls: Calls, state: State, rows: Float[Tensor, "b t d"]) -> State:
    """The state with another residual stream, in the dtype of its own."""
    place = part(calls)
    value = state[place]
    assert value is not None
    return (*state[:place], from_rows(rows.to(value.dtype), value), *state[place + 1 :])
