"""Pools of LoRAs for tiny models, as peft saves them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from overhaul import models


def lora(base: Path, folder: Path, seed: int = 0, std: float = 0.3, **options: Any) -> Path:
    """A LoRA with random factors for a checkpoint."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    model: Any = models.open_model(base)[0]
    settings = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "up_proj"], **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped: Any = get_peft_model(model, LoraConfig(**settings))
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name and "magnitude" not in name:
                nn.init.normal_(parameter, std=std)
        wrapped.save_pretrained(folder)
    return folder


def three(base: Path, folder: Path, **others: Any) -> list[Path]:
    """Ranks 2, 3 (rsLoRA) and 5, of which the first two leave the layer alone that the third adapts."""
    return [
        lora(base, folder / "a", 1, **others),
        lora(base, folder / "b", 2, r=3, use_rslora=True, **others),
        lora(base, folder / "c", 3, **{"r": 5, "target_modules": ["q_proj", "down_proj"], **others}),
    ]
