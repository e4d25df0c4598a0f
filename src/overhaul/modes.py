"""How modules run: train and eval mode, each as it was again afterwards, and compiled ones as they were written."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def at_rest(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode; each in its own mode again afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def uncompiled() -> Iterator[None]:
    """What was compiled runs as it was written: a graph would not see what is new, and making one takes long."""
    # nothing can have been compiled where dynamo was never imported, and importing it takes seconds
    if "torch._dynamo" in sys.modules:
        with torch.compiler.set_stance("force_eager"):
            yield
    else:
        yield
