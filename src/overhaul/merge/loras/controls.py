"""What a merge is held against: a pool of random matrices of the same size, and routing without training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from overhaul.adapter_folders import LowRank
from overhaul.merge.loras.layers import Adapter, Mixed, changed_by, concatenated


def redrawn(experts: Sequence[Adapter], draw: torch.Generator) -> list[dict[str, LowRank]]:
    """Adapters of the same ranks and scales with entries from N(0, std^2): in every layer the standard deviation of the
    concatenated A, and of the concatenated B.
    """
    found: list[dict[str, LowRank]] = [{} for _ in experts]
    for name in changed_by(experts):
        pool = concatenated([expert[name] for expert in experts if name in expert])
        a, b = (
            float(each.std()) * torch.randn(each.shape, generator=draw).to(each.device) for each in (pool.a, pool.b)
        )
        start = 0
        for expert, new in zip(experts, found, strict=True):
            if name in expert:
                rows = slice(start, start + expert[name].rank)
                new[name] = LowRank(a[rows], b[:, rows], expert[name].scale)
                start = rows.stop
    return found


class Arrow(nn.Module):
    """Weights for each token: the softmax over adapters of |v_i . x|, v_i the first right singular vector of s_i B_i A_i.

    An adapter that leaves the layer alone has no weight there. Not trained.
    """

    def __init__(self, parts: Sequence[LowRank]) -> None:
        super().__init__()
        ranks = torch.tensor([part.rank for part in parts])
        self.prototypes = nn.Parameter(torch.stack([prototype(part) for part in parts]), requires_grad=False)
        self.scale = nn.Parameter(torch.cat([part.scale for part in parts]), requires_grad=False)
        self.register_buffer("expert", torch.arange(len(parts)).repeat_interleave(ranks), persistent=False)

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... r"]:
        """The weight of every rank at every token."""
        expert: Any = self.expert
        return (x @ self.prototypes.T).abs().softmax(-1)[..., expert] * self.scale


def prototype(part: LowRank) -> Float[Tensor, " in"]:
    """The direction that a change acts on most."""
    return part.svd()[2][0]


def routed(model: nn.Module, experts: Sequence[Adapter]) -> dict[str, Mixed]:
    """For each layer one that routes between the adapters."""
    layers: dict[str, Mixed] = {}
    for name in changed_by(experts):
        parts = [expert[name] for expert in experts if name in expert]
        layers[name] = Mixed(model.get_submodule(name), concatenated(parts), Arrow(parts))
    return layers
