"""What a model costs: parameters, bytes on disk, FLOPs and time.

FLOPs are counted by `torch.utils.flop_counter` on one forward, two per multiply-add. Attention is counted as if no
position were masked, and is routed through plain matrix products while counting: the fused kernel of the CPU is
invisible to the counter.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from overhaul.data.examples import Batch, Encoded
from overhaul.judge.generation import generate, generates
from overhaul.judge.measure import Measure
from overhaul.judge.timing import in_turn
from overhaul.modes import at_rest
from overhaul.stack.calls import invoke

SEQUENCE = 128
NEW_TOKENS = 16
FORWARDS, GENERATIONS = 20, 5


def cost(model: nn.Module, stored: int | None = None, sample: Encoded | None = None) -> list[Measure]:
    """Size, work and speed of a model; times are the fastest of some warm runs of one example.

    The fastest, since whatever else a machine does only adds to a run, and stages are timed minutes apart. All runs are kept
    beside it: whether two models differ is told from them.

    Args:
        model: any network, on any device.
        stored: bytes of its weights on disk; without them, they are left out.
        sample: one example, for what the config of a model that reads no tokens does not tell: the shape of an image, or all
            inputs of a network of another kind.

    Returns:
        Measures of the group "cost": parameters, bytes_on_disk, flops (per token, in a sequence of 128, per image or per
        example), latency (one forward of that: the prefill of a language model) and, where the model generates,
        decode_latency (per token, with the cache). FLOPs and latency are None where no input of the model is known.
    """
    batch, per, tokens = _input(model, sample)
    batch = {name: value.to(next(model.parameters()).device) for name, value in batch.items()}
    measures = [_cost("parameters", "parameters", "", sum(p.numel() for p in model.parameters()))]
    if stored is not None:
        measures.append(_cost("bytes_on_disk", "weights on disk", "bytes", stored))
    label, what = ("prefill latency", f"{tokens} tokens") if per == "token" else ("latency", f"one {per}")
    with at_rest(model):
        work = flops(model, batch) / tokens if batch else None
        measures.append(_cost("flops", f"FLOPs per {per}", f"FLOPs/{per}", work, "two for each multiply-add"))
        seconds = _timed(model, lambda: invoke(model, batch), FORWARDS) if batch else []
        measures.append(_time("latency", label, "ms", seconds, f"one forward of {what}"))
        if per == "token" and generates(model):
            prompt = batch["input_ids"][0, :NEW_TOKENS]
            seconds = _timed(model, lambda: generate(model, [prompt], NEW_TOKENS, ()), GENERATIONS)
            each = [one / NEW_TOKENS for one in seconds]
            measures.append(_time("decode_latency", "decode latency", "ms/token", each, "generating one token"))
    return measures


def _cost(metric: str, label: str, unit: str, value: float | None, help: str = "") -> Measure:
    known = None if value is None else float(value)
    return Measure("cost", metric, label, "model", unit, "down", "down", known, 1, help=help)


def _time(metric: str, label: str, unit: str, seconds: list[float], help: str) -> Measure:
    runs = tuple(1e3 * one for one in seconds)
    best, n = min(runs, default=None), len(runs)
    return Measure("cost", metric, label, "model", unit, "down", "down", best, n, help=help, runs=runs)


def _timed(model: nn.Module, run: Callable[[], Any], times: int) -> list[float]:
    """Seconds of warm runs."""
    return in_turn({"": run}, times, next(model.parameters()).device)[""]


def _input(model: nn.Module, sample: Encoded | None) -> tuple[Batch, str, int]:
    """What one forward reads, what that is called, and how many of them it is; nothing where it is not known."""
    config: Any = getattr(model, "config", None)
    if sample is not None and "pixel_values" in sample and "input_ids" not in sample:
        return {"pixel_values": sample["pixel_values"][None]}, "image", 1
    vocabulary = getattr(config, "vocab_size", None)
    if getattr(model, "main_input_name", "input_ids") == "input_ids" and vocabulary:
        length = min(SEQUENCE, getattr(config, "max_position_embeddings", None) or SEQUENCE)
        return {"input_ids": torch.arange(length)[None] % vocabulary}, "token", length
    if sample is not None:
        read = inspect.signature(getattr(model, "get_base_model", lambda: model)().forward).parameters
        return {name: value[None] for name, value in sample.items() if name in read and name != "labels"}, "example", 1
    size, channels = getattr(config, "image_size", None), getattr(config, "num_channels", None)
    if size is None or channels is None or getattr(model, "main_input_name", None) != "pixel_values":
        return {}, "example", 1
    height, width = (size, size) if isinstance(size, int) else size
    return {"pixel_values": torch.zeros(1, channels, height, width)}, "image", 1


@torch.no_grad()
def flops(model: nn.Module, batch: Batch) -> int:
    """Floating-point operations of one forward in eval mode, two per multiply-add."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        invoke(model, batch)
    return counter.get_total_flops()
