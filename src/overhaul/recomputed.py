"""What loading makes anew instead of reading it: modules without weights, their settings, and tables that are not stored.

A model whose config was edited in memory still computes as before, and one whose activation was exchanged computes otherwise
than its config says; its folder would open as what the config says.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterator
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations

from overhaul.conversions.records import records
from overhaul.errors import RunError
from overhaul.stack.arrangement import skeleton

_PASSED_OVER = re.compile(
    r"drop|^p$|momentum|training|checkpoint|inplace|cached|^(shift|window)_size$|attn_implementation"
)
"""Settings that count in training alone, that choose among kernels, or that a forward sets by its inputs' size (Swin)."""
_COUNTS = re.compile(r"layer|block|depth|^n_|^num_|^vocab_size$|_features$")
"""Numbers that a class reads when it is built: of blocks, which are counted anew where some were dropped, and of words, of
which inner modules keep the old number after `resize_token_embeddings`."""

LIBRARIES = ("transformers.", "torch.nn.")
"""Whose modules are what their class and their settings are."""

IDLE = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
"""What changes nothing outside of training."""

HOOKS = ("transformers", "diffusers", "accelerate", "peft", "torch", "overhaul")
"""Whose hooks change nothing that is said: they move tensors, or ask for gradients."""


def check_recomputed(model: Any) -> None:
    """Refuse to save a model that would not open as what it is, although all its weights do.

    Warns:
        UserWarning: a table was rounded with the weights (`model.to(torch.bfloat16)`), and the folder opens with exact ones;
            or somebody's hooks may change what the model says.

    Raises:
        RunError: a module, a setting or a table is not what the config describes.
    """
    planned = skeleton(model)
    twins, rounded = dict(planned.named_modules(remove_duplicate=False)), list[str]()
    held = dict(model.named_modules(remove_duplicate=False))
    for name, twin in twins.items():
        module = held.get(name)
        _check_kind(model, name, module, twin)
        if module is None or _kind(module) is not _kind(twin) or not type(module).__module__.startswith(LIBRARIES):
            continue
        for key, value in vars(module).items():
            skipped = _PASSED_OVER.search(key) or (type(value) is int and _COUNTS.search(key))
            if key in vars(twin) and not key.startswith("_") and not skipped:
                _check_setting(model, f"{name}.{key}", value, vars(twin)[key])
        rounded += [
            key for key, table, new in _tables(planned, name, module, twin) if _is_rounded(model, key, table, new)
        ]
    if not records(model) and (hooked := next((name for name, one in held.items() if _hooked(one)), None)) is not None:
        warnings.warn(
            f"{hooked or 'The model'} has hooks here, which no folder holds. If they change what the model says, the folder "
            "says something else; a conversion (overhaul.conversions) is recorded.",
            stacklevel=5,
        )
    if rounded and (rounded := _exact_when_opened(model, rounded)):
        warnings.warn(
            f"{len(rounded)} tables that are not stored, such as {rounded[0]!r}, were rounded with the weights of this "
            "model; its folder opens with exact ones, so outputs differ by that rounding. Open models in the dtype that you "
            "want (`dtype=`) instead of casting them.",
            stacklevel=5,
        )


def _exact_when_opened(model: nn.Module, tables: list[str]) -> list[str]:
    """Those of some rounded tables that opening in the weights' dtype does not round just so (as XGLM's positions are)."""
    held, usual = dict(model.named_buffers(remove_duplicate=False)), torch.get_default_dtype()
    exact = list[str]()
    for dtype in {held[name].dtype for name in tables}:
        torch.set_default_dtype(dtype)
        try:
            opened = dict(skeleton(model).named_buffers(remove_duplicate=False))
        finally:
            torch.set_default_dtype(usual)
        exact += [name for name in tables if held[name].dtype == dtype != opened[name].dtype]
    return exact


def _hooked(module: nn.Module) -> bool:
    """Whether somebody hooked into a module."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    owners = [getattr(hook, "func", hook) for hook in hooks]
    return any(str(getattr(one, "__module__", "")).partition(".")[0] not in HOOKS for one in owners)


def _check_kind(model: nn.Module, name: str, module: nn.Module | None, twin: nn.Module) -> None:
    """Whether a module is of the class that the config makes it and runs as that does, or computes the same.

    What accelerate puts around a forward keeps the original.
    """
    if module is not None and "forward" in vars(module) and not {"_hf_hook", "_original_forward"} & vars(module).keys():
        raise RunError(
            f"{name} has a forward of its own in this {type(model).__name__}, which is not saved: its folder would open as "
            "another model; nothing was saved. Take it off (`del module.forward`), or build it as a conversion "
            "(overhaul.conversions)."
        )
    ours, theirs = map(_kind, (module, twin))
    if ours is not theirs and not _same(module, twin):
        said = "missing" if module is None else f"a {type(module).__name__}"
        raise RunError(
            f"{name} of this {type(model).__name__} is {said}, but its config describes a {type(twin).__name__}: what is "
            "saved would open as another model; nothing was saved. Change the config and open it again, or build the "
            "module as a conversion (overhaul.conversions), which is recorded."
        )


def _kind(module: nn.Module | None) -> type | None:
    """The class of a module; None where it is idle. A parametrised one is of a class of its own."""
    return None if module is None or isinstance(module, IDLE) else type_before_parametrizations(module)


def _same(module: nn.Module | None, twin: nn.Module) -> bool:
    """Whether two modules without tensors, such as two makes of one activation, give the same."""
    if module is None or module.state_dict() or twin.state_dict():
        return False
    given = torch.linspace(-4, 4, 64).reshape(2, 32)
    try:
        with torch.no_grad():
            return torch.allclose(copy.deepcopy(module).eval()(given), twin.eval()(given), atol=1e-6)
    except Exception:  # no function of one tensor
        return False


def _check_setting(model: nn.Module, name: str, ours: Any, theirs: Any) -> None:
    plain = bool | int | float | str
    if isinstance(ours, FunctionType | BuiltinFunctionType) and callable(theirs):
        ours, theirs = (getattr(each, "__qualname__", str(each)) for each in (ours, theirs))
    if not isinstance(ours, plain) or not isinstance(theirs, plain) or ours == theirs or ours != ours:
        return
    raise RunError(
        f"{name} of this {type(model).__name__} is {ours!r}, but its config describes {theirs!r}: what is saved would open "
        "as another model; nothing was saved. Set both alike."
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
    precision, smallest = 2 * torch.finfo(held.dtype).eps, torch.finfo(held.dtype).tiny
    if held.shape == new.shape and torch.allclose(held.to(new.dtype), new, rtol=precision, atol=smallest * precision):
        return held.dtype != new.dtype
    raise RunError(
        f"{name} of this {type(model).__name__} is not stored with its weights, and its config describes another one than "
        "it holds: what is saved would open as another model; nothing was saved. Change the config and open it again, "
        "or put the table back."
    )
