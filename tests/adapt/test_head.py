from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn

import overhaul as oh
from conftest import tiny_llama, tiny_resnet, tiny_vit
from contract import Case, pictures
from overhaul.adapt.head import head
from overhaul.adapt.head.logistic import Linear, Part, fitted
from overhaul.adapt.head.rows import cells, split
from overhaul.data.encode import encode_images
from overhaul.data.examples import Examples, collate
from overhaul.errors import RequestError
from overhaul.forward import forward

REGIONS = ("north", "south", "west")


def grouped(count: int = 48, classes: int = 4, seed: int = 0) -> Examples:
    """Pictures of a few classes in groups of different size; half of the smallest calls what it shows something else."""
    labels = [n % classes for n in range(count)]
    regions = [REGIONS[0 if n % 6 < 3 else 1 if n % 6 < 5 else 2] for n in range(count)]
    shown = [y if region != "west" or n % 4 < 2 else (y + 1) % classes for n, (y, region) in enumerate(zip(labels, regions, strict=True))]
    made = pictures(shown, seed=seed, region=regions, home=[f"home {n // 2}" for n in range(count)])
    items = [{**item, "labels": torch.tensor(y)} for item, y in zip(made.items, labels, strict=True)]
    return replace(made, items=items, rows=[{**row, "label": y} for row, y in zip(made.rows, labels, strict=True)])


CASE = Case(
    method=head,
    materials=lambda: {"model": tiny_vit(num_labels=4), "curated": grouped()},
    knobs={"by": "region", "grid": [0.01, 1.0]},
    varied={
        "by": ("region", None),
        "balance": ("none", "class_and_group"),
        "solver": ("logistic", "cross_entropy"),
        "start": ("present", "anew", {"solver": "cross_entropy", "steps": 3}),
        "grid": ([0.001], [10.0]),
        "choose": ("worst_group", "average", {"grid": [3e-3, 100.0], "balance": "none", "share": 0.5}),
        "share": (0.2, 0.5),
        "apart": (None, "home"),
        **{
            knob: (*values, {"solver": "cross_entropy", "steps": 4})
            for knob, values in {
                "batch_size": (4, 8),
                "lr": (1e-3, 1e-2),
                "warmup": (0, 2),
                "schedule": ("constant", "linear"),
                "weight_decay": (0.0, 0.5),
                "clip": (None, 0.01),
            }.items()
        },
        "steps": (2, 3, {"solver": "cross_entropy"}),
    },
    moves=r"^classifier\.",
)
