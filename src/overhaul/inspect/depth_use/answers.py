"""Up to which layer an answer depends on each position of its example: erase it there, or integrate gradients over it.

    erasure      max over the answer's tokens of |p - p'|, where h_l[t] is replaced by the mean state of that layer
    attribution  sum over features of (x - b) * mean over k of dF/dx at b + (k - 1/2)/n (x - b), [t]

F is the sum over the answer's tokens of their probability (or log-probability), x what a block, its attention or its MLP
returns, b its mean over the positions of the example. Summed over positions, attributions are F(x) - F(b) up to the error
of the integral.

1. Copies of an example are the rows of one batch: the positions that are erased, or the points of the integral.
2. The blocks before the one that is looked at run once for all copies.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from overhaul.data.examples import IGNORED, Encoded, collate
from overhaul.modes import at_rest
from overhaul.stack import LayerStack
from overhaul.stack.calls import Calls, State, map_tensors
from overhaul.trace import Replace, capture, intervene
from overhaul.trace.flow import states, stream, with_stream

Target = Literal["probability", "log_probability"]


@torch.no_grad()
def erasure(stack: LayerStack, item: Encoded, means: Sequence[Tensor], rows: int) -> Float[Tensor, "l t"]:
    """How far the answer's predictions move when one position is erased at one layer.

    Args:
        stack: the stack, with blocks of one shape.
        item: the example.
        means: layer -> what stands there instead, [d].
        rows: copies that run together.

    Returns:
        Layer (0 is what enters the first block) by position.
    """
    found: list[list[Tensor]] = [[] for _ in means]
    with at_rest(stack.model):
        calls = _copies(stack, item, 1)
        length = stream(calls, calls.entering).shape[1]
        for start in range(0, length, rows):
            positions = torch.arange(start, min(start + rows, length))
            # one copy more, in which nothing is erased
            calls = _copies(stack, item, len(positions) + 1)
            for layer, state in enumerate(states(calls)):
                erased = stream(calls, state).clone()
                erased[range(len(positions)), positions] = means[layer].to(erased)
                p = _answers(calls.finish(_onwards(calls, layer, with_stream(calls, state, erased))), item).exp()
                found[layer].append((p[:-1] - p[-1:]).norm(dim=-1).amax(dim=1).cpu())
    return torch.stack([torch.cat(layer) for layer in found])


@dataclass(frozen=True)
class Attribution:
    """Integrated gradients over what every block, or a part of it, returns.

    Attributes:
        values: block by position; rows of blocks that have no such part are NaN.
        gap: largest difference over the blocks between their sum and F(x) - F(b), which more steps make smaller.
    """

    values: Float[Tensor, "l t"]
    gap: float


def attribution(
    stack: LayerStack, item: Encoded, modules: Sequence[str | None] | None, steps: int, target: Target, rows: int
) -> Attribution:
    """Integrated gradients of an answer, by block and position.

    Args:
        stack: the stack, with blocks of one shape.
        item: the example.
        modules: the module of each block whose output is looked at, None in place of one that is not known; or None for
            what leaves the blocks.
        steps: points of the integral.
        target: of what the gradients are.
        rows: points that run together.
    """
    values: dict[int, Tensor] = {}
    gaps = [0.0]
    flows: dict[int, _Flow] = {}
    with at_rest(stack.model), _frozen(stack.model):
        for place in range(len(stack)):
            name = f"leaving.{place}" if modules is None else modules[place]
            if name is not None:
                value, difference = _Integral(stack, item, place, name, target, flows).attributed(steps, rows)
                values[place] = value.sum(dim=-1)
                gaps.append(abs(float(value.sum()) - difference))
    lacking = torch.full_like(next(iter(values.values())), torch.nan)
    return Attribution(torch.stack([values.get(place, lacking) for place in range(len(stack))]), max(gaps))


class _Flow:
    """Clean copies of an example, as far as a block; asked for blocks in their order, each runs once."""

    def __init__(self, stack: LayerStack, item: Encoded, count: int) -> None:
        self.calls = _copies(stack, item, count)
        self.place, self.state = 0, self.calls.entering

    @torch.no_grad()
    def entering(self, place: int) -> State:
        """What enters a block."""
        for block in range(self.place, place):
            self.state = self.calls.run(block, self.state)
        self.place = place
        return self.state


class _Integral:
    """The straight line from the mean of what a module returns to what it returns, and the answer along it."""

    def __init__(
        self, stack: LayerStack, item: Encoded, place: int, name: str, target: Target, flows: dict[int, _Flow]
    ) -> None:
        self.stack, self.item, self.place, self.name, self.target, self.flows = stack, item, place, name, target, flows
        self.output = self._observed()
        self.baseline = self.output.mean(dim=1, keepdim=True)

    def attributed(self, steps: int, rows: int) -> tuple[Float[Tensor, "t d"], float]:
        """The attributions, by the midpoint rule, and the difference of F that they should sum to."""
        total = torch.zeros_like(self.output[0], dtype=torch.float64)
        for start in range(0, steps, rows):
            points = (torch.arange(start, min(start + rows, steps)) + 0.5) / steps
            line = self._line(points).requires_grad_()
            (gradient,) = torch.autograd.grad(self._answer(line).sum(), line)
            total += gradient.sum(dim=0).double()
        with torch.no_grad():
            first, last = self._answer(self._line(torch.tensor([0.0, 1.0]))).double().tolist()
        return (total / steps * (self.output - self.baseline)[0]).cpu(), last - first

    def _line(self, points: Float[Tensor, " k"]) -> Float[Tensor, "k t d"]:
        return self.baseline + points.to(self.output)[:, None, None] * (self.output - self.baseline)

    def _answer(self, line: Float[Tensor, "k t d"]) -> Float[Tensor, " k"]:
        """F for each point."""
        calls, entering = self._at(len(line))
        if self.name.startswith("leaving."):
            state = with_stream(calls, entering, line)
        else:
            with intervene(self.stack, {self.name: Replace(line)}):
                state = calls.run(self.place, entering)
        logp = _answers(calls.finish(_onwards(calls, self.place + 1, state)), self.item)
        labels = self.item["labels"].to(logp.device)
        targets = labels[None] if labels.ndim == 0 else labels[1:][labels[1:] != IGNORED]
        chosen = logp.gather(-1, targets.expand(len(logp), -1)[..., None])[..., 0]
        return (chosen if self.target == "log_probability" else chosen.exp()).sum(dim=1)

    def _at(self, count: int) -> tuple[Calls, State]:
        """So many copies as they enter the block."""
        if count not in self.flows:
            self.flows[count] = _Flow(self.stack, self.item, count)
        return self.flows[count].calls, self.flows[count].entering(self.place)

    @torch.no_grad()
    def _observed(self) -> Float[Tensor, "1 t d"]:
        """What the module returns, in float32."""
        calls, entering = self._at(1)
        if self.name.startswith("leaving."):
            return stream(calls, calls.run(self.place, entering)).float()
        with capture(self.stack, [self.name], lambda rows, _: [rows.clone()]) as seen:
            calls.run(self.place, entering)
        return seen[self.name][0]


def _copies(stack: LayerStack, item: Encoded, count: int) -> Calls:
    device = next(stack.model.parameters()).device
    return Calls.record(stack, map_tensors(collate([item] * count), lambda value: value.to(device)))


def _onwards(calls: Calls, layer: int, state: State) -> State:
    """What leaves the stack when it goes on from a layer."""
    for place in range(layer, len(calls.stack)):
        state = calls.run(place, state)
    return state


def _answers(logits: Tensor, item: Encoded) -> Float[Tensor, "r a v"]:
    """Log-probabilities where the answer's tokens are predicted (or the class of an image), of every copy."""
    logits = logits[:, :-1][:, item["labels"][1:] != IGNORED] if logits.ndim == 3 else logits[:, None]
    return logits.float().log_softmax(dim=-1)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No gradients of weights, for which activations would be kept."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
