"""Selectors: parts of a network by role and depth, found by structure, never by name.

    chosen = select(model, "attention.out, mlp.down", blocks="first:10,last:2")
    fit(model, ..., trainable=chosen)                                   # trains these and nothing else
    with adapters(model, rank, alpha, dropout, chosen.modules): ...     # adapters on these
    for parameter in chosen.tensors.values(): parameter.requires_grad_(False)
    groups = [{"params": [*select(model, role).tensors.values()], "lr": lr} for role, lr in rates.items()]

Roles, several with commas between them:

    attention   attention.q  .k  .v  .out  .qkv     and the same of cross_attention
    mlp         mlp.gate  .up  .down  .gate_up      with experts where the MLP has them
    experts     the weights of a mixture of experts, all at once
    projections every linear layer in the blocks, whatever it does
    norms       weights and biases of norms
    biases      all biases but those of norms
    adapters    what peft has added
    all         whole blocks
    embedding   what comes before the first block: tokens, positions, patches, the stem of a ResNet (without norms)
    head        what comes after the last block (without norms); in a tied model the parameter is the embedding's

1. Attention, MLP and what writes for them are told by `trace.sites`, queries, keys, values and gates by `trace.readers`: one
   block of each kind runs on a few random inputs. The other roles need no run.
2. A layer that gives queries, keys and values at once (GPT-2, Falcon, GPT-NeoX) is selected whole, or by rows: with
   `attention.q` alone, `parts` says which rows, and `modules` and `parameters` refuse. `attention.qkv` is always whole.
3. `blocks` holds for what lies in blocks. `embedding` and `head` lie in none; norms and biases outside of blocks belong to a
   selection of all blocks.
"""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from torch import nn

from overhaul.errors import RequestError, did_you_mean
from overhaul.parts import PLAIN, READERS, TRACED, Finder, Part
from overhaul.stack import LayerStack

_TOGETHER: dict[str, tuple[str, ...]] = {
    **{term: tuple(f"{term}.{part}" for part in parts) for term, parts in READERS.items()},
    **{f"{term}.qkv": tuple(f"{term}.{part}" for part in "qkv") for term in ("attention", "cross_attention")},
    "mlp.gate_up": ("mlp.gate", "mlp.up"),
}
_TOGETHER["mlp"] = (*_TOGETHER["mlp"], "experts")
ROLES = (*_TOGETHER, *TRACED, "experts", *PLAIN)


@dataclass(frozen=True)
class Selection:
    """Parts of a network.

    Attributes:
        model: the network.
        parts: in the order in which the network defines them.
    """

    model: nn.Module = field(repr=False)
    parts: tuple[Part, ...]

    @cached_property
    def modules(self) -> list[str]:
        """The names of the modules.

        Raises:
            RequestError: only some outputs of one are selected.
        """
        self._check_whole()
        return list(dict.fromkeys(part.module for part in self.parts))

    @cached_property
    def parameters(self) -> list[str]:
        """The names of the parameters; a tied one stands under its first name.

        Raises:
            RequestError: only some outputs of a layer are selected.
        """
        self._check_whole()
        return list(dict.fromkeys(name for part in self.parts for name in part.parameters))

    @property
    def tensors(self) -> dict[str, nn.Parameter]:
        """The parameters by name."""
        return {name: self.model.get_parameter(name) for name in self.parameters}

    def __call__(self, name: str) -> bool:
        """Whether a parameter is selected: what `fit(trainable=...)` asks."""
        return name in self.parameters

    def _check_whole(self) -> None:
        for part in self.parts:
            if part.rows is not None:
                listed = ", ".join(f"{rows.start} to {rows.stop - 1}" for rows in part.rows[:3])
                whole = "mlp.gate_up" if part.role.startswith("mlp") else f"{part.role.partition('.')[0]}.qkv"
                raise RequestError(
                    f"{part.role} of block {part.depth} is only a part of {part.module}: its outputs {listed}"
                    f"{', ...' if len(part.rows) > 3 else ''}. The layer cannot be taken by halves: select {whole!r}, or "
                    "read the rows from `parts`."
                )


def select(
    model: nn.Module | LayerStack,
    roles: str | Sequence[str],
    blocks: str | Sequence[int] = "all",
    *,
    inputs: Mapping[str, Any] | None = None,
) -> Selection:
    """Find parts of a network by what they do.

    Args:
        model: the network, or one of its stacks where it has several.
        roles: one or more of those above ("attention.out, mlp").
        blocks: "all", places of blocks ("3", "1-4", "first:10,last:2"), or a list of them.
        inputs: what the model is run on, if random tokens or images will not do: its keyword arguments, two samples of 8 to
            64 positions. It is in eval mode meanwhile; weights, modes and random state are as before afterwards.

    Raises:
        RequestError: an unknown role or block; a role that this network does not have, or whose place cannot be told.
    """
    stack = model if isinstance(model, LayerStack) else LayerStack.of(model)
    wanted = _leaves(roles)
    places = blocks_of(stack, blocks)
    finder = Finder(stack, places, blocks == "all", inputs)
    found = [part for role in wanted for part in finder.find(role)]
    for asked in _split(roles):
        if not any(part.role in _TOGETHER.get(asked, (asked,)) for part in found):
            raise RequestError(finder.missing(asked))
    order = {name: n for n, (name, _) in enumerate(stack.model.named_modules())}
    return Selection(stack.model, tuple(sorted(_whole(stack.model, found), key=lambda part: order[part.module])))


def blocks_of(stack: LayerStack, blocks: str | Sequence[int], name: str = "blocks") -> list[int]:
    """The places that a text or a list of numbers names, in order, each once; `name` is the knob, for messages.

    Raises:
        RequestError: it does not, or there is no such block.
    """
    count = len(stack)
    found: set[int] = set()
    for item in blocks.split(",") if isinstance(blocks, str) else blocks:
        text = str(item).strip()
        edge = re.fullmatch(r"(first|last):(\d+)", text)
        run = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
        if text == "all":
            asked = range(count)
        elif edge:
            asked = range(int(edge[2])) if edge[1] == "first" else range(count - int(edge[2]), count)
        elif run:
            asked = range(int(run[1]), int(run[2] or run[1]) + 1)
        else:
            near = did_you_mean(text.partition(":")[0], ["all", "first", "last"]) if text[:1].isalpha() else ""
            raise RequestError(
                f'{name}={blocks!r}: {text!r} names no blocks.{near} Write "all", "3", "1-4", "first:10", "last:2", several '
                "with commas between them, or a list of numbers."
            )
        if not asked or asked[0] < 0 or asked[-1] >= count:
            none = f"there is no block {text}" if text.isdecimal() else f"{text!r} asks for none, or for others"
            raise RequestError(f"{name}={blocks!r}: {stack.path} has the blocks 0 to {count - 1}; {none}.")
        found |= set(asked)
    if not found:
        raise RequestError(f"{name}={blocks!r} names no block of {stack.path}, which has {count}.")
    return sorted(found)


def _split(roles: str | Sequence[str]) -> list[str]:
    return [role.strip() for role in (roles.split(",") if isinstance(roles, str) else roles)]


def _leaves(roles: str | Sequence[str]) -> list[str]:
    """The single roles that are asked for, each once."""
    for role in _split(roles):
        if role not in ROLES:
            near = difflib.get_close_matches(role, ROLES, n=1)
            raise RequestError(f"There is no role {role!r}.{did_you_mean(role, near or ROLES)}")
    return list(dict.fromkeys(leaf for role in _split(roles) for leaf in _TOGETHER.get(role, (role,))))


def _whole(model: nn.Module, found: Sequence[Part]) -> Iterator[Part]:
    """The same parts, each module once for a role, and the rows of one layer joined where they make it whole."""
    for (module, _), group in itertools.groupby(sorted(found, key=_kin), _kin):
        parts = list(group)
        weight: Any = getattr(model.get_submodule(module), "weight", None)
        rows = {row for part in parts for rows in part.rows or () for row in rows}
        if rows and len(rows) < weight.shape[parts[0].axis]:
            yield from parts
        else:
            role = _joined([part.role for part in parts]) if rows else parts[0].role
            names = dict.fromkeys(name for part in parts for name in part.parameters)
            yield replace(parts[0], role=role, parameters=tuple(names), rows=None)


def _kin(part: Part) -> tuple[str, str]:
    """Parts that may be joined: of one module, and of one role or rows."""
    return part.module, part.role if part.rows is None else ""


def _joined(roles: Sequence[str]) -> str:
    term = roles[0].partition(".")[0]
    return "mlp.gate_up" if term == "mlp" else f"{term}.qkv"
