"""Depth of forgetting: does unlearning one phrasing take its siblings along, and does the order of training decide it?

"On the Impossibility of Retrain Equivalence in Machine Unlearning", arXiv:2510.16629, section 4.3.

    R, U, C           a refusal, the phrasing that is unlearnt, a sibling of it: three answers to each of the same prompts
    l(S)              log-probability of the answers S in nats a token, after the three were learnt in one of six orders
                      and U was unlearnt

    not forgotten     l(U) >= l(R)
    superficial       l(U) <  l(R) <= l(C)
    deep              l(U) <  l(R) and l(C) < l(R)

Every order trains on the same data, so what a user would call "forgotten" should not depend on it.

How it differs from the paper:

1. Log-probabilities are per token, so that the length of an answer does not decide; the paper sums them.
2. The verdicts before unlearning stand beside those after it: what was learnt last is mostly the likeliest, so an order
   that ends with the refusal is called deep with nothing unlearnt.
3. Weights are trained in full by AdamW at a constant rate; the paper trains an adapter of a quantised model by SGD with
   warm-up and a cosine. `optimizer="sgd"` is plain SGD, whose rates are some thousand times larger.
4. The gradient's norm is at most 1, also while unlearning: by SGD, ascent without a limit stands still as long as an answer
   is certain and then runs away within a few steps.
5. Every order is run with several seeds (order of the data, dropout).
"""

from __future__ import annotations

import copy
import itertools
import statistics
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt
from torch import nn

from overhaul.data.examples import Examples
from overhaul.errors import RequestError
from overhaul.fit import OptimizerFactory, adamw, sgd
from overhaul.inspect.path_dependence import Loss, check_stages, learn, local_term, nats, unlearn
from overhaul.method import Outcome, method
from overhaul.objectives import Term

Verdict = Literal["not forgotten", "superficial", "deep"]
VERDICTS: tuple[Verdict, ...] = ("not forgotten", "superficial", "deep")
ORDERS = tuple(itertools.permutations(("refusal", "forget", "sibling")))
"""All orders in which the three stages can be learnt."""

Likelihoods = Mapping[str, Sequence[float]]
"""Stage -> nats a token (the log-probability, below 0) before unlearning, every so many steps, and at its end."""


@method(verb="inspect", paper="2510.16629", changes="nothing", memory="training")
def depth_of_forgetting(
    model: nn.Module,
    refusal: Examples,
    forget: Examples,
    sibling: Examples,
    *,
    loss: Loss = "ga",
    beta: Annotated[float, Gt(0)] | None = None,
    optimizer: Literal["adamw", "sgd"] = "adamw",
    stage_steps: Annotated[int, Ge(1)] = 150,
    unlearning_steps: Annotated[int, Ge(1)] = 25,
    watch_every: Annotated[int, Ge(1)] = 5,
    batch_size: Annotated[int, Ge(1)] = 32,
    lr: Annotated[float, Gt(0)] = 1e-5,
    unlearning_lr: Annotated[float, Gt(0)] = 5e-5,
    seeds: Annotated[int, Ge(1)] = 3,
) -> Outcome:
    """Train three answers to the same prompts in all orders, unlearn one, and say in which orders its sibling goes too.

    It trains `seeds` times six models, one after the other, each from the model as it is. The default rates are the
    paper's for a model of 3B; one of some millions of parameters wants 1e-4 to 1e-3.

    Args:
        model: a causal language model: where every order starts. It stays as it is.
        refusal: what should be said instead, for every prompt.
        forget: one phrasing of what is to go, for the same prompts in the same order; it is unlearnt.
        sibling: another phrasing of the same, for the same prompts; it is not unlearnt.
        loss: how `forget` is unlearnt, from its data alone.
        beta: inverse temperature of "npo" (0.5 if not given) and "simnpo" (2.5).
        optimizer: of the stages and of the unlearning.
        stage_steps: optimizer steps of each stage; optimizer and schedule start anew.
        unlearning_steps: optimizer steps of the unlearning.
        watch_every: steps of the unlearning between two looks at the three log-probabilities.
        batch_size: examples in a step.
        lr: learning rate in the stages, constant.
        unlearning_lr: learning rate in the unlearning, constant.
        seeds: how often all orders are run; one seed says nothing about noise.

    Returns:
        No model. Facts: for every order ("refusal-forget-sibling" learnt the refusal first) the verdict of most
        seeds and on how many; the share of trainings that end deep, and of those that would have been called so before
        anything was unlearnt; in how many the answer learnt last was the likeliest before unlearning (where it was not,
        the stages were too short). Curves: log-probability of the three answers in nats a token while `forget` is
        unlearnt, by order, one value every `watch_every` steps from before the first step on, mean over seeds.

    Raises:
        RequestError: examples are images or carry no loss, or the three roles do not hold the same prompts.
        RunError: a training diverged.
    """
    stages = {"refusal": refusal, "forget": forget, "sibling": sibling}
    check_stages("inspect.depth_of_forgetting", stages)
    check_prompts("inspect.depth_of_forgetting", stages)
    term, make = local_term(loss, beta), {"adamw": adamw(), "sgd": sgd()}[optimizer]
    start = torch.initial_seed()
    runs: dict[tuple[int, str], Likelihoods] = {}
    with torch.random.fork_rng():
        for n, order in itertools.product(range(seeds), ORDERS):
            seed, name = (start + n) % 2**63, "-".join(order)
            shared = {"seed": seed, "batch_size": batch_size, "optimizer": make, "label": f"seed {n}, {name}"}
            path = copy.deepcopy(model)
            learn(path, stages, order, steps=stage_steps, lr=lr, **shared)
            runs[n, name] = follow(
                path, stages, forget, term, steps=unlearning_steps, every=watch_every, lr=unlearning_lr, **shared
            )
    return Outcome(facts=_facts(runs, seeds), curves=_curves(runs, seeds))


def follow(
    path: nn.Module,
    stages: Mapping[str, Examples],
    target: Examples,
    term: Term,
    *,
    seed: int,
    steps: int,
    every: int,
    batch_size: int,
    lr: float,
    optimizer: OptimizerFactory | None = None,
    label: str = "",
) -> dict[str, list[float]]:
    """Unlearn in place and follow what the model says instead.

    Args:
        path: the model at the end of its path.
        stages: what is followed, by name.
        target: what is unlearnt.
        term: as for `path_dependence.unlearn`.
        seed: as there.
        steps: as there.
        every: steps between two looks.
        batch_size: as there.
        lr: as there.
        optimizer: as there.
        label: as there.

    Returns:
        Log-probability in nats a token of every stage: before the first step, every `every` steps, and at the end.
    """
    seen: dict[str, list[float]] = {name: [] for name in stages}

    def watch() -> None:
        for name, examples in stages.items():
            seen[name].append(-nats(path, examples))

    unlearn(
        path,
        target,
        term,
        seed=seed,
        steps=steps,
        batch_size=batch_size,
        lr=lr,
        optimizer=optimizer,
        clip=1.0,
        every=every,
        watch=watch,
        label=label,
    )
    return seen


def verdict(likelihoods: Likelihoods, at: int = -1) -> Verdict:
    """How far `forget` is gone: superficially if only it is less likely than the refusal, deeply if its sibling is too.

    Args:
        likelihoods: of `refusal`, `forget` and `sibling`.
        at: which look: 0 is before unlearning, -1 at its end.
    """
    refusal, forget, sibling = (likelihoods[name][at] for name in ("refusal", "forget", "sibling"))
    if forget >= refusal:
        return "not forgotten"
    return "deep" if sibling < refusal else "superficial"


def likeliest(likelihoods: Likelihoods, at: int = -1) -> str:
    """The stage whose answers are the likeliest at a look."""
    return max(likelihoods, key=lambda name: likelihoods[name][at])


def check_prompts(method: str, stages: Mapping[str, Examples]) -> None:
    """Refuse stages that answer different prompts.

    Raises:
        RequestError: an example has no prompt, or two stages differ in one: it names the first.
    """
    prompts = {name: [row.get("prompt") for row in examples.rows] for name, examples in stages.items()}
    for name, held in prompts.items():
        if None in held:
            raise RequestError(
                f"{method}: example {held.index(None) + 1} of the role {name!r} has no prompt. "
                "Give questions with answers (`as: qa`) or chats (`as: chat`)."
            )
    (first, ours), *others = prompts.items()
    for name, theirs in others:
        for place, (one, other) in enumerate(itertools.zip_longest(ours, theirs), 1):
            if one != other:
                said = ["missing" if prompt is None else repr(prompt) for prompt in (one, other)]
                raise RequestError(
                    f"{method}: prompt {place} is {said[0]} in the role {first!r} and {said[1]} in {name!r}. "
                    f"{', '.join(map(repr, prompts))} must answer the same prompts in the same order."
                )


def _facts(runs: Mapping[tuple[int, str], Likelihoods], seeds: int) -> dict[str, float | int | str | list[int]]:
    facts: dict[str, float | int | str | list[int]] = {}
    for order in map("-".join, ORDERS):
        found = [verdict(runs[n, order]) for n in range(seeds)]
        most = max(VERDICTS, key=found.count)
        facts[order] = f"{most} on {found.count(most)} of {seeds} seeds"
    last = [likeliest(run, 0) == name.rpartition("-")[2] for (_, name), run in runs.items()]
    facts["deep_share"] = statistics.fmean(verdict(run) == "deep" for run in runs.values())
    facts["deep_share_before"] = statistics.fmean(verdict(run, 0) == "deep" for run in runs.values())
    facts["last_is_likeliest"] = f"in {sum(last)} of {len(last)} trainings"
    return facts


def _curves(runs: Mapping[tuple[int, str], Likelihoods], seeds: int) -> dict[str, list[float]]:
    return {
        f"{order}: {stage}": [
            statistics.fmean(values) for values in zip(*(runs[n, order][stage] for n in range(seeds)), strict=True)
        ]
        for order in map("-".join, ORDERS)
        for stage in ("refusal", "forget", "sibling")
    }
