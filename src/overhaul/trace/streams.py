"""How the residual stream is read from, and written to, what modules are called with and return.

1. A block may take the stream by position or by keyword and return it bare or in a tuple; what it returned is given back in
   the same form.
2. Joint blocks carry two streams and return the text before the image (SD3, Flux). Which part is which is told by the
   shapes, and by that order where text and image are of one length.
3. Everything is worked on as [b, t, d]: images [b, c, h, w] have h * w positions; flattened tensors [b * t, d] are unfolded.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

from overhaul.errors import RequestError

Stream = Literal["hidden_states", "encoder_hidden_states"]
"""The keyword under which a block takes a stream: the only or the image stream, or the text stream of a joint block."""

MAIN: Stream = "hidden_states"
TEXT: Stream = "encoder_hidden_states"


def argument(module: nn.Module, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The argument `name` of a call, given by keyword or by position; None if it was not given.

    A block whose forward names its arguments otherwise takes the stream first.
    """
    if name in kwargs:
        return kwargs[name]
    place = _slot(module, name)
    return args[place] if place is not None and place < len(args) else None


def with_argument(
    module: nn.Module, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], value: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same call with another argument `name`, which must have been given."""
    if name in kwargs:
        return args, {**kwargs, name: value}
    place = _slot(module, name)
    return tuple(value if n == place else old for n, old in enumerate(args)), dict(kwargs)


def takes(module: nn.Module, name: str) -> bool:
    """Whether the module's forward names an argument so."""
    return name in _names(type(module))


def parts(output: Any) -> tuple[Any, ...]:
    """What a module returned, as a tuple: also what an output of transformers or diffusers holds by name."""
    if isinstance(output, Mapping):
        return tuple(output.values())
    return tuple(output) if isinstance(output, tuple | list) else (output,)


def with_parts(output: Any, values: Mapping[int, Tensor]) -> Any:
    """What a module returned, in its own form, with other values at these indices."""
    if isinstance(output, Mapping):
        changed: Any = copy.copy(output)
        for n, name in enumerate(output):
            if n in values:
                changed[name] = values[n]
        return changed
    if not isinstance(output, tuple | list):
        return values.get(0, output)
    return type(output)([values.get(n, old) for n, old in enumerate(output)])


def first_tensor(output: Any) -> int | None:
    """The index of the first tensor in what a module returned."""
    return next((n for n, part in enumerate(parts(output)) if isinstance(part, Tensor)), None)


def first_of(name: str, did: str, given: Any) -> Tensor:
    """The first tensor in what a module returned or was given.

    Raises:
        RequestError: there is none.
    """
    index = first_tensor(given)
    if index is None:
        kinds = ", ".join(type(part).__name__ for part in parts(given)) or "nothing"
        raise RequestError(
            f"{name} {did} no tensor ({kinds}), so there is no state. Name a module inside or around it."
        )
    return parts(given)[index]


def leaving(block: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> dict[str, int]:
    """Where the streams lie in what a block returned: {"hidden_states": index}, for a joint block the text stream too."""
    found = parts(output)
    main, text = argument(block, MAIN, args, kwargs), argument(block, TEXT, args, kwargs)
    if isinstance(text, Tensor) and len(found) == 2:
        for image_at, text_at in ((1, 0), (0, 1)):
            dropped = found[text_at] is None and text_at == 0  # SD3's last block has done with the text
            if _fits(found[image_at], main) and (dropped or _fits(found[text_at], text)):
                return {MAIN: image_at} if dropped else {MAIN: image_at, TEXT: text_at}
    return {MAIN: next((n for n, part in enumerate(found) if _fits(part, main)), 0)}


def as_rows(value: Tensor, stream: torch.Size | None, name: str) -> Tensor:
    """A tensor as [b, t, d].

    Args:
        value: [b, t, d], [b, c, h, w], or [b * t, d].
        stream: the shape of the stream in the same pass, if it is known.
        name: where the tensor was met, for the error message.

    Raises:
        RequestError: it has another shape, so its positions cannot be told.
    """
    if value.ndim == 3:
        return value
    if value.ndim == 4 and (stream is None or len(stream) == 4):
        return value.flatten(2).transpose(1, 2)
    if value.ndim == 2 and stream is not None and len(stream) == 3 and len(value) == stream[0] * stream[1]:
        return value.view(stream[0], stream[1], -1)
    raise RequestError(
        f"{name} gives a tensor of the shape {tuple(value.shape)}, whose samples and positions cannot be told. Name a "
        "module that gives [batch, positions, width]."
    )


def from_rows(rows: Tensor, like: Tensor) -> Tensor:
    """The inverse of `as_rows`."""
    return rows.transpose(1, 2).reshape(like.shape) if like.ndim == 4 else rows.reshape(like.shape)


def _slot(module: nn.Module, name: str) -> int | None:
    names = _names(type(module))
    if name in names:
        return names.index(name)
    return 0 if name == MAIN else None


@cache
def _names(kind: type[nn.Module]) -> tuple[str, ...]:
    """The names of the arguments of a forward, without `self`, `*args` and `**kwargs`."""
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    values = list(inspect.signature(kind.forward).parameters.values())[1:]
    return tuple(value.name for value in values if value.kind not in variable)


def _fits(part: Any, like: Any) -> bool:
    return isinstance(part, Tensor) and isinstance(like, Tensor) and part.shape == like.shape
