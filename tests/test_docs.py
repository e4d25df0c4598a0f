"""Generated pages are current, and the README names every method and only files that exist."""

from __future__ import annotations

import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from overhaul.method import methods

ROOT = Path(__file__).parents[1]
DRAWN = runpy.run_path(str(ROOT / "docs" / "draw.py"))
PAGES: dict[Path, str] = runpy.run_path(str(ROOT / "docs" / "generate.py"))["pages"]() | DRAWN["pages"]()


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_generated_pages_are_current(path: Path) -> None:
    assert path.read_text(encoding="utf-8") == PAGES[path], "run `make docs`"


def test_the_readme_names_every_method_and_links_to_what_exists() -> None:
    text = (ROOT / "README.md").read_text()
    assert all(f"`{name}`" in text for name in methods())
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\((?!http|#)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("name", methods())
def test_the_recipe_on_a_methods_page_is_one(name: str) -> None:
    (shown,) = re.findall(r"^```yaml\n(.*?)^```", (ROOT / "docs" / "methods" / f"{name}.md").read_text(), re.M | re.S)
    ((method, knobs),) = yaml.safe_load(shown)["steps"][0].items()
    assert method == name and methods()[name].check(knobs).items() >= knobs.items()


@pytest.fixture
def house(tmp_path: Path) -> Callable[..., Any]:
    """What is drawn of files that are written for it."""

    def built(**files: str) -> Any:
        for name, text in files.items():
            path = tmp_path.joinpath(*name.split("__")).with_suffix(".py")
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        return DRAWN["House"].of(tmp_path)

    return built


def test_arrows_are_imports_between_rooms_and_those_against_the_layers_are_said(house: Callable[..., Any]) -> None:
    found = house(
        errors='"""Errors: what stops."""\n' + "X = 1\n" * 211,
        data__forms="from overhaul.errors import X\n",
        fit__loop="def f():\n    from overhaul.data import (\n        forms,\n    )\n    import overhaul.errors\n",
        fit__step="from overhaul.data.forms import a, b\nfrom overhaul.fit import loop\n",
        data__late="if 1:\n    from overhaul.fit.loop import f\nfrom overhaul import __version__\n",
        judge="import overhaul.fit, json\nfrom overhaul.data import forms\n",
    )
    arrows = {pair: len(places) for pair, places in found.imports.items()}
    assert arrows == {
        ("data", "errors"): 1, ("fit", "data"): 2, ("fit", "errors"): 1,
        ("data", "fit"): 1, ("judge", "fit"): 1, ("judge", "data"): 1,
    }  # fmt: skip
    assert found.upward() == {("data", "fit"): ["data/late.py"]}
    assert found.lines["errors"] == 200 and found.docs["errors"] == "Errors: what stops."
    rows = {"judge": 0, "fit": 1, "data": 2, "errors": 3}
    assert found.plain(rows) == {("judge", "fit"), ("fit", "data"), ("data", "errors"), ("data", "fit")}
    drawn = DRAWN["svg"](found)
    assert "data imports fit (data/late.py)" in drawn and "<title>fit imports data: 2</title>" in drawn


def test_a_room_must_have_a_layer(house: Callable[..., Any]) -> None:
    with pytest.raises(SystemExit, match="attic has no layer"):
        DRAWN["svg"](house(attic="", errors=""))


def test_no_file_is_large() -> None:
    tracked = [p for folder in ("src", "tests", "docs", "recipes", "benchmarks") for p in (ROOT / folder).rglob("*")]
    large = [p for p in tracked if p.is_file() and p.stat().st_size > 1e6 and "starters" not in p.parts]
    assert not large
