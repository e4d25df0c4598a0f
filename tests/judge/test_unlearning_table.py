"""The table: anchors, null control, directions, what is written, and MUSE's fifth and sixth criteria."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, TypedDict

import pytest
import torch
from torch import nn

from conftest import FAMILIES, examples_for, tiny_llama
from learnt import by_heart
from overhaul.data.encode import encode_qa
from overhaul.data.examples import Examples
from overhaul.data.tasks import people
from overhaul.errors import RequestError
from overhaul.judge.robustness import Attacks
from overhaul.judge.unlearning import (
    NULL,
    About,
    RetainOnly,
    Table,
    criteria,
    scalability,
    sustainability,
    unlearning_table,
)
from overhaul.method import Outcome


class Roles(TypedDict):
    forget: Examples
    retain: Examples
    holdout: Examples


BRIEF: dict[str, Any] = {"steps": 25, "batch_size": 10, "lr": 1e-2}
LIGHT = Attacks(share=0.5, by="person", steps=2, every=2, count=1, lr=1e-3)


@pytest.fixture(scope="module")
def roles(tokenizer: Any) -> Roles:
    rows = people()

    def encoded(start: int) -> Examples:
        return encode_qa(rows[start : start + 20], tokenizer, prompt="{question}")

    return {"forget": encoded(0), "retain": encoded(20), "holdout": encoded(40)}


@pytest.fixture(scope="module")
def trained(roles: Roles) -> nn.Module:
    """A model that has begun to learn the people to be forgotten and those who stay."""
    torch.manual_seed(0)
    return by_heart(tiny_llama(), {"forget": roles["forget"], "retain": roles["retain"]}, **BRIEF)


@pytest.fixture(scope="module")
def never(roles: Roles) -> nn.Module:
    torch.manual_seed(0)
    return by_heart(tiny_llama(), {"retain": roles["retain"]}, **BRIEF)


@pytest.fixture(scope="module")
def table(trained: nn.Module, never: nn.Module, roles: Roles) -> Table:
    opened: list[str] = []

    def method() -> nn.Module:
        opened.append("method")
        return copy.deepcopy(never)

    models = {"method": method, "retrained": never, "original": trained}
    found = unlearning_table(
        models, **roles, by="person", attacks=LIGHT, limit=4, null=RetainOnly(2, 1e-4),
        about={"method": About("certified", (7,), 1.5, 2.0)},
    )  # fmt: skip
    assert opened == ["method"]
    return found


def test_rows_are_the_anchors_the_null_control_and_the_methods(table: Table) -> None:
    assert [row.name for row in table.rows] == ["original", "retrained", NULL, "method"]


def test_the_retrained_model_against_itself_leaks_nothing_and_cannot_be_told_apart(table: Table) -> None:
    anchor = table["retrained"]
    assert anchor.values["privacy.leakage"] == 0.0
    assert anchor.values["forgetting.fq_p"] == 0.0


def test_a_method_with_the_retrained_weights_has_the_retrained_numbers(table: Table) -> None:
    method, anchor = table["method"], table["retrained"]
    assert method.digest == anchor.digest != table["original"].digest
    assert method.values == pytest.approx(anchor.values, nan_ok=True)


def test_the_original_knows_and_nothing_is_recovered_of_what_was_not_forgotten(table: Table) -> None:
    original, anchor = table["original"], table["retrained"]
    assert original.values["forgetting.prob"] > anchor.values["forgetting.prob"]
    assert original.values["privacy.loss.auc"] > anchor.values["privacy.loss.auc"]
    assert "robustness.recovered" not in original.values


def test_the_null_control_was_trained_and_left_the_original_alone(
    table: Table, trained: nn.Module, roles: Roles
) -> None:
    assert len({row.digest for row in table.rows[:3]}) == 3
    again = unlearning_table({"original": trained}, **roles, retrained=None, attacks=LIGHT, limit=1, null=None)
    assert again["original"].digest == table["original"].digest


def test_values_are_means_of_what_is_kept_per_example(table: Table, roles: Roles) -> None:
    row = table["original"]
    for name in ("forgetting.prob", "forgetting.ES", "utility.prob", "robustness.4bit"):
        assert row.values[name] == pytest.approx(sum(row.samples[name]) / len(row.samples[name]))
    assert len(row.samples["forgetting.prob"]) == len(roles["forget"])
    ratios = row.samples["forgetting.truth_ratio"]
    assert row.values["forgetting.truth_ratio"] == pytest.approx(sum(min(r, 1 / r) for r in ratios) / len(ratios))
    low, high = row.intervals["privacy.loss.ci"]
    assert low <= row.values["privacy.loss.auc"] <= high


def test_the_layer_that_knows_most_knows_at_least_as_much_as_the_answer_tells(table: Table, roles: Roles) -> None:
    for row in table.rows:
        assert row.values["representation.lens"] >= row.values["forgetting.prob"] - 1e-6
        assert len(row.samples["representation.lens"]) == len(roles["forget"])
    assert table["original"].values["representation.lens"] > table["retrained"].values["representation.lens"]


def test_model_utility_is_the_harmonic_mean_of_its_three_parts(table: Table) -> None:
    values = table["method"].values
    parts = [values[f"utility.{part}"] for part in ("prob", "rouge", "truth_ratio")]
    expected = 3 / sum(1 / part for part in parts) if all(parts) else 0.0
    assert values["utility.hmean"] == pytest.approx(expected)


def test_without_a_retrained_model_nothing_is_compared_with_a_made_up_one(trained: nn.Module, roles: Roles) -> None:
    found = unlearning_table({"original": trained}, **roles, retrained=None, attacks=LIGHT, limit=1, null=None)
    assert not {"forgetting.fq_p", "privacy.leakage"} & set(found["original"].values)
    assert found.direction("forgetting.prob") == "down"
    report = found.to_json()["rows"][0]
    assert report["retrain_hash"] is None and report["anchors"]["retrain"] is None
    assert "no retrained model" in found.to_markdown()


def test_better_is_nearer_to_the_retrained_model_not_lower(table: Table) -> None:
    assert table.direction("forgetting.prob") == table.direction("privacy.min_k.auc") == "anchor"
    assert table.ranked("forgetting.prob") == ["method", NULL]
    assert table.ranked("privacy.leakage")[0] == "method"
    assert table.ranked("utility.prob") == sorted(
        ["method", NULL], key=lambda name: -table[name].values["utility.prob"]
    )


def test_markdown_has_a_table_for_each_block_and_an_arrow_for_each_column(table: Table) -> None:
    text = table.to_markdown()
    for block in ("forgetting", "utility", "privacy", "robustness", "representation"):
        (head,) = [line for line in text.splitlines() if line.startswith(f"| {block} |")]
        assert all(any(arrow in cell for arrow in "↑↓→") for cell in head.split("|")[2:-1])
    assert text.count(f"| {NULL} |") == 5
    # a number that means nothing is a missing one
    undefined = [replace(row, values={**row.values, "forgetting.prob": math.nan}) for row in table.rows]
    assert f"| {NULL} | – |" in replace(table, rows=undefined).to_markdown()


def test_the_report_has_the_schemas_keys_and_is_json(table: Table) -> None:
    whole = json.loads(json.dumps(table.to_json(), allow_nan=False))
    report = whole["rows"][3]
    assert set(report) == {
        "model_hash", "base_hash", "retrain_hash", "method", "guarantee_level", "seeds", "data", "forgetting", "utility",
        "privacy", "robustness", "representation", "anchors", "per_sample", "cost",
    }  # fmt: skip
    assert (report["method"], report["guarantee_level"], report["seeds"]) == ("method", "certified", [7])
    assert report["cost"] == {"seconds": 1.5, "passes": 2.0}
    assert set(report["privacy"]["min_k"]) == {"auc", "tpr@fpr=1e-3", "tpr@fpr=1e-2", "ci"}
    assert report["robustness"]["relearnt_curve"]["steps"] == [0, 2]
    assert report["data"]["forget_n"] == 20
    assert report["anchors"]["original"] == {k: whole["rows"][0][k] for k in report["anchors"]["original"]}
    assert set(whole["directions"].values()) <= {"up", "down", "anchor", "zero"}


def test_what_is_written_can_be_read_again(table: Table, tmp_path: Path) -> None:
    folder = table.write(tmp_path / "out")
    report = json.loads((folder / "unlearning.json").read_text())
    for row, each in zip(table.rows, report["rows"], strict=True):
        kept = json.loads((folder / each["per_sample"]).read_text())
        assert kept["method"] == row.name
        assert kept["values"]["forgetting.prob"] == row.samples["forgetting.prob"]
    assert not list(folder.glob("*.partial")) + list(folder.glob(".*.partial"))
    assert (folder / "unlearning.md").read_text() == table.to_markdown()


def test_a_row_that_is_missing_is_refused_before_any_model_is_opened(roles: Roles) -> None:
    def never_called() -> nn.Module:
        raise AssertionError("opened")

    with pytest.raises(RequestError, match="No model is called 'retrained'.*'retrain'"):
        unlearning_table({"original": never_called, "retrain": never_called}, **roles)
    with pytest.raises(RequestError, match="null control's row"):
        unlearning_table({"original": never_called, NULL: never_called}, **roles, retrained=None)


def test_images_have_the_columns_that_images_allow() -> None:
    parts: Roles = {
        "forget": examples_for("vit", 8, 0),
        "retain": examples_for("vit", 8, 1),
        "holdout": examples_for("vit", 8, 2),
    }
    models = {"original": FAMILIES["vit"](), "retrained": FAMILIES["vit"]()}
    values = unlearning_table(models, **parts, attacks=Attacks(steps=1), null=None)["original"].values
    assert {"forgetting.prob", "privacy.loss.auc", "robustness.4bit", "privacy.leakage"} <= set(values)
    assert not [name for name in values if "zlib" in name or "rouge" in name or "truth" in name]
    assert all(map(math.isfinite, values.values()))


def first_weight(model: nn.Module) -> float:
    return next(model.parameters()).detach().flatten()[0].item()


def count(model: nn.Module, request: Examples) -> dict[str, float]:
    return {"bias": first_weight(model), "asked": len(request)}


def marked(model: nn.Module, request: Examples) -> Outcome:
    """A method that leaves a mark: how often it ran and on how many examples."""
    with torch.no_grad():
        next(model.parameters()).flatten()[0] += len(request)
    return Outcome(model)


def test_growing_requests_start_from_the_original_and_successive_ones_from_each_other(
    trained: nn.Module, roles: Roles
) -> None:
    folds = [roles["forget"][:5], roles["forget"][5:10], roles["forget"][10:20]]
    start = first_weight(trained)
    growing = scalability(lambda: copy.deepcopy(trained), marked, folds, count)
    assert [each["asked"] for each in growing] == [5, 10, 20]
    assert [each["bias"] - start for each in growing] == pytest.approx([5, 10, 20], abs=1e-4)
    after = sustainability(trained, marked, folds, count)
    assert [each["asked"] for each in after] == [5, 10, 20]
    assert [each["bias"] - start for each in after] == pytest.approx([5, 10, 20], abs=1e-4)
    assert first_weight(trained) == start


def test_criteria_of_the_retrained_model_leak_nothing(never: nn.Module, table: Table, roles: Roles) -> None:
    area = table["retrained"].values["privacy.min_k.auc"]
    found = criteria(
        never, roles["forget"], retain=roles["retain"], holdout=roles["holdout"], retrained_auc=area, limit=3
    )
    assert set(found) == {"knowledge", "leakage", "utility"}
    assert found["leakage"] == pytest.approx(0.0, abs=1e-9)
