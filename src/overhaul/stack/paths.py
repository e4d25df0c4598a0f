"""Paths that a model follows: set aside while it is saved, recorded in its config, followed again when it is opened.

A path with a repeated or a moved block is nothing that a plain checkpoint can describe. The folder then holds the whole
model, and its config the path as a conversion that is applied after loading.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from torch import nn

from overhaul.conversions.records import Record, conversion, known_as
from overhaul.errors import RequestError
from overhaul.stack.arrangement import Entry, arrange, size_cache

if TYPE_CHECKING:
    from overhaul.stack import LayerStack


class Following:
    """A path in force. `close` has everything as it was; as a context manager it does so at the end."""

    def __init__(self, stack: LayerStack, path: Sequence[Entry]) -> None:
        self.stack, self.path = stack, list(path)
        self.undo = self.arrange()
        _IN_FORCE.setdefault(stack.model, []).append(self)

    def arrange(self) -> ExitStack:
        """Put the path in force (again)."""
        undo = arrange(self.stack, self.path)
        size_cache(self.stack, len(self.path), undo)
        return undo

    def close(self) -> None:
        """Have everything as it was before."""
        self.undo.close()
        if self in _IN_FORCE.get(self.stack.model, []):
            _IN_FORCE[self.stack.model].remove(self)

    def __enter__(self) -> LayerStack:
        return self.stack

    def __exit__(self, *_: object) -> None:
        self.close()


_IN_FORCE: WeakKeyDictionary[nn.Module, list[Following]] = WeakKeyDictionary()
"""Beside the models and not in them: a deep copy of a model must not take back what was done to the original."""


@contextmanager
def set_aside(model: nn.Module) -> Iterator[dict[str, list[int]]]:
    """Inside the `with`, the model is as it would be without its paths, which are yielded by stack; then they are back.

    Raises:
        RequestError: a path leads through a module of another model, which cannot be saved.
    """
    followed = list(_IN_FORCE.get(model, []))
    paths: dict[str, list[int]] = {}
    for one in reversed(followed):
        one.undo.close()
    try:
        for one in followed:
            before = paths.get(one.stack.path, range(len(one.stack)))
            if any(not isinstance(entry, int) for entry in one.path):
                raise RequestError(
                    f"The path of {one.stack.path} leads through modules of another model, so it cannot be saved beside "
                    "this one. Save inside no such `following`, or copy the weights over."
                )
            paths[one.stack.path] = [before[place] for place in one.path if isinstance(place, int)]
        yield paths
    finally:
        for one in followed:
            one.undo = one.arrange()


def follows(model: nn.Module) -> bool:
    """Whether a path is in force."""
    return bool(_IN_FORCE.get(model))


@conversion(late=True)
def path(model: nn.Module, *, stack: str, blocks: list[int]) -> None:
    """Let a model that was just loaded follow a path.

    Args:
        model: a whole model.
        stack: where its blocks lie.
        blocks: places of blocks, in the order in which they run.

    Raises:
        RequestError: the model has no such path.
    """
    from overhaul.stack import LayerStack

    try:
        if not all(type(entry) is int for entry in blocks):
            raise RequestError("it is no list of places")
        LayerStack.at(model, stack).following(blocks)
    except (RequestError, TypeError) as error:
        raise RequestError(f"config.json records a path of {stack} that this model does not have: {error}") from None


def records_of(paths: Mapping[str, Sequence[int]]) -> list[Record]:
    """The paths of some stacks as the config holds them."""
    return [known_as("path").record(stack=stack, blocks=list(blocks)) for stack, blocks in paths.items()]
