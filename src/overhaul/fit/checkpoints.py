"""What a training can be gone on from: in a file after an interruption (bit for bit), in memory by the next training.

1. safetensors and JSON, never pickle; the optimizer's state is kept under the parameters' names.
2. Tensors are whole, also of a model that trains in shards, so a training may go on with another number of processes;
   it is bit-exact with the same.
3. Every process takes part in reading and gathering; the main one writes.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from overhaul import processes, session

Named = Sequence[tuple[str, Tensor]]
OptimizerState = dict[str, dict[str, Any]]
"""Parameter name -> key -> tensor (whole, on the CPU) or number."""


@dataclass
class TrainingState:
    """Where a training stands, for another to go on from: read when a training begins, brought up to date at its end.

    A deep copy is a branch: what trains on it leaves the original where it was.

    Attributes:
        step: optimizer steps so far, the first of which is 0: what a schedule that has no end counts.
        examples: how many each role has drawn.
        optimizer: the optimizer's state; empty for a fresh one.
    """

    step: int = 0
    examples: dict[str, int] = field(default_factory=dict)
    optimizer: OptimizerState = field(default_factory=dict)


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


def optimizer_state(optimizer: torch.optim.Optimizer, named: Named) -> OptimizerState:
    """The optimizer's state by parameter name."""
    names = {id(parameter): name for name, parameter in named}
    return {
        names[id(parameter)]: {
            key: whole(value).detach().cpu() if isinstance(value, Tensor) else value for key, value in state.items()
        }
        for parameter, state in optimizer.state.items()
    }


def load_optimizer_state(optimizer: torch.optim.Optimizer, named: Named, saved: Mapping[str, dict[str, Any]]) -> None:
    """Put a state from `optimizer_state` back."""
    names = {id(parameter): name for name, parameter in named}
    ordered = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Any]] = {}
    for place, parameter in enumerate(ordered):
        values = saved.get(names[id(parameter)])
        if values is not None:
            state[place] = {k: _like(v, parameter) if isinstance(v, Tensor) else v for k, v in values.items()}
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    for place, values in state.items():  # torch has cast them to the parameter's dtype
        for key, value in values.items():
            if isinstance(value, Tensor) and optimizer.state[ordered[place]][key].dtype != value.dtype:
                optimizer.state[ordered[place]][key] = value.to(ordered[place].device)


class TrainingCheckpoint:
    """Weights, norm statistics, optimizer and random state of one training, in one file of the session's scratch folder."""

    def __init__(self, path: Path | None, named: Named, optimizer: torch.optim.Optimizer) -> None:
        self.path, self.named, self.optimizer = path, named, optimizer
        self.written = time.monotonic()

    @classmethod
    def for_training(cls, name: str, named: Named, optimizer: torch.optim.Optimizer) -> TrainingCheckpoint:
        """The checkpoint called `name` in the current session; one that never exists where there is no scratch folder."""
        scratch = session.current().scratch
        return cls(scratch / f"{name}.checkpoint" if scratch else None, named, optimizer)

    def exists(self) -> bool:
        """Whether an interrupted training left one."""
        return self.path is not None and processes.agreed(self.path.exists())

    def due(self) -> bool:
        """Whether it is time to write again."""
        if self.path is None:
            return False
        return processes.agreed(time.monotonic() - self.written >= session.current().checkpoint_seconds)

    def save(self, counters: dict[str, Any]) -> None:
        """Write everything beside its place, then rename: an interrupted write leaves the previous checkpoint."""
        assert self.path is not None
        tensors: dict[str, Tensor] = {}
        for name, tensor in self.named:
            full = whole(tensor).detach()
            if processes.is_main():  # the others only help to gather
                tensors[f"weight/{name}"] = full.cpu().contiguous()
        plain: dict[str, Any] = {}
        for name, state in optimizer_state(self.optimizer, self.named).items():
            for key, value in state.items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer/{name}/{key}"] = value.contiguous()
                else:
                    plain[f"{name}/{key}"] = value
        for device, state in random_states().items():
            tensors[f"random/{device}"] = processes.stacked(state)
        if processes.is_main():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            partial = self.path.with_suffix(".partial")
            save_file(tensors, partial, {"counters": json.dumps(counters), "optimizer": json.dumps(plain)})
            os.replace(partial, self.path)
        self.written = time.monotonic()

    def load(self) -> dict[str, Any]:
        """Put weights, optimizer and random state back; return the counters."""
        state: OptimizerState = {}
        with safe_open(str(self.path), framework="pt") as file:
            metadata = file.metadata()
            for name, parameter in self.named:
                parameter.data.copy_(_like(file.get_tensor(f"weight/{name}"), parameter))
            for key in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                kind, _, rest = key.partition("/")
                if kind == "optimizer":
                    name, _, part = rest.rpartition("/")
                    state.setdefault(name, {})[part] = file.get_tensor(key)
            for key, value in json.loads(metadata["optimizer"]).items():
                name, _, part = key.rpartition("/")
                state.setdefault(name, {})[part] = value
            load_optimizer_state(self.optimizer, self.named, state)
            devices = [device for device in random_states() if f"random/{device}" in file.keys()]  # noqa: SIM118
            saved = {device: file.get_tensor(f"random/{device}") for device in devices}
        place = processes.rank()  # a clone: the generators read their state from where its storage begins
        set_random_states({device: rows[place].clone() for device, rows in saved.items() if place < len(rows)})
        return json.loads(metadata["counters"])


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
