"""Patching: states of one run put into another, one patch for each layer and position, many of them in one forward.

    clean = states_of(stack, true)                                  # h_l[i] after every block
    patches = [Patch(layer, where, clean.states[layer][where]) for layer in range(len(stack)) for where in positions]
    found = patch_grid(stack, false, patches, lambda logits: logits[:, yes] - logits[:, no])

1. What runs before a patch is the same for all: blocks are run once up to the patched layer, and patches that have been put
   in flow on together, batched along dim 0 where that gives what single runs give, which is tried.
2. What lies before the first patched position is read once, where the model keeps keys and values (`beginnings`).
3. The output head is applied where a label counts and nowhere else, if that gives the model's own logits there.
4. The states may come from another model of the same shapes, which need not be in memory any more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from overhaul import session
from overhaul._batching import BUDGET, BatchedBlocks, at_once, joined, same
from overhaul.data.examples import IGNORED
from overhaul.errors import RequestError
from overhaul.modes import at_rest
from overhaul.prefix import Answers
from overhaul.stack import LayerStack
from overhaul.stack.calls import Calls, State, map_tensors, state_bytes
from overhaul.trace.beginnings import after_beginning
from overhaul.trace.flow import states, stream, with_stream

Result = TypeVar("Result")


@dataclass(frozen=True, eq=False)
class Patch:
    """What a block returns is replaced at some positions.

    Attributes:
        place: of the block, counted from 0.
        positions: where, for each sample.
        value: what stands there instead: a state for each chosen position, sample by sample.
    """

    place: int
    positions: Bool[Tensor, "b t"]
    value: Float[Tensor, "k d"]


@dataclass(frozen=True, eq=False)
class Run:
    """One forward: what left every block, and the logits where a label counts."""

    states: Sequence[Float[Tensor, "b t d"]]
    logits: Float[Tensor, "n v"]


@torch.no_grad()
def states_of(stack: LayerStack, batch: Mapping[str, Any]) -> Run:
    """The states that leave each block on a collated batch, and its answers; in eval mode.

    Raises:
        RequestError: the blocks cannot be run by hand.
    """
    with at_rest(stack.model):
        calls = Calls.record(stack, _moved(stack, batch))
        kept, state = list[Tensor](), calls.entering
        for layer, state in enumerate(states(calls)):
            if layer:
                kept.append(stream(calls, state))
        return Run(kept, Answers(stack.model)(calls, state))


@torch.no_grad()
def patch_grid(
    stack: LayerStack,
    batch: Mapping[str, Any],
    patches: Sequence[Patch],
    read: Callable[[Float[Tensor, "n v"]], Result],
    *,
    budget: int = BUDGET,
) -> list[Result]:
    """Run a batch once for each patch, in eval mode.

    Args:
        stack: of a language model whose blocks can be run by hand.
        batch: a collated batch, whose labels say where answers are read.
        patches: in any order.
        read: the logits that predict the labelled tokens, row by row -> what is kept of one patch.
        budget: most bytes of states held at once.

    Returns:
        One result for each patch, in their order; equal to `intervene` with `Replace` up to the rounding of larger matrix
        products.

    Raises:
        RequestError: a patch does not fit the stack or the batch, or the budget does not hold three states.
    """
    _check(stack, batch, patches)
    with at_rest(stack.model):
        moved, start = _moved(stack, batch), _first(patches)
        rest = after_beginning(stack, moved, start)
        start = 0 if rest is None else start
        calls = Calls.record(stack, rest or moved)
        walk = _Walk(calls, read, budget)
        waiting: dict[int, list[int]] = {}
        for number, patch in enumerate(patches):
            waiting.setdefault(patch.place, []).append(number)
        clean = calls.entering
        for place in session.progress(range(max(waiting, default=-1) + 1), "patches, by block", len(stack)):
            clean = calls.after_first if place == 0 else calls.run(place, clean)
            walk.through(place)
            for number in waiting.get(place, []):
                if len(walk.states) == walk.most:
                    walk.to_the_end(place)
                walk.states[number] = _patched(calls, clean, patches[number], start)
        walk.to_the_end(max(waiting, default=0))
    return [walk.found[number] for number in range(len(patches))]


class _Walk:
    """The patched states on their way to the end."""

    def __init__(self, calls: Calls, read: Callable[[Tensor], Any], budget: int) -> None:
        size = max(state_bytes(calls.entering), state_bytes(calls.after_first))
        if budget < 3 * size:
            raise RequestError(
                f"A patch needs three states at once, the clean one and what enters and leaves a block: {3 * size:,} bytes "
                f"on these inputs. The budget is {budget:,}. Give a larger one, or smaller batches."
            )
        device = next(calls.stack.model.parameters()).device
        self.calls, self.read = calls, read
        self.most = budget // size - 2
        self.together = at_once(size, device, max(1, self.most // 4))
        self.blocks, self.ends = BatchedBlocks(), _Ends(calls)
        self.states: dict[int, State] = {}
        self.found: dict[int, Any] = {}

    def through(self, place: int) -> None:
        """All states through one block."""
        for part in self._parts():
            left = self.blocks.run(self.calls, place, None, [self.states[number] for number in part])
            self.states |= zip(part, left, strict=True)

    def to_the_end(self, place: int) -> None:
        """All states, which have left this block, to the logits."""
        for later in range(place + 1, len(self.calls.stack)):
            self.through(later)
        for part in self._parts():
            logits = self.ends.run([self.states.pop(number) for number in part])
            self.found |= zip(part, map(self.read, logits), strict=True)

    def _parts(self) -> list[list[int]]:
        """The numbers of what is on its way, evenly in batches."""
        numbers = list(self.states)
        count = -(-len(numbers) // self.together)
        return [numbers[part::count] for part in range(count)]


class _Ends:
    """What the model makes of states that leave the stack, several in one call where that gives what single calls give."""

    def __init__(self, calls: Calls) -> None:
        self.calls, self.answers = calls, Answers(calls.stack.model)
        self.batched: bool | None = False if calls.before else None

    def run(self, states: Sequence[State]) -> list[Tensor]:
        """The logits [n, v] of each state."""
        if len(states) == 1 or self.batched is False:
            return [self.answers(self.calls, state) for state in states]
        if self.batched:
            return self._at_once(states)
        alone = [self.answers(self.calls, states[n]) for n in (0, -1)]
        try:
            found = self._at_once(states)
        except (RuntimeError, ValueError, IndexError):  # the model does more with its inputs than sample by sample
            found = []
        self.batched = bool(found) and all(same(found[n], one) for n, one in zip((0, -1), alone, strict=True))
        return found if self.batched else [self.answers(self.calls, state) for state in states]

    def _at_once(self, states: Sequence[State]) -> list[Tensor]:
        repeated = map_tensors(
            dict(self.calls.inputs), lambda value: value.repeat(len(states), *[1] * (value.ndim - 1))
        )
        logits = self.answers(replace(self.calls, inputs=repeated), joined(states))
        counted = int((self.calls.inputs["labels"][:, 1:] != IGNORED).sum())
        return list(logits.split(counted))


def _first(patches: Sequence[Patch]) -> int:
    """The first position that any patch changes."""
    return min((int(patch.positions.any(0).nonzero()[0]) for patch in patches), default=0)


def _patched(calls: Calls, state: State, patch: Patch, start: int) -> State:
    """The clean state, which begins at position `start`, with the patch in it."""
    rows = stream(calls, state).clone()
    rows[patch.positions[:, start:].to(rows.device)] = patch.value.to(rows.device, rows.dtype)
    return with_stream(calls, state, rows)


def _moved(stack: LayerStack, batch: Mapping[str, Any]) -> dict[str, Any]:
    device = next(stack.model.parameters()).device
    return map_tensors(dict(batch), lambda value: value.to(device))


def _check(stack: LayerStack, batch: Mapping[str, Any], patches: Sequence[Patch]) -> None:
    """Refuse patches that do not fit."""
    if "input_ids" not in batch or batch.get("labels") is None or batch["labels"].ndim != 2:
        raise RequestError("patch_grid reads answers of a language model: give a collated batch of tokens with labels.")
    shape, width = tuple(batch["input_ids"].shape), getattr(stack.config, "hidden_size", None)
    for number, patch in enumerate(patches):
        if patch.place not in range(len(stack)):
            raise RequestError(
                f"Patch {number} is at block {patch.place}; {stack.path} has the blocks 0 to {len(stack) - 1}."
            )
        chosen = int(patch.positions.sum())
        if tuple(patch.positions.shape) != shape or not chosen:
            raise RequestError(
                f"Patch {number} chooses {chosen} positions by a mask {list(patch.positions.shape)}; the batch is "
                f"{list(shape)}, and at least one must be chosen."
            )
        if patch.value.ndim != 2 or len(patch.value) != chosen or (width and patch.value.shape[1] != width):
            raise RequestError(
                f"Patch {number} has values {list(patch.value.shape)} for {chosen} positions of {width} features."
            )
