"""The last layer of a classifier: which it is, and what enters it.

It is the linear layer that runs last and makes as many numbers as the model has logits, found by running the model and never
by name: ViT's `classifier`, the linear part of ResNet's, `out_proj` of RoBERTa's, `score` of decoders that classify.

Features are what the model returns while the layer hands on what enters it, so that whatever picks a position or drops the
padding behind the layer (decoders' `score` runs at every token) does so for features as well. That logits are these features
times the weight, plus the bias, is tried before anything is built on it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from overhaul.data.examples import Examples, collate
from overhaul.errors import RequestError
from overhaul.finite import check_said
from overhaul.forward import forward
from overhaul.modes import at_rest
from overhaul.objectives import check_positions, one_class
from overhaul.references import COLUMN, cache_outputs
from overhaul.trace.readers import linears

TRIED = 4
"""Examples on which a layer is tried."""


@dataclass(frozen=True)
class Head:
    """The last layer of a classifier.

    Attributes:
        model: the classifier.
        name: of the layer in it.
        layer: `nn.Linear`, or GPT-2's `Conv1D`.
    """

    model: nn.Module
    name: str
    layer: nn.Module

    @property
    def weight(self) -> Float[Tensor, "classes d"]:
        """The weight with a row for each class: a view, also of `Conv1D`, whose weight lies the other way round."""
        own = self.layer.get_parameter("weight").detach()
        return own if isinstance(self.layer, nn.Linear) else own.T

    @property
    def bias(self) -> Float[Tensor, " classes"] | None:
        """The bias; None where the layer has none."""
        own: Any = getattr(self.layer, "bias", None)
        return None if own is None else own.detach()

    @contextmanager
    def skipped(self) -> Iterator[None]:
        """Inside, the layer hands on what enters it, so that the model returns features [b, d] in the place of logits."""
        hook = self.layer.register_forward_hook(lambda _, args, output: args[0])
        try:
            yield
        finally:
            hook.remove()

    def features(self, examples: Examples, batch_size: int = 64) -> Float[Tensor, "n d"]:
        """What enters the layer, on the CPU in the model's dtype: one pass in eval mode; n x d numbers are held."""
        with self.skipped():
            kept = cache_outputs(self.model, examples, batch_size)
        return torch.stack([item[COLUMN] for item in kept.examples.items])


@torch.no_grad()
def head_of(model: nn.Module, examples: Examples) -> Head:
    """Find the last layer of a classifier.

    Args:
        model: runs on some examples in eval mode; its mode is put back.
        examples: images or texts with a class.

    Raises:
        RequestError: the model is no classifier, its logits are not finite, its last layer is not linear, or shares its
            weight with another one.
    """
    if not examples.classified and examples.kind != "tokens":
        raise RequestError(one_class(of_data=False))
    check_positions(model, examples)
    device = next(model.parameters()).device
    batch = {name: value.to(device) for name, value in collate(examples.items[:TRIED]).items()}
    ran: list[tuple[str, nn.Module]] = []
    hooks = [
        layer.register_forward_hook(lambda layer, args, output, name=name: ran.append((name, layer)))
        for name, layer in linears(model).items()
    ]
    try:
        with at_rest(model):
            logits = forward(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    if logits.ndim != 2:
        raise RequestError(
            f"{type(model).__name__} has no last layer over classes: it gives logits for each token, so the model is no "
            "classifier. Give one of texts (AutoModelForSequenceClassification) with rows of a text and its class (as: "
            "classified), or of images."
        )
    if not examples.classified:
        raise RequestError(one_class(of_data=False))
    check_said(model, logits, "The logits")
    found = Head(model, *ran[-1]) if ran else None
    if found is not None and len(found.weight) == logits.shape[1] and _makes(found, batch, logits):
        _check_own(found)
        return found
    raise RequestError(
        f"{type(model).__name__} ends in no linear layer that makes its {logits.shape[1]} logits, so there is no last layer "
        "to refit by itself."
    )


def _makes(head: Head, batch: dict[str, Tensor], logits: Tensor) -> bool:
    """Whether logits are the layer's output for the features, and nothing behind it changes them."""
    with head.skipped(), at_rest(head.model):
        features = forward(head.model, batch)
    if features.ndim != 2 or features.shape[1] != head.weight.shape[1]:
        return False
    bias = 0 if head.bias is None else head.bias.float()
    again = features.float() @ head.weight.float().T + bias
    rounding = 16 * torch.finfo(logits.dtype).eps
    scale = float(again.abs().max())
    return bool(((again - logits.float()).abs() <= rounding * (1 + scale)).all())


def _check_own(head: Head) -> None:
    mine = {id(parameter) for parameter in head.layer.parameters()}
    every = head.model.named_parameters(remove_duplicate=False)
    others = [name for name, one in every if id(one) in mine and not name.startswith(f"{head.name}.")]
    if others and head.name:
        raise RequestError(
            f"The last layer of {type(head.model).__name__}, {head.name}, shares its weight with {others[0]}, so it cannot "
            "be changed alone."
        )
