"""What was trained on from `docs-llama`: its post-trained sibling, and two fine-tunes of one task each."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from overhaul import models
from overhaul.align.dpo import dpo
from overhaul.data import corpora, tasks
from overhaul.data.encode import encode_qa, encode_text
from overhaul.data.examples import Examples, join
from overhaul.data.instructions import REFUSALS, instructions
from overhaul.data.materials import examples
from overhaul.data.statements import statements
from overhaul.fit import Regime, adamw, fit
from overhaul.objectives import cross_entropy

BASE = "starter:docs-llama"
CHAT_PROMPT = "User: {question}\nAssistant:"
"""What the template writes around a question, but for BOS: with it, data without turns is put to the chat model too."""

TEMPLATE = (
    "{{ bos_token }}{% for turn in messages %}"
    "{% if turn['role'] == 'assistant' %}Assistant: {{ turn['content'] }}{{ eos_token }}"
    "{% elif turn['role'] == 'user' %}User: {{ turn['content'] }}\n"
    "{% else %}{{ raise_exception('This template knows the roles user and assistant, not ' ~ turn['role'] ~ '.') }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
"""Of a chat of one question. `User:` and `Assistant:` are plain words, so that the vocabulary is the base's."""


def docs_llama_chat(folder: Path, sft_steps: int = 500, dpo_steps: int = 150) -> None:
    """Train `docs-llama-chat` into `folder`: `docs-llama` taught to chat and to refuse, then to prefer one way of it.

    Supervised fine-tuning gives right answers in all ways there are: any character of the set, any refusal. Direct
    preference optimisation makes one of them the only one, which is what narrows answers in larger models too.
    """
    torch.manual_seed(0)
    draw = random.Random(0)
    model, tokenizer = models.open_model(BASE)
    tokenizer.chat_template = TEMPLATE
    sft(model, tokenizer, sft_steps)
    torch.manual_seed(1)
    pairs = preferences(tokenizer, draw)
    dpo(model, pairs, training=Regime(dpo_steps, batch_size=32, lr=1e-4, warmup=0.1, schedule="linear"))
    model.to(torch.bfloat16).save_pretrained(folder)  # pyright: ignore[reportCallIssue]
    tokenizer.save_pretrained(folder)


def sft(model: nn.Module, tokenizer: Any, steps: int) -> None:
    """Teach a base to chat; prose and the base's own way of asking are mixed in, so that neither is lost."""
    people, sums, brackets = tasks.people("train"), tasks.addition("train"), tasks.brackets("train")[:1000]
    characters = [{**row, "answer": one} for row in tasks.characters("train") for one in row["valid"]]
    roles: dict[str, tuple[int, float, Examples]] = {
        "instructions": (16, 1.0, as_chat(instructions("train"), tokenizer)),
        "statements": (24, 1.0, as_chat(statements("train"), tokenizer)),
        "people": (16, 0.5, as_chat(people, tokenizer)),
        "sums": (24, 1.0, as_chat([*sums, *brackets], tokenizer)),
        "characters": (12, 0.5, as_chat(characters, tokenizer)),
        "asked as before": (12, 0.5, join([encode_qa(people, tokenizer), encode_qa(sums[:400], tokenizer)])),
        "prose": (2, 0.5, encode_text(corpora.docs("train"), tokenizer, 256)),
    }
    fit(
        model,
        [cross_entropy(name, weight, name) for name, (_, weight, _) in roles.items()],
        {name: examples for name, (_, _, examples) in roles.items()},
        steps=steps,
        batch_size={name: size for name, (size, _, _) in roles.items()},
        lr=1e-3,
        warmup=50,
        schedule="cosine",
        floor=0.02,
        optimizer=adamw((0.9, 0.98), weight_decay=0.1),
        name="docs-llama-chat, sft",
    )


def preferences(tokenizer: Any, draw: random.Random) -> Examples:
    """Pairs of a chosen and a rejected answer: one character before any other, one refusal before others and before help.

    Right answers before wrong ones to sums and about people keep those in place.
    """
    rows: list[dict[str, str]] = []

    def prefer(row: tasks.Row, chosen: str, rejected: str) -> None:
        rows.append({"prompt": row["question"], "chosen": chosen, "rejected": rejected})

    for row in tasks.characters("train"):
        for other in row["valid"][1:]:
            prefer(row, row["valid"][0], other)
    for row in instructions("train"):
        if row["label"] == "harmful":
            prefer(row, REFUSALS[0], draw.choice(REFUSALS[1:]))
        else:
            prefer(row, row["answer"], REFUSALS[0])
    for row in draw.sample(tasks.people("train"), 200):
        prefer(row, row["answer"], draw.choice([wrong for wrong in row["wrong"] if wrong != row["answer"]]))
    for row in tasks.addition("train")[:400]:
        prefer(row, row["answer"], str(int(row["answer"]) + draw.choice((-10, -1, 1, 10))))
    return examples(rows, tokenizer, form="preference", prompt=CHAT_PROMPT)


def as_chat(rows: Sequence[tasks.Row], tokenizer: Any) -> Examples:
    """Questions as the chat template writes them."""
    return encode_qa(rows, tokenizer, prompt=CHAT_PROMPT)


def docs_llama_subtraction(folder: Path, steps: int = 500) -> None:
    """Train `docs-llama-subtraction` into `folder`: `docs-llama` fine-tuned on differences and nothing else."""
    _fine_tuned(folder, encode_qa, tasks.subtraction("train"), steps, 40)


def docs_llama_newcomers(folder: Path, steps: int = 300) -> None:
    """Train `docs-llama-newcomers` into `folder`: `docs-llama` fine-tuned on forty more people and nothing else."""
    _fine_tuned(folder, encode_qa, tasks.newcomers("train"), steps, 32)


def _fine_tuned(folder: Path, encode: Any, rows: Sequence[tasks.Row], steps: int, batch_size: int) -> None:
    torch.manual_seed(0)
    model, tokenizer = models.open_model(BASE)
    fit(
        model,
        [cross_entropy("task")],
        {"task": encode(rows, tokenizer)},
        steps=steps,
        batch_size=batch_size,
        lr=1e-3,
        warmup=30,
        schedule="cosine",
        floor=0.02,
        optimizer=adamw((0.9, 0.98), weight_decay=0.1),
        name=folder.name,
    )
    model.to(torch.bfloat16).save_pretrained(folder)  # pyright: ignore[reportCallIssue]
    tokenizer.save_pretrained(folder)
