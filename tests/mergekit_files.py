"""Configurations for mergekit over tiny models: a base and others tuned from it, a short way off."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from overhaul.mergekit import merge_config
from tiny_checkpoints import EVERY, tensors


def near(
    family: str, folder: Path, count: int = 2, dtype: torch.dtype = torch.float32, step: float = 0.01
) -> list[str]:
    """A base and models that training took a little way from it."""
    torch.manual_seed(0)
    model: Any = EVERY[family]().to(dtype)
    start = {name: one.detach().clone() for name, one in model.state_dict().items()}
    made: list[str] = []
    for number in range(count + 1):
        with torch.no_grad():
            for name, one in model.named_parameters():
                one.copy_(start[name] + (step * torch.randn(one.shape) if number else torch.zeros(one.shape)).to(dtype))
        model.save_pretrained(folder / f"m{number}")
        made.append(str(folder / f"m{number}"))
    return made


def file(method: str, base: str | None, models: Sequence[str], weights: Sequence[Any], **rest: Any) -> dict[str, Any]:
    """A file with a weight for each model."""
    listed = [{"model": one, "parameters": {"weight": w}} for one, w in zip(models, weights, strict=True)]
    return {"merge_method": method, **({"base_model": base} if base else {}), "models": listed, **rest}


def held(folder: str | Path) -> dict[str, Tensor]:
    """A model's tensors."""
    return tensors(Path(folder))


def made(config: Any, out: Path) -> dict[str, Tensor]:
    """The tensors that a file makes."""
    return tensors(merge_config(config, out).model)
