"""A recipe as two real processes: unchanged, with the numbers of a plain run, one voice, and no file written twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conftest import tiny_llama, tiny_tokenizer
from overhaul import models
from overhaul.recipe.run import run
from recipe.test_run import numbers, write_recipe

LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
BROKEN = """
import os
from overhaul.fit import Step
from overhaul.__main__ import main

backward = Step.backward

def sometimes(step, *arguments, **more):
    if os.environ["RANK"] == "1" and step.number == 2:
        raise MemoryError("no room for the third step")
    return backward(step, *arguments, **more)

Step.backward = sometimes
main()
"""


def launch(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*LAUNCH, *arguments], capture_output=True, text=True, timeout=240, env=environment)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe for a model in float32: rounding to bfloat16 would turn 1e-7 into 1e-3."""
    place = tmp_path_factory.mktemp("recipe")
    torch.manual_seed(0)
    return write_recipe(models.save(tiny_llama(), tiny_tokenizer(), place / "tiny"), place)


@pytest.mark.smoke
def test_two_processes_give_the_numbers_of_one(recipe: Path, tmp_path: Path) -> None:
    run(recipe, tmp_path / "one")
    done = launch("-m", "overhaul", "run", str(recipe), "-o", str(tmp_path / "two"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("report  ") == 1 and done.stdout.count("To be forgotten") == 2
    ours, theirs = numbers(tmp_path / "two"), numbers(tmp_path / "one")
    assert [measure[:2] for measure in ours] == [("answer_probability", "forget"), ("accuracy", "retain")]
    for (*name, values), (*same, expected) in zip(ours, theirs, strict=True):
        assert name == same and values == pytest.approx(expected, abs=1e-4), name
    curves = [
        [step["curves"] for step in json.loads((tmp_path / name / "report.json").read_text())["steps"]]
        for name in ("one", "two")
    ]
    assert curves[0][0]["loss"] and curves[0][2]["loss"], "both trainings are compared"
    for one, two in zip(*curves, strict=True):
        for name in one:
            assert two[name] == pytest.approx(one[name], abs=1e-4), name
    one, two = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys() and all(torch.allclose(one[name], two[name], atol=1e-4) for name in one)
    assert not list((tmp_path / "two").rglob(".*")), "nothing half-written is left"


@pytest.mark.slow
def test_what_stops_one_process_is_said_once_and_gone_on_from(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text(BROKEN)
    stopped = launch(str(tmp_path / "broken.py"), "run", str(recipe), "-o", str(tmp_path / "out"))
    assert stopped.returncode != 0
    assert (stopped.stdout + stopped.stderr).count("no room for the third step") == 1
    assert not list((tmp_path / "out" / "steps").glob("01*"))
    assert run(recipe, tmp_path / "out").report["stages"][-1] == "shrink.heal", "one process takes over from two"


@pytest.mark.slow
def test_a_process_that_is_killed_is_said_and_gone_on_from(recipe: Path, tmp_path: Path) -> None:
    killed = BROKEN.replace('raise MemoryError("no room for the third step")', "os.kill(os.getpid(), 9)")
    (tmp_path / "broken.py").write_text(killed)
    stopped = launch(str(tmp_path / "broken.py"), "run", str(recipe), "-o", str(tmp_path / "out"))
    assert stopped.returncode != 0 and "Another process of this run has ended" in stopped.stderr
    for name in ("out", "whole"):
        assert launch("-m", "overhaul", "run", str(recipe), "-o", str(tmp_path / name)).returncode == 0
    one, two = (tmp_path / name / "model" / "model.safetensors" for name in ("out", "whole"))
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.slow
def test_a_wrong_request_is_said_once(tmp_path: Path) -> None:
    refused = launch("-m", "overhaul", "run", str(tmp_path / "none.yaml"), "-o", str(tmp_path / "out"))
    assert refused.returncode != 0
    assert refused.stderr.count("There is no recipe at") == 1
    assert not (tmp_path / "out").exists()


def test_alone_it_is_the_command() -> None:
    plain = subprocess.run([sys.executable, "-m", "overhaul", "--version"], capture_output=True, text=True, timeout=60)
    assert (plain.returncode, plain.stderr) == (0, "") and plain.stdout.strip()
