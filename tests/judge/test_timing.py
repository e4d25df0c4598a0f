"""Times are taken in turn, after warm-ups that do not count."""

from __future__ import annotations

import pytest
import torch

from overhaul.judge import timing
from overhaul.judge.timing import WARM_UPS, in_turn

CPU = torch.device("cpu")


def test_calls_are_timed_in_turn_each_round_the_other_way_round() -> None:
    said: list[str] = []
    found = in_turn({"a": lambda: said.append("a"), "b": lambda: said.append("b")}, 2, CPU)
    assert "".join(said) == "abba" * ((WARM_UPS + 2) // 2)
    assert {name: len(seconds) for name, seconds in found.items()} == {"a": 2, "b": 2}


def test_slow_calls_are_timed_less_often_and_at_least_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "ENOUGH_SECONDS", 0.0)
    found = in_turn({"a": int, "b": int}, 9, CPU)
    assert {name: len(seconds) for name, seconds in found.items()} == {"a": 1, "b": 1}
