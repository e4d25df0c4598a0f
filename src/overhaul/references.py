"""Cached reference outputs: what a model said before it was changed, so that no second model is ever held.

How it differs from keeping the reference model (as most preference and distillation code does):

1. Each example is run through the reference once, not once an epoch, and only where a step will draw it. The outputs at
   the positions that carry loss stay in main memory as a column of the examples, so they follow every shuffle and batch.
2. Of language models the input of the output head is kept ([k, d]) and not the logits ([k, vocabulary]), with one frozen
   copy of the head. Whether the head alone reproduces the logits is tried on the first batch; where it does not
   (a softcap or scale behind the head, as in Gemma 2), the logits themselves are kept.
3. KL is computed where labels carry loss, and the head is applied at those positions only.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from overhaul import session
from overhaul.data.examples import IGNORED, Batch, Examples
from overhaul.forward import forward, output_head
from overhaul.modes import at_rest
from overhaul.objectives import Term, check_positions, evaluate, evaluate_answers, kl_sum, sequence_nll, units

COLUMN = "reference"
"""The column in which `Reference.examples` carry the cached output."""


def reference_nll(model: nn.Module, examples: Examples, batch_size: int) -> Float[Tensor, " n"]:
    """Negative log-likelihood of each whole answer under the model as it is now.

    Args:
        model: a language model; run in eval mode without gradients.
        examples: n examples with `input_ids` [t] and `labels` [t].
        batch_size: examples in one forward; does not change the values.

    Returns:
        Nats summed over the answer's tokens, [n], float32 on the CPU, in the order of `examples`.
    """
    check_positions(model, examples)
    order = examples.by_length()
    batches = examples.select(order).batches(batch_size)
    nll = torch.empty(len(examples))
    steps = -(-len(examples) // batch_size)
    for n, batch in enumerate(session.progress(batches, "reference", steps)):
        values = evaluate_answers(model, lambda logits, batch: sequence_nll(logits, batch["labels"]), batch)
        nll[order[n * batch_size : (n + 1) * batch_size]] = values.float().cpu()
    return nll


@dataclass(frozen=True)
class Reference:
    """The outputs of a model on some examples, kept for later comparison.

    Attributes:
        examples: the examples with the column `reference` at the k positions that carry loss: the input of the output head
            ([k, d]) where `head` is given, otherwise logits ([k, vocabulary], or [classes] for images), in the dtype of the
            model. Empty where nothing was asked for.
        head: a frozen copy of the output head, or None.
    """

    examples: Examples
    head: nn.Module | None

    def logits(self, batch: Batch) -> Tensor:
        """Logits of the reference for a batch of `examples` where labels count: [n, vocabulary], or [b, classes]."""
        return self.logits_of(self.kept(batch))

    def kept(self, batch: Batch) -> Tensor:
        """What is cached for a batch where labels count: [n, d], [n, vocabulary] or [b, classes], by example.

        Raises:
            ValueError: the batch holds examples whose outputs were not asked for.
        """
        labels, cached = batch["labels"], batch[COLUMN]
        if labels.ndim == 1:
            return cached
        counts = (labels[:, 1:] != IGNORED).sum(dim=1)
        real = torch.arange(cached.shape[1], device=cached.device) < counts[:, None]
        if int(real.sum()) != int(counts.sum()):
            raise ValueError("the reference was not kept for these examples")
        return cached[real]

    def kl_term(self, role: str, weight: float = 1.0, name: str = "KL to the reference") -> Term:
        """Mean KL(reference || model) in nats over answer tokens (or images) of `role`, which must be `examples`."""
        return Term(role, self._kl_sum, units, weight, name, answers_only=True)

    def _kl_sum(self, logits: Tensor, batch: Batch) -> Tensor:
        labels = batch["labels"]
        if labels.ndim > 1:
            keep = labels[:, 1:] != IGNORED
            logits, labels = logits[:, :-1][keep], labels[:, 1:][keep]
        return kl_sum(logits, self.logits(batch), labels)

    @torch.no_grad()
    def logits_of(self, cached: Tensor) -> Tensor:
        """Logits from what is cached: some of the rows of `kept`."""
        if self.head is None:
            return cached
        # training may have moved the model to an accelerator since the outputs were kept
        return self.head.to(cached.device)(cached)


def cache_outputs(
    model: nn.Module, examples: Examples, batch_size: int, places: Collection[int] | None = None
) -> Reference:
    """Run the model once over the examples and keep what its logits can be had from.

    Args:
        model: a language or image model; run in eval mode without gradients, and left as it was.
        examples: the examples on which the reference is needed.
        batch_size: examples in one forward.
        places: of the examples that will be read (see `Draw`); all if not given.

    Returns:
        A Reference. It takes k * d values an example with k loss-carrying positions (k * vocabulary, or the number of
        classes, without a head).
    """
    check_positions(model, examples)
    head = None if examples.classified else output_head(model)
    seen: list[Tensor] = []
    hook = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])) if head is not None else None
    order = [place for place in examples.by_length() if places is None or place in places]
    column: list[Tensor] = [torch.empty(0)] * len(examples)
    try:
        batches = examples.select(order).batches(batch_size)
        for n, batch in enumerate(session.progress(batches, "reference", -(-len(order) // batch_size))):
            seen.clear()
            (logits,) = evaluate(model, lambda logits, _: logits, [batch])
            if n == 0 and head is not None and not _reproduces(head, seen, logits):
                head = None
            outputs = seen[0] if head is not None else logits
            for row, place in enumerate(order[n * batch_size : (n + 1) * batch_size]):
                own, labels = outputs[row], batch["labels"][row]
                if labels.ndim:
                    own = own[:-1][(labels[1:] != IGNORED).to(own.device)]
                # a clone: a view would keep the whole batch alive
                column[place] = own.to("cpu", _dtype(model)).clone()
    finally:
        if hook is not None:
            hook.remove()
    for place in set(range(len(examples))).difference(order):
        column[place] = column[order[0]][:0] if order else column[place]
    frozen = None if head is None else copy.deepcopy(head).requires_grad_(False)
    return Reference(examples.with_column(COLUMN, column), frozen)


@torch.no_grad()
def cache_states(model: nn.Module, examples: Examples, batch_size: int) -> Examples:
    """The examples with the last hidden states of a model without a head, [t, d] each, in the column `reference`.

    Args:
        model: run in eval mode, and left as it was.
        examples: the examples on which the states are needed.
        batch_size: examples in one forward.
    """
    check_positions(model, examples)
    device = next(model.parameters()).device
    order = examples.by_length()
    column: list[Tensor] = [torch.empty(0)] * len(examples)
    with at_rest(model):
        batches = session.progress(
            examples.select(order).batches(batch_size), "reference", -(-len(order) // batch_size)
        )
        for n, batch in enumerate(batches):
            states = forward(model, {name: value.to(device) for name, value in batch.items()}, states=True)
            for own, place in zip(states, order[n * batch_size :], strict=False):
                ids = examples.items[place].get("input_ids")
                # a clone: a view would keep the whole batch alive
                column[place] = own[: None if ids is None else len(ids)].to("cpu", _dtype(model)).clone()
    return examples.with_column(COLUMN, column)


@contextmanager
def head_only_at(head: nn.Module, keep: Bool[Tensor, "b t-1"]) -> Iterator[None]:
    """The output head, and what follows it, see these positions alone, as one sequence: logits are [1, n, v]."""
    hook = head.register_forward_pre_hook(lambda _, args: (args[0][:, : keep.shape[1]][keep][None], *args[1:]))
    try:
        yield
    finally:
        hook.remove()


def _dtype(model: nn.Module) -> torch.dtype:
    return next(p.dtype for p in model.parameters() if p.is_floating_point())


@torch.no_grad()
def _reproduces(head: nn.Module, seen: list[Tensor], logits: Tensor) -> bool:
    """Whether the head, applied to what went into it, gives the model's logits up to rounding."""
    if len(seen) != 1:
        return False
    again = head(seen[0]).float()
    rounding = 16 * torch.finfo(seen[0].dtype).eps
    return again.shape == logits.shape and torch.allclose(again, logits.float(), rtol=rounding, atol=rounding)
