"""Claim of arXiv:2312.07420: decisions of an ensemble that forgets exactly can be made fair, best from its whole vote.

The paper's three processors and SISA's costs, at the size of a laptop. The language models and the toxic-text data are
replaced by generated data on which the true rates are known closely, and by handwritten digits.

1. Generated: two groups, of which one has the weaker signal. One decision tree of depth 6 a shard, 3,000 examples to learn
   from, 20,000 to calibrate on, 40,000 to judge on. Every number is the mean over five data sets.
2. Gap: of equalised odds, the larger one over both labels of the difference of rates between the groups. Accuracy and gap
   are expectations over the table's draws, on the 40,000.
3. Baselines: one tree on all examples, and the plain majority of the shards. Null control: the same program calibrated
   with the groups shuffled.
4. Costs are counted in samples read, of requests in random order, and compared with the formulas.
5. Digits: odd or even, the groups are 0 to 4 and 5 to 9; three small ViTs trained, calibrated and made to forget by the
   methods themselves.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from overhaul.claims._claim import Check, Claim, Numbers
from overhaul.data import corpora
from overhaul.data.encode import encode_images
from overhaul.data.examples import Examples, collate
from overhaul.forget.fair_sisa import fair_sisa
from overhaul.forget.fair_sisa.fairness import Processor, error, fair_table, gap, majority
from overhaul.forget.sisa import example_ids, sisa
from overhaul.forget.sisa.ensemble import Ensemble
from overhaul.forget.sisa.shards import (
    EstimatorTrainer,
    ShardMap,
    Sisa,
    batched_requests,
    one_request,
    sequential_requests,
)

SHARDS = (3, 5)
PROCESSORS: tuple[Processor, ...] = ("ensemble", "count", "aggregate_first", "post_first")
WEIGHT = np.array([1.0, 0.7, 0.5, 0.3])
SIGNAL = np.array([3.0, 1.2])
"""How strongly the features speak in each group; the noise has the variance 1."""
MINORITY = 0.3


@dataclass(frozen=True)
class Size:
    """How much is learnt and judged; the defaults are the experiment, a test takes less."""

    draws: int = 5
    train: int = 3_000
    calibration: int = 20_000
    test: int = 40_000
    requests: int = 20
    epochs: float = 40.0


@dataclass(frozen=True)
class Table:
    """Rows with features [n, d], groups [n] and labels [n], both 0 or 1."""

    x: np.ndarray
    groups: np.ndarray
    labels: np.ndarray


def run(seed: int) -> Numbers:
    """Fairness, costs and digits with one seed; see `experiment`."""
    return experiment(seed, Size())


def experiment(seed: int, size: Size) -> Numbers:
    """All numbers: means over several data sets, then costs, then digits."""
    rounds = [fairness(seed * 1000 + n, size) for n in range(size.draws)]
    found = {name: float(np.mean([one[name] for one in rounds])) for name in rounds[0]}
    return {**found, **costs(seed, size), **digits(seed, size)}


def generated(draw: np.random.Generator, count: int) -> Table:
    """Rows with y = 1 where signal_a (w . x) + noise > 0: the minority's labels follow the features less."""
    x = draw.standard_normal((count, len(WEIGHT)))
    groups = (draw.random(count) < MINORITY).astype(int)
    score = SIGNAL[groups] * (x @ WEIGHT) / np.linalg.norm(WEIGHT)
    return Table(x, groups, (score + draw.standard_normal(count) > 0).astype(int))


def _names(count: int) -> list[str]:
    return [f"row {n}" for n in range(count)]


def _trees(table: Table, shards: int, seed: int) -> tuple[Sisa[Any], EstimatorTrainer]:
    """A trained ensemble of trees, one a shard."""
    from sklearn.tree import DecisionTreeClassifier

    names = _names(len(table.x))
    trainer = EstimatorTrainer(DecisionTreeClassifier(max_depth=6), table.x, table.labels, names, [0, 1])
    core = Sisa(ShardMap.draw(names, shards, 1, seed), trainer)
    core.train()
    return core, trainer


def _votes(core: Sisa[Any], trainer: EstimatorTrainer, x: np.ndarray) -> np.ndarray:
    return np.stack([trainer.probabilities(member, x).argmax(axis=1) for member in core.members.values()], axis=1)


def fairness(seed: int, size: Size) -> Numbers:
    """Accuracy and gap on one data set, by ensemble and processor ("S=3, count, gap")."""
    draw = np.random.default_rng(seed)
    train, calibration, test = (generated(draw, count) for count in (size.train, size.calibration, size.test))
    shuffled = draw.permutation(calibration.groups)
    found: Numbers = {}

    def note(name: str, chances: np.ndarray) -> None:
        found[f"{name}, accuracy"] = 1 - error(chances, test.labels)
        found[f"{name}, gap"] = gap(chances, test.groups, test.labels)

    note("one model", _votes(*_trees(train, 1, seed), test.x)[:, 0])
    for shards in SHARDS:
        core, trainer = _trees(train, shards, seed)
        known, judged = _votes(core, trainer, calibration.x), _votes(core, trainer, test.x)
        note(f"S={shards}, majority", majority(judged))
        for processor in PROCESSORS:
            table = fair_table(known, calibration.groups, calibration.labels, processor=processor)
            note(f"S={shards}, {processor}", table.chance(judged, test.groups))
            fitted = error(table.chance(known, calibration.groups), calibration.labels)
            found[f"S={shards}, {processor}, calibration error"] = fitted
        table = fair_table(known, shuffled, calibration.labels)
        note(f"S={shards}, shuffled groups", table.chance(judged, test.groups))
    return found


def costs(seed: int, size: Size) -> Numbers:
    """Samples read by requests as a multiple of what the formulas say, and what is not exact after them."""
    from sklearn.naive_bayes import GaussianNB

    draw = random.Random(seed)
    table = generated(np.random.default_rng(seed), size.train)
    names, shards, slices = _names(size.train), SHARDS[-1], 5
    core, trainer = _trees(table, shards, seed)
    before, order = core.places, draw.sample(names, size.requests)
    visits = [core.forget([one]).visits for one in order]
    found: Numbers = {
        "cost, speed-up of the first request": size.train / visits[0],
        "cost, one after the other / formula": sum(visits) / sequential_requests(size.train, shards, size.requests),
    }
    scratch = Sisa(before.without(order), trainer)
    scratch.train()
    differ = [
        trainer.probabilities(core.members[shard], table.x) != trainer.probabilities(scratch.members[shard], table.x)
        for shard in range(shards)
    ]
    found["exactness, predictions that differ from training without"] = float(np.sum(differ))
    at_once = [
        Sisa(ShardMap.draw(names, shards, 1, n), trainer).forget(draw.sample(names, shards)).visits
        for n in range(size.requests)
    ]
    found["cost, at once / formula"] = float(np.mean(at_once)) / batched_requests(size.train, shards, shards)
    sliced = EstimatorTrainer(GaussianNB(), table.x, table.labels, names, [0, 1], slices=slices, epochs=3.0)
    cut = Sisa(ShardMap.draw(names, shards, slices, seed), sliced, {})
    whole = cut.train().visits / shards
    visits = [cut.forget([part[0]]).visits for shard in cut.places.slices for part in shard]
    found["cost, in a random slice / formula"] = float(np.mean(visits)) / whole / one_request(slices)
    return found


def digits(seed: int, size: Size) -> Numbers:
    """Three ViTs by `forget.sisa` and `forget.fair_sisa`: gap and accuracy before and after, and what requests cost."""
    train, calibration, test = _digit_sets(seed)
    torch.manual_seed(seed)
    model = _vit()
    knobs: dict[str, Any] = {"shards": 3, "slices": 3, "epochs": size.epochs, "weights": "all"}
    made = sisa(model, train, batch_size=32, lr=1e-3, **knobs).model
    assert isinstance(made, Ensemble)
    facts = fair_sisa(made, calibration).facts
    found: Numbers = {"digits, calibration gap": float(str(facts["gap"]))}
    batch = collate(test.items)
    labels, groups = batch["labels"].numpy(), np.array([row["group"] for row in test.rows])
    with torch.no_grad():
        votes = made.votes(pixel_values=batch["pixel_values"]).numpy()
    decided = made.decide({"pixel_values": batch["pixel_values"]}, groups.tolist(), _names(len(test))).numpy()
    for name, ones in (("majority", majority(votes)), ("ensemble", decided)):
        found[f"digits, {name}, accuracy"] = 1 - error(ones, labels)
        found[f"digits, {name}, gap"] = gap(ones, groups, labels)
    places, ids = ShardMap.from_json(made.config.shard_map), example_ids(train)
    hashes = {shard: made.digest(shard) for shard in range(3)}
    outcome = sisa(made, train, train.select([ids.index(places.slices[0][-1][0])]))
    visits, everything = (float(str(outcome.facts[name])) for name in ("visits", "visits_from_scratch"))
    found["digits, speed-up without checkpoints"] = everything / visits
    found["digits, members that changed"] = sum(made.digest(shard) != hashes[shard] for shard in range(3))
    return found


def _digit_sets(seed: int) -> tuple[Examples, Examples, Examples]:
    """Images with the label odd or even and the group 0 to 4 or 5 to 9: 900 to learn, 448 to calibrate, 449 to judge."""
    rows = [*corpora.digits("train"), *corpora.digits("validation")]
    images = [{"image": row["image"], "label": row["label"] % 2, "group": str(row["label"] >= 5), "n": n}
              for n, row in enumerate(rows)]  # fmt: skip
    mixed = encode_images(images).shuffled(seed)
    return mixed[:900], mixed[900:1348], mixed[1348:]


def _vit() -> torch.nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_labels": 2, "num_channels": 1}
    config = ViTConfig(image_size=8, patch_size=2, num_hidden_layers=2, num_attention_heads=4, **sizes)
    return ViTForImageClassification(config)


def _for_all(passes: Callable[[Numbers, str], bool]) -> Callable[[Numbers], bool]:
    return lambda found: all(passes(found, f"S={shards}") for shards in SHARDS)


def _near_one(name: str) -> Callable[[Numbers], bool]:
    return lambda found: abs(found[name] - 1) <= 0.05


CLAIM = Claim(
    slug="fairsisa",
    paper="2312.07420",
    title="FairSISA: Ensemble Post-Processing to Improve Fairness of Unlearning in LLMs",
    statement=(
        "An ensemble of models trained on disjoint shards forgets exactly at a fraction of the cost, but can be less fair. "
        "A linear program over the members' votes restores equalised odds, and of all such programs the one over the whole "
        "vote loses the least accuracy."
    ),
    checks=(
        Check(
            "there is something to repair: the majority's gap is at least 0.05 with 3 and with 5 shards",
            _for_all(lambda found, s: found[f"{s}, majority, gap"] >= 0.05),
        ),
        Check(
            "sharding costs fairness: with 5 shards the majority's gap is at least 0.005 above that of one model",
            lambda found: found["S=5, majority, gap"] >= found["one model, gap"] + 0.005,
        ),
        Check(
            "over patterns, counts or the majority, the program brings the gap on new data to at most 0.02",
            _for_all(lambda found, s: all(found[f"{s}, {one}, gap"] <= 0.02 for one in PROCESSORS[:3])),
        ),
        Check(
            "on the calibration sample: errors over patterns <= over counts <= over the majority",
            _for_all(
                lambda found, s: (
                    found[f"{s}, ensemble, calibration error"]
                    <= found[f"{s}, count, calibration error"] + 1e-9
                    <= found[f"{s}, aggregate_first, calibration error"] + 2e-9
                )
            ),
        ),
        Check(
            "on new data: accuracy over patterns is at least that over the majority",
            _for_all(lambda found, s: found[f"{s}, ensemble, accuracy"] >= found[f"{s}, aggregate_first, accuracy"]),
        ),
        Check(
            "post-processing each member before the vote leaves at least 3 times the gap of the program over patterns",
            _for_all(lambda found, s: found[f"{s}, post_first, gap"] >= 3 * found[f"{s}, ensemble, gap"]),
        ),
        Check(
            "null control: with shuffled groups the program leaves at least half of the majority's gap",
            _for_all(lambda found, s: found[f"{s}, shuffled groups, gap"] >= 0.5 * found[f"{s}, majority, gap"]),
        ),
        Check(
            "the first request reads at least 4.5 times fewer samples than training on all, with 5 shards",
            lambda found: found["cost, speed-up of the first request"] >= 4.5,
        ),
        Check(
            "20 requests one after the other read what the formula says, within 5%",
            _near_one("cost, one after the other / formula"),
        ),
        Check("5 requests at once read what the formula says, within 5%", _near_one("cost, at once / formula")),
        Check(
            "a request in a random slice reads what the formula says, within 5%",
            _near_one("cost, in a random slice / formula"),
        ),
        Check(
            "after 20 requests every prediction is that of training without the examples, bit for bit",
            lambda found: found["exactness, predictions that differ from training without"] == 0,
        ),
        Check(
            "digits: the gap is gone on the calibration images, and forgetting one image changes one ViT of three",
            lambda found: found["digits, calibration gap"] < 1e-9 and found["digits, members that changed"] == 1,
        ),
    ),
    run=run,
    remarks=(
        "On new data the program over patterns is no better than the one over the majority with 3 shards (the difference "
        "is below 0.001 of accuracy on every seed). The members are exchangeable, so which of them voted 1 says next to "
        "nothing that their number does not, and a program with 64 cells fits the noise of its sample: with 5 shards it "
        "errs 0.003 to 0.005 less there, and 0.000 to 0.0015 less on new data. Calibrated on 400,000 examples (5 data "
        "sets, run afterwards), it is better by 0.0004 and 0.0008, and the gaps on new data shrink. Fairness itself is "
        "dear here: equal rates cost about seven points of accuracy, because the majority's decisions must become as bad "
        "as the weak group's signal allows at best. Five requests at once touch two to five of the shards, so a mean over "
        "20 draws is itself uncertain by 5%; on seed 2 it lies 11% below the formula, and a test with more draws agrees "
        "with it."
    ),
)
