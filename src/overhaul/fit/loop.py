"""The one training loop, on accelerate.

Every method that trains calls `fit`. What it promises:

1. One normalisation: each term is (sum of sums) / (sum of counts) over the whole optimizer step, so accumulation,
   padding and the number of processes do not change a result. A penalty on the weights counts once a step.
2. Each role is drawn without replacement, epoch after epoch, in an order that depends only on (seed, role, epoch); its
   position is a counter, so a resumed run sees exactly the examples an uninterrupted one would.
3. A checkpoint holds weights, norm statistics, optimizer, counters and random state (safetensors and JSON): resuming is
   bit-exact.
4. A loss or gradient that is not finite stops the loop before it reaches the weights.
5. Under `torchrun` or `accelerate launch` the same call trains copies or shards (`parallel`). What cannot be kept there:
   batch norm sees each process's part of a batch, and dropout draws other masks.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from overhaul import processes, session
from overhaul.data.examples import Batch, Encoded, Examples, collate
from overhaul.errors import RequestError
from overhaul.fit.checkpoints import TrainingCheckpoint, TrainingState, load_optimizer_state, optimizer_state
from overhaul.fit.combining import Apart, Combine
from overhaul.fit.optimizers import OptimizerFactory, adamw
from overhaul.fit.parallel import Diverged, Workers, workers
from overhaul.fit.schedules import Factor, Schedule, learning_rate
from overhaul.objectives import Penalty, Term, forward


@dataclass
class Ledger:
    """What a training consumed and how it went: examples and tokens per role, and one value a step for every curve."""

    step: int = 0
    examples: dict[str, int] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    curves: dict[str, list[float]] = field(default_factory=dict)
    seconds: float = 0.0

    def record(self, values: Mapping[str, float]) -> None:
        """Append one value to each named curve."""
        for name, value in values.items():
            self.curves.setdefault(name, []).append(value)


class Draw:
    """The order in which a role's examples are drawn: the n-th draw depends on the seed and n alone."""

    def __init__(self, role: str, size: int, seed: int, earlier: int = 0) -> None:
        self.size, self.earlier = size, earlier
        self.seed = seed * 1_000_003 + sum(role.encode())
        self.epoch, self.order = -1, list[int]()

    def indices(self, start: int, count: int) -> list[int]:
        """Places of draws number `start` to `start + count - 1`, counted after the `earlier` ones."""
        chosen: list[int] = []
        for n in range(self.earlier + start, self.earlier + start + count):
            epoch, place = divmod(n, self.size)
            if epoch != self.epoch:
                generator = torch.Generator().manual_seed((self.seed + 7919 * epoch) % 2**63)
                self.order = torch.randperm(self.size, generator=generator).tolist()
                self.epoch = epoch
            chosen.append(self.order[place])
        return chosen


def fit(
    model: nn.Module,
    terms: Sequence[Term | Penalty],
    data: Mapping[str, Examples],
    *,
    steps: int,
    batch_size: int | Mapping[str, int] = 16,
    accumulation: int = 1,
    lr: float = 1e-4,
    warmup: int = 0,
    schedule: Schedule | Factor = "constant",
    floor: float = 0.0,
    clip: float | None = 1.0,
    weight_decay: float = 0.0,
    optimizer: OptimizerFactory | None = None,
    trainable: Callable[[str], bool] | None = None,
    should_stop: Callable[[Ledger], bool] | None = None,
    combine: Combine | None = None,
    state: TrainingState | None = None,
    name: str = "fit",
) -> Ledger:
    """Train `model` in place on weighted terms, each reading one role of `data`.

    Args:
        model: any module that `objectives.forward` can call; left in eval mode.
        terms: the parts of the objective; terms on one role share one forward, penalties read the weights alone. A term
            must take what it needs from its arguments: shards train in a copy of the model.
        data: examples by role.
        steps: optimizer steps.
        batch_size: examples per role in one forward (all processes together); a step takes `accumulation` times that.
        accumulation: micro-batches per step.
        lr: peak learning rate.
        warmup: steps of linear warm-up, for a schedule given by name.
        schedule: what follows the warm-up, see `schedules.learning_rate`; or an absolute step's share of the peak, such as
            `schedules.Infinite`, counted from `state.step`.
        floor: share of the peak at which a schedule given by name ends.
        clip: largest total gradient norm, or None.
        weight_decay: of matrices, for the default optimizer.
        optimizer: builds an optimizer from the model and what trains of it; AdamW with `weight_decay` if not given.
        trainable: which parameters to train, by name; all that require gradients if not given.
        should_stop: asked after each step; True ends the training early. It must not depend on `seconds`, which differ
            from process to process.
        combine: makes one direction of the roles' gradients, instead of their sum; see `combining`. It needs a copy of the
            gradients for every role but one.
        state: where an earlier training stood; this one goes on with its draws and its optimizer, and leaves there where
            it ended itself. A fresh start if not given.
        name: what progress and the checkpoint are called; two trainings of one step need two names.

    Returns:
        The ledger: examples and tokens per role, and curves (`loss`, one per term, `lr`, `gradient norm`).

    Raises:
        RequestError: a role is missing or empty, nothing is trainable, or a batch is too small for the processes.
        ValueError: two terms have one name, a schedule that is no name comes with a warm-up or floor, or a penalty, which
            has no role, with a combiner.
        RunError: a loss or gradient is not finite; the weights are those of the last good step.
    """
    roles = list(dict.fromkeys(term.role for term in terms if isinstance(term, Term)))
    sizes = {role: batch_size if isinstance(batch_size, int) else batch_size[role] for role in roles}
    _check(terms, data, roles, combine)
    rate_at = _rates(steps, lr, warmup, schedule, floor, state.step if state else 0)
    learnable = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    chosen = {n for n, _ in learnable if trainable is None or trainable(n)}
    if not chosen:
        raise RequestError("Nothing to train: no parameter of the model is selected and requires gradients.")
    before = state or TrainingState()
    draws = {role: Draw(role, len(data[role]), torch.initial_seed(), before.examples.get(role, 0)) for role in roles}
    make = optimizer or adamw(weight_decay=weight_decay)
    frozen = [p for n, p in learnable if n not in chosen]
    with _in_training(model, frozen), workers(model, chosen, make) as team:
        team.check(sizes)
        base_rates = [group["lr"] for group in team.optimizer.param_groups]
        ledger = Ledger(examples=dict.fromkeys(roles, 0), tokens=dict.fromkeys(roles, 0))
        checkpoint = TrainingCheckpoint.for_training(name, [*team.named, *team.statistics], team.optimizer.optimizer)
        if checkpoint.exists():
            ledger = Ledger(**checkpoint.load())
        elif before.optimizer:
            load_optimizer_state(team.optimizer.optimizer, team.named, before.optimizer)
        while ledger.step < steps:
            if should_stop is not None and ledger.step and should_stop(ledger):
                break
            started = time.perf_counter()
            rate = rate_at(ledger.step)
            for group, base in zip(team.optimizer.param_groups, base_rates, strict=True):
                group["lr"] = base * rate
            windows = _draw_step(data, draws, ledger, sizes, accumulation, team)
            losses, more = _step(team, terms, windows, clip or math.inf, ledger.step, combine)
            total = sum(term.weight * losses[term.name] for term in terms)
            # the total also where a term has its name
            ledger.record({"loss": total, **losses, "lr": rate, **more} | {"loss": total})
            ledger.step += 1
            ledger.seconds += time.perf_counter() - started
            session.current().report(name, ledger.step, steps, f"loss {total:.3f}  {_speed(ledger)}")
            if checkpoint.due():
                checkpoint.save(asdict(ledger))
        if state is not None:
            state.step += ledger.step
            state.examples |= {role: draws[role].earlier + ledger.examples[role] for role in roles}
            state.optimizer = optimizer_state(team.optimizer.optimizer, team.named)
    return ledger


def _check(
    terms: Sequence[Term | Penalty], data: Mapping[str, Examples], roles: Sequence[str], combine: Combine | None
) -> None:
    for role in roles:
        if not len(data.get(role, ())):
            raise RequestError(f"Training reads the role {role!r}, which is missing or has no examples.")
    if len({term.name for term in terms}) < len(terms):
        raise ValueError(f"each term needs a name of its own: {[term.name for term in terms]}")
    if combine is not None and any(isinstance(term, Penalty) for term in terms):
        raise ValueError("a combiner is given the gradient of each role, and a penalty on the weights has none")


def _rates(
    steps: int, peak: float, warmup: int, schedule: Schedule | Factor, floor: float, earlier: int
) -> Callable[[int], float]:
    """The rate of each step of this training; `earlier` steps came before it."""
    if not callable(schedule):
        return lambda step: learning_rate(step, steps, peak, warmup, schedule, floor)
    if warmup or floor:
        raise ValueError("warmup and floor belong to a schedule given by name; another has its own")
    return lambda step: peak * schedule(earlier + step)


@contextmanager
def _in_training(model: nn.Module, frozen: Sequence[nn.Parameter]) -> Iterator[None]:
    """Train mode with some parameters frozen; afterwards eval mode, no gradients, and everything as it was."""
    before = {key: vars(model)[key] for key in _BY_ACCELERATE if key in vars(model)}
    model.zero_grad()
    model.train()
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        model.zero_grad()
        model.eval()
        for parameter in frozen:
            parameter.requires_grad_(True)
        for key in _BY_ACCELERATE:
            vars(model).pop(key, None)
        vars(model).update(before)


_BY_ACCELERATE = ("forward", "_original_forward", "_is_accelerate_prepared")
"""What `prepare` sets on a model: under bf16 a forward that would go on casting after the training."""


def _speed(ledger: Ledger) -> str:
    return f"{sum(ledger.tokens.values()) / max(ledger.seconds, 1e-9):,.0f} tokens/s"


def _draw_step(
    data: Mapping[str, Examples],
    draws: Mapping[str, Draw],
    ledger: Ledger,
    sizes: Mapping[str, int],
    accumulation: int,
    team: Workers,
) -> dict[str, list[Batch]]:
    """All micro-batches of one optimizer step, this process's share of each, and the counters moved on."""
    windows: dict[str, list[Batch]] = {}
    for role, draw in draws.items():
        windows[role] = []
        for _ in range(accumulation):
            places = draw.indices(ledger.examples[role], sizes[role])
            items = [data[role].items[i] for i in places]
            ledger.examples[role] += len(items)
            ledger.tokens[role] += sum(item["input_ids"].shape[0] if "input_ids" in item else 1 for item in items)
            share = team.share(items)
            # shards are gathered for each forward, so every process must run the same number of them
            for part in [share] if team.sharded else by_length(share):
                windows[role].append({k: v.to(team.accelerator.device) for k, v in collate(part).items()})
    return windows


def by_length(items: Sequence[Encoded]) -> list[list[Encoded]]:
    """Split examples so that none is padded to more than twice its length: exact, since terms are sums and counts."""
    if not items or "input_ids" not in items[0]:
        return [list(items)] if items else []
    groups: list[list[Encoded]] = []
    for item in sorted(items, key=lambda item: -item["input_ids"].shape[0]):
        if not groups or 2 * item["input_ids"].shape[0] < groups[-1][0]["input_ids"].shape[0]:
            groups.append([])
        groups[-1].append(item)
    return groups


def _step(
    team: Workers,
    terms: Sequence[Term | Penalty],
    windows: Mapping[str, list[Batch]],
    limit: float,
    step: int,
    combine: Combine | None,
) -> tuple[dict[str, float], dict[str, float]]:
    """One optimizer step; each term's mean over it, the combiner's curves and the gradient's norm before clipping."""
    with team.guarded_statistics():
        on_data = [term for term in terms if isinstance(term, Term)]
        if combine is None:
            losses, more = _backward(team, on_data, windows), {}
            losses |= _backward_penalties(team, [term for term in terms if isinstance(term, Penalty)])
        else:
            losses, more = _backward_apart(team, on_data, windows, combine, limit)
        norm = team.clip(limit)
        _check_finite(terms, losses, norm, step)
    team.optimizer.step()
    team.optimizer.zero_grad()
    return losses, {**more, "gradient norm": norm}


def _backward_apart(
    team: Workers, terms: Sequence[Term], windows: Mapping[str, list[Batch]], combine: Combine, limit: float
) -> tuple[dict[str, float], dict[str, float]]:
    """As `_backward` for one role after the other; the combination becomes the gradient."""
    losses: dict[str, float] = {}
    apart = Apart(team)
    for role, batches in windows.items():
        losses |= _backward(team, [term for term in terms if term.role == role], {role: batches})
        apart.put_aside(role)
    return losses, dict(apart.combine(combine, limit))


def _backward(team: Workers, terms: Sequence[Term], windows: Mapping[str, list[Batch]]) -> dict[str, float]:
    """Accumulate the gradient of the whole step; return each term's mean over it."""
    counts = torch.tensor([float(sum(map(term.count, windows[term.role]))) for term in terms])
    scale = [1.0 / max(count, 1.0) for count in processes.total(counts).tolist()]
    sums = {term.name: torch.zeros((), device=team.accelerator.device) for term in terms}
    for role, batches in windows.items():
        # a role of which nothing counts is only watched
        learnt = any(term.weight for term in terms if term.role == role)
        for batch in batches:
            with torch.set_grad_enabled(learnt):
                logits = forward(team.model, batch)
            total: Any = 0.0
            for term, factor in zip(terms, scale, strict=True):
                if term.role == role:
                    value = term.loss(logits, batch) * factor
                    sums[term.name] = sums[term.name] + value.detach()
                    total = total + value * (term.weight * team.gradient_scale)
            if learnt:
                team.accelerator.backward(total)
    team.add_up_gradients()
    return dict(zip(sums, processes.total(torch.stack([*sums.values()])).tolist(), strict=True)) if sums else {}


def _backward_penalties(team: Workers, penalties: Sequence[Penalty]) -> dict[str, float]:
    """Add the penalties' gradients, which are the same in every process, to those that were added up."""
    values: dict[str, float] = {}
    for penalty in penalties:
        value = penalty.loss(team.parameters)
        team.accelerator.backward(value * penalty.weight)
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
