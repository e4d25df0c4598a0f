"""Claim of arXiv:2509.15230: where every class has a prompt of its own, deleting a prompt deletes the class at once.

The paper's ViT on medical images, at the size of a laptop: the starter's ViT, untrained, learns handwritten digits with a
bank of ten prompts; all its weights train. All numbers are on held-out images. Chance is 0.10.

1. Protocol: every set of 1 and of 9 classes is forgotten in turn, and 60 drawn from the 252 sets of 5, without a change of a
   weight.
2. Baselines: the same ViT without a bank, trained with the same loss on the label, batches and steps; and that ViT with the
   class's logit masked, which forgets to the letter. The KL to uniform of a masked output is over the classes that are left.
3. Null control: the prompt of another class is removed (each class against its successor), and accuracy is on the class.
4. Attacks on the models that lack the digit 0, 1 or 2, means over them: a fresh prompt, fitted to ten labelled images of
   the class; a random vector in its place, for comparison; a linear probe on what enters the head.
"""

from __future__ import annotations

import copy
import statistics
from dataclasses import dataclass

import torch
from torch import nn

from overhaul.claims._claim import Check, Claim, Numbers
from overhaul.data import corpora
from overhaul.data.encode import encode_images
from overhaul.data.examples import Examples
from overhaul.fit import adamw, fit
from overhaul.forget.prompt_tokens import prompt_tokens
from overhaul.forget.prompt_tokens.gating import all_subsets, gated, linear_probe, logits_under, recover, uniform_kl
from overhaul.forget.prompt_tokens.prompts import PromptedClassifier
from overhaul.objectives import cross_entropy, evaluate
from overhaul.starters.builds import new_vit

CLASSES = 10
BATCH = 64
RATE = 1e-3
KNOWN = 10
"""Labelled images that an attacker has."""


@dataclass(frozen=True)
class Size:
    """How much is done; the defaults are the experiment, a test takes less."""

    images: int = 1437
    epochs: int = 30
    forgotten: tuple[int, ...] = (1, 5, 9)
    sets: int = 60
    attacked: int = 3
    attack_steps: int = 100


def run(seed: int) -> Numbers:
    """Train, forget and attack with one seed; see `experiment`."""
    return experiment(seed, Size())


def experiment(seed: int, size: Size) -> Numbers:
    """Accuracies by number of forgotten classes ("forgetting 5, retained"), baselines, null control and attacks."""
    train, test = (encode_images(corpora.digits(split))[: size.images] for split in ("train", "validation"))
    torch.manual_seed(seed)
    plain = _plain(train, size)
    found = _masked(plain, test)
    torch.manual_seed(seed)
    outcome = prompt_tokens(new_vit(), train, weights="all", epochs=size.epochs, batch_size=BATCH, lr=RATE)
    model = outcome.model
    assert isinstance(model, PromptedClassifier)
    everything = gated(model, test, model.available)
    found |= {"full bank, accuracy": everything.retained, "no prompt, accuracy": gated(model, test, []).forgotten}
    for count in size.forgotten:
        for name, (mean, deviation) in all_subsets(model, test, count, size.sets).items():
            found[f"forgetting {count}, {name}"] = mean
            if name in ("forgotten", "retained"):
                found[f"forgetting {count}, {name}, deviation over sets"] = deviation
    found["another class's prompt removed, accuracy"] = _another_removed(model, test)
    return found | _attacks(model, train, test, size)


def _plain(train: Examples, size: Size) -> nn.Module:
    model = new_vit()
    steps = size.epochs * len(train) // BATCH
    terms = [cross_entropy("images")]
    fit(model, terms, {"images": train}, steps=steps, batch_size=BATCH, lr=RATE, optimizer=adamw(), name="plain")
    return model


def _masked(plain: nn.Module, test: Examples) -> Numbers:
    """The model without a bank, and with the logit of each class masked in turn."""
    logits = torch.cat(evaluate(plain, lambda logits, _: logits.cpu(), list(test.batches(BATCH))))
    labels = torch.tensor([int(item["labels"]) for item in test.items])
    retained, gone_kl, kept_kl = [], [], []
    for name in range(CLASSES):
        others = [other for other in range(CLASSES) if other != name]
        left, stays = logits[:, others], labels != name
        guess = torch.tensor(others)[left.argmax(dim=-1)]
        retained.append(_share(guess[stays] == labels[stays]))
        gone_kl.append(float(uniform_kl(left[~stays]).mean()))
        kept_kl.append(float(uniform_kl(left[stays]).mean()))
    return {
        "no bank, accuracy": _share(logits.argmax(dim=-1) == labels),
        "masked logit, retained": statistics.fmean(retained),
        "masked logit, forgotten_kl": statistics.fmean(gone_kl),
        "masked logit, retained_kl": statistics.fmean(kept_kl),
    }


def _another_removed(model: PromptedClassifier, test: Examples) -> float:
    """Accuracy on each class when the prompt of its successor is missing instead of its own."""
    right: list[torch.Tensor] = []
    for name in range(CLASSES):
        wrong = (name + 1) % CLASSES
        images = test.filter(lambda row, name=name: row["label"] == name)
        logits, labels = logits_under(model, images, [one for one in range(CLASSES) if one != wrong])
        right.append(logits.argmax(dim=-1) == labels)
    return _share(torch.cat(right))


def _attacks(model: PromptedClassifier, train: Examples, test: Examples, size: Size) -> Numbers:
    """What the weights still know of a class that has no prompt."""
    rates: dict[str, list[float]] = {}
    for name in range(size.attacked):
        without = copy.deepcopy(model)
        without.forget([name])
        known = train.filter(lambda row, name=name: row["label"] == name)[:KNOWN]
        fresh = recover(without, known, steps=size.attack_steps)
        for what, vectors in (("fitted prompt", fresh), ("random prompt", torch.randn_like(fresh))):
            logits, labels = logits_under(without, test, extra=vectors)
            guess, gone = logits.argmax(dim=-1), labels == name
            rates.setdefault(f"{what}, forgotten", []).append(_share(guess[gone] == name))
            rates.setdefault(f"{what}, retained", []).append(_share(guess[~gone] == labels[~gone]))
        rates.setdefault("linear probe, forgotten", []).append(linear_probe(without, train, test)[name])
    return {name: statistics.fmean(values) for name, values in rates.items()}


def _share(right: torch.Tensor) -> float:
    return float(right.float().mean())


CLAIM = Claim(
    slug="pre-forgettable",
    paper="2509.15230",
    title="Deleting a class's prompt deletes the class",
    statement=(
        "A classifier trained with a prompt for each class forgets any set of classes at once when their prompts are "
        "deleted, with no training and no data, and the other classes keep their accuracy."
    ),
    checks=(
        Check(
            "the full bank knows the digits: accuracy at least 0.90, the same ViT without a bank at least 0.95",
            lambda found: found["full bank, accuracy"] >= 0.90 and found["no bank, accuracy"] >= 0.95,
        ),
        Check(
            "forgetting 1, 5 or 9 classes: mean accuracy on the forgotten ones at most 0.20",
            lambda found: all(found[f"forgetting {count}, forgotten"] <= 0.20 for count in Size().forgotten),
        ),
        Check(
            "forgetting 1, 5 or 9 classes: mean accuracy on the rest within 3 points of the full bank's",
            lambda found: all(
                found[f"forgetting {count}, retained"] >= found["full bank, accuracy"] - 0.03
                for count in Size().forgotten
            ),
        ),
        Check(
            "forgetting 1: KL to uniform on forgotten images at most a third of that on the others",
            lambda found: found["forgetting 1, forgotten_kl"] <= found["forgetting 1, retained_kl"] / 3,
        ),
        Check(
            "baseline: a masked logit's KL to uniform on forgotten images is at least twice the deleted prompt's",
            lambda found: found["masked logit, forgotten_kl"] >= 2 * found["forgetting 1, forgotten_kl"],
        ),
        Check(
            "null control: with another class's prompt removed, accuracy on a class is within 5 points of the full bank's",
            lambda found: found["another class's prompt removed, accuracy"] >= found["full bank, accuracy"] - 0.05,
        ),
        Check(
            "it gates and does not erase: a prompt fitted to ten images brings back at least half of the class, a random "
            "one at most a quarter",
            lambda found: found["fitted prompt, forgotten"] >= 0.5 and found["random prompt, forgotten"] <= 0.25,
        ),
    ),
    run=run,
    remarks=(
        "The gate shuts, but not to the letter. On forgotten images the output is almost uniform, and few of them are "
        "taken for another class; yet the class that wins by a hair is the right one up to three times as often as "
        "chance, even without any prompt. The loss asks for a KL of 0 and is indifferent to the order of what little is "
        "left, so a query that returns only the best class still tells something. The model without a bank is trained at "
        "the same constant rate for a fair comparison, which costs it some points; the bank costs none beside it. What "
        "was learnt stays in the weights: a prompt fitted to ten images, or a linear probe, has the class back almost "
        "whole."
    ),
)
