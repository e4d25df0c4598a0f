from __future__ import annotations

import numpy as np
import pytest
import torch

from overhaul.errors import RequestError
from overhaul.intervals import interval, limits, multiplicities, numbered
from overhaul.judge.likelihood import auc


def mean(sample: list[float]) -> float:
    return sum(sample) / len(sample)


def test_an_interval_is_drawn_over_clusters() -> None:
    draw = torch.Generator().manual_seed(5)
    values = torch.randn(30, generator=draw).tolist()
    low, high = interval(mean, (values, range(30)))
    error = torch.tensor(values).std(correction=0).item() / 30**0.5
    assert (high - low) / (2 * 1.96 * error) == pytest.approx(1.0, abs=0.1)
    # ten questions about each person, all alike, say no more than one
    repeated, people = values * 10, [*range(30)] * 10
    assert interval(mean, (repeated, people)) == pytest.approx((low, high))
    naive = interval(mean, (repeated, range(300)))
    assert naive[1] - naive[0] < (high - low) / 2
    assert interval(mean, (values, range(30)), level=0.5)[0] > low


def test_an_interval_of_two_samples_draws_each_from_itself() -> None:
    assert interval(auc, ([2.0, 3.0], "ab"), ([0.0, 1.0], "cd")) == (1.0, 1.0)
    with pytest.raises(RequestError, match="at least two"):
        interval(auc, ([2.0, 3.0], "aa"), ([0.0, 1.0], "cd"))


def test_every_draw_has_as_many_units_as_there_are_and_whole_clusters() -> None:
    units = ["a", "b", "a", "c"]
    for counts in multiplicities(units, 50):
        assert counts[0] == counts[2]
        assert counts[0] + counts[1] + counts[3] == 3
    assert numbered(units).tolist() == [0, 1, 0, 2]


def test_the_same_seed_draws_the_same_and_torch_does_not_move() -> None:
    state = torch.get_rng_state()
    first, again, other = (np.stack([*multiplicities(range(9), 20, seed)]) for seed in (1, 1, 2))
    assert (first == again).all() and not (first == other).all()
    assert torch.equal(torch.get_rng_state(), state)


def test_limits_are_quantiles_of_the_draws() -> None:
    drawn = np.stack([np.arange(1001), 2 * np.arange(1001)], axis=1)
    np.testing.assert_allclose(limits(drawn), [[25, 50], [975, 1950]])
    np.testing.assert_allclose(limits(drawn, 0.5)[0], [250, 500])
