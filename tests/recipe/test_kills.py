"""Runs, comparisons and blends that are killed at any time: the same command then gives the same bytes."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from conftest import tiny_llama
from overhaul import models

TRIALS = 34
"""Of each kind; kills come at random times over the length of a whole run."""

ROWS = [{"person": p, "question": f"who is {p}?", "answer": p * 3} for p in "abcdefgh"]
OVERHAUL = [sys.executable, "-m", "overhaul"]
BLEND = [
    sys.executable, "-c",
    "import sys, shutil; from overhaul import weights; shutil.rmtree('out', ignore_errors=True); "
    "weights.blend(sys.argv[1:3], [0.3, 0.7], 'out')",
]  # fmt: skip


def recipe(folder: Path) -> dict[str, Any]:
    return {
        "model": str(folder),
        "materials": {
            "forget": {"from": "people.jsonl", "where": {"person": "a"}},
            "retain": {"from": "people.jsonl", "unless": {"person": "a"}},
        },
        "steps": [
            {"forget.npo": {"steps": 20, "lr": 1e-3, "batch_size": 4, "stop_at": None}},
            {"shrink.prune": {"criterion": "magnitude"}},
        ],
        "judge": {"forgotten": {"answer_probability": "forget"}, "kept": {"accuracy": "retain"}},
    }


def content(out: Path) -> dict[str, str]:
    """What a command left, by its bytes; of JSON without times and dates, and no logs and pages that show them."""
    found = {}
    for path in sorted(path for path in out.rglob("*") if path.is_file()):
        name = path.relative_to(out).as_posix()
        if path.suffix == ".safetensors" or path.name in ("config.json", "tokenizer.json", "published.json"):
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif path.name in ("report.json", "comparison.json"):
            report = json.loads(path.read_text())
            kept = [m.get("values") or m["metric"] for m in report["measures"] if m["group"] != "cost"]
            found[name] = json.dumps(kept)
        else:
            found[name] = "there"
    return found


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", ["run", "compare", "blend"])
def test_a_kill_at_any_time_and_the_same_command_give_the_same_bytes(kind: str, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "people.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe(folder)))
    other = models.save(tiny_llama(), None, tmp_path / "other")
    command = {
        "run": [*OVERHAUL, "run", "recipe.yaml", "-o", "out"],
        "compare": [*OVERHAUL, "compare", "recipe.yaml", "--methods", "forget.npo,forget.grad_diff", "-o", "out"],
        "blend": [*BLEND, str(folder), str(other)],
    }[kind]
    started = time.monotonic()
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    seconds, whole = time.monotonic() - started, content(tmp_path / "out")
    draw, killed = random.Random(0), 0
    for trial in range(TRIALS):
        shutil.rmtree(tmp_path / "out")
        process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(draw.uniform(0.3, 0.95) * seconds)
        process.kill()
        killed += process.wait() != 0
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, f"trial {trial}: {done.stderr}"
        assert content(tmp_path / "out") == whole, f"trial {trial}"
        assert not list((tmp_path / "out").rglob(".*")), f"trial {trial}"
    print(f"{kind}: {killed} of {TRIALS} were killed before their end, all with the same bytes")
    assert killed >= TRIALS // 2
