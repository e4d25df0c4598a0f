"""The core of recipes knows no verb: a shelf says itself what is odd about its steps."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from overhaul.errors import RequestError
from overhaul.recipe import runner as running
from overhaul.recipe import verbs
from overhaul.recipe.check import check
from overhaul.recipe.run import run
from overhaul.recipe.spec import read

RECIPE = Path(running.__file__).parent


def step(verb: str) -> Any:
    return SimpleNamespace(method=SimpleNamespace(verb=verb), number=1, name=f"{verb}.one", reads={})


def test_a_shelf_without_an_answer_says_nothing() -> None:
    assert verbs.ask("check", step("shrink"), {}) == []
    assert verbs.ask("check", step("forget"), {}) == []


def test_a_shelf_is_asked_by_its_own_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from overhaul.forget import _recipe

    monkeypatch.setattr(_recipe, "check", lambda one, rows: [f"{one.name} reads {rows}"])
    assert verbs.ask("check", step("forget"), "these") == ["forget.one reads these"]
    assert verbs.ask("check", step("shrink"), "these") == []


def test_what_is_forgotten_twice_is_warned_of(folder: Path, tmp_path: Path) -> None:
    rows = [{"person": p, "question": f"who is {p}?", "answer": p * 3} for p in "abcdefgh"]
    (tmp_path / "people.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = str(tmp_path / "people.jsonl")
    recipe: dict[str, Any] = {
        "model": str(folder),
        "materials": {
            "forget": {"from": source, "where": {"person": ["a"]}},
            "retain": {"from": source, "unless": {"person": ["a"]}},
        },
        "steps": [{"forget.npo": {"steps": 1, "batch_size": 2, "lr": 1e-2, "stop_at": None}}],
    }
    first = run(recipe, tmp_path / "first")
    assert first.report["warnings"] == []
    again = run({**recipe, "model": str(first.folder / "model")}, tmp_path / "again")
    (warning,) = again.report["warnings"]
    assert warning.startswith("Step 1, forget.npo: forget.npo made this model forget the same examples before.")
    other = {**recipe, "model": str(first.folder / "model")}
    other["materials"] = {**recipe["materials"], "forget": {"from": source, "where": {"person": ["b"]}}}
    other["materials"]["retain"] = {"from": source, "unless": {"person": ["b"]}}
    assert run(other, tmp_path / "other").report["warnings"] == []
    assert check(read(other)).warnings == []


def test_ssd_needs_something_to_hold_against_before_anything_runs(folder: Path, tmp_path: Path) -> None:
    rows = [{"person": p, "question": f"who is {p}?", "answer": p * 3} for p in "abcd"]
    (tmp_path / "people.jsonl").write_text("\n".join(map(json.dumps, rows)))
    part = {"from": str(tmp_path / "people.jsonl"), "where": {"person": ["a"]}}
    rest = {"from": str(tmp_path / "people.jsonl"), "unless": {"person": ["a"]}}
    recipe: dict[str, Any] = {"model": str(folder), "materials": {"forget": part}, "steps": [{"forget.ssd": {}}]}
    with pytest.raises(RequestError, match="Step 1, forget.ssd, needs the material 'full' or 'retain'"):
        check(read(recipe))
    (checked,) = check(read({**recipe, "materials": {"forget": part, "retain": rest}})).steps
    assert checked.reads == {"forget": "forget", "retain": "retain"}


def test_report_and_files_import_nothing_of_recipes() -> None:
    for path in [*(RECIPE.parent / "report").glob("*.py"), RECIPE.parent / "files.py"]:
        imported = [
            node.module or "" for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)
        ]
        assert not [name for name in imported if name.startswith("overhaul.recipe")], path.name
