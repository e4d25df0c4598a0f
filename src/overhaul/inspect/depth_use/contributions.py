"""What attention, MLP and whole blocks add to the residual stream, and what the head makes of the stream at each layer.

    h_l  enters block l        a_l, m_l  what attention and MLP add        c_l = h_(l+1) - h_l = a_l + m_l

1. Each part is measured against the stream that it reads: a_l against h_l, m_l against h_l + a_l (h_l in a parallel
   block), c_l against h_l.
2. a_l and m_l are the outputs that `trace.sites` verified: norms and scales on the way to the stream are in them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from overhaul.data.examples import Batch
from overhaul.forward import forward
from overhaul.modes import at_rest
from overhaul.stack import LayerStack
from overhaul.stack.calls import Calls
from overhaul.trace import capture, counted
from overhaul.trace.flow import states
from overhaul.trace.reductions import wide
from overhaul.trace.sites import BlockSites

SMALLEST = 1e-6
"""Norms that something is divided by are at least this large."""


@dataclass(frozen=True)
class Written:
    """What a part adds to the stream that it reads, over positions.

    Attributes:
        count: number of positions.
        norm: mean norm of what is added.
        norm_max: its largest norm.
        relative: mean of that norm over the norm of the stream that is read.
        relative_max: the largest.
        cosine: mean cosine between the two: below 0 it erases, at 0 it writes new features, above 0 it amplifies.
        stream: mean norm of the stream that is read.
        stream_max: its largest norm.
        through: mean cosine between the stream that is read and the stream with what is added.
    """

    count: int
    norm: float
    norm_max: float
    relative: float
    relative_max: float
    cosine: float
    stream: float
    stream_max: float
    through: float

    def __add__(self, other: Written) -> Written:
        count = self.count + other.count
        joined: dict[str, Any] = {"count": count}
        for name in (one.name for one in fields(self)[1:]):
            a, b = getattr(self, name), getattr(other, name)
            joined[name] = max(a, b) if name.endswith("_max") else (self.count * a + other.count * b) / count
        return Written(**joined)


def written(stream: Float[Tensor, "b t d"], added: Float[Tensor, "b t d"], mask: Bool[Tensor, "b t"]) -> Written:
    """How large what is added is beside the stream, and where it points."""
    read, part = wide(counted(stream, mask)), wide(counted(added, mask))
    size, norm = read.norm(dim=1), part.norm(dim=1)
    relative = norm / size.clamp_min(SMALLEST)
    return Written(
        count=len(read),
        norm=float(norm.mean()),
        norm_max=float(norm.max()),
        relative=float(relative.mean()),
        relative_max=float(relative.max()),
        cosine=float(F.cosine_similarity(part, read).mean()),
        stream=float(size.mean()),
        stream_max=float(size.max()),
        through=float(F.cosine_similarity(read + part, read).mean()),
    )


@dataclass(frozen=True)
class Mean:
    """The mean state over positions, [d]."""

    count: int
    value: Tensor

    def __add__(self, other: Mean) -> Mean:
        share = other.count / (self.count + other.count)
        return Mean(self.count + other.count, self.value.lerp(other.value, share))


def _mean(state: Tensor, mask: Tensor) -> Mean:
    rows = wide(counted(state, mask))
    return Mean(len(rows), rows.mean(dim=0))


@dataclass(frozen=True)
class Profile:
    """What one forward pass over the examples shows.

    Attributes:
        written: "attention", "MLP", "block" -> place -> what it adds. Blocks whose parts are not known have "block" alone.
        means: layer -> mean of the stream over all positions, [d]; 0 is what enters the first block.
    """

    written: Mapping[str, Mapping[int, Written]]
    means: Sequence[Tensor]


@torch.no_grad()
def profile(stack: LayerStack, found: Sequence[BlockSites], batches: Iterable[Batch], skip_first: int) -> Profile:
    """One forward over the batches.

    Args:
        stack: the stack.
        found: its sites.
        batches: collated, on the model's device.
        skip_first: positions at the start of each example that do not count.
    """
    last = len(stack) - 1
    pairs: dict[str, dict[int, tuple[str, str]]] = {
        "attention": {n: (f"entering.{n}", c.module) for n, c in parts_of(found, "attention").items()},
        "MLP": {n: (c.module, f"leaving.{n}") for n, c in parts_of(found, "mlp").items() if not found[n].parallel},
        "MLP, parallel": {
            n: (f"entering.{n}", c.module) for n, c in parts_of(found, "mlp").items() if found[n].parallel
        },
        "block": {n: (f"entering.{n}", f"leaving.{n}") for n in range(len(stack))},
    }
    reductions = {
        "attention": written,
        "MLP": lambda added, after, mask: written(after - added, added, mask),
        "MLP, parallel": written,
        "block": lambda before, after, mask: written(before, after - before, mask),
    }
    layers = [*(f"entering.{n}" for n in range(len(stack))), f"leaving.{last}"]
    with at_rest(stack.model), ExitStack() as seeing:
        seen = {
            name: seeing.enter_context(capture(stack, sites.values(), reductions[name], skip_first=skip_first))
            for name, sites in pairs.items()
            if sites
        }
        means = seeing.enter_context(capture(stack, layers, _mean))
        for batch in batches:
            forward(stack.model, batch)
    by_part: dict[str, dict[int, Written]] = {}
    for name, results in seen.items():
        by_part.setdefault(name.partition(",")[0], {}).update(
            {place: results[site] for place, site in pairs[name].items()}
        )
    return Profile(by_part, [means[layer].value for layer in layers])


def parts_of(found: Sequence[BlockSites], role: str) -> dict[int, Any]:
    """The contributions of attention or MLP by block. Post-norm blocks have none: the stream itself is normalised."""
    known = {n: getattr(block, role) for n, block in enumerate(found) if block.verified and block.placement != "post"}
    return {n: contribution for n, contribution in known.items() if contribution is not None}


@dataclass(frozen=True)
class Lens:
    """What the head makes of the stream at every layer, beside what it makes of the last.

    Attributes:
        divergence: layer -> mean over positions of KL(p_l || p_last), in nats.
        overlap: layer -> mean over positions of |top_l and top_last| / top.
    """

    divergence: Sequence[float]
    overlap: Sequence[float]


@torch.no_grad()
def lens(stack: LayerStack, batches: Iterable[Batch], top: int, skip_first: int) -> Lens:
    """The logit lens, one layer's logits at a time.

    Args:
        stack: the stack, with blocks of one shape.
        batches: collated, on the model's device.
        top: how many of the most probable outputs are compared.
        skip_first: positions at the start of each example that do not count.
    """
    divergence, overlap = [0.0] * (len(stack) + 1), [0.0] * (len(stack) + 1)
    count = 0
    with at_rest(stack.model):
        for batch in batches:
            calls = Calls.record(stack, batch)
            last, best = _read(forward(stack.model, batch), batch, top, skip_first)
            count += len(last)
            for layer, state in enumerate(states(calls)):
                logp, own = _read(calls.finish(state), batch, top, skip_first)
                divergence[layer] += float(F.kl_div(last, logp, reduction="sum", log_target=True))
                overlap[layer] += float((own[:, :, None] == best[:, None, :]).double().sum()) / best.shape[1]
    return Lens([value / count for value in divergence], [value / count for value in overlap])


def _read(logits: Tensor, batch: Batch, top: int, skip_first: int) -> tuple[Tensor, Tensor]:
    """Log-probabilities [n, v] in float32 where positions count, and the most probable outputs [n, top]."""
    if logits.ndim == 3:
        mask = batch["attention_mask"].bool()
        logits = logits[mask & (mask.cumsum(1) > skip_first)]
    logp = logits.float().log_softmax(dim=-1)
    return logp, logp.topk(min(top, logp.shape[-1]), dim=-1).indices
