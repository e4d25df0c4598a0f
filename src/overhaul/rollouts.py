"""Self-generated answers: what an uncut model says to the prompts of some examples, as examples to heal a cut one with.

How it differs from the released code of arXiv:2602.01997:

1. Any examples give prompts: what comes before the first token that carries loss, or the first half of a plain text.
2. An answer may be as long as the longest given one, unless said otherwise (there: 8,192 tokens).
3. An answer that did not end within its limit is learnt without an end.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from overhaul.data.encode import answered
from overhaul.data.examples import IGNORED, Encoded, Examples
from overhaul.errors import RequestError
from overhaul.judge.generation import generate, room, stop_tokens
from overhaul.modes import at_rest

SAMPLING = {"temperature": 0.9, "top_p": 0.95}


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
    if examples.kind == "images" or tokenizer is None:
        raise RequestError(
            'shrink.heal: target="own_answers" lets the teacher continue prompts, so `text` must be questions or texts '
            'with their tokenizer. For images take target="teacher".'
        )
    prompts = [prompt_of(item) for item in examples]
    longest = max(len(item["input_ids"]) - len(prompt) for item, prompt in zip(examples, prompts, strict=True))
    limit = new_tokens or longest
    with torch.random.fork_rng(), at_rest(teacher):
        torch.manual_seed(torch.initial_seed())
        answers = generate(teacher, prompts, limit, stop_tokens(teacher, tokenizer), sampling=SAMPLING)
    items: list[Encoded] = []
    for prompt, answer in zip(prompts, answers, strict=True):
        ended = len(answer) < room(teacher, len(prompt), limit)
        items.append(answered(prompt.tolist(), answer, tokenizer.eos_token_id if ended else None))
    rows = [{**row, "answer": tokenizer.decode(answer)} for row, answer in zip(examples.rows, answers, strict=True)]
    return Examples(items, rows, tokenizer)


def prompt_of(item: Encoded) -> Tensor:
    """The tokens before the first that carries loss; of a text, where all do, the first half. At least one token."""
    ids, labels = item["input_ids"], item["labels"]
    scored = (labels != IGNORED).nonzero()
    first = int(scored[0]) if len(scored) else len(ids)
    return ids[: first or max(1, len(ids) // 2)]
