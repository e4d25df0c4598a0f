"""What loading makes anew instead of reading it: tables that are not stored (rotary frequencies), modules, their settings.

A model whose config was edited in memory still computes as before, as does one whose activation was replaced or whose
attention was told to look ahead; its folder would open as what the config says.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from overhaul.conversions.records import records
from overhaul.errors import RunError
from overhaul.stack.arrangement import skeleton

_OF_TRAINING = re.compile(r"drop|^p$|momentum|^training$|checkpointing")
_LIBRARIES = ("transformers", "diffusers", "accelerate", "peft", "torch", "overhaul")
"""Whose hooks change nothing that is said: they move tensors, ask for gradients, or are recorded."""


def check_recomputed(model: Any) -> None:
    """Refuse to save a model that would not open as what it is, although all its weights do.

    Warns:
        UserWarning: a table was rounded with the weights (`model.to(torch.bfloat16)`), and the folder opens with exact ones;
            or somebody's hooks, or a `forward` that was replaced, may change what the model says.

    Raises:
        RunError: a table, a setting or a module is not what the config describes.
    """
    planned = skeleton(model)
    twins = dict(planned.named_modules())
    rounded: list[str] = []
    for name, module in model.named_modules():
        twin = twins.get(name)
        _check_kind(model, name, module, twin)
        if twin is None or type(twin) is not type(module) or not type(module).__module__.startswith("transformers."):
            continue
        for key, value in vars(module).items():
            # whole numbers are places and counts, which some modules set as they run
            plain = isinstance(value, bool | float | str) and not key.startswith("_")
            if plain and not _OF_TRAINING.search(key):
                _check_setting(model, f"{name}.{key}", value, getattr(twin, key, value))
        rounded += [
            key for key, held, new in _tables(planned, name, module, twin) if _is_rounded(model, key, held, new)
        ]
    names = [] if records(model) else [name for name, module in model.named_modules() if _steered(module)]
    if names:
        warnings.warn(
            f"{names[0] or 'The model'} has hooks or a `forward` of its own here, which no folder holds. If they change "
            "what the model says, the folder says something else; a conversion (overhaul.conversions) is recorded.",
            stacklevel=5,
        )
    if rounded:
        warnings.warn(
            f"{len(rounded)} tables that are not stored, such as {rounded[0]!r}, were rounded with the weights of this "
            "model; its folder opens with exact ones, so outputs differ by that rounding. Open models in the dtype that you "
            "want (`dtype=`) instead of casting them.",
            stacklevel=5,
        )


def _steered(module: nn.Module) -> bool:
    """Whether somebody hooked into a module or replaced its `forward`."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    own = vars(module).get("forward")
    return any(_whose(hook) not in _LIBRARIES for hook in [*hooks, *([] if own is None else [own])])


def _whose(function: Any) -> str:
    """The package that a function comes from."""
    inner = getattr(function, "func", function)
    return str(getattr(inner, "__module__", None) or type(inner).__module__).partition(".")[0]


def _check_setting(model: nn.Module, name: str, ours: Any, theirs: Any) -> None:
    if type(theirs) is type(ours) and ours != theirs and ours == ours:
        raise RunError(
            f"{name} of this {type(model).__name__} is {ours!r}, but its config describes {theirs!r}: what is saved would "
            "open as another model; nothing was saved. Set both alike."
        )


def _check_kind(model: nn.Module, name: str, module: nn.Module, twin: nn.Module | None) -> None:
    """Refuse a module without tensors that is of another class, which no tensor's name or shape would tell."""
    if twin is not None and not isinstance(module, type(twin)) and not twin.state_dict():
        raise RunError(
            f"{name} of this {type(model).__name__} is a {type(module).__name__}, but its config describes a "
            f"{type(twin).__name__}: what is saved would open as another model; nothing was saved. Set it in the config "
            "(`hidden_act` for one), or build it as a conversion (overhaul.conversions), which is recorded and loads again."
        )


def _tables(planned: Any, name: str, module: nn.Module, twin: nn.Module) -> Iterator[tuple[str, Tensor, Tensor]]:
    """The buffers of one module that are not stored: name, as it is, as loading would compute it."""
    names = [key for key in module._non_persistent_buffers_set if module._buffers.get(key) is not None]
    follows_inputs = re.search("dynamic|longrope", str(getattr(module, "rope_type", "")))
    if not names or follows_inputs or next(twin.parameters(recurse=False), None) is not None:
        return
    twin.to_empty(device="cpu", recurse=False)
    for buffer in twin._buffers.values():
        if buffer is not None and buffer.is_floating_point():
            buffer.fill_(torch.nan)
    planned._init_weights(twin)
    for key in names:
        new, held = twin._buffers.get(key), module._buffers[key]
        if not (isinstance(new, Tensor) and isinstance(held, Tensor) and new.is_floating_point()):
            continue
        if not new.isnan().any():  # else the class computes it as it is needed
            yield f"{name}.{key}", held.cpu(), new


def _is_rounded(model: nn.Module, name: str, held: Tensor, new: Tensor) -> bool:
    """Whether a table is what loading computes but for the rounding of its dtype.

    Raises:
        RunError: it is another.
    """
    if held.shape == new.shape and torch.equal(held.to(new.dtype), new):
        return False
    precision = 2 * torch.finfo(held.dtype).eps
    if held.shape == new.shape and torch.allclose(held.to(new.dtype), new, rtol=precision, atol=1e-30):
        return held.dtype != new.dtype
    raise RunError(
        f"{name} of this {type(model).__name__} is not stored with its weights, and its config describes another one than "
        "it holds: what is saved would open as another model; nothing was saved. Change the config and open it again, "
        "or put the table back."
    )
