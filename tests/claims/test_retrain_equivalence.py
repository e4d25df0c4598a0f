from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from overhaul.claims._ridge_paths import Divergence, Stage, ascend, growth, train
from overhaul.claims.retrain_equivalence import CLAIM, PLACES, Size, _stages, experiment, linear_theory
from overhaul.data.examples import IGNORED

RATE = 0.05


@pytest.fixture
def draw() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def problem(draw: np.random.Generator) -> dict[str, Any]:
    first, second = (Stage(draw.standard_normal((40, 64)), draw.standard_normal(40), 1.0) for _ in range(2))
    return {
        "x": draw.standard_normal((6, 64)),
        "y": draw.standard_normal(6),
        "test": draw.standard_normal((32, 64)),
        "ahead": train([first, second]),
        "behind": train([second, first]),
    }


def test_ridge_stages_solve_their_normal_equations(draw: np.random.Generator) -> None:
    first = Stage(draw.standard_normal((5, 3)), draw.standard_normal(5), 0.5)
    second = Stage(draw.standard_normal((4, 3)), draw.standard_normal(4), 2.0)
    before, after = train([first]), train([first, second])
    # the gradient of ||X theta - y||^2 + mu ||theta - before||^2
    gradient = second.x.T @ (second.x @ after - second.y) + 2.0 * (after - before)
    assert np.abs(gradient).max() < 1e-12


def test_check_1_the_difference_grows_by_the_lemma(problem: dict[str, Any]) -> None:
    for steps in (0, 1, 5, 30):
        ahead = ascend(problem["ahead"], problem["x"], problem["y"], RATE, steps)
        behind = ascend(problem["behind"], problem["x"], problem["y"], RATE, steps)
        power = np.linalg.matrix_power(growth(problem["x"], RATE), steps)
        predicted = power @ (problem["ahead"] - problem["behind"])
        assert np.linalg.norm(ahead - behind - predicted) < 1e-14 * np.linalg.norm(predicted) * 10


def test_check_1_the_difference_does_not_depend_on_the_forgotten_answers(problem: dict[str, Any]) -> None:
    differences = []
    for y in (problem["y"], problem["y"] * 3.0 + 1.0):
        ahead, behind = (ascend(problem[side], problem["x"], y, RATE, 10) for side in ("ahead", "behind"))
        differences.append(ahead - behind)
    assert np.allclose(*differences, rtol=1e-10)


def test_check_2_the_bound_holds_from_its_first_step_on(problem: dict[str, Any]) -> None:
    difference = problem["ahead"] - problem["behind"]
    bound = Divergence.between(difference, problem["x"], problem["test"], RATE)
    assert bound.rate > 0 and bound.scale > 0
    for steps in range(bound.start, bound.start + 40):
        moved = np.linalg.matrix_power(growth(problem["x"], RATE), steps) @ difference
        assert np.mean((problem["test"] @ moved) ** 2) >= bound.after(steps)


def test_check_2_the_bound_is_tight_within_its_constant_where_all_is_seen(draw: np.random.Generator) -> None:
    x = np.eye(4)  # every direction grows alike and the test set sees all of them
    difference = draw.standard_normal(4)
    bound = Divergence.between(difference, x, np.eye(4), RATE)
    assert bound.start == 0
    assert bound.rate == pytest.approx(2 * RATE / 4)
    moved = np.linalg.matrix_power(growth(x, RATE), 7) @ difference
    assert np.mean(moved**2) == pytest.approx(4.0 * bound.after(7))


def test_the_smallest_singular_value_is_over_the_span_of_the_forget_set(problem: dict[str, Any]) -> None:
    bound = Divergence.between(problem["ahead"] - problem["behind"], problem["x"], problem["test"], RATE)
    basis = np.linalg.qr(problem["x"].T)[0]
    assert np.linalg.svd(problem["test"] @ basis @ basis.T, compute_uv=False)[-1] < 1e-12
    assert bound.scale > 1e-6


def test_the_corollary_names_the_step_at_which_a_distance_is_passed(problem: dict[str, Any]) -> None:
    bound = Divergence.between(problem["ahead"] - problem["behind"], problem["x"], problem["test"], RATE)
    steps = math.ceil(bound.steps_until(1e4))
    assert bound.after(steps) >= 1e4 > bound.after(steps - 1)


def test_check_9_the_same_stage_twice_leaves_no_difference(draw: np.random.Generator) -> None:
    stage = Stage(draw.standard_normal((40, 64)), draw.standard_normal(40), 1.0)
    same = Stage(stage.x.copy(), stage.y.copy(), 1.0)
    assert np.array_equal(train([stage, same]), train([same, stage]))


def test_stages_are_ten_tokens_and_only_answers_carry_loss() -> None:
    stages = _stages(0)
    assert {name: len(part) for name, part in stages.items()} == {
        "reverse": 4000, "facts": 64, "shift": 4000, "refusal": 256,
    }  # fmt: skip
    for part in stages.values():
        for item in part.items[:5]:
            assert item["input_ids"].shape == (10,)
            assert (item["labels"] != IGNORED).tolist() == [False] * 6 + [True] * 4


def test_a_short_experiment_gives_every_number_the_checks_read() -> None:
    found = {**linear_theory(0), **experiment(0, Size(stage_steps=2, unlearning_steps=2))}
    assert all(math.isfinite(value) for value in found.values())
    assert len([name for name in found if name in {f"GA, place {place}" for place in PLACES}]) == 4
    assert all(isinstance(check.passes(found), bool | np.bool_) for check in CLAIM.checks)
    assert all(check.passes(found) for check in CLAIM.checks if check.text.startswith("linear theory"))
