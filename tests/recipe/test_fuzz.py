"""Whatever a field of a recipe is: `check` and `plan` answer, or say in one sentence what is wrong."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from overhaul.errors import RequestError
from overhaul.recipe.check import check
from overhaul.recipe.plan import plan
from overhaul.recipe.spec import read

ROWS = [{"person": p, "question": f"who is {p}?", "answer": p * 3} for p in "abcdefgh"]


def deep(levels: int) -> Any:
    value: Any = 1
    for n in range(levels):
        value = [value] if n % 2 else {"a": value}
    return value


VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 3.5, 1e400, -1e400, float("nan"), 2**63, 2**64 + 1, 10**30, "", " ", "x", "x" * 300,
    "~nobody", "~", "..", "../x", "/", "/dev/null", "/etc/shadow", "a/b", "a/b/c", "starter:", "starter:none", "new:",
    "new:/", "hub/none", "\0", "\n", "é\u2028", "1e-5", "nan", ".inf", "no", "0x1f", "2024-01-01", "forget", "retain",
    "npo", "forget.npo", "forget.", ".npo", [], {}, [[]], [{}], {"": {}}, [None], {"a": None}, {"from": None},
    {"from": "x" * 5000}, {"from": ["people.jsonl"]}, {"model": 3}, {"model": None}, {"after": []}, {"made": "a"},
    {"made": "forget.npo", "name": None}, ["forget", "retain"], [["forget"]], {"on": "retain"}, {"on": None},
    {"on": "retain", "at_least": "much"}, {"on": "retain", "by": 3}, {"on": "retain", "anchor": []}, deep(30), deep(1000),
    b"bytes", object, {1: 2}, {None: 1}, {True: {}}, {"from": "people.jsonl", "where": []},
    {"from": "people.jsonl", "limit": 0}, {"from": "people.jsonl", "columns": {"question": 3}},
]  # fmt: skip


def recipe(folder: Path, base: Path) -> dict[str, Any]:
    path = base / "people.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)))
    return {
        "model": str(folder),
        "title": "people",
        "seed": 3,
        "dtype": "float32",
        "trust_remote_code": False,
        "materials": {
            "forget": {"from": str(path), "where": {"person": ["a"]}, "as": "qa", "prompt": "{question}"},
            "retain": {"from": str(path), "unless": {"person": ["a"]}, "limit": 5, "length": 64},
            "text": ["retain", {"from": str(path), "columns": {"answer": "person"}}],
            "twin": {"model": str(folder)},
            "uncut": {"after": "forget.npo"},
            "tuned": ["twin", {"model": str(folder)}],
        },
        "steps": [
            {"forget.npo": {"steps": 2, "beta": 0.1, "retain_term": "klr", "forget": "forget"}},
            {"shrink.heal": {"teacher": "uncut", "steps": 2}},
        ],
        "compare": [{"forget.npo": {"lr": 1e-4}}, "forget.simnpo"],
        "judge": {"kept": {"accuracy": {"on": "retain", "at_least": 0.1}, "perplexity": ["retain", "text"]}},
    }


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    nested = len(path) < 40  # what was put there may be nested without end
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in items if nested else ():
        yield from places(one, (*path, key))


def mutated(whole: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    """The recipe with one to three places replaced, removed, renamed or added to."""
    changed = copy.deepcopy(whole)
    for _ in range(draw.choice((1, 1, 2, 3))):
        *way, last = draw.choice(list(places(changed)))
        inside = changed
        for key in way:
            inside = inside[key]
        kind = draw.randrange(6)
        if kind == 0:
            del inside[last]
        elif kind == 1 and isinstance(inside, dict):
            name: Any = draw.choice([str(last)[:-1] or "q", "x", 3, None, f"{last} "])
            inside[name] = inside.pop(last)
        elif kind == 2 and isinstance(inside, dict):
            inside[draw.choice(["lr", "steps", "from", "by", "extra", "model"])] = draw.choice(VALUES)
        else:
            inside[last] = draw.choice(VALUES)
        if not changed:
            break
    return changed


def fuzz(count: int, seed: int, folder: Path, base: Path) -> dict[str, int]:
    draw, whole = random.Random(seed), recipe(folder, base)
    plan(check(read(whole)), 1e9)
    ends = {"right": 0, "refused": 0}
    for n in range(count):
        wrong = mutated(whole, draw)
        try:
            plan(check(read(wrong)), 1e9)
            ends["right"] += 1
        except RequestError as error:
            ends["refused"] += 1
            assert str(error).strip() and len(str(error)) < 3000, (n, wrong)
        except Exception as error:
            raise AssertionError(f"number {n}: {type(error).__name__}: {error}\n{wrong}") from error
    return ends


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_broken_recipes_are_right_or_refused_in_words(folder: Path, tmp_path: Path) -> None:
    ends = fuzz(70, 0, folder, tmp_path)
    assert ends["refused"] > 35 and ends["right"] > 0


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_five_thousand_broken_recipes_are_right_or_refused_in_words(folder: Path, tmp_path: Path) -> None:
    ends = fuzz(5000, 1, folder, tmp_path)
    assert ends["refused"] > 2500
