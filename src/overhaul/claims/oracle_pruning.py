"""Claim of arXiv:2412.00143: the loss right after pruning foretells little of what is left after training again.

The paper's LeNet on MNIST, at the size of a laptop: two convolutions of ten filters on handwritten digits of 8 x 8.

1. Easy: a fifth of the first convolution's filters, all 45 patterns. Hard: half of both convolutions, patterns drawn from
   63,504. Longer: the same patterns as in hard, trained three times as long.
2. Every pattern is trained again with two seeds; what is left is the accuracy on held-out digits.
3. Null control: a random score. Baseline: the sum of |w| (L1).
4. Exact: right after pruning, without any training, the loss foretells itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from overhaul.claims._claim import Check, Claim, Numbers
from overhaul.data import corpora
from overhaul.data.encode import encode_images
from overhaul.fit import fit
from overhaul.fit.regime import Regime
from overhaul.inspect.criterion_validity import criterion_validity
from overhaul.objectives import cross_entropy

FILTERS = 10
BATCH = 64
DROP = 0.1


@dataclass(frozen=True)
class Size:
    """How much is trained; the defaults are the experiment, a test takes less."""

    training_steps: int = 500
    steps: int = 25
    longer: int = 3
    candidates: int = 45
    repeats: int = 2


class Digits(nn.Module):
    """Two convolutions, each followed by a pool, and a linear layer: [b, 1, 8, 8] -> [b, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, FILTERS, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(FILTERS, FILTERS, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(4 * FILTERS, 10),
        )  # fmt: skip

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Logits."""
        return self.layers(pixel_values)


def run(seed: int) -> Numbers:
    """Train, prune in many ways and train again with one seed; see `experiment`."""
    return experiment(seed, Size())


def experiment(seed: int, size: Size) -> Numbers:
    """Tau, anomaly ratio and noise ceiling of each setting."""
    train, test = (encode_images(corpora.digits(split)) for split in ("train", "validation"))
    torch.manual_seed(seed)
    model = Digits()
    fit(model, [cross_entropy("train")], {"train": train}, steps=size.training_steps, batch_size=BATCH, lr=3e-3,
        schedule="cosine", name="training")  # fmt: skip
    settings: dict[str, dict[str, Any]] = {
        "easy": {"places": [0], "ratio": 0.2, "steps": size.steps},
        "hard": {"ratio": 0.5, "steps": size.steps},
        "longer": {"ratio": 0.5, "steps": size.steps * size.longer},
    }
    found: Numbers = {}
    for name, knobs in settings.items():
        torch.manual_seed(seed)
        regime = Regime(steps=knobs.pop("steps"), batch_size=BATCH, lr=1e-3, warmup=0.0)
        outcome = criterion_validity(
            model, train, test, training=regime, candidates=size.candidates, repeats=size.repeats, **knobs
        )
        for row in outcome.tables["criteria"].rows:
            found[f"{name}, {row[0]}: tau"] = float("nan") if row[1] is None else float(row[1])
        ceiling = outcome.facts["noise_ceiling"]
        found[f"{name}: anomaly ratio"] = outcome.facts["anomaly_ratio"]
        found[f"{name}: noise ceiling"] = float("nan") if ceiling is None else ceiling
        found[f"{name}: patterns"] = outcome.facts["patterns"]
    return found


CLAIM = Claim(
    slug="oracle-pruning",
    paper="2412.00143",
    title="Is Oracle Pruning the True Oracle?",
    statement="The loss right after pruning foretells what is left after training again only where little is pruned of one "
    "layer; for whole networks, and the longer they are trained again, it says less and less.",
    checks=(
        Check(
            "easy: the loss right after pruning foretells the accuracy (tau at most -0.2)",
            lambda n: n["easy, loss: tau"] <= -0.2,
        ),
        Check(
            f"hard: it foretells it less (tau higher by {DROP} or more)",
            lambda n: n["hard, loss: tau"] >= n["easy, loss: tau"] + DROP,
        ),
        Check(
            f"longer: less again (tau higher than in hard by {DROP / 2} or more)",
            lambda n: n["longer, loss: tau"] >= n["hard, loss: tau"] + DROP / 2,
        ),
        Check(
            "longer: it is not noise alone (the noise ceiling is higher than |tau|)",
            lambda n: n["longer: noise ceiling"] > abs(n["longer, loss: tau"]),
        ),
        Check(
            "null control: a random score foretells nothing (|tau| below 0.3) in easy and hard",
            lambda n: max(abs(n["easy, random: tau"]), abs(n["hard, random: tau"])) < 0.3,
        ),
    ),
    run=run,
    remarks=(
        "That the loss foretells less where more is pruned does not hold here: half of both convolutions costs so much, "
        "and so differently from pattern to pattern, that 25 steps do not make it up, and what is left is still what the "
        "loss said (tau -0.60 to -0.74). The second half of the claim holds on every seed: trained three times as long, "
        "the same patterns are foretold worse by 0.22 to 0.34, far from the noise ceiling. The paper trains until nothing "
        "more changes (30 epochs; here about one and three, set for time before the runs, as 45 patterns were instead of "
        "60). Run once more afterwards, on one seed and with 112 steps (five epochs): tau is -0.15 in easy and -0.14 in "
        "hard, and two of three patterns end better than the one with the lowest loss."
    ),
)
