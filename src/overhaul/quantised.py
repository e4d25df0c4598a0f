"""Quantised checkpoints: opened as the plain model where transformers can do so without a GPU, refused by name otherwise.

What is opened is worked on and saved as a plain model, in the dtype that config.json names; it is not quantised again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

from torch import nn

from overhaul.checkpoints import Checkpoint
from overhaul.errors import RequestError


def _fp8() -> Any:
    from transformers import FineGrainedFP8Config

    return FineGrainedFP8Config(dequantize=True)


def _mxfp4() -> Any:
    from transformers.utils.quantization_config import Mxfp4Config

    return Mxfp4Config(dequantize=True)


def _compressed() -> Any:
    from transformers import CompressedTensorsConfig

    return CompressedTensorsConfig(dequantize=True)


PLAIN: Mapping[str, Callable[[], Any]] = {"fp8": _fp8, "mxfp4": _mxfp4, "compressed-tensors": _compressed}
"""The methods whose weights transformers turns into plain ones as it loads them, on a CPU."""

_NEEDS = {"compressed-tensors": "compressed_tensors"}
"""What has to be installed besides."""


def loading(known: Checkpoint) -> dict[str, Any]:
    """What `from_pretrained` is told besides, so that a quantised checkpoint becomes a plain model; nothing for a plain one.

    Raises:
        RequestError: transformers cannot do so here.
    """
    given = known.config.get("quantization_config")
    if given is None:
        return {}
    if not given:
        raise RequestError(
            f"{known.folder / 'config.json'}: `quantization_config` is {given!r} and names no method. Remove the entry."
        )
    method = given.get("quant_method") if isinstance(given, Mapping) else None
    if method is None and isinstance(given, Mapping) and any(name.startswith("load_in_") for name in given):
        method = "bitsandbytes"
    if not isinstance(method, str) or method not in PLAIN:
        raise RequestError(
            f"{known.source} is quantised ({method or given!r} in quantization_config of config.json), and transformers "
            "cannot turn that into plain weights without a GPU and the library that made it. Take the checkpoint that it "
            "was made from, or dequantise it where that library runs and save the plain model."
        )
    needed = _NEEDS.get(method)
    if needed and find_spec(needed) is None:
        raise RequestError(
            f"{known.source} is quantised with {method}; to turn it into plain weights, `pip install {method}`."
        )
    return {"quantization_config": PLAIN[method]()}


def forget_quantisation(model: Any) -> nn.Module:
    """A model that was loaded as a plain one no longer says that it is quantised, so that it is saved as a plain one."""
    for part in (
        model.config,
        *(getattr(model.config, name, None) for name in getattr(model.config, "sub_configs", ())),
    ):
        if part is not None:
            vars(part).pop("quantization_config", None)
    # among the conversions is the one from quantised weights, which saving would take back
    for name in ("hf_quantizer", "quantization_method", "is_quantized", "_weight_conversions"):
        vars(model).pop(name, None)
    return model
