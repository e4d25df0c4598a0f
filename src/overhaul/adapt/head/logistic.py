"""Logistic regression on kept features: labels may be sets, rows have weights, and the start is given.

    minimise  sum_i w_i l_i / n + |W|^2 / (2 C n),   l_i = -log sum_{k in S_i} p_k,   p = softmax(W z_i + b)
    z         (phi - mean) / standard deviation of each feature over these rows (0 for the mean without a bias)

With sets of one class it is what scikit-learn's `LogisticRegression(C=C)` minimises on z for weights w, divided by C n. It
is convex: every start ends at the same loss. Sets of several classes make it a difference of convex functions, where the
start matters. It is solved in float64 by L-BFGS; the layer that comes out is that of phi.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from scipy.optimize import minimize

from overhaul.errors import RunError

UNSAID = -1e4
"""The bias of a class that no row has: its probability is 0 in every dtype."""

ITERATIONS = 20_000


@dataclass(frozen=True)
class Linear:
    """A last layer: weight [classes, d], and bias [classes] or None."""

    weight: np.ndarray
    bias: np.ndarray | None

    @property
    def zeros(self) -> Linear:
        """One of the same shape that says every class alike."""
        return Linear(np.zeros_like(self.weight), None if self.bias is None else np.zeros_like(self.bias))

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """Logits [n, classes]."""
        return features @ self.weight.T + (0.0 if self.bias is None else self.bias)


@dataclass(frozen=True)
class Part:
    """Rows as the last layer sees them.

    Attributes:
        features: float64, [n, d].
        right: which classes are right, [n, classes].
        groups: places by name; all rows in one where no groups are asked for.
        weights: of the rows, [n], mean 1.
        cells: what of the rows counts alike when they are balanced, [n].
    """

    features: np.ndarray
    right: np.ndarray
    groups: Mapping[str, np.ndarray]
    weights: np.ndarray
    cells: np.ndarray

    @classmethod
    def of(
        cls,
        features: np.ndarray,
        right: np.ndarray,
        groups: Mapping[str, Sequence[int]],
        cells: np.ndarray | None = None,
    ) -> Part:
        """All rows; of equal weight where no cells are to be balanced."""
        every = np.arange(len(features))
        inside = {name: np.array(places) for name, places in groups.items()} or {"all": every}
        part = cls(features, right, inside, np.ones(len(every)), np.zeros(len(every)) if cells is None else cells)
        return part.balanced()

    def balanced(self) -> Part:
        """The same with weights by which every cell counts alike: n / (number of cells * rows of the own cell)."""
        _, codes, counts = np.unique(self.cells, return_inverse=True, return_counts=True)
        return replace(self, weights=len(codes) / (len(counts) * counts[codes]))

    def accuracies(self, layer: Linear) -> tuple[float, list[float]]:
        """The share of rows whose most probable class is right: of all, and by group."""
        said = layer(self.features).argmax(axis=1)
        hits = self.right[np.arange(len(said)), said]
        return float(hits.mean()), [float(hits[places].mean()) for places in self.groups.values()]

    def loss(self, layer: Linear) -> float:
        """Weighted mean of -log of the right classes' probability, in nats."""
        logits = layer(self.features)
        right = _log_sums(np.where(self.right, logits, -np.inf))
        return float(self.weights @ (_log_sums(logits) - right)[:, 0] / len(logits))

    def select(self, places: np.ndarray) -> Part:
        """Some of the rows; groups without any of them are left out."""
        new = {old: n for n, old in enumerate(places.tolist())}
        inside = {name: [new[old] for old in each.tolist() if old in new] for name, each in self.groups.items()}
        groups = {name: np.array(each) for name, each in inside.items() if each}
        return replace(
            self, features=self.features[places], right=self.right[places], groups=groups, cells=self.cells[places],
            weights=self.weights[places],
        ).balanced()  # fmt: skip

    @cached_property
    def seen(self) -> np.ndarray:
        """Which classes a row has, [classes]."""
        return np.asarray(self.right.any(axis=0))


def _log_sums(logits: np.ndarray) -> np.ndarray:
    """Log sum exp of each row, [n, 1]; on small arrays much faster than scipy's."""
    return np.logaddexp.reduce(logits, axis=1, keepdims=True)


def fitted(part: Part, grid: Sequence[float], start: Linear) -> list[Linear]:
    """The layer that minimises the objective for each C, each begun where the one before ended.

    Args:
        part: what is learnt.
        grid: values of C in rising order.
        start: where the first begins; what it has no bias, none has.

    Raises:
        RunError: the solver did not converge.
    """
    seen, x = part.seen, part.features
    mean = x.mean(axis=0) if start.bias is not None else np.zeros(x.shape[1])
    scale = np.sqrt(((x - mean) ** 2).mean(axis=0))
    scale[scale == 0] = 1.0
    inner = replace(part, features=(x - mean) / scale, right=part.right[:, seen])
    bias = None if start.bias is None else start.bias[seen] + start.weight[seen] @ mean
    layer = Linear(start.weight[seen] * scale, bias)
    found: list[Linear] = []
    for c in grid:
        layer = _solved(inner, c, layer)
        weight = np.zeros((len(seen), x.shape[1]))
        weight[seen] = layer.weight / scale
        bias = None
        if layer.bias is not None:
            own = layer.bias - weight[seen] @ mean
            bias = np.full(len(seen), UNSAID)
            bias[seen] = own - own.mean()  # what is added to all says nothing, and the start would show in it
        found.append(Linear(weight, bias))
    return found


def _solved(part: Part, c: float, start: Linear) -> Linear:
    """The minimum for one C, of standardised features and classes that all have rows."""
    (rows, width), classes = part.features.shape, part.right.shape[1]
    penalty = 1 / (c * rows)

    def unpacked(flat: np.ndarray) -> Linear:
        weight = flat[: classes * width].reshape(classes, width)
        return Linear(weight, None if start.bias is None else flat[classes * width :])

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        layer = unpacked(flat)
        logits = layer(part.features)
        right = np.where(part.right, logits, -np.inf)
        every, own = _log_sums(logits), _log_sums(right)
        value = part.weights @ (every - own)[:, 0] / rows + penalty / 2 * (layer.weight**2).sum()
        slope = (np.exp(logits - every) - np.exp(right - own)) * part.weights[:, None] / rows
        gradient = [(slope.T @ part.features + penalty * layer.weight).ravel()]
        return value, np.concatenate(gradient if layer.bias is None else [*gradient, slope.sum(axis=0)])

    first = np.concatenate([start.weight.ravel(), *([] if start.bias is None else [start.bias])])
    options = {"maxiter": ITERATIONS, "maxfun": 2 * ITERATIONS, "ftol": 1e-15, "gtol": 1e-7, "maxcor": 20}
    ended = minimize(objective, first, jac=True, method="L-BFGS-B", options=options)
    if not ended.success or not np.isfinite(ended.fun):
        raise RunError(
            f"adapt.head: for C={c:g} the regression did not converge ({ended.message}). Leave it out of `grid`."
        )
    return unpacked(ended.x)
