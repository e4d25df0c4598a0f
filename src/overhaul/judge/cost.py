"""What a model costs: parameters, bytes on disk, FLOPs and time.

FLOPs are counted by `torch.utils.flop_counter` on one forward, two per multiply-add. Attention is counted as if no
position were masked, and is routed through plain matrix products while counting: the fused kernel of the CPU is
invisible to the counter.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from overhaul.data.examples import Batch, Encoded
from overhaul.judge.generation import generate, generates
from overhaul.judge.measure import Measure
from overhaul.modes import at_rest
from overhaul.stack.calls import invoke

SEQUENCE = 128
NEW_TOKENS = 16
WARM_UPS, FORWARDS, GENERATIONS = 2, 20, 5
ENOUGH_SECONDS = 20.0
"""After so long, fewer runs have to do: a large model on a CPU would be timed for hours."""


def cost(model: nn.Module, folder: Path | None = None, sample: Encoded | None = None) -> list[Measure]:
    """Size, work and speed of a model; times are the fastest of some warm runs of one example.

    The fastest, since whatever else a machine does only adds to a run, and stages are timed minutes apart.

    Args:
        model: any network, on any device.
        folder: where it is saved; without it, bytes on disk are left out.
        sample: one example, for what the config of a model that reads no tokens does not tell: the shape of an image, or all
            inputs of a network of another kind.

    Returns:
        Measures of the group "cost": parameters, bytes_on_disk, flops (per token, in a sequence of 128, per image or per
        example), latency (one forward of that) and, where the model generates, decode_latency (per token, with the cache).
        FLOPs and latency are None where no input of the model is known.
    """
    batch, per, tokens = _input(model, sample)
    batch = {name: value.to(next(model.parameters()).device) for name, value in batch.items()}
    measures = [
        _cost("parameters", "parameters", "numbers in the weights", "", sum(p.numel() for p in model.parameters()))
    ]
    if folder is not None:
        size = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
        measures.append(_cost("bytes_on_disk", "bytes on disk", "size of the weights", "bytes", size))
    what = f"a forward of {tokens} tokens" if per == "token" else f"a forward of one {per}"
    latency = "prefill latency" if per == "token" else "latency"
    if not batch:
        unknown = [("flops", "FLOPs", "work", "FLOPs"), ("latency", latency, what, "ms")]
        return [*measures, *(_cost(*each, value=None) for each in unknown)]
    with at_rest(model):
        work = flops(model, batch) / tokens
        measures.append(_cost("flops", f"FLOPs per {per}", f"work for one {per}", f"FLOPs/{per}", work))
        seconds, n = _fastest(model, lambda: invoke(model, batch), FORWARDS)
        measures.append(_cost("latency", latency, what, "ms", 1e3 * seconds, n))
        if per == "token" and generates(model):
            prompt = batch["input_ids"][0, :NEW_TOKENS]
            seconds, n = _fastest(model, lambda: generate(model, [prompt], NEW_TOKENS, ()), GENERATIONS)
            per_token = 1e3 * seconds / NEW_TOKENS
            measures.append(_cost("decode_latency", "decode latency", "generating one token", "ms/token", per_token, n))
    return measures


def _cost(metric: str, label: str, help: str, unit: str, value: float | None, n: int = 1) -> Measure:
    known = None if value is None else float(value)
    return Measure("cost", metric, label, "model", unit, "down", "down", known, n, help=help)


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


@torch.no_grad()
def _fastest(model: nn.Module, run: Callable[[], Any], times: int) -> tuple[float, int]:
    """Seconds of the fastest of `times` warm runs, or of as many as fit into `ENOUGH_SECONDS`, and how many those were."""
    device = next(model.parameters()).device
    spent: list[float] = []
    while len(spent) < WARM_UPS + times and sum(spent) < ENOUGH_SECONDS:
        started = time.perf_counter()
        run()
        _wait(device)
        spent.append(time.perf_counter() - started)
    warm = spent[WARM_UPS:] or spent[-1:]
    return min(warm), len(warm)


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
