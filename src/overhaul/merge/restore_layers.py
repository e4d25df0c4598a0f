"""Selective layer restoration: give a run of blocks of a post-trained model its base's weights back, for varied answers.

Zhang, Wang and Soh, "Not All Layers Need Tuning: Selective Layer Restoration Recovers Diversity", arXiv:2602.06665.

    H(i, j)        the post-trained model with blocks i to j of its base; embeddings, last norm and head stay
    p              probabilities of the next token after a request for one random character, whose right answers are V
    validity  Q    sum over v in V of p(v)
    diversity D    - sum q(v) log q(v) / log |V|,   q(v) = p(v) / Q        means over requests
    choice         argmax D(H) subject to Q(H) >= floor * Q(post)

How it differs from the paper, whose code was not released:

1. All L (L + 1) / 2 runs of blocks are scored exactly without a weight being copied: what they share is computed once
   (`prefix`), about a third of one forward each.
2. Every spelling of an answer that is one token ("7", " 7") counts as that answer, else spellings pass for diversity.
3. D is a share of the largest entropy, so that sets of several sizes weigh the same.
4. One run of several hundred is chosen on a few dozen requests: what is stated of it is measured on requests held out.
5. The floor holds for the mean; the lowest validity of one request is stated beside it.
6. Mixtures of all weights (soups), chosen by the same rule, are the baseline. `layers` restores blocks that are named.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from annotated_types import Ge, Gt, Le, Lt
from torch import Tensor, nn

from overhaul import session
from overhaul.data.examples import IGNORED, Examples
from overhaul.errors import RequestError, RunError
from overhaul.forward import forward
from overhaul.merge._kinship import Kinship
from overhaul.method import Outcome, Table, method
from overhaul.models import Checkpoint, planned
from overhaul.modes import at_rest
from overhaul.prefix import path_answers
from overhaul.rollouts import prompt_of
from overhaul.selectors import blocks_of
from overhaul.stack import LayerStack

NAME = "merge.restore_layers"


@method(
    verb="merge",
    paper="2602.06665",
    changes="weights",
    memory="forward",
    copies=lambda knobs: int(knobs["soups"] > 0),
)
def restore_layers(
    model: nn.Module,
    base: Checkpoint,
    prompts: Examples,
    *,
    layers: str | None = None,
    floor: Annotated[float, Ge(0), Le(1)] = 0.9,
    held_out: Annotated[float, Gt(0), Lt(1)] = 0.25,
    soups: Annotated[int, Ge(0)] = 9,
    batch_size: Annotated[int, Ge(1)] = 16,
) -> Outcome:
    """Restore the run of blocks that makes answers most varied and keeps them valid.

    Both models are held. What safety training did may lie in the blocks that are restored: judge refusals again.

    Args:
        model: the post-trained model, changed in place.
        base: the checkpoint that it was trained from, with the same blocks.
        prompts: requests with their right answers, each one token, in the column `valid` (`starter:characters`).
        layers: places of blocks that are restored ("3-9"), with no search.
        floor: least validity, as a share of the post-trained model's.
        held_out: share of the requests, drawn by the seed, on which nothing is chosen.
        soups: mixtures of all weights that are scored beside, at equal steps between the two models; each takes one more
            copy of the weights while it runs. 0 for none.
        batch_size: requests in one forward; does not change the values.

    Returns:
        The same model. Facts: first and last restored block, validity and diversity before and after on the requests held
        out, the lowest validity of one request, those of the best soup that holds the floor, and how far the model's
        blocks are from the base's (L2, as a share). Tables: diversity and validity by first and last block, and all
        candidates as points.

    Raises:
        RequestError: the models do not correspond, a request has fewer than two answers that are one token, or too few
            requests.
        RunError: no run of blocks is more varied and holds the floor; an output is not finite.
    """
    stack = LayerStack.of(model)
    runs = [tuple(blocks_of(stack, layers, "layers"))] if layers else _runs(len(stack))
    parts = _parts(prompts, held_out)
    if (network := planned(base)) is not None:
        _check(stack, LayerStack.of(network), base)
    session.begins()
    kept = next(model.parameters())
    opened = base.open(dtype=str(kept.dtype).removeprefix("torch.")).to(kept.device)
    theirs = LayerStack.of(opened)
    if network is None:
        _check(stack, theirs, base)
    kin = _kinship(stack, theirs)
    scores = {part: _along(stack, theirs, [(), *runs], examples, batch_size) for part, examples in parts.items()}
    chosen_on, stated_on = scores.values()
    allowed = [run for run in runs if layers or chosen_on[run].validity >= floor * chosen_on[()].validity]
    best = max(allowed, key=lambda run: chosen_on[run].diversity, default=())
    if not layers and (not best or chosen_on[best].diversity <= chosen_on[()].diversity):
        raise RunError(
            f"{NAME}: no run of blocks is more varied than the model and keeps {floor:g} of its validity "
            f"({chosen_on[()].validity:.3f}). Lower `floor`, or name `layers`."
        )
    mixed = _soups(model, opened, soups, parts, batch_size)
    advice = [*filter(None, [kin.get("advice")]), *[ADVICE] * (stated_on[()].validity < SPEAKS)]
    for place in best:
        _copy(theirs.blocks[place], stack.blocks[place])
    return Outcome(
        model,
        facts={
            **_facts(best, chosen_on, stated_on),
            **_best_soup(mixed, chosen_on[()], floor),
            **kin,
            **({"advice": " ".join(advice)} if advice else {}),
        },
        layers={"restored": {place: float(place in best) for place in range(len(stack))}},
        tables=_tables(len(stack), runs, chosen_on, mixed),
    )


@dataclass(frozen=True)
class Score:
    """Of some requests: mean validity, mean diversity, and the lowest validity of one."""

    validity: float
    diversity: float
    worst: float


@dataclass(frozen=True)
class _Requests:
    """Requests with one position to answer at, and for each the tokens of each right answer."""

    examples: Examples
    answers: Sequence[Sequence[Tensor]]


Run = tuple[int, ...]

ADVICE = (
    "The model answers hardly any of these requests with what was asked for, so this choice means little. Ask as it was "
    "trained to be asked (`chat_template:`, `prompt:`), or ask for what it knows."
)


def _runs(count: int) -> list[Run]:
    return [tuple(range(first, last + 1)) for first in range(count) for last in range(first, count)]


def _check(stack: LayerStack, theirs: LayerStack, base: Checkpoint) -> None:
    """Refuse a base whose blocks do not fit."""
    shapes = [
        [{name: tuple(value.shape) for name, value in block.state_dict().items()} for block in each.blocks]
        for each in (stack, theirs)
    ]
    if shapes[0] != shapes[1]:
        raise RequestError(
            f"{NAME}: {base.source} has {len(theirs)} blocks and the model {len(stack)}, or their tensors differ in name or "
            "shape. Give the checkpoint that this model was trained from."
        )


def _kinship(stack: LayerStack, theirs: LayerStack) -> dict[str, Any]:
    """How far the blocks are from those of the base, with a warning where they can hardly have come from it."""
    kinship = Kinship()
    for place, blocks in enumerate(zip(stack.blocks, theirs.blocks, strict=True)):
        own, other = (dict(block.named_parameters()) for block in blocks)
        for name, value in other.items():
            kinship.note(f"{place}.{name}", value.ndim > 1, value.detach().float(), own[name].detach().float())
    return kinship.facts(NAME, ["the model"])


def _parts(prompts: Examples, held_out: float) -> dict[str, _Requests]:
    """The requests to choose on and those held out."""
    kept = round(len(prompts) * held_out)
    if not 0 < kept < len(prompts):
        raise RequestError(
            f"{NAME}: `prompts` has {len(prompts)} requests, too few to hold some out: give some dozens."
        )
    mixed = prompts.shuffled(torch.initial_seed())
    return {"chosen on": _requests(mixed[kept:]), "held out": _requests(mixed[:kept])}


def _requests(prompts: Examples) -> _Requests:
    if prompts.kind != "tokens" or prompts.processor is None:
        raise RequestError(f"{NAME}: `prompts` are requests with a tokenizer, and these are {prompts.kind}.")
    spelt: dict[str, list[int]] = {}
    for token in range(len(prompts.processor)):
        spelt.setdefault(prompts.processor.decode([token]).strip(), []).append(token)
    items, answers = [], []
    for row, item in zip(prompts.rows, prompts.items, strict=True):
        valid = row.get("valid")
        listed = list(dict.fromkeys(map(str, valid))) if isinstance(valid, list | tuple) else []
        unknown = [answer for answer in listed if answer not in spelt]
        if len(listed) < 2 or unknown:
            raise RequestError(
                f"{NAME}: the request {row.get('question', '')!r} "
                + (
                    f"lists {unknown[0]!r}, which is no single token"
                    if unknown
                    else "lists fewer than two right answers"
                )
                + ". Write them into the column `valid`, a list of words that are one token each."
            )
        asked = prompt_of(item)
        labels = torch.full((len(asked) + 1,), IGNORED)
        labels[-1] = spelt[listed[0]][0]
        items.append({"input_ids": torch.cat([asked, labels[-1:]]), "labels": labels})
        answers.append([torch.tensor(spelt[answer]) for answer in listed])
    return _Requests(Examples(items, prompts.rows, prompts.processor), answers)


def _along(
    stack: LayerStack, theirs: LayerStack, runs: Sequence[Run], requests: _Requests, batch_size: int
) -> dict[Run, Score]:
    """The score of every hybrid."""
    paths = [[(place, theirs.blocks[place]) if place in run else place for place in range(len(stack))] for run in runs]
    found = path_answers(stack, paths, requests.examples, batch_size, lambda logits, _: _chances(logits))
    return {run: score(torch.cat(batches), requests.answers) for run, batches in zip(runs, found, strict=True)}


def _chances(logits: Tensor) -> Tensor:
    return logits.float().softmax(dim=-1).cpu()


def score(chances: Tensor, answers: Sequence[Sequence[Tensor]]) -> Score:
    """Validity and diversity.

    Args:
        chances: probabilities of the next token, [n, v].
        answers: for each of n requests the tokens that spell each right answer.

    Raises:
        RunError: a probability is not finite.
    """
    if not bool(chances.isfinite().all()):
        raise RunError(f"{NAME}: an output is not finite (NaN or infinite).")
    validity, diversity = [], []
    for line, spelt in zip(chances.double(), answers, strict=True):
        mass = torch.stack([line[tokens].sum() for tokens in spelt])
        total = mass.sum()
        validity.append(float(total))
        share = mass / total.clamp_min(torch.finfo(torch.float64).tiny)
        diversity.append(float(torch.special.entr(share).sum()) / math.log(len(spelt)))
    return Score(sum(validity) / len(validity), sum(diversity) / len(diversity), min(validity))


def _soups(
    model: nn.Module, opened: nn.Module, count: int, parts: Mapping[str, _Requests], batch_size: int
) -> dict[float, dict[str, Score]]:
    """The score of (1 - a) model + a base for `count` shares a between 0 and 1; none where embeddings differ in size."""
    other = dict(opened.named_parameters())
    own = dict(model.named_parameters())
    if not count or any(other[name].shape != value.shape for name, value in own.items()):
        return {}
    device = next(model.parameters()).device
    found: dict[float, dict[str, Score]] = {}
    with torch.no_grad(), at_rest(model):
        for step in session.progress(range(1, count + 1), "soups", count):
            share = step / (count + 1)
            mixed = {f"model.{name}": torch.lerp(value, other[name], share) for name, value in own.items()}
            found[share] = {}
            for part, requests in parts.items():
                lines: list[Tensor] = []
                for batch in requests.examples.batches(batch_size):
                    moved = {name: value.to(device) for name, value in batch.items()}
                    logits = torch.func.functional_call(_Logits(model), mixed, (moved,))
                    lines.append(_chances(logits[:, :-1][moved["labels"][:, 1:] != IGNORED]))
                found[share][part] = score(torch.cat(lines), requests.answers)
    return found


class _Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        return forward(self.model, batch)


def _best_soup(mixed: Mapping[float, Mapping[str, Score]], own: Score, floor: float) -> dict[str, float]:
    allowed = [share for share, by_part in mixed.items() if by_part["chosen on"].validity >= floor * own.validity]
    if not allowed:
        return {}
    best = max(allowed, key=lambda share: mixed[share]["chosen on"].diversity)
    stated = mixed[best]["held out"]
    return {
        "best_soup_share_of_base": best,
        "best_soup_validity": stated.validity,
        "best_soup_diversity": stated.diversity,
    }


SPEAKS = 0.1
"""A model that is valid less often does not answer such requests; its variety is that of noise."""


def _facts(best: Run, chosen_on: Mapping[Run, Score], stated_on: Mapping[Run, Score]) -> dict[str, float | int | str]:
    before, after = stated_on[()], stated_on[best]
    return {
        "first_block": best[0], "last_block": best[-1],
        "validity_before": before.validity, "validity_after": after.validity,
        "diversity_before": before.diversity, "diversity_after": after.diversity,
        "lowest_validity_of_a_request": min(chosen_on[best].worst, after.worst),
    }  # fmt: skip


def _tables(
    count: int, runs: Sequence[Run], scores: Mapping[Run, Score], mixed: Mapping[float, Mapping[str, Score]]
) -> dict[str, Table]:
    def named(run: Run) -> str:
        return "the model" if not run else f"blocks {run[0]}-{run[-1]}"

    dots = [(named(run), one.validity, one.diversity) for run, one in scores.items()]
    dots += [
        (f"soup, {share:.2f} base", by_part["chosen on"].validity, by_part["chosen on"].diversity)
        for share, by_part in mixed.items()
    ]
    tables = {"validity and diversity": Table.points(dots, x="validity", y="diversity")}
    if len(runs) > 1:
        for name in ("diversity", "validity"):
            grid = [
                [
                    getattr(scores[tuple(range(first, last + 1))], name) if last >= first else None
                    for last in range(count)
                ]
                for first in range(count)
            ]
            tables[f"{name} by restored blocks"] = Table.grid(
                grid, range(count), range(count), along="first restored block", across="last restored block"
            )
    return tables


@torch.no_grad()
def _copy(source: nn.Module, target: nn.Module) -> None:
    own = target.state_dict()
    for name, value in source.state_dict().items():
        own[name].copy_(value)
