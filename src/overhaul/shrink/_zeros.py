"""What is trained of a pruned model, by parts, and where its zeros are; shared by the steps that follow pruning."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt
from torch import Tensor, nn

from overhaul import session
from overhaul.adapters import projections
from overhaul.errors import RequestError
from overhaul.masked import Form, masked
from overhaul.selectors import Selection, select

Trains = Literal["biases", "norms", "head", "adapters", "weights"]


@dataclass(frozen=True)
class Parts:
    """What trains of a pruned model, and how its zeros are kept.

    Attributes:
        trains: one or more of "biases", "norms", "head" (adapters on the output layer), "adapters" (on every projection in
            the blocks), or "weights" (the projections themselves).
        form: of the adapters: "mask_lora", W + c M * (B A); "scale_lora", W * (B A), of which the rate must be small;
            "lora_prune", trained as LoRA and masked at the end; "lora", which fills the zeros.
        rank: of the adapters.
        alpha: of the adapters: c = alpha / rank.
    """

    trains: Sequence[Trains] = ("biases", "norms", "head", "adapters")
    form: Literal["mask_lora", "scale_lora", "lora_prune", "lora"] = "mask_lora"
    rank: Annotated[int, Ge(1)] = 16
    alpha: Annotated[float, Gt(0)] = 32.0

    @property
    def projected(self) -> Form | None:
        """What becomes of the projections' weights; None where they stay."""
        return "weights" if "weights" in self.trains else self.form if "adapters" in self.trains else None


def zeros(method: str, model: nn.Module, masks: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """The masks of the projections in the blocks, 0 where a weight is pruned: as given, or where it is 0 now.

    Raises:
        RequestError: a mask is of no weight of this model, a weight that it holds at 0 is not, or nothing is pruned.
    """
    held = dict(model.named_parameters())
    if masks is not None and not masks:
        raise RequestError(
            f"{method}: `masks` holds none. Name what shrink.prune made, or leave it out: zeros are kept then."
        )
    for name, mask in (masks or {}).items():
        if name not in held or held[name].shape != mask.shape or mask.ndim != 2:
            has = f"{tuple(held[name].shape)}" if name in held else "no such weight"
            raise RequestError(
                f"{method}: the mask of {name!r} is {tuple(mask.shape)}, and the model has {has} there. Masks belong to the "
                "network that was pruned; name those of the last shrink.prune."
            )
    session.begins()  # what follows reads the weights
    if masks is None:
        masks = {name: held[name].detach() != 0 for name in map("{}.weight".format, projections(model))}
    if all(bool(mask.all()) for mask in masks.values()):
        raise RequestError(
            f"{method}: no weight of the projections is 0, so nothing was pruned that could be kept. Prune first "
            "(shrink.prune), or train all of it with shrink.heal."
        )
    for name, mask in masks.items():
        if bool((held[name].detach()[mask == 0] != 0).any()):
            raise RequestError(
                f"{method}: {name} is not 0 where its mask says that it was pruned: a step in between filled the zeros. "
                "Put this step right after the pruning, or leave `masks` out."
            )
    return dict(masks)


@dataclass(frozen=True)
class Chosen:
    """What trains, by name: parameters as they are, layers in the blocks, and layers of the head."""

    plain: Sequence[str]
    layers: Sequence[str]
    head: Sequence[str]

    @classmethod
    def of(cls, method: str, model: nn.Module, parts: Parts, blocks: str = "all") -> Chosen:
        """What the parts are in these blocks.

        Raises:
            RequestError: the model has none of them.
        """
        if {"weights", "adapters"} <= set(parts.trains):
            raise RequestError(
                f"{method}: trains names weights and adapters, which are two ways to train the same projections. Leave one "
                "out."
            )
        wanted = [role for role in ("biases", "norms", "head") if role in parts.trains]
        found = {role: _found(model, role, "all" if role == "head" else blocks) for role in wanted}
        plain = [name for role, one in found.items() if one and role != "head" for name in one.parameters]
        head = one.modules if (one := found.get("head")) else []
        inside = set(select(model, "projections", blocks).modules) if parts.projected else set[str]()
        layers = [name for name in projections(model) if name in inside] if parts.projected else []
        head = [name for name in head if getattr(getattr(model.get_submodule(name), "weight", None), "ndim", 0) == 2]
        if not (plain or layers or head):
            if not parts.trains:
                raise RequestError(
                    f"{method}: trains is empty, so nothing would train. Write trains: [norms, adapters]."
                )
            raise RequestError(
                f"{method}: trains={list(parts.trains)} names nothing that {type(model).__name__} has: no "
                f"{' or '.join(wanted)}. Write trains: [norms, adapters]."
            )
        return cls(plain, layers, head)


def _found(model: nn.Module, role: str, blocks: str) -> Selection | None:
    """A selection; None where the model has no such role."""
    try:
        return select(model, role, blocks)
    except RequestError:
        return None


@contextmanager
def training_parts(
    model: nn.Module, chosen: Chosen, parts: Parts, masks: Mapping[str, Tensor]
) -> Iterator[dict[str, nn.Parameter]]:
    """Inside the `with`, only the parts require gradients, and are given by name; afterwards what did before."""
    needed = {name: p.requires_grad for name, p in model.named_parameters()}
    try:
        with ExitStack() as undo:
            model.requires_grad_(False)
            factors = {"rank": parts.rank, "alpha": parts.alpha}
            if parts.projected:
                undo.enter_context(masked(model, chosen.layers, parts.projected, masks, **factors))
            if chosen.head:
                undo.enter_context(masked(model, chosen.head, "lora", {}, **factors))
            for name in chosen.plain:
                model.get_parameter(name).requires_grad_(True)
            yield {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(needed[name])


def share_of_zeros(model: nn.Module, masks: Mapping[str, Tensor]) -> float:
    """Of the matrices that have a mask."""
    weights = [model.get_parameter(name) for name in masks]
    return sum(int((one == 0).sum()) for one in weights) / sum(one.numel() for one in weights)


def as_made(masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Masks as a product: uint8, 0 for each pruned weight."""
    return {name: (mask != 0).to("cpu", torch.uint8) for name, mask in masks.items()}
