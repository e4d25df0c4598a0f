"""The one training loop, on accelerate.

Every method that trains calls `fit`. What it promises:

1. One normalisation: each term is (sum of sums) / (sum of counts) over the whole optimizer step, so accumulation,
   padding and the number of processes do not change a result.
2. Each role is drawn without replacement, epoch after epoch, in an order that depends only on (seed, role, epoch); its
   position is a counter, so a resumed run sees exactly the examples an uninterrupted one would.
3. A checkpoint holds weights, norm statistics, optimizer, counters and random state (safetensors and JSON): resuming is
   bit-exact.
4. A loss or gradient that is not finite stops the loop before it reaches the weights.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from overhaul import session
from overhaul.checkpoints import Checkpoint
from overhaul.data.examples import Batch, Encoded, Examples, collate
from overhaul.errors import RequestError, RunError
from overhaul.objectives import Term, forward

Schedule = Literal["constant", "linear", "cosine"]
OptimizerFactory = Callable[[Iterable[tuple[str, nn.Parameter]]], torch.optim.Optimizer]


def learning_rate(step: int, steps: int, peak: float, warmup: int, schedule: Schedule, floor: float = 0.0) -> float:
    """The rate of optimizer step `step` (0-based) of `steps`: linear warm-up to `peak`, then down to `floor * peak`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    share = (step - warmup) / max(1, steps - warmup)
    shape = {"constant": 1.0, "linear": 1.0 - share, "cosine": 0.5 * (1.0 + math.cos(math.pi * share))}[schedule]
    return peak * (floor + (1.0 - floor) * shape)


def adamw(betas: tuple[float, float] = (0.9, 0.999), weight_decay: float = 0.0) -> OptimizerFactory:
    """AdamW; matrices decay, vectors (norms, biases) do not."""

    def build(named: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        named = list(named)
        matrices = [p for _, p in named if p.ndim >= 2]
        vectors = [p for _, p in named if p.ndim < 2]
        groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        return torch.optim.AdamW([g for g in groups if g["params"]], lr=1.0, betas=betas, fused=True)

    return build


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

    def __init__(self, role: str, size: int, seed: int) -> None:
        self.size = size
        self.seed = seed * 1_000_003 + sum(role.encode())
        self.epoch, self.order = -1, list[int]()

    def indices(self, start: int, count: int) -> list[int]:
        """Places of draws number `start` to `start + count - 1`."""
        chosen: list[int] = []
        for n in range(start, start + count):
            epoch, place = divmod(n, self.size)
            if epoch != self.epoch:
                generator = torch.Generator().manual_seed((self.seed + 7919 * epoch) % 2**63)
                self.order = torch.randperm(self.size, generator=generator).tolist()
                self.epoch = epoch
            chosen.append(self.order[place])
        return chosen


def fit(
    model: nn.Module,
    terms: Sequence[Term],
    data: Mapping[str, Examples],
    *,
    steps: int,
    batch_size: int | Mapping[str, int] = 16,
    accumulation: int = 1,
    lr: float = 1e-4,
    warmup: int = 0,
    schedule: Schedule = "constant",
    floor: float = 0.0,
    clip: float | None = 1.0,
    weight_decay: float = 0.0,
    optimizer: OptimizerFactory | None = None,
    trainable: Callable[[str], bool] | None = None,
    should_stop: Callable[[Ledger], bool] | None = None,
    name: str = "fit",
) -> Ledger:
    """Train `model` in place on weighted terms, each reading one role of `data`.

    Args:
        model: any module that `objectives.forward` can call; left in eval mode.
        terms: the parts of the objective; terms on one role share one forward.
        data: examples by role.
        steps: optimizer steps.
        batch_size: examples per role in one forward (all processes together); a step takes `accumulation` times that.
        accumulation: micro-batches per step.
        lr: peak learning rate.
        warmup: steps of linear warm-up.
        schedule: what follows the warm-up, see `learning_rate`.
        floor: share of the peak at which the schedule ends.
        clip: largest total gradient norm, or None.
        weight_decay: of matrices, for the default optimizer.
        optimizer: builds an optimizer from named parameters; AdamW with `weight_decay` if not given.
        trainable: which parameters to train, by name; all that require gradients if not given.
        should_stop: asked after each step; True ends the training early.
        name: what progress and the checkpoint are called; two trainings of one step need two names.

    Returns:
        The ledger: examples and tokens per role, and curves (`loss`, one per term, `lr`, `gradient norm`).

    Raises:
        RequestError: a role is missing or empty, or nothing is trainable.
        ValueError: two terms have one name.
        RunError: a loss or gradient is not finite; the weights are those of the last good step.
    """
    roles = list(dict.fromkeys(term.role for term in terms))
    sizes = {role: batch_size if isinstance(batch_size, int) else batch_size[role] for role in roles}
    for role in roles:
        if not len(data.get(role, ())):
            raise RequestError(f"Training reads the role {role!r}, which is missing or has no examples.")
    if len({term.name for term in terms}) < len(terms):
        raise ValueError(f"each term needs a name of its own: {[term.name for term in terms]}")
    learnable = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    named = [(n, p) for n, p in learnable if trainable is None or trainable(n)]
    if not named:
        raise RequestError("Nothing to train: no parameter of the model is selected and requires gradients.")

    chosen = {n for n, _ in named}
    with _in_training(model, frozen=[p for n, p in learnable if n not in chosen]):
        accelerator = Accelerator(mixed_precision="bf16" if _has_fast_bf16() else "no")
        make = optimizer or adamw(weight_decay=weight_decay)
        wrapped, stepper = accelerator.prepare(model, make(named))
        statistics = _statistics(model)
        base_rates = [group["lr"] for group in stepper.param_groups]
        draws = {role: Draw(role, len(data[role]), torch.initial_seed()) for role in roles}
        ledger = Ledger(examples=dict.fromkeys(roles, 0), tokens=dict.fromkeys(roles, 0))
        checkpoint = Checkpoint.for_training(name, [*named, *statistics], stepper.optimizer)
        if checkpoint.exists():
            ledger = Ledger(**checkpoint.load())
        while ledger.step < steps:
            if should_stop is not None and ledger.step and should_stop(ledger):
                break
            started = time.perf_counter()
            rate = learning_rate(ledger.step, steps, lr, warmup, schedule, floor)
            for group, base in zip(stepper.param_groups, base_rates, strict=True):
                group["lr"] = base * rate
            windows = _draw_step(data, draws, ledger, sizes, accumulation, accelerator)
            with _kept_if_it_fails(statistics):
                losses = _backward(wrapped, terms, windows, accelerator)
                norm = float(accelerator.clip_grad_norm_(wrapped.parameters(), clip or math.inf) or 0.0)
                _check_finite(terms, losses, norm, ledger.step)
            stepper.step()
            stepper.zero_grad()
            total = sum(term.weight * losses[term.name] for term in terms)
            ledger.record({"loss": total, **losses, "lr": rate, "gradient norm": norm})
            ledger.step += 1
            ledger.seconds += time.perf_counter() - started
            session.current().report(name, ledger.step, steps, f"loss {total:.3f}  {_speed(ledger)}")
            if accelerator.is_main_process and checkpoint.due():
                checkpoint.save(asdict(ledger))
    return ledger


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


def _statistics(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Buffers that belong to the model's state, such as batch norm's running means: a forward changes them."""
    saved = model.state_dict().keys()
    return [(n, b) for n, b in model.named_buffers() if n in saved]


@contextmanager
def _kept_if_it_fails(tensors: Sequence[tuple[str, Tensor]]) -> Iterator[None]:
    before = [tensor.clone() for _, tensor in tensors]
    try:
        yield
    except BaseException:
        for (_, tensor), old in zip(tensors, before, strict=True):
            tensor.copy_(old)
        raise


def _has_fast_bf16() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported()


def _speed(ledger: Ledger) -> str:
    return f"{sum(ledger.tokens.values()) / max(ledger.seconds, 1e-9):,.0f} tokens/s"


def _draw_step(
    data: Mapping[str, Examples],
    draws: Mapping[str, Draw],
    ledger: Ledger,
    sizes: Mapping[str, int],
    accumulation: int,
    accelerator: Accelerator,
) -> dict[str, list[Batch]]:
    """All micro-batches of one optimizer step, this process's share of each, and the counters moved on."""
    rank, world = accelerator.process_index, accelerator.num_processes
    windows: dict[str, list[Batch]] = {}
    for role, draw in draws.items():
        windows[role] = []
        for _ in range(accumulation):
            places = draw.indices(ledger.examples[role], sizes[role])
            items = [data[role].items[i] for i in places]
            ledger.examples[role] += len(items)
            ledger.tokens[role] += sum(item["input_ids"].shape[0] if "input_ids" in item else 1 for item in items)
            # every process must run the same number of forwards when parameters are gathered for each
            parts = by_length(items) if world == 1 else [items[rank::world]]
            for part in parts:
                windows[role].append({k: v.to(accelerator.device) for k, v in collate(part).items()})
    return windows


def by_length(items: Sequence[Encoded]) -> list[list[Encoded]]:
    """Split examples so that none is padded to more than twice its length: exact, since terms are sums and counts."""
    if "input_ids" not in items[0]:
        return [list(items)]
    groups: list[list[Encoded]] = []
    for item in sorted(items, key=lambda item: -item["input_ids"].shape[0]):
        if not groups or 2 * item["input_ids"].shape[0] < groups[-1][0]["input_ids"].shape[0]:
            groups.append([])
        groups[-1].append(item)
    return groups


def _backward(
    model: nn.Module, terms: Sequence[Term], windows: Mapping[str, list[Batch]], accelerator: Accelerator
) -> dict[str, float]:
    """Accumulate the gradient of the whole step; return each term's mean over it."""
    world = accelerator.num_processes
    counts = torch.tensor([float(sum(map(term.count, windows[term.role]))) for term in terms])
    if world > 1:
        counts = _sum_over_processes(accelerator, counts)
    scale = [1.0 / max(count, 1.0) for count in counts.tolist()]
    sums: dict[str, Tensor] = {}
    micro_batches = [(role, batch) for role, batches in windows.items() for batch in batches]
    for n, (role, batch) in enumerate(micro_batches):
        last = n == len(micro_batches) - 1
        with _maybe_no_sync(accelerator, model, last):
            logits = forward(model, batch)
            total: Any = 0.0
            for term, factor in zip(terms, scale, strict=True):
                if term.role == role:
                    value = term.loss(logits, batch) * factor
                    sums[term.name] = sums.get(term.name, 0.0) + value.detach()
                    # DDP averages gradients over processes; the counts are already those of all of them
                    total = total + value * (term.weight * world)
            accelerator.backward(total)
    if world > 1:
        sums = {name: _sum_over_processes(accelerator, value) for name, value in sums.items()}
    return {name: float(value) for name, value in sums.items()}


def _sum_over_processes(accelerator: Accelerator, value: Tensor) -> Tensor:
    return cast("Tensor", accelerator.reduce(value.to(accelerator.device), reduction="sum"))


def _maybe_no_sync(accelerator: Accelerator, model: nn.Module, last: bool) -> AbstractContextManager[Any]:
    return nullcontext() if last else accelerator.no_sync(model)


def _check_finite(terms: Sequence[Term], losses: Mapping[str, float], norm: float, step: int) -> None:
    bad = [term for term in terms if not math.isfinite(losses[term.name])]
    if not bad and math.isfinite(norm):
        return
    what = "the gradient is not finite"
    if bad:
        what = f"the term {bad[0].name!r} on the role {bad[0].role!r} is {losses[bad[0].name]}"
    raise RunError(
        f"Training stopped at step {step + 1}: {what}. The weights are those after step {step}. "
        "A lower learning rate, a longer warm-up or a stronger retain term usually helps."
    )
