"""The worked example of docs/adding-a-method.md is true: its method, its tests and its claim are run as they stand."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from conftest import FAMILIES
from contract import as_recipe, marks
from overhaul import method as methods
from overhaul.recipe.run import run

PAGE = Path(__file__).parents[1] / "docs" / "adding-a-method.md"


NAMES = ["overhaul.shrink.magnitude", "test_magnitude", "overhaul.claims.magnitude"]
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Import one of the page's three files under the name it would have."""

    def load_one(name: str) -> ModuleType:
        path = tmp_path / f"{name}.py"
        path.write_text(dict(zip(NAMES, BLOCKS, strict=True))[name], encoding="utf-8")
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    return load_one


def test_the_example_is_a_method_and_passes_its_own_tests(load: Callable[[str], Any]) -> None:
    described = load("overhaul.shrink.magnitude").magnitude.method
    assert (described.name, described.paper, described.changes) == ("shrink.magnitude", "1506.02626", "weights")
    assert [knob.name for knob in described.knobs] == ["share"] and described.makes == {"masks": "tensors"}
    tests = [one for name, one in vars(load("test_magnitude")).items() if name.startswith("test_")]
    assert len(tests) == 5
    for one in tests:
        for arguments in [(family,) for family in FAMILIES] if one.__code__.co_argcount else [()]:
            one(*arguments)


def test_the_case_of_the_example_varies_every_knob(load: Callable[[str], Any], tmp_path: Path) -> None:
    described = load("overhaul.shrink.magnitude").magnitude.method
    case = load("test_magnitude").CASE
    assert {*case.varied, *case.idle} == {knob.name for knob in described.knobs}
    for knob, (one, other) in case.varied.items():
        assert marks(case.run(tmp_path, **{knob: one})) != marks(case.run(tmp_path, **{knob: other}))


def test_a_recipe_runs_the_example_and_keeps_what_it_made(
    load: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    described = load("overhaul.shrink.magnitude").magnitude.method
    find: Callable[[str], methods.Method] = methods.find
    monkeypatch.setattr(methods, "find", lambda name: described if name == described.name else find(name))
    done = run(as_recipe(load("test_magnitude").CASE, tmp_path), tmp_path / "out")
    (step,) = done.report["steps"]
    assert step["made"]["masks"]["kind"] == "tensors" and step["tables"]["matrices"]["rows"]


def test_the_claim_of_the_example_can_pass_and_fail(load: Callable[[str], Any]) -> None:
    load("overhaul.shrink.magnitude")
    (check,) = load("overhaul.claims.magnitude").CLAIM.checks
    assert check.passes({"whole": 1.8, "magnitude": 1.81, "random": 3.0})
    assert not check.passes({"whole": 1.8, "magnitude": 2.5, "random": 3.0})
