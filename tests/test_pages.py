"""What README and docs show is done as it is printed: recipes are run, commands given, Python executed."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import overhaul as oh
from overhaul.errors import RequestError
from overhaul.mergekit.document import read as read_for_mergekit
from overhaul.mergekit.methods import METHODS
from overhaul.recipe.begin import begin, packaged
from overhaul.recipe.check import check
from overhaul.recipe.spec import read

ROOT = Path(__file__).parents[1]
ELSEWHERE = ("make", "pip", "git", "pre-commit", "torchrun", "flower", "flwr")
"""Commands that are no part of the package, or that start machines of their own; they have tests of their own."""


def blocks(page: Path) -> Iterator[tuple[str, str]]:
    """Each fenced block: what is said after its fence, and its text."""
    yield from re.findall(r"^```(\w[^\n]*)\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)


def play(page: Path, folder: Path) -> list[str]:
    """Do all that a page shows, from its top to its end, in a folder; what was done."""
    here, done, names = folder, list[str](), dict[str, Any]()
    for said, text in blocks(page):
        language, _, file = said.partition(" ")
        written = here / (file or "recipe.yaml")
        if file or language == "yaml":
            written.parent.mkdir(parents=True, exist_ok=True)
            written.write_text(text, encoding="utf-8")
        if language == "yaml":
            oh.plan(written)
            command(f"overhaul run {written.name} -o shown-{len(done)}", here)
        elif language == "console":
            for line in re.findall(r"^\$ (.*?)(?:  +#.*)?$", text, re.M):
                if line.startswith("cd "):
                    here = here / line[3:].strip()
                elif not line.startswith(ELSEWHERE):
                    command(line, here)
        elif language == "python":
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(here)
                exec(compile(text, page.name, "exec"), names)
        else:
            continue
        done.append(said)
    return done


def command(line: str, here: Path) -> None:
    """Give a command as a shell would; it must end well."""
    program, *arguments = shlex.split(line)
    assert program == "overhaul", line
    given = [sys.executable, "-m", "overhaul", *arguments]
    done = subprocess.run(given, cwd=here, capture_output=True, text=True, timeout=1500, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_the_readme_does_what_it_says(tmp_path: Path) -> None:
    done = play(ROOT / "README.md", tmp_path)
    assert {"yaml", "yaml merge.yaml"} <= set(done) and done.count("python") >= 3
    assert play(ROOT / "docs" / "evaluating.md", tmp_path / "ada")
    assert {path.name for path in (tmp_path / "ada").iterdir()} >= {
        "evaluation",
        "forgot-ada",
        "forgot-late",
        "soup",
        "scaled",
        "out",
    }


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_page_on_merging_does_what_it_says(tmp_path: Path) -> None:
    assert play(ROOT / "docs" / "merging.md", tmp_path) == ["python", "console", "python", "yaml merge.yaml"]
    assert {path.name for path in tmp_path.iterdir()} >= {"ties.yml", "merged", "stacked", "more-docs", "more-code"}


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_page_on_inspecting_does_what_it_says(tmp_path: Path) -> None:
    assert len(play(ROOT / "docs" / "inspecting.md", tmp_path)) == 5


def test_the_files_for_mergekit_that_are_shown_are_read() -> None:
    texts = [text for said, text in blocks(ROOT / "docs" / "merging.md") if said.startswith("yml ")]
    assert [read_for_mergekit(yaml.safe_load(text)).file.merge_method for text in texts] == ["ties"]
    known = yaml.safe_load((ROOT / "benchmarks" / "against_mergekit.yml").read_text(encoding="utf-8"))
    assert {read_for_mergekit(one).file.merge_method for one in known.values()} == set(METHODS)


def test_init_writes_the_recipe_of_the_readme_with_what_it_reads(tmp_path: Path) -> None:
    recipe, facts = begin(tmp_path / "new")
    shown = next(text for said, text in blocks(ROOT / "README.md") if said == "yaml")
    assert yaml.safe_load(recipe.read_text()) == yaml.safe_load(shown) == yaml.safe_load(packaged("start").read_text())
    assert "#" in recipe.read_text().splitlines()[0] and facts.stat().st_size < 20_000
    planned = oh.plan(recipe)
    assert [step.name for step in planned.steps] == ["forget.npo", "shrink.drop_layers", "shrink.heal"]
    assert planned.steps[0].reads == {"forget": 10, "retain": 70} and not planned.warnings
    assert "forget (10), retain (70)" in repr(planned)
    with pytest.raises(RequestError, match="there already"):
        begin(tmp_path / "new")
    assert len(check(read(recipe)).requests) == 4
