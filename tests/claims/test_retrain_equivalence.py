from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from overhaul.claims._ridge_paths import Divergence, Stage, ascend, growth, train
from overhaul.claims.retrain_equivalence import (
    CLAIM,
    DEPTH_MARK,
    LAST,
    LETTER,
    PAPER,
    PHASES,
    PLACES,
    Size,
    _phrasings,
    _stages,
    _verdict,
    depth_study,
    experiment,
    linear_theory,
)
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


def test_three_answers_repeat_a_part_of_the_same_40_prompts_and_share_no_opening() -> None:
    phrasings = _phrasings(0)
    assert {stage: len(part) for stage, part in phrasings.items()} == {"refusal": 40, "forget": 40, "sibling": 40}
    prompts = {stage: [item["input_ids"][:6].tolist() for item in part.items] for stage, part in phrasings.items()}
    assert prompts["refusal"] == prompts["forget"] == prompts["sibling"]
    openings = {stage: {int(item["input_ids"][6]) for item in part.items} for stage, part in phrasings.items()}
    assert all(len(opening) == 1 for opening in openings.values()) and len(set.union(*openings.values())) == 3
    for part in phrasings.values():
        for item in part.items:
            answer = item["labels"][item["labels"] != IGNORED].tolist()
            assert len(answer) == 4 and len(item["labels"]) == 10
            assert [token for token in answer if token < 50] == item["input_ids"][1:3].tolist()
    assert DEPTH_MARK not in {int(item["input_ids"][0]) for part in _stages(0).values() for item in part.items}


def _like_the_paper() -> dict[str, float]:
    """Log-probabilities as in the paper's figure 4, and a null control that changes no verdict."""
    ends = {"superficial": {"R": -7.0, "U": -25.0, "C": -4.0}, "deep": {"R": -5.0, "U": -30.0, "C": -12.0}}
    found = {LAST: 6.0}
    for order, theirs in PAPER.items():
        found |= {f"depth {order}, {letter}, after": value for letter, value in ends[theirs].items()}
        for phase in ("before", "unrelated unlearnt"):
            found |= {f"depth {order}, {letter}, {phase}": -3.0 for letter in LETTER.values()}
    return found


def test_the_checks_of_depth_hold_for_what_the_paper_found_and_fail_where_one_verdict_is_another() -> None:
    checks = [check for check in CLAIM.checks if "depth" in check.text]
    found = _like_the_paper()
    assert len(checks) == 5 and all(check.passes(found) for check in checks)

    def passed(**changes: float) -> list[bool]:
        return [check.passes(found | changes) for check in checks]

    shallow = {"depth U-C-R, C, after": -1.0}
    assert passed(**shallow) == [True, True, False, True, True]
    assert passed(**shallow, **{"depth R-C-U, U, after": -7.0}) == [True, False, False, False, True]
    assert passed(**{LAST: 5.0}) == [False, True, True, True, True]
    assert passed(**{"depth C-U-R, U, unrelated unlearnt": -3.1}) == [True, True, True, True, False]


@pytest.mark.smoke
def test_a_short_depth_study_gives_every_number_the_checks_read() -> None:
    size = Size(stage_steps=2, depth_stage_steps=2, depth_unlearning_steps=2)
    found = depth_study(0, size)
    assert found.keys() == {LAST} | {
        f"depth {order}, {letter}, {phase}" for order in PAPER for letter in LETTER.values() for phase in PHASES
    }
    assert all(math.isfinite(value) for value in found.values())
    assert all(isinstance(check.passes(found), bool) for check in CLAIM.checks if "depth" in check.text)
    assert {_verdict(found, order) for order in PAPER} <= {"not forgotten", "superficial", "deep"}
    # U has hardly been learnt after two steps, so that ascent is felt at once; and the null control is another training
    assert all(found[f"depth {order}, U, after"] < found[f"depth {order}, U, before"] for order in PAPER)
    assert all(found[f"depth {o}, U, after"] != found[f"depth {o}, U, unrelated unlearnt"] for o in PAPER)


@pytest.mark.smoke
def test_a_short_experiment_gives_every_number_the_checks_read() -> None:
    found = {**linear_theory(0), **experiment(0, Size(stage_steps=2, unlearning_steps=2))}
    assert all(math.isfinite(value) for value in found.values())
    assert len([name for name in found if name in {f"GA, place {place}" for place in PLACES}]) == 4
    others = [check for check in CLAIM.checks if "depth" not in check.text]
    assert all(isinstance(check.passes(found), bool | np.bool_) for check in others)
    assert all(check.passes(found) for check in others if check.text.startswith("linear theory"))
