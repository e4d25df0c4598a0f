"""Tiny models that know something by heart, each trained once in a run of the tests, whichever test or worker asks first."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file
from torch import nn

from overhaul.data.examples import Examples
from overhaul.fit import fit
from overhaul.objectives import cross_entropy

place: Path | None = None
"""Where they are kept: a folder that all workers of a run share, which `conftest` names once tests run."""


def by_heart(model: nn.Module, lessons: Mapping[str, Examples], **training: Any) -> nn.Module:
    """The model after `fit` on the cross-entropy of every lesson; torch's random state is left as it was.

    Args:
        model: trained in place.
        lessons: examples by role.
        training: what `fit` is told apart from that.
    """
    assert place is not None, "nothing is trained while tests are collected"
    path = place / f"{_key(model, lessons, training)}.safetensors"
    with FileLock(f"{path}.lock"):
        if not path.exists():
            with torch.random.fork_rng():
                fit(model, [cross_entropy(role, name=role) for role in lessons], lessons, **training)
            save_file({name: value.clone() for name, value in model.state_dict().items()}, path)
    model.load_state_dict(load_file(path))
    return model.eval()


def _key(model: nn.Module, lessons: Mapping[str, Examples], training: Mapping[str, Any]) -> str:
    """All that the outcome depends on: what it starts from, what it learns, and how."""
    key = hashlib.sha256(repr(model).encode())
    for value in model.state_dict().values():
        key.update(value.detach().reshape(-1).view(torch.uint8).numpy().tobytes())
    told = {"lessons": {role: part.digest() for role, part in lessons.items()}, "seed": torch.initial_seed()}
    key.update(json.dumps({**told, "training": training}, sort_keys=True).encode())
    return key.hexdigest()[:32]
