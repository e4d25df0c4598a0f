"""What restoration reads: the members of a group, the positions of a stream, and the states of a model at some layers.

1. A layer is the place of a block; its state is the stream that leaves it.
2. What a head reads directly is told apart from the rest: class tokens (and registers) of an image, the positions that
   predict an answer. Of a text's prompt the first position is left out, where models keep what belongs to no word.
3. States that are kept lie in main memory, in the dtype of the model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from overhaul import session
from overhaul.data.examples import IGNORED, Batch, Examples
from overhaul.errors import RequestError
from overhaul.judge.representation import answers
from overhaul.stack import LayerStack
from overhaul.stack.calls import Calls, State, map_tensors
from overhaul.trace.flow import part, states, stream

NAME = "inspect.restoration"
MOST_TOKENS = 16
"""Class tokens and registers that a vision transformer may put before its patches."""


def parts(role: str, examples: Examples, column: str, value: str | int) -> tuple[Examples, Examples]:
    """The members of a group and all others, each from long to short.

    Raises:
        RequestError: a row lacks the column, or one of the two is empty.
    """
    for place, row in enumerate(examples.rows):
        if column not in row:
            raise RequestError(f"{NAME}: row {place + 1} of `{role}` has no column {column!r}. It has: {sorted(row)}.")
    inside = examples.filter(lambda row: str(row[column]) == str(value))
    outside = examples.filter(lambda row: str(row[column]) != str(value))
    if not len(inside) or not len(outside):
        found = sorted({str(row[column]) for row in examples.rows})
        shown = ", ".join(found[:12]) + (", ..." if len(found) > 12 else "")
        raise RequestError(
            f"{NAME}: `{role}` needs rows of the forgotten group and others, and {'each' if len(inside) else 'none'} of its "
            f"{len(examples)} rows has {value!r} in the column {column!r}. Its values: {shown}."
        )
    return inside.select(inside.by_length()), outside.select(outside.by_length())


def check_kind(role: str, examples: Examples) -> None:
    """Refuse what has no positions to steer.

    Raises:
        RequestError: there are no examples, they are neither images nor answered prompts, or a prompt is too short.
    """
    if not len(examples):
        raise RequestError(f"{NAME}: `{role}` has no examples.")
    if examples.kind not in ("images", "tokens"):
        raise RequestError(
            f"{NAME}: `{role}` holds {examples.kind}; give images with a class, or questions with answers."
        )
    for place, item in enumerate(examples.items):
        if "labels" not in item:
            raise RequestError(
                f"{NAME}: example {place + 1} of `{role}` has no label, so no accuracy can be had from it."
            )
        told = (item["labels"][1:] != IGNORED).nonzero() if item["labels"].ndim else torch.tensor([2])
        if not len(told) or int(told[0]) < 2:
            raise RequestError(
                f"{NAME}: example {place + 1} of `{role}` has no prompt of three tokens or more before an answer, so there "
                "is nothing to steer. Give questions with answers (as: qa, as: chat)."
            )


@dataclass(frozen=True)
class Places:
    """Positions of a stream [b, t, d].

    Attributes:
        read: those that the head reads directly, [b, t].
        rest: those that carry features, [b, t].
    """

    read: Bool[Tensor, "b t"]
    rest: Bool[Tensor, "b t"]

    @classmethod
    def of(cls, batch: Batch, rows: Float[Tensor, "b t d"], before: int) -> Places:
        """The positions of a batch; `before` are the tokens before an image's patches."""
        position = torch.arange(rows.shape[1], device=rows.device).expand(rows.shape[:2])
        if "pixel_values" in batch:
            return cls(position < before, position >= before)
        real = batch["attention_mask"].bool()
        if batch["labels"].ndim == 1:
            return cls(torch.zeros_like(real), real)
        read = F.pad(batch["labels"][:, 1:] != IGNORED, (0, 1))
        first = read.int().argmax(dim=1, keepdim=True)
        return cls(read, real & (position > 0) & (position < first))


def tokens_before(stack: LayerStack, examples: Examples, asked: int | None) -> int:
    """How many tokens stand before the patches of an image; 0 for texts, and for images without tokens.

    Raises:
        RequestError: neither the knob nor the config says so.
    """
    if examples.kind != "images":
        return 0
    calls = Calls.record(stack, moved(next(iter(examples.batches(1))), stack.model))
    entering = calls.entering[part(calls)]
    if entering is None or entering.ndim != 3:
        return 0
    length = entering.shape[1]
    config: Any = getattr(stack.model, "config", None)
    image, patch = (getattr(config, name, None) for name in ("image_size", "patch_size"))
    found = asked
    if found is None and image is not None and patch is not None:
        sides = [(one, one) if isinstance(one, int) else tuple(one) for one in (image, patch)]
        told = length - math.prod(whole // each for whole, each in zip(*sides, strict=True))
        found = told if 0 <= told <= MOST_TOKENS else None
    if found is None or found >= length:
        raise RequestError(
            f"{NAME}: {type(stack.model).__name__} has {length} positions for an image, and "
            + ("its config does not say how many are patches" if found is None else f"class_tokens is {found}")
            + ". Write class_tokens: the number of tokens before the patches (1 for a class token, 0 for none)."
        )
    return found


@dataclass
class Tally:
    """What a model says of some examples: of each, the mean log-probability of its answer in nats, and if it is right."""

    logp: list[float] = field(default_factory=list[float])
    hits: list[bool] = field(default_factory=list[bool])

    def add(self, logits: Tensor, batch: Batch) -> None:
        """The answers of a batch."""
        means, whole = answers(logits, batch)
        self.logp += means
        self.hits += whole

    def value(self, measure: str) -> float:
        """The mean accuracy, or the mean probability of the answers (of several tokens, their geometric mean)."""
        return math.fsum(self.hits if measure == "accuracy" else map(math.exp, self.logp)) / len(self.hits)


@dataclass(frozen=True)
class Seen:
    """A batch as a model sees it.

    Attributes:
        batch: on the model's device.
        calls: how the model calls its blocks on it.
        states: by layer.
        logits: the model's own.
    """

    batch: Batch
    calls: Calls
    states: dict[int, State]
    logits: Tensor

    def rows(self, layer: int) -> Float[Tensor, "b t d"]:
        """The stream at a layer."""
        return stream(self.calls, self.states[layer])

    def onwards(self, layer: int, state: State) -> Tensor:
        """The logits where the model goes on from this state behind a block."""
        for place in range(layer + 1, len(self.calls.stack)):
            state = self.calls.run(place, state)
        return self.calls.finish(state)


@torch.no_grad()
def walk(stack: LayerStack, examples: Examples, layers: Sequence[int], batch_size: int, what: str) -> Iterator[Seen]:
    """Batches in order, each run once; `what` is said of the progress."""
    for batch in session.progress(examples.batches(batch_size), what, -(-len(examples) // batch_size)):
        batch = moved(batch, stack.model)
        calls = Calls.record(stack, batch)
        kept: dict[int, State] = {}
        state: State = ()
        for passed, state in enumerate(states(calls)):
            if passed - 1 in layers:
                kept[passed - 1] = state
        yield Seen(batch, calls, kept, calls.finish(state))


def moved(batch: Batch, model: nn.Module) -> Batch:
    """The batch on the model's device."""
    device = next(model.parameters()).device
    return map_tensors(batch, lambda value: value.to(device))


@dataclass(frozen=True)
class Sample:
    """States that carry features, [n, d] in float32 on the CPU, and the example that each is of, [n]."""

    rows: Float[Tensor, "n d"]
    owner: Int[Tensor, " n"]


def sampled(
    stack: LayerStack, examples: Examples, layers: Sequence[int], batch_size: int, before: int, each: int
) -> dict[int, Sample]:
    """States at up to `each` positions of every example, drawn at random, by layer."""
    draw = torch.Generator().manual_seed(torch.initial_seed())
    found: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    owners: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    done = 0
    for seen in walk(stack, examples, layers, batch_size, "states to learn from"):
        for layer in layers:
            rows = seen.rows(layer)
            rest = Places.of(seen.batch, rows, before).rest.cpu()
            order = torch.rand(rest.shape, generator=draw).masked_fill(~rest, -1.0)
            chosen = order.topk(min(each, rest.shape[1]), dim=1)
            example, place = (chosen.values >= 0).nonzero().unbind(1)
            position = chosen.indices[example, place]
            found[layer].append(rows[example.to(rows.device), position.to(rows.device)].float().cpu())
            owners[layer].append(done + example)
        done += len(seen.batch["labels"])
    return {layer: Sample(torch.cat(found[layer]), torch.cat(owners[layer])) for layer in layers}
