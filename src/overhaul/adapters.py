"""Low-rank adapters in the blocks of a model for as long as it trains, merged into its weights at the end.

peft does the work. How it differs from peft's "all-linear": only projections inside the blocks are adapted, found by
structure, so embeddings, heads and classifiers stay as they are in every family. Over a base below float32 they are float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from overhaul.errors import RequestError
from overhaul.selectors import select


@contextmanager
def adapters(
    model: nn.Module, rank: int, alpha: int, dropout: float, names: list[str] | None = None
) -> Iterator[nn.Module]:
    """Inside the `with`, only adapters on the blocks' projections train; afterwards they are part of the weights.

    Args:
        model: changed in place; it is the same plain object of its class when the `with` ends, also by an error.
        rank: of the adapters, which add (alpha / rank) * B @ A to a weight.
        alpha: their scale.
        dropout: of their input.
        names: of the projections to adapt; all of the blocks if None.

    Raises:
        RequestError: the blocks hold no linear projection (a ResNet).
    """
    from peft import LoraConfig, LoraModel

    names = projections(model) if names is None else names
    kinds = {type(model.get_submodule(name)).__name__ for name in names}
    transposed = kinds == {"Conv1D"}
    options = LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=names, fan_in_fan_out=transposed
    )
    needed = {name: p.requires_grad for name, p in model.named_parameters()}
    wrapped = LoraModel(model, options, "default")
    wrapped._cast_adapter_dtype("default")  # float32 over a base of less, as in every other way to make one with peft
    try:
        yield wrapped
    finally:
        wrapped.merge_and_unload()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(needed[name])


def projections(model: nn.Module) -> list[str]:
    """The names of all linear layers inside the main stack's blocks (`nn.Linear`, and GPT-2's transposed `Conv1D`)."""
    try:
        return select(model, "projections").modules
    except RequestError as error:
        raise RequestError(
            f'{error} There are no linear projections for LoRA to adapt. Write weights: "all".'
        ) from None
