"""What the tests of forget losses share: a model that has learnt what it is to forget, of several families."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from conftest import FAMILIES, examples_for, mean_loss, tiny_qwen3
from contract import some_facts
from learnt import by_heart
from overhaul.data.examples import Examples

EASY: dict[str, Any] = {"batch_size": 8, "lr": 3e-3, "warmup": 0, "schedule": "constant"}
BRIEF: dict[str, Any] = {
    "epochs": 2.0,
    "batch_size": 4,
    "lr": 1e-2,
    "warmup": 0,
    "schedule": "constant",
    "stop_at": None,
}
TRAINING: dict[str, Any] = {
    "epochs": (2.0, 1.0),
    "steps": (None, 3),
    "batch_size": (4, 3),
    "lr": (1e-2, 1e-3),
    "warmup": (0, 2),
    "schedule": ("constant", "linear"),
    "weight_decay": (0.0, 0.5),
    "stop_at": (None, 0.3),
    "retain_drop": (None, 1e-3),
}
"""Of the knobs that all methods have which train a forget loss, two values each that differ beside `BRIEF`."""
KINDS = {
    "llama": lambda: FAMILIES["llama"](num_hidden_layers=2, initializer_range=0.2),
    "gpt2": lambda: FAMILIES["gpt2"](n_layer=2, initializer_range=0.2),
    "qwen3": lambda: tiny_qwen3(initializer_range=0.2),
    "vit": lambda: FAMILIES["vit"](num_hidden_layers=2, initializer_range=0.2),
}


def taught(kind: str) -> tuple[nn.Module, Examples, Examples]:
    """A tiny model that knows by heart what it is to forget and what it is to keep; of images, one class is to go."""
    torch.manual_seed(0)
    family = kind if kind in FAMILIES else "llama"
    whole = examples_for(family, 16, seed=1)
    forget, retain = whole[:8], whole[8:]
    if forget.kind == "images":
        classes = [int(item["labels"]) for item in whole.items]
        gone = max(set(classes), key=classes.count)
        forget = whole.select([n for n, label in enumerate(classes) if label == gone])
        retain = whole.select([n for n, label in enumerate(classes) if label != gone])
    return by_heart(KINDS[kind](), {"all": whole}, steps=60, batch_size=16, lr=1e-2), forget, retain


def knowing() -> dict[str, Any]:
    """A tiny Llama that knows the answers about four people by heart, and what of them is to go and to stay."""
    roles = {"forget": some_facts(0, 8), "retain": some_facts(8, 8)}
    model = KINDS["llama"]()
    return {"model": by_heart(model, roles, steps=60, batch_size=8, lr=1e-2), **roles}


def losses(model: nn.Module, forget: Examples, retain: Examples) -> tuple[float, float]:
    """Nats a token or image of both."""
    return mean_loss(model, forget), mean_loss(model, retain)
