"""Checkpoints as vectors: blend, add, scale, restore and compare models with the memory of a few pieces of a tensor.

Everything rests on `stream`: a pure function of the same tensor in several models, applied from files to a new folder.

1. Depth is known for every tensor (`TensorFacts.depth`), so a ramp over depth, a coefficient per block and a merge of some
   blocks are ordinary coefficients and not operations of their own.
2. Arithmetic is in float32 whatever the files hold (in float64 where they hold that), and rounded once at the end. In
   bfloat16 a small update would be rounded away before it is added.
3. What cannot be merged is refused before a weight is read. Nothing is cut to fit, and coefficients are never normalised.
4. Integers and booleans are copied from the first model and have to agree, except the counters of batch norms.
5. Tied tensors are stored once, and so they are counted once.
6. Tensors correspond by what the class loads them into, whatever a file calls them. Tokenizers that number words differently
   are refused where embeddings are combined; what configs say differently is a warning (`agreement`).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from overhaul.errors import RequestError, RunError
from overhaul.weights.agreement import aligned, check_words, differences
from overhaul.weights.card import describe
from overhaul.weights.index import Source, TensorFacts, TensorIndex, check_alike
from overhaul.weights.output import Combine, Storage, agreed, checked, write_new
from overhaul.weights.pieces import Whole
from overhaul.weights.vocabularies import Reworded

Coefficient = float | Callable[[TensorFacts], float]
"""A number, or a function of the tensor: `lambda t: t.share`, which is 0 for embeddings and 1 after the last block."""
Chosen = Collection[int] | Callable[[TensorFacts], bool]
"""Depths, or a function of the tensor."""

# combining functions, for files and for live models alike


def weighted_sum(coefficients: Sequence[Coefficient]) -> Combine:
    """sum_i c_i m_i; a model whose coefficient is 0 has no part in it.

    Args:
        coefficients: one for each model. They are used as they are: a mean needs them to sum to 1.

    Raises:
        RequestError: there is no coefficient, or one is not finite.
    """
    _check_numbers(coefficients)

    def combine(tensor: TensorFacts, models: list[Tensor]) -> Tensor:
        terms = _terms(coefficients, tensor, models)
        if not terms:
            return torch.zeros_like(models[0])
        (factor, first), *rest = terms
        total = first * factor
        for factor, model in rest:
            total.add_(model, alpha=factor)
        return total

    return combine


def weighted_deltas(coefficients: Sequence[Coefficient]) -> Combine:
    """m_0 + sum_i c_i (m_i - m_0): exactly m_0 where all coefficients are 0, exactly m_i for a single 1.

    Args:
        coefficients: one for each model after the first.

    Raises:
        RequestError: there is no coefficient, or one is not finite.
    """
    _check_numbers(coefficients)

    def combine(tensor: TensorFacts, models: list[Tensor]) -> Tensor:
        base, *tuned = models
        total = base
        for number, (factor, model) in enumerate(_terms(coefficients, tensor, tuned)):
            if number == 0:
                # lerp is exact where both agree, so weights that were not trained stay as they are
                total = model if factor == 1 else torch.lerp(base, model, factor)
            else:
                total = torch.add(total, model - base, alpha=factor)
        return total

    return combine


def _first(_: TensorFacts, models: list[Tensor]) -> Tensor:
    return models[0]


def _check_numbers(coefficients: Sequence[Coefficient]) -> None:
    if not coefficients:
        raise RequestError("There is no coefficient. Give one for each model.")
    bad = [c for c in coefficients if not callable(c) and not math.isfinite(c)]
    if bad:
        raise RequestError(f"The coefficient {bad[0]} is not a finite number.")


def _terms(
    coefficients: Sequence[Coefficient], tensor: TensorFacts, models: list[Tensor]
) -> list[tuple[float, Tensor]]:
    """The coefficients that are not 0 with their models."""
    terms: list[tuple[float, Tensor]] = []
    for coefficient, model in zip(coefficients, models, strict=True):
        value = float(coefficient(tensor)) if callable(coefficient) else coefficient
        if not math.isfinite(value):
            raise RunError(
                f"The coefficient of {tensor.name} (depth {tensor.depth}) is {value}; make it a finite number."
            )
        if value:
            terms.append((value, model))
    return terms


# from files to files


def stream(
    sources: Sequence[Source],
    combine: Combine,
    out: str | Path,
    *,
    only: Chosen | None = None,
    whole: Whole = False,
    told: Mapping[str, Any] | None = None,
    **storage: Unpack[Storage],
) -> Path:
    """Apply `combine` to every floating-point tensor and write a new checkpoint, with the first one's config and tokenizer.

    Args:
        sources: checkpoints with the same tensors; the first gives everything that is not combined.
        combine: what to do with the same tensor of all models; it is called in several threads.
        out: folder to write; must not exist.
        only: the tensors to combine; the others are the first model's, and the other models need not have them.
        whole: give `combine` whole tensors, as a singular value decomposition needs, one at a time. Memory is then that
            of the largest tensor. "rows" gives whole rows [rows, numbers in a row]: the last dimension, or what a kernel
            of a convolution has.
        told: what lineage.json and the model card say of the making: the "name" of what combines, and what it was given.
        **storage: see `Storage`.

    Returns:
        The folder.

    Raises:
        RequestError: the checkpoints do not correspond, a folder is damaged, or `out` exists or cannot hold the result.
        RunError: a number is not finite, integers differ, or the disk is full. Nothing is left behind.
    """
    indexes = aligned(sources)
    chosen = _chooser(only, indexes[0])
    _check(indexes, sources, chosen, storage)
    inputs = {
        name: [index.tensors[name] for index in indexes] if chosen(tensor) else [tensor]
        for name, tensor in indexes[0].tensors.items()
    }

    def combine_chosen(tensor: TensorFacts, models: list[Tensor]) -> Tensor:
        return combine(tensor, models) if chosen(tensor) else models[0]

    described = partial(_described, sources, {"name": "weights.stream", "only": only, **(told or {})})
    return write_new(indexes[0], inputs, combine_chosen, Path(out), whole, storage, described)


def _described(sources: Sequence[Source], told: Mapping[str, Any], folder: Path) -> None:
    if isinstance(sources[0], Reworded):
        sources[0].write_words(folder)
    describe(folder, sources, told["name"], {key: value for key, value in told.items() if key != "name"})


def blend(
    sources: Sequence[Source],
    coefficients: Sequence[Coefficient],
    out: str | Path,
    *,
    only: Chosen | None = None,
    **storage: Unpack[Storage],
) -> Path:
    """sum_i c_i m_i, for example a soup of fine-tuned models. For the arguments and errors see `stream`.

    Args:
        sources: the models.
        coefficients: one for each; see `weighted_sum`.
        out: folder to write.
        only: the tensors to blend.
        **storage: see `Storage`.
    """
    _check_count(coefficients, sources, "models")
    told = {"name": "weights.blend", "coefficients": coefficients}
    return stream(sources, weighted_sum(coefficients), out, only=only, told=told, **storage)


def add_deltas(
    base: Source,
    tuned: Sequence[Source],
    coefficients: Sequence[Coefficient],
    out: str | Path,
    *,
    only: Chosen | None = None,
    **storage: Unpack[Storage],
) -> Path:
    """The base plus sum_i c_i (m_i - base): task arithmetic (arXiv:2212.04089). For arguments and errors see `stream`.

    Args:
        base: the model from which all were tuned.
        tuned: the models.
        coefficients: one for each tuned model; see `weighted_deltas`.
        out: folder to write.
        only: the tensors to change.
        **storage: see `Storage`.
    """
    _check_count(coefficients, tuned, "tuned models")
    told = {"name": "weights.add_deltas", "coefficients": coefficients}
    return stream([base, *tuned], weighted_deltas(coefficients), out, only=only, told=told, **storage)


def scale_by_depth(
    base: Source, tuned: Source, coefficient: Coefficient, out: str | Path, **storage: Unpack[Storage]
) -> Path:
    """The base plus c(depth) (tuned - base): LiNeS (arXiv:2410.17146) where c grows linearly. For errors see `stream`.

    Args:
        base: the model as it was.
        tuned: the model after training.
        coefficient: 1 leaves the tuned tensor exactly, 0 the base's. As a function of depth, `lambda t: t.share` is a ramp
            from 0 at embeddings and first block to 1 after the last; `t.depth` itself is -1 for embeddings.
        out: folder to write.
        **storage: see `Storage`.
    """
    return add_deltas(base, [tuned], [coefficient], out, **storage)


def restore(tuned: Source, base: Source, chosen: Chosen, out: str | Path, **storage: Unpack[Storage]) -> Path:
    """The tuned model with the chosen tensors of the base, bit for bit, integers and counters included.

    Args:
        tuned: gives all other tensors, config and tokenizer.
        base: needs to match in the chosen tensors alone, so that the vocabularies may differ.
        chosen: depths to take back, or a function of the tensor.
        out: folder to write.
        **storage: see `Storage`.

    Raises:
        RequestError: as in `stream`.
        RunError: as in `stream`.
    """
    indexes = aligned([tuned, base])
    wanted = _chooser(chosen, indexes[0])
    _check(indexes, [tuned, base], wanted, storage)
    inputs = {name: [indexes[wanted(tensor)].tensors[name]] for name, tensor in indexes[0].tensors.items()}
    described = partial(_described, [tuned, base], {"name": "weights.restore", "chosen": chosen})
    return write_new(indexes[0], inputs, _first, Path(out), False, storage, described)


def corresponding(sources: Sequence[Source]) -> list[TensorIndex]:
    """The index of each checkpoint, with the names that the first one uses, if all their tensors correspond.

    Raises:
        RequestError: as in `stream`.
    """
    indexes = aligned(sources)
    _check(indexes, sources, lambda _: True, {})
    return indexes


def _check(
    indexes: Sequence[TensorIndex], sources: Sequence[Source], chosen: Callable[[TensorFacts], bool], storage: Storage
) -> None:
    """Refuse checkpoints that do not correspond, and say in what else they differ."""
    check_alike(indexes, chosen)
    if not storage.get("any_words"):
        check_words(indexes, [tensor for tensor in indexes[0].tensors.values() if chosen(tensor)])
    if said := differences(sources):
        warnings.warn(f"The configs differ, and the result follows the first: {'; '.join(said)}.", stacklevel=3)


def _check_count(coefficients: Sequence[Coefficient], sources: Sequence[Source], what: str) -> None:
    if len(coefficients) != len(sources):
        raise RequestError(f"There are {len(sources)} {what} and {len(coefficients)} coefficients. Give one for each.")


def _chooser(chosen: Chosen | None, index: TensorIndex) -> Callable[[TensorFacts], bool]:
    """A choice as a function, after checking that it chooses something."""
    if chosen is None:
        return lambda _: True
    if callable(chosen):
        if not any(chosen(tensor) for tensor in index.tensors.values()):
            raise RequestError(f"The function chooses none of the {len(index.tensors)} tensors of {index.source}.")
        return chosen
    if len(index.stacks) != 1:
        listed = ", ".join(f"{path} ({blocks} blocks)" for path, blocks in index.stacks.items()) or "none"
        raise RequestError(
            f"{index.source} has no single stack that depths could be counted in: {listed}. Give a function of the "
            'tensor, such as `lambda t: t.stack == "encoder.block" and t.depth in {0, 1}`.'
        )
    depths = {tensor.depth for tensor in index.tensors.values()}
    unknown = sorted(set(chosen) - depths)
    if unknown or not chosen:
        raise RequestError(
            f"{index.source} has tensors at the depths {min(depths)} to {max(depths)} (-1 is before the first block, "
            f"{max(index.stacks.values())} after the last); none are at {unknown or 'no depth at all'}."
        )
    return lambda tensor: tensor.depth in chosen


# live models


def combined(models: Sequence[nn.Module], combine: Combine) -> dict[str, Tensor]:
    """The same functions on live models: a state dict for the first one's `load_state_dict`, in its dtypes.

    Args:
        models: of one architecture; none is changed.
        combine: is given whole tensors.

    Raises:
        RequestError: names or shapes differ.
        RunError: the result is not finite, or integers differ.
    """
    indexes = [TensorIndex.of(model) for model in models]
    check_alike(indexes, lambda _: True)
    states = [model.state_dict(keep_vars=True) for model in models]
    made: dict[int, Tensor] = {}  # by identity: tied tensors are one, at the depth of its first name
    result: dict[str, Tensor] = {}
    for name, tensor in indexes[0].tensors.items():
        values = [state[name].detach() for state in states]
        key = id(states[0][name])
        if key not in made and tensor.dtype.is_floating_point:
            wide = torch.promote_types(tensor.dtype, torch.float32)
            made[key] = checked(combine, tensor, [v.to(wide) for v in values], tensor.dtype).to(tensor.dtype)
        elif key not in made:
            made[key] = agreed([index.tensors[name] for index in indexes], values)
        result[name] = made[key]
    return result
