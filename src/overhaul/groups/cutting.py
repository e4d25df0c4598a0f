"""Take units out for good: a smaller network that says what the masked one said."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from overhaul.errors import RequestError
from overhaul.groups.configs import Search
from overhaul.groups.finding import Group, groups, tensor_of
from overhaul.groups.masking import mask_of, masked
from overhaul.groups.reach import Axis
from overhaul.groups.shapes import fit_sizes
from overhaul.modes import at_rest, uncompiled
from overhaul.parts import probe
from overhaul.stack import LayerStack
from overhaul.stack.arrangement import is_hub_model
from overhaul.stack.calls import invoke

_OF_MODULES = ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set")


def cut(model: nn.Module, keep: Mapping[Group, Tensor], *, inputs: Mapping[str, Any] | None = None) -> None:
    """Take units out, in place: the model is then a plain, smaller one of its class, which its config describes.

    Args:
        model: the network that the groups are of; they are of it no longer when it has been cut.
        keep: for each group which of its units stay [size], as booleans.
        inputs: as for `groups`: on them the cut model is compared with the masked one.

    Raises:
        RequestError: a mask does not fit, no config describes a model of these sizes, or such a model does not say what the
            masked one says. The model is then as it was.
    """
    if isinstance(getattr(model, "config", None), dict):
        raise RequestError(
            f"{type(model).__name__} is a model of diffusers, whose config is not changed here; `cut_copy` makes a smaller "
            "network that stays in memory."
        )
    masks = {group: mask_of(model, group, mask) for group, mask in keep.items()}
    inputs = probe(model) if inputs is None else inputs
    with masked(model, masks):
        expected = _said(model, inputs)
    tensors = _cut(model, masks)
    if is_hub_model(model):
        _rebuild(model, tensors, masks, inputs, expected)
        return
    smaller = _with(model, tensors)  # the old one stays whole until the new one is known to be right
    _compare(smaller, inputs, expected)
    vars(model).update({name: vars(smaller)[name] for name in _OF_MODULES})


def cut_copy(
    model: nn.Module, keep: Mapping[Group, Tensor], *, inputs: Mapping[str, Any] | None = None, checked: bool = True
) -> nn.Module:
    """A smaller copy, of whatever sizes: one to work with, which no `from_pretrained` need be able to load.

    Args:
        model: as for `cut`; it stays as it is.
        keep: as for `cut`.
        inputs: as for `cut`.
        checked: compare the copy with the masked model.

    Raises:
        RequestError: a mask does not fit, or the copy does not say what the masked model says.
    """
    masks = {group: mask_of(model, group, mask) for group, mask in keep.items()}
    smaller = _with(model, _cut(model, masks))
    if checked:
        inputs = probe(model) if inputs is None else inputs
        with masked(model, masks):
            expected = _said(model, inputs)
        _compare(smaller, inputs, expected)
    return smaller


def _cut(model: nn.Module, masks: Mapping[Group, Tensor]) -> dict[str, Tensor]:
    """The tensors that change, by name, as they are without the units."""
    stay: dict[Axis, Tensor] = {}  # several groups may own something of one axis
    for group, mask in masks.items():
        for part in group.slices:
            kept = torch.zeros(len(part.units), dtype=torch.bool)
            kept[part.kept(mask)] = True
            axis = part.tensor, part.axis
            stay[axis] = stay.get(axis, kept) & kept
    found: dict[str, Tensor] = {}
    for (name, axis), kept in stay.items():
        tensor = found.get(name, tensor_of(model, name).detach())
        if not bool(kept.all()):
            found[name] = tensor.index_select(axis, kept.nonzero()[:, 0].to(tensor.device))
    return found


def _with(model: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A copy with other tensors, whatever its config says."""
    known = {id(tensor_of(model, name)): tensor for name, tensor in tensors.items()}
    memo: dict[int, Any] = {}
    for parameter in [*model.parameters(), *model.buffers()]:
        if (new := known.get(id(parameter))) is not None:
            needed = parameter.requires_grad
            memo[id(parameter)] = nn.Parameter(new, needed) if isinstance(parameter, nn.Parameter) else new
    smaller = copy.deepcopy(model, memo)
    for module in {name.rpartition(".")[0] for name in tensors}:
        fit_sizes(smaller.get_submodule(module))
    return smaller


def _rebuild(
    model: Any,
    tensors: Mapping[str, Tensor],
    masks: Mapping[Group, Tensor],
    inputs: Mapping[str, Any],
    expected: list[Tensor],
) -> None:
    """Let the model be what its class builds from a config of these sizes."""
    state = model.state_dict(keep_vars=True)
    by_tensor = {id(tensor_of(model, name)): tensor for name, tensor in tensors.items()}
    new: dict[str, Tensor] = {}
    for name, tensor in state.items():
        smaller = by_tensor.get(id(tensor))
        new[name] = tensor.detach() if smaller is None else smaller
    wanted = {name: tuple(tensor.shape) for name, tensor in new.items()}
    search = Search(model, wanted, sorted({Fraction(int(mask.sum()), group.size) for group, mask in masks.items()}))
    before, wrong = dict(vars(model)), None
    for _ in search.found():
        try:
            _adopt(model, new)
            _compare(model, inputs, expected)
            _count(model, masks, inputs)
            return
        except RequestError as error:
            wrong = error
            vars(model).clear()
            vars(model).update(before)
    raise wrong or RequestError(_undescribed(model, search, wanted, masks))


def _undescribed(model: Any, search: Search, wanted: Any, masks: Mapping[Group, Tensor]) -> str:
    counts = {int(mask.sum()) for mask in masks.values()}
    name, shape = next(iter(search.nearest.items()))
    said = f"where it would have {list(shape)}" if shape else "which it would not have"
    uneven = " Keep as many in every block." if len(counts) > 1 else ""
    return (
        f"No config of {type(model).__name__} describes what would be left, so it would not load: {name} has the shape "
        f"{list(wanted[name])} then, {said} under the nearest config there is.{uneven} `cut_copy` makes a network that "
        "stays in memory; `masked` needs no other shapes."
    )


def _adopt(model: Any, state: Mapping[str, Tensor]) -> None:
    """Let the model have the modules that its class builds from its config, with these tensors in them."""
    from transformers.initialization import no_init_weights

    options = {"attn_implementation": model.config._attn_implementation} if model.config._attn_implementation else {}
    config = type(model.config).from_dict(model.config.to_dict(), **options)
    config._name_or_path = getattr(model.config, "_name_or_path", "")
    device = next(model.parameters()).device
    needed = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    modes = {name: module.training for name, module in model.named_modules()}
    with no_init_weights(), torch.random.fork_rng(devices=[]):
        built = type(model)(config)
    built.load_state_dict(dict(state), strict=True, assign=True)
    built.tie_weights()
    built.to(device)
    for name, parameter in built.named_parameters():
        parameter.requires_grad_(needed[name])
    for name, module in built.named_modules():
        module.training = modes[name]
    kept = ("generation_config", "name_or_path")
    new = {name: value for name, value in vars(built).items() if name in _OF_MODULES or not name.startswith("_")}
    vars(model).update({name: value for name, value in new.items() if name not in kept})


def _count(model: nn.Module, masks: Mapping[Group, Tensor], inputs: Mapping[str, Any]) -> None:
    """Refuse a model with other heads than those that stay: their number cannot be told from a shape."""
    for path in {group.stack for group in masks if group.unit == "attention.head"}:
        found = {
            group.depth: group.size for group in groups(LayerStack.at(model, path), "attention.head", inputs=inputs)
        }
        for group, mask in masks.items():
            if group.stack == path and group.unit == "attention.head" and found.get(group.depth) != int(mask.sum()):
                raise RequestError(
                    f"Of the heads of block {group.depth}, {int(mask.sum())} would stay; a {type(model).__name__} of these "
                    f"sizes has {found.get(group.depth)}. `masked` needs no other sizes."
                )


@torch.no_grad()
def _said(model: nn.Module, inputs: Mapping[str, Any]) -> list[Tensor]:
    """The numbers that a model returns."""
    with at_rest(model), uncompiled(), torch.random.fork_rng(devices=[]):
        result = invoke(model, inputs)
    leaves = tree_leaves(dict(result) if isinstance(result, Mapping) else result)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _compare(model: nn.Module, inputs: Mapping[str, Any], expected: list[Tensor]) -> None:
    """Refuse a cut model that does not say what the masked one said.

    Raises:
        RequestError: with the difference.
    """
    try:
        said = _said(model, inputs)
    except (RuntimeError, ValueError, IndexError, ZeroDivisionError) as error:
        raise RequestError(
            f"{type(model).__name__} does not run with these sizes ({error}); it works out more from them than its tensors."
        ) from None
    for one, other in zip(said, expected, strict=True):
        apart = float((one.float() - other.float()).abs().max()) if one.shape == other.shape else float("inf")
        allowed = (100 if other.dtype == torch.float32 else 8) * torch.finfo(other.dtype).eps * float(other.abs().max())
        if not apart <= allowed:
            raise RequestError(
                f"Cut, {type(model).__name__} would not say what it says masked (they differ by {apart:.2g}): it works out "
                "something else from these sizes, such as a scale or a slope for each head. `masked` needs no other sizes."
            )
