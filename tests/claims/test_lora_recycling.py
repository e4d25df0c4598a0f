"""The claim of recycled LoRAs: its tasks and its checks; the experiment itself, shortened, is a slow test."""

from __future__ import annotations

import math

import numpy
import pytest

from overhaul.claims.lora_recycling import CLAIM, Size, experiment, permuted, turned


def test_digits_are_turned_or_permuted_and_keep_their_labels() -> None:
    image = numpy.arange(64, dtype="float32").reshape(8, 8)
    (row,) = turned([{"image": image, "label": 3}])
    assert row["label"] == 3 and row["image"][0, 0] == image[0, 7] and row["image"][7, 7] == image[7, 0]
    both = permuted([{"image": image, "label": 1}, {"image": image + 64, "label": 2}], numpy.random.default_rng(0))
    assert sorted(both[0]["image"].ravel()) == sorted(image.ravel())
    assert (both[0]["image"] + 64 == both[1]["image"]).all() and (both[0]["image"] != image).any()


def test_the_checks_compare_with_the_controls() -> None:
    rows = {
        "unrelated pool": {"merge": 22, "random pool": 20, "fresh LoRA": 60},
        "related pool": {"merge": 70, "random pool": 20, "fresh LoRA": 60},
    }
    found = {f"{pool}: {row}": float(value) for pool, each in rows.items() for row, value in each.items()}
    found |= {"unrelated pool: merge with fresh LoRA": 61.0, "unrelated pool: random pool with fresh LoRA": 63.0}
    assert [check.passes(found) for check in CLAIM.checks] == [True, False, True, True]
    found |= {"unrelated pool: merge": 24.0, "unrelated pool: random pool with fresh LoRA": 62.0}
    found |= {"related pool: merge": 63.0}
    assert [check.passes(found) for check in CLAIM.checks] == [False, True, False, True]


@pytest.mark.slow
def test_the_experiment_measures_everything() -> None:
    found = experiment(0, Size(steps=40, merging_steps=10, images=100, unrelated=2))
    assert len(found) == 16 and all(map(math.isfinite, found.values()))
    assert found["related pool: base"] == found["unrelated pool: base"] < 40
