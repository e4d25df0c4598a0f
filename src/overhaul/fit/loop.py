"""Training on given data: `fit`, a few lines on top of the open loop (`training`, which says what both promise)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import nn

from overhaul.data.examples import Examples
from overhaul.errors import RequestError
from overhaul.fit.checkpoints import TrainingState
from overhaul.fit.draws import Ledger
from overhaul.fit.optimizers import OptimizerFactory
from overhaul.fit.schedules import Factor, Schedule
from overhaul.fit.training import Training
from overhaul.objectives import Penalty, Term, check_learnable, cross_entropy_sum


def fit(
    model: nn.Module,
    terms: Sequence[Term | Penalty],
    data: Mapping[str, Examples],
    *,
    steps: int,
    batch_size: int | Mapping[str, int] = 16,
    accumulation: int = 1,
    lr: float = 1e-4,
    warmup: float = 0,
    schedule: Schedule | Factor = "constant",
    floor: float = 0.0,
    clip: float | None = 1.0,
    optimizer: OptimizerFactory | None = None,
    trainable: Callable[[str], bool] | None = None,
    state: TrainingState | None = None,
    name: str = "fit",
) -> Ledger:
    """Train `model` in place on weighted terms, each reading one role of `data`. What is not said here is in `Training`.

    Args:
        model: any module that `overhaul.forward` can call; left in eval mode.
        terms: the parts of the objective, see `Step.backward`.
        data: examples by role.
        steps: optimizer steps.
        batch_size: examples per role in one forward (all processes together); a step takes `accumulation` times that.
        accumulation: micro-batches per step.
        lr: peak learning rate.
        warmup: steps of linear warm-up, or their share below 1.
        schedule: what follows the warm-up.
        floor: share of the peak at which a schedule given by name ends.
        clip: largest total gradient norm, or None.
        optimizer: builds an optimizer from the model and what trains of it; AdamW if not given.
        trainable: which parameters to train, by name; all that require gradients if not given.
        state: where an earlier training stood.
        name: what progress and the checkpoint are called.

    Returns:
        The ledger: examples and tokens per role, and curves (`loss`, one per term, `lr`, `gradient norm`).

    Raises:
        RequestError: a role is missing or empty, nothing is trainable, a batch is too small for the processes, or a
            checkpoint of this name was left by another training.
        ValueError: two terms have one name, or a schedule that is no name comes with a warm-up or floor.
        RunError: a loss or gradient is not finite; the weights are those of the last good step.
    """
    for role in (term.role for term in terms if isinstance(term, Term)):
        if not len(data.get(role, ())):
            raise RequestError(f"Training reads the role {role!r}, which is missing or has no examples.")
    for term in terms:
        if isinstance(term, Term) and term.loss is cross_entropy_sum:
            check_learnable(term.role, data[term.role])
    training = Training(
        model, data, steps=steps, lr=lr, warmup=warmup, schedule=schedule, floor=floor, clip=clip, optimizer=optimizer,
        trainable=trainable, state=state, name=name,
    )  # fmt: skip
    weights = {term.name: "by step" if callable(term.weight) else term.weight for term in terms}
    training.belongs |= {"batch size": batch_size, "accumulation": accumulation, "weights of the terms": weights}
    with training:
        for step in training:
            step.take(terms, batch_size, accumulation)
    return training.ledger
