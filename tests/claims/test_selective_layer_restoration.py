"""The claim of selective layer restoration: what it asks, its checks, and the experiment, shortened."""

from __future__ import annotations

import math
import random

import pytest

from overhaul.claims.selective_layer_restoration import CLAIM, EOS, FIRST_ANSWER, TASKS, VALID, Size, _rows, experiment


def test_the_base_is_right_as_often_as_it_is_said_to_be() -> None:
    rows = _rows(random.Random(0), 4000, right=0.6, first=0.1)
    answers = [(int(item["input_ids"][3]) - 3, int(item["input_ids"][4])) for item in rows.items]
    right = sum(FIRST_ANSWER + VALID * task <= answer < FIRST_ANSWER + VALID * (task + 1) for task, answer in answers)
    junk = 0.4 * VALID / (40 + TASKS * VALID)
    assert right / len(answers) == pytest.approx(0.6 + junk, abs=0.05)
    assert all(item["input_ids"][-1] == EOS for item in rows.items)


def test_the_checks_compare_with_the_baselines() -> None:
    found = {"model, validity": 0.9, "model, diversity": 0.4, "restored, validity": 0.88, "restored, diversity": 0.6}
    found |= {"soup, diversity": 0.58, "first half, diversity": 0.6, "last half, diversity": 0.5}
    found |= {"another network's blocks, validity": 0.3}
    assert [check.passes(found) for check in CLAIM.checks] == [True, True, False, True, True]


@pytest.mark.slow
def test_the_experiment_measures_everything() -> None:
    found = experiment(0, Size(base_steps=60, post_steps=20, rows=400, requests=32, soups=3))
    assert all(map(math.isfinite, found.values())) and found["model, diversity"] > 0
