"""Claim of arXiv:2307.13136: larger models do not close the gap between groups, a last layer refitted on balanced data does.

The paper's photographs from several continents, at the size of a laptop: handwritten digits in four "regions", turned by 0,
15, 30 and 45 degrees.

1. Five networks of two convolutions, 2 to 32 filters wide, are trained on a stream of 837 digits, 96% of them not turned.
2. The last layer of each is refitted by `adapt.head` on 600 other digits, 150 of each region.
3. Accuracy by region is measured on 360 held-out digits, each in all four regions.
4. Null controls: the refit on the same 600 digits in the proportions of the stream; and on these with the weights of groups
   whose names were dealt out at random. Beside them, with the weights of the true groups.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.ndimage import rotate
from torch import Tensor, nn

from overhaul.adapt.head import head
from overhaul.claims._claim import Check, Claim, Numbers
from overhaul.data import corpora
from overhaul.data.encode import encode_images
from overhaul.data.examples import Examples, Row, places_by
from overhaul.fit import fit
from overhaul.inspect.groups.disparity import Hits, max_min
from overhaul.judge.likelihood import ranks
from overhaul.objectives import cross_entropy

ANGLES = (0, 15, 30, 45)
STREAM = (0.96, 0.04 / 3, 0.04 / 3, 0.04 / 3)
WIDTHS = (2, 4, 8, 16, 32)
CURATED = 600
BACKGROUND = -1.0


@dataclass(frozen=True)
class Size:
    """How much is trained; the defaults are the experiment, a test takes less."""

    widths: tuple[int, ...] = WIDTHS
    steps: int = 600


class Cnn(nn.Module):
    """Two convolutions, each followed by a pool, and a linear layer: [b, 1, 8, 8] -> [b, 10]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8 * width, 10),
        )  # fmt: skip

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Logits."""
        return self.layers(pixel_values)


def run(seed: int) -> Numbers:
    """Train and refit five networks with one seed; see `experiment`."""
    return experiment(seed, Size())


def experiment(seed: int, size: Size) -> Numbers:
    """Average accuracy and max - min of every width: before, after the refit, and after those of the controls."""
    draw = np.random.default_rng(seed)
    rows = corpora.digits("train")
    mixed = [rows[n] for n in draw.permutation(len(rows))]
    curated, learnt = mixed[:CURATED], mixed[CURATED:]
    balanced = turned(curated, np.arange(CURATED) % len(ANGLES))
    stream, as_stream = (turned(part, draw.choice(len(ANGLES), len(part), p=STREAM)) for part in (learnt, curated))
    names = draw.permutation([row["region"] for row in as_stream.rows])
    dealt = replace(as_stream, rows=[{**row, "region": name} for row, name in zip(as_stream.rows, names, strict=True)])
    held_out = corpora.digits("validation")
    test = turned(held_out * len(ANGLES), np.repeat(np.arange(len(ANGLES)), len(held_out)))
    found: Numbers = {}
    for width in size.widths:
        torch.manual_seed(seed)
        model = Cnn(width)
        fit(model, [cross_entropy("train")], {"train": stream}, steps=size.steps, batch_size=64, lr=3e-3,
            schedule="cosine", name=f"width {width}")  # fmt: skip
        found |= measured(f"width {width}, before", model, test)
        for name, data, balance in (
            ("after", balanced, "group"),
            ("after the stream", as_stream, "none"),
            ("after the stream, random groups", dealt, "group"),
            ("after the stream, true groups", as_stream, "group"),
        ):
            torch.manual_seed(seed)
            refitted = copy.deepcopy(model)
            by, choose = (None, "average") if balance == "none" else ("region", "worst_group")
            head(refitted, data, by=by, balance=balance, choose=choose)
            found |= measured(f"width {width}, {name}", refitted, test)
    return found


def turned(rows: Sequence[Row], regions: Sequence[int] | np.ndarray) -> Examples:
    """The digits, each turned by the angle of its region."""
    made: list[Row] = []
    for row, region in zip(rows, regions, strict=True):
        angle = ANGLES[region]
        image = rotate(row["image"], angle, reshape=False, order=1, cval=BACKGROUND)
        made.append({**row, "image": image, "region": f"{angle} degrees"})
    return encode_images(made)


def measured(name: str, model: nn.Module, test: Examples) -> Numbers:
    """What a network gets right on average and by region."""
    right = np.array([[rank == 0 for rank in ranks(model, test)]])
    hits = Hits(right, {group: np.array(each) for group, each in places_by(test.rows, "region").items()}, None)
    by_region = dict(zip(hits.groups, hits.accuracy[0].tolist(), strict=True))
    return {
        f"{name}: average": float(hits.average[0]),
        f"{name}: max - min": float(max_min(hits.accuracy)[0]),
        f"{name}: max - min by chance": float(hits.chance[0]),
        f"{name}: 0 degrees": by_region["0 degrees"],
        f"{name}: 45 degrees": by_region["45 degrees"],
    }


def _ratio(found: Numbers, width: int, name: str) -> float:
    return found[f"width {width}, {name}: max - min"] / found[f"width {width}, before: max - min"]


REPAIRED = [width for width in WIDTHS if width >= 4]

CLAIM = Claim(
    slug="geographic-generalization",
    paper="2307.13136",
    title="Does Progress On Object Recognition Benchmarks Improve Real-World Generalization?",
    statement="A larger model is better on average and leaves the gap between groups as it is; refitting the last layer "
    "alone on a small balanced set closes most of it.",
    checks=(
        Check(
            "there is something to repair: before the refit max - min is at least 0.2 at every width",
            lambda n: all(n[f"width {width}, before: max - min"] >= 0.2 for width in WIDTHS),
        ),
        Check(
            "larger models do not close the gap: it does not fall from width 8 to 16 and again to 32 by 0.05 each",
            lambda n: (
                not (
                    n["width 8, before: max - min"] - n["width 16, before: max - min"] >= 0.05
                    and n["width 16, before: max - min"] - n["width 32, before: max - min"] >= 0.05
                )
            ),
        ),
        Check(
            "from width 4 on the refit on 600 balanced digits takes away at least two thirds of max - min",
            lambda n: all(_ratio(n, width, "after") <= 1 / 3 for width in REPAIRED),
        ),
        Check(
            "from width 4 on the average accuracy is not lower after the refit",
            lambda n: all(n[f"width {w}, after: average"] >= n[f"width {w}, before: average"] for w in REPAIRED),
        ),
        Check(
            "null control: from width 4 on the refit on 600 digits of the stream leaves at least half of max - min",
            lambda n: all(_ratio(n, width, "after the stream") >= 0.5 for width in REPAIRED),
        ),
        Check(
            "null control: so does the refit on them with the weights of random groups",
            lambda n: all(_ratio(n, width, "after the stream, random groups") >= 0.5 for width in REPAIRED),
        ),
    ),
    run=run,
    remarks=(
        "Larger networks do narrow the gap here, slowly and on every seed: from width 8 to 32 by 0.05 to 0.08 of 0.44 to "
        "0.51. That is within the margin of the second check, which was stated before the run, but it is no rise as in the "
        "paper, and a check that asked for no fall at all would not hold. The refit takes away 71% to 93% of the gap from "
        "width 4 on. It is the balanced data that does it: on 600 digits of the stream, about eight of them in each turned "
        "region, the weights of the true groups help little (max - min 0.35 to 0.54). One run on seed 3 came before, to see "
        "whether the networks learn; nothing was changed after it but the speed of the regression."
    ),
)
