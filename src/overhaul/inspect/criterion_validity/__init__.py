"""Criterion validity: does the loss right after pruning, or another criterion, foretell what is left after training again?

"Is Oracle Pruning the True Oracle? A sanity-check of the pruning paradigm over the past 35 years", Feng, Tao and Wang,
arXiv:2412.00143.

    patterns S    k_i of the n_i units of each group i go; all prod_i C(n_i, k_i) of them, or as many as asked for
    score(S)      what a criterion says that S costs: "loss" is the training loss without S, before any training
    left(S)       accuracy on the test data (and minus the loss there) after training again, mean over repeats
    tau           Kendall's tau-b between score and left over all S: -1 foretells everything, 0 nothing
    anomalies     the share of S that end better than the one with the lowest score
    ceiling       tau between what is left after some repeats and after the others: what noise allows

A criterion is rejected as the paper does: tau >= -0.2, or p > 0.05 (which a few patterns reach by themselves), or
anomalies >= 50%. Where the ceiling is near 0 too, the patterns differ by less than two trainings of one of them, and nothing
is said about a criterion.

How it differs from the paper's code:

1. What is left is measured at the end of the training. The code takes the epoch that is best on the test data.
2. Losses are taken over a fixed part of the training data, as it is. (The code's is augmented and shuffled for CIFAR.)
3. Statistics of batch norm are those of the whole network, so that "loss" measures their mismatch too. "loss, fresh
   statistics" takes them anew from the training data before it measures; it is reported beside it.
4. Every repeat trains each pattern anew, with the order of the data drawn by its seed. The anomaly ratio hangs on one
   pattern: an interval by bootstrap over the patterns stands beside it.
5. Units are what `overhaul.groups` finds, so channels that are added up leave together. k is n * ratio exactly, halves down.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor, nn

from overhaul import session
from overhaul.data.examples import Examples, collate
from overhaul.errors import RequestError
from overhaul.fit.regime import Regime
from overhaul.forward import forward, read_by
from overhaul.groups import Group, cut_copy, groups
from overhaul.inspect.criterion_validity.ranking import Validity, ceiling, validity
from overhaul.inspect.criterion_validity.sweep import MEASURED_AT_ONCE, Ends, Sweep, as_rows, going, measured, patterns
from overhaul.method import Outcome, Table, method
from overhaul.modes import at_rest
from overhaul.objectives import cross_entropy_sum, units
from overhaul.workers import Engine, check

PROBED = 1024
"""Training examples on which losses and gradients are measured."""
NONE = "nothing to train"
LEFT = ("pruned loss", "training loss", "test loss", "test accuracy")


@method(
    verb="inspect",
    paper="2412.00143",
    changes="nothing",
    memory="training",
    makes={"patterns": "json"},
)
def criterion_validity(
    model: nn.Module,
    train: Examples,
    test: Examples,
    *,
    unit: Literal["channel", "mlp.neuron", "attention.head"] = "channel",
    places: list[int] | None = None,
    ratio: Annotated[float, Gt(0), Lt(1)] = 0.5,
    candidates: Annotated[int, Ge(3)] = 100,
    repeats: Annotated[int, Ge(1)] = 3,
    training: Regime = Regime(steps=200, batch_size=32, lr=1e-3, warmup=0.0, schedule="linear"),
    workers: Annotated[int, Ge(1)] = 1,
    engine: Engine = "joblib",
    address: str | None = None,
) -> Outcome:
    """Prune a network in many ways, train each again, and say whether a criterion would have told the good ones.

    It trains `candidates` times `repeats` small copies; the network itself stays as it is.

    Args:
        model: a trained network that reads images or texts.
        train: what the pruned copies are trained on again; the first 1,024 are what losses are measured on.
        test: what is left is measured on.
        unit: what goes: channels of a network of convolutions, MLP neurons, or attention heads.
        places: which groups of units are pruned, by their numbers from 0 in the order of the network; all if not given.
        ratio: the share of the units of each group that goes.
        candidates: how many patterns are tried: all there are if that is no more, else different ones drawn by the seed.
        repeats: trainings of each pattern, with different seeds; one says nothing about noise.
        training: how each copy is trained again.
        workers: processes that share the trainings, with one thread each; does not change a result.
        engine: what runs the workers: "joblib" on this machine, or "ray" (the extra `overhaul[scale]`) here or on a cluster.
        address: of the Ray cluster ("auto", "10.0.0.1:6379"), whose machines have Overhaul installed; None starts Ray here.

    Returns:
        No model. Facts: how many patterns there are and were tried, the noise ceiling, and of the loss right after pruning
        tau, p, anomaly ratio with its interval, and whether it is rejected. Tables: every criterion ("loss", the paper's
        oracle; "magnitude", the sum of |w|; "taylor", |sum of w * gradient| over units; "random", the null control) with
        the same numbers, and a point for each pattern. `made["patterns"]` has what went, scores and results of each.

    Raises:
        RequestError: there are no such units or places, nothing or everything would go, or fewer than three patterns exist;
            Ray is not installed, or does not run where it is said to.
        RunError: a training diverged, or workers died again and again.
    """
    if not len(train) or not len(test):
        raise RequestError(f"inspect.criterion_validity: the role `{'test' if len(train) else 'train'}` is empty.")
    check("inspect.criterion_validity", engine, address, next(model.parameters()).device)
    probe = train[:PROBED]
    found = _chosen(groups(model, unit, inputs=_inputs(model, train)), places, ratio)
    seed = torch.initial_seed()
    tried, total = patterns([group.size for group in found], ratio, candidates, seed % 2**63)
    if len(tried) < 3:
        raise RequestError(
            f"inspect.criterion_validity: there are only {total} ways to let a share of {ratio:g} go, too few to compare; "
            "write another ratio, or more places."
        )
    session.begins()
    sweep = Sweep(model, found, tried, train, probe, test, training, seed % 2**63)
    _check_first(sweep, train)
    ends = sweep.ends(repeats, workers, engine, address)
    scores = _scores(sweep, ends)
    return _outcome(sweep, scores, ends, repeats, total)


def _inputs(model: nn.Module, examples: Examples) -> dict[str, Any]:
    """Two examples as keyword arguments of the model."""
    device = next(model.parameters()).device
    batch = collate(list(examples.items[:2]))
    given = read_by(model, batch)
    return {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in given.items()
        if value is not None
    }


def _chosen(found: Sequence[Group], places: Sequence[int] | None, ratio: float) -> list[Group]:
    """The groups whose units go.

    Raises:
        RequestError: there is no such place, or none or all of one would go.
    """
    for place in places or ():
        if place not in range(len(found)):
            raise RequestError(
                f"inspect.criterion_validity: places names {place}, but the groups of this network are numbered from 0 to "
                f"{len(found) - 1}, with {', '.join(str(group.size) for group in found)} units."
            )
    chosen = [found[place] for place in dict.fromkeys(places)] if places is not None else list(found)
    if not chosen:
        raise RequestError("inspect.criterion_validity: places is empty; leave it out for all groups.")
    for group in chosen:
        if not 0 < going(group.size, ratio) < group.size:
            share = "none" if not going(group.size, ratio) else "all"
            raise RequestError(
                f"inspect.criterion_validity: of a group of {group.size} units a share of {ratio:g} is {share}; write "
                "another ratio, or leave it out of `places`."
            )
    return chosen


def _check_first(sweep: Sweep, examples: Examples) -> None:
    """Whether a copy without units says what the network says when they are masked."""
    cut_copy(sweep.model, sweep.keep(sweep.patterns[0]), inputs=_inputs(sweep.model, examples))


# criteria


def _scores(sweep: Sweep, ends: Mapping[tuple[int, int], Ends]) -> dict[str, list[float]]:
    """What each criterion says that a pattern costs."""
    every = range(len(sweep.patterns))
    scores = {"loss": [ends[n, 0].pruned for n in every]}
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in sweep.model.modules()):
        scores["loss, fresh statistics"] = [_with_fresh_statistics(sweep, n) for n in every]
    gradients = _gradients(sweep.model, sweep.probe)

    def first_order(name: str, tensor: Tensor) -> Tensor:
        return tensor * gradients[name] if name in gradients else torch.zeros_like(tensor)

    by_unit = {
        "magnitude": [group.sums(sweep.model, lambda _, tensor: tensor.abs()) for group in sweep.groups],
        "taylor": [group.sums(sweep.model, first_order).abs() for group in sweep.groups],
    }
    for name, sums in by_unit.items():
        scores[name] = [
            float(sum(each[list(gone)].sum() for each, gone in zip(sums, pattern, strict=True)))
            for pattern in sweep.patterns
        ]
    draw = random.Random(sweep.seed)
    return {**scores, "random": [draw.random() for _ in every]}


def _gradients(model: nn.Module, examples: Examples) -> dict[str, Tensor]:
    """Of the mean loss; the model's own gradients stay what they were."""
    own = dict(model.named_parameters())
    total = {name: torch.zeros_like(parameter) for name, parameter in own.items()}
    batches = list(examples.batches(MEASURED_AT_ONCE))
    count = sum(map(units, batches))
    device = next(model.parameters()).device
    needed = {name: parameter.requires_grad for name, parameter in own.items()}
    with at_rest(model), torch.enable_grad():
        model.requires_grad_(True)
        try:
            for batch in batches:
                batch = {name: value.to(device) for name, value in batch.items()}
                loss = cross_entropy_sum(forward(model, batch), batch) / count
                for name, part in zip(
                    own, torch.autograd.grad(loss, list(own.values()), allow_unused=True), strict=True
                ):
                    if part is not None:
                        total[name] += part
        finally:
            for name, parameter in own.items():
                parameter.requires_grad_(needed[name])
    return total


def _with_fresh_statistics(sweep: Sweep, number: int) -> float:
    """The loss without a pattern when batch norm has the means and variances that the rest gives it."""
    small = cut_copy(sweep.model, sweep.keep(sweep.patterns[number]), checked=False)
    norms = [module for module in small.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    device = next(small.parameters()).device
    with at_rest(small), torch.no_grad():
        for norm in norms:
            norm.reset_running_stats()
            norm.train()
            norm.momentum = None  # the mean over all batches
        for batch in sweep.probe.batches(MEASURED_AT_ONCE):
            forward(small, {name: value.to(device) for name, value in batch.items()})
    return measured(small, sweep.probe)[0]


# results


def _outcome(
    sweep: Sweep, scores: Mapping[str, list[float]], ends: Mapping[tuple[int, int], Ends], repeats: int, total: int
) -> Outcome:
    every = range(len(sweep.patterns))

    def of(name: str, repeat: int) -> list[float]:
        return [getattr(ends[n, repeat], name) for n in every]

    names = ("pruned", "train", "test", "accuracy")
    means = {
        said: [statistics.fmean(values) for values in zip(*(of(name, r) for r in range(repeats)), strict=True)]
        for said, name in zip(LEFT, names, strict=True)
    }
    left, cheap = means["test accuracy"], [-value for value in means["test loss"]]
    by_accuracy = {name: validity(values, left, sweep.seed) for name, values in scores.items()}
    by_loss = {name: validity(values, cheap, sweep.seed) for name, values in scores.items()}
    limit = ceiling([of("accuracy", r) for r in range(repeats)])
    return Outcome(
        facts=_facts(by_accuracy["loss"], by_loss["loss"], limit, len(sweep.patterns), total, repeats),
        tables={
            "criteria": _table(by_accuracy, by_loss),
            "what the loss right after pruning says of the accuracy after training again": Table.points(
                [(_name(p), x, y) for p, x, y in zip(sweep.patterns, means["pruned loss"], left, strict=True)],
                x="training loss right after pruning, nats",
                y="test accuracy after training again",
            ),
        },
        made={"patterns": as_rows(sweep.groups, sweep.patterns, scores, means)},
    )


def _facts(
    accuracy: Validity, loss: Validity, limit: float | None, tried: int, total: int, repeats: int
) -> dict[str, Any]:
    return {
        "patterns": total if total < 2**53 else float(total),
        "patterns_tried": tried,
        "trainings": tried * repeats,
        "tau": accuracy.tau,
        "p": accuracy.p,
        "tau_with_test_loss": _negative(loss.tau),
        "anomaly_ratio": accuracy.anomalies,
        "anomaly_ratio_low": accuracy.low,
        "anomaly_ratio_high": accuracy.high,
        "noise_ceiling": limit,
        "rejected": rejected(accuracy),
    }


def _negative(tau: float | None) -> float | None:
    return None if tau is None else -tau


def rejected(known: Validity) -> bool | None:
    """Whether a criterion does not foretell the accuracy, by the paper's limits; None where all patterns end alike."""
    if known.tau is None or known.p is None:
        return None
    return round(known.tau, 1) >= -0.2 or known.p > 0.05 or known.anomalies >= 0.5


def _table(by_accuracy: Mapping[str, Validity], by_loss: Mapping[str, Validity]) -> Table:
    columns = (
        "criterion", "tau with test accuracy", "p", "tau with test loss", "anomaly ratio", "2.5%", "97.5%",
        "counterexamples", "rejected",
    )  # fmt: skip
    rows = tuple(
        (name, one.tau, one.p, _negative(by_loss[name].tau), one.anomalies, one.low, one.high,
         one.counterexamples, rejected(one))
        for name, one in by_accuracy.items()
    )  # fmt: skip
    return Table(columns, rows)


def _name(pattern: Sequence[Sequence[int]]) -> str:
    return "without " + "; ".join(",".join(map(str, gone)) for gone in pattern)
