"""The knobs by which a change is scaled over depth, documented once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from overhaul.errors import RequestError
from overhaul.merge._writing import check_sizes
from overhaul.weights import TensorFacts

Outside = Literal["alpha", "by_position"]


@dataclass(frozen=True)
class Ramp:
    """lambda(l) = scale + beta l / (L - 1) for block l = 0 .. L-1: how much of a change is added (`merge.lines`).

    A network with several stacks has a ramp over each; one with a single block gets scale + beta.

    Attributes:
        scale: lambda of the first block, and of all where `beta` is 0.
        beta: what the last block's lambda is larger by.
        outside: lambda of what lies outside the blocks: that of the first block ("alpha"), or before them that of the first
            and after them that of the last ("by_position"). A tied head is one tensor with the embedding, which comes
            before.
    """

    scale: float = 1.0
    beta: float = 0.0
    outside: Outside = "alpha"

    def __call__(self, tensor: TensorFacts) -> float:
        """The factor of a tensor."""
        if not self.beta:  # the depth need not be known then
            return self.scale
        if 0 <= tensor.depth < tensor.blocks:
            return self.scale + self.beta * (tensor.depth / (tensor.blocks - 1) if tensor.blocks > 1 else 1.0)
        return self.scale + self.beta * (self.outside == "by_position" and tensor.depth >= tensor.blocks > 0)

    def check(self, method: str) -> None:
        """Refuse a ramp that is 0 everywhere; `method` is for the message.

        Raises:
            RequestError: it is.
        """
        check_sizes(method, scale=self.scale, beta=self.beta)
        if not self.scale and not self.beta:
            raise RequestError(f"{method}: scale 0 would change nothing.")
