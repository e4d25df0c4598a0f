"""Comparisons: methods from the same start, shared work done once, anchors and the null control beside them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import tiny_llama, tiny_tokenizer
from overhaul import models
from overhaul.errors import RequestError, RunError
from overhaul.judge import judge as judging
from overhaul.recipe import runner as running
from overhaul.recipe.compare import _folders, compare
from overhaul.recipe.run import run
from overhaul.weights import delta_norms

LETTERS = "abcdefghijklmnop"
QUICK: dict[str, Any] = {"steps": 3, "lr": 1e-2, "batch_size": 4, "stop_at": None}


def recipe(folder: Path, base: Path, **changes: Any) -> dict[str, Any]:
    rows = [{"person": p, "question": f"who is {p}?", "answer": p * 3} for p in LETTERS]
    (base / "people.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = str(base / "people.jsonl")
    return {
        "model": str(folder),
        "materials": {
            "forget": {"from": source, "where": {"person": ["a", "b"]}},
            "retain": {"from": source, "unless": {"person": ["a", "b"]}},
            "full": {"from": source},
        },
        "steps": [{"forget.npo": QUICK}, {"shrink.drop_layers": {"count": 1, "text": "retain"}}],
        "compare": [{"forget.npo": QUICK}, {"forget.ssd": {"alpha": 1.5}}],
        "judge": {"forgotten": {"answer_probability": "forget"}, "kept": {"answer_probability": "retain"}},
        **changes,
    }


def values(report: dict[str, Any], label: str) -> list[list[float]]:
    (row,) = [row for row in report["rows"] if row["label"] == label]
    return row["values"]


@pytest.mark.smoke
def test_every_method_gives_what_a_run_of_its_own_gives(folder: Path, tmp_path: Path) -> None:
    request = recipe(folder, tmp_path)
    done = compare(request, out=tmp_path / "out")
    assert [row["label"] for row in done.report["rows"]] == ["before", "null control", "forget.npo", "forget.ssd"]
    judged = sum(measure["group"] != "cost" for measure in done.report["measures"])
    for entry in request["compare"]:
        (name,) = entry
        alone = run({**request, "steps": [entry, request["steps"][1]]}, tmp_path / f"alone-{name}").report
        expected = [[measure["values"][-1]] for measure in alone["measures"]][:judged]
        assert values(done.report, name)[:judged] == expected
        saved = tmp_path / "out" / name
        assert models.facts(saved / "model").config["num_hidden_layers"] == 3
        assert {path.name for path in saved.iterdir()} >= {"report.html", "report.json", "lineage.json", "recipe.yaml"}
        assert [*json.loads((saved / "report.json").read_text())["stages"]] == ["before", name, "shrink.drop_layers"]


@pytest.mark.smoke
def test_what_variants_share_is_judged_once_and_a_second_call_repeats_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judgements: list[int] = []
    plain = judging.judge

    def counted(*args: Any, **kwargs: Any) -> Any:
        judgements.append(1)
        return plain(*args, **kwargs)

    monkeypatch.setattr(running.judging, "judge", counted)
    request = recipe(folder, tmp_path)
    first = compare(request, out=tmp_path / "out")
    assert len(judgements) == 6, "the model before once, two stages of each method, the null control"
    again = compare(request, out=tmp_path / "out")
    assert len(judgements) == 6
    assert [row["values"] for row in again.report["rows"]] == [row["values"] for row in first.report["rows"]]


def test_the_null_control_is_noise_as_large_as_the_change_of_each_tensor(folder: Path, tmp_path: Path) -> None:
    request = recipe(folder, tmp_path, steps=[])
    compare(request, out=tmp_path / "out")
    (noisy,) = (tmp_path / "out/steps").glob("00-null-control-*")
    method = delta_norms(folder, tmp_path / "out/forget.npo/model")
    control = delta_norms(folder, noisy)
    large = [name for name, size in method.by_tensor.items() if size and "norm" not in name]
    assert large
    for name in large:
        # both were rounded to bfloat16, and the length of a random vector of some hundred numbers varies
        assert control.by_tensor[name] == pytest.approx(method.by_tensor[name], rel=0.2)


@pytest.mark.slow
def test_seeds_run_the_methods_again_and_the_anchor_is_a_row(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(5)
    anchor = models.save(tiny_llama(), tiny_tokenizer(), tmp_path / "anchor", dtype="bfloat16")
    request = recipe(folder, tmp_path)
    request["materials"]["retrained"] = {"model": str(anchor)}
    done = compare(request, ["npo", "ssd"], tmp_path / "out", seeds=2)
    assert done.report["seeds"] == [0, 1]
    assert [row["label"] for row in done.report["rows"]][:2] == ["before", "retrained"]
    npo, ssd = values(done.report, "forget.npo")[0], values(done.report, "forget.ssd")[0]
    assert len(npo) == 2 and npo[0] != npo[1], "another seed draws other batches"
    assert ssd[0] == ssd[1], "dampening draws nothing"
    expected = run({**request, "model": str(anchor), "steps": request["compare"][:1]}, tmp_path / "alone").report
    assert values(done.report, "retrained")[0] == [expected["measures"][0]["values"][0]]


@pytest.mark.smoke
def test_the_page_and_the_tables_name_every_model(folder: Path, tmp_path: Path) -> None:
    from rich.console import Console

    from overhaul.report.comparison import Comparison

    done = compare(recipe(folder, tmp_path, title="<b>side by side</b>"), out=tmp_path / "out")
    page = (tmp_path / "out/comparison.html").read_text()
    assert "<b>side by side</b>" not in page and "&lt;b&gt;side by side" in page
    assert page.count("<circle") == 4, "one point for each model"
    console = Console(width=110, record=True)
    found = Comparison.from_json(done.report)
    found.print(console)
    for text in (page, console.export_text(), found.to_markdown()):
        for label in ("before", "forget.npo", "forget.ssd", "null control"):
            assert label in text
    assert (tmp_path / "out/comparison.md").read_text() == found.to_markdown()
    assert Comparison.from_json(json.loads((tmp_path / "out/comparison.json").read_text())) == found
    header, _, *lines = found.to_markdown().splitlines()
    assert all(line.count("|") == header.count("|") for line in lines)
    assert re.search(r"answer probability on forget ↓", header)


@pytest.mark.parametrize(
    ("changes", "names", "said"),
    [
        ({}, ["forget.npo", "forget.npoo"], "no method 'forget.npoo'"),
        ({}, ["forget.npo", "shrink.drop_layers"], "within one verb"),
        ({}, ["forget.npo"], "at least two"),
        ({"retrained": {"after": "start"}}, [], "must come from a folder"),
        ({"compare": []}, [], "at least two"),
        ({"compare": [{"forget.npo": {}}, {"forget.npo": {}}]}, [], "twice with the same knobs"),
        ({"compare": [{"forget.npo": {}}, {"forget.ssd": {"alfa": 1}}]}, [], "no knob 'alfa'"),
    ],
)
def test_a_wrong_comparison_is_refused_before_anything_is_written(
    folder: Path, tmp_path: Path, changes: dict[str, Any], names: list[str], said: str
) -> None:
    changes = dict(changes)
    anchor = {"retrained": changes.pop("retrained")} if "retrained" in changes else {}
    request = recipe(folder, tmp_path, **changes)
    request["materials"] |= anchor
    with pytest.raises(RequestError, match=said):
        compare(request, names, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.smoke
def test_a_method_that_fails_is_named_and_the_others_are_compared(folder: Path, tmp_path: Path) -> None:
    never = {"forget.npo": {**QUICK, "stop_at": 0.001}}
    done = compare(recipe(folder, tmp_path, compare=[never, {"forget.ssd": {"alpha": 1.5}}]), out=tmp_path / "out")
    assert [row["label"] for row in done.report["rows"]] == ["before", "null control", "forget.ssd"]
    (warning,) = done.report["warnings"]
    assert warning.startswith("forget.npo is missing: Step 1, forget.npo") and "above stop_at = 0.00" in warning
    assert "forget.npo is missing" in (tmp_path / "out/comparison.html").read_text()
    worse = [never, {"forget.npo": {**QUICK, "stop_at": 0.002}}]
    with pytest.raises(RunError, match="above stop_at"):
        compare(recipe(folder, tmp_path, compare=worse), out=tmp_path / "worse")


def test_a_method_named_with_other_knobs_is_a_row_of_its_own(folder: Path, tmp_path: Path) -> None:
    request = recipe(folder, tmp_path, steps=[], compare=[{"forget.ssd": {"alpha": a}} for a in (1.2, 2.0)])
    done = compare(request, out=tmp_path / "out")
    assert [row["label"] for row in done.report["rows"]][2:] == ["forget.ssd alpha=1.2", "forget.ssd alpha=2.0"]


@pytest.mark.smoke
def test_folders_of_methods_lead_nowhere_else_and_are_told_apart() -> None:
    names = _folders(
        ["forget.npo beta=0.1", "forget.npo x=../../a/b", "shrink.prune k=A", "shrink.prune k=a", "x" * 999]
    )
    assert names == [
        "forget.npo-beta=0.1",
        "forget.npo-x=..-..-a-b",
        "shrink.prune-k=A-3",
        "shrink.prune-k=a-4",
        "x" * 50,
    ]


@pytest.mark.smoke
def test_a_model_after_the_step_that_is_replaced_is_the_one_after_its_place(folder: Path, tmp_path: Path) -> None:
    request = recipe(folder, tmp_path)
    heal = {"shrink.heal": {"teacher": "uncut", "target": "teacher", "text": "retain", "steps": 2, "lr": 1e-3}}
    request["materials"]["uncut"] = {"after": "forget.npo"}
    request["steps"] = [*request["steps"], heal]
    done = compare(request, out=tmp_path / "out")
    assert {row["label"] for row in done.report["rows"]} >= {"forget.npo", "forget.ssd"}
    written = tmp_path / "out" / "forget.ssd" / "recipe.yaml"
    again = run(written, tmp_path / "again").report
    assert again["stages"] == ["before", "forget.ssd", "shrink.drop_layers", "shrink.heal"]
    report = json.loads((tmp_path / "out" / "forget.ssd" / "report.json").read_text())
    judged = [measure["values"] for measure in again["measures"] if measure["group"] != "cost"]
    assert judged == [measure["values"] for measure in report["measures"] if measure["group"] != "cost"]
