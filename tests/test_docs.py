"""Generated pages are current, the README names every method and only files that exist, and what pages show can be done."""

from __future__ import annotations

import ast
import importlib
import json
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml

import overhaul as oh
from conftest import tiny_llama, tiny_tokenizer
from contract import some_facts
from overhaul import models
from overhaul.conversions import convert
from overhaul.data import forms, verifiers
from overhaul.data.examples import IGNORED
from overhaul.data.materials import Source
from overhaul.data.tasks import people
from overhaul.errors import RequestError
from overhaul.judge import metrics
from overhaul.judge.evidence import Evidence
from overhaul.method import methods
from overhaul.recipe.check import check
from overhaul.recipe.spec import read

ROOT = Path(__file__).parents[1]
DRAWN = runpy.run_path(str(ROOT / "docs" / "draw.py"))
PAGES: dict[Path, str] = runpy.run_path(str(ROOT / "docs" / "generate.py"))["pages"]() | DRAWN["pages"]()


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_generated_pages_are_current(path: Path) -> None:
    assert path.read_text(encoding="utf-8") == PAGES[path], "run `make docs`"


def test_the_readme_names_every_method_and_links_to_what_exists() -> None:
    text = (ROOT / "README.md").read_text()
    assert all(f"`{name}`" in text for name in methods())
    stacks = len(re.findall(r"^\| (?!family|---)", (ROOT / "docs" / "families.md").read_text(), re.M))
    assert f"on {stacks} stacks of" in text
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\((?!http|#)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("name", methods())
def test_the_recipe_on_a_methods_page_is_one(name: str) -> None:
    (shown,) = re.findall(r"^```yaml\n(.*?)^```", (ROOT / "docs" / "methods" / f"{name}.md").read_text(), re.M | re.S)
    ((method, knobs),) = yaml.safe_load(shown)["steps"][0].items()
    assert method == name and methods()[name].check(knobs).items() >= knobs.items()


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}(?: [^\n]*)?\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of somebody who has what the README's recipes read."""
    rows = [json.dumps({key: row[key] for key in ("person", "question", "answer")}) for row in people()]
    (tmp_path / "facts.jsonl").write_text("\n".join(rows))
    for name in ("forgot-ada", "forgot-late"):
        (tmp_path / name).symlink_to(models.facts("starter:docs-llama").folder)
    monkeypatch.chdir(tmp_path)
    return tmp_path


PAGES_OF_RECIPES = (ROOT / "README.md", ROOT / "docs" / "recipes.md")
RECIPES = [
    *(text for page in PAGES_OF_RECIPES for text in blocks(page, "yaml")),
    *(path.read_text() for path in (ROOT / "recipes").glob("*.yaml")),
]


@pytest.mark.parametrize("text", RECIPES, ids=lambda text: text.partition("\n")[0])
def test_every_recipe_that_is_shown_is_right(text: str, user: Path) -> None:
    (user / "recipe.yaml").write_text(text)
    checked = check(read(user / "recipe.yaml"))
    assert len(checked.steps) == len(yaml.safe_load(text)["steps"]) and checked.requests
    with pytest.raises(RequestError, match="has no field 'step'"):
        check(read({**yaml.safe_load(text), "step": []}))


@pytest.mark.parametrize("page", [ROOT / "README.md", *(ROOT / "docs").glob("*.md")], ids=lambda page: page.name)
def test_names_in_the_python_of_a_page_are_there(page: Path) -> None:
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if not isinstance(node, ast.ImportFrom):
                continue
            source = node.module or ""
            if source.startswith("overhaul.") and source != "overhaul.shrink.magnitude":  # that is the example itself
                module = importlib.import_module(source)
                assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)
        for dotted in re.findall(r"\boh((?:\.\w+)+)\(", block):
            found: Any = oh
            for name in dotted[1:].split("."):
                found = getattr(found, name)
            assert callable(found)


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the entries shown on the page of the house define, registered for one test."""
    monkeypatch.setattr(verifiers, "VERIFIERS", dict(verifiers.VERIFIERS))
    monkeypatch.setattr(forms, "FORMS", dict(forms.FORMS))
    monkeypatch.setattr(metrics, "METRICS", dict(metrics.METRICS))
    monkeypatch.setattr(
        sys.modules["overhaul.conversions.records"], "_KNOWN", {}
    )  # the package's `records` is a function
    names: dict[str, Any] = {"__name__": "shown"}
    monkeypatch.setitem(sys.modules, "shown", ModuleType("shown"))
    for block in blocks(ROOT / "docs" / "architecture.md", "python"):
        exec(compile(block, "architecture.md", "exec"), names)
        vars(sys.modules["shown"]).update(names)
    return names


@pytest.mark.usefixtures("added")
def test_the_verifier_and_the_form_of_the_page_are_ones() -> None:
    row = {"verify": "last_word", "answer": 7}
    assert verifiers.score(row, "so it is 7") == 1 and verifiers.score(row, "7 it is") == 0
    rows = [{"term": "hand", "meaning": "glove"}, {"term": "foot", "meaning": "a shoe"}]
    found = oh.examples(rows, tiny_tokenizer(), prompt="{question}")
    told = tiny_tokenizer().decode(found[1]["labels"][found[1]["labels"] != IGNORED], skip_special_tokens=True)
    assert found.kind == "tokens" and "a shoe" in told and "foot" not in told
    assert [forms.find_form("glossary").positions(Source.model_validate({"from": "x"}), row)[0] > 1 for row in rows]


def test_the_metric_of_the_page_is_one(added: dict[str, Any]) -> None:
    evidence = Evidence(tiny_llama(), some_facts(0, 6), 6)
    probabilities = [one.probability for one in evidence.scored]
    assert added["least_probable"](evidence) == (min(probabilities), 6)
    assert metrics.METRICS["least_probable"].roles == ("role",)


@pytest.mark.usefixtures("added")
def test_the_conversion_of_the_page_is_one(tmp_path: Path) -> None:
    model: Any = tiny_llama()
    assert convert(model, "gated", starts_as_identity=True) == 0
    with torch.no_grad():
        model.get_parameter("model.layers.1.gate").fill_(0.5)
    again, _ = oh.open(oh.save(model, None, tmp_path / "model"))
    assert again.get_parameter("model.layers.1.gate").item() == 0.5


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


def test_no_room_imports_from_a_layer_above_it() -> None:
    assert DRAWN["House"].of(ROOT / "src" / "overhaul").upward() == {}


def test_a_room_must_have_a_layer(house: Callable[..., Any]) -> None:
    with pytest.raises(SystemExit, match="attic has no layer"):
        DRAWN["svg"](house(attic="", errors=""))


def test_no_file_is_large() -> None:
    tracked = [p for folder in ("src", "tests", "docs", "recipes", "benchmarks") for p in (ROOT / folder).rglob("*")]
    large = [p for p in tracked if p.is_file() and p.stat().st_size > 1e6 and "starters" not in p.parts]
    assert not large
