"""The open loop: a training whose steps a method writes itself.

    with Training(model, data, steps=100, lr=1e-6, name="grpo") as training:
        for step in training:                          # goes on where an interrupted one stopped, `kept` included
            prompts = step.draw("prompts", 32)
            answers = rollouts(training.live, prompts, 8, seed=step.seed)
            step.backward([grpo("answers")], {"answers": answers})
            step.apply()
            training.kept["buffer"] = buffer           # tensors and plain values, saved with the checkpoint

What it promises:

1. One normalisation: each term is (sum of sums) / (sum of counts) over the whole `backward`, so micro-batches, padding and
   the number of processes do not change a result. A penalty on the weights counts once.
2. Each role is drawn without replacement, epoch after epoch, in an order that depends only on (seed, role, epoch); its
   position is a counter, so a resumed run sees exactly the examples an uninterrupted one would.
3. A checkpoint holds weights and their float32 masters, norm statistics, optimizers, counters, random state and `kept`
   (safetensors and JSON) as they are between two steps: resuming is bit-exact. It says what it belongs to.
4. A loss or gradient that is not finite stops the loop before it reaches the weights.
5. Modules of which nothing trains stay in eval mode: the norms of a frozen backbone keep their statistics.
6. Under `torchrun` or `accelerate launch` the same loop trains copies or shards (`parallel`). What cannot be kept there:
   batch norm sees each process's part of a batch, and dropout draws other masks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, is_dataclass
from types import TracebackType
from typing import Any

import torch
from torch import nn

from overhaul import session
from overhaul.data.examples import Examples
from overhaul.errors import RequestError
from overhaul.fit.checkpoints import MAIN, TrainingCheckpoint, TrainingState, go_on, now
from overhaul.fit.draws import Draw, Ledger
from overhaul.fit.optimizers import OptimizerFactory, adamw
from overhaul.fit.parallel import Workers, workers
from overhaul.fit.schedules import Factor, Schedule, learning_rate, warmup_steps
from overhaul.fit.step import Step
from overhaul.objectives import check_positions


class Training:
    """A model in training, as a context: inside it, iterating gives the steps that are left.

    Inside, modules of which something trains are in train mode and all others in eval mode; afterwards all are in eval
    mode, without gradients, and parameters that were frozen for the time require gradients again.

    Args:
        model: any module that `overhaul.forward` can call.
        data: examples by role, for `Step.draw`.
        steps: optimizer steps.
        lr: peak learning rate.
        warmup: steps of linear warm-up, or below 1 their share of all steps; for a schedule given by name.
        schedule: what follows the warm-up, see `schedules.learning_rate`; or an absolute step's share of the peak, such as
            `schedules.Infinite`, counted from `state.step`.
        floor: share of the peak at which a schedule given by name ends.
        clip: largest total gradient norm, or None.
        optimizer: builds an optimizer from the model and what trains of it; AdamW if not given.
        others: further optimizers by name, each over all or some of the same parameters, for `Step.apply(name)`: a second
            objective with moments of its own, or the discriminator beside the generator. They follow the same schedule;
            the `lr` of a group is a factor on it.
        trainable: which parameters to train, by name; all that require gradients if not given.
        state: where an earlier training stood; this one goes on with its draws and its optimizers, and leaves there where
            it ended itself. A fresh start if not given.
        name: what progress and the checkpoint are called; two trainings of one step need two names.

    Attributes:
        ledger: examples and tokens per role, and the curves.
        kept: what the loop keeps from step to step: tensors, numbers, texts, lists and dicts of them.
        seed: torch's seed when the training began.
        belongs: what a checkpoint must have in common with this training; more may be added before the `with`.

    Raises:
        RequestError: (in `with`) nothing is trainable, or a checkpoint of this name was left by another training.
        ValueError: a schedule that is no name comes with a warm-up or floor.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Mapping[str, Examples],
        *,
        steps: int,
        lr: float = 1e-4,
        warmup: float = 0,
        schedule: Schedule | Factor = "constant",
        floor: float = 0.0,
        clip: float | None = 1.0,
        optimizer: OptimizerFactory | None = None,
        others: Mapping[str, OptimizerFactory] | None = None,
        trainable: Callable[[str], bool] | None = None,
        state: TrainingState | None = None,
        name: str = "fit",
    ) -> None:
        self.model, self.data, self.total, self.name = model, data, steps, name
        self.limit = math.inf if clip is None else clip
        self.make = {MAIN: optimizer or adamw(), **(others or {})}
        self.before, self.state, self.seed = state or TrainingState(), state, torch.initial_seed()
        self.rate_at = _rates(steps, lr, warmup, schedule, floor, self.before.step)
        learnable = [name for name, p in model.named_parameters() if p.requires_grad]
        self.chosen = {name for name in learnable if trainable is None or trainable(name)}
        self.frozen = [model.get_parameter(name) for name in learnable if name not in self.chosen]
        self.ledger, self.kept, self.draws = Ledger(), dict[str, Any](), dict[str, Draw]()
        self.belongs: dict[str, Any] = {
            "steps": steps, "lr": lr, "warmup": warmup, "schedule": _told(schedule), "floor": floor, "clip": clip,
            "seed": self.seed, "earlier steps": self.before.step, "examples": {r: len(e) for r, e in data.items()},
            "number of trained parameters": len(self.chosen), "optimizers": list(self.make),
        }  # fmt: skip
        self.open: Step | None = None
        self._undo = ExitStack()
        self.team: Workers

    def __enter__(self) -> Training:
        if not self.chosen:
            raise RequestError("Nothing to train: no parameter of the model is selected and requires gradients.")
        for examples in self.data.values():
            check_positions(self.model, examples)
        session.begins()
        checkpoint = self.checkpoint = TrainingCheckpoint(self.name, self.belongs)
        resumed = checkpoint.exists()
        if resumed:
            checkpoint.check()
        with ExitStack() as undo:
            undo.enter_context(_in_training(self.model, self.chosen, self.frozen))
            self.team = undo.enter_context(workers(self.model, self.chosen, self.make))
            self.base_rates = {
                which: [group["lr"] for group in wrapped.param_groups]
                for which, wrapped in self.team.optimizers.items()
            }
            if resumed:
                counters, kept = checkpoint.load(self.team)
                self.ledger = Ledger(**counters)
                self.kept.update(kept)
            else:
                go_on(self.team, self.before)
            self._undo = undo.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if self.open is not None:
            self.open.take_back()
        if error is None and self.state is not None:
            earlier = self.before.examples
            examples = earlier | {role: earlier.get(role, 0) + n for role, n in self.ledger.examples.items()}
            now(self.team, self.before.step + self.ledger.step, examples, self.state)
        self._undo.__exit__(kind, error, where)

    def __iter__(self) -> Iterator[Step]:
        while self.ledger.step < self.total:
            number = self.ledger.step
            self.open = Step(self, number)
            yield self.open
            if self.ledger.step == number:
                raise RuntimeError(f"step {number + 1} of {self.name!r} ended without step.apply()")
            self.open.take_back()
            self.open = None
            if self.checkpoint.due():
                self.checkpoint.save(self.team, asdict(self.ledger), self.kept)

    @property
    def live(self) -> nn.Module:
        """What trains: the model, or this process's copy in shards. What is sampled between steps is asked of it."""
        return self.team.model

    def draw(self, role: str) -> Draw:
        """The order of a role's examples.

        Raises:
            RequestError: the role is missing or empty.
        """
        if role not in self.draws:
            if not len(self.data.get(role, ())):
                raise RequestError(f"Training reads the role {role!r}, which is missing or has no examples.")
            self.draws[role] = Draw(role, len(self.data[role]), self.seed, self.before.examples.get(role, 0))
            self.ledger.examples.setdefault(role, 0)
            self.ledger.tokens.setdefault(role, 0)
        return self.draws[role]

    def set_rate(self, which: str, rate: float) -> None:
        """Give an optimizer's groups their rates."""
        for group, base in zip(self.team.optimizers[which].param_groups, self.base_rates[which], strict=True):
            group["lr"] = base * rate


def _rates(
    steps: int, peak: float, warmup: float, schedule: Schedule | Factor, floor: float, earlier: int
) -> Callable[[int], float]:
    """The rate of each step of this training; `earlier` steps came before it."""
    if not callable(schedule):
        warm = warmup_steps(warmup, steps)
        return lambda step: learning_rate(step, steps, peak, warm, schedule, floor)
    if warmup or floor:
        raise ValueError("warmup and floor belong to a schedule given by name; another has its own")
    return lambda step: peak * schedule(earlier + step)


def _told(schedule: Schedule | Factor) -> str:
    """A schedule in words that are the same in every process; of a function, its name alone."""
    if isinstance(schedule, str) or is_dataclass(schedule):
        return str(schedule)
    return getattr(schedule, "__qualname__", type(schedule).__qualname__)


@contextmanager
def _in_training(model: nn.Module, trained: set[str], frozen: Sequence[nn.Parameter]) -> Iterator[None]:
    """Train mode where something trains, some parameters frozen; afterwards eval mode, no gradients, all as it was."""
    before = {key: vars(model)[key] for key in _BY_ACCELERATE if key in vars(model)}
    model.zero_grad()
    _set_modes(model, {id(model.get_parameter(name)) for name in trained}, True)
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


def _set_modes(module: nn.Module, trained: set[int], above: bool) -> None:
    """Train mode for modules in which something trains, and for parts without parameters of those (dropout)."""
    inside = [id(parameter) for parameter in module.parameters()]
    module.training = any(parameter in trained for parameter in inside) if inside else above
    for child in module.children():
        _set_modes(child, trained, module.training)


_BY_ACCELERATE = ("forward", "_original_forward", "_is_accelerate_prepared")
"""What `prepare` sets on a model: under bf16 a forward that would go on casting after the training."""
