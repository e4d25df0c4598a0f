from __future__ import annotations

import json
import random
import statistics
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from sklearn.linear_model import SGDClassifier
from sklearn.naive_bayes import GaussianNB
from sklearn.tree import DecisionTreeClassifier

from overhaul.errors import RequestError
from overhaul.forget.sisa.shards import (
    EstimatorTrainer,
    ShardMap,
    Sisa,
    batched_requests,
    epochs_per_slice,
    one_request,
    sequential_requests,
    stage_seed,
)


class Diary:
    """A trainer whose members are the list of what they were shown; it counts what it shows."""

    def __init__(self, epochs: Fraction = Fraction(1)) -> None:
        self.epochs, self.shown, self.identity = epochs, 0, f"diary {epochs}"

    def visits(self, ids: Sequence[str]) -> int:
        visits = self.epochs * len(ids)
        assert visits.denominator == 1
        return int(visits)

    def begin(self, seed: int) -> tuple[str, ...]:
        return (f"seed {seed}",)

    def train(self, state: tuple[str, ...], ids: Sequence[str], seed: int, name: str) -> tuple[str, ...]:
        self.shown += self.visits(ids)
        return (*state, f"{seed} {name}: {' '.join(ids)}")


def names(count: int) -> list[str]:
    return [f"row {n}" for n in range(count)]


def test_every_training_has_a_seed_of_its_own() -> None:
    """A shard that trained from another one's seed would learn from it which examples came first."""
    seeds = [stage_seed(seed, shard, stage) for seed in range(3) for shard in range(5) for stage in range(-1, 4)]
    assert len(set(seeds)) == len(seeds)
    core = Sisa(ShardMap.draw(names(12), 3, 2, seed=0), Diary(Fraction(3)))
    core.train()
    used = [line.removeprefix("seed ").split()[0] for member in core.members.values() for line in member]
    expected = [stage_seed(0, shard, stage) for shard in range(3) for stage in range(-1, 2)]
    assert sorted(map(int, used)) == sorted(expected)


# the map


def test_shards_and_slices_are_disjoint_even_and_depend_on_the_set_of_ids_alone() -> None:
    places = ShardMap.draw(names(50), 3, 4, seed=5)
    parts = [part for shard in places.slices for part in shard]
    assert sorted(one for part in parts for one in part) == sorted(names(50))
    assert {len(part) for part in parts} <= {4, 5}
    assert places == ShardMap.draw([*names(50)[::-1], "row 3"], 3, 4, seed=5)
    assert places != ShardMap.draw(names(50), 3, 4, seed=6)
    assert places == ShardMap.from_json(json.loads(json.dumps(places.to_json())))


def test_ids_that_are_unknown_or_gone_or_everything_are_refused() -> None:
    places = ShardMap.draw(names(12), 2, 2, seed=0).without(["row 3"])
    with pytest.raises(RequestError, match=r"1 of 2 examples to forget were never in a shard, such as who"):
        places.without(["who", "row 4"])
    with pytest.raises(RequestError, match=r"1 of the examples were forgotten before, such as row 3"):
        places.without(["row 3", "row 4"])
    with pytest.raises(RequestError, match="Nothing would be left"):
        places.without([one for one in names(12) if one != "row 3"])
    with pytest.raises(RequestError, match="3 different examples cannot fill 2 shards of 2 slices"):
        ShardMap.draw(names(3), 2, 2, seed=0)


# what forgetting costs


@pytest.mark.parametrize(("slices", "epochs"), [(1, 1), (2, 3), (5, 6), (4, 5)])
def test_check_6_slicing_costs_what_the_formula_says_exactly(slices: int, epochs: int) -> None:
    size = 4 * slices
    places = ShardMap.draw(names(size), 1, slices, seed=0)
    each = Fraction(2 * epochs, slices + 1)
    assert epochs_per_slice(epochs, slices) == pytest.approx(float(each))
    trained = Sisa(places, Diary(each), {})
    assert trained.train().visits == epochs * size  # slicing costs nothing in training
    total = Fraction(0)
    for part in places.slices[0]:
        diary = Diary(each)
        fresh = Sisa(places, diary, dict(trained.checkpoints or {}), trained.members)
        request = fresh.forget([part[0]])
        assert request.visits == diary.shown
        total += request.visits
    # e' D (2R+1)/(3R), less the e' visits on average that the removed example itself no longer gets
    assert total / slices == epochs * (size * Fraction(2 * slices + 1, 3 * slices) - 1)
    assert one_request(slices) == pytest.approx(2 / 3 + 1 / (3 * slices))


def test_check_7_requests_at_once_cost_what_the_formula_says() -> None:
    samples, shards, requests = 1000, 10, 8
    draw = random.Random(0)
    visits = []
    for seed in range(150):
        core = Sisa(ShardMap.draw(names(samples), shards, 1, seed), Diary())
        visits.append(core.forget(draw.sample(names(samples), requests)).visits)
    assert statistics.mean(visits) == pytest.approx(batched_requests(samples, shards, requests), rel=0.02)
    assert batched_requests(samples, shards, 30) > 0.9 * samples - 30  # from 3 S on, nearly everything


def test_check_7_requests_one_after_the_other_cost_what_the_formula_says() -> None:
    samples, shards, requests = 400, 5, 40
    visits = []
    for seed in range(5):
        core = Sisa(ShardMap.draw(names(samples), shards, 1, seed), Diary())
        order = random.Random(seed).sample(names(samples), requests)
        visits.append(sum(core.forget([one]).visits for one in order))
    assert statistics.mean(visits) == pytest.approx(sequential_requests(samples, shards, requests), rel=0.01)


def test_a_request_starts_at_the_earliest_touched_slice_and_counts_against_training_everything() -> None:
    places = ShardMap.draw(names(24), 2, 4, seed=0)
    core = Sisa(places, Diary(), {})
    core.train()
    request = core.forget([places.slices[1][3][0], places.slices[1][2][1]])
    (one,) = request.retrained
    assert (one.shard, one.first_slice, one.examples) == (1, 2, 10)
    assert request.visits == one.visits == 8 + 10
    assert request.from_scratch == (3 + 6 + 9 + 12) + (3 + 6 + 8 + 10)


# exactness of the core


def test_check_8_forgetting_is_training_without_the_example_whatever_the_checkpoints() -> None:
    places = ShardMap.draw(names(30), 3, 3, seed=2)
    removed = ["row 4", "row 17"]
    scratch = Sisa(places.without(removed), Diary())
    scratch.train()
    for checkpoints in ({}, None):
        core = Sisa(places, Diary(), checkpoints)
        core.train()
        core.forget(removed)
        assert core.members == scratch.members
        assert core.places == scratch.places


def test_checkpoints_that_saw_the_example_are_deleted() -> None:
    places = ShardMap.draw(names(30), 3, 3, seed=2)
    checkpoints: dict[str, tuple[str, ...]] = {}
    core = Sisa(places, Diary(), checkpoints)
    core.train()
    assert any("row 4 " in f"{state} " for state in checkpoints.values())
    core.forget(["row 4"])
    assert not any("row 4 " in f"{entry} " for state in checkpoints.values() for entry in state)
    assert len(checkpoints) == 9


def test_an_interrupted_training_goes_on_from_its_checkpoints() -> None:
    places = ShardMap.draw(names(30), 3, 3, seed=2)
    whole, diary = Sisa(places, Diary(), {}), Diary()
    whole.train()
    kept = {name: state for name, state in (whole.checkpoints or {}).items() if not name.startswith("shard-1-slice-2")}
    resumed = Sisa(places, diary, kept)
    resumed.train()
    assert resumed.members == whole.members
    assert diary.shown == 10


def test_a_checkpoint_of_another_trainer_or_seed_is_not_taken() -> None:
    places = ShardMap.draw(names(12), 2, 2, seed=0)
    first = Sisa(places, Diary(), {})
    first.train()
    for other in (Sisa(places, Diary(Fraction(2)), first.checkpoints), Sisa(replace(places, seed=1), Diary(), {})):
        request = other.train()
        assert all(one.first_slice == 0 for one in request.retrained)


def test_a_shard_without_examples_has_no_member_and_the_others_stay() -> None:
    places = ShardMap.draw(names(6), 3, 1, seed=0)
    core = Sisa(places, Diary(), {})
    core.train()
    others = {shard: core.members[shard] for shard in (0, 2)}
    request = core.forget(places.ids(1))
    assert core.members == others
    assert (request.visits, request.retrained[0].examples) == (0, 0)
    assert core.forget([places.ids(2)[0]]).visits == 1


# members from scikit-learn


def table(count: int = 90) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(0)
    x = draw.standard_normal((count, 4))
    return x, (x[:, 0] + x[:, 1] > 0).astype(int) + (x[:, 2] > 1)


@pytest.mark.parametrize(
    ("estimator", "slices"),
    [(DecisionTreeClassifier(), 1), (GaussianNB(), 3), (SGDClassifier(loss="log_loss"), 3)],
    ids=lambda value: type(value).__name__,
)
def test_check_8_estimators_forget_exactly(estimator: Any, slices: int) -> None:
    x, y = table()
    trainer = EstimatorTrainer(estimator, x, y, names(90), [0, 1, 2], slices=slices, epochs=2.0)
    places = ShardMap.draw(names(90), 3, slices, seed=0)
    core = Sisa(places, trainer, {})
    core.train()
    before = {shard: trainer.probabilities(member, x) for shard, member in core.members.items()}
    scratch = Sisa(places.without(["row 7"]), trainer)
    scratch.train()
    core.forget(["row 7"])
    (touched,) = places.touched(["row 7"])
    for shard, member in core.members.items():
        now = trainer.probabilities(member, x)
        assert np.array_equal(now, trainer.probabilities(scratch.members[shard], x))
        if shard != touched:
            assert np.array_equal(now, before[shard])
    if not isinstance(estimator, DecisionTreeClassifier):  # a tree may not need any single row
        assert not np.array_equal(trainer.probabilities(core.members[touched], x), before[touched])


def test_estimators_that_cannot_go_on_take_one_slice() -> None:
    x, y = table()
    with pytest.raises(RequestError, match="DecisionTreeClassifier has no `partial_fit`.*slices=1"):
        EstimatorTrainer(DecisionTreeClassifier(), x, y, names(90), [0, 1, 2], slices=2)


def test_a_class_that_a_shard_lacks_has_no_probability_there() -> None:
    x, y = table()
    trainer = EstimatorTrainer(DecisionTreeClassifier(), x, y, names(90), [2, 0, 1])
    two = [one for one, label in zip(names(90), y, strict=True) if label != 1]
    member = trainer.train(trainer.begin(0), two, 0, "")
    found = trainer.probabilities(member, x)
    assert not found[:, 1].any() and np.allclose(found.sum(axis=1), 1)
    assert np.array_equal(found.argmax(axis=1)[y != 1], y[y != 1])
