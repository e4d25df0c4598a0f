"""What is said while a recipe runs: a line for each step and minute, kept in the folder; where models are worked on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import overhaul as oh
from conftest import tiny_llama
from overhaul import processes, session
from overhaul.data.examples import Examples
from overhaul.errors import RequestError, RunError
from overhaul.fit import fit
from overhaul.objectives import Term, answer_tokens, cross_entropy_sum
from overhaul.recipe.run import run

STEPS = [{"shrink.drop_layers": {"count": 1}}, {"shrink.prune": {"sparsity": 0.3}}]


def recipe(folder: Path, **changes: object) -> dict[str, object]:
    text = {"from": str(folder.parent / "text.jsonl")}
    (folder.parent / "text.jsonl").write_text('{"text": "a small text to read"}\n' * 3)
    return {"model": str(folder), "materials": {"text": text}, "steps": STEPS, **changes}


def test_a_run_says_what_begins_and_what_was_done_before_and_keeps_it(folder: Path, tmp_path: Path) -> None:
    said: list[str] = []
    with session.using(say=said.append):
        run(recipe(folder), tmp_path / "out")
        assert [line for line in said if line.startswith("step")] == [
            "step 1 of 2, shrink.drop_layers", "step 2 of 2, shrink.prune"
        ]  # fmt: skip
        assert [line for line in said if line.startswith("judging")] == [
            "judging the model as it came", "judging shrink.drop_layers", "judging shrink.prune"
        ]  # fmt: skip
        said.clear()
        run(recipe(folder, steps=[STEPS[0], {"shrink.prune": {"sparsity": 0.4}}]), tmp_path / "out")
    assert said[:2] == ["step 1 of 2, shrink.drop_layers, was done before", "step 2 of 2, shrink.prune"]
    kept = (tmp_path / "out" / "run.log").read_text().splitlines()
    assert [line for line in kept if "step 1 of 2" in line][1].endswith("was done before")
    assert all(line[:2] == "20" and line[10] == " " for line in kept), "each line has its time"


def test_progress_is_a_line_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    now, written = [0.0], list[str]()
    monkeypatch.setattr(session.time, "monotonic", lambda: now[0])
    lines = session.Lines(written.append)
    for second in range(150):
        now[0] = float(second)
        lines.report("heal", second, 150, "loss 0.1")
    assert written == ["  heal: 60 of 150, loss 0.1", "  heal: 120 of 150, loss 0.1"]
    lines.say("step 2")
    now[0] += 59
    lines.report("blocks", 1, 2, "")
    assert written[2:] == ["step 2"]


def test_a_log_does_not_follow_a_link(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("kept")
    (tmp_path / "run.log").symlink_to(tmp_path / "mine.txt")
    with pytest.raises(RunError, match=r"run\.log.*link"), session.logged(tmp_path / "run.log"):
        session.say("here")
    assert (tmp_path / "mine.txt").read_text() == "kept"


@pytest.mark.smoke
def test_the_command_says_it_where_there_is_no_terminal(folder: Path, tmp_path: Path) -> None:
    import yaml

    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe(folder)))
    given = [sys.executable, "-m", "overhaul", "run", "r.yaml", "-o", "out", "--device", "cpu"]
    done = subprocess.run(given, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (
        "step 2 of 2, shrink.prune" in done.stderr and "step 2" not in done.stdout and "weights on disk" in done.stdout
    )


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "a b", "meta"])
def test_a_device_that_is_not_there_is_refused_before_anything_is_written(
    name: str, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(RequestError, match="device: "):
        oh.plan(recipe(folder, device=name))
    with pytest.raises(RequestError, match="device: "):
        run(recipe(folder), tmp_path / "out", device=name)
    assert not (tmp_path / "out").exists()


def test_a_training_stays_on_the_device_that_is_named(some_text: Examples) -> None:
    model = tiny_llama()
    with session.using(device="cpu"):
        assert processes.device() == torch.device("cpu")
        fit(model, [Term("text", cross_entropy_sum, answer_tokens)], {"text": some_text}, steps=1)
    assert {p.device.type for p in model.parameters()} == {"cpu"}


@pytest.fixture
def some_text() -> Examples:
    ids = torch.arange(8) + 3
    return Examples([{"input_ids": ids, "labels": ids}] * 4, [{"text": ""}] * 4)


def test_what_there_is_is_listed_and_shown_in_a_few_lines(some_text: Examples) -> None:
    assert {"open", "plan", "run", "forget", "merge", "LayerStack"} <= set(dir(oh)) and "importlib" not in dir(oh)
    assert {"npo", "ssd"} <= set(dir(oh.forget)) and "shelve" not in dir(oh.forget)
    stack = repr(oh.LayerStack.of(tiny_llama()))
    assert "model.layers" in stack and "LlamaDecoderLayer" in stack and "\n" not in stack
    assert repr(some_text).splitlines() == [
        "Examples: 4, tokens", "  first: input_ids [8], labels [8]", "  rows: text"
    ]  # fmt: skip
    outcome = repr(oh.Outcome(tiny_llama(), {"share": 1 / 3}, curves={"loss": [1.0, 0.5]}))
    assert outcome.splitlines() == ["Outcome: LlamaForCausalLM", "  share: 0.3333", "  curves of loss"]
