from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import overhaul as oh
from conftest import tiny_llama, tiny_resnet, tiny_tokenizer, tiny_vit
from contract import Case, pictures, some_facts
from overhaul.data.examples import Examples
from overhaul.errors import RequestError
from overhaul.inspect.groups import groups
from overhaul.inspect.groups.disparity import Hits, expected_max_min, max_min
from overhaul.inspect.groups.progress import Rates, slopes, stretched
from overhaul.models import Checkpoint, facts, save

REGIONS = ("north", "south", "west")


def rows(count: int = 36, seed: int = 0) -> Examples:
    """Pictures of ten classes in three groups of different size, two of every home, three sets."""
    labels = [n * 7 % 10 for n in range(count)]
    columns: dict[str, list[str]] = {
        "region": [REGIONS[0 if n % 6 < 3 else 1 if n % 6 < 5 else 2] for n in range(count)],
        "income": ["low" if n % 4 < 2 else "high" for n in range(count)],
        "home": [f"home {n // 3}" for n in range(count)],
        "set": ["one" if n % 2 else "two" for n in range(count)],
    }
    return pictures(labels, seed=seed, **columns)


def some_models(folder: Path, count: int = 4) -> list[Checkpoint]:
    """Random classifiers of one label space and two families."""
    found: list[Checkpoint] = []
    for n in range(count):
        torch.manual_seed(n)
        model = tiny_vit() if n % 2 else tiny_resnet(hidden_sizes=[8, 8 + 8 * n])
        found.append(facts(save(model, None, folder / f"model-{n}")))
    return found


CASE = Case(
    method=groups,
    materials=lambda folder: {
        "models": some_models(folder), "data": rows(), "reference": rows(seed=1), "standard": rows(seed=2)
    },
    knobs={"by": "region", "least": 4},
    varied={
        "by": ("region", ["region", "income"], {"least": 2}),
        "pair": (["north", "south"], ["south", "north"]),
        "top": (5, 3),
        "apart": (None, "home"),
        "benchmark": (None, "set"),
        "families": (None, ["a", "b", "a", "c"]),
        "scale": ("probit", "logit"),
    },
    idle={"least": "every group has six rows or more; a test refuses a smaller one"},
)  # fmt: skip
