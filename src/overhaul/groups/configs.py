"""Which entries of a config give a class the sizes that its tensors have after a cut: found by trying.

1. Entries are scaled as the units were (48 -> 40 neurons; 4 -> 2 heads, 2 -> 1 keys), one after the other, for as long as
   more tensors get the shape that they have. A size that the class works out from others (of a head) is written out.
2. Shapes alone do not tell half as many heads from heads of half the size: what is found is tried by whoever asks.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from fractions import Fraction
from typing import Any

from overhaul.stack.arrangement import saved_configs, skeleton

_SIZE = re.compile(r"dim|inner|size|width|ffn")
_BUILDS = 300
"""How many configs are tried at most."""

Change = tuple[Callable[[], Any], Callable[[Any], None], str, Any]
"""How a config is read and written, the name of an entry, and what it may be."""
Shapes = Mapping[str, tuple[int, ...]]


class Search:
    """Configs that give a class the shapes that its tensors have.

    Attributes:
        nearest: the tensors that had another shape under the best config so far, each with the shape there.
    """

    def __init__(self, model: Any, wanted: Shapes, ratios: Collection[Fraction]) -> None:
        self.model, self.wanted, self.ratios = model, wanted, ratios
        self.left = _BUILDS
        self.nearest: dict[str, tuple[int, ...] | None] = {}

    def found(self) -> Iterator[None]:
        """Each time the model's config is such a one; as it was when all have been tried."""
        before = self._built()
        yield from self._scaling(self._wrong())
        for change in self._written_out():
            with _Changed(change):
                if self._built() == before:
                    yield from self._scaling(self._wrong())

    def _scaling(self, wrong: int) -> Iterator[None]:
        """From here on, entries are scaled for as long as fewer tensors are wrong."""
        if not wrong:
            yield
            return
        better: list[tuple[int, int, Change]] = []
        for n, change in enumerate(self._changes()):
            with _Changed(change):
                count = self._wrong()
            if count < wrong:
                better.append((count, n, change))
        for count, _, change in sorted(better, key=lambda one: one[:2]):
            with _Changed(change):
                yield from self._scaling(count)

    def _built(self) -> dict[str, tuple[int, ...]] | None:
        """The shapes that the class builds; None where it builds none, or enough has been tried."""
        self.left -= 1
        if self.left < 0:
            return None
        try:
            return {name: tuple(tensor.shape) for name, tensor in skeleton(self.model).state_dict().items()}
        except Exception:  # a class may refuse sizes, or fail on them, as it likes
            return None

    def _wrong(self) -> int:
        """How many tensors the class would build in another shape; more than all where it builds none."""
        built = self._built()
        if built is None:
            return len(self.wanted) + 1
        wrong = {name: built.get(name) for name, shape in self.wanted.items() if built.get(name) != shape}
        if not self.nearest or len(wrong) < len(self.nearest):
            self.nearest = wrong
        return len(wrong)

    def _changes(self) -> Iterator[Change]:
        for read, write in saved_configs(self.model):
            for name, value in dict(read()).items():
                if not name.startswith("_"):
                    yield from ((read, write, name, new) for new in self._scaled(value))
                if value is None and _SIZE.search(name):
                    sizes = {size for n in self.nearest for size in self.wanted[n]}
                    yield from ((read, write, name, size) for size in sorted(sizes))

    def _written_out(self) -> Iterator[Change]:
        """The size of a head, where the class works it out from a width and a number of heads."""
        for read, write in saved_configs(self.model):
            config = dict(read())
            heads = {value for n, value in config.items() if "head" in n and type(value) is int and value > 1}
            widths = {value for n, value in config.items() if "head" not in n and type(value) is int}
            if config.get("head_dim") is None:
                sizes = {width // count for width in widths for count in heads if width % count == 0 and width > count}
                yield from ((read, write, "head_dim", size) for size in sorted(sizes))

    def _scaled(self, value: Any) -> Iterator[Any]:
        """What an entry may become: a number, or each number of a list."""
        if type(value) is int and value > 0:
            yield from (int(value * ratio) for ratio in self.ratios if (value * ratio).denominator == 1)
        elif isinstance(value, list):
            for place, one in enumerate(value):
                for new in self._scaled(one) if type(one) is int else ():
                    yield [*value[:place], new, *value[place + 1 :]]


class _Changed:
    """Inside it, an entry of a config is another one."""

    def __init__(self, change: Change) -> None:
        self.read, self.write, self.name, self.new = change

    def __enter__(self) -> None:
        self.before = dict(self.read())
        with suppress(AttributeError):  # some configs work a size out and let none be written
            self.write({self.name: self.new})

    def __exit__(self, *_: object) -> None:
        held = self.read()  # all of it: a name may stand for another
        held.clear()
        held.update(self.before)
