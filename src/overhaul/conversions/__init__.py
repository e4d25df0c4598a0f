"""Conversions: modules built onto a class, recorded with their arguments, so that the model can be saved and loaded again.

    @conversion
    def attention_residuals(model, *, size: int) -> None: ...            # builds modules, with memory or without (meta)

    convert(model, "attention_residuals", size=6, starts_as_identity=True)

1. A converted model is an object of a class derived from its own, which builds as that one does and replays the records.
   So whatever builds a model from its class and config (loading, planning, cutting layers) has the modules too.
2. The record stands in config.json: {"class": ..., "model_type": ..., "conversions": [{name, module, version, arguments}]}.
   Architecture, model type and names of the weight files are ours, so plain transformers refuses by name and does not open
   half a model. After `import overhaul` its Auto classes open the folder, without remote code.
3. A record names a module under `overhaul`, which is imported where the conversion is not known yet. A conversion of
   somebody else's has to be imported before its models are opened: no code is looked for in a folder.
4. A conversion exchanges modules and parameters; it does not write into tensors that are there.
5. A `late` one builds nothing that is stored (a path over the blocks). It is applied once the weights are loaded.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from overhaul.conversions.classes import mark
from overhaul.conversions.records import Conversion, conversion, known_as, recorded_by, records
from overhaul.errors import RequestError, RunError
from overhaul.modes import at_rest

__all__ = ["conversion", "convert", "made_up_inputs", "records", "revert"]


def convert(
    model: nn.Module,
    name: str,
    *,
    starts_as_identity: bool = False,
    inputs: Mapping[str, Any] | None = None,
    **arguments: Any,
) -> float | None:
    """Build modules onto a model, in place, and record them so that saving and opening keep them.

    Args:
        model: a transformers or diffusers model without a path in force.
        name: of a conversion that has been imported.
        starts_as_identity: the conversion claims to change no output; refused where it does.
        inputs: keyword arguments of the model on which the outputs are compared; some random tokens or pixels if None.
        arguments: of the conversion.

    Returns:
        The largest difference between an output (a logit, where there are logits) before and after; None where `inputs`
        is None and none could be made up.

    Raises:
        RequestError: the conversion is not known, does not fit the model, or cannot be recorded.
        RunError: the outputs differ although they should not, or the class would not load back what was built. In all
            cases the model is as it was.
    """
    one = known_as(name)
    record = one.record(**arguments)
    _check(model, one)
    inputs = made_up_inputs(model) if inputs is None else inputs
    if inputs is None and starts_as_identity:
        raise RequestError(
            f"Whether {name} starts as the identity shows on inputs, and none could be made up for "
            f"{type(model).__name__}. Give `inputs`: keyword arguments of the model."
        )
    before = None if inputs is None else _outputs(model, inputs)
    with _restored_on_error(model):
        there = set(model.modules())
        one.build(model, **record["arguments"])
        for module in set(model.modules()) - there:
            module.training = model.training
        mark(model, [*records(model), record])
        _check_rebuilt(model, name)
        if before is None or inputs is None:
            return None
        after = _outputs(model, inputs)
        difference = float((after - before).abs().max()) if after.shape == before.shape else float("inf")
        limit = torch.finfo(next(model.parameters()).dtype).eps ** 0.5 * max(1.0, float(before.abs().max()))
        if starts_as_identity and not difference <= limit:
            raise RunError(
                f"{name} should start as the identity, but an output differs by {difference:.2g} (limit {limit:.1g}, "
                f"largest output {float(before.abs().max()):.3g}). The model is as it was."
            )
        return difference


def revert(model: nn.Module, name: str) -> None:
    """Take the last conversion back, in place; a model without any is a plain one of its class again.

    Raises:
        RequestError: the last conversion is another one, or has no inverse.
    """
    kept = records(model)
    if not kept or kept[-1]["name"] != name:
        done = ", ".join(record["name"] for record in kept) or "none"
        raise RequestError(f"{name} is not the last conversion of this {type(model).__name__}, which has: {done}.")
    one = recorded_by(kept[-1])
    if one.inverse is None:
        raise RequestError(f"The conversion {name} has no inverse: the model stays a converted one.")
    with _restored_on_error(model):
        one.inverse(model, **kept[-1]["arguments"])
        mark(model, kept[:-1])
        _check_rebuilt(model, f"the inverse of {name}")


def _check(model: nn.Module, one: Conversion) -> None:
    from overhaul.stack.arrangement import is_hub_model
    from overhaul.stack.paths import follows

    if not is_hub_model(model):
        raise RequestError(
            f"{type(model).__name__} has no config that could record a conversion; only hub models have."
        )
    if one.late:
        raise RequestError(f"{one.name} is not built: it is put in force, and saving records it.")
    if follows(model):
        raise RequestError(
            f"The model follows a path. Close it, or `take` it for good, before {one.name} builds onto it."
        )


def _check_rebuilt(model: nn.Module, name: str) -> None:
    """Refuse a conversion whose record would build something else than is there."""
    from overhaul.stack.arrangement import unlike_its_class

    wrong = unlike_its_class(model)
    if wrong:
        raise RunError(
            f"{name} built onto this {type(model).__name__} what its record does not build again: {wrong[0]}. "
            "The model is as it was."
        )


@contextmanager
def _restored_on_error(model: nn.Module) -> Iterator[None]:
    """If something is raised, the model consists of the modules and tensors of before."""
    kind, config = type(model), copy.deepcopy(getattr(model, "config", None))
    before = [
        (module, {k: copy.copy(v) if isinstance(v, dict) else v for k, v in vars(module).items()})
        for module in model.modules()
    ]
    try:
        yield
    except BaseException:
        model.__class__ = kind
        for module, content in before:
            vars(module).clear()
            vars(module).update(content)
        if config is not None and not isinstance(config, Mapping):
            vars(model.config).clear()
            vars(model.config).update(vars(config))
        raise


@torch.no_grad()
def _outputs(model: Any, inputs: Mapping[str, Any]) -> Tensor:
    """The logits, or the first tensor that is returned, in float32."""
    device = next(model.parameters()).device
    moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
    with at_rest(model):
        out = model(**moved)
    logits = getattr(out, "logits", None)
    found = logits if isinstance(logits, Tensor) else next(v for v in out.values() if isinstance(v, Tensor))
    return found.float()


def made_up_inputs(model: Any) -> dict[str, Tensor] | None:
    """Some random tokens or pixels, the same at each call; None for a model that reads something else."""
    config = model.config
    draw = torch.Generator().manual_seed(0)
    name = getattr(model, "main_input_name", None)
    rows = getattr(config, "vocab_size", None)
    if name == "input_ids" and isinstance(rows, int):
        ids = torch.randint(rows, (2, 12), generator=draw)
        return {"input_ids": ids, **({"decoder_input_ids": ids} if config.is_encoder_decoder else {})}
    size, channels = getattr(config, "image_size", None), getattr(config, "num_channels", None)
    if name == "pixel_values" and isinstance(size, int) and isinstance(channels, int):
        return {"pixel_values": torch.randn(2, channels, size, size, generator=draw)}
    return None
