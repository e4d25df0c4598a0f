"""What a training can be gone on from: in a file after an interruption (bit for bit), in memory by the next training.

1. safetensors and JSON, never pickle; the optimizer's state is kept under the parameters' names.
2. Tensors are whole, also of a model that trains in shards, so a training may go on with another number of processes;
   it is bit-exact with the same.
3. Every process takes part in reading and gathering; the main one writes.
4. A checkpoint says what it belongs to: a training with other steps, rates, data or parameters does not go on from it.
5. Of weights below float32 the float32 masters are kept, so nothing is rounded at the seam.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from overhaul import processes, session
from overhaul.errors import RequestError, writing

if TYPE_CHECKING:
    from overhaul.fit.parallel import Workers

MAIN = "main"
"""The optimizer that every training has."""

OptimizerState = dict[str, dict[str, Any]]
"""Parameter name -> key -> tensor (whole, on the CPU) or number."""


@dataclass
class TrainingState:
    """Where a training stands, for another to go on from: read when a training begins, brought up to date at its end.

    A deep copy is a branch: what trains on it leaves the original where it was.

    Attributes:
        step: optimizer steps so far, the first of which is 0: what a schedule that has no end counts.
        examples: how many each role has drawn.
        optimizer: the optimizer's state; empty for a fresh one. That of a second optimizer is under "NAME:parameter".
        masters: float32 values of the weights that are held in less. One whose weight has been changed since is not used.
    """

    step: int = 0
    examples: dict[str, int] = field(default_factory=dict)
    optimizer: OptimizerState = field(default_factory=dict)
    masters: dict[str, Tensor] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Write the state to a folder: safetensors and JSON."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors, plain = _taken_apart(self.optimizer)
        tensors |= {f"master/{name}": tensor.contiguous() for name, tensor in self.masters.items()}
        known = {"step": self.step, "examples": self.examples, "optimizer": plain}
        save_file(tensors, folder / _TENSORS)
        (folder / _COUNTERS).write_text(json.dumps(known, indent=1), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> TrainingState:
        """The state that `save` wrote."""
        if not ((folder / _COUNTERS).is_file() and (folder / _TENSORS).is_file()):
            raise RequestError(f"{folder} holds no training state: {_COUNTERS} and {_TENSORS} are not both there.")
        known = json.loads((folder / _COUNTERS).read_text(encoding="utf-8"))
        with safe_open(str(folder / _TENSORS), framework="pt") as file:
            state = _put_together(file, known["optimizer"])
            masters = {name: file.get_tensor(f"master/{name}") for name in _under(file, "master/")}
        return cls(known["step"], known["examples"], state, masters)


_TENSORS, _COUNTERS = "training_state.safetensors", "training_state.json"


def _taken_apart(state: OptimizerState) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of an optimizer's state by "optimizer/NAME/KEY", and its numbers by "NAME/KEY"."""
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {}
    for name, values in state.items():
        for key, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer/{name}/{key}"] = value.contiguous()
            else:
                plain[f"{name}/{key}"] = value
    return tensors, plain


def _put_together(file: Any, plain: Mapping[str, Any]) -> OptimizerState:
    state: OptimizerState = {}
    tensors = {rest: file.get_tensor(f"optimizer/{rest}") for rest in _under(file, "optimizer/")}
    for path, value in {**tensors, **plain}.items():
        name, _, key = path.rpartition("/")
        state.setdefault(name, {})[key] = value
    return state


def _under(file: Any, start: str) -> list[str]:
    return [key.removeprefix(start) for key in file.keys() if key.startswith(start)]  # noqa: SIM118 (no mapping)


def whole(tensor: Tensor) -> Tensor:
    """The full tensor behind a shard, differentiable; any other as it is."""
    full = getattr(tensor, "full_tensor", None)
    return tensor if full is None else full()


def _like(value: Tensor, parameter: Any) -> Tensor:
    """A whole tensor, cut as the parameter is."""
    if not hasattr(parameter, "full_tensor") or value.shape != parameter.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    value = value.to(parameter.device)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)


def optimizer_state(team: Workers) -> OptimizerState:
    """The states of all optimizers by parameter name."""
    names = {id(parameter): name for name, parameter in team.named}
    return {
        prefix(which) + names[id(parameter)]: {
            key: whole(value).detach().cpu() if isinstance(value, Tensor) else value for key, value in state.items()
        }
        for which, wrapped in team.optimizers.items()
        for parameter, state in wrapped.optimizer.state.items()
    }


def _settings(team: Workers) -> dict[str, Any]:
    """How each optimizer is set, the rate aside, which follows a schedule: "weight_decay of main, group 1" -> 0.1."""
    found = {
        f"{key} of {which}, group {number}": value
        for which, wrapped in team.optimizers.items()
        for number, group in enumerate(wrapped.param_groups, 1)
        for key, value in group.items()
        if key not in ("params", "lr", "initial_lr") and isinstance(value, bool | int | float | str | tuple | list)
    }
    return json.loads(json.dumps(found, default=str))


def prefix(which: str) -> str:
    """What stands before a parameter's name in the state of an optimizer."""
    return "" if which == MAIN else f"{which}:"


def load_optimizer_state(team: Workers, saved: Mapping[str, dict[str, Any]]) -> None:
    """Put the states from `optimizer_state` back."""
    names = {id(parameter): name for name, parameter in team.named}
    for which, wrapped in team.optimizers.items():
        optimizer: torch.optim.Optimizer = wrapped.optimizer
        ordered = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        state: dict[int, dict[str, Any]] = {}
        for place, parameter in enumerate(ordered):
            values = saved.get(prefix(which) + names[id(parameter)])
            if values is not None:
                state[place] = {k: _like(v, parameter) if isinstance(v, Tensor) else v for k, v in values.items()}
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        for place, values in state.items():  # torch has cast them to the parameter's dtype
            for key, value in values.items():
                if isinstance(value, Tensor) and optimizer.state[ordered[place]][key].dtype != value.dtype:
                    optimizer.state[ordered[place]][key] = value.to(ordered[place].device)


@torch.no_grad()
def go_on(team: Workers, state: TrainingState) -> None:
    """Begin where another training ended: its optimizers, and its masters where the weights are still theirs."""
    if state.optimizer:
        load_optimizer_state(team, state.optimizer)
    for name, master in team.named:
        known, dtype = state.masters.get(name), team.stored.get(name)
        if known is not None and dtype is not None:
            begun = whole(master).to(dtype).cpu()
            if torch.equal(known.to(dtype), begun):
                master.copy_(_like(known, master))


def now(team: Workers, step: int, examples: dict[str, int], state: TrainingState) -> None:
    """Bring a state up to date."""
    state.step, state.examples = step, examples
    state.optimizer = optimizer_state(team)
    state.masters = {name: whole(master).detach().cpu().clone() for name, master in team.named if name in team.stored}


class TrainingCheckpoint:
    """Weights, norm statistics, optimizers, random state and what the loop keeps, in one file of the scratch folder.

    Args:
        name: of the training.
        belongs: what a training must have in common with it to go on from it: plain values that JSON holds.
    """

    def __init__(self, name: str, belongs: Mapping[str, Any]) -> None:
        scratch = session.current().scratch
        self.path = scratch / f"{name}.checkpoint" if scratch else None
        self.name, self.belongs = name, json.loads(json.dumps(belongs))
        self.written = time.monotonic()

    def exists(self) -> bool:
        """Whether an interrupted training left one."""
        return self.path is not None and processes.agreed(self.path.exists())

    def due(self) -> bool:
        """Whether it is time to write again."""
        if self.path is None:
            return False
        return processes.agreed(time.monotonic() - self.written >= session.current().checkpoint_seconds)

    def save(self, team: Workers, counters: dict[str, Any], kept: Mapping[str, Any]) -> None:
        """Write everything beside its place, then rename: an interrupted write leaves the previous checkpoint."""
        assert self.path is not None
        tensors: dict[str, Tensor] = {}
        for name, tensor in [*team.named, *team.statistics]:
            full = whole(tensor).detach()
            if processes.is_main():  # the others only help to gather
                tensors[f"weight/{name}"] = full.cpu().contiguous()
        states, plain = _taken_apart(optimizer_state(team))
        tensors |= states
        for device, state in random_states().items():
            tensors[f"random/{device}"] = processes.stacked(state)
        told = {"counters": counters, "optimizer": plain, "belongs": self.belongs, "settings": _settings(team)}
        told["kept"] = _without_tensors(dict(kept), tensors)
        if processes.is_main():
            with writing(self.path):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                partial = self.path.with_suffix(".partial")
                save_file(tensors, partial, {key: json.dumps(value) for key, value in told.items()})
                os.replace(partial, self.path)
        self.written = time.monotonic()

    def check(self) -> None:
        """Refuse a checkpoint that another training left.

        Raises:
            RequestError: it belongs to a training with other steps, rates, data or parameters.
        """
        try:
            with safe_open(str(self.path), framework="pt") as file:
                theirs = json.loads(file.metadata()["belongs"])
        except (SafetensorError, OSError, TypeError, KeyError, ValueError) as error:
            raise RequestError(f"The checkpoint {self.path} is damaged ({error}); delete it to begin anew.") from None
        self._compare(self.belongs, theirs)

    def _compare(self, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
        for key in {**ours, **theirs}:
            if ours.get(key) != theirs.get(key):
                raise RequestError(
                    f"The checkpoint {self.path} was left by another training: its {key} is {theirs.get(key)}, here it "
                    f"is {ours.get(key)}. End that training as it was begun, delete the file to begin anew, or "
                    f"give the training another name than {self.name!r}."
                )

    def load(self, team: Workers) -> tuple[dict[str, Any], dict[str, Any]]:
        """Put weights, optimizers and random state back; return the counters and what the loop kept.

        Raises:
            RequestError: the optimizers were set otherwise.
        """
        with safe_open(str(self.path), framework="pt") as file:
            told = {key: json.loads(value) for key, value in file.metadata().items()}
            self._compare(_settings(team), told["settings"])
            for name, parameter in [*team.named, *team.statistics]:
                parameter.data.copy_(_like(file.get_tensor(f"weight/{name}"), parameter))
            team.write_back()
            load_optimizer_state(team, _put_together(file, told["optimizer"]))
            kept = _with_tensors(told["kept"], file)
            devices = [device for device in random_states() if f"random/{device}" in file.keys()]  # noqa: SIM118
            saved = {device: file.get_tensor(f"random/{device}") for device in devices}
        place = processes.rank()  # a clone: the generators read their state from where its storage begins
        set_random_states({device: rows[place].clone() for device, rows in saved.items() if place < len(rows)})
        return told["counters"], kept


def _without_tensors(value: Any, tensors: dict[str, Tensor]) -> Any:
    """What JSON can hold of something kept; its tensors are put beside, and named where they were."""
    if isinstance(value, Tensor):
        name = f"kept/{len(tensors)}"
        tensors[name] = value.detach().cpu().clone().contiguous()
        return {_TENSOR: name}
    if isinstance(value, dict):
        return {str(key): _without_tensors(part, tensors) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_tensors(part, tensors) for part in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"a training keeps tensors, numbers, texts, lists and dicts of them, not a {type(value).__name__}")


def _with_tensors(value: Any, file: Any) -> Any:
    if isinstance(value, dict):
        if value.keys() == {_TENSOR}:
            return file.get_tensor(value[_TENSOR])
        return {key: _with_tensors(part, file) for key, part in value.items()}
    return [_with_tensors(part, file) for part in value] if isinstance(value, list) else value


_TENSOR = "a tensor"


def random_states() -> dict[str, Tensor]:
    """The states of torch's generators that this process draws from, by device."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_random_states(states: Mapping[str, Tensor]) -> None:
    """Put the generators where `random_states` found them."""
    for device, state in states.items():
        if device == "cpu":
            torch.set_rng_state(state)
        else:
            torch.cuda.set_rng_state(state)
