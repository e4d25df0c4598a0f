"""The primitives of `trace.intervene`: what can be done to a state, and to which of its positions and samples.

1. Arithmetic is done in float32 (float64 stays float64) and rounded once to the state's dtype; positions that are not
   selected keep their bits.
2. Values broadcast from the right to [b, t, d], as in torch: [d] for all positions, [t, d] for all samples, [b, 1, d] for
   one a sample. Their last dimension must be the width; one number for all features is most likely a mistake.
3. No gradient is cut: what is done to a state can be trained through.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from overhaul.errors import RequestError
from overhaul.trace.streams import (
    Stream,
    argument,
    as_rows,
    first_of,
    first_tensor,
    from_rows,
    leaving,
    parts,
    with_argument,
    with_parts,
)
from overhaul.trace.where import EVERYWHERE, Site, Where, described


@dataclass(frozen=True, eq=False)
class Replace:
    """state := value."""

    value: Float[Tensor, "... d"]
    where: Where = EVERYWHERE


@dataclass(frozen=True, eq=False)
class Add:
    """state := state + value. The push of a steering direction is part of the value."""

    value: Float[Tensor, "... d"]
    where: Where = EVERYWHERE


@dataclass(frozen=True, eq=False)
class ProjectOut:
    """state := state without its part in the span of these directions, [d] or [k, d], of any length."""

    directions: Float[Tensor, "... d"]
    where: Where = EVERYWHERE

    @cached_property
    def basis(self) -> Float[Tensor, "d r"]:
        """Orthonormal directions of the same span, in float64; dependent ones count once."""
        rows = torch.atleast_2d(self.directions.detach()).double().cpu()
        _, sizes, basis = torch.linalg.svd(rows, full_matrices=False)
        return basis[sizes > sizes.max() * 1e-6].T


@dataclass(frozen=True, eq=False)
class Interpolate:
    """state := (1 - weight) * state + weight * value; exactly either at weight 0 and 1."""

    value: Float[Tensor, "... d"]
    weight: float
    where: Where = EVERYWHERE


@dataclass(frozen=True, eq=False)
class Skip:
    """The block leaves its input as it is: what leaves := what entered, in both streams of a joint block if everywhere."""

    where: Where = EVERYWHERE


@dataclass(frozen=True, eq=False)
class Zero:
    """state := 0."""

    where: Where = EVERYWHERE


Primitive = Replace | Add | ProjectOut | Interpolate | Skip | Zero


def given(edit: Any) -> Tensor | None:
    """The tensor that an edit was made with."""
    if isinstance(edit, ProjectOut):
        return edit.directions
    return edit.value if isinstance(edit, Replace | Add | Interpolate) else None


def check(edit: Any, width: int | None, name: str) -> None:
    """Refuse what cannot be right whatever runs.

    Raises:
        RequestError: no primitive, or `Skip` where no block ends; a value that is no tensor of finite numbers, a zero
            direction, or not of the stream's width.
    """
    value, kind = given(edit), type(edit).__name__
    if not isinstance(edit, Primitive):
        kinds = ", ".join(kind.__name__ for kind in (Replace, Add, ProjectOut, Interpolate, Skip, Zero))
        raise RequestError(f"The edit of {name} is a {kind}; it must be one of {kinds}.")
    if isinstance(edit, Skip) and not name.startswith("leaving."):
        raise RequestError(f'Skip belongs to a block: write it at "leaving.N", not at {name}, or use Zero here.')
    if isinstance(edit, Interpolate) and not math.isfinite(edit.weight):
        raise RequestError(f"Interpolate for {name} was given the weight {edit.weight}.")
    if value is None:
        return
    if not isinstance(value, Tensor) or not value.is_floating_point() or not value.ndim:
        raise RequestError(f"{kind} for {name} needs a tensor of floats [..., width], not {described(value)}.")
    if not bool(torch.isfinite(value).all()):
        raise RequestError(f"{kind} for {name} was given values that are not finite.")
    if width is not None and value.shape[-1] != width:
        raise RequestError(f"{kind} for {name} was given {described(value)}, but the stream is {width} wide.")
    if isinstance(edit, ProjectOut):
        if value.ndim > 2:
            raise RequestError(f"ProjectOut for {name} takes directions [d] or [k, d], not {described(value)}.")
        if not bool(value.any()):
            raise RequestError(f"ProjectOut for {name} was given a direction of length zero, which removes nothing.")


def check_fit(edit: Primitive, shape: torch.Size, site: Site) -> None:
    """Refuse an edit that does not fit a state of this shape, [b, t, d].

    Raises:
        RequestError: the selection or the value does not fit.
    """
    region = edit.where.region(shape, site, torch.device("cpu"))
    value = given(edit)
    if value is None or (region is not None and not bool(region.any())):
        return
    fits = value.shape[-1] == shape[2]
    if fits and not isinstance(edit, ProjectOut):
        try:
            fits = torch.broadcast_shapes(value.shape, shape) == shape
        except RuntimeError:
            fits = False
    if not fits:
        raise RequestError(
            f"{type(edit).__name__} for {site.name} was given {described(value)}, which does not fit a state of the shape "
            f"{tuple(shape)} ([samples, positions, width])."
        )


def apply(edit: Primitive, state: Tensor, entered: Tensor | None, site: Site) -> Tensor | None:
    """The state after an edit; None where none of its positions is among those of the state.

    Args:
        edit: what is done.
        state: [b, t, d].
        entered: what entered the block, for `Skip`, [b, t, d].
        site: where.

    Raises:
        RequestError: the edit does not fit, or makes what the state's dtype cannot hold.
    """
    check_fit(edit, state.shape, site)
    region = edit.where.region(state.shape, site, state.device)
    if region is not None and not bool(region.any()):
        return None
    changed = _changed(edit, state, entered).to(state.dtype).expand_as(state)
    result = changed if region is None else torch.where(region[..., None], changed, state)
    if bool((state.isfinite() & ~result.isfinite()).any()):
        raise RequestError(
            f"{type(edit).__name__} for {site.name} makes values that {state.dtype} cannot hold (it ends at "
            f"{torch.finfo(state.dtype).max:g}). Open the model in bfloat16 or float32, or make a smaller change."
        )
    return result


def _changed(edit: Primitive, state: Tensor, entered: Tensor | None) -> Tensor:
    wide = torch.promote_types(state.dtype, torch.float32)
    match edit:
        case Replace(value):
            # a copy: some models go on working in it
            return value.to(state.device, state.dtype).expand_as(state).clone()
        case Add(value):
            return state.to(wide) + value.to(state.device, wide)
        case ProjectOut():
            basis = edit.basis.to(wide).to(state.device)
            return state.to(wide) - (state.to(wide) @ basis) @ basis.T
        case Interpolate(value, weight):
            return (1 - weight) * state.to(wide) + weight * value.to(state.device, wide)
        case Zero():
            return torch.zeros_like(state)
        case Skip():
            assert entered is not None
            return entered


def edit_module(chain: Sequence[Primitive], site: Site, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
    """A hook after a module: its first tensor edited, in the form in which the module returned it."""
    value = first_of(site.name, "returned", output)
    return with_parts(output, {first_tensor(output) or 0: _edited(chain, site, value, site.shape.value)})


def edit_entering(
    chain: Sequence[Primitive], site: Site, stream: Stream, block: nn.Module, args: Any, kwargs: Any
) -> Any:
    """A hook before a block: the call with its stream edited."""
    value = argument(block, stream, args, kwargs)
    return with_argument(block, stream, args, kwargs, _edited(chain, site, value, None))


def edit_leaving(
    chain: Sequence[Primitive], site: Site, stream: Stream, block: nn.Module, args: Any, kwargs: Any, output: Any
) -> Any:
    """A hook after a block: what it returned, in its own form, with its stream edited."""
    at = leaving(block, args, kwargs, output)
    value = parts(output)[at[stream]] if stream in at else None
    changed = {at.get(stream, 0): _edited(chain, site, value, None, argument(block, stream, args, kwargs))}
    if any(isinstance(edit, Skip) and edit.where.everything for edit in chain):
        changed |= {n: argument(block, other, args, kwargs) for other, n in at.items() if other != stream}
    return with_parts(output, changed)


def _edited(
    chain: Sequence[Primitive], site: Site, value: Any, shape: torch.Size | None, entered: Any = None
) -> Tensor:
    if not isinstance(value, Tensor):
        raise RequestError(f"{site.name} has no such stream, so there is nothing to edit.")
    rows = as_rows(value, shape, site.name)
    before = as_rows(entered, shape, site.name) if isinstance(entered, Tensor) else None
    for number, edit in enumerate(chain):
        if isinstance(edit, Skip) and (before is None or before.shape != rows.shape):
            raise RequestError(
                f"{site.name} has another shape than what entered the block, so the block cannot be skipped."
            )
        changed = apply(edit, rows, before, site)
        if changed is not None:
            rows = changed
            site.reached.add((site.name, number))
    return from_rows(rows, value)
