"""Let units be as if they were not there, and put them back: what reads them reads nothing of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from overhaul.errors import RequestError
from overhaul.groups.finding import Group, tensor_of
from overhaul.groups.shapes import fit_sizes
from overhaul.parts import is_norm
from overhaul.stack.arrangement import shell


@contextmanager
def masked(model: nn.Module, keep: Mapping[Group, Tensor]) -> Iterator[None]:
    """Inside it, the model says what it would say without the units that do not stay. Training would undo the mask.

    Args:
        model: the network that the groups are of.
        keep: for each group which of its units stay [size], as booleans.

    Raises:
        RequestError: a group is of another network, or a mask does not fit it or leaves nothing of it.
    """
    checked = {group: mask_of(model, group, mask) for group, mask in keep.items()}
    with ExitStack() as undo:
        for group, mask in checked.items():
            for name, kept in _norms(model, group, mask).items():
                _take_over(undo, model.get_submodule(name), kept)
            for part in group.slices:
                if part.reads:
                    tensor = tensor_of(model, part.tensor).data
                    gone = _without(part.kept(mask), tensor.shape[part.axis]).to(tensor.device)
                    undo.callback(tensor.index_copy_, part.axis, gone, tensor.index_select(part.axis, gone))
                    tensor.index_fill_(part.axis, gone, 0)
        yield


def mask_of(model: nn.Module, group: Group, mask: Tensor) -> Tensor:
    """A mask that fits its group, which is of the model, on the CPU.

    Raises:
        RequestError: it does not, or the group is of another model.
    """
    group.check_of(model)
    mask = torch.as_tensor(mask).cpu()
    if mask.dtype != torch.bool or tuple(mask.shape) != (group.size,):
        raise RequestError(
            f"What stays of the {group.size} units ({group.where}) is said by {group.size} booleans [{group.size}], not by "
            f"{list(mask.shape)} of {str(mask.dtype).removeprefix('torch.')}."
        )
    if not bool(mask.any()):
        raise RequestError(f"Nothing of the {group.size} units ({group.where}) would stay; keep one.")
    return mask


def _without(kept: Tensor, size: int) -> Tensor:
    gone = torch.ones(size, dtype=torch.bool)
    gone[kept] = False
    return gone.nonzero()[:, 0]


def _norms(model: nn.Module, group: Group, mask: Tensor) -> dict[str, Tensor]:
    """The norms that take statistics over units, with the channels that stay."""
    vectors = [part for part in group.slices if not part.reads and tensor_of(model, part.tensor).ndim == 1]
    owners = {part.tensor.rpartition(".")[0]: part.kept(mask) for part in vectors}
    return {
        name: kept
        for name, kept in owners.items()
        if not isinstance(model.get_submodule(name), nn.modules.batchnorm._NormBase)
        and is_norm(model.get_submodule(name))
    }


def _take_over(undo: ExitStack, norm: nn.Module, kept: Tensor) -> None:
    """Let a norm see only the channels that stay, and give zeros for the others."""
    small: Any = shell(norm)
    size = max(len(parameter) for parameter in norm.parameters(recurse=False))
    for name, value in [*norm.named_parameters(recurse=False), *norm.named_buffers(recurse=False)]:
        if value.ndim == 1 and len(value) == size:
            at = kept.to(value.device)
            small._parameters.pop(name, None)
            small._buffers[name] = value.detach()[at]
    fit_sizes(small)

    def forward(state: Tensor) -> Tensor:
        at = kept.to(state.device)
        given = small(state.index_select(-1, at))
        return torch.zeros_like(state, dtype=given.dtype).index_copy(-1, at, given)

    own = vars(norm).get("forward")
    undo.callback(lambda: vars(norm).pop("forward", None) if own is None else setattr(norm, "forward", own))
    norm.forward = forward
