from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from conftest import examples_for, tiny_llama
from overhaul.fit import fit
from overhaul.fit.schedules import Infinite, learning_rate
from overhaul.objectives import cross_entropy

RATES = Infinite(warmup=4, cooled=20, plateau=0.3, floor=0.03)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1.0, 1.0, 0.8535534, 0.5, 0.1464466]),
    ],
)
def test_named_ones_warm_up_and_come_down(schedule: Any, expected: list[float]) -> None:
    rates = [learning_rate(step, 6, 2.0, 2, schedule) for step in range(6)]
    assert rates == pytest.approx([2.0 * share for share in expected])
    model, data = tiny_llama(num_hidden_layers=2), {"a": examples_for("llama", 4)}
    ledger = fit(model, [cross_entropy("a")], data, steps=6, batch_size=4, lr=1e-3, warmup=2, schedule=schedule)
    assert ledger.curves["lr"] == pytest.approx([1e-3 * share for share in expected])


def test_a_floor_is_where_a_named_one_ends_and_stays() -> None:
    assert learning_rate(99, 100, 1.0, 0, "linear", floor=0.2) == pytest.approx(0.2 + 0.8 * 0.01)
    for schedule in ("linear", "cosine"):
        assert [learning_rate(step, 50, 1.0, 0, schedule, floor=0.2) for step in (50, 75, 150)] == [0.2] * 3


def test_re_warming_follows_the_paper() -> None:
    """Up to the peak in 1% of the steps, then eta_min + (eta_max - eta_min) / 2 * (1 + cos(pi (t - t_w) / (T - t_w)))."""
    top, low, steps, warmup = 3e-4, 3e-5, 1000, 10
    rates = [learning_rate(t, steps, top, warmup, "cosine", low / top) for t in range(steps)]
    assert rates[:warmup] == pytest.approx([top * (t + 1) / warmup for t in range(warmup)])
    for t in (warmup, 250, 505, 999):
        expected = low + (top - low) / 2 * (1 + math.cos(math.pi * (t - warmup) / (steps - warmup)))
        assert rates[t] == pytest.approx(expected, rel=1e-12)
    assert rates[505] == pytest.approx((top + low) / 2)


def test_an_infinite_one_reaches_each_level_exactly() -> None:
    annealed = RATES.annealed(50, 10)
    assert [RATES(step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert RATES(4) == 1.0
    assert RATES(12) == pytest.approx((1.0 + 0.3) / 2)
    assert {RATES(step) for step in (20, 21, 10**9)} == {0.3}
    assert annealed(50) == 0.3
    assert annealed(60) == pytest.approx(0.03, abs=1e-12)
    assert {annealed(step) for step in (60, 61, 10**6)} == {annealed(60)}


@pytest.mark.parametrize("shape", ["cosine", "linear", "inverse_root"])
def test_it_has_no_jumps(shape: Any) -> None:
    rates = replace(RATES, warmup=100, cooled=1000, shape=shape).annealed(1500, 500)
    steps = [rates(step) for step in range(2100)]
    assert max(abs(after - before) for before, after in pairwise(steps)) <= 0.0101
    assert all(after <= before for before, after in pairwise(steps[99:]))
    assert (steps[100], steps[1000]) == (1.0, 0.3)


def test_the_inverse_root_is_the_published_one() -> None:
    """1 + (plateau - 1) * h(q) / h(1), h(q) = 1 / sqrt(1 + 10 q) - 1."""
    rates = replace(RATES, shape="inverse_root")

    def h(q: float) -> float:
        return 1 / math.sqrt(1 + 10 * q) - 1

    for step in (4, 8, 15, 19):
        assert rates(step) == pytest.approx(1 + (0.3 - 1) * h((step - 4) / 16) / h(1))


def test_annealing_is_a_straight_line_in_the_logarithm() -> None:
    annealed = RATES.annealed(50, 10)
    logs = [math.log(annealed(step)) for step in range(50, 61)]
    bends = [a - 2 * b + c for a, b, c in zip(logs, logs[1:], logs[2:], strict=False)]
    assert bends == pytest.approx([0.0] * len(bends), abs=1e-12)


def test_more_data_never_changes_a_rate_that_was_used() -> None:
    early, late = RATES.annealed(30, 10), RATES.annealed(60, 10)
    assert [early(step) for step in range(30)] == [late(step) for step in range(30)]
    assert RATES.annealing is None, "the plateau can still be gone on from"


def test_without_a_cool_down_the_warm_up_ends_on_the_plateau() -> None:
    rates = Infinite(warmup=4, cooled=4, plateau=0.5, floor=0.1)
    assert [rates(step) for step in range(6)] == [0.125, 0.25, 0.375, 0.5, 0.5, 0.5]


def test_a_plateau_at_the_peak_is_warm_up_stable_decay() -> None:
    rates = Infinite(warmup=2, cooled=2, plateau=1.0, floor=0.01).annealed(5, 2)
    assert [rates(step) for step in range(8)] == pytest.approx([0.5, 1, 1, 1, 1, 1, 0.1, 0.01])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"floor": 0.0}, "rates must satisfy"),
        ({"plateau": 1.5}, "rates must satisfy"),
        ({"floor": 0.4}, "rates must satisfy"),
        ({"cooled": 3}, "begins at 3, before the warm-up ends at 4"),
        ({"annealing": 10, "annealing_steps": 5}, "begins on the plateau"),
        ({"annealing": 30}, "at least one step"),
    ],
)
def test_what_makes_no_schedule_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        replace(RATES, **changes)
