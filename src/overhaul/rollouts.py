"""What a model says to the prompts of some examples, as examples again: to learn from, or to be rewarded for.

1. Any examples give prompts: what comes before the first token that carries loss, or the first half of a plain text.
2. Answers are drawn by the model's own `generate` with its cache, in batches without padding (`generation`).
3. Log-probabilities of the drawn tokens come from a forward of their own, the one that a training step makes, and not from
   the cached decoding that drew them: a ratio of the two would differ from 1 before anything was learnt. They are those of
   the model itself, whatever temperature or nucleus the tokens were drawn with.
4. An answer that did not end within its limit carries no end.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from overhaul.data.boundary import without_overlap
from overhaul.data.examples import CLOSING, IGNORED, Batch, Encoded, Examples, turn_ends
from overhaul.errors import RequestError
from overhaul.generation import generate, stop_tokens
from overhaul.modes import at_rest
from overhaul.objectives import evaluate_answers, token_nll

LOGPROB = "old_logprob"
"""The column with the log-probability of each answer token when it was drawn, [k]."""

AT_ONCE = 64
"""Answers whose log-probabilities are had from one forward."""


def longest_answer(prompts: Examples) -> int:
    """Tokens of the longest answer that is given.

    Raises:
        RequestError: none is.
    """
    longest = max(len(item["input_ids"]) - len(prompt_of(item)) for item in prompts)
    if not longest:
        raise RequestError("No answer is given whose length could be the limit; say how long one may be (new_tokens).")
    return longest


def rollouts(
    model: nn.Module,
    prompts: Examples,
    count: int = 1,
    *,
    new_tokens: int | None = None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int | None = None,
    logprobs: bool = True,
) -> Examples:
    """Draw `count` answers to each prompt.

    What is drawn depends on the seed, the model and the prompts; torch's generator is left as it was.

    Args:
        model: a causal language model; run in eval mode, its modes are put back.
        prompts: language examples with their tokenizer as `processor`; what carries loss is not shown to the model.
        count: answers a prompt, which follow each other.
        new_tokens: most tokens an answer may have; as many as the longest given one has, if None.
        temperature: by which logits are divided before a token is drawn.
        top_p: tokens are drawn from the likeliest that hold this much probability together.
        seed: of the draws; torch's if None.
        logprobs: whether each example carries the column `old_logprob`.

    Returns:
        Prompts with the drawn answers, on which alone loss falls, the token that ended one included. Rows are those of
        the prompts with `rollout`, the answer's text, and `ended`, whether it came to its end.

    Raises:
        RequestError: the examples are images or have no tokenizer, or the model cannot generate.
        RunError: the model's outputs are not numbers.
    """
    tokenizer = prompts.processor
    if prompts.kind not in ("tokens", "pairs") or tokenizer is None:
        raise RequestError(
            "Answers can be drawn to questions or texts that come with their tokenizer, and to no others."
        )
    begun = [prompt_of(item) for item in prompts]
    limit = new_tokens or longest_answer(prompts)
    stops = sorted({*stop_tokens(model, tokenizer), *turn_ends(prompts)})
    with torch.random.fork_rng(), at_rest(model):
        torch.manual_seed(torch.initial_seed() if seed is None else seed)
        drawn = generate(
            model, [prompt for prompt in begun for _ in range(count)], limit, stops,
            sampling={"temperature": temperature, "top_p": top_p}, keep_stop=True,
        )  # fmt: skip
    items, rows = list[Encoded](), list[dict[str, object]]()
    for n, answer in enumerate(drawn):
        prompt, row = begun[n // count], prompts.rows[n // count]
        ended = bool(answer) and answer[-1] in stops
        items.append(_answered(prompt, answer))
        said = without_overlap(tokenizer.decode(answer[:-1] if ended else answer), row)
        own = {name: value for name, value in row.items() if name != CLOSING}  # no template wrote behind what was drawn
        rows.append({**own, "rollout": said, "ended": ended})
    found = Examples(items, rows, tokenizer)
    return found.with_column(LOGPROB, answer_logprobs(model, found)) if logprobs else found


def answer_logprobs(model: nn.Module, examples: Examples) -> list[Float[Tensor, " k"]]:
    """The log-probability of each answer token of each example under the model as it is now, float32 on the CPU."""
    found: list[Tensor] = [torch.empty(0)] * len(examples)
    order = examples.by_length()
    for n, batch in enumerate(examples.select(order).batches(AT_ONCE)):
        said = evaluate_answers(model, _by_example, batch).cpu()
        counts = (batch["labels"][:, 1:] != IGNORED).sum(dim=1).tolist()
        for place, part in zip(order[n * AT_ONCE : (n + 1) * AT_ONCE], said.split(counts), strict=True):
            found[place] = part.clone()
    return found


def _by_example(logits: Tensor, batch: Batch) -> Tensor:
    labels = batch["labels"]
    return -token_nll(logits, labels)[labels[:, 1:] != IGNORED]


def _answered(prompt: Tensor, answer: list[int]) -> Encoded:
    ids = torch.cat([prompt, torch.tensor(answer, dtype=prompt.dtype)])
    labels = ids.clone()
    labels[: len(prompt)] = IGNORED
    return {"input_ids": ids, "labels": labels}


def own_answers(teacher: nn.Module, examples: Examples, new_tokens: int | None = None) -> Examples:
    """Answer every prompt once with the teacher, to heal a cut model with; no answer is filtered out.

    As the released code of arXiv:2602.01997 at temperature 0.9 and top-p 0.95, but for the limit: an answer may be as long
    as the longest given one, unless said otherwise (there: 8,192 tokens).

    Args:
        teacher: a causal language model.
        examples: language examples with their tokenizer as `processor`.
        new_tokens: most tokens an answer may have.

    Returns:
        The prompts with the teacher's answers; each row's `answer` is the new one.

    Raises:
        RequestError: the examples are images or have no tokenizer, or the teacher cannot generate.
    """
    if examples.kind == "images" or examples.processor is None or examples.classified:
        raise RequestError(
            'shrink.heal: target="own_answers" lets the teacher continue prompts, so `text` must be questions or texts '
            'with their tokenizer. For images, and texts with a class, take target="teacher".'
        )
    drawn = rollouts(teacher, examples, new_tokens=new_tokens, temperature=0.9, top_p=0.95, logprobs=False)
    rows = [{**row, "answer": said["rollout"]} for row, said in zip(examples.rows, drawn.rows, strict=True)]
    return Examples(drawn.items, rows, drawn.processor)


def prompt_of(item: Encoded) -> Tensor:
    """The tokens before the first that carries loss; of a text, where all do, the first half. At least one token."""
    ids, labels = item["input_ids"], item["labels"]
    scored = (labels != IGNORED).nonzero()
    first = int(scored[0]) if len(scored) else len(ids)
    return ids[: first or max(1, len(ids) // 2)]
