"""Coefficients, and fresh adapters, by gradient: the same loop for both, which keeps what was best on held-out examples."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from overhaul.adapter_folders import LowRank
from overhaul.adapters import adapters, projections, taken
from overhaul.data.examples import IGNORED, Batch, Examples
from overhaul.errors import RunError
from overhaul.fit import Regime, Training
from overhaul.merge.loras.how import How
from overhaul.merge.loras.layers import Adapter, Mixed, changed_by, concatenated, exchanged
from overhaul.objectives import cross_entropy, cross_entropy_sum, evaluate, units
from overhaul.selectors import select
from overhaul.stack import LayerStack

Curves = dict[str, list[float]]
AT_ONCE = 32
"""Examples in one forward where nothing trains."""

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda w: w,
    "squared": torch.square,
    "softmax": lambda w: w.softmax(-1),
    "sigmoid": torch.sigmoid,
    "leaky_relu": F.leaky_relu,  # 0.01 below 0
}


class Learnt(nn.Module):
    """g(w) for each expert or each rank, times the experts' own scale.

    Args:
        w: the parameter, [n], or [r] with `by_rank`; layers that have coefficients in common share it.
        parts: the experts at this layer, None where one leaves it alone. A softmax is over those that change it.
        activation: g.
        by_rank: whether every rank has its own.
    """

    def __init__(self, w: nn.Parameter, parts: Sequence[LowRank | None], activation: str, by_rank: bool) -> None:
        super().__init__()
        self.w, self.activation, self.by_rank = w, activation, by_rank
        present = [n for n, part in enumerate(parts) if part is not None]
        self.ranks = {n: part.rank for n, part in enumerate(parts) if part is not None}
        own = torch.cat([part.scale for part in parts if part is not None])
        self.scale = nn.Parameter(own, requires_grad=False)
        ranks = torch.tensor(list(self.ranks.values()))
        self.register_buffer("present", torch.tensor(present), persistent=False)
        self.register_buffer("expert", torch.arange(len(present)).repeat_interleave(ranks), persistent=False)

    def coefficients(self) -> Float[Tensor, " r"]:
        """g(w) of every rank."""
        present: Any = self.present
        expert: Any = self.expert
        g = ACTIVATIONS[self.activation]
        return g(self.w) if self.by_rank else g(self.w[present])[expert]

    def forward(self, _: Tensor) -> Float[Tensor, " r"]:
        """The same for every input."""
        return self.coefficients() * self.scale

    def by_expert(self) -> dict[int, float]:
        """The mean coefficient of each expert that changes this layer."""
        parts = self.coefficients().detach().split(list(self.ranks.values()))
        return {n: float(part.mean()) for n, part in zip(self.ranks, parts, strict=True)}


def mixture(model: nn.Module, experts: Sequence[Adapter], how: How, draw: torch.Generator) -> dict[str, Mixed]:
    """A layer with the whole pool for each that an expert changes, with coefficients at their start."""
    by_rank, shared = how.per == "rank", dict[str, nn.Parameter]()
    keys = keys_of(model, changed_by(experts), how.per)
    layers: dict[str, Mixed] = {}
    for name, key in keys.items():
        parts = [expert.get(name) for expert in experts]
        here = [part for part in parts if part is not None]
        first = parts[0].rank if by_rank and parts[0] is not None else int(not by_rank)
        if key not in shared:
            count = sum(part.rank for part in here) if by_rank else len(experts)
            shared[key] = how.drawn(count, first, len(experts), draw)
        strength = Learnt(shared[key], parts, how.activation, by_rank)
        layers[name] = Mixed(model.get_submodule(name), concatenated(here), strength)
    return layers


def keys_of(model: nn.Module, names: Sequence[str], per: str) -> dict[str, str]:
    """For each layer what its coefficients belong to."""
    if per in ("module", "rank"):
        return {name: name for name in names}
    if per == "expert":
        return dict.fromkeys(names, "")
    stack = LayerStack.of(model)
    depth = {name: str(stack.depth(f"{name}.weight")) for name in names}
    if per == "layer":
        return depth
    attention, mlp = (set(select(stack, role).modules) for role in ("attention", "mlp"))
    sublayer = {name: "attention" if name in attention else "mlp" if name in mlp else "rest" for name in names}
    return {name: f"{depth[name]} {sublayer[name]}" for name in names}


@dataclass(frozen=True)
class Lesson:
    """What is learnt from, and how.

    Attributes:
        train: examples whose loss is followed.
        valid: examples on which the best of several moments is chosen.
        training: how long and how fast.
        every: steps after which it is measured on `valid`.
    """

    train: Examples
    valid: Examples
    training: Regime
    every: int

    def learn(self, model: nn.Module, name: str) -> Curves:
        """Train what requires gradients, and leave it as it was when the loss on `valid` was least.

        Raises:
            RunError: the training diverged, or that loss is not finite.
        """
        loop = Training(model, {"train": self.train}, **self.training.loop, name=name)
        loop.belongs |= {"batch size": self.training.batch_size, "every": self.every, "held out": len(self.valid)}
        with loop:
            for step in loop:
                step.take([cross_entropy("train")], self.training.batch_size)
                if (step.number + 1) % self.every and step.number + 1 < self.training.steps:
                    continue
                loss, _ = measured(loop.live, self.valid)
                if not math.isfinite(loss):
                    raise RunError(f"merge.loras: the loss on `valid` is {loss} while {name} trains. Lower the rate.")
                curve = [*loop.kept.get("curve", []), loss]
                loop.kept["curve"] = curve
                if loss <= min(curve):
                    best = {key: p.detach().clone() for key, p in loop.live.named_parameters() if p.requires_grad}
                    loop.kept["best"] = best
        with torch.no_grad():
            for key, value in loop.kept["best"].items():
                model.get_parameter(key).copy_(value)
        stretched = [
            loss for loss in loop.kept["curve"] for _ in range(self.every)
        ]  # of each step, the next one measured
        return {**loop.ledger.curves, "loss on valid": stretched[: self.training.steps]}


def learnt(
    model: nn.Module, experts: Sequence[Adapter], how: How, lesson: Lesson, draw: torch.Generator, name: str
) -> tuple[dict[str, LowRank], dict[str, dict[int, float]], Curves, int]:
    """Learn a mixture; it is not part of the model afterwards.

    Returns:
        The mixture; of each layer the coefficient of each expert (the mean over its ranks); curves; how many were learnt.
    """
    layers = mixture(model, experts, how, draw)
    trains = [p for p in model.parameters() if p.requires_grad]
    try:
        for parameter in trains:
            parameter.requires_grad_(False)
        with exchanged(model, layers):
            curves = lesson.learn(model, name)
    finally:
        for parameter in trains:
            parameter.requires_grad_(True)
    found: dict[str, LowRank] = {}
    coefficients: dict[str, dict[int, float]] = {}
    shared: dict[int, int] = {}
    for key, layer in layers.items():
        strength: Any = layer.strength
        found[key] = LowRank(layer.a.detach(), layer.b.detach(), strength(layer.a).detach())
        coefficients[key] = strength.by_expert()
        shared[id(strength.w)] = strength.w.numel()
    return found, coefficients, curves, sum(shared.values())


def fresh(model: nn.Module, lesson: Lesson, rank: int, alpha: int, dropout: float) -> dict[str, LowRank]:
    """A new adapter on every projection in the blocks, trained on the same examples; not part of the model afterwards."""
    with adapters(model, rank, alpha, dropout, projections(model)) as wrapped:
        try:
            lesson.learn(wrapped, "fresh LoRA")
        finally:
            found = taken(wrapped)
    return found


def measured(model: nn.Module, examples: Examples) -> tuple[float, float]:
    """Cross-entropy in nats per answer token (or image), and the share of examples of which every token (or the class) is
    the most probable one: what greedy decoding says.
    """
    batches = list(examples.batches(AT_ONCE))
    loss, right = torch.stack(evaluate(model, _loss_and_right, batches)).sum(0).tolist()
    return loss / sum(map(units, batches)), right / len(examples)


def _loss_and_right(logits: Tensor, batch: Batch) -> Tensor:
    labels, best = batch["labels"], logits.argmax(-1)
    right = best == labels
    if labels.ndim > 1:
        right = ((best[:, :-1] == labels[:, 1:]) | (labels[:, 1:] == IGNORED)).all(1)
    return torch.stack([cross_entropy_sum(logits, batch), right.sum()]).double().cpu()
