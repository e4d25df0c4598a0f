"""LayerStack: a network seen as an ordered list of blocks that write into one residual stream.

Blocks are found by structure, never by a table of model names:

1. A stack is the outermost `ModuleList` (or `Sequential`) whose elements are blocks: modules with children, all of one
   class or all of the kind that transformers checkpoints one by one.
2. Where the config declares `depths`, the elements are stages and their inner lists hold the blocks. Structure alone
   cannot tell a stage of blocks from a block of convolutions.

An edit keeps together what belongs together: the list, every `layer_idx` (the slot of the block in the key-value
cache), the config's number of blocks and its per-block lists, which follow the block and not its position.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from overhaul.errors import RequestError
from overhaul.objectives import evaluate

Blocks = nn.ModuleList | nn.Sequential

_PER_BLOCK = re.compile(r"layer|block|_types$")
_OF_PREDICTION_HEADS = "mtp_"
_AFTER = re.compile(r"(^|[._])(final|out|head)([._]|$)")
_ONLY_IN_TRAINING = re.compile(r"drop|^p$|^training$")


@dataclass(frozen=True)
class LayerStack:
    """One stack of a model. Create it with `find` or `of`; it always shows the model as it is now.

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
        found: list[LayerStack] = []
        for path, module in model.named_modules():
            inside = any(path.startswith(f"{stack.path}.") for stack in found)
            if not path or inside or not _holds_blocks(module):
                continue
            found.append(cls(model, path, _stages(model, path, module) or (path,)))
        return found

    @classmethod
    def of(cls, model: nn.Module) -> LayerStack:
        """The only stack of the model, or the only one whose depth a config declares.

        Raises:
            RequestError: there is no stack, or several that count as the main one; the message lists what was found.
        """
        found = cls.find(model)
        main = [stack for stack in found if stack._declared()] if len(found) > 1 else found
        if len(main) == 1:
            return main[0]
        if not found:
            raise RequestError(
                f"{type(model).__name__} has no list of repeated blocks that could be told by its structure. "
                f"What it has: {_contents(model)}."
            )
        listed = ", ".join(f"{stack.path} ({stack._kinds()})" for stack in found)
        raise RequestError(
            f"{type(model).__name__} has {len(found)} stacks of blocks and no single main one: {listed}. "
            "Take the one you mean from LayerStack.find(model)."
        )

    def __len__(self) -> int:
        return len(self.blocks)

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks, in the order in which they run."""
        return [block for blocks in self._lists() for block in blocks]

    @property
    def droppable(self) -> list[int]:
        """The blocks that `drop` may take: all, except those that open a stage (they change size and channels)."""
        if self.lists == (self.path,):
            return list(range(len(self)))
        opening = {sum(len(blocks) for blocks in self._lists()[:n]) for n in range(len(self.lists))}
        return [i for i in range(len(self)) if i not in opening]

    def depth(self, name: str) -> int:
        """The block that a parameter, buffer or module belongs to: -1 before the first, `len(stack)` after the last.

        What lies between two stages counts to the block that follows it.
        """
        before = 0
        for path, blocks in zip(self.lists, self._lists(), strict=True):
            if name.startswith(f"{path}."):
                return before + int(name[len(path) + 1 :].partition(".")[0])
            before += len(blocks)
        # some models define before the blocks what runs after them (OPT's final norm)
        if not name.startswith(f"{self.path}.") and _AFTER.search(name):
            return len(self)
        order = {path: n for n, (path, _) in enumerate(self.model.named_modules())}
        while name and name not in order:
            name = name.rpartition(".")[0]
        passed = [len(b) for p, b in zip(self.lists, self._lists(), strict=True) if order[p] < order[name]]
        return sum(passed) or -1

    def drop(self, indices: Collection[int]) -> None:
        """Take blocks out, in place: the model is then a plain, shorter model of its class.

        Args:
            indices: places of the blocks to drop, counted in the model as it is now.

        Raises:
            RequestError: a block does not exist or cannot be dropped, no block would stay, or the class cannot be
                built from its config with these blocks missing. The model is then as it was.
        """
        kept = self._without(indices)
        if len(kept) == len(self):
            return
        faults = self._faults(range(len(self)))
        undo = self._arrange(kept)
        new = [fault for fault in self._faults(kept) if fault not in faults]
        if new:
            undo()
            raise RequestError(
                f"Dropping {sorted(indices)} from {self.path} would leave a {type(self.model).__name__} that cannot be "
                f"described by its config, so it would not load again: {new[0]} differs. Choose other blocks."
            )

    @contextmanager
    def skipping(self, indices: Collection[int]) -> Iterator[LayerStack]:
        """Inside the `with`, the model runs as if these blocks had been dropped; then it is exactly what it was."""
        undo = self._arrange(self._without(indices))
        try:
            yield self
        finally:
            undo()

    def hidden_states(self, batch: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
        """What enters and what leaves every block in one forward pass, without gradients, in eval mode.

        The capture is by hooks of its own: the library's `output_hidden_states` loses count when a stack is edited.

        Args:
            batch: a collated batch, as for `objectives.forward`.

        Returns:
            One (entering, leaving) for each block, each [b, t, d] or [b, c, h, w].
        """
        seen: list[tuple[Tensor, Tensor]] = []

        def record(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
            entering = args[0] if args else kwargs["hidden_states"]
            seen.append((entering, output[0] if isinstance(output, tuple) else output))

        hooks = [block.register_forward_hook(record, with_kwargs=True) for block in self.blocks]
        try:
            evaluate(self.model, lambda logits, _: logits, [dict(batch)])
        finally:
            for hook in hooks:
                hook.remove()
        return seen

    def _lists(self) -> list[Blocks]:
        return [self.model.get_submodule(path) for path in self.lists]  # pyright: ignore[reportReturnType]

    def _kinds(self) -> str:
        return f"{len(self)} x {' / '.join(sorted({type(block).__name__ for block in self.blocks}))}"

    def _config(self) -> Any:
        """The config of the nearest module around the stack that has one: the text config of a CLIP's text stack."""
        path = self.path
        while path:
            path = path.rpartition(".")[0]
            config = getattr(self.model.get_submodule(path), "config", None)
            if config is not None:
                return config
        return None

    def _declared(self) -> bool:
        """Whether the config counts these blocks."""
        config = self._config()
        if self.lists != (self.path,):
            return True
        return getattr(config, "num_hidden_layers", None) == len(self)

    def _without(self, indices: Collection[int]) -> list[int]:
        """The places that stay when `indices` go."""
        for index in indices:
            if index not in range(len(self)):
                raise RequestError(f"{self.path} has the blocks 0 to {len(self) - 1}; there is no block {index}.")
            if index not in self.droppable:
                raise RequestError(
                    f"Block {index} of {self.path} opens a stage and changes the size or the channels of what passes "
                    f"through it, so it cannot be dropped. These can: {self.droppable}."
                )
        kept = [i for i in range(len(self)) if i not in indices]
        if not kept:
            raise RequestError(f"{self.path} has {len(self)} blocks; at least one must stay.")
        return kept

    def _arrange(self, order: Sequence[int]) -> _Undo:
        """Let the stack consist of the blocks at `order`, with everything that depends on their places."""
        undo = _Undo()
        if list(order) == list(range(len(self))):  # nothing to do, even where the config could not follow
            return undo
        self._arrange_config(order, undo)
        before = 0
        for blocks in self._lists():
            old = list(blocks)
            undo.lists.append((blocks, old))
            _fill(blocks, [old[i - before] for i in order if 0 <= i - before < len(old)])
            before += len(old)
        for place, block in enumerate(self.blocks):
            for module in block.modules():
                if isinstance(getattr(module, "layer_idx", None), int):
                    undo.attributes.append((module, "layer_idx", module.layer_idx))
                    module.layer_idx = place  # pyright: ignore[reportArgumentType]
        return undo

    def _arrange_config(self, order: Sequence[int], undo: _Undo) -> None:
        config = self._config()
        if config is None:
            return
        if not self._declared() or not any(config is saved for saved in _saved_configs(self.model)):
            raise RequestError(
                f"The config of {type(self.model).__name__} does not say how many blocks {self.path} has "
                f"({self._kinds()}), so a model with other blocks could not be saved. Its depth cannot be changed."
            )
        if self.lists == (self.path,):
            changes = {"num_hidden_layers": len(order), **_per_block_values(config, order, len(self))}
        else:
            ends = [sum(len(blocks) for blocks in self._lists()[: n + 1]) for n in range(len(self.lists))]
            owner = [next(n for n, end in enumerate(ends) if i < end) for i in order]
            changes = {"depths": type(config.depths)(owner.count(n) for n in range(len(self.lists)))}
        for name, value in changes.items():
            undo.attributes.append((config, name, getattr(config, name)))
            setattr(config, name, value)

    def _faults(self, origin: Sequence[int]) -> list[str]:
        """Where the model differs from what its class builds from its config, so that loading it again would fail.

        Args:
            origin: for each block now in the stack, its old place, by which faults before and after an edit compare.
        """
        from transformers import PreTrainedModel

        if not isinstance(self.model, PreTrainedModel):
            return []
        planned = _skeleton(self.model)

        def outside(name: str) -> bool:
            return not name.startswith(tuple(f"{path}." for path in self.lists))

        faults = _differences(_shapes(self.model), _shapes(planned), "the rest of the model", outside)
        twins = LayerStack(planned, self.path, self.lists).blocks
        if len(twins) != len(self):
            faults.append(f"the number of blocks in {self.path}")
        for place, block, twin in zip(origin, self.blocks, twins, strict=False):
            faults += _differences(_shapes(block), _shapes(twin), f"block {place}")
            faults += _differences(_settings(block), _settings(twin), f"block {place}")
        return faults


class _Undo:
    """How to take an edit back: what the lists held, and what the attributes were."""

    def __init__(self) -> None:
        self.lists: list[tuple[Blocks, list[nn.Module]]] = []
        self.attributes: list[tuple[Any, str, Any]] = []

    def __call__(self) -> None:
        for blocks, old in self.lists:
            _fill(blocks, old)
        for holder, name, value in reversed(self.attributes):
            setattr(holder, name, value)


def _fill(blocks: Blocks, modules: Sequence[nn.Module]) -> None:
    """Replace what a list holds and keep the list itself, so that hooks and references to it stay good."""
    while len(blocks):
        del blocks[-1]
    blocks.extend(modules)


def _holds_blocks(module: nn.Module) -> bool:
    if not isinstance(module, nn.ModuleList | nn.Sequential) or not len(module):
        return False
    elements = list(module)
    if any(not list(e.children()) or next(e.parameters(), None) is None for e in elements):
        return False
    return len({type(element) for element in elements}) == 1 or all(map(_is_checkpointed, elements))


def _is_checkpointed(module: nn.Module) -> bool:
    from transformers.modeling_layers import GradientCheckpointingLayer

    return isinstance(module, GradientCheckpointingLayer)


def _stages(model: nn.Module, path: str, module: nn.Module) -> tuple[str, ...]:
    """The inner lists of a list of stages; empty where the elements are blocks."""
    depths = getattr(LayerStack(model, path, (path,))._config(), "depths", None)
    inner = [[(n, len(c)) for n, c in e.named_children() if _holds_blocks(c)] for e in module.children()]  # pyright: ignore[reportArgumentType]
    if depths is None or any(len(lists) != 1 for lists in inner) or [n[0][1] for n in inner] != list(depths):
        return ()
    return tuple(f"{path}.{i}.{lists[0][0]}" for i, lists in enumerate(inner))


def _contents(model: nn.Module) -> str:
    lists = [
        f"{path} ({len(m)} x {type(m[0]).__name__})"
        for path, m in model.named_modules()
        if isinstance(m, nn.ModuleList | nn.Sequential) and len(m)
    ]
    children = [f"{name} ({type(child).__name__})" for name, child in model.named_children()]
    return ", ".join(lists or children or ["no submodules"])


def _saved_configs(model: nn.Module) -> list[Any]:
    """The configs that `save_pretrained` writes: the model's own and its parts."""
    config: Any = getattr(model, "config", None)
    return [config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", ()))]


def _per_block_values(config: Any, order: Sequence[int], count: int) -> dict[str, Any]:
    """The config's per-block lists for the blocks at `order`, and lists of places renumbered."""
    changes: dict[str, Any] = {}
    for name, value in vars(config).items():
        if not isinstance(value, list | tuple) or not value or not _PER_BLOCK.search(name):
            continue
        if name.startswith(("_", _OF_PREDICTION_HEADS)):
            continue
        if _is_places(value, count):
            changes[name] = type(value)(place for place, old in enumerate(order) if old in value)
        elif len(value) == count:
            changes[name] = type(value)(value[i] for i in order)
    return changes


def _is_places(value: Sequence[Any], count: int) -> bool:
    """Whether a list names some of the blocks by their places ([1, 3]) rather than saying something of each ([0, 1, 1])."""
    numbers = all(type(entry) is int and 0 <= entry < count for entry in value)
    return numbers and list(value) == sorted(set(value)) and (len(value) < count or count > 2)


def _skeleton(model: nn.Module) -> nn.Module:
    """What the model's class builds from its config, without weights."""
    from transformers.initialization import no_init_weights

    kind: Any = type(model)
    with torch.device("meta"), no_init_weights():
        return kind(copy.deepcopy(model.config))


def _differences(
    ours: Mapping[str, Any], planned: Mapping[str, Any], label: str, covers: Callable[[str], bool] = lambda _: True
) -> list[str]:
    """The names whose values differ, as "label: name"."""
    names = sorted(ours.keys() | planned.keys())
    return [f"{label}: {name}" for name in names if covers(name) and ours.get(name) != planned.get(name)]


def _shapes(module: nn.Module) -> dict[str, Any]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def _settings(module: nn.Module) -> dict[str, Any]:
    """Plain values that modules hold and that may depend on their place: `layer_idx`, a sliding window, a scale."""
    return {
        f"{path}.{name}": value
        for path, part in module.named_modules()
        for name, value in vars(part).items()
        if isinstance(value, bool | int | float | str)
        and not name.startswith("_")
        and not _ONLY_IN_TRAINING.search(name)
    }
