"""What a model says to prompts: greedily or drawn, in batches without padding.

A batch is read up to the end of its shortest prompt; the longer prompts are then dictated token by token while the
others already answer. So no position is ever padding, and a batch says what its prompts say one by one.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from overhaul import session
from overhaul.errors import RequestError, RunError
from overhaul.positions import most_positions

BATCH_TOKENS = 2**14
"""Most tokens in the cache of one batch."""


def generates(model: nn.Module) -> bool:
    """Whether the model has a `generate` of its own."""
    return callable(getattr(model, "generate", None)) and bool(getattr(model, "can_generate", lambda: True)())


def check_generates(model: nn.Module) -> None:
    """Whether a model can be asked for text.

    Raises:
        RequestError: it cannot.
    """
    if not generates(model):
        raise RequestError(f"{type(model).__name__} cannot generate text; only likelihoods can be read from it.")


def stop_tokens(model: nn.Module, tokenizer: Any) -> list[int]:
    """The tokens that end an answer: the tokenizer's EOS and those that the checkpoint's generation config names."""
    config: Any = getattr(model, "generation_config", None)
    named = getattr(config, "eos_token_id", None)
    named = named if isinstance(named, list) else [named]
    return sorted({token for token in (tokenizer.eos_token_id, *named) if token is not None})


def generate(
    model: nn.Module,
    prompts: Sequence[Int[Tensor, " t"]],
    new_tokens: int,
    stops: Sequence[int],
    *,
    sampling: Mapping[str, float] | None = None,
    keep_stop: bool = False,
) -> list[list[int]]:
    """Continue each prompt with the model's own `generate` and its cache, greedily unless `sampling` is given.

    Penalties and other habits in the checkpoint's generation config are set aside for the time.

    Args:
        model: a causal language model of transformers, in eval mode.
        prompts: token ids, of any lengths.
        new_tokens: most tokens per answer; fewer where the model's positions end before.
        stops: tokens that end an answer; not part of what is returned.
        sampling: draw the tokens instead, from torch's global generator: {"temperature": 0.9, "top_p": 0.95}. What is
            drawn depends on the prompts that share a batch.
        keep_stop: whether the token that ended an answer is its last one.

    Raises:
        RequestError: the model has no `generate`.
        RunError: the model's outputs are not numbers.
    """
    check_generates(model)
    session.begins()
    answers: dict[int, list[int]] = {}
    for places in _plan([len(prompt) for prompt in prompts], new_tokens):
        said = [
            _cut(row, stops, keep_stop)
            for row in _continue(model, [prompts[i] for i in places], new_tokens, stops, sampling)
        ]
        answers |= zip(places, said, strict=True)
    return [answers[i] for i in range(len(prompts))]


def _plan(lengths: Sequence[int], new_tokens: int) -> Iterator[list[int]]:
    """Places of batches, shortest prompts first; reading on in a batch never takes more steps than a batch of its own."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        full = (len(batch) + 1) * (lengths[i] + new_tokens) > BATCH_TOKENS
        if batch and (full or lengths[i] - lengths[batch[0]] > new_tokens):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def room(model: nn.Module, length: int, new_tokens: int) -> int:
    """How many of `new_tokens` may follow a prompt of `length` tokens before the model's positions end; at least 1."""
    most = most_positions(model)
    return new_tokens if most is None else max(1, min(new_tokens, most - length))


def _continue(
    model: nn.Module,
    prompts: Sequence[Tensor],
    new_tokens: int,
    stops: Sequence[int],
    sampling: Mapping[str, float] | None,
) -> list[list[int]]:
    """One batch: all prompts are read up to the end of the shortest; what is left of the others is dictated."""
    device = next(model.parameters()).device
    known = nn.utils.rnn.pad_sequence(list(prompts), batch_first=True).to(device)
    starts = [len(prompt) for prompt in prompts]
    ends = [start + room(model, start, new_tokens) for start in starts]
    start_of, stop = torch.tensor(starts, device=device), torch.tensor(stops, device=device)

    def dictate(ids: Tensor, scores: Tensor) -> Tensor:
        if scores.isnan().any():
            raise RunError("The model's outputs are not numbers (NaN), so it says nothing.")
        reading = start_of > ids.shape[1]
        if reading.any():
            scores = scores.masked_fill(reading[:, None], -torch.inf)
            scores[reading, known[reading, ids.shape[1]]] = 0.0
        return scores

    def ended(ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        return (start_of < ids.shape[1]) & torch.isin(ids[:, -1], stop)

    shared = known[:, : min(starts)]
    with _plainly(model, max(ends) - min(starts), sampling) as run:
        out = run(
            input_ids=shared,
            attention_mask=torch.ones_like(shared),
            logits_processor=[dictate],
            stopping_criteria=[ended],
        ).tolist()
    return [row[start:end] for row, start, end in zip(out, starts, ends, strict=True)]


def _cut(row: list[int], stops: Sequence[int], keep_stop: bool) -> list[int]:
    said = list(itertools.takewhile(lambda token: token not in stops, row))
    return row[: len(said) + 1] if keep_stop else said


@contextmanager
def _plainly(model: nn.Module, new_tokens: int, sampling: Mapping[str, float] | None) -> Iterator[Any]:
    """The model's `generate` under a configuration of ours alone; the checkpoint's own is put back afterwards.

    The configuration is exchanged rather than passed along: transformers fills what a passed one leaves open
    (temperature, penalties) from the checkpoint's.
    """
    from transformers import GenerationConfig

    owner: Any = model
    kept = owner.generation_config
    how: dict[str, Any] = {"do_sample": True, "top_k": 0, **sampling} if sampling else {"do_sample": False}
    owner.generation_config = GenerationConfig(
        **how, num_beams=1, use_cache=True, max_new_tokens=new_tokens, eos_token_id=None, pad_token_id=0
    )
    try:
        yield owner.generate
    finally:
        owner.generation_config = kept
