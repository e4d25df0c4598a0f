"""The knobs of a mixture, documented once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt, Le
from torch import nn

from overhaul.errors import RequestError


@dataclass(frozen=True)
class How:
    """How several adapters become one.

    Attributes:
        kind: how they are merged: coefficients learnt by gradient ("adaptive") or by a "search", equal parts ("average"),
            "ties" or "tsv".
        per: for "adaptive", what has a coefficient of its own for each adapter: every "module" (linear layer), every
            "sublayer" (attention or MLP of a block), every "layer" (block), or the adapter alone ("expert"); "rank", every
            rank of it in every module.
        activation: for "adaptive", what makes a coefficient of what is learnt; "leaky_relu" leaves 1% of what is below 0.
        start: for "adaptive", where learning begins: at 0, so that the mixture is the base at first; "equal", 1 over the
            root of the number of adapters; "uniform", drawn between 0 and 1; "normal", with a standard deviation of 0.5;
            "target", 1 for the first adapter (the fresh one, where it is there) and 0 for the others.
        evaluations: for "search", mixtures that are tried.
        rule: for "search", the sum of the changes ("exact"), or the sums of A's and of B's multiplied ("separate").
        density: for "ties", share of entries that are kept of each change.
        triplets: for "tsv", singular triplets that are kept of each change.
    """

    kind: Literal["adaptive", "search", "average", "ties", "tsv"] = "adaptive"
    per: Literal["expert", "layer", "sublayer", "module", "rank"] = "module"
    activation: Literal["identity", "squared", "softmax", "sigmoid", "leaky_relu"] = "leaky_relu"
    start: Literal["zero", "equal", "uniform", "normal", "target"] = "zero"
    evaluations: Annotated[int, Ge(2)] = 100
    rule: Literal["exact", "separate"] = "exact"
    density: Annotated[float, Gt(0), Le(1)] = 0.2
    triplets: Annotated[int, Ge(1)] = 8

    def check(self) -> None:
        """Refuse what would not move.

        Raises:
            RequestError: a square that begins at 0, where it has no slope.
        """
        if self.kind == "adaptive" and self.activation == "squared" and self.start == "zero":
            raise RequestError(
                'merge.loras: activation "squared" has no slope at 0, where nothing would be learnt. Write start: "equal".'
            )

    @property
    def instead(self) -> str:
        """What to try where the best mixture is the base itself."""
        if self.kind == "adaptive":
            return "No step lowered the loss on `valid`: try another `lr`, more `steps`, or start: equal."
        if self.kind == "search":
            return "Try more `evaluations`, or kind: adaptive."
        return "The changes of the adapters cancel: leave some out, or try kind: adaptive."

    def drawn(self, count: int, first: int, experts: int, draw: torch.Generator) -> nn.Parameter:
        """`count` numbers at their start, of which `first` belong to the first adapter."""
        if self.start == "uniform":
            return nn.Parameter(torch.rand(count, generator=draw))
        if self.start == "normal":
            return nn.Parameter(0.5 * torch.randn(count, generator=draw))
        value = torch.full((count,), 1 / math.sqrt(experts) if self.start == "equal" else 0.0)
        value[: first if self.start == "target" else 0] = 1.0
        return nn.Parameter(value)
