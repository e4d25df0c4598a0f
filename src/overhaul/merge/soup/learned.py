"""How much of each model a soup has, learnt by gradient.

The mixture is made anew in every forward, and its gradient is taken apart again: beside one model with its gradients there
are only files, which are mapped and of which the operating system keeps what it has room for.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from overhaul import processes
from overhaul.data.examples import Examples
from overhaul.errors import RequestError
from overhaul.fit import Regime, fit
from overhaul.forward import caches
from overhaul.models import Checkpoint
from overhaul.objectives import cross_entropy
from overhaul.weights import TensorFacts, TensorIndex, corresponding, mapped
from overhaul.weights.depths import built_names

Per = Literal["model", "block", "tensor"]


@dataclass(frozen=True)
class Shares:
    """The share of each model.

    Attributes:
        by_key: by what they are learnt for: "", a stack with a depth, or the name of a tensor.
        per: which of these.
    """

    by_key: Mapping[str, Sequence[float]]
    per: Per = "model"

    @classmethod
    def even(cls, chosen: Collection[int], count: int) -> Shares:
        """Equal shares of those that were chosen of `count` models."""
        return cls({"": [1 / len(chosen) if n in chosen else 0.0 for n in range(count)]})

    def of(self, tensor: TensorFacts) -> Sequence[float]:
        """Those of a tensor."""
        return self.by_key[key_of(tensor, self.per)]

    @property
    def mean(self) -> list[float]:
        """Over all that they are learnt for."""
        return [sum(each) / len(self.by_key) for each in zip(*self.by_key.values(), strict=True)]


def key_of(tensor: TensorFacts, per: Per) -> str:
    """What a tensor's shares are learnt for."""
    return {"model": "", "block": f"{tensor.stack} {tensor.depth}", "tensor": tensor.name}[per]


def learned(
    base: Checkpoint, tuned: Sequence[Checkpoint], held_out: Examples, per: Per, training: Regime
) -> tuple[Shares, dict[str, list[float]]]:
    """Train the shares on held-out data.

    Returns:
        The shares, and the curves of the training.

    Raises:
        RequestError: files hold tensors that the model does not have in this shape.
        RunError: the training diverged.
    """
    _, *indexes = corresponding([base, *tuned])
    model = base.open().to(processes.device())
    mixture = LearntSoup(model, indexes, per)
    ledger = fit(mixture, [cross_entropy("held_out")], {"held_out": held_out}, **training.fit, name="soup")
    values = mixture.shares.detach().double().cpu()
    return Shares(
        dict(zip(mixture.keys, (values / values.sum(1, keepdim=True)).tolist(), strict=True)), per
    ), ledger.curves


class LearntSoup(nn.Module):
    """A model whose weights are a mixture of those in files; what trains is how much of each.

    Args:
        model: gives the architecture; on the device where the mixture is to be.
        indexes: the models that are mixed, whose names correspond.
        per: what shares are learnt for.
    """

    def __init__(self, model: Any, indexes: Sequence[TensorIndex], per: Per) -> None:
        super().__init__()
        self.model = model.requires_grad_(False)
        self.config = getattr(model, "config", None)
        own = model.state_dict()
        first = {name: one for name, one in indexes[0].tensors.items() if one.dtype.is_floating_point}
        built = built_names(model, first)
        self.keys = list(dict.fromkeys(key_of(one, per) for one in first.values()))
        self.stored: dict[str, tuple[int, list[Tensor]]] = {}
        for name, one in first.items():
            if built[name] not in own or own[built[name]].shape != one.shape:
                raise RequestError(
                    f"merge.soup: {name} {list(one.shape)} is no tensor that {type(model).__name__} has in this shape, so "
                    'its share cannot be learnt. Take kind: "greedy" or "uniform".'
                )
            files = [mapped(index.tensors[name]) for index in indexes]
            self.stored[built[name]] = self.keys.index(key_of(one, per)), files
        self.scores = nn.Parameter(torch.zeros(len(self.keys), len(indexes), device=next(model.parameters()).device))
        self.given = {"use_cache": False} if caches(model) else {}

    @property
    def shares(self) -> Tensor:
        """Of every key and model; each row sums to 1."""
        return self.scores.softmax(1)

    def forward(self, **inputs: Tensor) -> Any:
        """What the mixture says."""
        shares = self.shares
        mixed = {name: _Mixed.apply(shares[row], *files) for name, (row, files) in self.stored.items()}
        return functional_call(self.model, mixed, kwargs={**inputs, **self.given})


class _Mixed(torch.autograd.Function):
    """sum_t c_t m_t in float32, which keeps nothing but the files for its gradient."""

    @staticmethod
    def forward(ctx: Any, shares: Tensor, *files: Tensor) -> Tensor:
        ctx.files = files
        mixed = torch.zeros(files[0].shape, device=shares.device)
        for share, stored in zip(shares.tolist(), files, strict=True):
            mixed.add_(stored.to(mixed), alpha=share)
        return mixed

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        parts = [(gradient * stored.to(gradient)).sum() for stored in ctx.files]
        return torch.stack(parts), *(None for _ in parts)
