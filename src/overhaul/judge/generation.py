"""What a model says: greedy answers, and how they are compared with the expected ones.

Prompts of one length form a batch, so no position is padding and a batch says exactly what its prompts say one by one.
ROUGE-L follows Lin (2004) as TOFU uses it. How it differs from the `rouge_score` package:
1. Words are not stemmed.
2. Letters and digits of every script form words, not only a-z and 0-9; a text without any is split at white space, so
   that brackets can be compared.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from overhaul.errors import RequestError

BATCH = 128


def generates(model: nn.Module) -> bool:
    """Whether the model has a `generate` of its own."""
    return callable(getattr(model, "generate", None)) and bool(getattr(model, "can_generate", lambda: True)())


def stop_tokens(model: nn.Module, tokenizer: Any) -> list[int]:
    """The tokens that end an answer: the tokenizer's EOS and those that the checkpoint's generation config names."""
    config: Any = getattr(model, "generation_config", None)
    named = getattr(config, "eos_token_id", None)
    named = named if isinstance(named, list) else [named]
    return sorted({token for token in (tokenizer.eos_token_id, *named) if token is not None})


def generate(
    model: nn.Module, prompts: Sequence[Int[Tensor, " t"]], new_tokens: int, stops: Sequence[int], pad: int = 0
) -> list[list[int]]:
    """Continue each prompt greedily with the model's own `generate` and its cache.

    Sampling, penalties and other habits in the checkpoint's generation config are set aside for the time.

    Args:
        model: a causal language model of transformers, in eval mode.
        prompts: token ids, of any lengths.
        new_tokens: most tokens per answer; fewer where the model's positions end before.
        stops: tokens that end an answer; not part of what is returned.
        pad: what fills a batch behind an answer that has ended; never returned.

    Raises:
        RequestError: the model has no `generate`.
    """
    if not generates(model):
        raise RequestError(f"{type(model).__name__} cannot generate text; judge it by likelihood metrics only.")
    device = next(model.parameters()).device
    positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers: dict[int, list[int]] = {}
    for length, same in itertools.groupby(order, key=lambda i: len(prompts[i])):
        places = list(same)
        room = new_tokens if positions is None else max(1, min(new_tokens, positions - length))
        with greedy(model, room, stops, pad) as run:
            for start in range(0, len(places), BATCH):
                chosen = places[start : start + BATCH]
                ids = torch.stack([prompts[i] for i in chosen]).to(device)
                out = run(input_ids=ids, attention_mask=torch.ones_like(ids))[:, length:].tolist()
                answers |= {i: _until(tokens, stops) for i, tokens in zip(chosen, out, strict=True)}
    return [answers[i] for i in range(len(prompts))]


@contextmanager
def greedy(model: nn.Module, new_tokens: int, stops: Sequence[int], pad: int) -> Iterator[Any]:
    """The model's `generate` under a plain greedy configuration; the checkpoint's own is put back afterwards.

    The configuration is exchanged rather than passed along: transformers fills what a passed one leaves open
    (temperature, penalties) from the checkpoint's.
    """
    from transformers import GenerationConfig

    owner: Any = model
    kept = owner.generation_config
    plain: dict[str, Any] = {"do_sample": False, "num_beams": 1, "use_cache": True, "max_new_tokens": new_tokens}
    owner.generation_config = GenerationConfig(**plain, eos_token_id=list(stops) or None, pad_token_id=pad)
    try:
        yield owner.generate
    finally:
        owner.generation_config = kept


def _until(tokens: list[int], stops: Sequence[int]) -> list[int]:
    return list(itertools.takewhile(lambda token: token not in stops, tokens))


def rouge_l(expected: str, text: str) -> float:
    """ROUGE-L recall: the longest common subsequence of words, as a share of the expected words."""
    pattern = r"[^\W_]+" if re.search(r"[^\W_]", expected) else r"\S+"
    wanted, said = (re.findall(pattern, t.lower()) for t in (expected, text))
    return common_subsequence(wanted, said) / len(wanted) if wanted else 0.0


def common_subsequence(first: Sequence[Hashable], second: Sequence[Hashable]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(second) + 1)
    for a in first:
        above = list(row)
        for j, b in enumerate(second):
            row[j + 1] = above[j] + 1 if a == b else max(above[j + 1], row[j])
    return row[-1]


def repeated_share(tokens: Sequence[Hashable], n: int = 2) -> float:
    """Rep-n: 1 - distinct n-grams / n-grams; 0 where there is no n-gram."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0
