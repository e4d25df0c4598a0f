"""Losses as sums and counts, so that normalisation happens once, over a whole optimizer step (`fit`).

Every function takes the model's logits and the batch and returns one value per token or per sequence in float32.
Logits are [b, t, v] for language and [b, classes] for images; labels are [b, t] or [b], with -100 where no loss falls.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from overhaul.data.examples import IGNORED, Batch, Examples, collate
from overhaul.data.lazy import View
from overhaul.errors import RequestError
from overhaul.forward import check_reads, forward, input_table, output_head
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


def one_class(of_data: bool) -> str:
    """What is said where of a model and its data one has classes and the other has not."""
    if of_data:
        return "The data has one class for each text, but the model is no classifier: it gives logits for each token."
    return (
        "The model is a classifier, which gives logits for each text, but the data has none: give the texts with a column "
        "`label`, as `as: classified`."
    )


def check_labelled(role: str, examples: Examples) -> None:
    """Whether each example says what is to be learnt of it: an answer or a class.

    Raises:
        RequestError: they are pairs of answers, or have no labels.
    """
    if examples.kind == "pairs":
        raise RequestError(
            f"The role {role!r} holds pairs of answers, of which one is preferred: `align.dpo` learns from them. Give "
            "questions with one answer (as: qa), or text."
        )
    if any("labels" not in item for item in examples.items[:1]):
        raise RequestError(
            f"The role {role!r} holds examples without a label, so no loss can be had from them. Images with a class have "
            "the column `label` (as: image)."
        )


def check_learnable(role: str, examples: Examples) -> None:
    """Whether something in the examples carries loss.

    Raises:
        RequestError: nothing does, or as in `check_labelled`.
    """
    check_labelled(role, examples)
    if not any(units(collate([item])) for item in examples.items):
        raise RequestError(
            f"The role {role!r} holds nothing that carries loss, so nothing is to be learnt. Give questions with answers, "
            "or text."
        )


def check_taken(model: nn.Module, examples: Examples, what: str = "The data") -> None:
    """Whether the model takes such examples, and its embedding has a row for every token of them.

    Raises:
        RequestError: they are images and it reads tokens or the other way round, or a token is beyond the embedding.
    """
    if not len(examples):
        return
    check_reads(model, examples.items[0], what)
    table = input_table(model)
    if table is None or "input_ids" not in examples.items[0] or _fits_tokenizer(examples, table.num_embeddings):
        return
    if (largest := examples.largest_token()) >= table.num_embeddings:
        last = table.num_embeddings - 1
        raise RequestError(
            f"{what} has the token {largest}, and the embedding of {type(model).__name__} ends at {last}. Encode it with "
            "the model's own tokenizer, or take a model that belongs to this one."
        )


def _fits_tokenizer(examples: Examples, rows: int) -> bool:
    """Whether large data, which is not held, need not be read for its tokens: its tokenizer has no more."""
    known = examples.processor
    return isinstance(examples.items, View) and hasattr(known, "__len__") and len(known) <= rows


def check_positions(model: nn.Module, examples: Examples) -> None:
    """Whether the model has a position for every token, also of what was made of the data: another answer or question.

    Raises:
        RequestError: an example is longer, or as in `check_taken`.
    """
    check_taken(model, examples)
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


def set_nll(logits: Float[Tensor, "b classes"], right: Bool[Tensor, "b classes"]) -> Float[Tensor, " b"]:
    """-log of the probability that one of the right classes is said, in nats, float32."""
    logits = logits.float()
    return logits.logsumexp(dim=1) - logits.masked_fill(~right, -torch.inf).logsumexp(dim=1)


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
