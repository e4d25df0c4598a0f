"""Find the stacks of a network by structure, never by a table of model names.

1. A stack is the outermost `ModuleList` (or `Sequential`) whose elements are blocks: modules with children, all of one
   class or all of the kind that transformers checkpoints one by one. Where a diffusers model names its repeated blocks,
   only lists of those count.
2. Where the config declares `depths`, the elements are stages and their inner lists hold the blocks. Structure alone
   cannot tell a stage of blocks from a block of convolutions.
3. A first block that holds more kinds of parameters than all others, a last one that holds fewer, and a block that the
   model's own code addresses by its number cannot be moved: something outside of it depends on its place.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Container, Iterator, Sequence
from typing import Any

from torch import nn

Blocks = nn.ModuleList | nn.Sequential

_ATTENTION = re.compile(r"(?<!linear_)attention")


def stacks(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Every stack by its path, with the paths of the lists that hold its blocks: itself, or one list for each stage."""
    found: dict[str, tuple[str, ...]] = {}
    named = getattr(model, "_repeated_blocks", None) or ()
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{stack}.") for stack in found)
        if path and not inside and holds_blocks(module, named):
            found[path] = lists_of(model, path)
    return found


def lists(model: nn.Module) -> list[str]:
    """The paths of all lists of modules."""
    return [name for name, module in model.named_modules() if isinstance(module, Blocks) and len(module)]


def lists_of(model: nn.Module, path: str) -> tuple[str, ...]:
    """The lists that hold the blocks of the stack at `path`."""
    return _stages(model, path) or (path,)


def holds_blocks(module: nn.Module, named: Container[str] = ()) -> bool:
    """Whether a module is a list of blocks; `named` are the only classes that count, if there are any."""
    if not isinstance(module, nn.ModuleList | nn.Sequential) or not len(module):
        return False
    elements = [uncompiled(element) for element in module]
    if named:
        return all(type(element).__name__ in named for element in elements)
    if any(not list(e.children()) or next(e.parameters(), None) is None for e in elements):
        return False
    return len({type(element) for element in elements}) == 1 or all(map(_is_checkpointed, elements))


def uncompiled(block: nn.Module) -> nn.Module:
    """A block as it was before `torch.compile`; another as it is."""
    return getattr(block, "_orig_mod", block)


def config_around(model: nn.Module, path: str) -> Any:
    """The config of the nearest module around `path` that has one: the text config of a CLIP's text stack."""
    while path:
        path = path.rpartition(".")[0]
        config = getattr(model.get_submodule(path), "config", None)
        if config is not None:
            return config
    return None


def with_attention(config: Any, count: int) -> list[int]:
    """The blocks that have attention, where the config says so of each and others have none (a hybrid); else none."""
    for name, value in () if config is None or isinstance(config, dict) else _lists(config):
        if len(value) == count and name.endswith(("_type", "_types")) and all(isinstance(kind, str) for kind in value):
            found = [n for n, kind in enumerate(value) if kind == "hybrid" or _ATTENTION.search(kind)]
            if 0 < len(found) < count:
                return found
    return []


def _lists(config: Any) -> Iterator[tuple[str, Any]]:
    """The lists of a config, those that it makes of others included."""
    for name in dict.fromkeys(("layer_types", "layers_block_type", *vars(config))):
        value = getattr(config, name, None)
        if isinstance(value, list | tuple) and value:
            yield name, value


def of_language(model: nn.Module, paths: Sequence[str]) -> list[str]:
    """Of a model that says text and looks at something else besides, the stacks that belong to its language model."""
    config: Any = getattr(model, "config", None)
    if config is None or isinstance(config, dict) or getattr(config, "is_encoder_decoder", False):
        return []
    speaks = getattr(model, "can_generate", lambda: False)() or hasattr(model, "language_model")
    text = config.get_text_config(decoder=True)
    if not speaks or text is config:
        return []
    return [path for path in paths if (around := config_around(model, path)) is text or around == text]


def contents(model: nn.Module) -> str:
    """What lists, else what children a network has, for an error message."""
    lists = [
        f"{path} ({len(m)} x {type(uncompiled(m[0])).__name__})"
        for path, m in model.named_modules()
        if isinstance(m, nn.ModuleList | nn.Sequential) and len(m)
    ]
    children = [f"{name} ({type(child).__name__})" for name, child in model.named_children()]
    return ", ".join(lists or children or ["no submodules"])


def pinned(model: nn.Module, path: str, blocks: Sequence[nn.Module]) -> dict[int, str]:
    """The blocks that must stay where they are, once, with the reason: the first, the last, or one known by its number."""
    kinds = [{name for name, _ in uncompiled(block).named_parameters()} for block in blocks]
    found: dict[int, str] = {}
    last = len(blocks) - 1
    if last > 0 and all(kinds[0] > kind for kind in kinds[1:]):
        found[0] = f"it alone holds {min(kinds[0] - kinds[1])}, which the blocks after it rely on"
    if last > 0 and all(kinds[last] < kind for kind in kinds[:-1]):
        found[last] = f"it lacks {min(kinds[0] - kinds[last])}, so nothing can follow it"
    owner, _, name = path.rpartition(".")
    for number in _addressed(model.get_submodule(owner), name):
        found.setdefault(range(len(blocks))[number], "the model's own code addresses it by its number")
    return found


def _addressed(owner: nn.Module, name: str) -> list[int]:
    """The numbers by which an owner's forward addresses single elements of one of its lists."""
    try:
        source = inspect.getsource(type(owner).forward)
    except (OSError, TypeError):  # a class made at run time has no source
        return []
    return [int(number) for number in re.findall(rf"\bself\.{re.escape(name)}\[(-?\d+)\]", source)]


def _is_checkpointed(module: nn.Module) -> bool:
    from transformers.modeling_layers import GradientCheckpointingLayer

    return isinstance(module, GradientCheckpointingLayer)


def _stages(model: nn.Module, path: str) -> tuple[str, ...]:
    """The inner lists of a list of stages; empty where the elements are blocks."""
    depths = getattr(config_around(model, path), "depths", None)
    elements = list(model.get_submodule(path).children())
    inner = [[(n, len(c)) for n, c in e.named_children() if holds_blocks(c)] for e in elements]  # pyright: ignore[reportArgumentType]
    if depths is None or any(len(lists) != 1 for lists in inner) or [n[0][1] for n in inner] != list(depths):
        return ()
    return tuple(f"{path}.{i}.{lists[0][0]}" for i, lists in enumerate(inner))
