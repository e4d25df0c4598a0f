"""Claim of arXiv:2406.09391: the gradients of the first epoch, of the embedding alone, are what unlearning needs.

One small GPT-2 learns fictitious biographies character by character; four of them are then forgotten by going along stored
or live gradients until they cost one nat a character more.

1. Selectivity is the rise of what stays over the rise of what is forgotten: lower is better, 1 is no selection at all. All
   arms are stopped at the same rise, so they compare.
2. Sources: stored gradients of the first epoch, of all epochs summed, of the last one; live gradients in one step; live
   gradients in small steps (ordinary gradient ascent). Each on all weights, the token embedding, the first block and the
   last two blocks.
3. Null control: the stored gradients of four other samples, drawn at random, stopped in the same way at the forgotten four.
4. What stays is measured on biographies of which no gradient was used.
5. A batch is four biographies: with twice as many the model learns too little of them to have something to forget.

Not tried here: that fuzzy matching is less complete than repeating; the biographies have no near duplicates.
"""

from __future__ import annotations

import copy
import math
import random
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from overhaul.claims._claim import Check, Claim, Numbers
from overhaul.data.examples import Examples
from overhaul.data.tasks import ANIMAL, FIRST, LAST, TOWN, TOWN_END, TRADE, TRADE_END
from overhaul.forget.first_epoch import first_epoch
from overhaul.forget.first_epoch.ascent import Goal, Seen, once
from overhaul.forget.first_epoch.ledger import Where, chosen
from overhaul.forget.first_epoch.recording import record

ALPHABET = "\n abcdefghijklmnopqrstuvwxyz,."
GROUPS: tuple[Where, ...] = ("all", "embedding", "first block", "last blocks")
SOURCES: dict[str, dict[str, Any]] = {
    "first epoch": {"gradients": "first"},
    "all epochs": {"gradients": "all"},
    "last epoch": {"gradients": "last"},
    "live, one step": {"gradients": "live"},
    "live, small steps": {"gradients": "live", "mode": "iterative", "repetitions": 200},
}


@dataclass(frozen=True)
class Size:
    """How much is learnt, and by how many nats a character (`rise`) the forgotten biographies cost more in every arm.

    The defaults are the experiment; a test takes less.
    """

    people: int = 160
    forgotten: int = 4
    probed: int = 40
    epochs: int = 12
    batch: int = 4
    hidden: int = 64
    blocks: int = 4
    lr: float = 2e-3
    rise: float = 1.0


def run(seed: int) -> Numbers:
    """Learn, record, and forget in every way, with one seed."""
    return experiment(seed, Size())


def experiment(seed: int, size: Size) -> Numbers:
    """Selectivity by source and group ("first epoch, embedding"), that of the null control, and what was known before."""
    torch.manual_seed(seed)
    everyone = biographies(seed, size.people)
    forget, others = everyone[: size.forgotten], everyone[size.forgotten : 2 * size.forgotten]
    probe = everyone[2 * size.forgotten :][: size.probed]
    model = new_gpt2(size)
    with tempfile.TemporaryDirectory() as scratch:
        kept, _ = record(
            model,
            everyone,
            Path(scratch) / "ledger",
            tracked=range(2 * size.forgotten),
            every_epoch=True,
            epochs=size.epochs,
            batch_size=size.batch,
            lr=size.lr,
        )
        before = Goal.at(model, forget, probe, target=math.inf).seen[0]
        found: Numbers = {"forgotten, nats before": before.forget, "kept, nats before": before.retain}
        target = before.forget + size.rise
        for source, knobs in SOURCES.items():
            ledger = None if knobs["gradients"] == "live" else str(kept.folder)
            for where in GROUPS:
                options = {"ledger": ledger, "where": where, "target": target, "retain_rise": None, **knobs}
                facts = first_epoch(copy.deepcopy(model), forget, probe, **options).facts
                forgotten, stays = (float(str(facts[f"{role}_nll_after"])) for role in ("forget", "retain"))
                found[f"{source}, {where}"] = selectivity(before, Seen(forgotten, stays, 0.0))
        for source in ("first epoch", "last epoch"):
            for where in ("all", "embedding"):
                tried = copy.deepcopy(model)
                parameters = chosen(tried, where)
                ids, epochs = kept.matching(others), SOURCES[source]["gradients"]
                direction = kept.sum(ids, epochs, list(parameters))
                goal = Goal.at(tried, forget, probe, target=target)
                once(parameters, lambda direction=direction: direction, goal, 0.05, 20)
                found[f"other samples, {source}, {where}"] = selectivity(before, goal.seen[-1])
    return found


def selectivity(before: Seen, after: Seen) -> float:
    """The rise of what stays over the rise of what is forgotten."""
    return (after.retain - before.retain) / (after.forget - before.forget)


def biographies(seed: int, people: int) -> Examples:
    """One sentence a person, one token a character; every character but the first is learnt."""
    draw = random.Random(seed)
    names = draw.sample([f"{first} {last}" for first in FIRST for last in LAST], people)
    items = []
    for name in names:
        born = f"{draw.choice(TOWN)}{draw.choice(TOWN_END)}"
        trade = f"{draw.choice(TRADE)} {draw.choice(TRADE_END)}"
        text = f"\n{name} was born in {born}, is a {trade} and has a {draw.choice(ANIMAL)}.\n".lower()
        ids = torch.tensor([ALPHABET.index(character) for character in text])
        items.append({"input_ids": ids, "labels": ids.clone()})
    return Examples(items, [{}] * len(items))


def new_gpt2(size: Size) -> nn.Module:
    """Embedding and head are tied, as in GPT-2; no dropout."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=len(ALPHABET), n_embd=size.hidden, n_layer=size.blocks, n_head=4, n_positions=128, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def _embedding_suffices(source: str) -> Check:
    return Check(
        f"{source}: the embedding alone is as selective as all weights, or worse by at most 0.05",
        lambda found: found[f"{source}, embedding"] <= found[f"{source}, all"] + 0.05,
    )


CLAIM = Claim(
    slug="first-epoch-ga",
    paper="2406.09391",
    title="Taking back the gradients of the first epoch",
    statement=(
        "Going back along the gradients that the forgotten samples had in the first epoch works better than along those of "
        "all epochs and better than gradient ascent on the whole model; the embedding is enough, late blocks do nothing."
    ),
    checks=(
        _embedding_suffices("live, one step"),
        _embedding_suffices("last epoch"),
        _embedding_suffices("first epoch"),
        Check(
            "first epoch, all weights: at least as selective as the sum over all epochs",
            lambda found: found["first epoch, all"] <= found["all epochs, all"],
        ),
        Check(
            "first epoch, embedding: at least as selective as gradient ascent on the whole model in small steps",
            lambda found: found["first epoch, embedding"] <= found["live, small steps, all"],
        ),
        Check(
            "first epoch: the last two blocks are less selective than the embedding",
            lambda found: found["first epoch, last blocks"] > found["first epoch, embedding"],
        ),
        *(
            Check(
                f"null control, {source}, all weights: more selective than other samples' gradients by at least 0.1",
                lambda found, source=source: found[f"{source}, all"] <= found[f"other samples, {source}, all"] - 0.1,
            )
            for source in ("first epoch", "last epoch")
        ),
    ),
    run=run,
    remarks=(
        "The paper's full text and settings were not available; this is a reading of its abstract. Hardly anything of it is "
        "found here. The first epoch is the worst one to keep: its gradients hold what all samples have in common, and "
        "those of other samples do nearly as well (0.98, 0.89, 0.87 against 1.07, 0.92, 0.95). The sum over all epochs is "
        "the most selective of the stored ones (0.55, 0.51, 0.54). The embedding alone is mostly a little worse than all "
        "weights, by 0.07 to 0.11 for the last epoch. Late blocks, far from doing nothing, are the best place to climb on "
        "every seed but for first-epoch gradients."
    ),
)
