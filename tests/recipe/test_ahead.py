"""What `plan` sees before a run: of large data a sample and every row's columns; a network without numbers; no weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from overhaul import models, session
from overhaul.data.examples import Examples
from overhaul.errors import RequestError
from overhaul.recipe import ahead, oddities, stand_ins
from overhaul.recipe import check as check_module
from overhaul.recipe.check import check
from overhaul.recipe.plan import plan
from overhaul.recipe.spec import read
from overhaul.session import WorkBegins


def recipe(folder: Path, base: Path, rows: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    (base / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = {"from": str(base / "rows.jsonl")}
    return {"model": str(folder), "materials": {"text": text}, "steps": [{"shrink.heal": {"steps": 1}}], **changes}


def questions(count: int) -> list[dict[str, Any]]:
    return [{"question": f"who is {n}?", "answer": "x" * (1 + n % 7)} for n in range(count)]


def test_of_a_large_source_a_sample_is_encoded_and_every_row_is_looked_at(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[int] = []

    def counted(rows: Any, spec: Any, processor: Any) -> Examples:
        encoded.append(len(rows))
        return plain(rows, spec, processor)

    plain = ahead.encode
    monkeypatch.setattr(ahead, "encode", counted)
    monkeypatch.setattr("overhaul.recipe.encoded.AFFORDED", 500)
    rows = questions(1000)
    rows[600] = {"question": "q" * 140, "answer": "y"}  # neither among the first nor among the last
    with pytest.raises(RequestError, match="has an example of 162 tokens"):
        plan(check(read(recipe(folder, tmp_path, rows))), 1e9)
    assert 2 * ahead.SHOWN < encoded[0] <= 3 * ahead.SHOWN
    rows[600] = {"question": "who?", "answer": None}
    with pytest.raises(RequestError, match=r"line 601: 'answer' is null"):
        plan(check(read(recipe(folder, tmp_path, rows))), 1e9)
    plan(check(read(recipe(folder, tmp_path, questions(1000)))), 1e9)


def test_no_weight_is_read_and_nothing_of_torch_is_moved(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise SystemExit("weights were read")

    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", never)
    before = torch.get_rng_state()
    plan(check(read(recipe(folder, tmp_path, questions(9), judge={"kept": {"accuracy": "text"}}))), 1e9)
    assert torch.equal(torch.get_rng_state(), before) and not session.current().planning


def test_work_does_not_begin_while_a_session_plans(folder: Path) -> None:
    with session.using(planning=True):
        for work in (lambda: models.open_model(folder), lambda: list(session.progress([1], "work", 1))):
            with pytest.raises(WorkBegins):
                work()
    assert list(session.progress([1], "work", 1)) == [1]


def test_what_a_method_refuses_for_want_of_numbers_is_no_refusal() -> None:
    with stand_ins.Networks().mode:
        fake = torch.zeros(2)

    def needs_numbers() -> None:
        try:
            float(fake.sum())
        except RuntimeError as error:
            raise RequestError("these blocks cannot be told apart") from error

    assert stand_ins.told(needs_numbers, "") is None
    with pytest.raises(RequestError, match="Step 1: wrong"):
        stand_ins.told(lambda: (_ for _ in ()).throw(RequestError("wrong")), "Step 1: ")


def test_materials_that_nothing_reads_are_said(folder: Path, tmp_path: Path) -> None:
    said = recipe(folder, tmp_path, questions(4))
    assert check(read(said)).warnings == []
    said["materials"] = {"base": dict(said["materials"]["text"]), "text": ["base"], "spare": {"model": str(folder)}}
    assert check(read(said)).warnings == ["The material 'spare' is read by no step and no metric."]


def test_a_source_is_encoded_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    plain = check_module.encode

    def counted(rows: Any, spec: Any, processor: Any) -> Examples:
        made.append(len(rows))
        return plain(rows, spec, processor)

    for module in (ahead, check_module, oddities):
        monkeypatch.setattr(module, "encode", counted)
    said = recipe(folder, tmp_path, questions(9), judge={"kept": {"accuracy": "text"}})
    checked = check(read(said))
    plan(checked, 1e9)
    checked.encode()
    assert made == [9]


def test_a_network_too_large_to_be_drawn_has_shapes_alone_and_is_asked_all_the_same(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stand_ins, "DRAWN", 0)
    said = recipe(folder, tmp_path, questions(4))
    plan(check(read(said)), 1e9)
    for steps, refused in (
        ([{"shrink.drop_layers": {"count": 2}}, {"shrink.drop_layers": {"count": 2}}], "Step 2.*count=2"),
        (
            [{"shrink.drop_layers": {"count": 0}}],
            "Step 1, shrink.drop_layers: with .*'count': 0.* would change nothing",
        ),
        ([{"shrink.prune": {"blocks": "9"}}], "there is no block 9"),
    ):
        with pytest.raises(RequestError, match=refused):
            plan(check(read({**said, "steps": steps})), 1e9)
    # which layers give gates shows only where there are numbers
    plan(check(read({**said, "steps": [{"shrink.prune": {"targets": "experts"}}]})), 1e9)


def test_what_is_not_made_yet_ends_the_planning_of_whoever_looks_at_it() -> None:
    unknown: Any = stand_ins.NotYet()
    for look in (len, bool, str, iter, lambda one: one.items, lambda one: one[0], lambda one: one(), Path):
        with pytest.raises(WorkBegins):
            look(unknown)
    assert not isinstance(unknown, Path) and unknown is not None
