"""Claim of arXiv:2602.01997: a model that lost blocks keeps classifying, but not generating, and healing brings back a part.

The paper's experiment on 7B models, at the size of a laptop: a character-level Llama of six blocks learns two tasks in one
stream, then loses one, two or three blocks and is healed.

1. Classification: which of three letters is the most frequent of nine; one token decides. Generation: the sum of two
   two-digit numbers, digits reversed; three tokens must all be right. Both are judged by exact match on unseen items.
2. Baselines: reverse order and block influence beside the paper's greedy search; no healing, and healing on the given
   answers.
3. Null controls: the mean over all cuts of the same size (what a random choice of blocks is worth), and healing on
   shuffled answers.
"""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from overhaul.claims._claim import Check, Claim
from overhaul.data.encode import answered
from overhaul.data.examples import IGNORED, Batch, Examples, join
from overhaul.fit import fit
from overhaul.objectives import cross_entropy, evaluate
from overhaul.shrink.drop_layers import Choice, drop_layers, greedy
from overhaul.shrink.heal import heal
from overhaul.stack import LayerStack

BLOCKS = 6
CUTS = (1, 2, 3)
TASKS = ("classification", "addition")
Pair = tuple[str, str]


@dataclass(frozen=True)
class Size:
    """How much is trained and judged; the defaults are the experiment, a test takes less."""

    training_steps: int = 1400
    healing_steps: int = 120
    healing_prompts: int = 1500
    judged: int = 250
    searched: int = 100
    batch: int = 96


class Characters:
    """One token a character; 0 is padding and 1 the end."""

    alphabet = "0123456789abc+="
    eos_token_id = 1

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""
        return [self.alphabet.index(character) + 2 for character in text]

    def decode(self, tokens: list[int]) -> str:
        """The text of token ids, without padding and end."""
        return "".join(self.alphabet[token - 2] for token in tokens if token > 1)


def run(seed: int) -> dict[str, float]:
    """Train, cut, heal and judge with one seed; see `experiment`."""
    return experiment(seed, Size())


def experiment(seed: int, size: Size) -> dict[str, float]:
    """Accuracies divided by those of the full model, by task, cut and healing ("addition, greedy 2, own answers")."""
    torch.manual_seed(seed)
    draw = random.Random(seed)
    pairs = {"classification": _majorities(draw, 8000), "addition": _sums(draw)}
    judged = {task: _encode(pairs[task][: size.judged]) for task in TASKS}
    taught = {task: _encode(pairs[task][size.judged :]) for task in TASKS}
    full = _train(taught, size)
    learnt = {task: accuracy(full, judged[task]) for task in TASKS}
    found = {f"{task}, full": learnt[task] for task in TASKS}

    def note(label: str, *models: nn.Module) -> None:
        for task in TASKS:
            mean = sum(accuracy(model, judged[task]) for model in models) / len(models)
            found[f"{task}, {label}"] = mean / max(learnt[task], 1e-9)

    order = _task_driven_order(full, {task: taught[task][: size.searched] for task in TASKS})
    known = {task: taught[task][: size.healing_prompts // 2] for task in TASKS}
    prompts, wrong = join(list(known.values())), join([_shuffled(part, draw) for part in known.values()])
    healing: dict[str, Any] = {"steps": size.healing_steps, "batch_size": size.batch, "lr": 1e-3}
    for k in CUTS:
        for criterion in ("reverse", "block_influence"):
            note(f"{criterion} {k}", drop_layers(copy.deepcopy(full), prompts, count=k, criterion=criterion).model)
        note(f"any {k}", *(_without(full, cut) for cut in itertools.combinations(range(1, BLOCKS), k)))
        note(f"greedy {k}", _without(full, order[:k]))
        ways: dict[str, tuple[Examples, Any]] = {
            "own answers": (prompts, "own_answers"),
            "true answers": (prompts, "tokens"),
            "shuffled answers": (wrong, "tokens"),
        }
        for label, (examples, target) in ways.items():
            healed = heal(_without(full, order[:k]), examples, full, target=target, **healing)
            note(f"greedy {k}, {label}", healed.model)
            if "answers" in healed.made:
                found["own answers that are right"] = _same_answers(healed.made["answers"], examples)
    return found


def _majorities(draw: random.Random, count: int) -> list[Pair]:
    found: dict[str, str] = {}
    while len(found) < count:
        letters = "".join(draw.choices("abc", k=9))
        counts = sorted((letters.count(letter), letter) for letter in "abc")
        if counts[-1][0] > counts[-2][0]:
            found[f"{letters}="] = counts[-1][1]
    return list(found.items())


def _sums(draw: random.Random) -> list[Pair]:
    pairs = [(f"{a}+{b}=", f"{a + b:03d}"[::-1]) for a in range(10, 100) for b in range(10, 100)]
    draw.shuffle(pairs)
    return pairs


def _encode(pairs: list[Pair]) -> Examples:
    words = Characters()
    items = [answered(words.encode(question), words.encode(answer), words.eos_token_id) for question, answer in pairs]
    return Examples(items, [{"question": question, "answer": answer} for question, answer in pairs], words)


def _shuffled(examples: Examples, draw: random.Random) -> Examples:
    """The same questions with each other's answers."""
    answers = [row["answer"] for row in examples.rows]
    draw.shuffle(answers)
    return _encode([(row["question"], answer) for row, answer in zip(examples.rows, answers, strict=True)])


def _same_answers(first: Examples, second: Examples) -> float:
    pairs = zip(first.rows, second.rows, strict=True)
    return sum(a["answer"] == b["answer"] for a, b in pairs) / len(first)


def _train(taught: Mapping[str, Examples], size: Size) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(Characters.alphabet) + 2,
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
        max_position_embeddings=32,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=Characters.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    fit(model, [cross_entropy(task, name=task) for task in TASKS], taught, steps=size.training_steps,
        batch_size={"classification": size.batch // 6, "addition": size.batch * 2 // 3}, lr=3e-3, warmup=50,
        schedule="cosine", floor=0.05, name="two tasks")  # fmt: skip
    return model


def accuracy(model: nn.Module, examples: Examples) -> float:
    """Share of exact answers under greedy decoding: those whose every token is the most probable one after the true ones."""
    right = evaluate(model, _all_right, list(examples.batches(250)))
    return torch.cat(right).float().mean().item()


def _all_right(logits: Tensor, batch: Batch) -> Tensor:
    labels = batch["labels"][:, 1:]
    return ((logits[:, :-1].argmax(dim=-1) == labels) | (labels == IGNORED)).all(dim=1)


def _without(full: nn.Module, removed: Sequence[int]) -> nn.Module:
    shorter = copy.deepcopy(full)
    LayerStack.of(shorter).drop(removed)
    return shorter


def _task_driven_order(full: nn.Module, searched: Mapping[str, Examples]) -> list[int]:
    """The paper's greedy search: each round drops the block that costs the mean normalised task accuracy least."""
    reference = {task: accuracy(full, searched[task]) for task in TASKS}
    stack = LayerStack.of(full)

    def cost(removed: list[int]) -> float:
        with stack.skipping(removed):
            return -sum(accuracy(full, searched[task]) / max(reference[task], 1e-9) for task in TASKS)

    return greedy(lambda cuts: list(map(cost, cuts)), Choice(max(CUTS), (), range(1, BLOCKS)))


def _classification_outlives(found: Mapping[str, float]) -> bool:
    return all(found[f"classification, greedy {k}"] > found[f"addition, greedy {k}"] for k in CUTS)


def _falls(found: Mapping[str, float]) -> bool:
    healed = [found[f"addition, greedy {k}, own answers"] for k in CUTS]
    return healed[0] > healed[1] > healed[2]


def _own_is_as_good(found: Mapping[str, float]) -> bool:
    return all(
        found[f"addition, greedy {k}, own answers"] >= found[f"addition, greedy {k}, true answers"] - 0.05 for k in CUTS
    )


def _mean(found: Mapping[str, float], label: str) -> float:
    return sum(found[f"{task}, {label}"] for task in TASKS) / len(TASKS)


CLAIM = Claim(
    slug="layer-pruning-limits",
    paper="2602.01997",
    title="Dropped blocks cost generation more than classification, and healing returns only a part",
    statement=(
        "A pruned model keeps its one-token classification while multi-token generation collapses; healing on the uncut "
        "model's own answers brings generation back partly, the less the more blocks are gone."
    ),
    checks=(
        Check(
            "the full model has learnt both tasks: accuracy at least 0.9 each",
            lambda found: all(found[f"{task}, full"] >= 0.9 for task in TASKS),
        ),
        Check(
            "one block gone (greedy), not healed: classification at least 0.95 of the full model's, addition at most 0.6",
            lambda found: found["classification, greedy 1"] >= 0.95 and found["addition, greedy 1"] <= 0.6,
        ),
        Check(
            "at one, two and three blocks, not healed, classification stays above addition", _classification_outlives
        ),
        Check(
            "healed on own answers, two blocks gone: classification above 0.9 and addition at least 0.1 below it",
            lambda found: (
                found["classification, greedy 2, own answers"] > 0.9
                and found["addition, greedy 2, own answers"] <= found["classification, greedy 2, own answers"] - 0.1
            ),
        ),
        Check("healed addition falls from one to two to three blocks", _falls),
        Check("own answers heal addition as well as true answers: at most 0.05 less at each cut", _own_is_as_good),
        Check(
            "null control: healing on shuffled answers is worse than on own answers by at least 0.1 of addition at each cut",
            lambda found: all(
                found[f"addition, greedy {k}, own answers"] - found[f"addition, greedy {k}, shuffled answers"] >= 0.1
                for k in CUTS
            ),
        ),
        Check(
            "mean of both tasks, two blocks, not healed: greedy at least block influence, and that at least reverse order",
            lambda found: _mean(found, "greedy 2") >= _mean(found, "block_influence 2") >= _mean(found, "reverse 2"),
        ),
        Check(
            "null control: greedy is above the mean over all choices of two blocks by at least 0.05 (mean of both tasks)",
            lambda found: _mean(found, "greedy 2") - _mean(found, "any 2") >= 0.05,
        ),
    ),
    run=run,
    remarks=(
        "The asymmetry before healing holds on every seed: classification survives three of six blocks, addition loses "
        "most of its accuracy with two. That healing gives back only a part does not hold here: 120 steps return addition "
        "to 0.93 or more at every cut. A model this small and this well trained answers its own prompts without a mistake, "
        "so own answers and true answers are the same data, and three blocks have room for both tasks; the paper's limit "
        "would need a task that fills the uncut model. On one seed a block is spare (addition 0.99 without it), and with "
        "two blocks gone reverse order scatters around block influence rather than below it."
    ),
)
