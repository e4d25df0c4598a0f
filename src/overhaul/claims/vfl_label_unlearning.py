"""Claim of arXiv:2410.10922: a class of a vertically split network is forgotten from a few samples, in seconds.

Handwritten digits, left half with one party and right half with another: perceptrons 32-64-32 below, a linear layer above,
trained from messages alone. The digit 0 is forgotten with 40 samples; 3 of every other digit are there to recover with.
All accuracies are on held-out images.

1. Ascent climbs cross-entropy, as in the paper, by plain SGD without clipping at the card's rate, until at most 5% of the
   40 samples are right: on pairs of embeddings or on the samples, with recovery or without. The method as it stands by
   default (unlikelihood in place of cross-entropy) is measured beside them, and both losses on two digits at once, for
   which no margin was set.
2. Baselines: a network trained without the digit, fine-tuning on the recovery samples alone for as many epochs, and
   masking the digit's row of the head.
3. The network is trained for 30 epochs in batches of 64 (card: 60 in batches of 32), which was settled after a first look
   at seed 0. One trained until no loss was left (0.001) forgot by plain ascent (0.148 of the others right without recovery,
   0.629 with it), but not by mixup: at this rate 300 epochs changed none of the 40. The margins were written down after
   that look and after one more at the setting that is used, with other samples; so they are not blind.
4. Null control: as many epochs of the same ascent on 40 samples of all digits, whose labels are shuffled.
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from overhaul.claims._claim import Check, Claim, Numbers
from overhaul.data import corpora
from overhaul.data.encode import encode_images
from overhaul.data.examples import Examples
from overhaul.errors import RunError
from overhaul.forget.vertical import train, vertical
from overhaul.objectives import evaluate
from overhaul.parties.model import VerticalConfig, VerticalModel
from overhaul.parties.party import Rates

FORGOTTEN = 0
TWO = (0, 2)
SAMPLES = 40
PER_CLASS = 3
CARD: dict[str, Any] = {
    "loss": "cross_entropy", "lr": 0.03, "momentum": 0.0, "weight_decay": 0.0, "clip": None, "stop_at": 0.05, "epochs": 300
}  # fmt: skip


@dataclass(frozen=True)
class Size:
    """How much is trained; the default is the experiment, a test takes less."""

    training_epochs: int = 30


def run(seed: int) -> Numbers:
    """Train, forget and judge with one seed; see `experiment`."""
    return experiment(seed, Size())


def experiment(seed: int, size: Size) -> Numbers:
    """Held-out accuracy on the kept digits and on the forgotten one, by variant ("mixup and recovery, kept")."""
    torch.manual_seed(seed)
    full = encode_images(corpora.digits("train")).shuffled(seed)
    judged = encode_images(corpora.digits("validation"))
    forget, recovery = few(full)
    found: Numbers = {}

    def note(variant: str, model: nn.Module, digits: Collection[int] = (FORGOTTEN,)) -> None:
        for role, wanted in (("kept", False), ("forgotten", True)):
            part = judged.filter(lambda row, wanted=wanted: (row["label"] in digits) == wanted)
            found[f"{variant}, {role}"] = _accuracy(model, part)

    original = _trained(full, seed, size)
    note("original", original)
    note("retrained", _trained(full.filter(lambda row: row["label"] != FORGOTTEN), seed, size))
    note("head row masked", masked(original))
    for mixup in (False, True):
        for recover in (False, True):
            variant = f"{'mixup' if mixup else 'plain'} {'and' if recover else 'without'} recovery"
            model, epochs = _forget(original, forget, recovery, seed, **CARD, mixup=mixup, recover=recover)
            note(variant, model)
            found[f"{variant}, epochs"] = epochs
    note("default", _forget(original, forget, recovery, seed)[0])
    for loss in ("unlikelihood", "cross_entropy"):
        two = _forget(original, *few(full, TWO), seed, loss=loss, epochs=100)[0]
        note(f"two digits by {loss.replace('_', '-')}", two, TWO)
    epochs = int(found["plain and recovery, epochs"])
    tuned = copy.deepcopy(original)
    train(tuned, recovery, epochs=epochs, rates=Rates(CARD["lr"]))
    note("fine-tuned", tuned)
    note("shuffled labels", _shuffled_ascent(original, full, seed, epochs))
    return found


def few(full: Examples, digits: Collection[int] = (FORGOTTEN,)) -> tuple[Examples, Examples]:
    """The first samples of each digit to forget, and the first of every other one."""
    wanted = {digit: SAMPLES if digit in digits else PER_CLASS for digit in range(10)}
    places: list[int] = []
    for place, row in enumerate(full.rows):
        if wanted[row["label"]]:
            wanted[row["label"]] -= 1
            places.append(place)
    chosen = full.select(places)
    return (
        chosen.filter(lambda row: row["label"] in digits),
        chosen.filter(lambda row: row["label"] not in digits),
    )


def masked(original: VerticalModel) -> VerticalModel:
    """The same network, which never names the digit."""
    model = copy.deepcopy(original)
    head = [module for module in model.top.modules() if isinstance(module, nn.Linear)][-1]
    with torch.no_grad():
        head.weight[FORGOTTEN] = 0.0
        head.bias[FORGOTTEN] = -1e4
    return model


def _trained(images: Examples, seed: int, size: Size) -> VerticalModel:
    torch.manual_seed(seed)
    halves = [[0, 4], [4, 8]]
    model = VerticalModel(VerticalConfig(columns=halves, bottoms=[{"widths": [32, 64, 32]}] * 2, top=[64, 10]))
    train(model, images, epochs=size.training_epochs, rates=Rates(0.1), batch_size=64)
    return model


def _forget(
    original: VerticalModel, forget: Examples, recovery: Examples, seed: int, **knobs: Any
) -> tuple[nn.Module, int]:
    """The changed network, and the epochs it took.

    Where the loss ends as no number, that is the network after the last good round, and all epochs.
    """
    torch.manual_seed(seed)
    model = copy.deepcopy(original)
    try:
        return model, int(str(vertical(model, forget, recovery, **knobs).facts["epochs"]))
    except RunError:
        return model, CARD["epochs"]


def _shuffled_ascent(original: VerticalModel, full: Examples, seed: int, epochs: int) -> nn.Module:
    """The null control: climbing on samples whose labels say nothing."""
    chosen = full[:SAMPLES]
    draw = torch.Generator().manual_seed(seed)
    labels = [chosen[i]["labels"] for i in torch.randperm(SAMPLES, generator=draw).tolist()]
    knobs = {**CARD, "epochs": epochs, "stop_at": None, "mixup": False, "recover": False}
    return _forget(original, chosen.with_column("labels", labels), chosen, seed, **knobs)[0]


def _accuracy(model: nn.Module, images: Examples) -> float:
    right = evaluate(model, lambda logits, batch: logits.argmax(dim=-1) == batch["labels"], list(images.batches(512)))
    return torch.cat(right).float().mean().item()


VARIANTS = [f"{how} recovery" for how in ("plain without", "plain and", "mixup without", "mixup and")]

CLAIM = Claim(
    slug="vfl-label-unlearning",
    paper="2410.10922",
    title="A class of a vertically split network is forgotten from a few samples",
    statement=(
        "Gradient ascent on mixed embeddings of a few dozen samples of a class, followed by a light recovery on a few of "
        "the others, makes a vertically split network forget the class, while only embeddings and gradients are exchanged."
    ),
    checks=(
        Check(
            "the original knows both parts: accuracy at least 0.93 each",
            lambda found: min(found["original, kept"], found["original, forgotten"]) >= 0.93,
        ),
        Check(
            "all four kinds of ascent, and the default: held-out accuracy on the forgotten digit at most 0.1",
            lambda found: all(found[f"{variant}, forgotten"] <= 0.1 for variant in (*VARIANTS, "default")),
        ),
        Check(
            "recovery: at least 0.1 more accuracy on the kept digits than plain ascent without it",
            lambda found: found["plain and recovery, kept"] >= found["plain without recovery, kept"] + 0.1,
        ),
        Check(
            "mixup, without recovery: at least 0.05 more accuracy on the kept digits than plain ascent",
            lambda found: found["mixup without recovery, kept"] >= found["plain without recovery, kept"] + 0.05,
        ),
        Check(
            "baseline: fine-tuning on the recovery samples for as many epochs leaves at least 0.5 of the digit",
            lambda found: found["fine-tuned, forgotten"] >= 0.5,
        ),
        Check(
            "null control: ascent on shuffled labels for as many epochs leaves at least 0.3 more of the digit",
            lambda found: found["shuffled labels, forgotten"] >= found["plain and recovery, forgotten"] + 0.3,
        ),
    ),
    run=run,
    remarks=(
        "Every kind of ascent forgets the digit, in seconds; what climbing cross-entropy costs is a matter of luck. "
        "Plain ascent keeps 0.86 and 0.90 of the other digits on two seeds and 0.22 on the third. Recovery mends what "
        "was broken (from 0.22 to 0.86, and from at most 0.31 to at least 0.79 beside mixup) and changes little where "
        "nothing was. Mixup without recovery is not gentler here but far harsher: mixtures of samples that the network "
        "is sure of are flatter still, so it climbs two to three times as many epochs before the samples themselves are "
        "lost. Masking one row of the head does better on accuracy than any of them, without forgetting anything. "
        "Ascent on shuffled labels wrecks the network as a whole on two seeds, the digit with it, which is why that "
        "control only holds on one. The default, which lowers the unlikelihood of the label instead, is steep where the "
        "network is sure and flat once the label is lost: it keeps 0.92 to 0.94 on every seed, and with two digits at "
        "once 0.88 to 0.90 where cross-entropy keeps 0.37 to 0.61."
    ),
)
