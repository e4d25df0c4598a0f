"""Planned memory against the memory of real runs on the starters, each in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAM = """
import json, sys, torch
from overhaul.recipe.check import check
from overhaul.recipe.plan import libraries_bytes, plan
from overhaul.recipe.run import run
from overhaul.recipe.spec import read
torch.set_num_threads(1)
recipe = json.loads(sys.argv[1])
checked = check(read(recipe))
planned = [libraries_bytes() + step.peak_bytes for step in plan(checked, 1e9)]
measured = [step["peak_bytes"] for step in run(recipe, sys.argv[2]).report["steps"]]
print(json.dumps([planned, measured]))
"""

GONE = {"person": ["Ada Quill", "Thea Sable"]}
PEOPLE = {"from": "starter:people"}
TEXT = [{"from": "starter:docs", "limit": 130}, {"from": "starter:addition", "limit": 200}]
LANGUAGE: dict[str, Any] = {
    "model": "starter:docs-llama",
    "materials": {
        "forget": {**PEOPLE, "where": GONE}, "retain": {**PEOPLE, "unless": GONE}, "text": TEXT, "uncut": {"after": "npo"},
    },
    "steps": [
        {"forget.npo": {"steps": 4, "lr": 1e-4, "retain_term": "klr", "stop_at": None}},
        {"shrink.drop_layers": {"count": 2}},
        {"shrink.heal": {"steps": 6, "batch_size": 16, "teacher": "uncut", "target": "teacher"}},
    ],
}  # fmt: skip


def images(model: str, data: str, *steps: Any) -> dict[str, Any]:
    forget = {"from": f"starter:{data}", "where": {"label": 3}}
    materials = {
        "forget": forget,
        "full": {"from": f"starter:{data}"},
        "text": {"from": f"starter:{data}", "limit": 200},
    }
    return {"model": f"starter:{model}", "materials": materials, "steps": list(steps)}


SSD: dict[str, Any] = {"forget.ssd": {}}
DROP: dict[str, Any] = {"shrink.drop_layers": {"count": 1}}
HEAL: dict[str, Any] = {"shrink.heal": {"steps": 4}}


@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param(LANGUAGE, id="docs-llama", marks=pytest.mark.slow),
        pytest.param(images("digits-vit", "digits", SSD, DROP, HEAL), id="digits-vit"),
        pytest.param(images("digits-resnet", "digits-32", SSD, DROP, HEAL), id="digits-resnet", marks=pytest.mark.slow),
    ],
)
@pytest.mark.smoke
def test_planned_memory_is_within_a_quarter_of_what_a_run_takes(recipe: dict[str, Any], tmp_path: Path) -> None:
    arguments = [sys.executable, "-c", PROGRAM, json.dumps(recipe), str(tmp_path / "out")]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    planned, measured = json.loads(done.stdout.splitlines()[-1])
    for step, expected, taken in zip(recipe["steps"], planned, measured, strict=True):
        assert 0.75 <= expected / taken <= 1.25, f"{step}: planned {expected / 1e6:.0f} MB, took {taken / 1e6:.0f} MB"
