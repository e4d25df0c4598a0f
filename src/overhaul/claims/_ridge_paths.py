"""The linear theory of arXiv:2510.16629: two training orders, unlearnt alike, drift apart at a rate that can be bounded.

Ridge regression in stages from zero, then gradient ascent on the forget set (X_U, y_U). Written Delta_t for the difference
of the two models after t steps, everything follows from Delta_t = (I + M_U)^t Delta_0 with M_U = (2 eta / k) X_U' X_U.
Arrays are float64; k is the number of rows of X_U, d the number of features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy import ndarray as Array


@dataclass(frozen=True)
class Stage:
    """One stage of ridge training: (X'X + mu I) theta = X'y + mu theta_before."""

    x: Float[Array, "n d"]
    y: Float[Array, " n"]
    mu: float


def train(stages: Sequence[Stage]) -> Float[Array, " d"]:
    """The weights after the stages, in this order, from zero."""
    theta = np.zeros(stages[0].x.shape[1])
    for stage in stages:
        system = stage.x.T @ stage.x + stage.mu * np.eye(len(theta))
        theta = np.linalg.solve(system, stage.x.T @ stage.y + stage.mu * theta)
    return theta


def ascend(
    theta: Float[Array, " d"], x: Float[Array, "k d"], y: Float[Array, " k"], rate: float, steps: int
) -> Float[Array, " d"]:
    """`steps` of gradient ascent on (1/k) ||X_U theta - y_U||^2."""
    for _ in range(steps):
        theta = theta + rate * 2.0 / len(x) * x.T @ (x @ theta - y)
    return theta


def growth(x: Float[Array, "k d"], rate: float) -> Float[Array, "d d"]:
    """I + M_U: what one step of ascent does to the difference of two models."""
    return np.eye(x.shape[1]) + 2.0 * rate / len(x) * x.T @ x


@dataclass(frozen=True)
class Divergence:
    """A lower bound on the distance between two unlearnt models: `(1/m) ||X_test Delta_t||^2`.

    Attributes:
        rate: rho*, the growth of the part of Delta_0 that the forget set sees.
        scale: s^2 ||w||^2 / (4 m).
        start: t0, the step from which the bound is valid.
    """

    rate: float
    scale: float
    start: int

    @classmethod
    def between(
        cls, difference: Float[Array, " d"], x: Float[Array, "k d"], test: Float[Array, "m d"], rate: float
    ) -> Divergence:
        """The bound for models that differ by `difference` before unlearning; needs m >= k and independent rows of X_U."""
        basis, _ = np.linalg.qr(x.T)  # of the span of X_U's rows; over all d features the smallest singular value is 0
        seen = basis @ (basis.T @ difference)
        rho = float(seen @ ((growth(x, rate) @ seen) - seen) / (seen @ seen))
        smallest = float(np.linalg.svd(test @ basis, compute_uv=False)[-1])
        unseen = float(np.linalg.norm(test, 2) * np.linalg.norm(difference - seen))
        strength = smallest * float(np.linalg.norm(seen))
        start = math.ceil(math.log(2.0 * unseen / strength) / math.log1p(rho)) if unseen else 0
        return cls(rho, strength**2 / (4 * len(test)), max(start, 0))

    def after(self, steps: int) -> float:
        """The least distance after `steps` of ascent, valid from `start` on."""
        return self.scale * (1.0 + self.rate) ** (2 * steps)

    def steps_until(self, distance: float) -> float:
        """From how many steps on the bound exceeds `distance`.

        At 4 * eps one of the two models is further than eps from any third one (the paper's corollary).
        """
        return math.log(distance / self.scale) / (2.0 * math.log1p(self.rate))
