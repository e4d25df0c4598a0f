"""Self-generated answers: what an uncut model says to the prompts of some examples, as examples to heal a cut one with.

How it differs from the released code of arXiv:2602.01997:

1. Any examples give prompts: what comes before the first token that carries loss, or the first half of a plain text.
2. An answer may be as long as the longest given one, unless said otherwise (there: 8,192 tokens).
3. An answer that did not end within its limit is learnt without an end.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from overhaul import session
from overhaul.data.encode import answered
from overhaul.data.examples import IGNORED, Encoded, Examples
from overhaul.errors import RequestError
from overhaul.judge.generation import generates, stop_tokens

SAMPLING = {"do_sample": True, "temperature": 0.9, "top_p": 0.95, "top_k": 0}
BATCH = 128


def own_answers(teacher: nn.Module, examples: Examples, new_tokens: int | None = None) -> Examples:
    """Answer every prompt with the teacher, at temperature 0.9 and top-p 0.95; no answer is filtered out.

    The draws depend on torch's seed alone, and the generator is left as it was.

    Args:
        teacher: a causal language model.
        examples: language examples with their tokenizer as `processor`.
        new_tokens: most tokens an answer may have.

    Returns:
        The prompts with the teacher's answers, on which alone loss falls; each row's `answer` is the new one.

    Raises:
        RequestError: the examples are images or have no tokenizer, or the teacher cannot generate.
    """
    tokenizer = examples.processor
    if examples.is_image or tokenizer is None:
        raise RequestError(
            'shrink.heal: target="own_answers" lets the teacher continue prompts, so `text` must be questions or texts '
            'with their tokenizer. For images take target="teacher".'
        )
    if not generates(teacher):
        raise RequestError(f"shrink.heal: {type(teacher).__name__} cannot generate answers; take another target.")
    prompts = [prompt_of(item) for item in examples]
    longest = max(len(item["input_ids"]) - len(prompt) for item, prompt in zip(examples, prompts, strict=True))
    positions = getattr(getattr(teacher, "config", None), "max_position_embeddings", None) or sys.maxsize
    rooms = [max(1, min(new_tokens or longest, positions - len(prompt))) for prompt in prompts]
    with torch.random.fork_rng():
        torch.manual_seed(torch.initial_seed())
        answers = _sample(teacher, prompts, rooms, stop_tokens(teacher, tokenizer))
    items: list[Encoded] = []
    for prompt, answer, room in zip(prompts, answers, rooms, strict=True):
        end = tokenizer.eos_token_id if len(answer) < room else None
        items.append(answered(prompt.tolist(), answer, end))
    rows = [{**row, "answer": tokenizer.decode(answer)} for row, answer in zip(examples.rows, answers, strict=True)]
    return Examples(items, rows, tokenizer)


def prompt_of(item: Encoded) -> Tensor:
    """The tokens before the first that carries loss; of a text, where all do, the first half. At least one token."""
    ids, labels = item["input_ids"], item["labels"]
    scored = (labels != IGNORED).nonzero()
    first = int(scored[0]) if len(scored) else len(ids)
    return ids[: first or max(1, len(ids) // 2)]


def _sample(
    teacher: nn.Module, prompts: Sequence[Tensor], rooms: Sequence[int], stops: Sequence[int]
) -> list[list[int]]:
    """Draw an answer to each prompt; prompts of one length form a batch, so that no position is padding.

    The checkpoint's own generation config is set aside: what it says of penalties or beams would change the draw.
    """
    from transformers import GenerationConfig

    owner: Any = teacher
    device = next(teacher.parameters()).device
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    groups = (list(same) for _, same in itertools.groupby(order, key=lambda i: len(prompts[i])))
    batches = [group[start : start + BATCH] for group in groups for start in range(0, len(group), BATCH)]
    answers: dict[int, list[int]] = {}
    kept, was_training = owner.generation_config, teacher.training
    owner.generation_config = GenerationConfig(
        **SAMPLING, num_beams=1, eos_token_id=list(stops) or None, pad_token_id=0
    )
    teacher.eval()
    try:
        for places in session.progress(batches, "own answers", len(batches)):
            ids = torch.stack([prompts[i] for i in places]).to(device)
            mask = torch.ones_like(ids)
            out = owner.generate(input_ids=ids, attention_mask=mask, max_new_tokens=rooms[places[0]])
            for i, row in zip(places, out[:, ids.shape[1] :].tolist(), strict=True):
                answers[i] = list(itertools.takewhile(lambda token: token not in stops, row))
    finally:
        owner.generation_config = kept
        teacher.train(was_training)
    return [answers[i] for i in range(len(prompts))]
