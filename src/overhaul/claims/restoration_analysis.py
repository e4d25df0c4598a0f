"""Claim of arXiv:2602.18505: what unlearning suppressed comes back when a layer is steered; controls say what that means.

The paper's ViT on CIFAR-10, at the size of a laptop: a ViT of six blocks on handwritten digits forgets the digit 3 in three
ways, and is steered behind its fourth block (place 3). All accuracies are on held-out images.

1. "relabelled": cross-entropy on wrong random classes for the digit and true ones for the rest, all weights train.
2. "head": the same, and only the classifier trains.
3. "retrained": from other random weights, without the digit. Nothing of it can be known, and nothing lies in the same basis.
4. Controls of the paper's arm: random features as far, the class token alone, features alone, the original's tail on the
   unlearned states, and probes on the models' own states.
"""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from overhaul.claims._claim import Check, Claim, Numbers
from overhaul.data import corpora
from overhaul.data.encode import encode_images
from overhaul.data.examples import Examples, join
from overhaul.fit import fit
from overhaul.inspect.restoration import restoration
from overhaul.models import save
from overhaul.objectives import cross_entropy
from overhaul.sae import Dictionary
from overhaul.selectors import select
from overhaul.starters.builds import LABELS, learn_images

FORGOTTEN, LAYER = 3, 3
ALPHAS = [1.0, 5.0]


@dataclass(frozen=True)
class Size:
    """How much is trained; the defaults are the experiment, a test takes less."""

    training_steps: int = 450
    unlearning_steps: int = 150
    unlearning_rate: float = 3e-4
    autoencoder_steps: int = 400


def run(seed: int) -> Numbers:
    """Train, unlearn and steer with one seed; see `experiment`."""
    return experiment(seed, Size())


def experiment(seed: int, size: Size) -> Numbers:
    """Accuracies and restoration rates of every way to forget ("relabelled, alpha 5, class token alone")."""
    full, test = (encode_images(corpora.digits(part)) for part in ("train", "validation"))
    found: Numbers = {}
    with tempfile.TemporaryDirectory() as folder:
        models = unlearned(full, seed, size)
        saved = {name: save(model, None, Path(folder) / name, dtype="float32") for name, model in models.items()}
        original = saved.pop("original")
        for name, checkpoint in saved.items():
            torch.manual_seed(seed)
            outcome = restoration(
                checkpoint,
                original,
                full,
                test,
                value=FORGOTTEN,
                layers=str(LAYER),
                alphas=ALPHAS,
                dictionary=Dictionary(expansion=2, k=8, autoencoder_steps=size.autoencoder_steps, states=16384),
            )
            found |= {f"{name}, {what}": value for what, value in numbers(outcome.facts, outcome.layers).items()}
            for alpha in ALPHAS:
                for arm, rate in outcome.tables[f"restoration rate at alpha {alpha:g}"].rows:
                    at = arm if arm == "tail swap" else f"alpha {alpha:g}, {arm}"
                    found[f"{name}, {at}"] = math.nan if rate is None else float(rate)
    return found


def numbers(facts: Mapping[str, object], layers: Mapping[str, Mapping[int, float]]) -> Numbers:
    """What is read of an outcome besides the rates."""
    wanted = ("original_on_the_group", "unlearned_on_the_group", "unlearned_on_others")
    found = {name.replace("_", " "): float(str(facts[name])) for name in wanted}
    for flag in ("identical_up_to_layers", "another_basis_at_layers"):
        found[flag.replace("_", " ")] = float(facts[flag] == [LAYER])
    return found | {name: values[LAYER] for name, values in layers.items()}


def unlearned(full: Examples, seed: int, size: Size) -> dict[str, nn.Module]:
    """The original, and one model for every way to forget."""
    forget = full.filter(lambda row: row["label"] == FORGOTTEN)
    retain = full.filter(lambda row: row["label"] != FORGOTTEN)
    draw = torch.Generator().manual_seed(seed)
    wrong = (FORGOTTEN + torch.randint(1, 10, (len(forget),), generator=draw)) % 10
    lied = Examples(
        [{**item, "labels": label} for item, label in zip(forget.items, wrong, strict=True)],
        forget.rows,
        full.processor,
    )
    models = {"original": trained(full, seed, size)}
    for name in ("relabelled", "head"):
        model = models[name] = copy.deepcopy(models["original"])
        head = select(model, "head") if name == "head" else None
        torch.manual_seed(seed)
        fit(
            model,
            [cross_entropy("data")],
            {"data": join([lied, retain])},
            steps=size.unlearning_steps,
            batch_size=64,
            lr=size.unlearning_rate if head is None else 30 * size.unlearning_rate,
            trainable=head,
            name=name,
        )
    models["retrained"] = trained(retain, seed + 1000, size)
    return models


def trained(images: Examples, seed: int, size: Size) -> nn.Module:
    """A ViT of six blocks, 48 wide, on patches of 2 x 2 pixels."""
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(seed)
    config = ViTConfig(
        image_size=8, patch_size=2, num_channels=1, hidden_size=48, num_hidden_layers=6, num_attention_heads=4,
        intermediate_size=96, **LABELS, hidden_dropout_prob=0.0,
    )  # fmt: skip
    model = ViTForImageClassification(config)
    learn_images(model, images, size.training_steps, 1e-3, "training")
    return model


PAPER = "features + class token"


CLAIM = Claim(
    slug="restoration-analysis",
    paper="2602.18505",
    title="What unlearning suppressed can be steered back, and so it can without the chosen features",
    statement=(
        "Steering expert features of the original model into a middle layer of an unlearned one brings the forgotten class "
        "back where it was only suppressed, and does not where it was deleted."
    ),
    checks=(
        Check(
            "the original knows the digit (accuracy at least 0.8); however it is forgotten, it is at most 0.1 then, and "
            "the rest stays at 0.85 or more",
            lambda n: (
                n["relabelled, original on the group"] >= 0.8
                and all(
                    n[f"{name}, unlearned on the group"] <= 0.1 and n[f"{name}, unlearned on others"] >= 0.85
                    for name in ("relabelled", "head", "retrained")
                )
            ),
        ),
        Check(
            "relabelled: at alpha 5 the paper's steering restores at least 0.8 of the class",
            lambda n: n[f"relabelled, alpha 5, {PAPER}"] >= 0.8,
        ),
        Check(
            "retrained: it restores at most 0.1 at alpha 1 and at alpha 5",
            lambda n: max(n[f"retrained, alpha {alpha:g}, {PAPER}"] for alpha in ALPHAS) <= 0.1,
        ),
        Check(
            "null control: as many random features, moved as far, restore at least as much less 0.1 (relabelled, alpha 5)",
            lambda n: n["relabelled, alpha 5, random + class token"] >= n[f"relabelled, alpha 5, {PAPER}"] - 0.1,
        ),
        Check(
            "baseline: the class token alone, without any feature, restores at least as much less 0.1 (relabelled, alpha 5)",
            lambda n: n["relabelled, alpha 5, class token alone"] >= n[f"relabelled, alpha 5, {PAPER}"] - 0.1,
        ),
        Check(
            "head only: the purest suppression is flagged as identical up to the layer, steering restores exactly nothing, "
            "and the original's tail restores all",
            lambda n: (
                n["head, identical up to layers"] == 1
                and all(n[f"head, alpha {alpha:g}, {PAPER}"] == 0 for alpha in ALPHAS)
                and n["head, tail swap"] == 1
            ),
        ),
        Check(
            "retrained is flagged as another basis, and relabelled is not",
            lambda n: n["retrained, another basis at layers"] == 1 and n["relabelled, another basis at layers"] == 0,
        ),
        Check(
            "a rate of 0 is no deletion: a probe on the retrained model's own states finds the class it never saw with a "
            "recall of at least 0.3",
            lambda n: n["retrained, probe recall of the group, unlearned"] >= 0.3,
        ),
    ),
    run=run,
    remarks=(
        "The margins come from an earlier experiment of this size on one seed. What was shortened before the first "
        "run is training (900 steps, then 450) and the autoencoders' (600, then 400), for time; a short pilot on seed "
        "3 showed that 450 steps train and 150 unlearn. On two seeds everything came back, past the original, with "
        "the class token alone as with any features. On seed 0 it did not: 0.73 came back with the selected features, "
        "0.48 with random ones and 0.33 with the class token alone, so there the selected features did count, though "
        "never without the class token (0 on every seed). The likely reason is how far the unlearned model moved: on "
        "seed 0 least (0.39 of its states' length, against 0.45 and 0.69), and steering adds a multiple of that way. "
        "So whether controls do as well is a matter of the single model, and one seed could not have told. The probe "
        "finds the class in the retrained model's states as well as in the relabelled one's (0.79 to 0.96): pictures "
        "of a class can be told apart by a model that never saw it, so a recall is no sign of memory either."
    ),
)
