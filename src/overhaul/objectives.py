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

from overhaul.data.examples import IGNORED, Batch, Examples
from overhaul.errors import RequestError
from overhaul.modes import at_rest
from overhaul.positions import most_positions


@dataclass(frozen=True)
class Term:
    """One part of an objective.

    Attributes:
        role: the data it reads.
        loss: (logits, batch) -> the *sum* of the loss over its units, a float32 scalar. With `reads`, it is given a third
            argument: the hidden states by site.
        count: batch -> the number of those units (tokens or sequences), known before any forward.
        weight: its share in the total: total = sum over terms of weight * (sum of sums) / (sum of counts). A function of
            the training's `Ledger` is asked before each step, and while it says 0 the term is not run. The number 0 marks
            a watch, which is run without gradient for its curve.
        name: how curves and errors call it.
        reads: sites whose hidden states it needs beside the logits, such as "leaving.3", see `trace.capture`; states of
            the same forward, through which its gradient flows.
        answers_only: whether it reads logits and labels through the label alone: logits at positions that carry no loss
            need not be made then, and `batch["labels"]` may be shorter, see `forward_answers`.
        states: whether it reads the last hidden states of a model without a head in the place of logits.
    """

    role: str
    loss: Callable[..., Tensor]
    count: Callable[[Batch], int]
    weight: float | Callable[[Any], float] = 1.0
    name: str = "loss"
    reads: tuple[str, ...] = ()
    answers_only: bool = False
    states: bool = False


@dataclass(frozen=True)
class Penalty:
    """A part of an objective that reads the weights and no batch: it counts once in every optimizer step.

    Attributes:
        loss: the parameters that train, by name -> a float32 scalar. Under FSDP2 a parameter is gathered when it is looked
            up, so a penalty on some of them should look up no others.
        weight: its share in the total, or a function of the training's `Ledger` that says it before each step.
        name: how curves and errors call it.
    """

    loss: Callable[[Mapping[str, Tensor]], Tensor]
    weight: float | Callable[[Any], float] = 1.0
    name: str = "penalty"


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


def one_class(of_data: bool) -> str:
    """What is said where of a model and its data one has classes and the other has not."""
    if of_data:
        return "The data has one class for each text, but the model is no classifier: it gives logits for each token."
    return (
        "The model is a classifier, which gives logits for each text, but the data has none: give the texts with a column "
        "`label`, as `as: classified`."
    )


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


def check_positions(model: nn.Module, examples: Examples) -> None:
    """Whether the model has a position for every token, also of what was made of the data: another answer or question.

    Raises:
        RequestError: an example is longer.
    """
    most = most_positions(model)
    if examples.kind not in ("tokens", "pairs") or most is None or (found := examples.beyond(most)) is None:
        return
    place, size = found
    row = examples.rows[place] if examples.rows else {}
    said = str(next(iter(row.values()), ""))[:60]
    raise RequestError(
        f"An example has {size} tokens and the model ends at {most} positions; it begins with {said!r}. Shorten its "
        "question or its answers; wrong and paraphrased ones and refusals count too."
    )


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
    if (labels := batch.get("labels")) is not None and labels.ndim == 1 and "input_ids" in given:
        given["input_ids"] = _padded_for(inner, given["input_ids"], batch.get("attention_mask"))
    if "attention_mask" in named:
        given.setdefault("attention_mask", None)
    return {**given, **({"use_cache": False} if caches(inner) else {})}


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


SPARED = 0.8
"""Logits are made at the answers' positions alone where these are at most this share of all."""


def forward_answers(model: nn.Module, batch: Batch) -> tuple[Tensor, Batch]:
    """`forward` with logits at the positions that carry loss, and the batch with labels to match.

    The hidden states that enter the output head are gathered to the k positions of each row whose next label counts (k of
    the row that has most), so the head, the softmax and their gradients cost that much less: `logits` are [b, k + 1, v] and
    `labels` [b, k + 1], and `logits[:, :-1]` belongs to `labels[:, 1:]` as ever. Every loss that reads logits where labels
    count is the same up to rounding. Pairs are treated likewise. Where little would be spared, the model names no output
    head, or its head sees something else than one state a position, this is `forward` and the batch itself.
    """
    head = output_head(model)
    labels = batch.get("labels")
    if head is None or labels is None or labels.ndim != 2 or "pixel_values" in batch:
        return forward(model, batch), batch
    sides = [labels]
    if "other_input_ids" in batch:
        sides.append(batch["other_labels"])
    kept = [side[:, 1:] != IGNORED for side in sides]
    most = max(int(keep.sum(dim=1).max()) for keep in kept)
    if most + 1 > SPARED * max(side.shape[1] for side in sides):
        return forward(model, batch), batch
    places = [_first(keep, most) for keep in kept]
    index = torch.cat([place for place, _ in places])
    gathered: list[bool] = []

    def gather(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        state = args[0] if args else None
        gathered.append(isinstance(state, Tensor) and _fits(state, index))
        if not (gathered[-1] and isinstance(state, Tensor)):
            return None
        return (state.gather(1, index[..., None].expand(-1, -1, state.shape[2])), *args[1:])

    hook = head.register_forward_pre_hook(gather)
    try:
        logits = forward(model, batch)
    finally:
        hook.remove()
    if gathered != [True] or logits.shape[:2] != index.shape:
        return (logits if not any(gathered) else forward(model, batch)), batch
    shorter = {
        name: F.pad(side[:, 1:].gather(1, place[:, :-1]).masked_fill(~real, IGNORED), (1, 0), value=IGNORED)
        for name, side, (place, real) in zip(("labels", "other_labels"), sides, places, strict=False)
    }
    return logits, {**batch, **shorter}


def _fits(state: Tensor, index: Tensor) -> bool:
    return state.ndim == 3 and len(state) == len(index) and int(index.max()) < state.shape[1]


def _first(keep: Tensor, most: int) -> tuple[Int[Tensor, "b k+1"], Tensor]:
    """Of each row the places where `keep` [b, t - 1] holds, then any; and which of the first `most` are real, [b, most]."""
    order = torch.argsort(keep.to(torch.int8), dim=1, descending=True, stable=True)[:, :most]
    missing = most - order.shape[1]  # of pairs, the other side may be wider
    return F.pad(order, (0, missing + 1)), F.pad(keep.gather(1, order), (0, missing))


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
    """Summed cross-entropy: over answer tokens for language, over images (or texts with a class) otherwise.

    Raises:
        RequestError: the model classifies, and its texts have no classes, or the other way round.
    """
    labels = batch["labels"]
    if labels.ndim != logits.ndim - 1:
        raise RequestError(one_class(labels.ndim == 1))
    if labels.ndim == 1:
        return F.cross_entropy(logits.float(), labels, reduction="sum")
    return token_nll(logits, labels).sum()


def units(batch: Batch) -> int:
    """What `cross_entropy_sum` sums over: answer tokens or images."""
    return sequences(batch) if batch["labels"].ndim == 1 else answer_tokens(batch)


def cross_entropy(role: str, weight: float = 1.0, name: str = "cross-entropy") -> Term:
    """Mean next-token (or class) cross-entropy on one role."""
    return Term(role, cross_entropy_sum, units, weight, name, answers_only=True)


def states_term(role: str, name: str = "distance to the teacher's states") -> Term:
    """Mean over tokens of the squared distance of the last hidden state from the kept one, in squared lengths of that one.

    |h - h'|^2 / |h'|^2, where h' stands in the column `reference` of the role's examples, see `references.cache_states`.
    """
    return Term(role, _states_sum, positions, name=name, states=True)


def _states_sum(states: Tensor, batch: Batch) -> Tensor:
    kept, here = batch["reference"].float(), states.float()
    each = (here - kept).square().sum(-1) / kept.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
    return each[batch["attention_mask"].bool()].sum() if "attention_mask" in batch else each.sum()


def positions(batch: Batch) -> int:
    """Number of tokens, or of an image's patches, without padding."""
    return int(batch["attention_mask"].sum() if "attention_mask" in batch else batch["reference"][..., 0].numel())


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
    """`term(logits, batch)` for each batch without gradients, model in eval mode; the modes are put back afterwards."""
    device = next(model.parameters()).device
    with at_rest(model):
        moved = ({k: v.to(device) for k, v in batch.items()} for batch in batches)
        return [term(forward(model, batch), batch) for batch in moved]


@torch.no_grad()
def evaluate_answers(model: nn.Module, term: Callable[[Tensor, Batch], Tensor], batch: Batch) -> Tensor:
    """`evaluate` on one batch for what reads logits through the labels alone, see `forward_answers`."""
    device = next(model.parameters()).device
    with at_rest(model):
        return term(*forward_answers(model, {k: v.to(device) for k, v in batch.items()}))
