"""One step of a training: examples drawn, gradients of terms accumulated, an optimizer's step or none at all."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from overhaul import processes, session
from overhaul.data.examples import Batch, Examples, collate, length
from overhaul.fit.checkpoints import MAIN
from overhaul.fit.combining import Apart, Combine
from overhaul.fit.draws import Ledger, by_length
from overhaul.fit.parallel import Diverged, Workers
from overhaul.forward import forward
from overhaul.objectives import Penalty, Term, forward_answers
from overhaul.trace.passing import passing

if TYPE_CHECKING:
    from overhaul.fit.training import Training

Sizes = int | Mapping[str, int]


class Step:
    """One step of a training.

    Attributes:
        number: of the step, from 0.
        seed: of the step alone, the same in every process: for what is sampled in it.
    """

    def __init__(self, training: Training, number: int) -> None:
        self.training, self.number = training, number
        self.seed = (training.seed * 1_000_003 + 104_729 * (training.before.step + number + 1)) % 2**63
        self.losses: dict[str, float] = {}
        self.said: dict[str, float] = {}
        self.total = 0.0
        self.terms: list[Term | Penalty] = []
        self.statistics: list[Tensor] | None = None
        self.started = time.perf_counter()

    def draw(self, role: str, count: int) -> Examples:
        """The next `count` examples of a role, the same in every process; counted in the ledger.

        Raises:
            RequestError: the role is missing or empty.
        """
        draw, ledger, data = self.training.draw(role), self.training.ledger, self.training.data
        drawn = data[role].select(draw.indices(ledger.examples[role], count))
        drawn = replace(drawn, items=list(drawn.items))  # of a large file, read once
        ledger.examples[role] += count
        ledger.tokens[role] += sum(map(length, drawn.items))
        return drawn

    def backward(
        self,
        terms: Sequence[Term | Penalty],
        data: Mapping[str, Examples],
        *,
        at_once: Sizes | None = None,
        combine: Combine | None = None,
    ) -> dict[str, float]:
        """Add the gradient of the weighted means of some terms to what this step has already.

        Args:
            terms: terms on one role share one forward, penalties read the weights alone. A term must take what it needs
                from its arguments: shards train in a copy of the model.
            data: the examples of each role in this step, the same in every process.
            at_once: most examples of a role in one forward, all processes together; all of them if not given.
            combine: makes one direction of the roles' gradients, instead of their sum; see `combining`. It needs a copy of
                the gradients for every role but one.

        Returns:
            Each term's mean.

        Raises:
            RequestError: fewer examples in a forward than processes that hold shards.
            ValueError: two terms of a step have one name, or a penalty, which has no role, comes with a combiner.
        """
        team, running = self.training.team, [*self.terms, *terms]
        if len({term.name for term in running}) < len(running):
            raise ValueError(f"each term needs a name of its own: {[term.name for term in running]}")
        on_data = [term for term in terms if isinstance(term, Term)]
        penalties = [term for term in terms if isinstance(term, Penalty)]
        if combine is not None and penalties:
            raise ValueError("a combiner is given the gradient of each role, and a penalty on the weights has none")
        if self.statistics is None:
            self.statistics = team.statistics_now()
        weights = {term.name: weight_of(term, self.training.ledger) for term in terms}
        # a weight that has become 0 spares its term; one that is the number 0 marks a watch
        on_data = [term for term in on_data if weights[term.name] or not callable(term.weight)]
        roles = list(dict.fromkeys(term.role for term in on_data))
        windows = {role: _windows(team, role, data[role], at_once) for role in roles}
        if combine is None:
            losses = _backward(team, on_data, weights, windows)
            losses |= _backward_penalties(team, penalties, weights)
        else:
            apart, losses = Apart(team, team.optimizers[MAIN].optimizer), dict[str, float]()
            for role in roles:
                of_role = [term for term in on_data if term.role == role]
                losses |= _backward(team, of_role, weights, {role: windows[role]})
                apart.put_aside(role)
            self.said |= apart.combine(combine, self.training.limit)
        self.terms += [term for term in terms if term.name in losses]
        self.losses |= losses
        self.total += sum(weights[name] * value for name, value in losses.items())
        return losses

    def record(self, values: Mapping[str, float]) -> None:
        """Numbers about this step, such as a mean reward, for the curves; before `apply`."""
        self.said |= values

    def apply(self, optimizer: str = MAIN) -> None:
        """Let an optimizer step on the gradients of the parameters that are its own; gradients are used up by it.

        The curves get `loss`, every term's mean, `lr` and `gradient norm`; of a further optimizer with its name before
        the three. A step counts once, however many optimizers it calls.

        Raises:
            RunError: a loss or gradient is not finite; the weights are those of the last good step.
        """
        training, team = self.training, self.training.team
        if len(team.optimizers) > 1:
            groups = team.optimizers[optimizer].param_groups
            own = {id(parameter) for group in groups for parameter in group["params"]}
            for _, parameter in team.named:
                if id(parameter) not in own:
                    parameter.grad = None
        norm = team.clip(training.limit)
        _check_finite(self.terms, self.losses, norm, self.number)
        rate = training.rate_at(self.number)
        training.set_rate(optimizer, rate)
        team.step(optimizer)
        if self.statistics is not None:
            team.agree_on_statistics(self.statistics)
        self.statistics = None
        start = "" if optimizer == MAIN else f"{optimizer} "
        own_curves = {f"{start}loss": self.total, f"{start}lr": rate, f"{start}gradient norm": norm}
        # the total also where a term has its name
        training.ledger.record({f"{start}loss": self.total, **self.losses, **self.said} | own_curves)
        self._count()
        self.losses, self.said, self.terms, self.total = {}, {}, [], 0.0

    def _count(self) -> None:
        ledger, training = self.training.ledger, self.training
        ledger.seconds += time.perf_counter() - self.started
        self.started = time.perf_counter()
        if ledger.step == self.number:
            ledger.step += 1
            speed = sum(ledger.tokens.values()) / max(ledger.seconds, 1e-9)
            detail = f"loss {self.total:.3f}  {speed:,.0f} tokens/s"
            session.current().report(training.name, ledger.step, training.total, detail)

    def take(
        self, terms: Sequence[Term | Penalty], batch_size: Sizes, accumulation: int = 1, combine: Combine | None = None
    ) -> None:
        """The whole step of a training on given data: draw each role that a term reads, `backward`, `apply`."""
        roles = list(dict.fromkeys(term.role for term in terms if isinstance(term, Term)))
        drawn = {role: self.draw(role, _size(batch_size, role) * accumulation) for role in roles}
        self.backward(terms, drawn, at_once=batch_size, combine=combine)
        self.apply()

    def take_back(self) -> None:
        """Drop what has been accumulated and not applied; norm statistics are as before the step."""
        if self.statistics is not None:
            self.training.team.drop_gradients()
            self.training.team.take_back_statistics(self.statistics)
            self.statistics = None


def weight_of(term: Term | Penalty, ledger: Ledger) -> float:
    """A term's weight in the step that comes next."""
    return float(term.weight(ledger)) if callable(term.weight) else term.weight


def _size(sizes: Sizes, role: str) -> int:
    return sizes if isinstance(sizes, int) else sizes[role]


def _windows(team: Workers, role: str, examples: Examples, at_once: Sizes | None) -> list[Batch]:
    """All micro-batches of a role, this process's share of each."""
    size = _size(at_once, role) if at_once is not None else max(1, len(examples))
    windows: list[Batch] = []
    for start in range(0, len(examples), size):
        items = examples.items[start : start + size]
        team.check({role: len(items)})
        share = team.share(items)
        # shards are gathered for each forward, so every process must run the same number of them
        for part in [share] if team.sharded else by_length(share):
            windows.append({k: v.to(team.accelerator.device) for k, v in collate(part).items()})
    return windows


def _backward(
    team: Workers, terms: Sequence[Term], weights: Mapping[str, float], windows: Mapping[str, list[Batch]]
) -> dict[str, float]:
    """Accumulate the gradient of all micro-batches; return each term's mean over them."""
    counts = torch.tensor([float(sum(map(term.count, windows[term.role]))) for term in terms])
    shares = [1.0 / max(count, 1.0) for count in processes.total(counts).tolist()]
    scale = {term.name: share for term, share in zip(terms, shares, strict=True)}
    sums = {term.name: torch.zeros((), device=team.accelerator.device) for term in terms}
    for role, batches in windows.items():
        here = [term for term in terms if term.role == role]
        # a role of which nothing counts is only watched
        learnt = any(weights[term.name] for term in here)
        for batch in batches:
            with torch.set_grad_enabled(learnt):
                values = _losses(team, here, batch)
            total: Any = 0.0
            for name, value in values.items():
                sums[name] = sums[name] + value.detach() * scale[name]
                total = total + value * (scale[name] * weights[name] * team.gradient_scale)
            if learnt:
                team.accelerator.backward(total)
    team.add_up_gradients()
    return dict(zip(sums, processes.total(torch.stack([*sums.values()])).tolist(), strict=True)) if sums else {}


def _losses(team: Workers, terms: Sequence[Term], batch: Batch) -> dict[str, Tensor]:
    """The sums of the terms on one micro-batch, from one forward."""
    sites = list(dict.fromkeys(site for term in terms for site in term.reads))
    with passing(team.model, sites) if sites else nullcontext({}) as states:
        if not sites and all(term.answers_only for term in terms):
            logits, batch = forward_answers(team.model, batch)
        else:
            logits = forward(team.model, batch, states=all(term.states for term in terms))
    return {
        term.name: term.loss(logits, batch, {site: states[site] for site in term.reads})
        if term.reads
        else term.loss(logits, batch)
        for term in terms
    }


def _backward_penalties(team: Workers, penalties: Sequence[Penalty], weights: Mapping[str, float]) -> dict[str, float]:
    """Add the penalties' gradients, which are the same in every process, to those that were added up."""
    values: dict[str, float] = {}
    for penalty in penalties:
        value = penalty.loss(team.parameters)
        team.accelerator.backward(value * weights[penalty.name])
        values[penalty.name] = float(value.detach())
    return values


def _check_finite(terms: Sequence[Term | Penalty], losses: Mapping[str, float], norm: float, step: int) -> None:
    bad = [term for term in terms if not math.isfinite(losses[term.name])]
    if not bad and math.isfinite(norm):
        return
    what = "the gradient is not finite"
    if bad:
        kind = f" on the role {bad[0].role!r}" if isinstance(bad[0], Term) else ", which reads the weights,"
        what = f"the term {bad[0].name!r}{kind} is {losses[bad[0].name]}"
    raise Diverged(
        f"Training stopped at step {step + 1}: {what}. The weights are those after step {step}. "
        "A lower learning rate, a longer warm-up or a stronger retain term usually helps."
    )
