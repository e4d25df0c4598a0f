"""Path dependence: does what forget-only unlearning achieves depend on the order in which the model was trained?

"On the Impossibility of Retrain Equivalence in Machine Unlearning", arXiv:2510.16629.

    path p    stages learnt one after the other, the forget stage at place p; then unlearnt alike on every path
    F_p       forget score: nats a token of the forgotten answers, after unlearning minus before; higher is more forgotten
    d(u, r)   distance of two models: mean over answer positions of || softmax_u - softmax_r ||^2, from 0 to 2

The same data in another order is the same training set, so a model retrained without `forget` is the same target for all
paths. Where the paths end far apart, at most one of them can be there: "as if retrained" cannot be had from a forget-only
loss (GA, NPO, SimNPO) on this pipeline.

How it differs from the paper:

1. Distance is measured on the answers of all stages, forgotten and retained, beside the rise of the retained ones;
   accuracies as in the paper need tasks with verifiers.
2. Weights are trained in full, not through an adapter.
3. Every path is run with several seeds (order of the data, dropout): the spread over places is reported beside what another
   seed alone changes, at the same place.
4. SimNPO is the original, per token; the paper's code sums, so that long answers saturate it at once.
"""

from __future__ import annotations

import copy
import itertools
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt
from torch import nn

from overhaul.data.examples import IGNORED, Examples, join
from overhaul.errors import RequestError
from overhaul.fit import OptimizerFactory, TrainingState, fit
from overhaul.forget.gradient_ascent import ga_term
from overhaul.forget.npo import npo_term
from overhaul.forget.simnpo import simnpo_term
from overhaul.method import Outcome, method
from overhaul.objectives import Term, answer_tokens, check_labelled, cross_entropy, cross_entropy_sum
from overhaul.references import Reference, cache_outputs, reference_nll

PROBED = 64
"""Examples of each stage on which distances are measured."""

MEASURED_AT_ONCE = 16
Loss = Literal["ga", "npo", "simnpo"]
BETAS: Mapping[Loss, float] = {"npo": 0.5, "simnpo": 2.5}
WATCHED = "forget nll per token"


@method(verb="inspect", paper="2510.16629", changes="nothing", memory="training")
def path_dependence(
    model: nn.Module,
    forget: Examples,
    first: Examples,
    second: Examples | None = None,
    third: Examples | None = None,
    *,
    loss: Loss = "npo",
    beta: Annotated[float, Gt(0)] | None = None,
    stage_steps: Annotated[int, Ge(1)] = 150,
    unlearning_steps: Annotated[int, Ge(1)] = 15,
    batch_size: Annotated[int, Ge(1)] = 32,
    lr: Annotated[float, Gt(0)] = 1e-5,
    unlearning_lr: Annotated[float, Gt(0)] = 1e-5,
    seeds: Annotated[int, Ge(1)] = 3,
) -> Outcome:
    """Train the same stages in several orders, unlearn one of them alike, and report how far apart the models end.

    It trains `seeds` times as many models as there are stages, one after the other, each from the model as it is. The
    default rates are the paper's for models from 1B on; a model of some millions of parameters wants 1e-4 to 1e-3.

    Args:
        model: a causal language model: where every path starts. It stays as it is.
        forget: the stage that is learnt at each place in turn and then unlearnt.
        first: the stage that stays and is learnt first.
        second: the next one, after it.
        third: the last one, after both.
        loss: how the forget stage is unlearnt, from its data alone.
        beta: inverse temperature of "npo" (0.5 if not given) and "simnpo" (2.5).
        stage_steps: optimizer steps of each stage; optimizer and schedule start anew.
        unlearning_steps: optimizer steps of the unlearning.
        batch_size: examples in a step.
        lr: learning rate of AdamW in the stages, constant.
        unlearning_lr: its rate in the unlearning, constant and without clipping.
        seeds: how often all paths are run; one seed says nothing about noise.

    Returns:
        No model. Facts: the forget score by place, its spread over places, the largest change of a score by
        another seed and their ratio, the slowest place and on how many seeds the last one is it, the rise of the retained
        answers by place, and mean distances between paths before and after unlearning and between seeds of one path.
        Curves: nats a token of `forget` while it is unlearnt, by place, mean over seeds.

    Raises:
        RequestError: examples are images or carry no loss, or `third` is given without `second`.
        RunError: a training diverged.
    """
    stages = _stages(forget, first, second, third)
    retained = [name for name in stages if name != "forget"]
    probe = join([part[:PROBED] for part in stages.values()])
    term = local_term(loss, beta)
    start = torch.initial_seed()
    runs: dict[tuple[int, int], Run] = {}
    with torch.random.fork_rng():
        for n, (place, order) in itertools.product(range(seeds), enumerate(orders(retained, "forget"), 1)):
            seed = (start + n) % 2**63
            path = copy.deepcopy(model)
            label = f"seed {n}, place {place}"
            learn(path, stages, order, seed=seed, steps=stage_steps, batch_size=batch_size, lr=lr, label=label)
            before, kept = cache_outputs(path, probe, MEASURED_AT_ONCE), _mean_nats(path, stages, retained)
            found = unlearn(
                path,
                forget,
                term,
                seed=seed,
                steps=unlearning_steps,
                batch_size=batch_size,
                lr=unlearning_lr,
                label=label,
            )
            after = cache_outputs(path, probe, MEASURED_AT_ONCE)
            runs[n, place] = Run(found.score, found.curve, _mean_nats(path, stages, retained) - kept, before, after)
    return Outcome(facts=_facts(runs, len(stages), seeds), curves=_curves(runs, len(stages), seeds))


def orders(retained: Sequence[str], forgotten: str) -> list[list[str]]:
    """All orders that differ in the place of one stage alone: it is first in the first of them, last in the last."""
    return [[*retained[:place], forgotten, *retained[place:]] for place in range(len(retained) + 1)]


def learn(
    model: nn.Module,
    stages: Mapping[str, Examples],
    order: Sequence[str],
    *,
    seed: int,
    steps: int,
    batch_size: int,
    lr: float,
    optimizer: OptimizerFactory | None = None,
    label: str = "",
) -> None:
    """Train the model in place on one stage after the other; optimizer and schedule start anew in each.

    Args:
        model: where the path starts.
        stages: the data by name; the name decides with the seed in which order it is drawn.
        order: of the stages.
        seed: of the order of the data and of dropout; torch's generator is left with it.
        steps: of each stage.
        batch_size: examples in a step.
        lr: constant.
        optimizer: AdamW if not given.
        label: tells the trainings of one step apart.
    """
    torch.manual_seed(seed)
    for name in order:
        fit(
            model,
            [cross_entropy(name)],
            stages,
            steps=steps,
            batch_size=batch_size,
            lr=lr,
            optimizer=optimizer,
            name=f"{label}, {name}" if label else name,
        )


def local_term(loss: Loss, beta: float | None) -> Term:
    """A loss on the forget set alone, role `forget`; `beta` is that of `BETAS` if not given, and means nothing to GA."""
    if loss == "ga":
        return ga_term("forget")
    return {"npo": npo_term, "simnpo": simnpo_term}[loss]("forget", beta or BETAS[loss])


@dataclass(frozen=True)
class Unlearnt:
    """How a model forgot.

    Attributes:
        score: nats a token that the answers cost more than before.
        curve: nats a token on the batch of every step.
    """

    score: float
    curve: list[float]


def unlearn(
    model: nn.Module,
    forget: Examples,
    term: Term,
    *,
    seed: int,
    steps: int,
    batch_size: int,
    lr: float,
    optimizer: OptimizerFactory | None = None,
    clip: float | None = None,
    every: int | None = None,
    watch: Callable[[], None] | None = None,
    label: str = "",
) -> Unlearnt:
    """Unlearn in place by a loss on the forget set alone.

    Args:
        model: the model at the end of its path; it is also the reference.
        forget: what is unlearnt.
        term: a loss on the role `forget`, which carries the column `reference_nll`.
        seed: of the order of the data and of dropout; torch's generator is left with it.
        steps: optimizer steps.
        batch_size: examples in a step.
        lr: constant.
        optimizer: AdamW if not given.
        clip: largest gradient norm; no limit if not given.
        every: steps between two calls of `watch`; all of them if not given.
        watch: called before the first step, after every `every` steps and after the last one. It leaves the model as it is.
        label: tells the trainings of one step apart.
    """
    before = reference_nll(model, forget, 256)
    data = {"forget": forget.with_column("reference_nll", before)}
    torch.manual_seed(seed)
    watched = Term(
        "forget", lambda logits, batch: cross_entropy_sum(logits.detach(), batch), answer_tokens, 0.0, WATCHED
    )
    state, curve = TrainingState(), list[float]()
    part, name = every or steps, f"{label}, {term.name}" if label else term.name
    for done in range(0, steps, part):
        if watch:
            watch()
        ran = fit(
            model,
            [term, watched],
            data,
            steps=min(part, steps - done),
            batch_size=batch_size,
            lr=lr,
            clip=clip,
            optimizer=optimizer,
            state=state,
            name=f"{name} {done}" if done else name,
        )
        curve += ran.curves[WATCHED]
    if watch:
        watch()
    score = float((reference_nll(model, forget, 256) - before).mean()) / (_tokens(forget) / len(forget))
    return Unlearnt(score, curve)


@dataclass(frozen=True)
class Run:
    """One path with one seed.

    Attributes:
        score: the forget score.
        curve: nats a token of the forget set while it was unlearnt.
        retained: nats a token that the retained stages cost more after unlearning.
        before: outputs on the probed answers, before unlearning.
        after: the same after it.
    """

    score: float
    curve: list[float]
    retained: float
    before: Reference
    after: Reference


@torch.no_grad()
def distance(one: Reference, other: Reference) -> float:
    """Mean over answer positions of the squared distance between two models' predictions, from 0 to 2.

    Args:
        one: a model's outputs on some examples.
        other: another model's outputs on the same examples, in the same order.
    """
    total, positions = 0.0, 0
    batches = zip(one.examples.batches(MEASURED_AT_ONCE), other.examples.batches(MEASURED_AT_ONCE), strict=True)
    for ours, theirs in batches:
        keep = ours["labels"][:, 1:] != IGNORED
        first, second = (of.logits(batch).float().softmax(dim=-1) for of, batch in ((one, ours), (other, theirs)))
        total += float((first - second).square().sum(dtype=torch.float64))
        positions += int(keep.sum())
    return total / positions


def _stages(forget: Examples, first: Examples, second: Examples | None, third: Examples | None) -> dict[str, Examples]:
    if third is not None and second is None:
        raise RequestError("inspect.path_dependence: the role `third` comes after `second`, which is missing.")
    given = {"forget": forget, "first": first, "second": second, "third": third}
    stages = {name: examples for name, examples in given.items() if examples is not None}
    check_stages("inspect.path_dependence", stages)
    return stages


def check_stages(method: str, stages: Mapping[str, Examples]) -> None:
    """Refuse what cannot be learnt as answers.

    Raises:
        RequestError: a stage holds images or nothing that carries loss; it begins with the name of the method.
    """
    for name, examples in stages.items():
        check_labelled(name, examples)
        if examples.classified:
            what = "images" if examples.kind == "images" else "texts with a class"
            raise RequestError(f"{method} needs answers of a language model; these are {what}.")
        if not len(examples) or not _tokens(examples):
            raise RequestError(f"{method}: no label of the role {name!r} carries loss: nothing to learn.")


def _tokens(examples: Examples) -> int:
    return sum(answer_tokens(batch) for batch in examples.batches(64))


def nats(model: nn.Module, examples: Examples) -> float:
    """Nats a token that the answers cost, over all of their tokens."""
    return float(reference_nll(model, examples, 256).sum()) / _tokens(examples)


def _mean_nats(model: nn.Module, stages: Mapping[str, Examples], names: Sequence[str]) -> float:
    return statistics.fmean(nats(model, stages[name]) for name in names)


def _facts(runs: Mapping[tuple[int, int], Run], places: int, seeds: int) -> dict[str, float | int | str | list[int]]:
    at = range(1, places + 1)
    scores = {place: [runs[n, place].score for n in range(seeds)] for place in at}
    means = {place: statistics.fmean(values) for place, values in scores.items()}
    slowest = [min(at, key=lambda place: scores[place][n]) for n in range(seeds)]
    facts: dict[str, float | int | str | list[int]] = {f"forget_score_place_{p}": means[p] for p in at}
    facts |= {f"retain_rise_place_{p}": statistics.fmean(runs[n, p].retained for n in range(seeds)) for p in at}
    spread = statistics.fmean(max(scores[p][n] for p in at) - min(scores[p][n] for p in at) for n in range(seeds))
    facts |= {
        "spread": spread,
        "slowest_place": min(means, key=lambda place: means[place]),
        "last_is_slowest": f"on {slowest.count(places)} of {seeds} seeds",
    }
    pairs = [((n, p), (n, q)) for n in range(seeds) for p, q in itertools.combinations(at, 2)]
    facts["distance_before"] = statistics.fmean(distance(runs[a].before, runs[b].before) for a, b in pairs)
    facts["distance_after"] = statistics.fmean(distance(runs[a].after, runs[b].after) for a, b in pairs)
    if seeds > 1:
        noise = max(max(values) - min(values) for values in scores.values())
        facts["seed_noise"] = noise
        if noise:
            facts["spread_over_noise"] = spread / noise
        alike = [((n, p), (m, p)) for p in at for n, m in itertools.combinations(range(seeds), 2)]
        facts["distance_between_seeds"] = statistics.fmean(distance(runs[a].after, runs[b].after) for a, b in alike)
    return facts


def _curves(runs: Mapping[tuple[int, int], Run], places: int, seeds: int) -> dict[str, list[float]]:
    def mean(curves: Iterable[list[float]]) -> list[float]:
        return [statistics.fmean(values) for values in zip(*curves, strict=True)]

    return {f"{WATCHED}, place {p}": mean(runs[n, p].curve for n in range(seeds)) for p in range(1, places + 1)}
