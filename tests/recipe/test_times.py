"""Times of a run: models of equal shape get none that differ, whatever the machine does meanwhile."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from overhaul.judge import cost, timing
from overhaul.recipe import compare as comparing
from overhaul.recipe import machine
from overhaul.recipe.run import Run, run
from overhaul.report import html, numbers

ROUNDS = 20


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """On a machine that slows down, run by run, to over twice its time: what ran, and which model."""
    calls: list[tuple[str, int]] = []
    numbered: dict[nn.Module, int] = {}

    def clock() -> Iterator[float]:
        now = 0.0
        while True:
            yield now
            now += 1e-3 * (1.0 + 0.05 * len(calls))  # a call is timed between two looks at the clock
            yield now

    looks = clock()
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: next(looks)))
    for name in ("FORWARDS", "GENERATIONS"):
        monkeypatch.setattr(cost, name, ROUNDS)
    for what in ("invoke", "generate"):
        real = getattr(cost, what)

        def noted(model: nn.Module, *rest: Any, what: str = what, real: Any = real) -> Any:
            calls.append((what, numbered.setdefault(model, len(numbered))))
            return real(model, *rest)

        monkeypatch.setattr(cost, what, noted)
    monkeypatch.setattr(cost, "flops", lambda *_: 1)  # no forward but the timed ones
    return calls


def recipe(folder: Path, base: Path) -> dict[str, Any]:
    rows = [{"person": p, "question": f"who is {p}?", "answer": p * 3} for p in "abcdefgh"]
    (base / "people.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = str(base / "people.jsonl")
    return {
        "model": str(folder),
        "materials": {
            "forget": {"from": source, "where": {"person": "a"}},
            "retain": {"from": source, "unless": {"person": "a"}},
            "full": {"from": source},
        },
        "steps": [{"forget.ssd": {"alpha": 1.5}}],
        "compare": [{"forget.ssd": {"alpha": alpha}} for alpha in (1.5, 1.2)],
        "judge": {"kept": {"answer_probability": "retain"}},
    }


def said(done: Run) -> dict[str, str]:
    """The verdict on each time of a run."""
    return {one["metric"]: numbers.verdict(one).word for one in done.report["measures"] if one.get("runs")}


def test_models_of_equal_shape_take_turns_and_nothing_is_said_of_their_times(
    folder: Path, tmp_path: Path, ran: list[tuple[str, int]]
) -> None:
    done = run(recipe(folder, tmp_path), tmp_path / "out")
    for what in ("invoke", "generate"):
        order = [model for one, model in ran if one == what]
        assert order == [0, 1, 1, 0] * ((timing.WARM_UPS + ROUNDS) // 2)
    assert said(done) == {"latency": "within noise", "decode_latency": "within noise"}
    assert all(len(one["runs"]) == 2 for one in done.report["measures"] if "latency" in one["metric"])


def test_models_without_room_beside_each_other_are_timed_one_by_one(
    folder: Path, tmp_path: Path, ran: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "free_bytes", lambda: 0)
    done = run(recipe(folder, tmp_path), tmp_path / "out")
    order = [model for one, model in ran if one == "invoke"]
    assert order == sorted(order) and set(order) == {0, 1}
    # what a machine that slows down does to them: so the test above can fail
    assert said(done) == {"latency": "more", "decode_latency": "more"}


def test_what_was_timed_is_not_timed_again_and_the_page_is_drawn_from_the_report_alone(
    folder: Path, tmp_path: Path, ran: list[tuple[str, int]]
) -> None:
    done = run(recipe(folder, tmp_path), tmp_path / "out")
    before = len(ran)
    (tmp_path / "out" / "finished.json").unlink()
    again = run(recipe(folder, tmp_path), tmp_path / "out")
    assert len(ran) == before
    assert json.loads(json.dumps(again.report["measures"])) == json.loads(json.dumps(done.report["measures"]))
    stored = json.loads((tmp_path / "out" / "report.json").read_text())
    assert html.render(stored) == (tmp_path / "out" / "report.html").read_text()


def test_all_models_of_a_comparison_take_turns(folder: Path, tmp_path: Path, ran: list[tuple[str, int]]) -> None:
    found = comparing.compare(recipe(folder, tmp_path), out=tmp_path / "out").report
    assert len(found["rows"]) == 4
    turns = [model for one, model in ran if one == "generate"][-4 * (timing.WARM_UPS + ROUNDS) :]
    first = turns[:4]
    assert len(set(first)) == 4 and turns == [*first, *first[::-1]] * ((timing.WARM_UPS + ROUNDS) // 2)
    assert [one["metric"] for one in found["measures"]][-2:] == ["latency", "decode_latency"]
    assert all(len(row["values"]) == len(found["measures"]) for row in found["rows"])
