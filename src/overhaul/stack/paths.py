"""Paths that a model follows: set aside while it is saved, written beside its weights, followed again when it is opened.

A path with a repeated or a moved block is nothing that a plain checkpoint can describe. The folder then holds the whole
model and `overhaul_path.json`: plain `from_pretrained` loads the model without the path, `overhaul.open` with it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from torch import nn

from overhaul.errors import RequestError
from overhaul.stack.arrangement import Entry, arrange, size_cache

if TYPE_CHECKING:
    from overhaul.stack import LayerStack

FILE = "overhaul_path.json"


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


def write_paths(folder: Path, paths: Mapping[str, Sequence[int]]) -> None:
    """Write the file into a folder that is not in use yet."""
    content = {"paths": {where: list(path) for where, path in paths.items()}}
    (folder / FILE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def follow_saved_paths(model: nn.Module, folder: Path) -> None:
    """Let a model that was just loaded from `folder` follow the paths that lie there, if any.

    Raises:
        RequestError: the file is damaged or does not fit the model.
    """
    from overhaul.stack import LayerStack

    place = folder / FILE
    if not place.exists():
        return
    try:
        paths: dict[str, Any] = json.loads(place.read_text(encoding="utf-8"))["paths"]
        for where, path in paths.items():
            if not all(type(entry) is int for entry in path):
                raise ValueError(f"the path of {where} is no list of places")
            LayerStack.at(model, where).following(path)
    except (ValueError, KeyError, AttributeError, TypeError, RequestError) as error:
        raise RequestError(
            f"{place} does not describe a path of this model: {error}. Without the file the model opens as a plain one."
        ) from None
