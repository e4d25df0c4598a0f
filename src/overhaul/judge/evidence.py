"""What one model says about one role: log-probabilities and generated answers, each computed once, when first asked for.

Every metric on the role reads them here, so ten metrics cost one forward pass and one generation pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn

from overhaul.data.encode import encode_qa
from overhaul.data.examples import IGNORED, Examples
from overhaul.errors import RequestError
from overhaul.judge.generation import generate, stop_tokens
from overhaul.judge.likelihood import Scored, score

Kind = Literal["answers", "text", "images"]

SPARE_TOKENS = 4
"""How many tokens longer than the longest expected answer a generated one may be."""

PREFIX_TOKENS = CONTINUATION_TOKENS = 32
"""How much of a text is read, and how much of what follows is generated."""


@dataclass(frozen=True)
class Answered:
    """A prompt, what should follow, and what the model said: as text, and in tokens without EOS."""

    place: int
    prompt: str
    expected: str
    text: str
    tokens: list[int]


def kind_of(examples: Examples) -> Kind:
    """What metrics can read in these examples.

    Raises:
        RequestError: they are neither images, nor questions with answers, nor text.
    """
    if examples.is_image:
        return "images"
    if all("text_bytes" in row for row in examples.rows):
        return "text"
    if all("prompt" in row and "answer" in row for row in examples.rows):
        return "answers"
    raise RequestError(
        "These examples are neither images, nor questions with answers, nor text: make them with encode_images, "
        "encode_qa, encode_chat or encode_text."
    )


class Evidence:
    """One role before one model.

    Args:
        model: in eval mode.
        examples: the role's data; not empty.
        limit: most examples that answers are generated for.
    """

    def __init__(self, model: nn.Module, examples: Examples, limit: int) -> None:
        self.model, self.examples, self.limit = model, examples, limit
        self.kind = kind_of(examples)

    @property
    def eos(self) -> int | None:
        """The tokenizer's EOS, if there is a tokenizer and it has one."""
        return getattr(self.examples.processor, "eos_token_id", None)

    @cached_property
    def scored(self) -> list[Scored]:
        """Every example's answer, text or label, token by token."""
        return score(self.model, self.examples)

    @cached_property
    def paraphrased(self) -> list[Scored]:
        """Every distinct answer after the row's `paraphrase` in place of its question, in the same prompt otherwise.

        Raises:
            RequestError: the role was not encoded as question and answer (a chat, say).
        """
        asked: dict[tuple[str, str], None] = {}
        for row in self.examples.rows:
            before, _, after = str(row["prompt"]).rpartition(str(row["question"]))
            asked[before + str(row["paraphrase"]) + after, str(row["answer"])] = None
        as_it_was = self._encode([(str(self.examples.rows[0]["prompt"]), str(self.examples.rows[0]["answer"]))])
        if not torch.equal(as_it_was.items[0]["input_ids"], self.examples.items[0]["input_ids"]):
            raise RequestError("A paraphrase can only be put to a role that is read `as: qa`.")
        return score(self.model, self._encode(list(asked)))

    def _encode(self, pairs: Sequence[tuple[str, str]]) -> Examples:
        rows = [{"question": prompt, "answer": answer} for prompt, answer in pairs]
        return encode_qa(rows, self.examples.processor, prompt="{question}")

    @cached_property
    def order(self) -> list[int]:
        """All places in a fixed random order: rows often alternate, and every n-th one would be of one sort."""
        return torch.randperm(len(self.examples), generator=torch.Generator().manual_seed(0)).tolist()

    @cached_property
    def answered(self) -> list[Answered]:
        """Greedy answers, or continuations of text, for `limit` examples."""
        return self._answer(sorted(self.order[: self.limit]))

    def samples(self, count: int) -> list[Answered]:
        """The answers to `count` of those examples; nothing else is generated if nothing else was asked for."""
        chosen = sorted(self.order[: min(count, self.limit)])
        if "answered" not in self.__dict__:
            return self._answer(chosen)
        return [answer for answer in self.answered if answer.place in chosen]

    def _answer(self, places: list[int]) -> list[Answered]:
        tokenizer = self.examples.processor
        if tokenizer is None:
            raise RequestError("Generating answers needs the tokenizer that encoded the examples; they carry none.")
        prompts = [self._split(i) for i in places]
        stops = stop_tokens(self.model, tokenizer)
        tokens = generate(self.model, [prompt for prompt, _ in prompts], self._new_tokens, stops)
        found: list[Answered] = []
        for place, (prompt, rest), said in zip(places, prompts, tokens, strict=True):
            row, text = self.examples.rows[place], tokenizer.decode(said, skip_special_tokens=True)
            if self.kind == "answers":
                found.append(Answered(place, str(row["prompt"]), str(row["answer"]), text.strip(), said))
            else:
                before, after = (tokenizer.decode(part, skip_special_tokens=True) for part in (prompt, rest))
                found.append(Answered(place, before, after, text, said))
        return found

    def _split(self, place: int) -> tuple[Tensor, Tensor]:
        """The tokens that are read and the tokens that should follow."""
        item = self.examples.items[place]
        ids = item["input_ids"]
        if self.kind == "answers":
            first = int((item["labels"] != IGNORED).nonzero()[0])
            return ids[:first], ids[first:]
        first = min(PREFIX_TOKENS, len(ids) - 1)
        return ids[:first], ids[first : first + CONTINUATION_TOKENS]

    @cached_property
    def _new_tokens(self) -> int:
        """The longest expected answer of the whole role and a few more, so that a sample says what the full pass says."""
        if self.kind == "text":
            return CONTINUATION_TOKENS
        return SPARE_TOKENS + max(len(self._split(i)[1]) for i in range(len(self.examples)))
