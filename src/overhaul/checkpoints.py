"""Checkpoints inside one training: everything needed to go on bit for bit, as safetensors and JSON, never pickle."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from overhaul import session


class Checkpoint:
    """Weights, norm statistics, optimizer and random state of one training, in one file of the session's scratch folder."""

    def __init__(
        self, path: Path | None, named: Sequence[tuple[str, Tensor]], optimizer: torch.optim.Optimizer
    ) -> None:
        self.path, self.named, self.optimizer = path, named, optimizer
        self.written = time.monotonic()

    @classmethod
    def for_training(
        cls, name: str, named: Sequence[tuple[str, Tensor]], optimizer: torch.optim.Optimizer
    ) -> Checkpoint:
        """The checkpoint called `name` in the current session; one that never exists where there is no scratch folder."""
        scratch = session.current().scratch
        return cls(scratch / f"{name}.checkpoint" if scratch else None, named, optimizer)

    def exists(self) -> bool:
        """Whether an interrupted training left one."""
        return self.path is not None and self.path.exists()

    def due(self) -> bool:
        """Whether it is time to write again."""
        return self.path is not None and time.monotonic() - self.written >= session.current().checkpoint_seconds

    def save(self, counters: dict[str, Any]) -> None:
        """Write everything beside its place, then rename: an interrupted write leaves the previous checkpoint."""
        assert self.path is not None
        tensors: dict[str, Tensor] = {f"weight/{name}": p.detach() for name, p in self.named}
        tensors["random/cpu"] = torch.get_rng_state()
        if torch.cuda.is_available():
            tensors["random/cuda"] = torch.cuda.get_rng_state()
        plain: dict[str, Any] = {}
        for place, state in self.optimizer.state_dict()["state"].items():
            for key, value in state.items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer/{place}/{key}"] = value
                else:
                    plain[f"{place}/{key}"] = value
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        metadata = {"counters": json.dumps(counters), "optimizer": json.dumps(plain)}
        save_file({k: v.cpu().contiguous() for k, v in tensors.items()}, partial, metadata)
        os.replace(partial, self.path)
        self.written = time.monotonic()

    def load(self) -> dict[str, Any]:
        """Put weights, optimizer and random state back; return the counters."""
        state: dict[int, dict[str, Any]] = {}
        with safe_open(str(self.path), framework="pt") as file:
            metadata = file.metadata()
            for name, parameter in self.named:
                parameter.data.copy_(file.get_tensor(f"weight/{name}"))
            for key in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                kind, _, rest = key.partition("/")
                if kind == "optimizer":
                    place, _, part = rest.partition("/")
                    state.setdefault(int(place), {})[part] = file.get_tensor(key)
            for key, value in json.loads(metadata["optimizer"]).items():
                place, _, part = key.partition("/")
                state.setdefault(int(place), {})[part] = value
            groups = self.optimizer.state_dict()["param_groups"]
            self.optimizer.load_state_dict({"state": state, "param_groups": groups})
            torch.set_rng_state(file.get_tensor("random/cpu"))
            if torch.cuda.is_available():
                torch.cuda.set_rng_state(file.get_tensor("random/cuda"))
        return json.loads(metadata["counters"])
