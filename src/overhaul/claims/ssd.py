"""Claim of arXiv:2308.07707: two gradient passes and one multiplication forget a class, and the rest stays.

The paper's ResNet18 and ViT on CIFAR, at the size of a laptop: the starter's ViT, trained on handwritten digits,
forgets the digit 3. All accuracies are on held-out images.

1. Baselines: the model before, one retrained without the class (the anchor), and fine-tuning on the retained images for
   five epochs, as many as in the paper, at the peak rate of the training.
2. Null control: the factors of the adaptive rule, shuffled inside each tensor: as many weights shrink as much, anywhere.
3. The percentile rule of ASSD is tried against the paper's fixed alpha of 10, each with gradients of batches of 64 and of
   single samples.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from overhaul.claims._claim import Check, Claim, Numbers
from overhaul.data import corpora
from overhaul.data.encode import encode_images
from overhaul.data.examples import Examples
from overhaul.errors import RunError
from overhaul.fit import fit
from overhaul.forget.ssd import ssd
from overhaul.objectives import cross_entropy, evaluate
from overhaul.starters.builds import learn_images, new_vit

FORGOTTEN = 3
PEAK_RATE = 1e-3
ROLES = ("retain", "forget")


@dataclass(frozen=True)
class Size:
    """How much is trained; the defaults are the experiment, a test takes less."""

    training_steps: int = 1500
    fine_tuning_epochs: int = 5
    random_masks: int = 3


def run(seed: int) -> Numbers:
    """Train, forget and judge with one seed; see `experiment`."""
    return experiment(seed, Size())


def experiment(seed: int, size: Size) -> Numbers:
    """Held-out accuracy on the retained classes and on the forgotten one, by variant ("adaptive, batch, forget")."""
    full = encode_images(corpora.digits("train"))
    forget, retain = _parts(full)
    judged: dict[str, Examples] = {}
    judged["forget"], judged["retain"] = _parts(encode_images(corpora.digits("validation")))
    found: Numbers = {}

    def note(variant: str, model: nn.Module) -> None:
        found.update({f"{variant}, {role}": _accuracy(model, judged[role]) for role in ROLES})

    original = _trained(full, seed, size)
    note("original", original)
    note("retrained", _trained(retain, seed, size))
    tuned = copy.deepcopy(original)
    steps = size.fine_tuning_epochs * len(retain) // 64
    fit(
        tuned,
        [cross_entropy("retain")],
        {"retain": retain},
        steps=steps,
        batch_size=64,
        lr=PEAK_RATE,
        name="fine-tuning",
    )
    note("fine-tuned", tuned)
    for rule, alpha in (("adaptive", "adaptive"), ("alpha 10", 10.0)):
        for importance in ("batch", "sample"):
            variant = f"{rule}, {importance}"
            changed = copy.deepcopy(original)
            found[f"{variant}, selected share"] = _dampen(changed, forget, full, alpha=alpha, importance=importance)
            note(variant, changed)
            if variant == "adaptive, batch":
                _note_random_masks(found, original, changed, judged, seed, size)
    return found


def _parts(images: Examples) -> tuple[Examples, Examples]:
    """What is to be forgotten, and the rest."""
    return (
        images.filter(lambda row: row["label"] == FORGOTTEN),
        images.filter(lambda row: row["label"] != FORGOTTEN),
    )


def _trained(images: Examples, seed: int, size: Size) -> nn.Module:
    torch.manual_seed(seed)
    model = new_vit()
    learn_images(model, images, size.training_steps, PEAK_RATE, "training")
    return model


def _accuracy(model: nn.Module, images: Examples) -> float:
    right = evaluate(model, lambda logits, batch: logits.argmax(dim=-1) == batch["labels"], list(images.batches(256)))
    return torch.cat(right).float().mean().item()


def _dampen(model: nn.Module, forget: Examples, full: Examples, **knobs: Any) -> float:
    """The share of weights that was selected; 0 where the threshold is above every weight, which `ssd` refuses."""
    try:
        return float(str(ssd(model, forget, full, **knobs).facts["selected_share"]))
    except RunError:
        return 0.0


def _note_random_masks(
    found: Numbers, original: nn.Module, dampened: nn.Module, judged: dict[str, Examples], seed: int, size: Size
) -> None:
    """Mean accuracies over several random masks."""
    draw = torch.Generator().manual_seed(seed)
    masked = [random_mask(original, dampened, draw) for _ in range(size.random_masks)]
    for role in ROLES:
        found[f"random mask, {role}"] = sum(_accuracy(model, judged[role]) for model in masked) / len(masked)


@torch.no_grad()
def random_mask(original: nn.Module, dampened: nn.Module, draw: torch.Generator) -> nn.Module:
    """A model in which the factors of `dampened` are applied to weights drawn at random inside the same tensors."""
    masked = copy.deepcopy(original)
    for before, after, new in zip(original.parameters(), dampened.parameters(), masked.parameters(), strict=True):
        factors = torch.where(before == 0, 1.0, after / before).flatten()
        new.mul_(factors[torch.randperm(len(factors), generator=draw)].view_as(new))
    return masked


def _forgets_and_keeps(variant: str) -> Callable[[Numbers], bool]:
    """Forget accuracy at most 0.05, and at most 1.5 points lost on the rest."""
    return lambda found: (
        found[f"{variant}, forget"] <= 0.05 and found[f"{variant}, retain"] >= found["original, retain"] - 0.015
    )


CLAIM = Claim(
    slug="ssd",
    paper="2308.07707",
    title="Dampening the weights that matter to a class forgets it without training",
    statement=(
        "Shrinking the weights that matter disproportionately to the forget set makes a classifier forget a class as a "
        "retrained one would, while the other classes keep their accuracy."
    ),
    checks=(
        Check(
            "the original knows both parts: accuracy at least 0.93 each",
            lambda found: all(found[f"original, {role}"] >= 0.93 for role in ROLES),
        ),
        Check(
            "adaptive, batches of 64: accuracy on the forgotten class at most 0.05, at most 1.5 points lost on the rest",
            _forgets_and_keeps("adaptive, batch"),
        ),
        Check("adaptive, per sample: the same margins", _forgets_and_keeps("adaptive, sample")),
        Check(
            "adaptive, batches of 64: accuracy on the rest within 3 points of the retrained model's",
            lambda found: found["adaptive, batch, retain"] >= found["retrained, retain"] - 0.03,
        ),
        Check(
            "baseline: fine-tuning on the rest leaves at least 0.2 more accuracy on the forgotten class",
            lambda found: found["fine-tuned, forget"] >= found["adaptive, batch, forget"] + 0.2,
        ),
        Check(
            "null control: a random mask of equal counts and factors leaves at least 0.5 more of the forgotten class",
            lambda found: found["random mask, forget"] >= found["adaptive, batch, forget"] + 0.5,
        ),
        Check(
            "fixed alpha 10, batches of 64: accuracy on the forgotten class at most 0.05, whatever the rest loses",
            lambda found: found["alpha 10, batch, forget"] <= 0.05,
        ),
        Check(
            "fixed alpha 10, per sample: less than 0.1% of the weights selected, so it does next to nothing",
            lambda found: found["alpha 10, sample, selected share"] < 0.001,
        ),
    ),
    run=run,
    remarks=(
        "On one seed of three the percentile rule left 4 of 48 images of the class (batches), and on another 0.60 of "
        "it (single samples): it selects a fixed share of the weights, whether or not that is what the model needs. "
        "The fine-tuning baseline does not separate the two: five epochs at the peak rate are enough for a ViT of "
        "136,000 weights to lose a class it no longer sees, so forgetting without training is cheaper here, not "
        "stronger. The fixed threshold shows why the percentile is the default: alpha 10 on batches forgets always "
        "and costs 14 and 36 points of the rest on two seeds."
    ),
)
