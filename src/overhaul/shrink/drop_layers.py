"""Drop whole blocks: choose them by a published criterion, take them out, keep a plain and shorter model.

The criteria that "On the Limits of Layer Pruning for Generative Reasoning in LLMs" (arXiv:2602.01997) compares: block
influence is ShortGPT's (arXiv:2403.03853), the window Gromov et al.'s (arXiv:2403.17887), the loss without a block
Shortened LLaMA's (arXiv:2402.02834), greedy the paper's own.

    influence of blocks l .. l+w-1  =  1 - mean over tokens of cos(x_l, x_{l+w})          (x_l enters block l)

How it differs from the released code:

1. Per-block entries of the config follow the surviving blocks; the released script truncates them from the end. Cache slots
   are renumbered, so that generation with the cache stays right.
2. The first token of a text is left out of the cosine (`skip_first_token`): its activations are so large that they hide
   the others. `window` takes the mean over all tokens; Gromov et al. take the arccos at the last one.
3. "greedy" scores by the loss on the given answers, measured for every remaining block in every round. The released loop
   samples task accuracies with temperature 0.9, which makes its choice a matter of luck with 100 items.
4. 1 - cos is computed as half the squared distance of unit vectors: exactly 0 where a block does nothing.
5. A model without a head has no loss: there "perplexity" and "greedy" take how far its last hidden states turn (`prefix`).
6. Losses without single blocks are taken along paths that share their beginnings (`prefix`), not one forward each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Literal

from annotated_types import Ge
from torch import nn

from overhaul import session
from overhaul.data.examples import Examples
from overhaul.errors import RequestError
from overhaul.method import Outcome, method
from overhaul.prefix import path_losses
from overhaul.stack import LayerStack
from overhaul.trace import measure, turn, windows

Scores = dict[int, float]
"""Block -> score; the block with the lowest is the first to go."""


@method(verb="shrink", paper="2602.01997", changes="architecture", memory="forward", headless=lambda knobs: True)
def drop_layers(
    model: nn.Module,
    text: Examples | None = None,
    *,
    count: Annotated[int, Ge(0)],
    criterion: Literal["block_influence", "window", "perplexity", "greedy", "reverse"] = "block_influence",
    keep_first: bool = True,
    skip_first_token: bool = True,
    batch_size: Annotated[int, Ge(1)] = 16,
) -> Outcome:
    """Drop the blocks of a network that it misses least.

    Args:
        model: a network with one main stack of blocks. Blocks that open a stage of a ResNet always stay.
        text: what the criterion is measured on: text, answers, or labelled images. Not needed for "reverse".
        count: how many blocks to drop.
        criterion: "block_influence", the blocks that turn the residual stream least, one by one; "window", the
            neighbouring blocks that together turn it least; "perplexity", the blocks without which, alone, the loss is
            lowest; "greedy", the same measured again after each drop; "reverse", the last ones.
        keep_first: never drop the first block, which most models cannot do without.
        skip_first_token: leave the first token of a text out of the cosine. Images have no such token.
        batch_size: examples in one forward; does not change the choice.

    Returns:
        The model, changed in place. Facts: `removed` (in the order of choice), blocks and parameters before and after.
        Layers: the score of each block (of each window, by its first block), and which blocks were removed.

    Raises:
        RequestError: too few blocks can be dropped, `text` is missing, or the shorter model would not load again.
    """
    stack = LayerStack.of(model)
    candidates = [i for i in stack.droppable if i or not keep_first]
    if count > len(candidates):
        raise RequestError(
            f"shrink.drop_layers: count={count}, but of the {len(stack)} blocks of {stack.path} only {len(candidates)} can "
            f"be dropped{' (keep_first holds the first)' if keep_first else ''}."
        )
    before = {"blocks_before": len(stack), "parameters_before": _parameters(model)}
    layers: dict[str, Scores] = {}
    if criterion == "reverse":
        removed = candidates[::-1][:count]
    elif text is None or not len(text):
        raise RequestError(
            f"shrink.drop_layers: the criterion {criterion!r} is measured on examples, but the role `text` is missing or "
            'empty. Give it, or write criterion: "reverse".'
        )
    elif criterion == "block_influence":
        scores = layers["block influence"] = influence(stack, text, 1, skip_first_token, batch_size)
        removed = lowest(scores, candidates, count)
    elif criterion == "window":
        scores = layers["window influence"] = influence(stack, text, count, skip_first_token, batch_size)
        removed = _best_window(stack, scores, candidates, count)
    else:
        scores, removed = _by_loss(stack, text, candidates, count, batch_size, again=criterion == "greedy")
        layers["loss without the block"] = scores
    layers["removed"] = {i: float(i in removed) for i in range(len(stack))}
    stack.drop(removed)
    after = {"blocks_after": len(stack), "parameters_after": _parameters(model)}
    return Outcome(model, facts={"removed": removed, **before, **after}, layers=layers)


def influence(stack: LayerStack, examples: Examples, width: int, skip_first_token: bool, batch_size: int) -> Scores:
    """1 - mean cosine between what enters block l and what leaves block l + width - 1, for every l.

    Returns:
        Values in [0, 2] by l; without the places where the shape changes on the way.
    """
    if not width:  # a request to drop nothing: no window, no score
        return {}
    skipped = int(skip_first_token and examples.kind != "images")
    if skipped and all(len(item["input_ids"]) < 2 for item in examples):
        raise RequestError("shrink.drop_layers: no text is longer than its first token; write skip_first_token: false.")
    batches = session.progress(examples.batches(batch_size), "block influence", -(-len(examples) // batch_size))
    seen = measure(stack, batches, windows(stack, width), turn, skip_first=skipped)
    return {start: float(seen[pair].mean) for start, pair in enumerate(windows(stack, width)) if pair in seen}


def lowest(scores: Scores, candidates: Sequence[int], count: int) -> list[int]:
    """The `count` candidates of lowest score, lowest first; ties go to the later block."""
    return sorted(candidates, key=lambda i: (scores[i], -i))[:count]


def _best_window(stack: LayerStack, scores: Scores, candidates: Sequence[int], count: int) -> list[int]:
    starts = [start for start in scores if set(range(start, start + count)) <= set(candidates)]
    if count and not starts:
        raise RequestError(
            f"shrink.drop_layers: {stack.path} has no {count} neighbouring blocks that can all be dropped; these can be: "
            f'{list(candidates)}. Take fewer, or another criterion than "window".'
        )
    return [i for start in lowest(scores, starts, 1) for i in range(start, start + count)]


def _by_loss(
    stack: LayerStack, examples: Examples, candidates: Sequence[int], count: int, batch_size: int, *, again: bool
) -> tuple[Scores, list[int]]:
    """Each candidate's loss without it, and the blocks to drop: all by these losses, or one a round."""

    def losses(cuts: list[list[int]]) -> list[float]:
        paths = [[i for i in range(len(stack)) if i not in cut] for cut in cuts]
        return path_losses(stack, paths, examples, batch_size)

    scores = dict(zip(candidates, losses([[i] for i in candidates]), strict=True))
    return scores, greedy(losses, candidates, count) if again else lowest(scores, candidates, count)


def greedy(losses: Callable[[list[list[int]]], list[float]], candidates: Sequence[int], count: int) -> list[int]:
    """Drop one block a round, each time the one without which the loss is lowest; ties go to the later block.

    Args:
        losses: lists of dropped blocks -> what is to stay low (a loss, or a negative task score) for each.
        candidates: blocks that may go.
        count: rounds, each of which asks for all remaining candidates at once.

    Returns:
        The dropped blocks in the order of choice.
    """
    removed: list[int] = []
    for _ in range(count):
        left = [i for i in candidates if i not in removed]
        scores = dict(zip(left, losses([[*removed, i] for i in left]), strict=True))
        removed += lowest(scores, left, 1)
    return removed


def _parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
