"""Losses as sums and counts, so that normalisation happens once, over a whole optimizer step (`fit`).

Every function takes the model's logits and the batch and returns one value per token or per sequence in float32.
Logits are [b, t, v] for language and [b, classes] for images; labels are [b, t] or [b], with -100 where no loss falls.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from overhaul.data.examples import IGNORED, Batch


@dataclass(frozen=True)
class Term:
    """One part of an objective.

    Attributes:
        role: the data it reads.
        loss: (logits, batch) -> the *sum* of the loss over its units, a float32 scalar.
        count: batch -> the number of those units (tokens or sequences), known before any forward.
        weight: its share in the total: total = sum over terms of weight * (sum of sums) / (sum of counts).
        name: how curves and errors call it.
    """

    role: str
    loss: Callable[[Tensor, Batch], Tensor]
    count: Callable[[Batch], int]
    weight: float = 1.0
    name: str = "loss"


@dataclass(frozen=True)
class Penalty:
    """A part of an objective that reads the weights and no batch: it counts once in every optimizer step.

    Attributes:
        loss: the parameters that train, by name -> a float32 scalar. Under FSDP2 a parameter is gathered when it is looked
            up, so a penalty on some of them should look up no others.
        weight: its share in the total.
        name: how curves and errors call it.
    """

    loss: Callable[[Mapping[str, Tensor]], Tensor]
    weight: float = 1.0
    name: str = "penalty"


def forward(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Logits of a Hugging Face model, or of any module that takes these inputs and returns logits or an object with them.

    A module is given the columns of the batch that its signature names, labels apart, or those in its attribute `reads`.
    A batch of pairs (`other_input_ids` [b, t'] and `other_attention_mask` beside the rest) gives [2b, max(t, t'), v]: first
    the b sequences, then the b others.
    """
    if "other_input_ids" in batch:
        batch = _one_below_the_other(batch)
    out: Any = model(**read_by(model, batch))
    return out if isinstance(out, Tensor) else next(out[name] for name in LOGITS if name in out)


LOGITS = ("logits", "logits_per_image", "sample")
"""What a model calls its main output: classifiers and language models, CLIP, the networks of diffusers."""


def read_by(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Any]:
    """What of a batch the model is given, without a cache."""
    if reads := getattr(model, "reads", ()):
        return {name: batch[name] for name in reads}
    inner = getattr(model, "module", model)  # of a distributed wrapper
    inner = getattr(inner, "get_base_model", lambda: inner)()  # peft's forward names no arguments
    named = inspect.signature(inner.forward).parameters
    given: dict[str, Any] = {name: value for name, value in batch.items() if name in named and name != "labels"}
    if not given:  # it takes whatever it is given
        given = {name: batch[name] for name in ("pixel_values", "input_ids", "attention_mask") if name in batch}
    if "attention_mask" in named:
        given.setdefault("attention_mask", None)
    return {**given, **({"use_cache": False} if "use_cache" in named else {})}


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


def token_nll(logits: Float[Tensor, "b t v"], labels: Int[Tensor, "b t"]) -> Float[Tensor, "b t-1"]:
    """Negative log-likelihood of each next token in nats, float32; zero where the label is -100."""
    flat = logits[:, :-1].float().flatten(0, 1)
    nll = F.cross_entropy(flat, labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="none")
    return nll.view(labels.shape[0], -1)


def sequence_nll(logits: Tensor, labels: Tensor) -> Float[Tensor, " b"]:
    """Negative log-likelihood of each whole answer in nats: the sum over its tokens, no prompt and no padding.

    Args:
        logits: [b, t, v], or [b, classes]: the label of an image is an answer of one token.
        labels: [b, t], or [b].
    """
    if labels.ndim == 1:
        return F.cross_entropy(logits.float(), labels, reduction="none")
    return token_nll(logits, labels).sum(dim=1)


def pair_nll(logits: Float[Tensor, "2b t v"], batch: Batch) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
    """`sequence_nll` of both sequences of each pair, from the logits of `forward` on a batch with `other_labels`."""
    parts = zip(logits.chunk(2), (batch["labels"], batch["other_labels"]), strict=True)
    first, other = (sequence_nll(rows[:, : y.shape[1]], y[:, : rows.shape[1]]) for rows, y in parts)
    return first, other


def answer_tokens(batch: Batch) -> int:
    """Number of positions that carry loss: labels that are predicted (the first position never is)."""
    return int((batch["labels"][:, 1:] != IGNORED).sum())


def sequences(batch: Batch) -> int:
    """Number of examples in the batch."""
    return int(batch["labels"].shape[0])


def cross_entropy_sum(logits: Tensor, batch: Batch) -> Tensor:
    """Summed cross-entropy: over answer tokens for language, over images otherwise."""
    labels = batch["labels"]
    if labels.ndim == 1:
        return F.cross_entropy(logits.float(), labels, reduction="sum")
    return token_nll(logits, labels).sum()


def units(batch: Batch) -> int:
    """What `cross_entropy_sum` sums over: answer tokens or images."""
    return sequences(batch) if batch["labels"].ndim == 1 else answer_tokens(batch)


def cross_entropy(role: str, weight: float = 1.0, name: str = "cross-entropy") -> Term:
    """Mean next-token (or class) cross-entropy on one role."""
    return Term(role, cross_entropy_sum, units, weight, name)


def kl_sum(logits: Tensor, reference: Tensor, labels: Tensor) -> Tensor:
    """Sum over loss-carrying positions of KL(reference || model) in nats, both given as logits."""
    if labels.ndim > 1:
        keep = labels[:, 1:] != IGNORED
        logits, reference = logits[:, :-1][keep], reference[:, :-1][keep]
    ours = F.log_softmax(logits.float(), dim=-1)
    theirs = F.log_softmax(reference.float(), dim=-1)
    return F.kl_div(ours, theirs, reduction="sum", log_target=True)


@torch.no_grad()
def evaluate(model: nn.Module, term: Callable[[Tensor, Batch], Tensor], batches: list[Batch]) -> list[Tensor]:
    """`term(logits, batch)` for each batch without gradients, model in eval mode; the mode is put back afterwards."""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    try:
        moved = ({k: v.to(device) for k, v in batch.items()} for batch in batches)
        return [term(forward(model, batch), batch) for batch in moved]
    finally:
        model.train(was_training)
