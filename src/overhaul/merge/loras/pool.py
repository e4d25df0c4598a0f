"""The adapters of a pool: whether they belong to the model and are products, told without weights; and reading them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from overhaul.adapter_folders import LowRank, low_rank_scales, read_low_rank
from overhaul.checkpoints import ADAPTER_CONFIG
from overhaul.errors import RequestError
from overhaul.merge.loras.layers import Adapter, changed_by
from overhaul.models import Checkpoint, planned
from overhaul.weights import TensorIndex, mapped
from overhaul.weights.depths import built_names

OTHER = 0.01
"""Relative distance from which a base's weights are others, and not the same in another dtype."""


def check_pool(adapters: Sequence[Checkpoint], model: nn.Module) -> list[dict[str, float]]:
    """The scale of every layer of every adapter.

    Raises:
        RequestError: there is none, one is there twice, was made for another model, or is more than products.
    """
    if not adapters:
        raise RequestError(
            "merge.loras: there are no adapters. Give folders with LoRAs: adapters: [{model: FOLDER}, ...]."
        )
    folders = [one.folder.resolve() for one in adapters]
    for n, one in enumerate(adapters):
        if folders[n] in folders[:n]:
            raise RequestError(f"merge.loras: the adapter {one.source} is given twice. Name each once.")
    seen: set[Path] = set()
    for one in adapters:
        if one.base is not None and one.base.folder not in seen:
            _check_base(one, one.base, model)
            seen.add(one.base.folder)
    return [low_rank_scales(one, model) for one in adapters]


def _check_base(one: Checkpoint, base: Checkpoint, model: nn.Module) -> None:
    """Refuse an adapter whose base has other tensors than the model."""
    if base.is_adapter:
        raise RequestError(
            f"merge.loras: {one.source} is an adapter for {base.source}, an adapter itself. Open that, save it as the model "
            "that it makes, and name that one as the base."
        )
    network = planned(base)
    own = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    theirs = own if network is None else {name: tuple(value.shape) for name, value in network.state_dict().items()}
    wrong = next((name for name in sorted({**own, **theirs}) if own.get(name) != theirs.get(name)), None)
    if wrong is not None:
        raise RequestError(
            f"merge.loras: {one.source} was made for {base.source}, which is another model: its {wrong} is "
            f"{theirs.get(wrong, 'not there')}, here it is {own.get(wrong, 'not there')}. Leave it out, or take its base."
        )


def read_pool(
    adapters: Sequence[Checkpoint], scales: Sequence[Mapping[str, float]], device: Any
) -> list[dict[str, LowRank]]:
    """The adapters' products.

    Raises:
        RequestError: two are the same, or one changes nothing.
    """
    pool: list[dict[str, LowRank]] = []
    for n, (known, its) in enumerate(zip(adapters, scales, strict=True)):
        read = read_low_rank(known, its)
        if not any(its.values()):
            raise RequestError(
                f"merge.loras: the adapter {known.source} changes nothing: `lora_alpha` in its {ADAPTER_CONFIG} is 0. "
                "Correct it, or leave the adapter out."
            )
        if not any(bool(one.b.any()) and bool(one.a.any()) and bool(one.scale.any()) for one in read.values()):
            raise RequestError(
                f"merge.loras: the adapter {known.source} changes nothing: it was not trained. Leave it out."
            )
        for m, other in enumerate(pool):
            if _same(read, other):
                raise RequestError(
                    f"merge.loras: the adapters {adapters[m].source} and {known.source} have the same weights, and together "
                    f"would count twice. Leave one of them out (number {n + 1})."
                )
        pool.append(read)
    return [
        {name: LowRank(*(each.to(device) for each in (p.a, p.b, p.scale))) for name, p in one.items()} for one in pool
    ]


def _same(one: Adapter, other: Adapter) -> bool:
    return one.keys() == other.keys() and all(
        part.a.equal(other[name].a) and part.b.equal(other[name].b) and part.scale.equal(other[name].scale)
        for name, part in one.items()
    )


def other_base(adapters: Sequence[Checkpoint], pool: Sequence[Adapter], model: nn.Module) -> dict[str, str]:
    """What should be said where the weights that an adapter was trained on are not the model's."""
    far: list[str] = []
    for known, adapter in zip(adapters, pool, strict=True):
        if known.base is None or known.base.is_new:
            continue
        index = TensorIndex.of(known.base).tensors
        names = {built: name for name, built in built_names(model, index).items()}
        apart, length = 0.0, 0.0
        for layer in changed_by([adapter]):
            stored = index.get(names.get(f"{layer}.weight", ""))
            own = model.get_parameter(f"{layer}.weight").detach()
            if stored is not None and stored.dtype.is_floating_point and stored.shape == tuple(own.shape):
                theirs = mapped(stored).to(own)
                apart += float((theirs - own).double().square().sum())
                length += float(theirs.double().square().sum())
        if apart > OTHER**2 * length:
            far.append(f"{known.source} ({(apart / length) ** 0.5:.2g} from {known.base.source})")
    if not far:
        return {}
    return {
        "advice": f"The model's weights are not those that {', '.join(far)} was trained on. An adapter fits its own base: "
        "start from that, or hold the scores against the base's with care."
    }
