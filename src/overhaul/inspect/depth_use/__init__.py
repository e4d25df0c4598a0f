"""Depth use: how much each block writes, who reads it, where the output is decided, and which inputs use more of the depth.

"Do Language Models Use Their Depth Efficiently?", Csordas, Manning and Potts, NeurIPS 2025, arXiv:2505.13898.

    relative contribution   |a_l| / |h_l|,  |m_l| / |h_l + a_l|,  |c_l| / |h_l|        c_l = a_l + m_l = h_(l+1) - h_l
    effect on block l       E[s, l] = max |c_l - c'_l| / |c_l|, block s left out: everywhere, or before t and seen from t on
    effect on predictions   O[s] = max |softmax(y) - softmax(y')|
    lens                    KL(softmax(head(h_l)) || softmax(y)),  the share of the 5 most probable tokens in common
    depth score             sum_l l e_l / sum_l e_l,  e_l = O[l] or the mean of E[l, .] over the blocks behind l

A model that uses its depth shows an effect on the *future* (positions from t on, when a block is left out before t) in all
blocks, and a depth score that grows with the difficulty of a question.

How it differs from the released code:

1. a_l and m_l are found by what they do (`trace.sites`), not by the names of modules: output norms (Gemma 3, OLMo 2) and
   parallel blocks are in. Where they cannot be told, blocks are measured as wholes.
2. Entries of E at or before the block that is left out are None. The released code draws 0 before it and, for skips at all
   positions, 1 at it; both are so by construction.
3. Where several examples are joined by `over="mean"`, it is the mean of their largest values, as in its depth scores.
4. The lens has means over all positions of all examples, the released code means over examples of their means; it stops at
   what enters the last block, this goes on to what leaves it, where KL is 0. Attention that is left out gives 0 and the MLP
   then reads h_s, as there.
5. Integrated gradients take the middle of each interval instead of its left end, and can be those of the log-probability:
   on a model of 8 blocks 16 steps are as near to what the sums should be as the released 256. `integration_gap` says how
   near.
6. Erasure puts the mean state of the examples that are measured in place of a position; the released code that of ten
   questions of GSM8K.
7. In an answer, the first future begins where its first token is predicted; in the released code one position later, where
   the prediction of an answer of one token is not seen.
8. Depths are counted from 0, as in the released code; the paper counts from 1.
9. Every number is a difference of runs of one shape, in float32. Maxima grow with the number of examples and of positions:
   compare two models on the same text.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge
from torch import Tensor, nn

from overhaul import session
from overhaul.data.examples import IGNORED, Batch, Examples
from overhaul.errors import RequestError
from overhaul.inspect.depth_use.answers import Target, attribution, erasure
from overhaul.inspect.depth_use.contributions import Lens, Profile, lens, parts_of, profile
from overhaul.inspect.depth_use.skips import Effects, Part, Skip, depth_score, effects, futures, on_later
from overhaul.method import Outcome, Table, method
from overhaul.modes import at_rest
from overhaul.objectives import check_labelled
from overhaul.stack import LayerStack
from overhaul.stack.calls import map_tensors
from overhaul.trace.sites import BlockSites, sites

Layers = dict[str, dict[int, float]]
Kind = tuple[Part, bool]
TITLES: Mapping[Part, str] = {
    "block": "a block",
    "attention": "attention",
    "MLP": "an MLP",
    "direct": "a block, direct reads alone",
}
MAIN = (
    "relative contribution, block",
    "cosine with the stream, block",
    "effect on later blocks in the future without a block",
    "lens: KL to the output",
)
"""The curves that a report shows before all others: the paper's four questions."""

NEARLY, SHARED = 0.1, 0.2
"""A lens has decided where KL is below this part of its largest value, or the overlap above this share."""


@method(verb="inspect", paper="2505.13898", changes="nothing", memory="gradient", alone=True)
def depth_use(
    model: nn.Module,
    text: Examples,
    *,
    examples: Annotated[int, Ge(1)] = 10,
    by: str | None = None,
    futures: Annotated[int, Ge(0)] = 4,
    stride: Annotated[int, Ge(1)] = 8,
    within: Literal["text", "answer"] = "text",
    keep_first: Annotated[int, Ge(0)] = 1,
    count_first: bool = True,
    sublayers: bool = True,
    direct: bool = True,
    over: Literal["max", "mean"] = "max",
    top: Annotated[int, Ge(1)] = 5,
    maps: Annotated[int, Ge(0)] = 2,
    gradient_steps: Annotated[int, Ge(0)] = 256,
    gradients_of: Target = "probability",
    batch_size: Annotated[int, Ge(1)] = 16,
) -> Outcome:
    """Measure what each block contributes, what depends on it, and where the output is decided.

    With L blocks, an example runs about L / 2 times for each of `futures` + 1 skips (three times as many with `sublayers`),
    and each of `maps` examples L / 2 times for every position and, forward and backward, for every step of the gradients.

    Args:
        model: a pre-norm language model, or an image model whose blocks have one shape. It stays as it is.
        text: text, questions with answers, or images.
        examples: the first so many are measured (of each level, with `by`).
        by: the row column that holds the difficulty of an example; a depth score is given for each level.
        futures: positions of each example from which on effects on the future are read; 0 for none. Images have none.
        stride: they are multiples of it, drawn without replacement. The paper has 4 within answers.
        within: they lie anywhere in the "text", or in the "answer", from where its first token is predicted.
        keep_first: positions at the start at which nothing is left out: without its first token a model loses its
            attention sink. Images keep none.
        count_first: whether these positions count in contributions and lens.
        sublayers: leave out attention and MLP as well, and integrate gradients over them.
        direct: measure direct effects as well: c_s is missing for later blocks, which do not pass on what that changes.
        over: whether the examples' effects are joined by their "max" or "mean".
        top: how many of the most probable tokens the lens compares.
        maps: for the first so many examples, layer by position, what the answer depends on: by erasure and gradients.
        gradient_steps: points of integrated gradients; 0 for none.
        gradients_of: of the sum of the "probability" or "log_probability" of the answer's tokens.
        batch_size: copies that run together (all skips of an example always do); does not change the values.

    Returns:
        No model. Facts: the depth of the last turn of c_l's cosine from below 0, depths at which the lens has decided, mean
        effects in the first and second half of the blocks, depth scores, the largest error of integrated gradients. Layers:
        norms, relative contributions, cosines, mean effects, lens; the lens at -1 reads what enters the first block. Tables:
        effects block by block, depth scores by level, and for some examples erasure and attributions by position.

    Raises:
        RequestError: no examples, blocks of several shapes or that cannot be run by hand, a column that is missing, or no
            example long enough for a position to read the future at.
    """
    stack = LayerStack.of(model)
    chosen, levels = _chosen(stack, text, examples, by)
    batches = [
        map_tensors(batch, lambda value: value.to(next(model.parameters()).device))
        for batch in chosen.batches(batch_size)
    ]
    kept = 0 if chosen.kind == "images" else keep_first
    counted_from = 0 if count_first else kept
    ends = _ends(chosen, futures, stride, within == "answer", kept)
    with at_rest(model):
        found = sites(stack, _sample(batches[0]))
    seen = profile(stack, found, batches, counted_from)
    skips = _skips(found, ends, sublayers, direct)
    by_example = effects(stack, found, chosen.items, skips, keep_first=kept, rows=batch_size)
    joined = _joined(by_example, over)
    read = lens(stack, batches, top, counted_from)
    score_of: Kind = ("block", True) if ("block", True) in joined else ("block", False)
    scores = _scores(by_example, levels, score_of, over)
    facts = {**_facts(seen, read, joined), **scores[0], "examples": len(chosen)}
    tables = {**_grids(joined), **({"depth score by level": scores[1]} if by else {})}
    gaps: list[float] = []
    for number, item in enumerate(session.progress(chosen.items[:maps], "maps of examples", maps), 1):
        erased = erasure(stack, item, seen.means, batch_size)
        labels = _labels(chosen, item, erased.shape[1])
        tables[f"example {number}: change of the answer when a position is erased"] = Table.grid(
            erased, _layers(stack), labels, along="after block", across="position"
        )
        for part, modules in _attributed(found, sublayers) if gradient_steps else ():
            result = attribution(stack, item, modules, gradient_steps, gradients_of, batch_size)
            gaps.append(result.gap)
            tables[f"example {number}: integrated gradients of {part}"] = Table.grid(
                _cells(result.values), range(len(stack)), labels, along="block", across="position"
            )
    if gaps:
        facts["integration_gap"] = max(gaps)
    return Outcome(None, facts=facts, layers=_curves(seen, read, joined), tables=tables)


# what is measured


def _chosen(stack: LayerStack, text: Examples, count: int, by: str | None) -> tuple[Examples, list[str]]:
    """The examples, and the level of each."""
    if len(stack.lists) > 1:
        raise RequestError(
            f"inspect.depth_use: the blocks of {type(stack.model).__name__} come in stages of other shapes, so they do not "
            "share one residual stream. It measures stacks whose blocks all have one shape."
        )
    if by is not None and (lacking := [n for n, row in enumerate(text.rows) if by not in row]):
        raise RequestError(
            f"inspect.depth_use: row {lacking[0]} has no column {by!r}. It has: {sorted(text.rows[lacking[0]])}."
        )
    check_labelled("text", text)
    if text.classified and text.kind == "tokens":
        raise RequestError(
            "inspect.depth_use measures language models and images, and these are texts with a class each."
        )
    levels = ["all" if by is None else str(row[by]) for row in text.rows]
    numbers = [levels[:place].count(level) for place, level in enumerate(levels)]
    places = [place for place, number in enumerate(numbers) if number < count]
    lengths = [len(text[place].get("input_ids", (0, 0))) for place in places]
    if not places or min(lengths) < 2:
        raise RequestError("inspect.depth_use: the role `text` is empty, or has an example of a single token.")
    for place in places:
        labels = text[place]["labels"]
        if labels.ndim and not bool((labels[1:] != IGNORED).any()):
            raise RequestError(f"inspect.depth_use: example {place} of `text` has no token that is predicted.")
    return text.select(places), [levels[place] for place in places]


def _sample(batch: Batch) -> Batch:
    """A few samples, to find the sites with."""
    return {name: value[:2] for name, value in batch.items()}


def _ends(chosen: Examples, count: int, stride: int, in_answer: bool, kept: int) -> list[list[int]]:
    """Of each example the positions from which on the future is read; drawn from the seed and the example alone."""
    draw = torch.Generator().manual_seed(torch.initial_seed())
    ends: list[list[int]] = []
    for item in chosen.items:
        possible = futures(item["labels"], stride, kept, in_answer) if count and chosen.kind != "images" else []
        order = torch.randperm(len(possible), generator=draw).tolist()
        ends.append([possible[n] for n in order[:count]])
    if count and chosen.kind != "images" and not any(ends):
        raise RequestError(
            f"inspect.depth_use: no example is long enough to read the future at a multiple of {stride} tokens, four before "
            "its end. Give longer text, a smaller stride, or futures: 0."
        )
    return ends


def _skips(
    found: Sequence[BlockSites], ends: Sequence[Sequence[int]], sublayers: bool, direct: bool
) -> list[list[Skip]]:
    """What is tried on each example."""
    parts: list[Part] = ["block"]
    if sublayers:
        sublayer: tuple[tuple[Part, str], ...] = (("attention", "attention"), ("MLP", "mlp"))
        parts.extend(part for part, role in sublayer if parts_of(found, role))
    if direct:
        parts.append("direct")
    return [[Skip(part, end) for part in parts for end in (None, *own)] for own in ends]


def _attributed(found: Sequence[BlockSites], sublayers: bool) -> list[tuple[str, list[str | None] | None]]:
    """The parts whose outputs gradients are integrated over, with their modules."""
    chosen: list[tuple[str, list[str | None] | None]] = [("blocks", None)]
    for name, role in (("attention", "attention"), ("MLPs", "mlp")) if sublayers else ():
        known = parts_of(found, role)
        if known:
            chosen.append((name, [known[n].module if n in known else None for n in range(len(found))]))
    return chosen


# what is reported


def _joined(by_example: Sequence[Mapping[Kind, Effects]], over: str) -> dict[Kind, Effects]:
    """The examples' effects as one, by kind; without the examples that were too short for it."""
    joined: dict[Kind, Effects] = {}
    for kind in dict.fromkeys(kind for one in by_example for kind in one):
        some = [one[kind] for one in by_example if kind in one]
        later, output = torch.stack([one.later for one in some]), torch.stack([one.output for one in some])
        joined[kind] = (
            Effects(later.amax(0), output.amax(0)) if over == "max" else Effects(later.mean(0), output.mean(0))
        )
    return joined


def _scores(
    by_example: Sequence[Mapping[Kind, Effects]], levels: Sequence[str], kind: Kind, over: str
) -> tuple[dict[str, float | None], Table]:
    """Depth scores of all examples as facts, and of each level as a table."""

    def of(level: str | None) -> tuple[float | None, float | None]:
        own = [one for one, its in zip(by_example, levels, strict=True) if level is None or its == level]
        effect = _joined(own, over).get(kind)
        return (None, None) if effect is None else (depth_score(on_later(effect.later)), depth_score(effect.output))

    rows = [(level, levels.count(level), *of(level)) for level in dict.fromkeys(levels)]
    table = Table(("level", "examples", "depth score, later blocks", "depth score, predictions"), tuple(rows))
    later, output = of(None)
    return {"depth_score": later, "depth_score_of_predictions": output}, table


def _facts(seen: Profile, read: Lens, joined: Mapping[Kind, Effects]) -> dict[str, Any]:
    """What the curves come down to, and where the effects are."""
    cosines = [seen.written["block"][n].cosine for n in sorted(seen.written["block"])]
    turns = [n for n in range(1, len(cosines)) if cosines[n - 1] < 0 <= cosines[n]]
    near = [n for n, value in enumerate(read.divergence) if value < NEARLY * max(read.divergence)]
    alike = [n for n, value in enumerate(read.overlap) if value > SHARED]
    facts: dict[str, Any] = {
        "positions": seen.written["block"][0].count,
        "cosine_turns_at": turns[-1] if turns else None,
        "decided_by_divergence_at": near[0] - 1 if near else None,
        "decided_by_overlap_at": alike[0] - 1 if alike else None,
    }
    half = len(cosines) // 2
    kinds: tuple[tuple[Kind, str], ...] = ((("block", True), "future"), (("block", False), "all_positions"))
    for kind, name in kinds:
        if half and kind in joined:
            # the last block has none behind it
            later, output = on_later(joined[kind].later)[:-1].tolist(), joined[kind].output.tolist()
            for label, values in (("later_blocks", later), ("predictions", output)):
                facts[f"effect_on_{label}_{name}_first_half"] = statistics.fmean(values[:half])
                facts[f"effect_on_{label}_{name}_second_half"] = statistics.fmean(values[half:] or [0.0])
    return facts


def _curves(seen: Profile, read: Lens, joined: Mapping[Kind, Effects]) -> Layers:
    layers: Layers = {}
    for part, own in seen.written.items():
        for label, name in (
            ("relative contribution", "relative"),
            ("largest relative contribution", "relative_max"),
            ("cosine with the stream", "cosine"),
            ("norm", "norm"),
            ("largest norm", "norm_max"),
        ):
            layers[f"{label}, {part}"] = {place: getattr(one, name) for place, one in sorted(own.items())}
    blocks = seen.written["block"]
    for label, name in (("norm", "stream"), ("largest norm", "stream_max"), ("cosine of input and output", "through")):
        layers[f"{label}, stream" if name != "through" else label] = {
            n: getattr(blocks[n], name) for n in sorted(blocks)
        }
    for (part, in_future), effect in joined.items():
        where = "in the future" if in_future else "at all positions"
        later = on_later(effect.later)[:-1].tolist()
        layers[f"effect on later blocks {where} without {TITLES[part]}"] = dict(enumerate(later))
        if part != "direct":
            output = effect.output.tolist()
            layers[f"effect on predictions {where} without {TITLES[part]}"] = dict(enumerate(output))
    layers["lens: KL to the output"] = dict(enumerate(read.divergence, -1))
    layers["lens: overlap of the most probable"] = dict(enumerate(read.overlap, -1))
    first = [name for name in MAIN if name in layers]
    return {name: layers[name] for name in dict.fromkeys([*first, *layers])}


def _grids(joined: Mapping[Kind, Effects]) -> dict[str, Table]:
    tables: dict[str, Table] = {}
    for (part, in_future), effect in joined.items():
        size = len(effect.later)
        cells = [
            [value if n > s else None for n, value in enumerate(row)] for s, row in enumerate(effect.later.tolist())
        ]
        title = f"effect on later blocks {'in the future' if in_future else 'at all positions'} without {TITLES[part]}"
        tables[title] = Table.grid(
            cells, range(size), range(size), along="left out of block", across="effect on block", unit="relative change"
        )
    return tables


def _layers(stack: LayerStack) -> range:
    return range(-1, len(stack))


def _labels(chosen: Examples, item: Mapping[str, Tensor], count: int) -> list[str]:
    """A name for each position: its number, and its token where there is a tokenizer."""
    decode = getattr(chosen.processor, "decode", None)
    if decode is None or "input_ids" not in item:
        return [str(n) for n in range(count)]
    return [f"{n} {decode([token])!r}" for n, token in enumerate(item["input_ids"].tolist())]


def _cells(values: Tensor) -> list[list[float | None]]:
    """Numbers, None for what does not exist."""
    return [[None if value != value else value for value in row] for row in values.tolist()]
