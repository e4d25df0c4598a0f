"""LayerStack: a network seen as an ordered list of blocks that write into one residual stream.

Blocks are found by structure (`discovery`), never by a table of model names. A stack can run along any *path* over its
blocks: left out, repeated, in another order, replaced. Masks, rotary tables, cache slots and per-block entries of the
config follow the block and not its position (`arrangement`).

    with stack.following([0, 1, 1, 3]):   # block 1 twice, block 2 not at all
        model.generate(...)
    stack.drop([2])                       # for good: a plain, shorter model of its class
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from overhaul import session
from overhaul.errors import RequestError, did_you_mean
from overhaul.stack import discovery
from overhaul.stack.arrangement import Entry, arrange, describe, faults, retie
from overhaul.stack.paths import Following

_AFTER = re.compile(r"(^|[._])(final|out|head)([._]|$)")


class _Enough(Exception):
    """What was to be found out is known."""


@dataclass(frozen=True)
class LayerStack:
    """One stack of a model. Create it with `find`, `of` or `at`; it always shows the model as it is now.

    Attributes:
        model: the whole network.
        path: where the stack lies ("model.layers", "transformer.h", "resnet.encoder.stages").
        lists: the paths of the lists that hold the blocks: the stack itself, or one list for each stage.
    """

    model: nn.Module
    path: str
    lists: tuple[str, ...]

    @classmethod
    def find(cls, model: nn.Module) -> list[LayerStack]:
        """Every stack of the model, in the order in which the model defines them."""
        return [cls(model, path, lists) for path, lists in discovery.stacks(model).items()]

    @classmethod
    def of(cls, model: nn.Module) -> LayerStack:
        """The main stack of the model: the only one, or the only one whose depth a config declares.

        Of a model that says text and sees or hears besides (Gemma 3, Qwen-VL, Llava), it is that of its language model. What
        a recipe names by `stack: PATH` (`session.Session.stack`) goes before all that, where a model has it.

        Raises:
            RequestError: there is no stack, or several that count as the main one; the message lists what was found.
        """
        named = session.current().stack
        if named is not None and named in discovery.lists(model):
            return cls.at(model, named)
        found = cls.find(model)
        both = getattr(getattr(model, "config", None), "is_encoder_decoder", False)  # one config counts either of them
        main = [stack for stack in found if stack.declared] if len(found) > 1 and not both else found
        if len(main) > 1:
            language = discovery.of_language(model, [stack.path for stack in main])
            main = [stack for stack in main if stack.path in language] or main
        if len(main) == 1:
            return main[0]
        if not found:
            raise RequestError(
                f"{type(model).__name__} has no list of repeated blocks that could be told by its structure. What it has: "
                f'{discovery.contents(model)}. If one of these is the stack, name it: LayerStack.at(model, "PATH").'
            )
        listed = ", ".join(f"{stack.path} ({stack._kinds()})" for stack in found)
        raise RequestError(
            f"{type(model).__name__} has {len(found)} stacks of blocks and no single main one: {listed}. "
            f'Take the one you mean: LayerStack.at(model, "{found[0].path}"), or in a recipe `stack: {found[0].path}`.'
        )

    @classmethod
    def at(cls, model: nn.Module, path: str) -> LayerStack:
        """The stack at `path`, named by hand: any `ModuleList` or `Sequential` whose elements run one after the other.

        Raises:
            RequestError: nothing lies there, or no such list.
        """
        lists = discovery.lists(model)
        if path not in lists:
            raise RequestError(f"{type(model).__name__} has no list of modules at {path!r}.{did_you_mean(path, lists)}")
        return cls(model, path, discovery.lists_of(model, path))

    def __repr__(self) -> str:
        return f"LayerStack of {type(self.model).__name__} at {self.path}: {self._kinds()}"

    def __len__(self) -> int:
        return len(self.blocks)

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks, in the order in which they run."""
        return [block for blocks in self.holders for block in blocks]

    @property
    def holders(self) -> list[discovery.Blocks]:
        """The lists themselves."""
        return [self.model.get_submodule(path) for path in self.lists]  # pyright: ignore[reportReturnType]

    @property
    def config(self) -> Any:
        """The config of the nearest module around the stack, or None: a mapping in diffusers, an object elsewhere."""
        return discovery.config_around(self.model, self.path)

    @property
    def declared(self) -> bool:
        """Whether that config counts these blocks."""
        return self.lists != (self.path,) or getattr(self.config, "num_hidden_layers", None) == len(self)

    @property
    def droppable(self) -> list[int]:
        """The blocks that `drop` may take: those that nothing outside of them depends on."""
        fixed = self._pinned()
        return [i for i in range(len(self)) if i not in fixed]

    @property
    def kinds(self) -> int:
        """How many kinds of blocks there are, by the names of their parameters."""
        return len({tuple(name for name, _ in discovery.uncompiled(b).named_parameters()) for b in self.blocks})

    @property
    def with_attention(self) -> list[int]:
        """The blocks that have attention in a hybrid whose others have none; empty in any other stack.

        `take` keeps one of them: what such a model knows of positions in its cache and of masks, it knows by them.
        """
        return discovery.with_attention(self.config, len(self))

    def stage(self, place: int) -> int:
        """The list that holds the block at `place`: its stage in a ResNet, 0 in a plain stack."""
        ends = [sum(map(len, self.holders[: n + 1])) for n in range(len(self.lists))]
        return next(n for n, end in enumerate(ends) if place < end)

    def depth(self, name: str) -> int:
        """The block that a parameter, buffer or module belongs to: -1 before the first, `len(stack)` after the last.

        What lies between two stages counts to the block that follows it.
        """
        before = 0
        for path, blocks in zip(self.lists, self.holders, strict=True):
            if name.startswith(f"{path}."):
                return before + int(name[len(path) + 1 :].partition(".")[0])
            before += len(blocks)
        # some models define before the blocks what runs after them (OPT's final norm)
        if not name.startswith(f"{self.path}.") and _AFTER.search(name):
            return len(self)
        order = {path: n for n, (path, _) in enumerate(self.model.named_modules())}
        while name and name not in order:
            name = name.rpartition(".")[0]
        passed = [len(b) for p, b in zip(self.lists, self.holders, strict=True) if order[p] < order[name]]
        return sum(passed) or -1

    def drop(self, indices: Collection[int], tried: Callable[[], None] | None = None) -> None:
        """Take blocks out, in place: the model is then a plain, shorter model of its class. See `take`."""
        self.take(self._without(indices), tried)

    def can_drop(self, indices: Collection[int]) -> bool:
        """Whether `drop` would take these blocks out; nothing is changed."""

        def enough() -> None:
            raise _Enough

        try:
            self.drop(indices, enough)
        except _Enough:
            return True
        except RequestError:
            return False
        return True

    def take(self, path: Sequence[int], tried: Callable[[], None] | None = None) -> None:
        """Keep only the blocks along `path`, in that order, for good: a plain model of its class that loads anywhere.

        Args:
            path: places of blocks, each at most once, counted in the model as it is now.
            tried: called when the model has these blocks; what it raises takes them back.

        Raises:
            RequestError: a block does not exist, is fixed to its place or visited twice, no block would stay, no block of
                a hybrid would have attention, or the class cannot be built from its config with these blocks. The model is
                then as it was.
        """
        self.check(path)
        if list(path) == list(range(len(self))):
            return
        if len(set(path)) < len(path):
            raise RequestError(
                f"The path {list(path)} visits a block twice, and a plain checkpoint would hold its weights twice. Save the "
                "model as it is and the path beside it: overhaul.save(..., path=...)."
            )
        if self.with_attention and not set(path) & set(self.with_attention):
            raise RequestError(
                f"Of {self.path}, only the blocks {self.with_attention} have attention, and {type(self.model).__name__} "
                "needs one of them to tell positions in its cache. Keep one."
            )
        self.become(path, tried)

    def become(self, path: Sequence[Entry], tried: Callable[[], None] | None = None) -> None:
        """As `take`, where blocks may stand twice and come from other models: for what is then stored tensor by tensor.

        Args:
            path: as in `following`; has been checked.
            tried: as in `take`.

        Raises:
            RequestError: the class cannot be built from its config with these blocks. The model is then as it was.
        """
        places = [entry if isinstance(entry, int) else entry[0] for entry in path]
        known = faults(self, range(len(self)))
        count = len(self)
        undo = arrange(self, path)
        if not describe(self, places, count, undo):
            undo.close()
            raise RequestError(
                f"No entry in the config of {type(self.model).__name__} says how many blocks {self.path} has "
                f"({self._kinds()}), so a model with other blocks could not be saved. Its depth cannot be changed for good; "
                "`following` runs it along another path."
            )
        new = [fault for fault in faults(self, places) if fault not in known]
        if new:
            undo.close()
            raise RequestError(
                f"With the blocks {places} in {self.path}, the config would not describe this "
                f"{type(self.model).__name__}, so it would not load again: {new[0]} differs. Choose other blocks: where "
                "kinds of blocks take turns by a rule of the config, whole turns can go."
            )
        try:
            retie(self, undo)
            if tried is not None:
                tried()
        except BaseException:
            undo.close()
            raise

    def following(self, path: Sequence[Entry]) -> Following:
        """Run along `path` from now on, or inside a `with`; closed, everything is as it was. `overhaul.save` saves the path.

        Args:
            path: stops in order: a block by its place, again if it is to run again, or (place, module): a module that
                stands for that block and is called like it. Shells of a repeated block share its tensors; a repeated
                block takes a cache slot for each visit.

        Raises:
            RequestError: a stop does not exist, or a block is fixed to its place.
        """
        self.check(path)
        return Following(self, path)

    def skipping(self, indices: Collection[int]) -> Following:
        """`with stack.skipping(indices):` the model runs as if these blocks had been dropped."""
        return self.following(self._without(indices))

    def check(self, path: Sequence[Entry]) -> None:
        """Refuse a path that cannot run.

        Raises:
            RequestError: with the stop and the reason.
        """
        places = [entry if isinstance(entry, int) else entry[0] for entry in path]
        for place in places:
            if place not in range(len(self)):
                raise RequestError(f"{self.path} has the blocks 0 to {len(self) - 1}; there is no block {place}.")
        if not places:
            raise RequestError(f"{self.path} has {len(self)} blocks; at least one must stay.")
        stages = [self.stage(place) for place in places]
        if stages != sorted(stages):
            raise RequestError(
                f"The path {places} leaves a stage of {self.path} and comes back; stages keep their order."
            )
        for place, reason in self._pinned().items():
            part = [other for other, stage in zip(places, stages, strict=True) if stage == self.stage(place)]
            where = "first" if not place or self.stage(place - 1) != self.stage(place) else "last"
            if part.count(place) != 1 or part[0 if where == "first" else -1] != place:
                raise RequestError(
                    f"Block {place} of {self.path} must stay {where} and run once: {reason}. These can be dropped, "
                    f"repeated or moved: {self.droppable}."
                )

    def _kinds(self) -> str:
        return (
            f"{len(self)} x {' / '.join(sorted({type(discovery.uncompiled(block)).__name__ for block in self.blocks}))}"
        )

    def _pinned(self) -> dict[int, str]:
        """The blocks that are fixed to their place, with the reason."""
        if self.lists == (self.path,):
            return discovery.pinned(self.model, self.path, self.blocks)
        opening = {sum(map(len, self.holders[:n])) for n in range(len(self.lists))}
        return dict.fromkeys(opening, "it opens a stage and changes the size or the channels of what passes through it")

    def _without(self, indices: Collection[int]) -> list[int]:
        """The places that stay when `indices` go."""
        for index in indices:
            if index not in range(len(self)):
                raise RequestError(f"{self.path} has the blocks 0 to {len(self) - 1}; there is no block {index}.")
        return [i for i in range(len(self)) if i not in indices]
