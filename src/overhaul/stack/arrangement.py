"""Let a stack consist of other blocks, in another order, with everything that depends on their places.

What is kept together: the list itself, every `layer_idx` or `layer_id` (the slot of a block in the key-value cache), the
config's number of blocks and its per-block lists, which follow the block and not its position. A block that is visited
again is a shell of the first: new module objects over the same tensors, with a slot of its own. A module without attention
that stands where the cache expects a block writes an empty entry to its slot, since transformers reads the length of what
was said from there.

Every change is registered with an `ExitStack`: closing it takes all of them back, dropping it keeps them.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from overhaul.stack.discovery import Blocks, uncompiled

if TYPE_CHECKING:
    from overhaul.stack import LayerStack

Entry = int | tuple[int, nn.Module]
"""One stop of a path: a block by its place, or (place, module): a module in the place of that block."""

_PER_BLOCK = re.compile(r"layer|block|_types$")
_LEADING = re.compile(r"^first_k_dense_replace$|^num_dense_layers$")  # how many blocks at the beginning have no experts
_OF_PREDICTION_HEADS = "mtp_"
_POOLED = "add_pooling_layer"
_ONLY_IN_TRAINING = re.compile(r"drop|^p$|^training$")


class WithoutAttention(nn.Module):
    """A module in the place of a block that keeps that block's slot in the cache alive: (B, 1, T, 1) zeros a forward."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.layer_idx = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the inner module returns."""
        cache = next((kwargs[name] for name in ("past_key_values", "layer_past") if kwargs.get(name) is not None), None)
        cache = cache or next((value for value in args if hasattr(value, "get_seq_length")), None)
        if cache is not None:
            hidden = args[0] if args else kwargs["hidden_states"]
            empty = hidden.new_zeros(hidden.shape[0], 1, hidden.shape[1], 1)
            cache.update(empty, empty, self.layer_idx)
        return self.inner(*args, **kwargs)


def shell(module: nn.Module) -> nn.Module:
    """New module objects over the same parameters, buffers and hooks: what is set on it is not set on `module`."""
    twin = module.__new__(type(module))
    for name, value in vars(module).items():
        twin.__dict__[name] = copy.copy(value) if isinstance(value, dict) else value
    twin.__dict__["_modules"] = {name: child and shell(child) for name, child in module._modules.items()}
    return twin


def arrange(stack: LayerStack, path: Sequence[Entry]) -> ExitStack:
    """Let the stack run along `path`. The path must have been checked (`LayerStack.check`)."""
    undo = ExitStack()
    places = [entry if isinstance(entry, int) else entry[0] for entry in path]
    if list(path) == list(range(len(stack))):  # nothing to do, even where the config could not follow
        return undo
    _arrange_config(stack, places, undo)
    modules = _modules(stack, path)
    undo.callback(_forget_capture, stack.model, stack.blocks, _captures(stack.model))
    before = 0
    for blocks in stack.holders:
        old = list(blocks)
        undo.callback(fill, blocks, old)
        fill(blocks, [module for place, module in zip(places, modules, strict=True) if 0 <= place - before < len(old)])
        before += len(old)
    _number(modules, places, undo)
    return undo


def _number(modules: Sequence[nn.Module], places: Sequence[int], undo: ExitStack) -> None:
    """Tell blocks where they stand now, and those that share parts which part of them is theirs (Zamba 2)."""
    shared: dict[int, tuple[nn.Module, str, dict[int, Any]]] = {}
    for position, block in enumerate(modules):
        for module in block.modules():
            for name in _slots(module):
                undo.callback(setattr, module, name, getattr(module, name))
                setattr(module, name, position)
            for name, value in vars(module).items():
                if isinstance(value, dict) and value and "layer" in name and all(type(key) is int for key in value):
                    shared[id(value)] = module, name, value
    for module, name, value in shared.values():
        undo.callback(setattr, module, name, value)
        setattr(module, name, {n: value[place] for n, place in enumerate(places) if place in value})


def fill(blocks: Blocks, modules: Sequence[nn.Module]) -> None:
    """Replace what a list holds and keep the list itself, so that hooks and references to it stay good."""
    while len(blocks):
        del blocks[-1]
    blocks.extend(modules)


def _modules(stack: LayerStack, path: Sequence[Entry]) -> list[nn.Module]:
    """One module object for each stop: blocks themselves on their first visit, shells later, other modules as they are."""
    blocks, seen = stack.blocks, set[int]()
    has_slots = any(map(_has_slot, blocks))
    modules: list[nn.Module] = []
    for entry in path:
        if isinstance(entry, int):
            modules.append(shell(uncompiled(blocks[entry])) if entry in seen else blocks[entry])
            seen.add(entry)
        elif not has_slots:
            modules.append(entry[1])
        else:
            modules.append(shell(entry[1]) if _has_slot(entry[1]) else WithoutAttention(entry[1]))
    return modules


def _has_slot(block: nn.Module) -> bool:
    return any(_slots(module) for module in block.modules())


def _slots(module: nn.Module) -> list[str]:
    """The attributes by which a module knows its slot in the cache; a part of several blocks has none (-1)."""
    return [name for name in ("layer_idx", "layer_id") if type(held := vars(module).get(name)) is int and held >= 0]


def _arrange_config(stack: LayerStack, places: Sequence[int], undo: ExitStack) -> None:
    """The config that the running model reads: how many blocks there are, and what kind each is."""
    config = stack.config
    if config is None or isinstance(
        config, dict
    ):  # a diffusers model runs all blocks of its list, whatever the config says
        return
    changes: dict[str, Any] = per_block_values(vars(config), places, len(stack))
    if stack.lists != (stack.path,):
        owner = [stack.stage(place) for place in places]
        changes["depths"] = type(config.depths)(owner.count(n) for n in range(len(stack.lists)))
    elif stack.declared:
        changes["num_hidden_layers"] = len(places)
    undo.callback(_set, config, {name: getattr(config, name) for name in changes})
    _set(config, changes)


def size_cache(stack: LayerStack, count: int, undo: ExitStack) -> None:
    """Let `generate` make its cache for `count` blocks where it reads the length of the decoder from the whole config.

    Only for a path that is followed: the whole config counts the encoder's blocks by the same entry.
    """
    whole: Any = getattr(stack.model, "config", None)
    if getattr(whole, "is_encoder_decoder", False) and whole is not stack.config and stack.config.is_decoder:
        undo.callback(_set, whole, {"num_hidden_layers": whole.num_hidden_layers})
        whole.num_hidden_layers = count


def per_block_values(config: Mapping[str, Any], order: Sequence[int], count: int) -> dict[str, Any]:
    """The config's per-block lists for the blocks at `order`, and lists of places renumbered."""
    changes: dict[str, Any] = {}
    for name, value in config.items():
        if not isinstance(value, list | tuple) or not value or not _PER_BLOCK.search(name):
            continue
        if name.startswith(("_", _OF_PREDICTION_HEADS)):
            continue
        if _is_places(value, count):
            changes[name] = type(value)(place for place, old in enumerate(order) if old in value)
        elif len(value) == count:
            changes[name] = type(value)(value[i] for i in order)
        elif len(found := _written_out(value)) == count:
            changes[name] = [[[found[i]], 1] for i in order]
        elif name.endswith("_types") and all(isinstance(kind, str) for kind in value):  # a pattern that repeats
            changes[name] = [value[i % len(value)] for i in order]
    for name in [name for name in config if _LEADING.search(name) and type(config[name]) is int]:
        changes[name] = sum(place < config[name] for place in order)
    return changes | _outlets(config, order, count)


def _outlets(config: Mapping[str, Any], order: Sequence[int], count: int) -> dict[str, Any]:
    """The blocks after which a backbone hands out what it sees: they follow their blocks, and one is the last."""
    names, indices = config.get("stage_names"), config.get("_out_indices")
    if not isinstance(names, list) or len(names) != count + 1 or not indices:
        return {}
    names = [names[0], *(f"stage{n}" for n in range(1, len(order) + 1))]
    kept = [n for n, old in enumerate([-1, *order]) if old + 1 in [index % (count + 1) for index in indices]]
    kept = kept or [len(order)]
    return {"stage_names": names, "_out_indices": kept, "_out_features": [names[n] for n in kept]}


def _written_out(value: Sequence[Any]) -> list[Any]:
    """The kinds of [[kinds, times], ...], one after the other; nothing where a list says something else."""
    pairs = [part for part in value if isinstance(part, list | tuple) and len(part) == 2 and type(part[1]) is int]
    if len(pairs) < len(value) or not all(isinstance(kinds, list | tuple) for kinds, _ in pairs):
        return []
    return [kind for kinds, times in pairs for _ in range(times) for kind in kinds]


def _is_places(value: Sequence[Any], count: int) -> bool:
    """Whether a list names some of the blocks by their places ([1, 3]) rather than saying something of each ([0, 1, 1])."""
    numbers = all(type(entry) is int and 0 <= entry < count for entry in value)
    return numbers and list(value) == sorted(set(value)) and (len(value) < count or count > 2)


_CAPTURE = "transformers.utils.output_capturing"
_CAPTURED = "_output_capturing_hooks_installed"


def _captures(model: nn.Module) -> bool:
    return any(getattr(module, _CAPTURED, False) for module in model.modules())


def _forget_capture(model: nn.Module, blocks: Sequence[nn.Module], known: bool) -> None:
    """Take off the library's capture hooks if it put them on while a path was followed: blocks off the path lack them.

    It puts them on again, on all blocks, when it is next asked for hidden states.
    """
    if known or not _captures(model):
        return
    for module in [*model.modules(), *(module for block in blocks for module in block.modules())]:
        vars(module).pop(_CAPTURED, None)
        for key, hook in list(module._forward_hooks.items()):
            if getattr(hook, "__module__", "") == _CAPTURE:
                del module._forward_hooks[key]


def describe(stack: LayerStack, places: Sequence[int], count: int, undo: ExitStack) -> bool:
    """Let the configs that are saved describe the blocks at `places` of what were `count` blocks.

    Which entry of a config says how many blocks there are is found by trying: the one with which the class builds that
    many blocks in this stack and as many as before in every other.

    Returns:
        Whether there is such an entry. Networks without a config need none.
    """
    if not is_hub_model(stack.model):
        return True
    if len(_twin(stack)) == len(places):  # the running config is the saved one
        return True
    for read, write in saved_configs(stack.model):
        for name in [name for name, value in read().items() if type(value) is int and value == count]:
            changes = {**per_block_values(read(), places, count), name: len(places)}
            old = {name: read()[name] for name in changes}
            write(changes)
            if _builds(stack, len(places)):
                undo.callback(write, old)
                return True
            write(old)
    return False


def saved_configs(model: nn.Module) -> Iterator[tuple[Callable[[], Mapping[str, Any]], Callable[[Any], None]]]:
    """(read, write) of each config that `save_pretrained` writes: the model's own and its parts."""
    config: Any = model.config
    if isinstance(config, dict):  # diffusers
        owner: Any = model
        yield (lambda: owner.config), (lambda changes: owner.register_to_config(**changes))
        return
    for part in [config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", ()))]:
        if part is not None:
            yield partial(vars, part), partial(_set, part)


def _set(config: Any, changes: Mapping[str, Any]) -> None:
    for name, value in changes.items():
        setattr(config, name, value)


def _builds(stack: LayerStack, count: int) -> bool:
    """Whether the class builds `count` blocks in this stack, and in every other as many as there are."""
    try:
        planned = skeleton(stack.model)
    except (ValueError, TypeError, IndexError, KeyError, AttributeError):  # the entry meant something else
        return False
    lengths = {s.path: len(s) for s in type(stack).find(planned)}
    here = {s.path: len(s) for s in type(stack).find(stack.model)}
    return lengths == {**here, stack.path: count}


def _twin(stack: LayerStack) -> list[nn.Module]:
    return type(stack)(skeleton(stack.model), stack.path, stack.lists).blocks


def retie(stack: LayerStack, undo: ExitStack) -> None:
    """Let the modules around the stack know which tensors are one, by the names that these have now."""
    if not is_hub_model(stack.model) or isinstance(stack.model.config, dict):
        return
    planned, steps = skeleton(stack.model), stack.path.split(".")[:-1]
    for path in [".".join(steps[:n]) for n in range(len(steps) + 1)]:
        module, twin = stack.model.get_submodule(path), planned.get_submodule(path)
        for name in ("_tied_weights_keys", "all_tied_weights_keys"):
            ours, theirs = vars(module).get(name), vars(twin).get(name)
            if ours != theirs:
                undo.callback(setattr, module, name, ours)
                setattr(module, name, theirs)


def is_hub_model(model: nn.Module) -> bool:
    """Whether a config can build this class again: a transformers or a diffusers model."""
    from transformers import PreTrainedModel

    return isinstance(model, PreTrainedModel) or hasattr(model, "register_to_config")


def skeleton(model: nn.Module) -> nn.Module:
    """What the model's class builds from its config, without weights."""
    from transformers.initialization import no_init_weights

    kind: Any = type(model)
    with torch.device("meta"), no_init_weights():
        if isinstance(model.config, dict):
            return kind.from_config(dict(model.config))
        config: Any = model.config  # as it is read from a file: some entries are made of others there
        options = {"attn_implementation": config._attn_implementation} if config._attn_implementation else {}
        return kind(
            type(config).from_dict(config.to_dict(), **options),
            **without_pooler(kind, getattr(model, "pooler", True) is not None),
        )


def without_pooler(kind: Any, held: bool) -> dict[str, bool]:
    """What a class is built with whose pooler is not `held`, where that may be left out and all else stays the same."""
    plain: Any = vars(kind).get("plain", kind)  # of a converted class
    return {} if held or _POOLED not in inspect.signature(plain.__init__).parameters else {_POOLED: False}


def faults(stack: LayerStack, origin: Sequence[int]) -> list[str]:
    """Where the model differs from what its class builds from its config, so that loading it again would fail.

    Args:
        stack: the stack as it is now.
        origin: for each block now in the stack, its old place, by which faults before and after an edit compare.
    """
    if not is_hub_model(stack.model):
        return []
    planned = skeleton(stack.model)
    inside = tuple(f"{path}." for path in stack.lists)
    found = _differences(_shapes(stack.model, inside), _shapes(planned, inside), "the rest of the model")
    twins = type(stack)(planned, stack.path, stack.lists).blocks
    blocks = map(uncompiled, stack.blocks)
    if len(twins) != len(stack):
        found.append(f"the number of blocks in {stack.path}")
    for place, block, twin in zip(origin, blocks, twins, strict=False):
        found += _differences(_shapes(block), _shapes(twin), f"block {place}")
        found += _differences(_settings(block), _settings(twin), f"block {place}")
    return found


def unlike_its_class(model: nn.Module) -> list[str]:
    """The tensors that the model's class does not build from its config in this shape, or builds besides."""
    ours, planned = _shapes(model), _shapes(skeleton(model))
    return [name for name in sorted(ours.keys() | planned.keys()) if ours.get(name) != planned.get(name)]


def _differences(ours: Mapping[str, Any], planned: Mapping[str, Any], label: str) -> list[str]:
    """The names whose values differ, as "label: name"."""
    return [f"{label}: {name}" for name in sorted(ours.keys() | planned.keys()) if ours.get(name) != planned.get(name)]


def _shapes(module: nn.Module, without: tuple[str, ...] = ()) -> dict[str, Any]:
    # torch's quantised modules keep their dtype among their tensors
    state = {name: tensor for name, tensor in module.state_dict().items() if isinstance(tensor, Tensor)}
    return {name: tuple(tensor.shape) for name, tensor in state.items() if not without or not name.startswith(without)}


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
