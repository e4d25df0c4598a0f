"""What a model costs: parameters, bytes on disk and FLOPs, which are exact, and time, which is compared with others' time.

FLOPs are counted by `torch.utils.flop_counter` on one forward, two per multiply-add. Attention is counted as if no
position were masked, and is routed through plain matrix products while counting: the fused kernel of the CPU is
invisible to the counter.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from overhaul.data.examples import Batch, Encoded
from overhaul.generation import generate, generates
from overhaul.judge.measure import Measure
from overhaul.judge.timing import in_turn
from overhaul.modes import at_rest
from overhaul.positions import most_positions
from overhaul.stack.calls import invoke

SEQUENCE = 128
NEW_TOKENS = 16
FORWARDS, GENERATIONS = 20, 5


def cost(model: nn.Module, stored: int | None = None, sample: Encoded | None = None) -> list[Measure]:
    """Size and work of a model.

    Args:
        model: any network, on any device.
        stored: bytes of its weights on disk; without them, they are left out.
        sample: one example, for what the config of a model that reads no tokens does not tell: the shape of an image, or all
            inputs of a network of another kind.

    Returns:
        Measures of the group "cost": parameters, bytes_on_disk, flops (per token, in a sequence of 128, per image or per
        example). FLOPs are None where no input of the model is known.
    """
    batch, per, count = _input(model, sample)
    measures = [_cost("parameters", "parameters", "", sum(p.numel() for p in model.parameters()))]
    if stored is not None:
        measures.append(_cost("bytes_on_disk", "weights on disk", "bytes", stored))
    with at_rest(model):
        work = flops(model, batch) / count if batch else None
    return [*measures, _cost("flops", f"FLOPs per {per}", f"FLOPs/{per}", work, "two for each multiply-add")]


def times(models: Mapping[str, nn.Module], sample: Encoded | None = None) -> dict[str, list[Measure]]:
    """How fast models are: the fastest of some warm runs of one example, in which all of them take turns.

    The fastest, since whatever else a machine does only adds to a run. All runs are kept beside it: they tell whether two
    models differ.

    Args:
        models: by name, held together, all on one device.
        sample: as in `cost`.

    Returns:
        For each, measures of the group "cost": latency (one forward: the prefill of a language model), None where no input
        of the model is known, and, where the model generates, decode_latency (per token, with the cache).
    """
    inputs = {name: _input(model, sample) for name, model in models.items()}
    read = {name: batch for name, (batch, _, _) in inputs.items() if batch}
    decode = [name for name, (_, per, _) in inputs.items() if per == "token" and generates(models[name])]
    with ExitStack() as resting:
        for model in models.values():
            resting.enter_context(at_rest(model))
        forwards = {name: partial(invoke, models[name], batch) for name, batch in read.items()}
        runs = _timed(models, forwards, FORWARDS)
        prompts = {name: [read[name]["input_ids"][0, :NEW_TOKENS]] for name in decode}
        writing = {name: partial(generate, models[name], prompts[name], NEW_TOKENS, ()) for name in decode}
        tokens = {name: [s / NEW_TOKENS for s in each] for name, each in _timed(models, writing, GENERATIONS).items()}
    found: dict[str, list[Measure]] = {}
    for name, (_, per, count) in inputs.items():
        label, what = ("prefill latency", f"{count} tokens") if per == "token" else ("latency", f"one {per}")
        found[name] = [_time("latency", label, "ms", runs.get(name, []), f"one forward of {what}")]
        if name in tokens:
            found[name].append(
                _time("decode_latency", "decode latency", "ms/token", tokens[name], "generating one token")
            )
    return found


def _cost(metric: str, label: str, unit: str, value: float | None, help: str = "") -> Measure:
    known = None if value is None else float(value)
    return Measure("cost", metric, label, "model", unit, "down", "down", known, 1, help=help)


def _time(metric: str, label: str, unit: str, seconds: list[float], help: str) -> Measure:
    runs = tuple(1e3 * one for one in seconds)
    best, n = min(runs, default=None), len(runs)
    return Measure("cost", metric, label, "model", unit, "down", "down", best, n, help=help, runs=runs)


def _timed(
    models: Mapping[str, nn.Module], calls: Mapping[str, Callable[[], Any]], count: int
) -> dict[str, list[float]]:
    """Seconds of warm runs of each, in turn; of nothing, nothing."""
    return in_turn(calls, count, _device(next(iter(models.values())))) if calls else {}


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _input(model: nn.Module, sample: Encoded | None) -> tuple[Batch, str, int]:
    """What one forward reads, on the model's device, what that is called, and how many of them it is."""
    batch, per, count = _known(model, sample)
    return {name: value.to(_device(model)) for name, value in batch.items()}, per, count


def _known(model: nn.Module, sample: Encoded | None) -> tuple[Batch, str, int]:
    """As `_input`; nothing where it is not known."""
    config: Any = getattr(model, "config", None)
    if sample is not None and "pixel_values" in sample and "input_ids" not in sample:
        return {"pixel_values": sample["pixel_values"][None]}, "image", 1
    vocabulary = getattr(config, "vocab_size", None)
    if getattr(model, "main_input_name", "input_ids") == "input_ids" and vocabulary:
        length = min(SEQUENCE, most_positions(model) or SEQUENCE)
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
