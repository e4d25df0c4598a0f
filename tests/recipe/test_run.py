"""Runs: what they leave, that they go on after a kill with the same numbers, and that failures leave nothing half-done."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from conftest import tiny_llama, tiny_vit
from overhaul import models
from overhaul.errors import RequestError, RunError
from overhaul.recipe.run import run

LETTERS = "abcdefghijklmnop"


def write_recipe(folder: Path, base: Path, **changes: Any) -> Path:
    rows = [{"person": p, "question": f"who is {p}?", "answer": p * 3} for p in LETTERS]
    (base / "people.jsonl").write_text("\n".join(map(json.dumps, rows)))
    content = {
        "model": str(folder),
        "materials": {
            "forget": {"from": "people.jsonl", "where": {"person": ["a", "b"]}},
            "retain": {"from": "people.jsonl", "unless": {"person": ["a", "b"]}},
            "text": ["retain"],
            "uncut": {"after": "forget.npo"},
        },
        "steps": [
            {"forget.npo": {"steps": 4, "lr": 1e-2, "batch_size": 4, "stop_at": None}},
            {"shrink.drop_layers": {"count": 1}},
            {"shrink.heal": {"teacher": "uncut", "target": "teacher", "steps": 4, "lr": 1e-3}},
        ],
        "judge": {"forgotten": {"answer_probability": "forget"}, "kept": {"accuracy": "retain"}},
        **changes,
    }
    path = base / "recipe.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def numbers(folder: Path) -> list[Any]:
    report = json.loads((folder / "report.json").read_text())
    return [(m["metric"], m["on"], m["values"]) for m in report["measures"] if m["group"] != "cost"]


def test_a_run_leaves_model_report_and_lineage_and_is_not_run_twice(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(folder, tmp_path)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    done = run(recipe, tmp_path / "out")
    assert done.report["stages"] == ["before", "forget.npo", "shrink.drop_layers", "shrink.heal"]
    out = tmp_path / "out"
    for name in ("report.html", "report.json", "recipe.yaml", "lineage.json"):
        assert (out / name).stat().st_size > 0
    for name in ("config.json", "model.safetensors", "tokenizer.json", "recipe.yaml", "lineage.json", "README.md"):
        assert (out / "model" / name).exists(), name
    assert not [p for p in out.rglob(".*")], "nothing half-written is left"
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before, "the input is never touched"
    lineage = json.loads((out / "lineage.json").read_text())
    assert [step["name"] for step in lineage["steps"]] == done.report["stages"][1:]
    assert lineage["model_sha256"] == models.facts(out / "model").digest()

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a finished run read weights again")

    monkeypatch.setattr(models, "load_weights", never)
    again = run(recipe, out)
    assert [s for s in again.report["steps"]] == json.loads(json.dumps(done.report["steps"]))
    assert [m["values"] for m in again.report["measures"]] == [m["values"] for m in done.report["measures"]]


@pytest.mark.smoke
def test_the_saved_model_loads_without_overhaul(folder: Path, tmp_path: Path) -> None:
    run(write_recipe(folder, tmp_path), tmp_path / "out")
    program = (
        "import sys; sys.modules['overhaul'] = None\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model, loading = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)\n"
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "assert not loading['missing_keys'] and not loading['unexpected_keys'], loading\n"
        "ids = tokenizer('who is c?', return_tensors='pt')['input_ids']\n"
        "print(model.config.num_hidden_layers, model.generate(ids, max_new_tokens=3).shape[1] > ids.shape[1])\n"
    )
    arguments = [sys.executable, "-c", program, str(tmp_path / "out" / "model")]
    result = subprocess.run(arguments, capture_output=True, text=True, timeout=120)
    assert result.stdout.strip() == "3 True", result.stderr


@pytest.mark.smoke
def test_changing_a_step_repeats_it_and_what_follows_only(folder: Path, tmp_path: Path) -> None:
    first = run(write_recipe(folder, tmp_path), tmp_path / "out")
    steps = yaml.safe_load((tmp_path / "recipe.yaml").read_text())["steps"]
    steps[2]["shrink.heal"]["steps"] = 5
    kept = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out" / "steps").glob("0[12]*")}
    second = run(write_recipe(folder, tmp_path, steps=steps), tmp_path / "out")
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out" / "steps").glob("0[12]*")} == kept
    assert len(list((tmp_path / "out" / "steps").glob("03*"))) == 2
    assert second.report["steps"][:2] == json.loads(json.dumps(first.report["steps"][:2]))


PROGRAM = (
    "import sys, torch; torch.set_num_threads(1); from overhaul.recipe.run import run; run(sys.argv[1], sys.argv[2])"
)


@pytest.mark.parametrize("step", [1, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.smoke
def test_kill_in_a_step_and_the_same_command_gives_the_same_numbers(step: int, folder: Path, tmp_path: Path) -> None:
    steps = [
        {"forget.npo": {"steps": 60, "lr": 1e-3, "batch_size": 4, "stop_at": None}},
        {"shrink.drop_layers": {"count": 1}},
        {"shrink.heal": {"teacher": "uncut", "target": "teacher", "steps": 60, "lr": 1e-3}},
    ]
    recipe = write_recipe(folder, tmp_path, steps=steps)
    whole = subprocess.run([sys.executable, "-c", PROGRAM, recipe, tmp_path / "whole"], timeout=200)
    assert whole.returncode == 0
    killed = subprocess.Popen([sys.executable, "-c", PROGRAM, recipe, tmp_path / "killed"])
    marker = f".{step:02d}-*.partial"
    deadline = time.monotonic() + 120
    while not list((tmp_path / "killed" / "steps").glob(marker)) and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    assert not list((tmp_path / "killed" / "steps").glob(f"{step:02d}-*")), "the kill came too late to test anything"
    assert not (tmp_path / "killed" / "report.json").exists()
    again = subprocess.run([sys.executable, "-c", PROGRAM, recipe, tmp_path / "killed"], timeout=200)
    assert again.returncode == 0
    assert numbers(tmp_path / "killed") == numbers(tmp_path / "whole")
    digests = [models.facts(tmp_path / name / "model").digest() for name in ("whole", "killed")]
    assert digests[0] == digests[1]


@pytest.mark.smoke
def test_a_training_goes_on_from_its_checkpoint(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted in the middle of a step, by Ctrl-C: the checkpoint is used and the result is the same, bit for bit."""
    from overhaul import session

    recipe = write_recipe(folder, tmp_path)
    run(recipe, tmp_path / "whole")
    done: list[int] = []
    stopped: list[bool] = []

    def interrupt(what: str, step: int, total: int, detail: str) -> None:
        if what == "npo":
            done.append(step)
            if step == 3 and not stopped:
                stopped.append(True)
                raise KeyboardInterrupt

    with session.using(report=interrupt, checkpoint_seconds=0.0):
        with pytest.raises(KeyboardInterrupt):
            run(recipe, tmp_path / "stopped")
        assert list((tmp_path / "stopped" / "steps").glob(".*.working/*.checkpoint"))
        done.clear()
        run(recipe, tmp_path / "stopped")
    assert 1 not in done, "the training began anew instead of going on"
    assert numbers(tmp_path / "stopped") == numbers(tmp_path / "whole")


def test_a_step_that_changes_nothing_is_an_error(tmp_path: Path, tokenizer: Any) -> None:
    model: Any = tiny_llama()
    with torch.no_grad():  # the padding row is zero, and from zero even 1e-12 is a change
        model.get_input_embeddings().weight[0] = 0.01
    folder = models.save(model, tokenizer, tmp_path / "model", dtype="bfloat16")
    recipe = write_recipe(
        folder, tmp_path, steps=[{"forget.npo": {"steps": 1, "lr": 1e-12, "stop_at": None}}], judge={}
    )
    with pytest.raises(RunError, match=r"Step 1, forget.npo, changed nothing that bfloat16 weights can hold"):
        run(recipe, tmp_path / "out")
    assert not list((tmp_path / "out" / "steps").glob("01*")) and not (tmp_path / "out" / "model").exists()


def test_folders_that_hold_something_else_are_refused(folder: Path, tmp_path: Path) -> None:
    recipe = write_recipe(folder, tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    with pytest.raises(RequestError, match="not empty and holds no run"):
        run(recipe, tmp_path / "full")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "run.json").write_text('{"recipe": "another"}')
    with pytest.raises(RequestError, match="holds the run of another recipe"):
        run(recipe, tmp_path / "other")
    with pytest.raises(RequestError, match="is a file"):
        run(recipe, recipe)
    assert (tmp_path / "full" / "thesis.tex").exists()


def test_a_disk_with_too_little_room_is_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil
    from types import SimpleNamespace

    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(RequestError, match="kB free; this run writes about"):
        run(write_recipe(folder, tmp_path), tmp_path / "out")


def test_a_place_that_cannot_be_written_is_said_in_words(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="part of the path is a file"):
        run(write_recipe(folder, tmp_path), tmp_path / "file" / "out")


def test_running_out_of_disk_in_a_step_keeps_what_was_finished(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(folder, tmp_path)
    real, calls = models.write_checkpoint, []

    def second_fails(*arguments: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        real(*arguments)

    monkeypatch.setattr(models, "write_checkpoint", second_fails)
    with pytest.raises(RunError, match="the disk is full"):
        run(recipe, tmp_path / "out")
    assert len(list((tmp_path / "out" / "steps").glob("01*"))) == 1
    assert not list((tmp_path / "out" / "steps").glob("02*")) and not (tmp_path / "out" / "model").exists()
    assert run(recipe, tmp_path / "out").report["stages"][-1] == "shrink.heal"


def test_images_run_too(tmp_path: Path) -> None:
    models.save(tiny_vit(), None, tmp_path / "vit")
    recipe = {
        "model": str(tmp_path / "vit"),
        "materials": {
            "forget": {"from": "starter:digits", "where": {"label": 3}, "limit": 40},
            "full": {"from": "starter:digits", "limit": 200},
            "test": {"from": "starter:digits", "split": "validation", "limit": 50},
        },
        "steps": ["forget.ssd"],
        "judge": {"forgotten": {"accuracy": "forget"}, "kept": {"accuracy": "test"}},
    }
    done = run(recipe, tmp_path / "out")
    assert done.report["model"]["class"] == "ViTForImageClassification"
    assert len(done.report["steps"]) == 1


@pytest.mark.smoke
def test_forgetting_the_same_examples_again_is_pointed_out(folder: Path, tmp_path: Path) -> None:
    recipe = write_recipe(folder, tmp_path)
    first = run(recipe, tmp_path / "first")
    assert first.report["warnings"] == []
    again = write_recipe(
        first.folder / "model",
        tmp_path,
        steps=[{"forget.npo": {"steps": 1, "lr": 1e-2, "batch_size": 4, "stop_at": None}}],
    )
    *_, warning = run(again, tmp_path / "again").report["warnings"]
    assert "forget.npo made this model forget the same examples before" in warning
    assert warning in (tmp_path / "again/report.html").read_text()
