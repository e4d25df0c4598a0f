"""A model of other blocks than it has, of its own or of others, as its class would be built: config and network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from overhaul.errors import RequestError
from overhaul.models import Checkpoint, planned
from overhaul.stack import LayerStack
from overhaul.weights.index import TensorIndex, sizes_that_differ

Place = tuple[int, int]
"""(number of the model, its block)."""


def stack_without_weights(method: str, known: Checkpoint) -> LayerStack:
    """The blocks of a checkpoint, built without memory for weights; `method` is for messages.

    Raises:
        RequestError: its class is not known, or its blocks come in stages.
    """
    network = planned(known)
    if network is None:
        raise RequestError(
            f"{method}: {known.source} is of a class whose code is not run, so its blocks are not known."
        )
    found = LayerStack.of(network)
    if found.lists != (found.path,):
        raise RequestError(
            f"{method}: the blocks of {known.source} come in stages, which cannot be laid one on another."
        )
    return found


def path_in(index: TensorIndex, stack: LayerStack) -> str:
    """What the names of stored tensors call a stack: files may lack the prefix before a model's body."""
    return stack.path if stack.path in index.stacks or len(index.stacks) != 1 else next(iter(index.stacks))


def restacked(
    method: str, sources: Sequence[Checkpoint], stacks: Sequence[LayerStack], places: Sequence[Place]
) -> tuple[dict[str, Any], Any]:
    """The first model with other blocks.

    Args:
        method: for messages.
        sources: the models.
        stacks: their blocks without weights; the first one is changed.
        places: the new blocks, in order.

    Returns:
        Its config, and the network without weights.

    Raises:
        RequestError: the class would not build these blocks from any config of its own.
    """
    ours = stacks[0]
    before, count = _told(ours.model), len(ours)
    path = [block if not n else (min(block, count - 1), stacks[n].blocks[block]) for n, block in places]
    try:
        ours.check(path)
        ours.become(path)
    except RequestError as error:
        used = [sources[n] for n in sorted({n for n, _ in places} - {0})]
        said = [one for other in used for one in sizes_that_differ(sources[0], other)]
        raise RequestError(f"{method}: {'; '.join(said)}. {error}" if said else str(error)) from None
    return _changed(sources[0].config, before, _told(ours.model)), ours.model


def _told(model: Any) -> dict[str, Any]:
    """A network's config as it would be written."""
    return dict(model.config) if isinstance(model.config, dict) else model.config.to_dict()


def _changed(config: Mapping[str, Any], before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with what is different after."""
    made = dict(config)
    for key, value in after.items():
        if value != before.get(key):
            inner = isinstance(value, dict) and isinstance(made.get(key), dict) and isinstance(before.get(key), dict)
            made[key] = _changed(made[key], before[key], value) if inner else value
    return made
