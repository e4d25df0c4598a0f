"""Influence of samples on what a model says: by the Hessian, by products of gradients, by activations.

    H v     = grad <grad L, v>                                  double backward; H is never formed
    I(z, q) = - grad L(q)' (H + lambda I)^-1 grad L(z)          Koh and Liang, arXiv:1703.04730
    TracIn  = sum over checkpoints of lr <grad L(z), grad L(q)> Pruthi et al., arXiv:2002.08484

1. L of one sample is its summed loss, and H that of the mean over samples, so leaving z out of n moves L(q) by -I(z, q) / n.
2. (H + lambda I)^-1 is applied by conjugate gradients, which want H + lambda I positive, or by LiSSA (Agarwal et al.,
   arXiv:1602.03943), which wants it below its scale. Nets are not convex: damp, and trust ranks more than values.
3. Fused attention has no second derivative. While one is taken the model runs with eager attention, and afterwards with
   what it had. Open the model in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from overhaul import session, trace
from overhaul.data.examples import Batch, Examples
from overhaul.errors import RunError
from overhaul.forward import forward
from overhaul.modes import at_rest
from overhaul.objectives import cross_entropy_sum, evaluate
from overhaul.stack import LayerStack

Loss = Callable[[Tensor, Batch], Tensor]
"""(logits, batch) -> the loss summed over the batch."""

Gradients = dict[str, Tensor]
Product = Callable[[Gradients], Gradients]
Parameters = Mapping[str, nn.Parameter]


@contextmanager
def twice_differentiable(model: nn.Module) -> Iterator[None]:
    """Eval mode and eager attention for the time of the block; both are put back, for every part of the config."""
    any_model: Any = model
    can = hasattr(model, "set_attn_implementation")
    before: dict[str, Any] = {}
    if can:
        config = any_model.config
        parts = {name: getattr(config, name) for name in config.sub_configs if getattr(config, name) is not None}
        before = {"": config._attn_implementation, **{name: part._attn_implementation for name, part in parts.items()}}
    with at_rest(model):
        try:
            if can:
                any_model.set_attn_implementation("eager")
            yield
        finally:
            if can:
                any_model.set_attn_implementation(before)


def hessian_vector(
    model: nn.Module,
    examples: Examples,
    parameters: Parameters,
    vector: Gradients,
    *,
    loss: Loss = cross_entropy_sum,
    batch_size: int = 8,
) -> Gradients:
    """The Hessian of the mean loss over examples, times a vector.

    Args:
        model: run in eval mode.
        examples: n of them.
        parameters: of which the Hessian is taken.
        vector: one tensor for each of them.
        loss: summed over a batch.
        batch_size: examples in one double backward; does not change the value.

    Returns:
        One tensor for each parameter, on its device.
    """
    values = list(parameters.values())
    total = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    with twice_differentiable(model):
        for batch in examples.batches(batch_size):
            moved = {k: v.to(values[0].device) for k, v in batch.items()}
            value = loss(forward(model, moved), moved) / len(examples)
            first = torch.autograd.grad(value, values, create_graph=True, materialize_grads=True)
            inner = sum((gradient * vector[name]).sum() for name, gradient in zip(parameters, first, strict=True))
            if not isinstance(inner, Tensor) or not inner.requires_grad:
                continue  # a loss that is linear in the weights
            second = torch.autograd.grad(inner, values, materialize_grads=True)
            for name, product in zip(parameters, second, strict=True):
                total[name] += product
    return total


def conjugate_gradient(
    product: Product, target: Gradients, damping: float, *, iterations: int = 100, tolerance: float = 1e-6
) -> Gradients:
    """Solve (H + damping I) x = target by conjugate gradients.

    Args:
        product: v -> H v.
        target: the right-hand side.
        damping: lambda.
        iterations: at most.
        tolerance: the residual at which it ends, relative to the target.

    Raises:
        RunError: H + damping I is not positive along a direction, so that there is no minimum to find.
    """
    x = {name: torch.zeros_like(value) for name, value in target.items()}
    residual, direction = dict(target), dict(target)
    left = dot(residual, residual)
    end = tolerance**2 * left
    for _ in range(iterations):
        if left <= end:
            break
        moved = plus(product(direction), direction, damping)
        curvature = dot(direction, moved)
        if curvature <= 0:
            raise RunError(
                f"The Hessian is not positive along a direction (curvature {curvature:.3g} with damping {damping}): "
                "the loss is not at a minimum. A larger damping makes it positive."
            )
        step = left / curvature
        x, residual = plus(x, direction, step), plus(residual, moved, -step)
        before, left = left, dot(residual, residual)
        direction = plus(residual, direction, left / before)
    return x


def lissa(product: Product, target: Gradients, damping: float, *, scale: float, iterations: int = 100) -> Gradients:
    """Solve (H + damping I) x = target by v <- target + v - (H v + damping v) / scale and x = v / scale.

    Args:
        product: v -> H v; it may be another sample of the data at every call.
        target: the right-hand side.
        damping: lambda; the paper's is per scale, damping / scale.
        scale: above the largest eigenvalue of H + damping I, or it diverges.
        iterations: terms of the series.

    Raises:
        RunError: it diverges.
    """
    v = dict(target)
    for _ in range(iterations):
        moved = plus(product(v), v, damping)
        v = plus(plus(target, v, 1.0), moved, -1.0 / scale)
    size = dot(v, v)
    if not size < float("inf"):
        raise RunError(f"LiSSA diverges with scale {scale}: it must be above the Hessian's largest eigenvalue.")
    return {name: value / scale for name, value in v.items()}


def influence(
    model: nn.Module,
    samples: Examples,
    probes: Examples,
    train: Examples,
    parameters: Parameters,
    *,
    damping: float = 0.01,
    solver: Literal["cg", "lissa"] = "cg",
    scale: float = 10.0,
    iterations: int = 100,
    loss: Loss = cross_entropy_sum,
) -> Float[Tensor, "z q"]:
    """I(z, q) for every sample and probe; one inverse for each probe.

    Args:
        model: at (or near) a minimum of the mean loss on `train`.
        samples: z of them.
        probes: q of them.
        train: what the Hessian is taken of.
        parameters: which count.
        damping: lambda.
        solver: conjugate gradients, or LiSSA.
        scale: of LiSSA.
        iterations: of either.
        loss: summed over a batch.

    Returns:
        Negative where weighing z up lowers q's loss, so where leaving it out would raise it.
    """

    def product(vector: Gradients) -> Gradients:
        return hessian_vector(model, train, parameters, vector, loss=loss)

    def inverse(target: Gradients) -> Gradients:
        if solver == "cg":
            return conjugate_gradient(product, target, damping, iterations=iterations)
        return lissa(product, target, damping, scale=scale, iterations=iterations)

    found = torch.empty(len(samples), len(probes))
    for q in session.progress(range(len(probes)), "influence", len(probes)):
        moved = inverse(_gradient(model, probes, q, parameters, loss))
        for z in range(len(samples)):
            found[z, q] = -dot(_gradient(model, samples, z, parameters, loss), moved)
    return found


def tracin(
    checkpoints: Sequence[tuple[nn.Module, float]],
    samples: Examples,
    probes: Examples,
    *,
    names: Collection[str] | None = None,
    loss: Loss = cross_entropy_sum,
) -> Float[Tensor, "z q"]:
    """Sum over checkpoints of the learning rate times the product of a sample's and a probe's gradient.

    Args:
        checkpoints: models along a training, each with the rate it had.
        samples: z of them.
        probes: q of them.
        names: of the parameters that count; all that train, if None.
        loss: summed over a batch.

    Returns:
        Positive where a step on z lowers q's loss.
    """
    found = torch.zeros(len(samples), len(probes))
    for model, rate in checkpoints:
        trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
        parameters = trained if names is None else {name: trained[name] for name in names}
        for z in range(len(samples)):
            ours = _gradient(model, samples, z, parameters, loss)
            for q in range(len(probes)):
                found[z, q] += rate * dot(ours, _gradient(model, probes, q, parameters, loss))
    return found


def activation_similarity(model: nn.Module, samples: Examples, probes: Examples, depth: int) -> Float[Tensor, "z q"]:
    """Cosine between the mean states that leave a block: how alike a model reads samples and probes.

    Args:
        model: with one main stack.
        samples: z of them.
        probes: q of them.
        depth: of the block.
    """
    site, stack = f"leaving.{depth}", LayerStack.of(model)

    def mean(state: Tensor, mask: Tensor) -> list[Tensor]:
        return [(state * mask[..., None]).sum(dim=1) / mask.sum(dim=1)[:, None]]

    def pooled(examples: Examples) -> Tensor:
        with trace.capture(stack, [site], mean) as seen:
            evaluate(model, lambda logits, _: logits.new_zeros(()), list(examples.batches(8)))
        return nn.functional.normalize(torch.cat(seen[site]), dim=1)

    return (pooled(samples) @ pooled(probes).T).cpu()


def gradient(
    model: nn.Module,
    examples: Examples,
    parameters: Parameters,
    loss: Loss = cross_entropy_sum,
) -> Gradients:
    """The gradient of the summed loss (answer NLL) of all examples at the present weights, in eval mode, on the CPU."""
    values = list(parameters.values())
    wide = {name: torch.promote_types(p.dtype, torch.float32) for name, p in parameters.items()}
    total = {name: torch.zeros(p.shape, dtype=wide[name]) for name, p in parameters.items()}
    with at_rest(model):
        for batch in examples.batches(8):
            moved = {k: v.to(values[0].device) for k, v in batch.items()}
            found = torch.autograd.grad(loss(forward(model, moved), moved), values, allow_unused=True)
            for name, value in zip(parameters, found, strict=True):
                if value is not None:
                    total[name] += value.cpu()
    return total


def _gradient(model: nn.Module, examples: Examples, place: int, parameters: Parameters, loss: Loss) -> Gradients:
    found = gradient(model, examples[place : place + 1], parameters, loss)
    return {name: value.to(parameters[name].device) for name, value in found.items()}


def dot(one: Gradients, other: Gradients) -> float:
    """The inner product over all parameters."""
    return sum(float((value.double() * other[name].double()).sum()) for name, value in one.items())


def plus(one: Gradients, other: Gradients, share: float) -> Gradients:
    """The sum of one and a share of the other."""
    return {name: torch.add(value, other[name], alpha=share) for name, value in one.items()}
