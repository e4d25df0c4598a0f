"""Layer map: which layer of one model linearly predicts which layer of another.

"Do Language Models Use Their Depth Efficiently?", Csordas, Manning and Potts, NeurIPS 2025, arXiv:2505.13898, section 5.

    f_ml = argmin_f  sum |H_l - f(h_m)|^2        error[m, l] = mean over other tokens of |H_l - f_ml(h_m)| / |H_l|

h_m are the states after m blocks of the one model, H_l those after l blocks of the other. If the deeper model computed
something new with its additional blocks, its last layers could not be read from the shallower one; the paper finds that the
best m lies on the diagonal m / M = l / L: it spreads the same computation over more blocks.

How it differs from the released code:

1. f_ml (with a bias) is the least squares solution, from sums of products in float64, instead of 10,000 steps of AdamW on
   the squared error. One factorisation serves all layers of the other model.
2. The blocks' outputs are compared, the stream after l blocks; the released option `diff_only`, what single blocks add, is
   left out.
3. The other model is opened beside the first and both read the same batches; no states are kept. Where the sums of all
   pairs do not fit into `budget`, the text is read again for the next layers.
4. The map to a constant, the mean state, stands beside the best one: an error means something only where it is far below.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Gt, Lt
from jaxtyping import Float
from torch import Tensor, nn

from overhaul import session
from overhaul.architectures import planned
from overhaul.data.examples import Batch, Examples, collate
from overhaul.errors import RequestError, RunError
from overhaul.method import Outcome, Table, method
from overhaul.models import Checkpoint, load_processor
from overhaul.modes import at_rest
from overhaul.stack import LayerStack
from overhaul.stack.calls import Calls, map_tensors
from overhaul.trace.flow import states, stream
from overhaul.trace.reductions import wide

SMALLEST = 1e-6
"""Norms that an error is divided by are at least this large."""


@method(verb="inspect", paper="2505.13898", changes="nothing", memory="forward", headless=lambda knobs: True)
def layer_map(
    model: nn.Module,
    other: Checkpoint,
    text: Examples,
    *,
    held_out: Annotated[float, Gt(0), Lt(1)] = 0.2,
    skip_first: Annotated[int, Ge(0)] = 1,
    ridge: Annotated[float, Gt(0)] = 1e-8,
    batch_size: Annotated[int, Ge(1)] = 8,
    budget: Annotated[int, Ge(1)] = 2**31,
) -> Outcome:
    """Fit linear maps from every layer of a model to every layer of another, and say how well they predict.

    Args:
        model: the model that is mapped from, the shallower of the two. It stays as it is.
        other: the model that is mapped to, of any width and depth, with the same tokenizer.
        text: what both read; maps need more tokens than the model is wide, several times more to generalise.
        held_out: the share of the examples, the last ones, that errors are measured on and no map is fitted to.
        skip_first: positions at the start of each example that do not count.
        ridge: added to the squares of the states, relative to their mean: it decides only where the text does not.
        batch_size: examples in one forward; does not change the values.
        budget: most bytes of sums that are held at once; less means reading the text more often.

    Returns:
        No model. Table: the mean relative error of each pair of layers. Layers, by layer of the other model (-1 enters its
        first block): the smallest error, that of its mean state, and the relative depth of the best layer of the model.
        Facts: the mean distance of that depth from the other's own, 0 to 1, and of a best layer that is always the same.

    Raises:
        RequestError: another tokenizer, fewer tokens than the model is wide, images, or models whose blocks come in stages
            or cannot be run by hand.
        RunError: a state is not finite.
    """
    stack, batches = LayerStack.of(model), _Batches(text, held_out, skip_first, batch_size, model)
    _check_tokenizer(text, other)
    _check_stack(stack)
    with at_rest(model):
        width = _check_tokens(stack, batches)
    if (built := planned(other)) is not None:
        _check_stack(LayerStack.of(built))
    device = next(model.parameters()).device
    opened = other.open().to(device)
    theirs = LayerStack.of(opened)
    with torch.no_grad(), at_rest(model), at_rest(opened):
        error, constant = _errors(stack, theirs, batches, ridge, budget, width)
    best = error.argmin(dim=0).tolist()
    own, their = len(stack), len(theirs)
    depths = [place / own for place in best]
    diagonal = [layer / their for layer in range(their + 1)]
    apart = [abs(depth - goal) for depth, goal in zip(depths, diagonal, strict=True)]
    middle = [abs(statistics.median(depths) - goal) for goal in diagonal]
    return Outcome(
        None,
        facts={
            "distance_from_the_diagonal": statistics.fmean(apart),
            "distance_of_one_layer": statistics.fmean(middle),
            "tokens_fitted": batches.fitted,
        },
        layers={
            "error of the best map": dict(enumerate(error.amin(dim=0).tolist(), -1)),
            "error of the mean state": dict(enumerate(constant.tolist(), -1)),
            "relative depth of the best layer": dict(enumerate(depths, -1)),
        },
        tables={
            "error of the map between layers": Table.grid(
                error,
                range(-1, own),
                range(-1, their),
                along="from after block",
                across="to after block of the other model",
                unit="relative error",
            )
        },
    )


@dataclass
class _Sums:
    """Sums over tokens of products of [h, 1], [d + 1, d + 1], and of [h, 1] with all layers of the other, [d + 1, L, e]."""

    own: Tensor
    crossed: Tensor

    def solved(self, ridge: float) -> Float[Tensor, "d L e"]:
        """The maps, the bias last. A feature that is constant is left to the bias."""
        width = len(self.own) - 1
        count = self.own[-1, -1]
        means = self.own[-1, :-1] / count
        spread = self.own[:-1, :-1] - count * torch.outer(means, means)
        spread.diagonal().add_(ridge * spread.diagonal().mean() + torch.finfo(spread.dtype).tiny)
        target = self.crossed[-1] / count
        covariance = self.crossed[:-1] - count * means[:, None, None] * target
        slopes = torch.cholesky_solve(covariance.flatten(1), torch.linalg.cholesky(spread)).view(width, *target.shape)
        bias = target - torch.einsum("d,dle->le", means, slopes)
        return torch.cat([slopes, bias[None]])


class _Batches:
    """The text, the part that maps are fitted to and the part that they are judged on."""

    def __init__(self, text: Examples, held_out: float, skip_first: int, size: int, model: nn.Module) -> None:
        if text.kind != "tokens":
            raise RequestError(f"inspect.layer_map reads text, and the role `text` holds {text.kind}.")
        kept = max(1, round(len(text) * held_out))
        if len(text) < 2 or kept >= len(text):
            raise RequestError(
                "inspect.layer_map: give at least two texts, so that some are fitted to and some held out."
            )
        self.parts = {"fitted": text[: len(text) - kept], "held out": text[len(text) - kept :]}
        self.skip_first, self.size = skip_first, size
        self.device = next(model.parameters()).device
        counts = {
            name: sum(max(0, len(item["input_ids"]) - skip_first) for item in part) for name, part in self.parts.items()
        }
        self.fitted = counts["fitted"]
        if not counts["held out"]:
            raise RequestError(f"inspect.layer_map: no text that is held out is longer than {skip_first} tokens.")

    def one(self) -> Batch:
        """One text that is held out, on the device."""
        return map_tensors(collate(self.parts["held out"].items[:1]), lambda value: value.to(self.device))

    def of(self, part: str) -> Iterator[tuple[Batch, Tensor]]:
        """Batches on the device, each with the positions that count."""
        chosen = self.parts[part]
        steps = -(-len(chosen) // self.size)
        for batch in session.progress(chosen.batches(self.size), f"states, {part}", steps):
            batch = map_tensors(batch, lambda value: value.to(self.device))
            mask = batch["attention_mask"].bool()
            yield batch, mask & (mask.cumsum(1) > self.skip_first)


def _errors(
    stack: LayerStack, theirs: LayerStack, batches: _Batches, ridge: float, budget: int, width: int
) -> tuple[Float[Tensor, "m l"], Float[Tensor, " l"]]:
    """The mean relative error of each pair, and that of the mean state."""
    errors: list[Tensor] = []
    constant = torch.empty(0)
    for places in _rounds(stack, theirs, batches, budget, width):
        sums: dict[int, _Sums] = {}
        for own, other in _pairs(stack, theirs, batches.of("fitted"), places):
            for place, state in own.items():
                _add(sums, place, state, other)
        maps = {place: sums[place].solved(ridge) for place in places}
        means = sums[places[0]].crossed[-1] / sums[places[0]].own[-1, -1]
        total, shifted, count = torch.zeros(len(places), len(theirs) + 1, dtype=torch.float64), torch.zeros(()), 0
        for own, other in _pairs(stack, theirs, batches.of("held out"), places):
            size = other.norm(dim=-1).clamp_min(SMALLEST)
            for n, place in enumerate(places):
                told = torch.einsum("nd,dle->nle", own[place], maps[place])
                total[n] += ((other - told).norm(dim=-1) / size).sum(dim=0).cpu()
            shifted = shifted + ((other - means).norm(dim=-1) / size).sum(dim=0).cpu()
            count += len(other)
        errors.append(total / count)
        constant = shifted / count
    return torch.cat(errors), constant


def _check_stack(stack: LayerStack) -> None:
    """Refuse blocks that do not share one stream."""
    if len(stack.lists) > 1:
        raise RequestError(f"inspect.layer_map: the blocks of {type(stack.model).__name__} come in stages.")


def _check_tokens(stack: LayerStack, batches: _Batches) -> int:
    """How wide the model is; refused where there are too few tokens to fit a map from so many features."""
    width = _width(stack, batches)
    if batches.fitted <= width:
        raise RequestError(
            f"inspect.layer_map: {batches.fitted} tokens to fit to, but {type(stack.model).__name__} is {width} wide: a map "
            "from so few tokens fits anything. Give several times as many."
        )
    return width


def _width(stack: LayerStack, batches: _Batches) -> int:
    """Features of the state that enters the first block."""
    calls = Calls.record(stack, batches.one())
    return stream(calls, calls.entering).shape[-1]


def _rounds(stack: LayerStack, theirs: LayerStack, batches: _Batches, budget: int, width: int) -> list[list[int]]:
    """Layers of the model whose sums fit into the budget together."""
    other = _width(theirs, batches)
    # the sums, and the maps that are made of them
    each = 8 * (width + 1) * (2 * other * (len(theirs) + 1) + width + 1)
    together = max(1, budget // each)
    layers = list(range(len(stack) + 1))
    return [layers[start : start + together] for start in range(0, len(layers), together)]


def _pairs(
    stack: LayerStack, theirs: LayerStack, batches: Iterable[tuple[Batch, Tensor]], places: Sequence[int]
) -> Iterator[tuple[dict[int, Float[Tensor, "n d"]], Float[Tensor, "n l e"]]]:
    """The states of both models where positions count: [h, 1] of the chosen layers, and all layers of the other."""
    for batch, mask in batches:
        if bool(mask.any()):
            calls, others = Calls.record(stack, batch), Calls.record(theirs, batch)
            own = {
                layer: torch.nn.functional.pad(_counting(stream(calls, state), mask), (0, 1), value=1.0)
                for layer, state in enumerate(states(calls))
                if layer in places
            }
            yield own, torch.stack([_counting(stream(others, state), mask) for state in states(others)], dim=1)


def _counting(state: Tensor, mask: Tensor) -> Float[Tensor, "n d"]:
    rows = wide(state[mask])
    if not bool(rows.isfinite().all()):
        raise RunError("inspect.layer_map: a state is not finite (NaN or infinite), so it cannot be mapped.")
    return rows


def _add(sums: dict[int, _Sums], place: int, own: Tensor, other: Tensor) -> None:
    products, crossed = own.T @ own, (own.T @ other.flatten(1)).view(own.shape[1], *other.shape[1:])
    if place in sums:
        sums[place].own += products
        sums[place].crossed += crossed
    else:
        sums[place] = _Sums(products, crossed)


def _check_tokenizer(text: Examples, other: Checkpoint) -> None:
    """Refuse a model that would read other words.

    Raises:
        RequestError: its tokenizer has another vocabulary.
    """
    theirs, own = load_processor(other), text.processor
    if theirs is None or own is None:
        return
    if own.get_vocab() != theirs.get_vocab():
        raise RequestError(
            f"inspect.layer_map: {other.source} has another tokenizer than the text was encoded with, so its states belong "
            "to other words. Choose two models of one family."
        )
