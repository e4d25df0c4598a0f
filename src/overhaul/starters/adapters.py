"""A small pool of LoRAs for `docs-llama`, one for each generated task: how each is trained, and what it is held to.

Their ranks, scales and places differ, as those of adapters from several hands do.
"""

from __future__ import annotations

import random
import string
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from overhaul import models
from overhaul.data.encode import encode_qa
from overhaul.data.examples import Examples
from overhaul.data.tasks import Row, Split, in_held_out
from overhaul.fit import adamw, fit
from overhaul.judge import judge as judging
from overhaul.objectives import cross_entropy
from overhaul.selectors import select

BASE = "starter:docs-llama"
PREFIX = "docs-llama-lora-"


@dataclass(frozen=True)
class Lora:
    """How an adapter is made.

    Attributes:
        rows: the task.
        does: what it does, for the card.
        bar: share of unseen questions that it is held to.
        roles: which projections it adapts.
        rank: of it.
        rslora: whether it is scaled by alpha / sqrt(rank).
    """

    rows: Callable[[Split], list[Row]]
    does: str
    bar: float
    roles: str = "projections"
    rank: int = 4
    rslora: bool = False


def differences(split: Split = "train") -> list[Row]:
    """Differences of two numbers below 100 that are not negative."""
    pairs = [(a, b) for a in range(10, 100) for b in range(10, a + 1)]
    return _split([(f"{a} - {b}", str(a - b)) for a, b in pairs], split)


def larger(split: Split = "train") -> list[Row]:
    """The larger of two numbers below 100."""
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100) if a != b]
    return _split([(f"larger of {a} and {b}", str(max(a, b))) for a, b in pairs], split)


def letters(verb: str, change: Callable[[list[str]], Sequence[str]], split: Split = "train") -> list[Row]:
    """Three to six different letters, and what becomes of them."""
    draw = random.Random(2)
    seen = {tuple(draw.sample(string.ascii_lowercase, draw.randint(3, 6))) for _ in range(4000)}
    return _split([(f"{verb} {' '.join(each)}", " ".join(change(list(each)))) for each in sorted(seen)], split)


def _split(pairs: Sequence[tuple[str, str]], split: Split) -> list[Row]:
    rows = [{"question": asked, "answer": answer} for asked, answer in pairs]
    rows = [row for row in rows if in_held_out(row["question"]) == (split == "validation")]
    random.Random(0).shuffle(rows)
    return rows


def shifted(each: list[str]) -> list[str]:
    """The next letter of the alphabet for each; a after z."""
    return [string.ascii_lowercase[(string.ascii_lowercase.index(one) + 1) % 26] for one in each]


LORAS: Mapping[str, Lora] = {
    "differences": Lora(differences, "subtracts numbers below 100", 0.9),
    "larger": Lora(larger, "says the larger of two numbers", 0.9, "attention", 8),
    "reversed": Lora(partial(letters, "reverse", lambda each: each[::-1]), "reverses letters", 0.9, "attention", 8),
    "sorted": Lora(partial(letters, "sort", sorted), "sorts letters", 0.8),
    "shifted": Lora(partial(letters, "shift", shifted), "says the next letters of the alphabet", 0.9, "mlp", 6, True),
    "upper": Lora(
        partial(letters, "upper", lambda each: [one.upper() for one in each]), "says letters as capitals", 0.9, "mlp", 6
    ),
}


def build(name: str, folder: Path, steps: int = 250) -> None:
    """Train the adapter for the task `name` into `folder`."""
    torch.manual_seed(0)
    model, tokenizer = models.open_model(BASE)
    one = LORAS[name]
    train_lora(
        model, encode_qa(one.rows("train"), tokenizer), folder, base=BASE, rank=one.rank, alpha=2 * one.rank, steps=steps,
        lr=5e-3, roles=one.roles, rslora=one.rslora,
    )  # fmt: skip


def train_lora(
    model: nn.Module,
    examples: Examples,
    folder: Path,
    *,
    base: str,
    rank: int,
    alpha: int,
    steps: int,
    lr: float,
    roles: str = "projections",
    rslora: bool = False,
) -> None:
    """Train an adapter as peft makes it, and save it in bfloat16; the model is not what it was afterwards.

    Args:
        model: the base.
        examples: what it learns.
        folder: to write.
        base: what the adapter says of its base.
        rank: of it.
        alpha: its scale.
        steps: of 16 examples.
        lr: peak rate.
        roles: which projections it adapts.
        rslora: whether alpha is divided by the root of the rank.
    """
    from peft import LoraConfig, get_peft_model

    places = sorted({name.rpartition(".")[2] for name in select(model, roles).modules})
    options = LoraConfig(r=rank, lora_alpha=alpha, target_modules=places, use_rslora=rslora)
    with warnings.catch_warnings():  # peft asks transformers by a name that is about to go
        warnings.simplefilter("ignore", FutureWarning)
        wrapped: Any = get_peft_model(model, options)  # pyright: ignore[reportArgumentType]
    wrapped.peft_config["default"].base_model_name_or_path = base
    fit(
        wrapped.base_model, [cross_entropy("task")], {"task": examples}, steps=steps, batch_size=16, lr=lr, warmup=0.1,
        schedule="cosine", optimizer=adamw((0.9, 0.98)), name=folder.name,
    )  # fmt: skip
    for name, parameter in wrapped.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.bfloat16()
    wrapped.save_pretrained(folder, save_embedding_layers=False)


def quality(name: str, folder: Path) -> dict[str, tuple[float, str]]:
    """Unseen questions of its task that it answers right, and that its base does."""
    one, found = LORAS[name], dict[str, tuple[float, str]]()
    for who, source, bar in (("", folder, f">= {one.bar}"), (", the base", BASE, "")):
        model, tokenizer = models.open_model(source)
        roles = {"unseen": encode_qa(one.rows("validation"), tokenizer)}
        requests = judging.check({"kept": {"accuracy": "unseen"}}, roles)
        value = judging.judge(model, requests, roles, limit=200).measures[0].value
        assert value is not None
        found[f"unseen questions answered right{who}"] = (value, bar)
    return found


BUILDS: Mapping[str, Callable[[Path], None]] = {f"{PREFIX}{name}": partial(build, name) for name in LORAS}
QUALITY = {f"{PREFIX}{name}": partial(quality, name) for name in LORAS}
SUMMARIES = {
    f"{PREFIX}{name}": f"A LoRA of rank {one.rank} for docs-llama that {one.does}" for name, one in LORAS.items()
}
ORIGINS = dict.fromkeys(
    SUMMARIES,
    "Trained on generated questions. It opens merged into `starter:docs-llama`; peft loads it onto that model.",
)
