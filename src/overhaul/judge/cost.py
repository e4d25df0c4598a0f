"""What a model costs: parameters, bytes on disk, FLOPs and time.

FLOPs are counted by `torch.utils.flop_counter` on one forward, two per multiply-add. Attention is counted as if no
position were masked, and is routed through plain matrix products while counting: the fused kernel of the CPU is
invisible to the counter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from overhaul.data.examples import Batch, Encoded
from overhaul.errors import RequestError
from overhaul.judge.generation import generate, generates
from overhaul.judge.measure import Measure
from overhaul.judge.timing import in_turn
from overhaul.modes import at_rest
from overhaul.objectives import forward

SEQUENCE = 128
NEW_TOKENS = 16
FORWARDS, GENERATIONS = 20, 5


def cost(model: nn.Module, stored: int | None = None, sample: Encoded | None = None) -> list[Measure]:
    """Size, work and speed of a model; times are the fastest of some warm runs of one example.

    The fastest, since whatever else a machine does only adds to a run, and stages are timed minutes apart. All runs are kept
    beside it: whether two models differ is told from them.

    Args:
        model: a language model or an image classifier, on any device.
        stored: bytes of its weights on disk; without them, they are left out.
        sample: one example, for the shape of an image; needed where the model's config does not tell it.

    Returns:
        Measures of the group "cost": parameters, bytes_on_disk, flops (per token, in a sequence of 128, or per image),
        latency (one forward of that: the prefill of a language model) and, where the model generates, decode_latency (per
        token, with the cache).

    Raises:
        RequestError: the shape of an image is not known.
    """
    batch = {name: value.to(next(model.parameters()).device) for name, value in _batch(model, sample).items()}
    is_text = "input_ids" in batch
    tokens = batch["input_ids"].shape[1] if is_text else 1
    measures = [_cost("parameters", "parameters", "", sum(p.numel() for p in model.parameters()))]
    if stored is not None:
        measures.append(_cost("bytes_on_disk", "weights on disk", "bytes", stored))
    with at_rest(model):
        per = "token" if is_text else "image"
        work = flops(model, batch) / tokens
        measures.append(_cost("flops", f"FLOPs per {per}", f"FLOPs/{per}", work, "two for each multiply-add"))
        label, what = ("prefill latency", f"{tokens} tokens") if is_text else ("latency", "one image")
        seconds = _timed(model, lambda: forward(model, batch), FORWARDS)
        measures.append(_time("latency", label, "ms", seconds, f"one forward of {what}"))
        if is_text and generates(model):
            prompt = batch["input_ids"][0, :NEW_TOKENS]
            seconds = _timed(model, lambda: generate(model, [prompt], NEW_TOKENS, ()), GENERATIONS)
            each = [one / NEW_TOKENS for one in seconds]
            measures.append(_time("decode_latency", "decode latency", "ms/token", each, "generating one token"))
    return measures


def _cost(metric: str, label: str, unit: str, value: float, help: str = "") -> Measure:
    return Measure("cost", metric, label, "model", unit, "down", "down", float(value), 1, help=help)


def _time(metric: str, label: str, unit: str, seconds: list[float], help: str) -> Measure:
    runs = tuple(1e3 * one for one in seconds)
    return Measure("cost", metric, label, "model", unit, "down", "down", min(runs), len(runs), help=help, runs=runs)


def _timed(model: nn.Module, run: Callable[[], Any], times: int) -> list[float]:
    """Seconds of warm runs."""
    return in_turn({"": run}, times, next(model.parameters()).device)[""]


def _batch(model: nn.Module, sample: Encoded | None) -> Batch:
    config: Any = getattr(model, "config", None)
    if sample is not None and "pixel_values" in sample:
        return {"pixel_values": sample["pixel_values"][None]}
    if getattr(model, "main_input_name", "input_ids") == "input_ids":
        length = min(SEQUENCE, getattr(config, "max_position_embeddings", None) or SEQUENCE)
        return {"input_ids": torch.arange(length)[None] % config.vocab_size}
    size = getattr(config, "image_size", None)
    if size is None:
        raise RequestError(f"{type(model).__name__} does not say how large its images are; give one as `sample`.")
    height, width = (size, size) if isinstance(size, int) else size
    return {"pixel_values": torch.zeros(1, config.num_channels, height, width)}


@torch.no_grad()
def flops(model: nn.Module, batch: Batch) -> int:
    """Floating-point operations of one forward in eval mode, two per multiply-add."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        forward(model, batch)
    return counter.get_total_flops()
