"""Many paths over the same inputs, as a trie: what paths have in common is computed once.

    losses = path_losses(stack, [[0, 1, 3], [0, 2, 3], [0, 1, (2, base.blocks[2]), 3]], examples, batch_size=16)
    last = run_paths(stack, paths, inputs, read=lambda output, _: output.logits[:, -1])

A path is what `LayerStack.following` takes: places of blocks, or (place, module) for a block of another checkpoint.

1. The trie is walked level by level. Nodes of a level that run the same block are batched along dim 0 where that gives what
   single runs give, which is tried (`_batching`).
2. Only as many paths are walked at once as the budget can hold the states of. What the next ones share with them is
   computed again.
3. `path_losses` applies the output head where labels carry loss and nowhere else, if that gives the model's own logits
   there: the head is paid for every path and often costs as much as several blocks.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Generic, TypeVar, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from overhaul import session
from overhaul._batching import BUDGET, BatchedBlocks, at_once, same
from overhaul.data.examples import IGNORED, Examples
from overhaul.errors import RequestError
from overhaul.forward import forward, headless
from overhaul.modes import at_rest
from overhaul.objectives import cross_entropy_sum, units
from overhaul.references import head_only_at, output_head
from overhaul.stack import LayerStack
from overhaul.stack.arrangement import Entry
from overhaul.stack.calls import Calls, State, state_bytes

Result = TypeVar("Result")
Stop = tuple[int, int]
"""A place, and which module stands there: 0 for the stack's own block, else its number in `_Trie.modules`."""

Prefix = tuple[Stop, ...]

_SHARED_OUT = 4
"""One part in so many of the budget is left to copies: batches are copies of the states they are made of."""


@overload
def run_paths(
    stack: LayerStack,
    paths: Sequence[Sequence[Entry]],
    inputs: Mapping[str, Any],
    *,
    read: Callable[[Any, Any], Result],
    budget: int = BUDGET,
) -> list[Result]: ...
@overload
def run_paths(
    stack: LayerStack,
    paths: Sequence[Sequence[Entry]],
    inputs: Iterable[Mapping[str, Any]],
    *,
    read: Callable[[Any, Any], Result],
    budget: int = BUDGET,
) -> list[list[Result]]: ...
def run_paths(
    stack: LayerStack,
    paths: Sequence[Sequence[Entry]],
    inputs: Mapping[str, Any] | Iterable[Mapping[str, Any]],
    *,
    read: Callable[[Any, Any], Result],
    budget: int = BUDGET,
) -> list[Result] | list[list[Result]]:
    """Run the model along every path, in eval mode without gradients, as `stack.following(path)` would.

    Args:
        stack: the stack.
        paths: as for `following`. Paths that are equal are run once.
        inputs: a collated batch or the model's own keyword arguments; or several of them.
        read: (output, inputs) -> what is kept of one path on one batch. The output is logits for a collated batch, as in
            `objectives.evaluate`, else what the model returns. It is called once for each distinct path.
        budget: most bytes of states held at once, besides the one that enters the stack. A state counts as large as the
            larger of those that enter and leave the first block.

    Returns:
        One result for each path, in the order of `paths`; for several batches, a list with one for each batch. Equal to
        running each path alone, up to the rounding of larger matrix products.

    Raises:
        RequestError: a path cannot run, or the budget does not hold the two states of a single path.
    """
    trie = _Trie(stack, paths, budget)
    single = isinstance(inputs, Mapping)
    batches: Iterable[Any] = [inputs] if single else inputs
    with trie.at_rest():
        runs = [trie.run(batch, lambda calls, state: read(calls.finish(state), calls.inputs)) for batch in batches]
    return runs[0] if single else [[run[n] for run in runs] for n in range(len(paths))]


def path_losses(
    stack: LayerStack, paths: Sequence[Sequence[Entry]], examples: Examples, batch_size: int, *, budget: int = BUDGET
) -> list[float]:
    """The mean loss of the model along every path; without a head, how far its states turn from those of the whole model.

    Args:
        stack: a stack of a language or image model.
        paths: as for `run_paths`.
        examples: what the loss is measured on.
        batch_size: examples in one forward; does not change the values beyond rounding.
        budget: as for `run_paths`.

    Returns:
        Cross-entropy per answer token (or image) in nats, one for each path. Of a model without a head, which has no such
        loss: the mean over tokens of 1 - cos between its last hidden states along the path and along all blocks.

    Raises:
        RequestError: as for `run_paths`.
    """
    trie = _Trie(stack, paths, budget)
    loss = _Turned(stack.model) if headless(stack.model) else _AnswerLoss(stack.model)
    sums, count = [0.0] * len(paths), 0
    steps = -(-len(examples) // batch_size)
    with trie.at_rest():
        for batch in session.progress(examples.batches(batch_size), "loss along paths", steps):
            sums = [total + value for total, value in zip(sums, trie.run(batch, loss), strict=True)]
            count += loss.count(batch)
    return [total / max(1, count) for total in sums]


def path_answers(
    stack: LayerStack,
    paths: Sequence[Sequence[Entry]],
    examples: Examples,
    batch_size: int,
    read: Callable[[Tensor, Mapping[str, Any]], Result],
    *,
    budget: int = BUDGET,
) -> list[list[Result]]:
    """What is read of the logits that predict answers, along every path.

    Args:
        stack: a stack of a language or image model.
        paths: as for `run_paths`.
        examples: what is answered.
        batch_size: examples in one forward.
        read: (logits [n, v] at the positions whose next label counts, row by row; the batch) -> what is kept. Logits of
            images are [b, classes].
        budget: as for `run_paths`.

    Returns:
        For each path one result a batch.

    Raises:
        RequestError: as for `run_paths`.
    """
    trie, answers = _Trie(stack, paths, budget), Answers(stack.model)
    steps = -(-len(examples) // batch_size)
    with trie.at_rest():
        runs = [
            trie.run(batch, lambda calls, state: read(answers(calls, state), calls.inputs))
            for batch in session.progress(examples.batches(batch_size), "answers along paths", steps)
        ]
    return [[run[n] for run in runs] for n in range(len(paths))]


class _Trie:
    """Some paths over one stack, to be run on one set of inputs after the other."""

    def __init__(self, stack: LayerStack, paths: Sequence[Sequence[Entry]], budget: int) -> None:
        for path in paths:
            stack.check(path)
        self.stack = stack
        self.budget = budget
        self.modules: list[nn.Module] = []
        self.paths = [tuple(map(self._stop, path)) for path in paths]
        self.order = sorted(set(self.paths))
        self.blocks = BatchedBlocks()

    @contextmanager
    def at_rest(self) -> Iterator[None]:
        with ExitStack() as modes:
            for module in (self.stack.model, *self.modules):
                modes.enter_context(at_rest(module))
            yield

    @torch.no_grad()
    def run(self, inputs: Mapping[str, Any], finish: Callable[[Calls, State], Result]) -> list[Result]:
        """`finish(calls, state)` of every path, where `state` is what leaves the stack."""
        if not self.paths:
            return []
        device = next(self.stack.model.parameters()).device
        moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
        calls = Calls.record(self.stack, moved)
        size = max(state_bytes(calls.entering), state_bytes(calls.after_first))
        if self.budget < 2 * size:
            raise RequestError(
                f"A path needs two states at once, what enters a block and what leaves it: {2 * size:,} bytes on these "
                f"inputs. The budget is {self.budget:,}. Give a larger one, or smaller batches."
            )
        capacity = self.budget // size
        # a batch is compared with single runs, of which one more state is held
        copies = max(1, capacity // _SHARED_OUT - 1)
        together = at_once(size, device, copies)
        walk = _Walk(self, calls, together, finish)
        known: dict[Prefix, Result] = {}
        for chunk in _chunks(self.order, capacity - capacity // _SHARED_OUT):
            walk.along(chunk, known)
        return [known[path] for path in self.paths]

    def module(self, stop: Stop) -> nn.Module | None:
        """What runs in the stead of the stack's own block."""
        return self.modules[stop[1] - 1] if stop[1] else None

    def _stop(self, entry: Entry) -> Stop:
        place, module = (entry, None) if isinstance(entry, int) else entry
        if module is None or module is self.stack.blocks[place]:
            return place, 0
        number = next((n for n, known in enumerate(self.modules, 1) if known is module), None)
        if number is None:
            self.modules.append(module)
            number = len(self.modules)
        return place, number


def _chunks(paths: Sequence[Prefix], capacity: int) -> Iterator[list[Prefix]]:
    """Parts of the sorted paths whose two fullest neighbouring levels stay within `capacity` states."""
    chunk: list[Prefix] = []
    width: Counter[int] = Counter()
    for path in paths:
        shared = _shared(chunk[-1], path) if chunk else 0
        wider = width + Counter(range(shared + 1, len(path) + 1))
        if chunk and max(wider[depth] + wider[depth + 1] for depth in wider) > capacity:
            yield chunk
            chunk, wider = [], Counter(range(1, len(path) + 1))
        chunk.append(path)
        width = wider
    if chunk:
        yield chunk


def _shared(one: Prefix, other: Prefix) -> int:
    """How many stops two paths have in common at their beginning."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


class _Walk(Generic[Result]):
    """The walk over a trie on one set of inputs."""

    def __init__(self, trie: _Trie, calls: Calls, together: int, finish: Callable[[Calls, State], Result]) -> None:
        self.trie, self.calls, self.together, self.finish = trie, calls, together, finish
        self.fixed = set(range(len(trie.stack))) - set(trie.stack.droppable)

    def along(self, paths: list[Prefix], known: dict[Prefix, Result]) -> None:
        """Level by level; the results go to `known`."""
        states: dict[Prefix, State] = {(): self.calls.entering}
        depth = 0
        while paths:
            states = self._level(states, depth, paths)
            depth += 1
            known |= {path: self._end(path, states[path]) for path in paths if len(path) == depth}
            paths = [path for path in paths if len(path) > depth]

    def _end(self, path: Prefix, state: State) -> Result:
        """The result of a path; what replaces a fixed block is put in its place, since the model may read it there."""
        stack = self.trie.stack
        put = {place: self.trie.modules[number - 1] for place, number in path if number and place in self.fixed}
        if not put:
            return self.finish(self.calls, state)
        with stack.following([(place, put[place]) if place in put else place for place in range(len(stack))]):
            return self.finish(self.calls, state)

    def _level(self, states: dict[Prefix, State], depth: int, paths: list[Prefix]) -> dict[Prefix, State]:
        """The states one block further, by their prefixes."""
        running: dict[Stop, list[Prefix]] = defaultdict(list)
        for prefix in dict.fromkeys(path[: depth + 1] for path in paths):
            running[prefix[-1]].append(prefix)
        after: dict[Prefix, State] = {}
        for stop, prefixes in running.items():
            if depth == 0 and stop == (0, 0):  # ran when the calls were recorded
                after[prefixes[0]] = self.calls.after_first
                continue
            count = -(-len(prefixes) // self.together)
            for part in range(count):
                some = prefixes[part::count]
                entering = [states[prefix[:-1]] for prefix in some]
                left = self.trie.blocks.run(self.calls, stop[0], self.trie.module(stop), entering)
                after |= zip(some, left, strict=True)
        return after


class _Turned:
    """How far last hidden states turn from those of the whole model, summed over the tokens of a batch."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.whole: tuple[Calls, Tensor] | None = None

    def __call__(self, calls: Calls, state: State) -> float:
        if self.whole is None or self.whole[0] is not calls:
            self.whole = calls, forward(self.model, calls.inputs, states=True)
        pair = (calls.finish(state).float(), self.whole[1].float())
        return float((1 - F.cosine_similarity(*pair, dim=-1))[_counting(pair[0], calls.inputs)].sum())

    def count(self, batch: Mapping[str, Any]) -> int:
        """Tokens of a batch, or the positions of its images."""
        if self.whole is None:
            return 0
        return int(_counting(self.whole[1], batch).sum())


def _counting(states: Tensor, inputs: Mapping[str, Any]) -> Tensor:
    """Which positions are no padding, [b, t]."""
    mask = inputs.get("attention_mask")
    return states.new_ones(states.shape[:2], dtype=torch.bool) if mask is None else mask.to(states.device).bool()


class Answers:
    """Logits from a state that leaves the stack, [n, v]: the head sees only positions whose next label counts."""

    def __init__(self, model: nn.Module) -> None:
        self.head = output_head(model)
        self.tried = False

    def __call__(self, calls: Calls, state: State) -> Tensor:
        """The logits of one state, or of the several that the rows of `calls.inputs` stand for."""
        labels = calls.inputs["labels"]
        if labels.ndim == 1:
            return calls.finish(state)
        keep = labels[:, 1:] != IGNORED
        if self.head is None:
            return calls.finish(state)[:, :-1][keep]
        return self._scored(self.head, calls, state, keep) if self.tried else self._first(self.head, calls, state, keep)

    def _first(self, head: nn.Module, calls: Calls, state: State, keep: Tensor) -> Tensor:
        """The logits of the whole head; and a try whether it can be spared, on the first batch that carries loss."""
        whole = calls.finish(state)[:, :-1][keep]
        try:
            alike = same(self._scored(head, calls, state, keep), whole)
        except (RuntimeError, ValueError, IndexError):  # the model does more with logits than one position at a time
            alike = False
        self.tried = bool(keep.any())
        self.head = head if alike else None
        return whole

    @staticmethod
    def _scored(head: nn.Module, calls: Calls, state: State, keep: Tensor) -> Tensor:
        """Logits [n, v] at the positions in `keep` [b, t - 1]: the head, and what follows it, see only these."""
        with head_only_at(head, keep):
            return calls.finish(state)[0]


class _AnswerLoss:
    """The loss of a batch from a state that leaves the stack."""

    count = staticmethod(units)

    def __init__(self, model: nn.Module) -> None:
        self.answers = Answers(model)

    def __call__(self, calls: Calls, state: State) -> float:
        labels = calls.inputs["labels"]
        if labels.ndim == 1 or self.answers.head is None:
            return cross_entropy_sum(calls.finish(state), dict(calls.inputs)).item()
        counted = labels[:, 1:][labels[:, 1:] != IGNORED]
        return F.cross_entropy(self.answers(calls, state).float(), counted, reduction="sum").item()
