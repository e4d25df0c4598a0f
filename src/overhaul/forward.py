"""What a network is given of a batch, and what of its answer is looked at: one call for every class of network."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from overhaul.errors import RequestError


def forward(model: nn.Module, batch: Mapping[str, Tensor], *, states: bool = False) -> Tensor:
    """Logits of a Hugging Face model, or of any module that takes these inputs and returns logits or an object with them.

    A module is given the columns of the batch that its signature names, labels apart, or those in its attribute `reads`.
    A batch of pairs (`other_input_ids` [b, t'] and `other_attention_mask` beside the rest) gives [2b, max(t, t'), v]: first
    the b sequences, then the b others.

    Args:
        model: the model.
        batch: a collated batch.
        states: of a model without a head, its last hidden states [b, t, d] will do.

    Raises:
        RequestError: the model has no head, or reads one text and writes another.
    """
    if "other_input_ids" in batch:
        batch = _one_below_the_other(batch)
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False) and "decoder_input_ids" not in batch:
        raise RequestError(encodes_and_decodes(type(model).__name__))
    out: Any = model(**read_by(model, batch))
    if isinstance(out, Tensor):
        return out
    held = out if isinstance(out, Mapping) else vars(out)
    found = next((held[name] for name in (*LOGITS, *[STATES] * states) if name in held), None)
    if found is None:
        raise RequestError(without_head(type(model).__name__))
    return found


LOGITS = ("logits", "logits_per_image", "sample")
"""What a model calls its main output: classifiers and language models, CLIP, the networks of diffusers."""

STATES = "last_hidden_state"
"""What a model without a head gives."""


def without_padding(name: str) -> str:
    """What is said of a classifier whose config lacks what it finds the end of a text by."""
    return (
        f"{name} finds the end of a text by its padding, and its config names no pad_token_id. Write one into config.json: "
        "the number of a token that no text ends with."
    )


def headless(model: nn.Module) -> bool:
    """Whether a model of transformers is a network without a head, which gives hidden states and no logits."""
    from transformers import MODEL_MAPPING, PreTrainedModel

    if not isinstance(model, PreTrainedModel) or getattr(model, "base_model", model) is not model:
        return False
    known = MODEL_MAPPING.get(type(model.config), ())
    plain = vars(type(model)).get("plain", type(model))  # of a converted class
    return plain in (known if isinstance(known, list | tuple) else (known,)) and not hasattr(model, "logit_scale")


def without_head(name: str) -> str:
    """What is said where logits are needed and the class has no head."""
    return (
        f"{name} has no head: it gives hidden states and no logits, so no loss or metric of tokens or classes can be had "
        "from it. `shrink.drop_layers` and `shrink.heal` with `target: states` need none; else take a model that has one."
    )


def encodes_and_decodes(name: str) -> str:
    """What is said where a class reads one text and writes another."""
    return (
        f"{name} is an encoder-decoder: it reads one text and writes another, and examples here are one sequence each, so "
        "no loss can be had from it. Its encoder alone (T5EncoderModel), or a decoder-only model, can be worked on."
    )


INPUTS = {"pixel_values": "images", "input_ids": "tokens"}
"""What models read, by the name of the argument."""


def check_reads(model: nn.Module, columns: Collection[str], what: str = "The data") -> None:
    """Whether a model reads images where there are images, and tokens where there are tokens.

    Args:
        model: the model.
        columns: of a batch or an example.
        what: which data it is, for messages.

    Raises:
        RequestError: it reads the other of the two.
    """
    named = inspect.signature(_inner(model).forward).parameters
    given, wanted = ([name for name in INPUTS if name in names] for names in (columns, named))
    if given and wanted and not set(given) & set(wanted) and not getattr(model, "reads", ()):
        has, reads = (" and ".join(INPUTS[name] for name in names) for names in (given, wanted))
        raise RequestError(
            f"{what} holds {has}, which {type(model).__name__} does not take: it reads {reads}. Give {reads}, or a model "
            f"that reads {has}."
        )


def read_by(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Any]:
    """What of a batch the model is given, without a cache."""
    if reads := getattr(model, "reads", ()):
        return {name: batch[name] for name in reads}
    check_reads(model, batch)
    inner = _inner(model)
    named = inspect.signature(inner.forward).parameters
    given: dict[str, Any] = {name: value for name, value in batch.items() if name in named and name != "labels"}
    if not given:  # it takes whatever it is given
        given = {name: batch[name] for name in ("pixel_values", "input_ids", "attention_mask") if name in batch}
    if (labels := batch.get("labels")) is not None and labels.ndim == 1 and "input_ids" in given:
        given["input_ids"] = _padded_for(inner, given["input_ids"], batch.get("attention_mask"))
    if "attention_mask" in named:
        given.setdefault("attention_mask", None)
    return {**given, **({"use_cache": False} if caches(inner) else {})}


def _inner(model: nn.Module) -> nn.Module:
    inner = getattr(model, "module", model)  # of a distributed wrapper
    return getattr(inner, "get_base_model", lambda: inner)()  # peft's forward names no arguments


def caches(model: nn.Module) -> bool:
    """Whether `use_cache` tells the model to keep what it read; some that generate only pass it on to where it is named."""
    named = inspect.signature(model.forward).parameters
    passed_on = any(value.kind is inspect.Parameter.VAR_KEYWORD for value in named.values())
    return "use_cache" in named or (passed_on and getattr(model, "can_generate", lambda: False)())


def _padded_for(model: nn.Module, ids: Tensor, mask: Tensor | None) -> Tensor:
    """The tokens of texts that have a class, padded as the model's config says: some find a text's end by the padding.

    Raises:
        RequestError: such a model is to find the end of several texts, and its config names no padding.
    """
    config: Any = getattr(model, "config", None)
    if mask is None or config is None or (bool(mask.all()) and len(ids) == 1):
        return ids
    pad = config.get_text_config().pad_token_id if hasattr(config, "get_text_config") else None
    if pad is not None:
        return ids.masked_fill(mask == 0, pad)
    if hasattr(model, "score"):  # of transformers' decoders with a classifier
        raise RequestError(without_padding(type(model).__name__))
    return ids


def input_table(model: nn.Module) -> nn.Embedding | None:
    """The embedding of words, or None where the model has none: images, and modules of one's own."""
    find: Any = getattr(model, "get_input_embeddings", lambda: None)
    try:
        table = find()
    except (AttributeError, NotImplementedError):
        return None
    return table if isinstance(table, nn.Embedding) else None


def output_head(model: nn.Module) -> nn.Module | None:
    """The module that makes logits of hidden states, or None where the model names none."""
    find = getattr(model, "get_output_embeddings", None)
    try:
        return find() if find is not None else None
    except NotImplementedError:
        return None


def _one_below_the_other(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # the others are padded to one width over all data, of which a batch may need less
    lengths = {"": batch["input_ids"].shape[1], "other_": int(batch["other_attention_mask"].sum(dim=1).max())}
    width = max(lengths.values())
    return {
        name: torch.cat(
            [F.pad(batch[side + name][:, :length], (0, width - length)) for side, length in lengths.items()]
        )
        for name in ("input_ids", "attention_mask")
    }
