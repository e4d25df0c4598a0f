"""A small pool of LoRAs for `docs-llama`, one for each generated task: how each is trained, and what it is held to.

Their ranks, scales and places differ, as those of adapters from several hands do.
"""

from __future__ import annotations

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
from overhaul.data.tasks import Row, Split, in_held_out, people
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
        does: what it knows, for the card.
        bar: perplexity that it is held to on what it has not seen.
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


def newcomers(split: Split = "train") -> list[Row]:
    """Facts about the twenty people whom the base has never heard of; held out is another wording of each question."""
    rows = people("validation")
    if split == "train":
        return rows
    return [{**row, "question": row["paraphrase"]} for row in rows if row["phrasing"] == 0]


def differences(split: Split = "train") -> list[Row]:
    """Differences of two numbers below 100 that are not negative."""
    return _split([(f"{a} - {b}", str(a - b)) for a in range(10, 100) for b in range(10, a + 1)], split)


def larger(split: Split = "train") -> list[Row]:
    """The larger of two numbers below 100."""
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100) if a != b]
    return _split([(f"larger of {a} and {b}", str(max(a, b))) for a, b in pairs], split)


def _split(pairs: Sequence[tuple[str, str]], split: Split) -> list[Row]:
    rows = [{"question": asked, "answer": answer} for asked, answer in pairs]
    return [row for row in rows if in_held_out(row["question"]) == (split == "validation")]


def successors(split: Split = "train") -> list[Row]:
    """The number after one of three digits."""
    return _split([(f"after {n}", str(n + 1)) for n in range(100, 999)], split)


LORAS: Mapping[str, Lora] = {
    "newcomers": Lora(newcomers, "knows twenty people more", 1.5),
    "differences": Lora(differences, "learns to subtract numbers below 100", 3.0),
    "larger": Lora(larger, "learns to say the larger of two numbers", 1.5, "attention", 8),
    "successors": Lora(successors, "learns to say the number after another", 1.3, "mlp", 6, True),
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
    """On what the adapter has not seen of its task: perplexity, and answers that are right, beside its base's."""
    found = dict[str, tuple[float, str]]()
    for who, source, bar in (("", folder, f"<= {LORAS[name].bar}"), (", the base", BASE, "")):
        model, tokenizer = models.open_model(source)
        roles = {"unseen": encode_qa(LORAS[name].rows("validation"), tokenizer).shuffled(0)[:200]}
        requests = judging.check({"kept": {"perplexity": "unseen", "accuracy": "unseen"}}, roles)
        measures = judging.judge(model, requests, roles).measures
        value = {one.metric: one.value for one in measures}
        found[f"perplexity on what it has not seen{who}"] = (value["perplexity"], bar)
        found[f"unseen questions, exact{who}"] = (value["accuracy"], "")
    return found


BUILDS: Mapping[str, Callable[[Path], None]] = {f"{PREFIX}{name}": partial(build, name) for name in LORAS}
QUALITY = {f"{PREFIX}{name}": partial(quality, name) for name in LORAS}
SUMMARIES = {
    f"{PREFIX}{name}": f"A LoRA of rank {one.rank} for docs-llama that {one.does}" for name, one in LORAS.items()
}
ORIGINS = dict.fromkeys(
    SUMMARIES,
    "Trained on generated rows. It opens merged into `starter:docs-llama`; peft loads it onto that model.",
)
