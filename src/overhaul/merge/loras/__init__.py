"""Recycle adapters: merge a pool of other people's LoRAs for a task, and say whether that beats training one's own.

"The Appeal and Reality of Recycling LoRAs with Adaptive Merging", arXiv:2602.12323; LoraHub, arXiv:2307.13269; TIES,
arXiv:2306.01708; TSV, arXiv:2412.00081; Arrow, arXiv:2405.11157.

    W + sum_i g(w_i) s_i B_i A_i,    s = alpha / r, or alpha / sqrt(r)          (rsLoRA)

    adaptive   w by AdamW on a few examples, one for each adapter and module; the moment that is best on others is kept
    search     one w for each adapter, by a search without gradients over loss + 0.05 mean |w|             (LoraHub)
    average    g(w_i) = 1 / n
    ties       of each change the largest entries; the mean of those with the sign of their sum
    tsv        the first singular triplets of each change, their vectors made orthogonal, values / n

Beside the merge always stand the base, a LoRA trained on the same examples for as many steps, that one re-scaled alone, the
merge with it as a further adapter, and both merges of a pool whose matrices are redrawn from N(0, std^2).

How it differs from the paper and its code:

1. The default is the paper's recipe with 30 adapters. Adapters are chosen by their loss on `train`, not by a task's metric,
   and never on `valid`; whoever gives `test` has the table measured on what nothing was chosen by.
2. s is right for rsLoRA and for patterns of rank and alpha; the code mixes with alpha / r. DoRA and whatever else is more
   than a product is refused by name. An adapted head is merged like any layer.
3. "search" takes COBYLA of scipy on `train` and `valid` together; LoraHub takes Nevergrad. `rule: separate` is LoraHub's
   sum of A's times sum of B's, with its cross terms, s spread evenly over both; "exact" adds the changes. LoraHub divides
   its mean loss by the number of examples besides, which makes its penalty weigh more.
4. "ties" is the mean of TIES. The code multiplies the running sum by each next weight, so that early adapters vanish.
5. Absent adapters have no share of a softmax, in a mixture or in Arrow's routing. Arrow is measured and not trained;
   it depends on the token, so it cannot be part of the weights.
6. The adapters themselves stay as they are: pi-Tuning, which trains them, is left out.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated

import torch
from annotated_types import Ge, Gt
from torch import nn

from overhaul import session
from overhaul.data.examples import Examples
from overhaul.errors import RunError
from overhaul.fit import Regime
from overhaul.merge.loras.choosing import Choice, worth
from overhaul.merge.loras.controls import redrawn, routed
from overhaul.merge.loras.how import How
from overhaul.merge.loras.layers import Adapter, changed_by, exchanged, fold
from overhaul.merge.loras.learning import Lesson, fresh, keys_of
from overhaul.merge.loras.pool import check_pool, other_base, read_pool
from overhaul.merge.loras.trial import Merge, Trial
from overhaul.method import Outcome, Table, method
from overhaul.models import Checkpoint
from overhaul.objectives import check_learnable, check_positions
from overhaul.stack import LayerStack

PAPER = Regime(steps=100, batch_size=8, lr=5e-2, warmup=0.1, schedule="cosine")
ALPHA, DROPOUT = 16, 0.1
BASE, FRESH, RESCALED, MERGE, BOTH = "base", "fresh LoRA", "fresh LoRA, re-scaled", "merge", "merge with fresh LoRA"
RANDOM, RANDOM_BOTH, ROUTED = "random pool", "random pool with fresh LoRA", "Arrow routing (not in the weights)"


@method(
    verb="merge",
    paper="2602.12323",
    changes="weights",
    memory="training",
    makes={"coefficients": "json"},
    only={"coefficients": {"kind": ("adaptive", "search", "average")}},
    rank=lambda knobs: knobs["rank"],
)
def loras(
    model: nn.Module,
    adapters: Sequence[Checkpoint],
    train: Examples,
    valid: Examples,
    test: Examples | None = None,
    *,
    how: How = How(),
    with_fresh: bool = False,
    choice: Choice = "evaluation",
    count: Annotated[int, Ge(1)] = 30,
    training: Regime = PAPER,
    every: Annotated[int, Ge(1)] = 10,
    rank: Annotated[int, Ge(1)] = 64,
    lora_lr: Annotated[float, Gt(0)] = 3e-4,
    control_steps: Annotated[int, Ge(1)] | None = None,
) -> Outcome:
    """Merge LoRAs from a pool into a model for a task of which there are about a hundred examples.

    Everything that it is held against is trained too, up to six short trainings. Look at the table before you believe in
    the merge.

    Args:
        model: the model that the adapters were made for, changed in place.
        adapters: folders of LoRAs, of any ranks and on any linear layers.
        train: examples from which coefficients and the fresh LoRA are learnt.
        valid: examples on which the best moment of each training is chosen; no adapter is chosen on them.
        test: examples on which the table is measured; `valid` if not given.
        how: how adapters become one.
        with_fresh: let the LoRA that is trained on `train` be the first of the merged ones. The last that was chosen makes
            room for it where there are `count`, unless it is the only one.
        choice: which are merged where the pool is larger than `count`: those with the least loss on `train` ("evaluation");
            those most like the fresh LoRA ("cosine"; "clamp" counts entries of equal sign alone, "abs" all as such, "fisher"
            their squares); those of the highest "rank"; or "random" ones.
        count: how many are merged.
        training: how long and how fast coefficients are learnt; the fresh LoRA has the same but for its rate.
        every: steps after which the loss on `valid` is measured.
        rank: of the fresh LoRA, on every projection in the blocks, with alpha 16 and dropout 0.1.
        lora_lr: peak rate of the fresh LoRA.
        control_steps: most steps of each training that is not part of what is kept.

    Returns:
        The same model, with the merge in its weights. Tables: loss and share of examples said right, of the base, the fresh
        LoRA, the merges and the controls; coefficients by block and adapter; what each adapter of a larger pool is worth.
        Facts: losses in nats, adapters merged (the fresh one among them), and adapters of the pool that had to be
        evaluated. Layers: the length of the change over that of the weights. Curves: those of the training.
        `made["coefficients"]` has every coefficient by layer and adapter.

    Raises:
        RequestError: no adapter; one that does not fit the model, is more than products, or is there twice; no examples; a
            start from which nothing is learnt.
        RunError: training diverged, no mixture has a finite loss, or the best that was found is the base itself.
    """
    for name, examples in {"train": train, "valid": valid, **({} if test is None else {"test": test})}.items():
        check_learnable(name, examples)
        check_positions(model, examples)
    how.check()
    scales = check_pool(adapters, model)
    session.begins()
    pool = read_pool(adapters, scales, next(model.parameters()).device)
    advice = other_base(adapters, pool, model)
    keys_of(model, changed_by(pool), how.per)  # refuses what has no such parts, before anything trains
    full = Lesson(train, valid, training, every)
    lesser = replace(full, training=replace(training, steps=min(control_steps or training.steps, training.steps)))
    trial = Trial(model, how, valid if test is None else test, torch.Generator().manual_seed(torch.initial_seed()))
    with torch.random.fork_rng():
        trial.measure(BASE, {})
        lesson = full if with_fresh else lesser
        regime = replace(lesson.training, lr=lora_lr)
        target = fresh(model, replace(lesson, training=regime), rank, ALPHA, DROPOUT)
        trial.measure(FRESH, target, regime.steps, sum(one.a.numel() + one.b.numel() for one in target.values()))
        worths = worth(choice, model, pool, target, train, trial.draw) if len(pool) > count else [0.0] * len(pool)
        chosen = sorted(range(len(pool)), key=lambda n: -worths[n])[:count]
        experts = [pool[n] for n in chosen]
        joined = [target, *experts[: max(1, count - 1)]]
        merged = compare(trial, experts, joined, full, lesser, with_fresh)
    named = names_of(adapters)
    taken = chosen[: len(joined) - 1] if with_fresh else chosen
    names = [FRESH] * with_fresh + [named[n] for n in taken]
    outcome = folded(trial, merged, names)
    outcome.facts |= {"merged": len(names), "evaluated": 0, **advice}
    if len(pool) > count:
        outcome.facts["evaluated"] = len(pool) * (choice == "evaluation")
        rows = [(name, one, n in taken) for n, (name, one) in enumerate(zip(named, worths, strict=True))]
        outcome.tables[f"the pool by {choice}"] = Table(("adapter", "worth", "merged"), tuple(rows))
    return outcome


def compare(
    trial: Trial, experts: Sequence[Adapter], joined: Sequence[Adapter], full: Lesson, lesser: Lesson, with_fresh: bool
) -> Merge:
    """Merge the pool, with and without the fresh adapter that is first in `joined`, and the controls; one is kept."""
    if trial.how.kind == "adaptive":
        trial.merge(RESCALED, joined[:1], lesser)
    plain = trial.merge(MERGE, experts, lesser if with_fresh else full)
    both = trial.merge(BOTH, joined, full if with_fresh else lesser)
    drawn = redrawn(experts, trial.draw)
    trial.merge(RANDOM, drawn, lesser)
    trial.merge(RANDOM_BOTH, [joined[0], *redrawn(joined[1:], trial.draw)], lesser)
    with exchanged(trial.model, routed(trial.model, experts)):
        trial.measure(ROUTED, {})
    return both if with_fresh else plain


def folded(trial: Trial, merged: Merge, names: list[str]) -> Outcome:
    """The model with the mixture in its weights, and what is to be told of it."""
    if merged.is_nothing:
        raise RunError(
            f"merge.loras: the best mixture that was found is none: it changes nothing, and the loss stays "
            f"{trial.loss(BASE):.4g}. {trial.how.instead}"
        )
    stack = LayerStack.of(trial.model)
    squares: dict[int, tuple[float, float]] = {}
    by_depth: dict[int, list[dict[int, float]]] = {}
    for layer, (change, weight) in fold(trial.model, merged.adapter).items():
        depth = stack.depth(f"{layer}.weight")
        before = squares.get(depth, (0.0, 0.0))
        squares[depth] = before[0] + change, before[1] + weight
        by_depth.setdefault(depth, []).append(dict(merged.coefficients.get(layer, {})))
    outcome = Outcome(trial.model, tables={"scores": trial.table}, curves=merged.curves)
    outcome.facts = {f"loss_{key}": trial.loss(row) for key, row in SHOWN.items()}
    outcome.layers["change over weights"] = {
        depth: (change / weight) ** 0.5 if weight else 0.0 for depth, (change, weight) in sorted(squares.items())
    }
    if merged.coefficients:
        grid = [[_mean(layers, n) for n in range(len(names))] for _, layers in sorted(by_depth.items())]
        outcome.tables["coefficients"] = Table.grid(grid, sorted(by_depth), names, along="block", across="adapter")
        outcome.made["coefficients"] = {
            layer: {names[n]: value for n, value in each.items()} for layer, each in merged.coefficients.items()
        }
    return outcome


SHOWN = {"base": BASE, "fresh_lora": FRESH, "merge": MERGE, "merge_with_fresh_lora": BOTH, "random_pool": RANDOM}


def _mean(layers: list[dict[int, float]], n: int) -> float | None:
    """The mean coefficient of an adapter over the layers of a block that it changes."""
    found = [each[n] for each in layers if n in each]
    return sum(found) / len(found) if found else None


def names_of(adapters: Sequence[Checkpoint]) -> list[str]:
    """What tables call the adapters: their folders, with as much of the path as tells them apart, without a common start."""
    paths = [one.folder.resolve().parts for one in adapters]
    most = max(map(len, paths))
    depth = next((n for n in range(1, most) if len({path[-n:] for path in paths}) == len(paths)), most)
    names = ["/".join(path[-depth:]) for path in paths]
    common = os.path.commonprefix(names) if len(names) > 1 else ""  # noqa: RUF071 (characters are meant)
    cut = max(common.rfind(mark) for mark in "-_/") + 1
    return [name[cut:] or name for name in names]
