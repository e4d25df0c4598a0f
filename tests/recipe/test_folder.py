"""A run folder under the hands of others: damaged files, links, files of the user, what a killed run left."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from overhaul.errors import RequestError, RunError, writing
from overhaul.fit.checkpoints import TrainingCheckpoint
from overhaul.recipe.plan import largest_batch
from overhaul.recipe.run import run
from overhaul.session import using

ROWS = [{"person": p, "question": f"who is {p}?", "answer": p * 3} for p in "abcdefgh"]


def recipe_for(folder: Path, steps: Any = ({"shrink.prune": {"criterion": "magnitude"}},)) -> dict[str, Any]:
    people = folder.parent / "people.jsonl"
    people.write_text("\n".join(map(json.dumps, ROWS)))
    return {
        "model": str(folder),
        "materials": {"people": {"from": str(people)}},
        "steps": list(steps),
        "judge": {"kept": {"answer_probability": "people"}},
    }


def values(report: dict[str, Any]) -> list[Any]:
    return [measure["values"] for measure in report["measures"] if measure["group"] != "cost"]


@pytest.mark.smoke
@pytest.mark.parametrize("damage", [b"", b'{"recipe"', b"\x00\xff\xfe", b'"text"', b"null", b"{}"])
def test_every_small_file_may_be_damaged_and_the_run_goes_on(damage: bytes, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = run(recipe_for(folder), out).report
    small = [path for path in out.rglob("*.json") if "model" not in path.relative_to(out).parts]
    assert {path.name for path in small} >= {"run.json", "step.json", "report.json", "published.json", "finished.json"}
    for path in small:
        whole = path.read_bytes()
        path.write_bytes(damage)
        if path.name in ("report.json", "lineage.json", "finished.json"):  # written anew, never relied on
            again = run(recipe_for(folder), out).report
        else:
            (out / "finished.json").unlink(missing_ok=True)
            with pytest.warns(UserWarning, match=f"{path.name} is damaged"):
                again = run(recipe_for(folder), out).report
        assert values(again) == values(first), path
        assert path.read_bytes() != damage and (path.name != "published.json" or path.read_bytes() == whole)


def test_a_copied_run_is_known_by_its_contents(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(recipe_for(folder), tmp_path / "first")
    shutil.copytree(tmp_path / "first", tmp_path / "copy", copy_function=shutil.copyfile)  # with times of its own
    shutil.rmtree(tmp_path / "first")
    done = (tmp_path / "copy" / "run.log").read_text()
    run(recipe_for(folder), tmp_path / "copy")
    assert "shrink.prune, was done before" in (tmp_path / "copy" / "run.log").read_text()[len(done) :]
    (step,) = (tmp_path / "copy" / "steps").iterdir()
    weights = step / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    (tmp_path / "copy" / "finished.json").unlink()
    with pytest.warns(UserWarning, match="was changed after its step was finished"):
        run(recipe_for(folder), tmp_path / "copy")


def test_a_run_does_not_take_the_place_of_a_model_that_it_reads(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(recipe_for(folder), out)
    before = (out / "model" / "model.safetensors").read_bytes()
    again = recipe_for(folder) | {"model": str(out / "model")}
    with pytest.raises(
        RequestError, match=r"reads the model in .*out/model, and .*out is the folder of the run itself"
    ):
        run(again, out)
    (tmp_path / "link").symlink_to(out)
    with pytest.raises(RequestError, match="the folder of the run itself"):
        run(again, tmp_path / "link")
    assert (out / "model" / "model.safetensors").read_bytes() == before
    run(recipe_for(folder), folder.parent / "inside" / "out")  # below another folder of models it may lie


def test_what_the_user_put_beside_the_model_stays(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(recipe_for(folder), out)
    (out / "model" / "notes.txt").write_text("mine")
    (out / "model" / "gguf").mkdir()
    (out / "model" / "gguf" / "q4.bin").write_bytes(b"mine too")
    (out / "model" / "model.safetensors").unlink()
    run(recipe_for(folder), out)
    assert (out / "model" / "model.safetensors").exists(), "what is missing is put back"
    run(recipe_for(folder), out)
    assert (out / "model" / "notes.txt").read_text() == "mine"
    assert (out / "model" / "gguf" / "q4.bin").read_bytes() == b"mine too"
    published = json.loads((out / "published.json").read_text())
    assert "notes.txt" not in published and "model.safetensors" in published


def test_it_stays_where_the_list_of_what_was_published_is_lost(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(recipe_for(folder), out)
    (out / "model" / "notes.txt").write_text("mine")
    (out / "model" / "model-00002-of-00002.safetensors").write_bytes(b"an older model's")
    (out / "published.json").unlink()
    (out / "finished.json").unlink()
    run(recipe_for(folder), out)
    assert (out / "model" / "notes.txt").read_text() == "mine"
    assert [path.name for path in (out / "model").glob("*.safetensors")] == ["model.safetensors"]


@pytest.mark.parametrize("name", ["steps", "model", "judged", "timed", "report.html", "run.log", "run.json"])
def test_a_link_in_a_run_folder_is_not_followed(name: str, folder: Path, tmp_path: Path) -> None:
    out, theirs = tmp_path / "out", tmp_path / "theirs"
    out.mkdir()
    theirs.mkdir()
    (theirs / "kept.txt").write_text("kept")
    (out / "run.json").write_text('{"recipe": "recipe"}')
    (out / name).unlink(missing_ok=True)
    (out / name).symlink_to(theirs / "kept.txt" if "." in name else theirs)
    with pytest.raises(RequestError, match="link|another recipe|not empty"):
        run(recipe_for(folder), out)
    assert [path.name for path in theirs.iterdir()] == ["kept.txt"] and (theirs / "kept.txt").read_text() == "kept"


@pytest.mark.parametrize(
    "place", ["steps/01-x", "judged/x.json", "steps/.x.working", ".model.old", "run.log", "run.json"]
)
@pytest.mark.parametrize("make", [lambda path: path.symlink_to("/nowhere"), os.mkfifo], ids=["link", "pipe"])
def test_what_is_no_file_in_a_run_folder_is_named(
    place: str, make: Callable[[Path], None], folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    (out / place).parent.mkdir(parents=True, exist_ok=True)
    (out / "run.json").write_text('{"recipe": "recipe"}')
    (out / place).unlink(missing_ok=True)
    make(out / place)
    with pytest.raises(RequestError, match=f"{place} is a link or no file"):
        run(recipe_for(folder), out)


def test_a_name_that_is_too_long_is_said(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="its name is too long"):
        run(recipe_for(folder), tmp_path / ("x" * 300))


def test_a_limit_on_files_is_said_however_a_library_tells_it(tmp_path: Path) -> None:
    for error in (OSError(27, "File too large"), ValueError("I/O error: File too large (os error 27)")):
        with pytest.raises(RunError, match="larger than may be written"), writing(tmp_path):
            raise error
    with pytest.raises(ValueError, match="something else"), writing(tmp_path):
        raise ValueError("something else")


def test_a_link_where_a_file_is_written_first_is_replaced(folder: Path, tmp_path: Path) -> None:
    from overhaul.files import write_text

    (tmp_path / "theirs").write_text("kept")
    (tmp_path / ".report.json.partial").symlink_to(tmp_path / "theirs")
    write_text(tmp_path / "report.json", "new")
    assert (tmp_path / "theirs").read_text() == "kept" and (tmp_path / "report.json").read_text() == "new"


def test_what_a_killed_run_left_goes(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(recipe_for(folder), out)
    (out / "finished.json").unlink()
    for stale in (
        out / "steps" / ".01-shrink.prune-0123.partial",
        out / "steps" / ".0123.working",
        out / ".model.partial",
    ):
        stale.mkdir()
        (stale / "large.safetensors").write_bytes(b"0" * 100)
    run(recipe_for(folder), out)
    assert not list(out.rglob(".*"))


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    with using(scratch=tmp_path):
        checkpoint = TrainingCheckpoint("heal", {"steps": 3})
        for damage in (b"", b"\x10\x00\x00\x00\x00\x00\x00\x00{}", b"\xff" * 40):
            (tmp_path / "heal.checkpoint").write_bytes(damage)
            with pytest.raises(RequestError, match=r"heal\.checkpoint is damaged.*delete it"):
                checkpoint.check()


def test_a_batch_beyond_all_memory_is_estimated_at_once() -> None:
    assert largest_batch([3, 5], 10**18) > 10**18


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupt_at_any_time_ends_the_run_and_the_same_command_goes_on(
    number: signal.Signals, folder: Path, tmp_path: Path
) -> None:
    steps = [{"shrink.heal": {"target": "tokens", "text": "people", "steps": 400, "lr": 1e-3}}]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe_for(folder, steps)))
    command = [sys.executable, "-m", "overhaul", "run", "recipe.yaml", "-o"]
    assert subprocess.run([*command, "whole"], cwd=tmp_path, capture_output=True).returncode == 0
    whole = (tmp_path / "whole" / "model" / "model.safetensors").read_bytes()
    ended = 0
    for trial in range(20):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        process = subprocess.Popen([*command, "out"], cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
        time.sleep(1.0 + 0.4 * trial)
        process.send_signal(number)
        _, said = process.communicate(timeout=20)
        if process.returncode == 0:
            continue  # it had ended by then
        ended += 1
        assert b"the same command goes on" in said and b"Traceback" not in said, said.decode()
        # Python ends itself by SIGINT if it was interrupted in source that was being executed, of a dataclass for one
        assert process.returncode in (1, -signal.SIGINT)
        assert subprocess.run([*command, "out"], cwd=tmp_path, capture_output=True).returncode == 0
        assert (tmp_path / "out" / "model" / "model.safetensors").read_bytes() == whole
    assert ended >= 5
