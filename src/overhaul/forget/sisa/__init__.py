"""SISA: an ensemble trained on disjoint shards, from which an example is removed exactly by training one member again.

Bourtoule et al., "Machine Unlearning", IEEE S&P 2021, arXiv:1912.03817; for language models as in arXiv:2312.07420.

    M_s,0 = base      M_s,r = train(M_s,r-1 on D_s,1 + ... + D_s,r), 2 e / (R + 1) epochs each      members M_s,R

To forget, the touched shards alone are trained again without the examples, from the earliest touched slice on.

How it differs from the paper and the released code:

1. What is exact: the members are, bit for bit, those that training without the examples gives with the same shards and
   seeds, on a CPU or with deterministic kernels. What the base model saw before is not removed.
2. Members are low-rank adapters over one frozen base unless `weights="all"`.
3. Optimizer and learning-rate schedule begin anew with every slice (the paper keeps the optimizer's state).
4. An example is known by a digest of its row and its tensors. Equal ones are one: they share a shard and leave together.
5. Without a folder of checkpoints a touched member is trained again from the base, from its first slice.
6. `forget` given with a plain model leaves the examples out at once: the result is that of training, then forgetting.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, MutableMapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from overhaul import processes, session
from overhaul.adapters import of_adapters
from overhaul.data.examples import Examples
from overhaul.errors import RequestError, writing
from overhaul.fit import Schedule, fit
from overhaul.forget.sisa.ensemble import (
    Ensemble,
    EnsembleConfig,
    State,
    adapter_layers,
    adapter_options,
    add_adapter,
    digest,
    own_names,
)
from overhaul.forget.sisa.shards import Request, ShardMap, Sisa, epochs_per_slice
from overhaul.method import Outcome, method
from overhaul.objectives import check_learnable, cross_entropy

ID_LENGTH = 32


@method(
    verb="forget",
    paper="2312.07420",
    changes="architecture",
    memory="training",
    makes={"record": "json"},
    rank=of_adapters,
)
def sisa(
    model: nn.Module,
    full: Examples,
    forget: Examples | None = None,
    *,
    shards: Annotated[int, Ge(1)] = 5,
    slices: Annotated[int, Ge(1)] = 4,
    epochs: Annotated[float, Gt(0)] = 3.0,
    aggregate: Literal["vote", "mean"] = "vote",
    weights: Literal["lora", "all"] = "lora",
    batch_size: Annotated[int, Ge(1)] = 16,
    lr: Annotated[float, Gt(0)] = 2e-4,
    warmup: Annotated[float, Ge(0)] = 0.1,
    schedule: Schedule = "linear",
    rank: Annotated[int, Ge(1)] = 8,
    alpha: Annotated[int, Ge(1)] = 16,
    checkpoints: str | None = None,
) -> Outcome:
    """Train an ensemble that can forget exactly, or make one forget by training only the touched members again.

    Args:
        model: a classifier or language model to begin from; or an ensemble that this method made, of which only `forget`
            is carried out, with the knobs that it was trained with.
        full: all examples to learn from; for an ensemble, at least what its touched shards still hold.
        forget: examples to remove, encoded as they were in `full`; needed for an ensemble.
        shards: members, each trained on its own part of `full`.
        slices: parts of a shard, learnt one after the other with a checkpoint after each.
        epochs: passes over a shard that the training costs, however many slices there are.
        aggregate: the members' votes, or the mean of their probabilities (token by token in a language model).
        weights: "lora", an adapter for each member over the frozen base; "all", a whole copy for each.
        batch_size: examples in one step; fewer where a slice is smaller.
        lr: peak learning rate of AdamW.
        warmup: steps of linear warm-up in each slice, as a share of its steps (below 1) or as a number of steps.
        schedule: what follows the warm-up in each slice.
        rank: of the adapters.
        alpha: of the adapters; they are scaled by alpha / rank.
        checkpoints: a folder that you keep, for the state after each slice. With it, forgetting begins at the earliest
            touched slice; it holds what was learnt, so it must be kept as safe as the data.

    Returns:
        The ensemble (`overhaul.forget.sisa.ensemble.Ensemble`), with every member's loss. Facts: members, examples, samples
        visited now and by training everything again. `made["record"]` says what was trained and forgotten, request by
        request, with a digest of each member before and after (as they were held: saving may round them); the saved ensemble
        carries it, with the map of the shards.

    Raises:
        RequestError: too few examples for the slices, an example to forget was never learnt or is forgotten already,
            examples are missing, or the model cannot be a member.
        RunError: a training diverged.
    """
    knobs = {
        "shards": shards, "slices": slices, "epochs": epochs, "aggregate": aggregate, "weights": weights,
        "batch_size": batch_size, "lr": lr, "warmup": warmup, "schedule": schedule, "rank": rank, "alpha": alpha,
    }  # fmt: skip
    ids = example_ids(full)
    removed = example_ids(forget) if forget is not None else []
    if isinstance(model, Ensemble):
        return _forget(model, full, ids, removed, knobs, checkpoints)
    return _learn(model, full, ids, removed, knobs, checkpoints)


def example_ids(examples: Examples) -> list[str]:
    """A digest of each example's row and tensors: the name by which it can be forgotten."""
    return [examples.select([place]).digest()[:ID_LENGTH] for place in range(len(examples))]


def _learn(
    model: nn.Module, full: Examples, ids: list[str], removed: list[str], knobs: dict[str, Any], folder: str | None
) -> Outcome:
    if not ids:
        raise RequestError("forget.sisa: the role `full` is empty; there is nothing to learn.")
    check_learnable("full", full)
    places = ShardMap.draw(ids, knobs["shards"], knobs["slices"], torch.initial_seed())
    if removed:
        places = places.without(removed)
    config = _config(model, knobs)
    if config.adapter is not None:
        add_adapter(model, config.adapter)
    session.begins(lambda: _untrained(model, config, places))
    trainer = NetworkTrainer(model, config, full, ids)
    core = Sisa(places, trainer, _checkpoints(folder))
    request = core.train()
    ensemble = Ensemble.around(model, config, core.members)
    return _outcome(ensemble, core, request, trainer, {})


def _untrained(model: nn.Module, config: EnsembleConfig, places: ShardMap) -> Ensemble:
    """The ensemble as it will be, but for what its members learn."""
    state = model.state_dict()
    own = {name: state[name] for name in own_names(model, config.adapter is not None)}
    config.shard_map = places.to_json()
    return Ensemble.around(model, config, dict.fromkeys(range(len(places.slices)), own))


def _forget(
    model: Ensemble, full: Examples, ids: list[str], removed: list[str], knobs: dict[str, Any], folder: str | None
) -> Outcome:
    if not removed:
        raise RequestError("forget.sisa: this model is an ensemble already; name what it is to forget (`forget`).")
    config: Any = model.config
    defaults = {knob.name: knob.default for knob in sisa.method.knobs}  # pyright: ignore[reportFunctionMemberAccess]
    for name, value in knobs.items():
        if value not in (config.training[name], defaults[name]):
            raise RequestError(
                f"forget.sisa: the ensemble was trained with {name}: {config.training[name]}, and members are trained again "
                f"as they were; {name}: {value} is not possible. Leave it out."
            )
    places = ShardMap.from_json(config.shard_map)
    _check_data(places, removed, ids)

    def without() -> Ensemble:
        config.shard_map, config.decision = places.without(removed).to_json(), None
        return model

    session.begins(without)
    trainer = NetworkTrainer(model.base, config, full, ids)
    states = {shard: model.tensors(shard) for shard in config.members}
    core = Sisa(places, trainer, _checkpoints(folder), states)
    before = _digests(model)
    request = core.forget(removed)
    for one in request.retrained:
        model.put(one.shard, core.members.get(one.shard))
    config.decision = None  # it was calibrated for other members
    model.requires_grad_(False)
    return _outcome(model, core, request, trainer, before)


def _check_data(places: ShardMap, removed: Sequence[str], ids: Sequence[str]) -> None:
    """Whether everything that the touched shards still hold is there to be learnt again."""
    after = places.without(removed)
    needed = {one for shard in places.touched(removed) for one in after.ids(shard)}
    if missing := needed - set(ids):
        raise RequestError(
            f"forget.sisa: {len(missing)} of {len(needed)} examples that the touched shards keep are not in `full`. Give "
            "the data of the training, encoded as it was; what is to be forgotten may be left out of it."
        )


def _config(model: nn.Module, knobs: dict[str, Any]) -> EnsembleConfig:
    import transformers

    kind = type(model)
    if getattr(transformers, kind.__name__, None) is not kind:
        raise RequestError(f"forget.sisa: members must be of a class of transformers; {kind.__name__} is none.")
    if adapter_layers(model):
        raise RequestError(
            "forget.sisa: this model carries adapters already, as the base of an ensemble does. Merge them first."
        )
    adapter = None
    if knobs["weights"] == "lora":
        if any(getattr(module, "running_mean", None) is not None for module in model.modules()):
            raise RequestError(
                f"forget.sisa: {kind.__name__} keeps running statistics, which members over one base would share. Write "
                'weights: "all".'
            )
        adapter = adapter_options(model, knobs["rank"], knobs["alpha"])
    inner: Any = model.config
    return EnsembleConfig(
        inner=inner.to_dict(), inner_class=kind.__name__, adapter=adapter, aggregate=knobs["aggregate"], training=knobs
    )


def _digests(ensemble: Ensemble) -> dict[str, str]:
    return {str(shard): ensemble.digest(shard) for shard in ensemble.config.members}


def _outcome(
    ensemble: Ensemble, core: Sisa[State], request: Request, trainer: NetworkTrainer, before: dict[str, str]
) -> Outcome:
    config: Any = ensemble.config
    config.shard_map = core.places.to_json()
    config.record = [*config.record, {**request.to_json(), "before": before, "after": _digests(ensemble)}]
    facts: dict[str, float | int | str | list[int]] = {
        "members": len(config.members),
        "examples": sum(len(core.places.ids(shard)) for shard in range(len(core.places.slices))),
        "forgotten": len(core.places.forgotten),
        "trained_shards": [one.shard for one in request.retrained],
        "visits": request.visits,
        "visits_from_scratch": request.from_scratch,
    }
    return Outcome(ensemble, facts=facts, curves=trainer.curves, made={"record": config.record})


class NetworkTrainer:
    """Members that are the base with tensors exchanged; trained in the base itself, which is as it was afterwards.

    Args:
        base: the network, with its adapter if the config names one.
        config: the ensemble's: adapter and knobs.
        full: the examples.
        ids: of the examples.
    """

    def __init__(self, base: nn.Module, config: EnsembleConfig, full: Examples, ids: Sequence[str]) -> None:
        self.base, self.full, self.knobs = base, full, config.training
        self.names = own_names(base, config.adapter is not None)
        self.adapted = config.adapter is not None
        self.rows: dict[str, list[int]] = {}
        for row, one in enumerate(ids):
            self.rows.setdefault(one, []).append(row)
        self.epochs = epochs_per_slice(config.training["epochs"], config.training["slices"])
        self.curves: dict[str, list[float]] = {}
        self.blank = self._tensors()
        if self.adapted:
            self.blank = {name: torch.zeros_like(tensor) for name, tensor in self.blank.items()}
            self._put(self.blank)
        state = base.state_dict()
        self.identity = digest(state if not self.adapted else {**state, **self.blank}) + repr(
            sorted(self.knobs.items())
        )

    def _places(self, ids: Sequence[str]) -> list[int]:
        return [row for one in ids for row in self.rows[one]]

    def _size(self, count: int) -> tuple[int, int]:
        """Steps and examples in each."""
        # an example that is alone in its slice is drawn twice: batch norm cannot train on one
        batch = min(self.knobs["batch_size"], max(count, 2))
        return max(1, round(self.epochs * count / batch)), batch

    def visits(self, ids: Sequence[str]) -> int:
        """Examples in all steps."""
        steps, batch = self._size(len(self._places(ids)))
        return steps * batch

    def begin(self, seed: int) -> State:
        """The base's own tensors, or a fresh adapter."""
        if not self.adapted:
            return self.blank
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            for layer in adapter_layers(self.base).values():
                for name in layer.lora_A:
                    layer.reset_lora_parameters(name, True)
        fresh = self._tensors()
        self._put(self.blank)
        return fresh

    def train(self, state: State, ids: Sequence[str], seed: int, name: str) -> State:
        """`state` after the slice's epochs, in new tensors."""
        examples = self.full.select(self._places(ids))
        steps, batch = self._size(len(examples))
        warmup = self.knobs["warmup"]
        self._put(state)
        own = set(self.names)
        for each, parameter in self.base.named_parameters():
            parameter.requires_grad_(each in own and parameter.is_floating_point())
        try:
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                ledger = fit(
                    self.base,
                    [cross_entropy("shard")],
                    {"shard": examples},
                    steps=steps,
                    batch_size=batch,
                    lr=self.knobs["lr"],
                    warmup=round(warmup * steps) if warmup < 1 else int(warmup),
                    schedule=self.knobs["schedule"],
                    name=name,
                )
            self.curves.setdefault(name.partition(",")[0], []).extend(ledger.curves["loss"])
            return self._tensors()
        finally:
            self._put(self.blank)

    def _tensors(self) -> State:
        state = self.base.state_dict()
        return {name: state[name].detach().clone() for name in self.names}

    @torch.no_grad()
    def _put(self, tensors: State) -> None:
        state = self.base.state_dict()
        for name in self.names:
            state[name].copy_(tensors[name])


class CheckpointFolder(MutableMapping[str, State]):
    """States by name, one safetensors file each.

    Args:
        folder: made when the first is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def __getitem__(self, name: str) -> State:
        if not self._path(name).exists():
            raise KeyError(name)
        return load_file(self._path(name))

    def __setitem__(self, name: str, state: State) -> None:
        """Written beside its place and renamed, by the main process."""
        if processes.is_main():
            with writing(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
                partial = self.folder / f".{name}.partial"
                tensors: dict[str, Tensor] = {key: tensor.cpu().contiguous() for key, tensor in state.items()}
                save_file(tensors, partial)
                os.replace(partial, self._path(name))
        processes.wait()

    def __delitem__(self, name: str) -> None:
        if not processes.agreed(self._path(name).exists()):
            raise KeyError(name)
        if processes.is_main():
            self._path(name).unlink()
        processes.wait()

    def __iter__(self) -> Iterator[str]:
        return (path.stem for path in sorted(self.folder.glob("shard-*.safetensors")))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _checkpoints(folder: str | None) -> CheckpointFolder | None:
    return CheckpointFolder(Path(folder).expanduser()) if folder is not None else None
