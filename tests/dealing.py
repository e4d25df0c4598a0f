"""A split network with files for each of its parties, as tests deal them out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from overhaul.models import save
from overhaul.parties.model import VerticalConfig, VerticalModel


def network() -> VerticalModel:
    torch.manual_seed(0)
    return VerticalModel(
        VerticalConfig(columns=[[0, 3], [3, 8]], bottoms=[{"widths": [6, 5]}, {"widths": [10, 4]}], top=[9, 3])
    )


def features() -> Tensor:
    return torch.randn(8, 1, 2, 8, generator=torch.Generator().manual_seed(1))


def dealt(folder: Path, rates: Mapping[str, float]) -> list[dict[str, Any]]:
    """Node configs of the passive parties; each has a folder of its own with its part and its columns."""
    model, found = network(), list[dict[str, Any]]()
    for k, (part, block) in enumerate(zip(model.bottoms, model.blocks(features()), strict=True)):
        own = folder / f"party-{k}"
        save(part, None, own / "part")
        save_file({"features": block.contiguous()}, own / "features.safetensors")
        files = {"part": own / "part", "features": own / "features.safetensors", "into": own / "after"}
        found.append({"party": k, **{name: str(path) for name, path in files.items()}, **rates})
    return found
