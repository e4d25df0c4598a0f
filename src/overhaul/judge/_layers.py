"""The states after every layer of a model on some examples, and the answers that its head makes of them.

A layer is a number of blocks: 0 is what enters the first, the last one what leaves all of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from overhaul.data.examples import IGNORED, Batch, Examples, collate
from overhaul.errors import RequestError, RunError
from overhaul.judge.likelihood import answer_logits, batches_within, budget
from overhaul.modes import at_rest
from overhaul.stack import LayerStack
from overhaul.stack.calls import Calls, State
from overhaul.trace.flow import states
from overhaul.trace.streams import as_rows


def check(examples: Examples) -> None:
    """Refuse examples of which nothing can be read.

    Raises:
        RequestError: there are none, or one of them has no answer.
    """
    if not len(examples):
        raise RequestError("There are no examples to look at.")
    for place, item in enumerate(examples.items):
        if item["labels"].ndim and not bool((item["labels"][1:] != IGNORED).any()):
            raise RequestError(
                f"Example {place} has no token that carries loss, so there is no answer to look for; leave it out."
            )


def batches(model: nn.Module, examples: Examples) -> Iterator[tuple[list[int], Batch]]:
    """Places and padded batches on the model's device, within the budget of likelihoods."""
    for places in batches_within(examples, budget(model)):
        yield places, moved(collate([examples.items[i] for i in places]), model)


def moved(batch: Batch, model: nn.Module) -> Batch:
    """The batch on the model's device."""
    device = next(model.parameters()).device
    return {name: value.to(device) for name, value in batch.items()}


def answers(logits: Tensor, batch: Batch) -> tuple[list[float], list[bool]]:
    """Of every example the mean log-probability of its answer in nats, and whether all of it is the most probable.

    Raises:
        RunError: they are not finite.
    """
    labels = batch["labels"]
    chosen, targets = answer_logits(logits, labels)
    counts = (labels[:, 1:] != IGNORED).sum(dim=1).tolist() if labels.ndim > 1 else [1] * len(labels)
    logp = _finite(-F.cross_entropy(chosen.float(), targets, reduction="none").cpu())
    hits = (chosen.argmax(dim=1) == targets).cpu()
    means = [part.double().mean().item() for part in logp.split(counts)]
    return means, [bool(part.all()) for part in hits.split(counts)]


def predicting(state: State, labels: Tensor) -> Float[Tensor, "n d"]:
    """The stream where labels carry loss one position on, or its mean over each image; float64 on the CPU.

    Raises:
        RunError: it is not finite.
    """
    assert state[0] is not None
    rows, labels = as_rows(state[0], None, "the stack").float().cpu(), labels.cpu()
    rows = rows.mean(dim=1) if labels.ndim == 1 else rows[:, :-1][labels[:, 1:] != IGNORED]
    return _finite(rows).double()


@torch.no_grad()
def summaries(model: nn.Module, examples: Examples) -> list[Float[Tensor, "n d"]]:
    """For every layer one state an example: at its last prompt token, or the mean over an image."""
    stack = LayerStack.of(model)
    found: list[list[Tensor]] = [[torch.empty(0)] * len(examples) for _ in range(len(stack) + 1)]
    with at_rest(model):
        for places, batch in batches(model, examples):
            labels = batch["labels"]
            if labels.ndim > 1:  # the answer's first token alone is predicted at the end of the prompt
                first = (labels != IGNORED).int().argmax(dim=1, keepdim=True)
                labels = torch.full_like(labels, IGNORED).scatter(1, first, 0)
            for layer, state in enumerate(states(Calls.record(stack, batch))):
                for place, row in zip(places, predicting(state, labels), strict=True):
                    found[layer][place] = row
    return [torch.stack(rows) for rows in found]


class Products:
    """Sums over samples of what CKA is made of, counted from the first sample so that few digits are lost."""

    def __init__(self, first: Tensor, second: Tensor) -> None:
        self.origins = (first, second)
        self.sums = [torch.zeros_like(first), torch.zeros_like(second)]
        self.products = [
            first.new_zeros(len(a), len(b)) for a, b in ((first, first), (second, second), (first, second))
        ]
        self.count = 0

    def add(self, first: Tensor, second: Tensor) -> None:
        """More samples, [n, d] and [n, e]."""
        first, second = first - self.origins[0], second - self.origins[1]
        self.count += len(first)
        self.sums = [self.sums[0] + first.sum(dim=0), self.sums[1] + second.sum(dim=0)]
        for total, (a, b) in zip(self.products, ((first, first), (second, second), (first, second)), strict=True):
            total.addmm_(a.T, b)

    def cka(self) -> float:
        """Of all samples so far."""
        one, two = self.sums
        pairs = ((one, one), (two, two), (one, two))
        norms = [
            float((total - torch.outer(a, b) / self.count).norm())
            for total, (a, b) in zip(self.products, pairs, strict=True)
        ]
        return norms[2] ** 2 / (norms[0] * norms[1]) if norms[0] and norms[1] else math.nan


def _finite(values: Tensor) -> Tensor:
    if not bool(values.isfinite().all()):
        raise RunError("A layer's values are not finite (NaN or infinite), so there is nothing to measure.")
    return values
