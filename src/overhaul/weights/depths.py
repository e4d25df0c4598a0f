"""The depth of every tensor of a checkpoint, told by the structure of its architecture and not by a table of names.

1. The class that config.json names is built on torch's meta device, without memory for weights, and its stacks are asked.
2. transformers renames tensors when it loads and saves ("vit.encoder.layer.0" in a file is "vit.layers.0" in the model, and
   the text stack of a vision-language model lies elsewhere than its files say): a stored name stands for the tensor that the
   class would load it into. A numbered list of stored names that the model lacks even then is taken for the stack of as many
   blocks whose path shares the most words with it.
3. Building an architecture imports for seconds. Where nothing can be in doubt, names are enough: a causal language model
   with one numbered list, as long as its config says, around which there are only tensors that every such model has
   before or after its blocks.
4. Where the class is unknown (its code lies in the folder and is not run), the numbered lists of names are the stacks,
   and what lies outside them comes after the blocks only if its name says so.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from overhaul.errors import RequestError
from overhaul.stack import LayerStack

Place = tuple[str, int, int]
"""(path of the stack, depth, number of blocks); depth as in `LayerStack.depth`. ("", -1, 0) where there is no stack."""

_NUMBERED = re.compile(r"(?:(?P<path>.*?)\.)?(?P<number>\d+)\.")
_CAUSAL = re.compile(r"(ForCausalLM|LMHeadModel)$")
_BEFORE_BLOCKS = re.compile(r"(?:\w+\.)*(embed_tokens|wte|wpe)\.weight")
_AFTER_BLOCKS = re.compile(r"(?:\w+\.)*(norm|ln_f|lm_head)\.(weight|bias)")
_LAST = re.compile(r"(^|[._])(final|out|head|norm|ln_f|score|classifier)([._]|$)")


class Places:
    """The places of all tensors of a model, found out when the first is asked for.

    To build an architecture, transformers imports for seconds; a blend that is the same at all depths need not wait for it.
    """

    def __init__(
        self, names: Collection[str], model: Callable[[], nn.Module | None], config: Mapping[str, Any] | None = None
    ) -> None:
        """Keep what is needed to find out.

        Args:
            names: of stored tensors, or of parameters and buffers.
            model: gives the model they belong to, with or without weights, or None if its class is unknown.
            config: config.json, which with the names may be enough.
        """
        self._names, self._model, self._config = names, model, config or {}
        self._found: dict[str, Place] | None = None
        self._lock = threading.Lock()

    def __getitem__(self, name: str) -> Place:
        with self._lock:
            if self._found is None:
                self._found = _beyond_doubt(self._names, self._config)
            if self._found is None:
                model = self._model()
                stacks = LayerStack.find(model) if model is not None else []
                self._found = _by_structure(stacks, self._names) if stacks else _by_names(self._names)
        return self._found[name]


def _beyond_doubt(names: Collection[str], config: Mapping[str, Any]) -> dict[str, Place] | None:
    """The places of an ordinary causal language model's tensors; None unless there is only one way to see them."""
    numbered = {path for name in names if (found := _NUMBERED.match(name)) for path in [found["path"] or ""]}
    sizes = {config.get(key) for key in ("num_hidden_layers", "n_layer")} - {None}
    causal = [_CAUSAL.search(name) for name in config.get("architectures") or [""]]
    nested = any(isinstance(value, dict) and "model_type" in value for value in config.values())
    if len(numbered) != 1 or not all(causal) or nested:
        return None
    (path,) = numbered
    blocks = _numbered(names).get(path, 0)
    if blocks < 2 or sizes != {blocks}:
        return None
    places: dict[str, Place] = {}
    for name in names:
        if found := _NUMBERED.match(name):
            places[name] = path, int(found["number"]), blocks
        elif _BEFORE_BLOCKS.fullmatch(name) or _AFTER_BLOCKS.fullmatch(name):
            places[name] = path, -1 if _BEFORE_BLOCKS.fullmatch(name) else blocks, blocks
        else:
            return None
    return places


def _by_structure(stacks: Sequence[LayerStack], names: Collection[str]) -> dict[str, Place]:
    model = stacks[0].model
    own = own_names(model)
    built = built_names(model, names)
    sizes = {stack.path: len(stack) for stack in stacks}
    lists: dict[str, tuple[LayerStack, int]] = {}
    for stack in stacks:
        before = 0
        for path in stack.lists:
            lists[path] = (stack, before)
            before += len(list(model.get_submodule(path).children()))
    for path, count in _numbered(name for name in built.values() if name not in own).items():
        twins = [stack for stack in stacks if sizes[stack.path] == count and stack.lists == (stack.path,)]
        if path not in lists and twins:
            lists[path] = (max(twins, key=lambda stack: len(_words(path) & _words(stack.path))), 0)

    def place(name: str) -> Place:
        for path, (stack, before) in lists.items():
            number = name[len(path) + 1 :].partition(".")[0] if name.startswith(f"{path}.") else ""
            if number.isdigit():  # files may hold more blocks than the config counts, such as those for drafting tokens
                return stack.path, min(before + int(number), sizes[stack.path]), sizes[stack.path]
        owner = _owner(stacks, name)
        return owner.path, owner.depth(name), sizes[owner.path]

    return {name: place(built[name]) for name in names}


def list_of(places: Mapping[str, Place], stack: str) -> tuple[str, dict[int, dict[str, str]]]:
    """Where stored names count the blocks of a stack.

    Args:
        places: of all tensors, by name.
        stack: its path.

    Returns:
        The path of the list in these names ("model.layers"), and for each block the names of its tensors with what of them
        follows the block's number.

    Raises:
        RequestError: there is no such path for all blocks.
    """
    inside = {name: depth for name, (path, depth, blocks) in places.items() if path == stack and 0 <= depth < blocks}
    counted: dict[str, set[int]] = {}
    for name, depth in inside.items():
        parts = name.split(".")
        for n, part in enumerate(parts):
            if part == str(depth):
                counted.setdefault(".".join(parts[:n]), set()).add(depth)
    everywhere = [path for path, depths in counted.items() if depths == set(inside.values())]
    prefix = min(everywhere, key=len, default="")
    found: dict[int, dict[str, str]] = {}
    for name, depth in inside.items():
        start = f"{prefix}.{depth}." if prefix else f"{depth}."
        if not everywhere or not name.startswith(start):
            raise RequestError(
                f"{name} belongs to block {depth} of {stack}, and its name does not say so as others do."
            )
        found.setdefault(depth, {})[name] = name.removeprefix(start)
    return prefix, found


def own_names(model: nn.Module) -> set[str]:
    """The names of all parameters and buffers, tied ones included."""
    own = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return own | {name for name, _ in model.named_buffers(remove_duplicate=False)}


def built_names(model: nn.Module, names: Collection[str]) -> dict[str, str]:
    """For each stored name, the tensor that the class loads it into: by the library's own renaming where it has one.

    A model with a head puts a prefix before its body, which files may lack or have without need.
    """
    own, prefix = own_names(model), getattr(model, "base_model_prefix", "")
    renamed = _renaming(model)

    def built(name: str) -> str:
        found = renamed(name)
        candidates = (found, f"{prefix}.{found}", found.removeprefix(f"{prefix}."))
        return next((one for one in candidates if one in own), found)

    return {name: name if name in own else built(name) for name in names}


def _renaming(model: Any) -> Callable[[str], str]:
    """How transformers renames stored tensors; not at all for models of other libraries."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        return lambda name: name
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    return lambda name: rename_source_key(name, renamings, converters)[0]


def _owner(stacks: Sequence[LayerStack], name: str) -> LayerStack:
    """The stack that a tensor outside all blocks counts to: the nearest by path, else the last that lies before it."""
    shared = [_leading(name, stack.path) for stack in stacks]
    near = [stack for stack, words in zip(stacks, shared, strict=True) if words == max(shared)]
    passed = [stack for stack in near if stack.depth(name) >= 0]
    return passed[-1] if passed else near[0]


def _by_names(names: Collection[str]) -> dict[str, Place]:
    lists = {path: count for path, count in _numbered(names).items() if count > 1}

    def place(name: str) -> Place:
        found = _NUMBERED.match(name)
        if found and (found["path"] or "") in lists:
            path = found["path"] or ""
            return path, int(found["number"]), lists[path]
        if not lists:
            return "", -1, 0
        path = max(lists, key=lambda path: (_leading(name, path), lists[path]))
        return path, lists[path] if _LAST.search(name) and "emb" not in name else -1, lists[path]

    return {name: place(name) for name in names}


def _numbered(names: Iterable[str]) -> dict[str, int]:
    """The outermost numbered lists ("model.layers") whose numbers are 0, 1, ... without a gap, and their lengths."""
    numbers: dict[str, set[int]] = {}
    for name in names:
        if found := _NUMBERED.match(name):
            numbers.setdefault(found["path"] or "", set()).add(int(found["number"]))
    return {path: len(seen) for path, seen in numbers.items() if seen == set(range(len(seen)))}


def _words(path: str) -> set[str]:
    return set(re.split(r"[._]", path))


def _leading(name: str, path: str) -> int:
    """How many words two paths share from their start."""
    count = 0
    for ours, theirs in zip(re.split(r"[._]", name), re.split(r"[._]", path), strict=False):
        if ours != theirs:
            break
        count += 1
    return count
