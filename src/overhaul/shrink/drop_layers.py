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
7. Blocks can be named: `drop` goes before the criterion, which passes over `keep`, and over the last block of a hybrid that
   has attention.
8. The shorter model reads and says a few tokens before it is handed on; if it cannot, the blocks are put back.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge
from torch import Tensor, nn

from overhaul import session
from overhaul.data.examples import Examples, collate
from overhaul.errors import RequestError
from overhaul.forward import headless, read_by
from overhaul.method import Outcome, method
from overhaul.modes import at_rest, uncompiled
from overhaul.objectives import check_labelled
from overhaul.prefix import path_losses
from overhaul.stack import LayerStack
from overhaul.trace import measure, turn, windows

Scores = dict[int, float]
"""Block -> score; the block with the lowest is the first to go."""


@method(
    verb="shrink",
    paper="2602.01997",
    changes="architecture",
    memory="forward",
    alone={"criterion": ("perplexity", "greedy")},
    headless=lambda knobs: True,
)
def drop_layers(
    model: nn.Module,
    text: Examples | None = None,
    *,
    count: Annotated[int, Ge(0)] | None = None,
    criterion: Literal["block_influence", "window", "perplexity", "greedy", "reverse"] = "block_influence",
    drop: list[int] | None = None,
    keep: list[int] | None = None,
    keep_first: bool = True,
    skip_first_token: bool = True,
    batch_size: Annotated[int, Ge(1)] = 16,
) -> Outcome:
    """Drop the blocks of a network that it misses least, or those that are named.

    Args:
        model: a network with one main stack of blocks. Blocks that open a stage of a ResNet always stay.
        text: what the criterion is measured on: text, answers, or labelled images. Not needed for "reverse", nor where
            `drop` names all.
        count: how many blocks to drop, those that `drop` names included; as many as it names if not given.
        criterion: "block_influence", the blocks that turn the residual stream least, one by one; "window", the
            neighbouring blocks that together turn it least; "perplexity", the blocks without which, alone, the loss is
            lowest; "greedy", the same measured again after each drop; "reverse", the last ones.
        drop: blocks that go in any case, by their numbers from 0.
        keep: blocks that stay in any case.
        keep_first: do not let the criterion drop the first block, which most models cannot do without.
        skip_first_token: leave the first token of a text out of the cosine. Images have no such token.
        batch_size: examples in one forward; does not change the choice.

    Returns:
        The model, changed in place. Facts: `removed` (in the order of choice), blocks and parameters before and after.
        Layers: the score of each block (of each window, by its first block), and which blocks were removed.

    Raises:
        RequestError: too few blocks can be dropped, `text` is missing, or the shorter model would not load again or run.
    """
    stack = LayerStack.of(model)
    choice = Choice.of(stack, count, drop or [], keep or [], keep_first)
    before = {"blocks_before": len(stack), "parameters_before": _parameters(model)}
    layers: dict[str, Scores] = {}
    if choice.count == len(choice.named):
        removed = list(choice.named)
    elif criterion == "reverse":
        removed = choice.first(choice.candidates[::-1])
    else:
        text = _measured_on(text, criterion, skip_first_token)
        removed, layers = _chosen(stack, text, choice, criterion, skip_first_token, batch_size)
    layers["removed"] = {i: float(i in removed) for i in range(len(stack))}
    _drop(stack, removed, _trial(model, text))
    after = {"blocks_after": len(stack), "parameters_after": _parameters(model)}
    return Outcome(model, facts={"removed": removed, **before, **after}, layers=layers)


@dataclass(frozen=True)
class Choice:
    """What may be dropped of a stack.

    Attributes:
        count: how many blocks go.
        named: those that go in any case.
        candidates: those of which a criterion chooses the others.
        attention: the blocks of a hybrid that have attention, one of which stays.
    """

    count: int
    named: Sequence[int]
    candidates: Sequence[int]
    attention: Sequence[int] = ()

    @classmethod
    def of(
        cls, stack: LayerStack, count: int | None, drop: Sequence[int], keep: Sequence[int], keep_first: bool
    ) -> Choice:
        """What a request leaves to choose from.

        Raises:
            RequestError: it cannot be met.
        """
        what = "shrink.drop_layers"
        if count is None and not drop:
            raise RequestError(f"{what}: say how many blocks are to go (`count: 2`) or which (`drop: [3, 5]`).")
        for name, places in (("drop", drop), ("keep", keep)):
            for place in places:
                if place not in range(len(stack)):
                    raise RequestError(
                        f"{what}: {name} names block {place}, but the blocks of {stack.path} are numbered from 0 to "
                        f"{len(stack) - 1}, the last one."
                    )
            if len(set(places)) < len(places):
                raise RequestError(f"{what}: {name} names a block twice: {list(places)}.")
        if both := sorted(set(drop) & set(keep)):
            raise RequestError(f"{what}: drop and keep both name block {both[0]}.")
        count = len(drop) if count is None else count
        if count < len(drop):
            raise RequestError(f"{what}: count={count}, but drop names {len(drop)} blocks. Leave `count` out.")
        stack.check([place for place in range(len(stack)) if place not in drop])
        free = [i for i in stack.droppable if i not in {*drop, *keep} and (i or not keep_first)]
        single = free
        if stack.kinds > 1 and count > len(
            drop
        ):  # a config may tell kinds of blocks apart by rules that tie some together
            single = [i for i in free if stack.can_drop([*drop, i])]
        tied, free = len(free) - len(single), single
        choice = cls(count, drop, free, stack.with_attention)
        most = len(choice.first(free, len(stack)))
        if count > most:
            held = ["keep_first holds the first"] * keep_first + ["keep names some"] * bool(keep)
            held += [f"{tied} only together with others, by its config: name them all, `drop: [...]`"] * bool(tied)
            held += ["one with attention must stay"] * (most < len(free) + len(drop))
            reasons = f" ({'; '.join(held)})" if held else ""
            raise RequestError(
                f"{what}: count={count}, but of the {len(stack)} blocks of {stack.path} only {most} can be dropped{reasons}."
            )
        return choice

    def windows(self, stack: LayerStack) -> list[int]:
        """Where neighbouring blocks begin that may all go.

        Raises:
            RequestError: there are none.
        """
        may = {*self.candidates, *self.named}
        starts = [
            start
            for start in range(len(stack) - self.count + 1)
            if set(self.named) <= set(window := range(start, start + self.count)) <= may and self.fits(window)
        ]
        if not starts:
            raise RequestError(
                f"shrink.drop_layers: {stack.path} has no {self.count} neighbouring blocks that can all be dropped; these "
                f'can be: {sorted(may)}. Take fewer, or another criterion than "window".'
            )
        return starts

    def fits(self, removed: Collection[int]) -> bool:
        """Whether these blocks may go together."""
        return not self.attention or not set(self.attention) <= set(removed)

    def first(self, order: Iterable[int], count: int | None = None) -> list[int]:
        """The named blocks, then the first of `order` that may go, until there are `count`."""
        removed = list(self.named)
        for place in order:
            if len(removed) < (self.count if count is None else count) and self.fits([*removed, place]):
                removed.append(place)
        return removed


def _measured_on(text: Examples | None, criterion: str, skip_first_token: bool) -> Examples:
    """The examples, if a criterion can be measured on them."""
    if text is None or not len(text):
        raise RequestError(
            f"shrink.drop_layers: the criterion {criterion!r} is measured on examples, but the role `text` is missing or "
            'empty. Give it, name the blocks (`drop: [...]`), or write criterion: "reverse".'
        )
    turns = criterion in ("block_influence", "window") and _skipped(text, skip_first_token)
    if turns and all(len(item["input_ids"]) < 2 for item in text):
        raise RequestError("shrink.drop_layers: no text is longer than its first token; write skip_first_token: false.")
    return text


def _chosen(
    stack: LayerStack, text: Examples, choice: Choice, criterion: str, skip_first_token: bool, batch_size: int
) -> tuple[list[int], dict[str, Scores]]:
    """The blocks to drop by a criterion, in the order of choice, and what it measured."""
    starts = choice.windows(stack) if criterion == "window" else []
    if criterion in ("perplexity", "greedy") and not headless(stack.model):
        check_labelled("text", text)
    if session.current().planning:  # how many go is known before which
        return _some(stack, choice, starts), {}
    if criterion == "block_influence":
        scores = influence(stack, text, 1, skip_first_token, batch_size)
        return choice.first(ranked(scores, choice.candidates)), {"block influence": scores}
    if criterion == "window":
        scores = influence(stack, text, choice.count, skip_first_token, batch_size)
        best = ranked(scores, starts)[0]
        return list(range(best, best + choice.count)), {"window influence": scores}
    scores, removed = _by_loss(stack, text, choice, batch_size, again=criterion == "greedy")
    return removed, {"loss without the block": scores}


def _some(stack: LayerStack, choice: Choice, starts: Sequence[int]) -> list[int]:
    """Blocks that may be those which a criterion will choose: as many, and such that the class can be built without."""
    windows = [[*range(start, start + choice.count)] for start in reversed(starts)]
    sets = windows or [choice.first(choice.candidates[::-1]), choice.first(choice.candidates)]
    if stack.kinds == 1:  # any are as good
        return sets[0]
    fitting = next((removed for removed in sets if stack.can_drop(removed)), None)
    if fitting is None:
        session.begins()  # the criterion may find others
    return fitting or sets[0]


class _FailsError(Exception):
    """A shorter model that does not run: when it `says` something, or when it only reads."""

    def __init__(self, says: bool, error: Exception) -> None:
        super().__init__()
        self.says, self.error = says, error


def _drop(stack: LayerStack, removed: Sequence[int], fails: Callable[[bool], Exception | None] | None) -> None:
    """Take blocks out, unless the model then no longer reads, or no longer goes on from what it read, as it does now."""
    asked = [] if fails is None else [False, True]

    def tried() -> None:
        for says in asked:
            if fails is not None and (error := fails(says)) is not None:
                raise _FailsError(says, error)

    while True:
        try:
            return stack.drop(removed, tried)
        except _FailsError as failed:
            # what the whole model does not do, because it takes something else besides, is not asked of the shorter one
            if fails is not None and fails(failed.says) is None:
                raise RequestError(
                    f"shrink.drop_layers: without these blocks, {type(stack.model).__name__} no longer runs "
                    f"({type(failed.error).__name__}: {failed.error}). Choose others: `keep: [...]` holds some, "
                    "`drop: [...]` names them."
                ) from failed.error
            asked.remove(failed.says)


def _trial(model: nn.Module, text: Examples | None) -> Callable[[bool], Exception | None] | None:
    """What stops a model from reading one example, or from going on from its first tokens."""
    if text is not None and len(text):
        batch = collate([text[0]])
    elif getattr(model, "main_input_name", None) == "input_ids":
        ids = torch.arange(1, 1 + TRIED)[None]
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    else:
        return None
    device = next(model.parameters()).device
    batch = {name: value[:, :TRIED] if value.ndim == 2 else value for name, value in batch.items()}
    batch = {name: value.to(device) for name, value in batch.items()}

    @torch.no_grad()
    def fails(says: bool) -> Exception | None:
        try:
            with at_rest(model), uncompiled(), torch.random.fork_rng(devices=[]):
                _say(model, batch["input_ids"][:1]) if says else model(**read_by(model, batch))
        except Exception as error:
            return error
        return None

    return fails


TRIED = 8
"""Tokens that a shortened model is tried on."""


def _say(model: Any, ids: Tensor) -> None:
    """Two tokens with the cache, under a configuration of its own, so that the checkpoint's raises no warnings."""
    from transformers import GenerationConfig

    kept = model.generation_config
    starts = {name: getattr(kept, name) for name in ("bos_token_id", "decoder_start_token_id")}
    model.generation_config = GenerationConfig(max_new_tokens=2, use_cache=True, pad_token_id=0, **starts)
    try:
        model.generate(ids, attention_mask=torch.ones_like(ids))
    finally:
        model.generation_config = kept


def influence(stack: LayerStack, examples: Examples, width: int, skip_first_token: bool, batch_size: int) -> Scores:
    """1 - mean cosine between what enters block l and what leaves block l + width - 1, for every l.

    Returns:
        Values in [0, 2] by l; without the places where the shape changes on the way.
    """
    skipped = _skipped(examples, skip_first_token)
    batches = session.progress(examples.batches(batch_size), "block influence", -(-len(examples) // batch_size))
    seen = measure(stack, batches, windows(stack, width), turn, skip_first=skipped)
    return {start: float(seen[pair].mean) for start, pair in enumerate(windows(stack, width)) if pair in seen}


def _skipped(examples: Examples, skip_first_token: bool) -> int:
    """How many positions at the beginning do not count; an image has no first token."""
    return int(skip_first_token and examples.kind != "images")


def ranked(scores: Scores, candidates: Sequence[int]) -> list[int]:
    """The candidates by score, lowest first; ties go to the later block."""
    return sorted(candidates, key=lambda i: (scores[i], -i))


def _by_loss(
    stack: LayerStack, examples: Examples, choice: Choice, batch_size: int, *, again: bool
) -> tuple[Scores, list[int]]:
    """Each candidate's loss without it, and the blocks to drop: all by these losses, or one a round."""

    def losses(cuts: list[list[int]]) -> list[float]:
        paths = [[i for i in range(len(stack)) if i not in cut] for cut in cuts]
        return path_losses(stack, paths, examples, batch_size)

    scores = dict(zip(choice.candidates, losses([[i] for i in choice.candidates]), strict=True))
    return scores, greedy(losses, choice) if again else choice.first(ranked(scores, choice.candidates))


def greedy(losses: Callable[[list[list[int]]], list[float]], choice: Choice) -> list[int]:
    """Drop one block a round, each time the one without which the loss is lowest; ties go to the later block.

    Args:
        losses: lists of dropped blocks -> what is to stay low (a loss, or a negative task score) for each.
        choice: the blocks that may go, and how many rounds there are; each asks for all remaining candidates at once.

    Returns:
        The dropped blocks in the order of choice.
    """
    removed = list(choice.named)
    while len(removed) < choice.count:
        left = [i for i in choice.candidates if i not in removed and choice.fits([*removed, i])]
        scores = dict(zip(left, losses([[*removed, i] for i in left]), strict=True))
        removed += ranked(scores, left)[:1]
    return removed


def _parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
