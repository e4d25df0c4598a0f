"""What happens when a block, or a part of it, is left out: to what later blocks add, and to what the model predicts.

    E[s, l] = max over positions of |c_l - c'_l| / |c_l|        O[s] = max over positions of |softmax(y) - softmax(y')|

where c'_l and y' are what block l adds and the model says when block s is left out. For the effect on the *future*, block s
is left out before a position only, and the maximum runs over the positions from it on. The *direct* effect lets nothing but
c_s itself be missing: every later block reads the clean stream without c_s.

1. The clean run and all skips of an example are rows of one batch and of one shape, so that rounding is alike in all.
2. What lies before the block that is left out runs once for all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from overhaul import session
from overhaul.data.examples import IGNORED, Batch, Encoded, collate
from overhaul.inspect.depth_use.contributions import SMALLEST
from overhaul.modes import at_rest
from overhaul.stack import LayerStack
from overhaul.stack.calls import Calls, State, map_tensors
from overhaul.trace import Where, Zero, intervene
from overhaul.trace.flow import stream, with_stream
from overhaul.trace.sites import BlockSites

Part = Literal["block", "attention", "MLP", "direct"]


@dataclass(frozen=True)
class Skip:
    """One way to leave something out of block s.

    Attributes:
        part: the whole block, its attention, its MLP, or the block's contribution where later blocks read it ("direct").
        before: at positions before this one, seen from it on; None for all positions, seen at all.
    """

    part: Part
    before: int | None = None

    @property
    def kind(self) -> tuple[Part, bool]:
        """The part, and whether the effect lies in the future."""
        return self.part, self.before is not None


@dataclass(frozen=True)
class Effects:
    """Of one example and one kind of skip, the largest over its positions.

    Attributes:
        later: E, [s, l]; 0 where l <= s.
        output: O, [s].
    """

    later: Float[Tensor, "s l"]
    output: Float[Tensor, " s"]

    def larger(self, other: Effects) -> Effects:
        """The larger of two, entry by entry."""
        return Effects(torch.maximum(self.later, other.later), torch.maximum(self.output, other.output))


@dataclass(frozen=True)
class _Rows:
    """The rows of one batch: the clean run of each example and its skips after it.

    Attributes:
        batch: the inputs.
        examples: the example of each row.
        skips: the skip of each row; None is clean.
        clean: the clean row of each row's example, [r].
        left_out: the positions at which something is left out, [r, t].
        seen: the positions at which its effect is read, [r, t].
    """

    batch: Batch
    examples: Sequence[int]
    skips: Sequence[Skip | None]
    clean: Tensor
    left_out: Bool[Tensor, "r t"]
    seen: Bool[Tensor, "r t"]

    def of(self, *parts: Part) -> Bool[Tensor, "r 1"]:
        """The rows of such skips."""
        flags = [skip is not None and skip.part in parts for skip in self.skips]
        return torch.tensor(flags, device=self.clean.device)[:, None]


def effects(
    stack: LayerStack,
    found: Sequence[BlockSites],
    items: Sequence[Encoded],
    skips: Sequence[Sequence[Skip]],
    *,
    keep_first: int,
    rows: int,
) -> list[Mapping[tuple[Part, bool], Effects]]:
    """The effects of all skips, by example and kind.

    Args:
        stack: the stack, with blocks of one shape.
        found: its sites.
        items: the examples.
        skips: what is tried in each block, by example.
        keep_first: positions at the start of an example at which nothing is left out.
        rows: runs in one batch; an example's are never split.
    """
    device = next(stack.model.parameters()).device
    results: list[dict[tuple[Part, bool], Effects]] = [{} for _ in items]
    with at_rest(stack.model), torch.no_grad():
        groups = _grouped(skips, rows)
        for group in session.progress(groups, "skipping blocks", len(groups)):
            laid = _laid(stack, group, items, skips, keep_first, device)
            later, output = _walk(stack, found, laid)
            for row, (example, skip) in enumerate(zip(laid.examples, laid.skips, strict=True)):
                if skip is not None:
                    one = Effects(later[:, :, row], output[:, row])
                    known = results[example].get(skip.kind)
                    results[example][skip.kind] = one if known is None else known.larger(one)
    return list(results)


def depth_score(effect: Float[Tensor, " l"]) -> float | None:
    """sum_l l e_l / sum_l e_l, blocks counted from 0; None where nothing has an effect."""
    total = float(effect.sum())
    return float((torch.arange(len(effect)) * effect).sum()) / total if total > 0 else None


def on_later(effect: Float[Tensor, "s l"]) -> Float[Tensor, " s"]:
    """The mean effect of each block on the blocks behind it; 0 for the last."""
    size = len(effect)
    behind = (size - 1 - torch.arange(size)).clamp_min(1)
    return effect.triu(1).sum(dim=1) / behind


def _grouped(skips: Sequence[Sequence[Skip]], rows: int) -> list[list[int]]:
    """Examples that run together."""
    groups: list[list[int]] = []
    room = 0
    for place, own in enumerate(skips):
        if not own:
            continue
        if not groups or room < 1 + len(own):
            groups.append([])
            room = rows
        groups[-1].append(place)
        room -= 1 + len(own)
    return groups


def _laid(
    stack: LayerStack,
    group: Sequence[int],
    items: Sequence[Encoded],
    skips: Sequence[Sequence[Skip]],
    keep_first: int,
    device: torch.device,
) -> _Rows:
    examples = [place for place in group for _ in range(1 + len(skips[place]))]
    tried: list[Skip | None] = []
    clean: list[int] = []
    for place in group:
        clean += [len(clean)] * (1 + len(skips[place]))
        tried += [None, *skips[place]]
    batch = map_tensors(collate([items[place] for place in examples]), lambda value: value.to(device))
    mask = batch.get("attention_mask")
    if mask is None:  # the positions of an image are not known before it runs: one column stands for all
        mask = torch.ones(len(examples), 1, dtype=torch.long, device=device)
    real, numbers = mask.bool(), mask.cumsum(1) - 1
    ends = torch.tensor([-1 if skip is None or skip.before is None else skip.before for skip in tried], device=device)
    ends, changed = ends[:, None], torch.tensor([skip is not None for skip in tried], device=device)[:, None]
    everywhere = changed & (ends < 0)
    left_out = real & changed & (numbers >= keep_first) & (everywhere | (numbers < ends))
    seen = real & changed & (everywhere | (numbers >= ends))
    return _Rows(batch, examples, tried, torch.tensor(clean, device=device), left_out, seen)


def _walk(stack: LayerStack, found: Sequence[BlockSites], laid: _Rows) -> tuple[Tensor, Tensor]:
    """E [s, l, r] and O [s, r] of all rows."""
    calls = Calls.record(stack, laid.batch)
    size, count = len(stack), len(laid.examples)
    later, output = torch.zeros(size, size, count), torch.zeros(size, count)
    direct, entering = laid.of("direct"), calls.entering
    for place in range(size):
        leaving = calls.run(place, entering)
        missing = (stream(calls, leaving) - stream(calls, entering))[laid.clean]
        state = _without(calls, found[place], laid, place, entering, leaving)
        for block in range(place + 1, size):
            before = stream(calls, state)
            clean = before[laid.clean]
            before = torch.where((direct & laid.left_out)[..., None], clean - missing, before)
            before = torch.where((direct & ~laid.left_out)[..., None], clean, before)
            state = calls.run(block, with_stream(calls, state, before))
            added = stream(calls, state).float() - before.float()
            later[place, block] = _largest(_relative(added, laid.clean), laid.seen).cpu()
        output[place] = _largest(_shift(calls.finish(state), laid.clean), laid.seen).cpu()
        entering = leaving
    return later, output


def _without(calls: Calls, known: BlockSites, laid: _Rows, place: int, entering: State, leaving: State) -> State:
    """What leaves a block of which each row leaves out its part."""
    edits = {
        contribution.module: Zero(Where(region.expand(*stream(calls, entering).shape[:2])))
        for contribution, region in (
            (known.attention, laid.left_out & laid.of("attention")),
            (known.mlp, laid.left_out & laid.of("MLP")),
        )
        if contribution is not None and bool(region.any())
    }
    rows = stream(calls, leaving)
    if edits:
        with intervene(calls.stack, edits):
            rows = stream(calls, calls.run(place, entering))
        rows = torch.where(laid.of("attention", "MLP")[..., None], rows, stream(calls, leaving))
    skipped = laid.left_out & laid.of("block")
    return with_stream(calls, leaving, torch.where(skipped[..., None], stream(calls, entering), rows))


def _relative(added: Float[Tensor, "r t d"], clean: Tensor) -> Float[Tensor, "r t"]:
    own = added[clean]
    return (own - added).norm(dim=-1) / own.norm(dim=-1).clamp_min(SMALLEST)


def _shift(logits: Tensor, clean: Tensor) -> Tensor:
    """|softmax(y) - softmax(y')| of each row against its clean one, [r, t], or [r, 1] for images; row by row."""
    logits = logits if logits.ndim == 3 else logits[:, None]
    found: list[Tensor] = []
    clean_row, expected = -1, logits[:0]
    for row, own in zip(logits, clean.tolist(), strict=True):
        if own != clean_row:  # an example's rows follow its clean one
            clean_row, expected = own, logits[own].float().softmax(-1)
        found.append((row.float().softmax(-1) - expected).norm(dim=-1))
    return torch.stack(found)


def _largest(values: Float[Tensor, "r t"], seen: Bool[Tensor, "r t"]) -> Float[Tensor, " r"]:
    return values.masked_fill(~seen, 0.0).amax(dim=1)


def futures(labels: Tensor, stride: int, first: int, in_answer: bool) -> list[int]:
    """Positions from which on effects on the future may be read.

    Args:
        labels: of an example, [t].
        stride: positions between two of them.
        first: positions at the start at which nothing is left out; before a future there must be one more.
        in_answer: they lie in the answer, from where its first token is predicted, and not anywhere in the text.
    """
    if in_answer:
        start = int((labels[1:] != IGNORED).int().argmax())
        found = list(range(start, max(start + 1, len(labels) - 5), stride))
    else:
        found = list(range(stride, len(labels) - 4, stride))
    return [position for position in found if position > first]
