"""Going uphill as far as forgetting needs and no further: one calibrated step, or steps until it is enough.

    theta_S <- theta_S + eta * direction

1. It is enough where the forgotten answers cost `target` nats a token and greedy decoding gives back no more of them than of
   unseen text. It is too much where the retained answers cost more than they may; the step before is then the last.
2. Lengths are L2 norms over all changed parameters; eta is what the direction is multiplied with.
3. Positions are kept in float32, so that short steps add up in half precision too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from overhaul import session
from overhaul.data.examples import Examples
from overhaul.errors import RunError
from overhaul.influence import Gradients
from overhaul.judge.likelihood import extraction_strength, score

HALVINGS = 8
"""How often the interval of eta is halved: it is known to 1/256 of the last doubling."""

Ended = Literal["forgotten", "retain", "repetitions"]
Source = Callable[[], Gradients]
"""The direction at the present weights; a stored one is the same everywhere."""


@dataclass(frozen=True)
class Seen:
    """What was measured at one place.

    Attributes:
        forget: nats a token of the answers to be forgotten.
        retain: nats a token of those that stay.
        extraction: the share of the answers to be forgotten that greedy decoding gives back from their beginnings.
    """

    forget: float
    retain: float
    extraction: float


@dataclass
class Goal:
    """Where to stop. Create it with `at`, which looks at the model as it is.

    Attributes:
        model: looked at in eval mode.
        forget: what is to be forgotten.
        retain: what is to stay.
        target: nats a token at which `forget` is forgotten.
        extraction: what greedy decoding may still give back of it.
        ceiling: nats a token that `retain` may cost.
        seen: what was measured so far; the first is from before.
    """

    model: nn.Module
    forget: Examples
    retain: Examples
    target: float
    extraction: float = 1.0
    ceiling: float = math.inf
    seen: list[Seen] = field(default_factory=list)

    @classmethod
    def at(
        cls,
        model: nn.Module,
        forget: Examples,
        retain: Examples,
        *,
        unseen: Examples | None = None,
        target: float | None = None,
        retain_rise: float | None = None,
    ) -> Goal:
        """The goal for a model: a `target`, or what `unseen` is like to it; one of the two is given.

        Raises:
            RunError: the model does not know `forget` better than that.
        """
        nats, extracted = (math.inf, 1.0) if unseen is None else _cost(model, unseen)
        goal = cls(model, forget, retain, nats if target is None else target, extracted)
        before = goal.measure()
        if before.forget >= goal.target:
            raise RunError(
                f"The answers in `forget` already cost {before.forget:.3f} nats a token, and {goal.target:.3f} is what "
                "counts as forgotten: the model does not know them. Check that they are encoded as they were learnt."
            )
        goal.ceiling = math.inf if retain_rise is None else before.retain + retain_rise
        return goal

    def measure(self) -> Seen:
        """Look at the model and remember it; what is not finite counts as infinite."""
        forget, extraction = _cost(self.model, self.forget)
        self.seen.append(Seen(forget, _cost(self.model, self.retain)[0], extraction))
        session.current().report("unlearning", len(self.seen), 0, f"forget {forget:.2f} nats a token")
        return self.seen[-1]

    def verdict(self) -> Ended | None:
        """Look at the model: "forgotten", "retain" where that costs too much, None where neither is so."""
        now = self.measure()
        if not now.retain <= self.ceiling or not math.isfinite(now.forget):
            return "retain"
        return "forgotten" if now.forget >= self.target and now.extraction <= self.extraction else None


def _cost(model: nn.Module, examples: Examples) -> tuple[float, float]:
    """Nats a token, and mean extraction strength."""
    try:
        scored = score(model, examples)
    except RunError:  # outputs that are not finite: far too long a step
        return math.inf, 0.0
    tokens = sum(len(one.targets) for one in scored)
    extracted = sum(extraction_strength(one.hits) for one in scored) / len(scored)
    return sum(one.nll for one in scored) / tokens, extracted


@dataclass(frozen=True)
class Way:
    """How far it went.

    Attributes:
        eta: what the direction was multiplied with, summed over repetitions.
        length: L2 distance from the start.
        repetitions: how many steps were tried.
        ended: what ended it.
        by_parameter: L2 distance of each parameter.
    """

    eta: float
    length: float
    repetitions: int
    ended: Ended
    by_parameter: Mapping[str, float]


class _Position:
    """The changed parameters, and where they started."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.parameters = parameters
        wide = {name: torch.promote_types(p.dtype, torch.float32) for name, p in parameters.items()}
        self.start = {name: p.detach().to(wide[name], copy=True) for name, p in parameters.items()}
        self.reached = dict(self.start)

    @torch.no_grad()
    def go(self, direction: Gradients, eta: float) -> dict[str, Tensor]:
        """Put the model at eta times the direction from what was reached; the new place."""
        new = {name: at.add(direction[name].to(at.device, at.dtype), alpha=eta) for name, at in self.reached.items()}
        for name, parameter in self.parameters.items():
            parameter.copy_(new[name])
        return new

    @torch.no_grad()
    def way(self, eta: float, repetitions: int, ended: Ended) -> Way:
        moved = {name: float((p - self.start[name]).norm()) for name, p in self.parameters.items()}
        return Way(eta, math.hypot(*moved.values()), repetitions, ended, moved)


def norm_of(direction: Gradients) -> float:
    """L2 norm over all parameters.

    Raises:
        RunError: it is zero or not finite.
    """
    norm = math.hypot(*(float(gradient.norm()) for gradient in direction.values()))
    if not norm or not math.isfinite(norm):
        raise RunError(f"The gradients to go along have the norm {norm}. Choose other parameters with `where`.")
    return norm


def once(parameters: Mapping[str, nn.Parameter], source: Source, goal: Goal, step: float, most: int) -> Way:
    """One step along the direction, as short as the goal allows: its length is doubled until enough, then halved in.

    Args:
        parameters: what is changed, in place.
        source: of the direction, asked once.
        goal: where to stop.
        step: the first length tried.
        most: doublings; where they do not suffice, the longest step stays.

    Raises:
        RunError: no step that was tried keeps within what `retain` may cost.
    """
    position, direction = _Position(parameters), source()
    norm = norm_of(direction)
    low, high, ended = 0.0, step, None
    tried = 0
    while ended is None and tried < most:
        position.go(direction, high / norm)
        ended, tried = goal.verdict(), tried + 1
        if ended is None:
            low, high = high, 2.0 * high
    if ended is None:
        return position.way(low / norm, tried, "repetitions")
    for _ in range(HALVINGS):
        middle = (low + high) / 2.0
        position.go(direction, middle / norm)
        verdict = goal.verdict()
        if verdict is None:
            low = middle
        else:
            high, ended = middle, verdict
    length = high if ended == "forgotten" else low
    if not length:
        raise _too_much(goal, high)
    position.go(direction, length / norm)
    goal.measure()
    return position.way(length / norm, tried + HALVINGS, ended)


def iterate(parameters: Mapping[str, nn.Parameter], source: Source, goal: Goal, step: float, most: int) -> Way:
    """Steps of one length along the direction of each place, until it is enough.

    Args:
        parameters: what is changed, in place.
        source: of the direction, asked at every step.
        goal: where to stop.
        step: the length of each.
        most: steps.

    Raises:
        RunError: already the first step costs `retain` more than it may.
    """
    position, eta = _Position(parameters), 0.0
    for n in range(most):
        direction = source()
        share = step / norm_of(direction)
        new = position.go(direction, share)
        ended = goal.verdict()
        if ended == "retain":
            position.go(direction, 0.0)
            goal.measure()
            if not n:
                raise _too_much(goal, step)
            return position.way(eta, n + 1, ended)
        position.reached, eta = new, eta + share
        if ended:
            return position.way(eta, n + 1, ended)
    return position.way(eta, most, "repetitions")


def _too_much(goal: Goal, step: float) -> RunError:
    return RunError(
        f"Even a step of length {step:.2g} costs `retain` more than {goal.ceiling:.3f} nats a token, and `forget` is not "
        "forgotten by then. Give a shorter step, other parameters (`where`) or a higher retain_rise."
    )
