from __future__ import annotations

import importlib
import math
import os
import signal
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import cloudpickle
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from conftest import FAMILIES, tiny_vit
from contract import Case, as_recipe, pictures, some_facts
from overhaul import session, workers
from overhaul.data.examples import Examples
from overhaul.errors import RequestError
from overhaul.fit.regime import Regime
from overhaul.groups import groups
from overhaul.inspect.criterion_validity import criterion_validity, rejected
from overhaul.inspect.criterion_validity.ranking import ceiling, validity
from overhaul.inspect.criterion_validity.sweep import Ends, Job, Sweep, going, measured, patterns
from overhaul.recipe.ahead import look_ahead
from overhaul.recipe.check import check
from overhaul.recipe.spec import read

TRAIN, TEST = pictures([0, 1, 2, 3] * 4), pictures([0, 1, 2, 3] * 3, seed=1)

CASE = Case(
    method=criterion_validity,
    materials=lambda: {"model": tiny_vit(), "train": TRAIN, "test": TEST},
    knobs={
        "unit": "mlp.neuron",
        "places": [1],
        "ratio": 0.25,
        "candidates": 3,
        "repeats": 1,
        "steps": 3,
        "batch_size": 8,
    },
    varied={
        "unit": ("mlp.neuron", "attention.head"),
        "places": ([1], [0, 1]),
        "ratio": (0.25, 0.75),
        "candidates": (3, 4),
        "repeats": (1, 2),
        "steps": (1, 3),
        "batch_size": (4, 8),
        "lr": (1e-4, 1e-2),
        "warmup": (0.0, 0.9),
        "schedule": ("constant", "linear"),
        "weight_decay": (0.0, 5.0, {"lr": 1e-2}),
        "clip": (1e-3, 1.0),
    },
    idle={
        "workers": "processes share the trainings, and each gives the same wherever it runs",
        "engine": "as workers",
        "address": "as workers",
    },
)


class Net(nn.Module):
    """Two convolutions; the numbers are drawn, not learnt."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(1, 5, 3, padding=1), nn.Conv2d(5, 4, 3, padding=1)
        self.head = nn.Linear(4, 10)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.head(self.two(self.one(pixel_values).relu()).relu().mean((2, 3)))


def sweep_of(model: nn.Module, places: list[int], ratio: float, regime: Regime | None = None) -> Sweep:
    found = [groups(model, "channel", inputs={"pixel_values": TRAIN[0]["pixel_values"][None]})[n] for n in places]
    tried, _ = patterns([group.size for group in found], ratio, 100, 0)
    return Sweep(model, found, tried, TRAIN, TRAIN, TEST, regime, 0)


# which patterns


def test_all_patterns_where_they_are_few_else_different_ones_by_the_seed() -> None:
    every, total = patterns([5, 4], 0.4, 100, seed=0)
    assert total == len(every) == len(set(every)) == math.comb(5, 2) * math.comb(4, 2)
    some, total = patterns([10, 10], 0.5, 80, seed=0)
    assert total == math.comb(10, 5) ** 2 and len(set(some)) == 80
    assert all(len(set(gone)) == 5 for one in some for gone in one)
    assert some == patterns([10, 10], 0.5, 80, seed=0)[0] != patterns([10, 10], 0.5, 80, seed=1)[0]


def test_how_many_go_is_counted_without_rounding_errors() -> None:
    assert [going(10, ratio / 10) for ratio in range(1, 10)] == list(range(1, 10))
    assert going(100, 0.29) == 29 and going(5, 0.5) == 2 and going(7, 0.5) == 3


# what each comes to


def test_of_two_copies_of_a_filter_either_may_go_and_a_dead_one_costs_nothing() -> None:
    model = Net()
    with torch.no_grad():
        for tensor in model.one.parameters():
            tensor[3], tensor[4] = tensor[1], 0
        model.two.weight[:, [1, 3]] = model.two.weight[:, 1:2] / 2
    sweep = sweep_of(model, [0], 0.2)
    ends = sweep.ends(repeats=1, workers=1)
    by_filter = {pattern[0][0]: ends[n, 0].pruned for n, pattern in enumerate(sweep.patterns)}
    assert by_filter[1] == pytest.approx(by_filter[3], abs=1e-6)
    whole, _ = measured(model, TRAIN)
    assert by_filter[4] == pytest.approx(whole, abs=1e-6)


def test_without_training_again_what_is_left_is_what_the_loss_said() -> None:
    sweep = sweep_of(Net(), [0, 1], 0.4)
    ends = [sweep.end((n, 0)) for n in range(len(sweep.patterns))]
    assert all(one.pruned == one.train for one in ends)
    assert len({one.pruned for one in ends}) == len(ends) == math.comb(5, 2) * math.comb(4, 2)
    known = validity([one.pruned for one in ends], [-one.train for one in ends])
    assert known.tau == -1 and known.anomalies == 0 and known.counterexamples == 0


# what is said of it


def test_what_foretells_all_and_what_foretells_the_opposite() -> None:
    x = list(range(20))
    right, wrong = validity(x, [-v for v in x]), validity(x, x)
    assert right.tau == -1 and right.anomalies == 0 and right.counterexamples == 0 and right.high == 0
    assert wrong.tau == 1 and wrong.anomalies == 19 / 20 and wrong.counterexamples == 1
    assert right.p is not None and right.p < 1e-6


def test_counterexamples_follow_from_tau_where_nothing_is_tied() -> None:
    draw = np.random.default_rng(0)
    x, y = draw.permutation(50).tolist(), draw.permutation(50).tolist()
    known = validity(x, y)
    assert known.tau is not None and known.counterexamples == pytest.approx((1 + known.tau) / 2)


def test_where_all_end_alike_nothing_can_be_foretold() -> None:
    known = validity([1.0, 2.0, 3.0], [0.5, 0.5, 0.5])
    assert known.tau is None and known.anomalies == 0 and rejected(known) is None


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_language_model_is_tried_without_its_cache(family: str) -> None:
    trained = Regime(steps=1, batch_size=4)
    outcome = criterion_validity(
        FAMILIES[family](),
        some_facts(0, 4),
        some_facts(4, 4),
        unit="mlp.neuron",
        candidates=3,
        repeats=1,
        training=trained,
    )
    assert outcome.facts["patterns_tried"] == 3


def test_the_ceiling_is_that_of_halves_of_the_trainings() -> None:
    same = [[1.0, 2.0, 3.0, 4.0]] * 3
    assert ceiling(same) == 1 and ceiling(same[:1]) is None
    assert ceiling([[1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0]]) == -1


def test_a_feature_that_another_can_stand_in_for_costs_much_before_training_and_nothing_after() -> None:
    draw = np.random.default_rng(0)
    shared, own = draw.normal(size=500), draw.normal(size=500)
    features = np.stack([shared, shared, 0.3 * own], 1)
    target = features.sum(1)

    def loss(keep: list[int], weights: np.ndarray) -> float:
        return float(np.square(features[:, keep] @ weights - target).mean())

    keeps = [[1, 2], [0, 2], [0, 1]]
    before = [loss(keep, np.ones(2)) for keep in keeps]
    after = [loss(keep, np.linalg.lstsq(features[:, keep], target)[0]) for keep in keeps]
    assert np.argmin(before) == 2 and np.argmax(after) == 2
    assert validity(before, [-one for one in after]).anomalies == 2 / 3


# several processes


@dataclass(frozen=True)
class Mortal(Sweep):
    """A sweep whose first worker dies."""

    mark: str = ""

    def end(self, job: Job) -> Ends:
        if not Path(self.mark).exists():
            Path(self.mark).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().end(job)


@pytest.mark.smoke
def test_workers_give_the_same_also_where_one_is_killed(tmp_path: Path) -> None:
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    sweep = sweep_of(Net(), [0], 0.2, Regime(steps=2, batch_size=8, lr=1e-3))
    alone = sweep.ends(repeats=2, workers=1)
    several = Mortal(**vars(sweep), mark=str(tmp_path / "died")).ends(repeats=2, workers=2)
    assert (tmp_path / "died").exists() and several == alone


@pytest.mark.slow
def test_workers_on_ray_give_the_same_also_where_one_is_killed_and_what_is_left_is_not_run_again(
    tmp_path: Path,
) -> None:
    importlib.import_module("ray").cloudpickle.register_pickle_by_value(sys.modules[__name__])
    sweep = sweep_of(Net(), [0], 0.2, Regime(steps=2, batch_size=8, lr=1e-3))
    alone = sweep.ends(repeats=2, workers=1)
    with session.using(scratch=tmp_path):
        on_ray = Mortal(**vars(sweep), mark=str(tmp_path / "died")).ends(repeats=2, workers=2, engine="ray")
        assert (tmp_path / "died").exists() and on_ray == alone
        (kept,) = tmp_path.glob("*.jsonl")
        lines = kept.read_text().splitlines(keepends=True)
        assert len(lines) == len(alone) == 10
        kept.write_text("".join(lines[:6]))  # as a run leaves it that was killed
        asked: list[tuple[str, int, int, str]] = []
        with session.using(report=lambda *said: asked.append(said)):
            assert sweep.ends(repeats=2, workers=2, engine="joblib") == alone
        assert asked[0][2] == 4


def test_a_line_that_was_cut_off_is_computed_again(tmp_path: Path) -> None:
    sweep = sweep_of(Net(), [0], 0.2)
    with session.using(scratch=tmp_path):
        first = sweep.ends(repeats=1, workers=1)
        (kept,) = tmp_path.iterdir()
        kept.write_text(kept.read_text()[:-5])
        asked: list[tuple[str, int, int, str]] = []
        with session.using(report=lambda *said: asked.append(said)):
            assert sweep.ends(repeats=1, workers=1) == first
        assert asked[0][2] == 1, "all were computed again"
        replace(sweep, seed=1).ends(repeats=1, workers=1)
        assert len(list(tmp_path.iterdir())) == 2, "what another request left was taken"


# bad input


def test_what_cannot_be_compared_is_refused() -> None:
    model, none = tiny_vit(), Examples([], [])
    with pytest.raises(RequestError, match="places names 7, but the groups of this network are numbered from 0 to 3"):
        criterion_validity(model, TRAIN, TEST, unit="mlp.neuron", places=[7])
    with pytest.raises(RequestError, match="of a group of 48 units a share of 0.01 is none"):
        criterion_validity(model, TRAIN, TEST, unit="mlp.neuron", ratio=0.01)
    with pytest.raises(RequestError, match="the role `test` is empty"):
        criterion_validity(model, TRAIN, none, unit="mlp.neuron")
    with pytest.raises(RequestError, match="places is empty"):
        criterion_validity(model, TRAIN, TEST, unit="mlp.neuron", places=[])


def test_ray_that_is_not_installed_is_told_by_a_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "has_ray", lambda: False)
    recipe = as_recipe(replace(CASE, knobs={**CASE.knobs, "engine": "ray"}), tmp_path)
    with pytest.raises(RequestError, match=r"`engine: ray` needs `pip install overhaul\[scale\]`"):
        look_ahead(check(read(recipe)))
    (tmp_path / "other").mkdir()
    recipe = as_recipe(replace(CASE, knobs={**CASE.knobs, "address": "auto"}), tmp_path / "other")
    with pytest.raises(RequestError, match="write `engine: ray` beside it"):
        look_ahead(check(read(recipe)))


def test_a_plan_refuses_places_that_are_not_there(tmp_path: Path) -> None:
    recipe = as_recipe(replace(CASE, knobs={**CASE.knobs, "places": [9]}), tmp_path)
    with pytest.raises(RequestError, match="places names 9, but the groups of this network are numbered from 0 to 3"):
        look_ahead(check(read(recipe)))
