"""Reconstruction: train one block until, on what enters it, it gives what another block gave.

    error = mean over samples, positions without padding and features of (block(x) - y)^2

`blockwise` brings the data to the block; this trains it there. What is worse at the end than at the beginning is taken back.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from overhaul.blockwise import Sample, Site
from overhaul.errors import RunError
from overhaul.fit.optimizers import adamw
from overhaul.fit.regime import Regime
from overhaul.fit.schedules import learning_rate, warmup_steps
from overhaul.modes import at_rest
from overhaul.stack.calls import map_tensors


@contextmanager
def in_float32(block: nn.Module) -> Iterator[None]:
    """Inside the `with`, the block's numbers are float32; afterwards of the dtypes that they had, rounded once."""
    dtypes = {name: tensor.dtype for name, tensor in block.state_dict(keep_vars=True).items()}
    block.float()
    try:
        yield
    finally:
        for name, tensor in block.state_dict(keep_vars=True).items():
            tensor.data = tensor.data.to(dtypes[name])


def samples_of(site: Site) -> list[Sample]:
    """What enters a block, in float32, to be read many times."""
    return [
        replace(sample, state=map_tensors(sample.state, _float32), call=sample.call.map(_float32))
        for sample in site.inputs
    ]


def reconstruct_block(
    site: Site,
    samples: Sequence[Sample],
    targets: Sequence[Tensor],
    trained: Mapping[str, nn.Parameter],
    regime: Regime,
) -> tuple[float, float]:
    """Train some parameters of the block at hand.

    Args:
        site: the block, in float32.
        samples: what enters it; one is a batch, and a step reads one.
        targets: what it should give for each, [b, t, d] or [b, c, h, w].
        trained: its parameters that are trained, by name; they require gradients.
        regime: steps, rate and schedule; the batch size is that of the samples.

    Returns:
        The error before and after.

    Raises:
        RunError: it is not finite before anything is trained.
    """
    learnt = list(trained.values())
    draw = torch.Generator().manual_seed(torch.initial_seed() % 2**63)
    optimizer = adamw(weight_decay=regime.weight_decay)(site.block, trained)
    warmup = warmup_steps(regime.warmup, regime.steps)
    with at_rest(site.block):
        before, best = error(site, samples, targets), [one.detach().clone() for one in learnt]
        if not math.isfinite(before):
            raise RunError(
                f"The error of block {site.place} is not finite: what it gives, or should give, is NaN or too large for its "
                "square. Look at the weights of both models."
            )
        order: list[int] = []
        for step in range(regime.steps):
            order = order or torch.randperm(len(samples), generator=draw).tolist()
            place = order.pop()
            with torch.enable_grad():
                total, count = _squares(site, samples[place], targets[place])
                gradients = torch.autograd.grad(total / count, learnt, allow_unused=True)
            for parameter, gradient in zip(learnt, gradients, strict=True):
                parameter.grad = gradient
            if regime.clip is not None:
                torch.nn.utils.clip_grad_norm_(learnt, regime.clip)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, regime.steps, regime.lr, warmup, regime.schedule)
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        after = error(site, samples, targets)
        if not after < before:  # also where it is NaN
            with torch.no_grad():
                for parameter, value in zip(learnt, best, strict=True):
                    parameter.copy_(value)
            after = before
    return before, after


@torch.no_grad()
def error(site: Site, samples: Sequence[Sample], targets: Sequence[Tensor]) -> float:
    """The mean squared error of the block as it is now."""
    parts = [_squares(site, sample, target) for sample, target in zip(samples, targets, strict=True)]
    return sum(float(total) for total, _ in parts) / sum(count for _, count in parts)


def _squares(site: Site, sample: Sample, target: Tensor) -> tuple[Tensor, int]:
    """The sum of squared differences, and of how many numbers it is."""
    given = site.run(sample)[0]
    assert given is not None
    difference = given - target
    mask = sample.mask
    if mask is not None:
        difference = difference[mask.to(difference.device).bool()]
    return difference.square().sum(), max(1, difference.numel())


def _float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor
