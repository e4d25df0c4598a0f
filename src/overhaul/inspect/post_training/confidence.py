"""Confidence (part D): entropy neurons of the last block, which write much and move no logit more than another.

v_j = Var_k cos(w_j, g * U_k)      w_j what neuron j writes, U_k the head's row of word k, g the gain of the last norm
among the neurons with the largest |w_j|, those with the smallest v_j
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt, Le
from jaxtyping import Float
from torch import Tensor, nn

from overhaul.errors import RequestError
from overhaul.forward import output_head
from overhaul.method import Table
from overhaul.selectors import select
from overhaul.stack import LayerStack

ROWS = 4096
"""Words whose logits are had at once."""


@dataclass(frozen=True)
class Confident:
    """Which neurons count as entropy neurons.

    Attributes:
        neurons: how many.
        loudest: the share of the neurons, by the norm of what they write, among which they are.
    """

    neurons: Annotated[int, Ge(1)] = 10
    loudest: Annotated[float, Gt(0), Le(1)] = 0.25


@dataclass
class Confidence:
    """The part that reads the last block's weights.

    Attributes:
        norms: model -> |w_j|, [n].
        variances: model -> v_j, [n].
    """

    confident: Confident
    norms: dict[str, Tensor] = field(default_factory=dict)
    variances: dict[str, Tensor] = field(default_factory=dict)

    def read(self, role: str, model: nn.Module) -> None:
        """Keep what is known of a model's neurons.

        Raises:
            RequestError: the last block has no MLP with one writing matrix, or the model has no head.
        """
        self.norms[role], self.variances[role] = neurons_of(model)

    def longest(self) -> int:
        """No text is read."""
        return 0

    def chosen(self, role: str) -> list[int]:
        """The entropy neurons, the one with the smallest variance first."""
        loud = self._loud(role)
        return loud[self.variances[role][loud].argsort(stable=True)][: self.confident.neurons].tolist()

    def _loud(self, role: str) -> Tensor:
        count = max(self.confident.neurons, round(self.confident.loudest * len(self.norms[role])))
        return self.norms[role].argsort(descending=True, stable=True)[:count]

    def ratio(self, role: str, neuron: int) -> float:
        """|w_j| / log v_j."""
        return float(self.norms[role][neuron] / self.variances[role][neuron].clamp_min(1e-30).log())

    def facts(self) -> dict[str, float | int | None]:
        """Overlap of the two sets, beside that of two sets drawn from the loudest, each from its model's own."""
        one, other = (set(self.chosen(role)) for role in self.norms)
        loud, also = (set(self._loud(role).tolist()) for role in self.norms)
        size = len(one)
        expected = len(loud & also) * (size / len(loud)) * (size / len(also))
        return {
            "confidence_iou": len(one & other) / len(one | other),
            "confidence_iou_by_chance": expected / (2 * size - expected),
        }

    def layers(self) -> dict[str, dict[int, float]]:
        """Nothing by block."""
        return {}

    def tables(self) -> dict[str, Table]:
        """The neurons of either set, and all of both as points."""
        roles = list(self.norms)
        sets = {role: self.chosen(role) for role in roles}
        rows = []
        for neuron in sorted({one for chosen in sets.values() for one in chosen}):
            among = " and ".join(role for role in roles if neuron in sets[role])
            values = [
                value
                for role in roles
                for value in (
                    float(self.norms[role][neuron]),
                    float(self.variances[role][neuron]),
                    self.ratio(role, neuron),
                )
            ]
            rows.append((neuron, among, *values))
        columns = [
            f"{what}, {role}" for role in roles for what in ("norm", "variance over words", "norm / log variance")
        ]
        return {
            "confidence: entropy neurons of the last block": Table(("neuron", "among those of", *columns), tuple(rows))
        }


@torch.no_grad()
def neurons_of(model: nn.Module) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Norm of what each neuron of the last MLP writes, and the variance over words of its cosine with the head's rows.

    Raises:
        RequestError: the last block has no MLP with one writing matrix, or the model has no head.
    """
    stack = LayerStack.of(model)
    head = output_head(model)
    if head is None:
        raise RequestError(f"{type(model).__name__} has no output head.")
    part = select(stack, "mlp.down", blocks=[len(stack) - 1]).parts[0]
    weight = model.get_submodule(part.module).get_parameter("weight")
    written = F.normalize(
        weight.float() if part.axis == 0 else weight.float().T, dim=0
    )  # [d, n], a neuron in each column
    norms = weight.float().norm(dim=0 if part.axis == 0 else 1)
    gain, centred = last_norm(stack)
    words: Tensor = head.get_parameter("weight")
    total, squares = (torch.zeros(len(norms), dtype=torch.float64) for _ in range(2))
    for n in range(0, len(words), ROWS):
        rows = words[n : n + ROWS].float() * gain
        rows = F.normalize(rows - rows.mean(1, keepdim=True) if centred else rows, dim=1)
        cosines = (rows @ written).double().cpu()
        total += cosines.sum(0)
        squares += cosines.square().sum(0)
    mean = total / len(words)
    return norms.cpu(), (squares / len(words) - mean.square()).clamp_min(0).float()


@torch.no_grad()
def last_norm(stack: LayerStack) -> tuple[Float[Tensor, " d"], bool]:
    """What the norm behind the last block multiplies each feature with, and whether it takes the mean away first.

    Both are told by what it does to a vector of mean 0 and square 1, so a gain that is stored as w - 1 is no other case.
    """
    parts = [part for part in select(stack, "norms").parts if part.depth == len(stack)]
    norm = stack.model.get_submodule(parts[-1].module) if parts else nn.Identity()
    some = next(stack.model.parameters())
    width = int(getattr(stack.config, "hidden_size", 0)) or some.shape[-1]
    signs = torch.ones(width, device=some.device, dtype=some.dtype)
    signs[1::2] = -1
    up, down, shifted = norm(torch.stack([signs, -signs, signs + 1])).float()
    return (up - down) / 2 * signs.float(), bool(torch.allclose(shifted, up, atol=1e-3))
