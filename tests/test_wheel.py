"""The package as it is installed: from a wheel, in an empty folder, with its recipes and starters."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.smoke
def test_the_wheel_has_recipes_and_starters(tmp_path: Path) -> None:
    wheels, installed, here = tmp_path / "wheels", tmp_path / "installed", tmp_path / "here"
    here.mkdir()
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]
    build = [*pip, "wheel", str(ROOT), "--no-deps", "--no-build-isolation", "--wheel-dir", str(wheels)]
    subprocess.run(build, cwd=here, check=True, capture_output=True)
    (wheel,) = wheels.iterdir()
    subprocess.run(
        [*pip, "install", "--no-deps", "--target", str(installed), str(wheel)], check=True, capture_output=True
    )

    def overhaul(*arguments: str, at: Path = here) -> str:
        command = [sys.executable, "-m", "overhaul", *arguments]
        environment = {**os.environ, "PYTHONPATH": str(installed)}
        return subprocess.run(command, cwd=at, env=environment, check=True, capture_output=True, text=True).stdout

    overhaul("init", "new")
    where = "import overhaul; print(overhaul.__file__)"
    found = subprocess.run(
        [sys.executable, "-c", where], cwd=here, env={**os.environ, "PYTHONPATH": str(installed)}, capture_output=True
    )
    assert str(installed) in found.stdout.decode()
    planned = overhaul("plan", "recipe.yaml", at=here / "new")
    assert "starter:docs-llama" in planned and "in order" in planned
    assert overhaul("starters").count("starter:") >= 3
    assert (installed / "overhaul" / "recipes" / "forget-and-shrink.yaml").exists()
