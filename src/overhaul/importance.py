"""How much each weight matters on a set of examples, and the dampening of those that matter too much on one of them.

Importance is the diagonal empirical Fisher in one of two forms that are far apart: the squared gradient of batch means,
or the mean of the samples' squared gradients. In a set of one class the samples' gradients agree, in a mixed set they
cancel, so the first form tells the two sets apart more sharply the larger the batch is. Everything is accumulated in
float32 whatever the model's dtype, because squared gradients of 1e-8 vanish in half precision.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from overhaul import session
from overhaul.data.examples import IGNORED, Batch, Encoded, Examples
from overhaul.errors import RequestError, RunError
from overhaul.forward import forward
from overhaul.modes import at_rest
from overhaul.objectives import cross_entropy_sum

Signal = Literal["loss", "logits"]
PerParameter = dict[str, Tensor]

VALUES_AT_ONCE = 2**24
"""Per-sample gradients held at once, in values: 64 MiB in float32. More is slower on a CPU, whose caches it leaves."""


def mean_signal(logits: Tensor, batch: Batch, signal: Signal) -> Tensor:
    """What is differentiated: a mean over the batch's images or answer tokens.

    Args:
        logits: [b, classes] or [b, t, vocabulary].
        batch: the batch they belong to.
        signal: "loss" is the cross-entropy with the true labels; "logits" the squared norm of the logits, which needs
            no labels (for language it needs to know which tokens are the answer).
    """
    labels = batch["labels"]
    is_text = labels.ndim > 1
    # a tensor: reading it as a number would end the tracing of vmap
    count = (labels[:, 1:] != IGNORED).sum().clamp(min=1) if is_text else labels.shape[0]
    if signal == "loss":
        return cross_entropy_sum(logits, batch) / count
    norms = logits.float().square().sum(dim=-1)
    if is_text:
        norms = norms[:, :-1] * (labels[:, 1:] != IGNORED)
    return norms.sum() / count


def batch_importance(model: nn.Module, examples: Examples, batch_size: int, signal: Signal, what: str) -> PerParameter:
    """Mean over batches of the squared gradient of each batch's mean loss (its absolute value for "logits").

    A last, smaller batch counts as one batch. Frozen parameters are left out; tied ones appear once, with the sum of
    their gradients. Holds one float32 copy of the parameters and one gradient.

    Args:
        model: differentiated in eval mode; its own `.grad` is not touched.
        examples: in the order in which batches are taken.
        batch_size: examples in a batch: part of the definition, not only of the speed.
        signal: see `mean_signal`.
        what: how progress calls it.
    """
    named = _trainable(model)
    device = next(iter(named.values())).device
    total = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in named.items()}
    count = math.ceil(len(examples) / batch_size)
    with _differentiable(model):
        for batch in session.progress(examples.batches(batch_size), what, count):
            moved = {k: v.to(device) for k, v in batch.items()}
            value = mean_signal(forward(model, moved), moved, signal)
            gradients = torch.autograd.grad(value, list(named.values()), allow_unused=True)
            for name, gradient in zip(named, gradients, strict=True):
                if gradient is not None:
                    _add(total[name], gradient[None], signal, count)
    return _checked(total, what)


def sample_importance(
    model: nn.Module, examples: Examples, signal: Signal, what: str
) -> tuple[PerParameter, Literal["vmap", "one by one"]]:
    """Mean over examples of the squared gradient of each one's mean loss (its absolute value for "logits").

    Examples of one length are differentiated together by vmap(grad), as many as `VALUES_AT_ONCE` allows. A model that
    vmap cannot trace, or of which only one gradient fits, is differentiated example by example: the same values.

    Returns:
        The importances, and in which of the two ways they were had.
    """
    named = _trainable(model)
    device = next(iter(named.values())).device
    chunks = _of_one_length(examples, VALUES_AT_ONCE // sum(p.numel() for p in named.values()))
    values = {f"model.{name}": p.detach() for name, p in named.items()}
    total = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in named.items()}
    measured = _Measured(model, signal)
    gradients_of = vmap(grad(lambda values, sample: functional_call(measured, values, (sample,))), in_dims=(None, 0))
    try:
        # the fused attention kernels have no batching rule
        with _differentiable(model), sdpa_kernel(SDPBackend.MATH):
            for items in session.progress(chunks, what, len(chunks)):
                samples = {k: torch.stack([item[k] for item in items]).to(device) for k in items[0] if k in _READ}
                for name, gradient in gradients_of(values, samples).items():
                    _add(total[name.removeprefix("model.")], gradient, signal, len(examples))
    except RuntimeError:  # control flow that depends on data, or an operator that cannot be batched
        chunks = []
    if not chunks:
        total.clear()
        return batch_importance(model, examples, 1, signal, what), "one by one"
    return _checked(total, what), "vmap"


_READ = ("input_ids", "pixel_values", "labels")


class _Measured(nn.Module):
    """The value to differentiate, as a module under which `functional_call` can exchange the weights."""

    def __init__(self, model: nn.Module, signal: Signal) -> None:
        super().__init__()
        self.model = model
        self.signal: Signal = signal

    def forward(self, sample: Mapping[str, Tensor]) -> Tensor:
        batch = {name: value[None] for name, value in sample.items()}
        return mean_signal(forward(self.model, batch), batch, self.signal)


def _of_one_length(examples: Examples, size: int) -> list[list[Encoded]]:
    """Chunks of at most `size` examples without padding; none where not even two fit."""
    if size < 2:
        return []

    def shape(place: int) -> list[tuple[str, tuple[int, ...]]]:
        return [(name, tuple(value.shape)) for name, value in sorted(examples.items[place].items())]

    chunks: list[list[Encoded]] = []
    for _, places in groupby(sorted(range(len(examples)), key=shape), key=shape):
        group = [examples.items[i] for i in places]
        chunks += [group[i : i + size] for i in range(0, len(group), size)]
    return chunks


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not named:
        raise RequestError(
            "Every parameter of the model is frozen (requires_grad is False), so none has an importance."
        )
    return named


@contextmanager
def _differentiable(model: nn.Module) -> Iterator[None]:
    """Eval mode (frozen norm statistics, no dropout) with gradients; the modes are put back afterwards."""
    with at_rest(model), torch.enable_grad():
        yield


def _add(total: Tensor, gradients: Tensor, signal: Signal, count: int) -> None:
    """Add the mean over `count` of the squares (or sizes) of some [s, ...] gradients."""
    gradients = gradients.detach().float()
    if len(gradients) == 1 and signal == "loss":
        total.addcmul_(gradients[0], gradients[0], value=1.0 / count)
    else:
        sizes = gradients.square() if signal == "loss" else gradients.abs()
        total.add_(sizes.sum(dim=0), alpha=1.0 / count)


def _checked(total: PerParameter, what: str) -> PerParameter:
    for name, values in total.items():
        if not torch.isfinite(values).all():
            raise RunError(
                f"The {what} is not finite at {name!r}: its gradients overflow. Open the model in float32 (or bfloat16)."
            )
    return total


def ratios(forget: PerParameter, full: PerParameter) -> PerParameter:
    """Importance on forget over importance on full, in the memory of the first; `full` is emptied on the way.

    Where both are 0 the ratio is NaN, which no threshold selects.
    """
    for name in list(forget):
        forget[name].div_(full.pop(name))
    return forget


def adaptive_alpha(ratio: PerParameter, forget_share: float) -> float:
    """The threshold of ASSD (arXiv:2402.10098): a high percentile of all finite ratios, pooled over parameters.

    Args:
        ratio: from `ratios`.
        forget_share: |forget| / |full|, from 0 to 1; about log(1 + 100 * share) percent of the weights lie above.
    """
    finite = np.empty(sum(int(values.isfinite().sum()) for values in ratio.values()), dtype=np.float32)
    if not len(finite):
        return math.inf
    start = 0
    for values in ratio.values():
        kept = values[values.isfinite()].cpu().numpy()
        finite[start : start + len(kept)] = kept
        start += len(kept)
    return float(np.percentile(finite, 100.0 - math.log1p(100.0 * forget_share), overwrite_input=True))


@dataclass
class Dampened:
    """What `dampen` did: weights selected for each parameter, how many of them changed, and their mean factor."""

    selected: dict[str, int]
    changed: int = 0
    mean_factor: float = 1.0


@torch.no_grad()
def dampen(model: nn.Module, ratio: PerParameter, alpha: float, lam: float) -> Dampened:
    """Multiply every weight whose ratio is above alpha by min(lam / ratio, 1), in place.

    Args:
        model: the model that `ratio` was computed on.
        ratio: importance on forget over importance on full, one tensor for each trainable parameter.
        alpha: the threshold, exceeded strictly.
        lam: the dampening constant; 0 prunes what is selected.
    """
    done = Dampened({})
    factors = 0.0
    for name, values in ratio.items():
        weights = model.get_parameter(name)
        chosen = values > alpha
        factor = torch.where(chosen, (lam / values).clamp(max=1.0), 1.0)
        new = (weights.float() * factor).to(weights.dtype)
        done.selected[name] = int(chosen.sum())
        done.changed += int((new != weights).sum())
        factors += float(factor[chosen].sum(dtype=torch.float64))
        weights.copy_(new)
    if total := sum(done.selected.values()):
        done.mean_factor = factors / total
    return done
