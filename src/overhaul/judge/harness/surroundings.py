"""What lm-eval does to its surroundings, undone: random states, what it prints, templates that reach beyond their row."""

from __future__ import annotations

import contextlib
import io
import logging
import random
import warnings
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def undisturbed(model: nn.Module | None) -> Iterator[None]:
    """Python's, NumPy's and torch's random states are as they were again."""
    import numpy as np
    import torch

    device = getattr(model, "device", torch.device("cpu"))
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextlib.contextmanager
def quietly() -> Iterator[list[str]]:
    """Nothing is printed; what lm-eval warns of is collected."""
    said: list[str] = []
    logger = logging.getLogger("lm_eval")
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())
    logger.addHandler(handler)
    propagates, logger.propagate = logger.propagate, False
    aside = io.StringIO()
    try:
        with contextlib.redirect_stdout(aside), contextlib.redirect_stderr(aside), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield said
    finally:
        logger.propagate = propagates
        logger.removeHandler(handler)


@contextlib.contextmanager
def sandboxed() -> Iterator[None]:
    """Templates of tasks see their row alone: in lm-eval's own environment one can reach Python, and run what it likes."""
    from jinja2.sandbox import SandboxedEnvironment
    from lm_eval import utils

    own = utils.env
    safe = SandboxedEnvironment(
        loader=own.loader, undefined=own.undefined, keep_trailing_newline=own.keep_trailing_newline
    )
    safe.filters.update(own.filters)
    utils.env = safe
    try:
        yield
    finally:
        utils.env = own
