"""Generated pages are current, and the README names every method and only files that exist."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from overhaul.method import methods

ROOT = Path(__file__).parents[1]
PAGES: dict[Path, str] = runpy.run_path(str(ROOT / "docs" / "generate.py"))["pages"]()


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_generated_pages_are_current(path: Path) -> None:
    assert path.read_text(encoding="utf-8") == PAGES[path], "run `make docs`"


def test_the_readme_names_every_method_and_links_to_what_exists() -> None:
    text = (ROOT / "README.md").read_text()
    assert all(f"`{name}`" in text for name in methods())
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\((?!http|#)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_no_file_is_large() -> None:
    tracked = [p for folder in ("src", "tests", "docs", "recipes", "benchmarks") for p in (ROOT / folder).rglob("*")]
    large = [p for p in tracked if p.is_file() and p.stat().st_size > 1e6 and "starters" not in p.parts]
    assert not large
