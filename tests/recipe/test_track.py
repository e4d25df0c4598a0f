"""`track:` sends a run's curves and measures to an experiment tracker, and asks for it before the run."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import overhaul as oh
from overhaul.errors import RequestError, RunError
from overhaul.recipe.run import run


def recipe(folder: Path, name: str) -> dict[str, Any]:
    (folder.parent / "track.jsonl").write_text('{"text": "a small text to read"}\n' * 4)
    text = {"from": str(folder.parent / "track.jsonl")}
    return {
        "title": "mine", "model": str(folder), "track": name, "materials": {"text": text},
        "steps": [{"shrink.heal": {"target": "tokens", "steps": 3}}], "judge": {"kept": {"perplexity": "text"}},
    }  # fmt: skip


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_curves_and_measures_are_logged_once_the_run_is_done(
    name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[dict[str, Any]] = []
    said: list[dict[str, float]] = []
    ended: list[int] = []
    fake = SimpleNamespace(init=lambda **given: begun.append(given), log=said.append, finish=lambda: ended.append(1))
    monkeypatch.setitem(sys.modules, name, fake)  # pyright: ignore[reportArgumentType]
    given = recipe(folder, name)
    report = run(given, tmp_path / "out").report
    assert [one["name"] for one in begun] == ["mine"] and begun[0]["config"]["seed"] == 0 and ended == [1]
    losses = [values["1 shrink.heal/loss"] for values in said if "1 shrink.heal/loss" in values]
    assert losses == report["steps"][0]["curves"]["loss"] and len(losses) == 3
    stages = [values for values in said if "stage" in values]
    (perplexity,) = [m["values"] for m in report["measures"] if m["metric"] == "perplexity"]
    assert [values["kept/perplexity on text"] for values in stages] == perplexity
    run(given, tmp_path / "out")
    assert len(begun) == 1, "a finished run is not logged again"


@pytest.mark.parametrize("part", ["init", "log", "finish"])
def test_a_tracker_that_fails_loses_no_run(
    part: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ValueError("no\nkey")

    ended: list[int] = []
    fake = SimpleNamespace(init=lambda **_: None, log=lambda _: None, finish=lambda: ended.append(1))
    monkeypatch.setitem(sys.modules, "wandb", fake)  # pyright: ignore[reportArgumentType]
    monkeypatch.setattr(fake, part, broken)
    given = recipe(folder, "wandb")
    with pytest.raises(RunError, match="The run is done and kept, but `track: wandb` .* ValueError: no key"):
        run(given, tmp_path / "out")
    assert (tmp_path / "out" / "model" / "model.safetensors").exists() and (tmp_path / "out" / "report.html").exists()
    assert ended == ([1] if part == "log" else [])
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(**vars(fake) | {part: lambda *_, **__: ended.append(2)}))
    run(given, tmp_path / "out")
    assert 2 in ended, "the same command tells it again"


def test_a_tracker_that_is_not_installed_is_said_by_plan(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)  # pyright: ignore[reportArgumentType]
    with pytest.raises(RequestError, match=r"`track: trackio` needs the package trackio.*overhaul\[track\]"):
        oh.plan(recipe(folder, "trackio"))
    with pytest.raises(RequestError, match="track"):
        oh.plan(recipe(folder, "mlflow"))
