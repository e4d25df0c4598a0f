"""What one model says about one role: log-probabilities and generated answers, each computed once, when first asked for.

Every metric on the role reads them here, so ten metrics cost one forward pass and one generation pass. Evidence may outlive
its model: what was read once stays, so two models are compared without ever being in memory together.

    truth ratio  R = exp(nll(y~ | x) / T - mean_j nll(wrong_j | x) / T_j)                          (Open-Unlearning's code)
                 R = mean_j P(wrong_j | x) / P(y~ | x)                                             (TOFU's paper)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from overhaul.data.boundary import tokenised, without_overlap
from overhaul.data.encode import encode_qa
from overhaul.data.examples import IGNORED, PROMPT_OVERLAP, Examples, answers_alone, turn_ends
from overhaul.errors import RequestError
from overhaul.generation import generate, stop_tokens
from overhaul.judge.likelihood import Scored, loss_score, ranks, score
from overhaul.judge.standards import distances, outputs
from overhaul.references import Reference

Kind = Literal["answers", "prompts", "text", "images"]

SPARE_TOKENS = 4
"""How many tokens longer than the longest expected answer a generated one may be."""

PROMPT_TOKENS = 128
"""Most tokens that are generated for a prompt of which no answer is known."""

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


@dataclass(frozen=True)
class Sampled:
    """Several answers that the model drew to one prompt: as text, and in tokens without EOS."""

    place: int
    texts: list[str]
    tokens: list[list[int]]


@dataclass(frozen=True)
class Choice:
    """A right answer and wrong ones to one question; `place` is the first row that asks it."""

    place: int
    right: Scored
    wrong: list[Scored]


def kind_of(examples: Examples) -> Kind:
    """What metrics can read in these examples.

    Raises:
        RequestError: they are neither images, nor questions with answers, nor text.
    """
    if examples.classified and all("labels" in item for item in examples.items):
        return "images"  # whatever it is that has a class
    if examples.kind == "tokens":
        if all("text_bytes" in row for row in examples.rows):
            return "text"
        if all("prompt" in row for row in examples.rows):
            if all((item["labels"] == IGNORED).all() for item in examples.items):
                return "prompts"
            if all("answer" in row for row in examples.rows):
                return "answers"
    raise RequestError(
        "These examples are neither images with labels, nor questions with answers, nor prompts, nor text: make them with "
        "encode_images, encode_qa, encode_chat or encode_text, or in a material with `as:`."
    )


class Evidence:
    """One role before one model.

    Args:
        model: in eval mode.
        examples: the role's data; not empty. What a chat template wrote behind an answer is no part of what is measured.
        limit: most examples that answers are generated for.
    """

    def __init__(self, model: nn.Module | None, examples: Examples, limit: int) -> None:
        self.examples, self.limit = answers_alone(examples), limit
        self._ends = turn_ends(examples) if examples.kind == "tokens" else set[int]()
        self.kind = kind_of(examples)
        self._model = model
        self._asked: dict[tuple[str, str], Scored] = {}
        self._distances: dict[Evidence, list[tuple[float, float]]] = {}
        self._sampled: dict[tuple[int, float], list[Sampled]] = {}
        self._whole: tuple[Evidence, dict[int, int]] | None = None

    def part(self, places: Sequence[int]) -> Evidence:
        """The same about some of the examples; what is read of the whole is not read again."""
        part = Evidence(self._model, self.examples.select(places), self.limit)
        part._asked = self._asked
        part._whole = (self, {place: n for n, place in enumerate(places)})
        return part

    @property
    def model(self) -> nn.Module:
        """The model.

        Raises:
            RuntimeError: it was let go.
        """
        if self._model is None:
            raise RuntimeError("What was not read of this model before it was let go cannot be read any more.")
        return self._model

    def let_go(self) -> None:
        """Forget the model and keep what was read of it."""
        self._model = None

    @property
    def eos(self) -> int | None:
        """The tokenizer's EOS, if there is a tokenizer and it has one."""
        return getattr(self.examples.processor, "eos_token_id", None)

    @cached_property
    def scored(self) -> list[Scored]:
        """Every example's answer, text or label, token by token."""
        if self._whole is not None:
            whole, places = self._whole
            return [whole.scored[place] for place in places]
        return score(self.model, self.examples)

    @cached_property
    def ranks(self) -> list[int]:
        """How many classes are found more probable than the right one (`likelihood.ranks`), for every example."""
        if self._whole is not None:
            whole, places = self._whole
            return [whole.ranks[place] for place in places]
        return ranks(self.model, self.examples)

    @cached_property
    def texts(self) -> list[str]:
        """What of every example is scored, as text: the tokens of its answer, or of a text all that are predicted.

        Raises:
            RequestError: it was encoded by a tokenizer that is not there.
        """
        tokenizer = tokenizer_of(self.examples, "Reading a text's tokens back")
        labels = [item["labels"][1:] for item in self.examples.items]
        return [tokenizer.decode(each[each != IGNORED], skip_special_tokens=True) for each in labels]

    @cached_property
    def outputs(self) -> Reference:
        """The distributions behind every answer token, or image."""
        if self._whole is not None:
            whole, places = self._whole
            return replace(whole.outputs, examples=whole.outputs.examples.select(list(places)))
        return outputs(self.model, self.examples)

    def distances_from(self, other: Evidence) -> list[tuple[float, float]]:
        """KL(other || this) and Jensen-Shannon divergence in nats per example, both models on the same examples."""
        if other not in self._distances:
            self._distances[other] = distances(self.model, other.outputs)
        return self._distances[other]

    @cached_property
    def paraphrased(self) -> list[Scored]:
        """Every distinct answer after the row's `paraphrase` in place of its question, in the same prompt otherwise.

        Raises:
            RequestError: the role was not encoded as question and answer (a chat, say).
        """
        return self._ask(list(dict.fromkeys((_prompt(row), str(row["answer"])) for row in self.examples.rows)))

    @cached_property
    def choices(self) -> list[Choice]:
        """Every distinct question with its right answer and the row's `wrong` ones.

        The question is the row's own, as in TOFU; the right answer its `paraphrased_answer` where it has one, so that
        knowing a sentence by heart is no advantage.

        Raises:
            RequestError: the role was not encoded as question and answer, or a row has no wrong answers.
        """
        asked: dict[tuple[str, ...], int] = {}
        for place, row in enumerate(self.examples.rows):
            wrong = row["wrong"]
            told = isinstance(wrong, list | tuple) and all(isinstance(one, str | int | float) for one in wrong)
            if not told or not wrong:
                raise RequestError(f"`wrong` must be a list of wrong answers; {row['question']!r} has {wrong!r}.")
            right = row.get("paraphrased_answer") or row["answer"]
            asked.setdefault((str(row["prompt"]), str(right), *map(str, row["wrong"])), place)
        said = iter(self._ask([(prompt, answer) for prompt, *answers in asked for answer in answers]))
        return [Choice(place, next(said), [next(said) for _ in key[2:]]) for key, place in asked.items()]

    def _ask(self, pairs: list[tuple[str, str]]) -> list[Scored]:
        """Prompts with answers, encoded as the role is; each distinct pair is scored once."""
        if new := [pair for pair in dict.fromkeys(pairs) if pair not in self._asked]:
            rows = [{"prompt": prompt, "answer": answer} for prompt, answer in new]
            self._asked |= zip(new, score(self.model, asked_anew(self.examples, rows)), strict=True)
        return [self._asked[pair] for pair in pairs]

    @cached_property
    def order(self) -> list[int]:
        """All places in a fixed random order: rows often alternate, and every n-th one would be of one sort."""
        return torch.randperm(len(self.examples), generator=torch.Generator().manual_seed(0)).tolist()

    @cached_property
    def answered(self) -> list[Answered]:
        """Greedy answers, or continuations of text, for `limit` examples."""
        if self._whole is not None:
            whole, places = self._whole
            return [replace(one, place=places[one.place]) for one in whole.answered if one.place in places]
        return self._answer(sorted(self.order[: self.limit]))

    def sampled(self, count: int, temperature: float) -> list[Sampled]:
        """`count` answers each that the model draws to the prompts of `limit` examples, always from the same seed.

        The random state is left as it was.
        """
        if self._whole is not None:
            whole, places = self._whole
            drawn = whole.sampled(count, temperature)
            return [replace(one, place=places[one.place]) for one in drawn if one.place in places]
        if (count, temperature) not in self._sampled:
            tokenizer_of(self.examples, "Sampling answers")
            places = sorted(self.order[: self.limit])
            prompts = [self._split(place)[0] for place in places for _ in range(count)]
            with torch.random.fork_rng():
                torch.manual_seed(0)
                sampling = {"temperature": temperature, "top_p": 1.0}
                stops = self._stops
                said = generate(self.model, prompts, self._new_tokens, stops, sampling=sampling)
            self._sampled[count, temperature] = [
                Sampled(place, [self._text(place, one).strip() for one in tokens], tokens)
                for place, tokens in zip(places, _groups(said, count), strict=True)
            ]
        return self._sampled[count, temperature]

    def samples(self, count: int) -> list[Answered]:
        """The answers to `count` of those examples; nothing else is generated if nothing else was asked for."""
        chosen = sorted(self.order[: min(count, self.limit)])
        if "answered" not in self.__dict__:
            return self._answer(chosen)
        return [answer for answer in self.answered if answer.place in chosen]

    def _answer(self, places: list[int]) -> list[Answered]:
        tokenizer = tokenizer_of(self.examples, "Generating answers")
        prompts = [self._split(i) for i in places]
        tokens = generate(self.model, [prompt for prompt, _ in prompts], self._new_tokens, self._stops)
        found: list[Answered] = []
        for place, (prompt, rest), said in zip(places, prompts, tokens, strict=True):
            row = self.examples.rows[place]
            text = self._text(place, said)
            if self.kind in ("answers", "prompts"):
                found.append(Answered(place, str(row["prompt"]), str(row.get("answer", "")), text.strip(), said))
            else:
                before, after = (tokenizer.decode(part, skip_special_tokens=True) for part in (prompt, rest))
                found.append(Answered(place, before, after, text, said))
        return found

    @property
    def _stops(self) -> list[int]:
        """What ends an answer: as the model and its tokenizer have it, and as the role's chats are ended."""
        return sorted({*stop_tokens(self.model, self.examples.processor), *self._ends})

    def _text(self, place: int, tokens: list[int]) -> str:
        tokenizer = tokenizer_of(self.examples, "Reading what was generated")
        return without_overlap(tokenizer.decode(tokens, skip_special_tokens=True), self.examples.rows[place])

    def _split(self, place: int) -> tuple[Tensor, Tensor]:
        """The tokens that are read and the tokens that should follow."""
        item = self.examples.items[place]
        ids = item["input_ids"]
        if self.kind == "prompts":
            return ids, ids[:0]
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
        if self.kind == "prompts":
            if not all("answer" in row for row in self.examples.rows):
                return PROMPT_TOKENS
            tokenizer = tokenizer_of(self.examples, "Generating answers")
            known = tokenised(tokenizer, [f" {row['answer']}" for row in self.examples.rows], special=False)
            return SPARE_TOKENS + max(map(len, known))
        return SPARE_TOKENS + max(len(self._split(i)[1]) for i in range(len(self.examples)))


def _groups(values: list[list[int]], size: int) -> list[list[list[int]]]:
    return [values[n : n + size] for n in range(0, len(values), size)]


def _prompt(row: Mapping[str, Any]) -> str:
    """The row's prompt with its paraphrase, where it has one, in place of the question."""
    return prompt_with(row, row.get("paraphrase") or row["question"])


def prompt_with(row: Mapping[str, Any], question: object) -> str:
    """The row's prompt with another question in place of its own.

    Raises:
        RequestError: the prompt does not hold the question.
    """
    if str(row["question"]) not in str(row["prompt"]):
        raise RequestError(
            f"The prompt {str(row['prompt'])[:60]!r} does not hold the question {str(row['question'])[:60]!r}, so no other "
            "one can be put in its place. Name {question} in the material's `prompt:`."
        )
    before, _, after = str(row["prompt"]).rpartition(str(row["question"]))
    return f"{before}{question}{after}"


def asked_anew(examples: Examples, rows: Sequence[Mapping[str, Any]]) -> Examples:
    """Rows with another `prompt` or `answer`, encoded as the examples are.

    Raises:
        RequestError: the examples carry no tokenizer, or were not encoded as question and answer (a chat, say).
    """
    tokenizer = tokenizer_of(examples, "Asking another question")

    def encoded(rows: Sequence[Mapping[str, Any]]) -> Examples:
        asked = [{"question": row["prompt"], "answer": row["answer"]} for row in rows]
        made = encode_qa(asked, tokenizer, prompt="{question}")
        inside = [{PROMPT_OVERLAP: row.get(PROMPT_OVERLAP, "")} for row in made.rows]
        return replace(made, rows=[{**row, **overlap} for row, overlap in zip(rows, inside, strict=True)])

    same, own = encoded(examples.rows[:1]).items[0], examples.items[0]
    if not all(torch.equal(same[name], own[name]) for name in ("input_ids", "labels")):
        raise RequestError(
            "Other words, another language, a wrong answer and shots can only be put to a role that is read `as: qa`."
        )
    return encoded(rows)


def tokenizer_of(examples: Examples, what: str) -> Any:
    """The tokenizer that encoded the examples.

    Raises:
        RequestError: they carry none; it begins with what was to be done.
    """
    if examples.processor is None:
        raise RequestError(f"{what} needs the tokenizer that encoded the examples; they carry none.")
    return examples.processor


def truth_ratios(evidence: Evidence, mean: Literal["geometric", "arithmetic"] = "geometric") -> list[float]:
    """Wrong against right, one ratio for each of the evidence's `choices`: 0 knows the answer, 1 cannot tell.

    Args:
        evidence: a role whose rows have `wrong`.
        mean: how the wrong answers' probabilities are averaged: as TOFU's and Open-Unlearning's code, or as TOFU's paper.
    """
    return [_truth_ratio(choice, mean) for choice in evidence.choices]


def _truth_ratio(choice: Choice, mean: Literal["geometric", "arithmetic"]) -> float:
    wrong = [loss_score(one) for one in choice.wrong]
    if mean == "geometric":
        centre = math.fsum(wrong) / len(wrong)
    else:
        top = max(wrong)
        centre = top + math.log(math.fsum(math.exp(one - top) for one in wrong) / len(wrong))
    # floats end near exp(709); the clamp keeps a destroyed model's ratios finite
    return math.exp(max(-700.0, min(700.0, centre - loss_score(choice.right))))
