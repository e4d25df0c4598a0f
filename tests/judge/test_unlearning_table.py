"""The table: anchors, null control, directions, what is written, and MUSE's fifth and sixth criteria."""

from __future__ import annotations

import copy
import json
import math
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
from overhaul.forget._null import NULL, retain_only
from overhaul.judge.robustness import Attacks
from overhaul.judge.unlearning import About, criteria, scalability, sustainability, unlearning_table
from overhaul.method import Outcome
from overhaul.report.comparison import Comparison, read


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
def table(trained: nn.Module, never: nn.Module, roles: Roles) -> Comparison:
    opened: list[str] = []

    def method() -> nn.Module:
        opened.append("method")
        return copy.deepcopy(never)

    control = retain_only(copy.deepcopy(trained), roles["retain"], steps=2, lr=1e-4)
    models = {"method": method, "retrained": never, NULL: control, "original": trained}
    found = unlearning_table(
        models, **roles, by="person", attacks=LIGHT, limit=4, null=NULL,
        about={"method": About("certified", (7,), 1.5, 2.0)},
    )  # fmt: skip
    assert opened == ["method"]
    return found


def known(table: Comparison, label: str) -> dict[str, float]:
    """What was measured of a row."""
    pairs = zip(table.measures, table[label].values, strict=True)
    return {measure["metric"]: value for measure, (value,) in pairs if value is not None}


def test_rows_are_the_anchors_the_null_control_and_the_methods(table: Comparison) -> None:
    assert [(row.label, row.kind) for row in table.rows] == [
        ("original", "before"), ("retrained", "retrained"), (NULL, "null control"), ("method", "method"),
    ]  # fmt: skip


def test_the_retrained_model_against_itself_leaks_nothing_and_cannot_be_told_apart(table: Comparison) -> None:
    anchor = known(table, "retrained")
    assert anchor["privacy.leakage"] == 0.0
    assert anchor["forgetting.fq_p"] == 0.0


def test_a_method_with_the_retrained_weights_has_the_retrained_numbers(table: Comparison) -> None:
    digests = {row.label: row.facts["digest"] for row in table.rows}
    assert digests["method"] == digests["retrained"] != digests["original"]
    assert known(table, "method") == pytest.approx(known(table, "retrained"))


def test_the_original_knows_and_nothing_is_recovered_of_what_was_not_forgotten(table: Comparison) -> None:
    original, anchor = known(table, "original"), known(table, "retrained")
    assert original["forgetting.prob"] > anchor["forgetting.prob"]
    assert original["privacy.loss.auc"] > anchor["privacy.loss.auc"]
    assert "robustness.recovered" not in original


def test_judging_changes_no_model(table: Comparison, trained: nn.Module, roles: Roles) -> None:
    assert len({row.facts["digest"] for row in table.rows[:3]}) == 3
    again = unlearning_table({"original": trained}, **roles, retrained=None, attacks=LIGHT, limit=1)
    assert again["original"].facts["digest"] == table["original"].facts["digest"]


def test_values_are_means_of_what_is_kept_per_example(table: Comparison, roles: Roles) -> None:
    row, values = table["original"], known(table, "original")
    for name in ("forgetting.prob", "forgetting.ES", "utility.prob", "robustness.4bit"):
        assert values[name] == pytest.approx(sum(map(float, row.samples[name])) / len(row.samples[name]))  # pyright: ignore[reportArgumentType]
    assert len(row.samples["forgetting.prob"]) == len(roles["forget"])
    ratios = [float(r or 0) for r in row.samples["forgetting.truth_ratio"]]
    assert values["forgetting.truth_ratio"] == pytest.approx(sum(min(r, 1 / r) for r in ratios) / len(ratios))
    low, high = row.facts["intervals"]["privacy.loss.auc"]
    assert low <= values["privacy.loss.auc"] <= high


def test_the_layer_that_knows_most_knows_at_least_as_much_as_the_answer_tells(table: Comparison, roles: Roles) -> None:
    for row in table.rows:
        values = known(table, row.label)
        assert values["representation.lens"] >= values["forgetting.prob"] - 1e-6
        assert len(row.samples["representation.lens"]) == len(roles["forget"])
    assert known(table, "original")["representation.lens"] > known(table, "retrained")["representation.lens"]


def test_model_utility_is_the_harmonic_mean_of_its_three_parts(table: Comparison) -> None:
    values = known(table, "method")
    parts = [values[f"utility.{part}"] for part in ("prob", "rouge", "truth_ratio")]
    expected = 3 / sum(1 / part for part in parts) if all(parts) else 0.0
    assert values["utility.hmean"] == pytest.approx(expected)


def wanted(table: Comparison, metric: str) -> str:
    return table.measures[table.place(metric)]["wanted"]


def test_without_a_retrained_model_nothing_is_compared_with_a_made_up_one(trained: nn.Module, roles: Roles) -> None:
    found = unlearning_table({"original": trained}, **roles, retrained=None, attacks=LIGHT, limit=1)
    assert not {"forgetting.fq_p", "privacy.leakage"} & set(known(found, "original"))
    assert wanted(found, "forgetting.prob") == "down" and wanted(found, "forgetting.truth_ratio") == "up"
    assert "no retrained model" in found.facts["note"]
    assert wanted(found, "privacy.loss.auc") == "chance", "0.5 needs no retrained model, and 0 gives away as much as 1"
    assert "→ retrained" not in found.to_markdown()


def test_better_is_nearer_to_the_retrained_model_not_lower(table: Comparison) -> None:
    assert wanted(table, "forgetting.prob") == wanted(table, "privacy.min_k.auc") == "anchor"
    assert table.ranked("forgetting.prob") == ["method", NULL]
    assert table.ranked("privacy.leakage")[0] == "method"
    assert wanted(table, "utility.prob") == "same" and table.measures[table.place("utility.prob")]["n"]
    assert table.ranked("utility.prob") == sorted(
        ["method", NULL], key=lambda name: -known(table, name)["utility.prob"]
    )


def test_markdown_has_a_table_for_each_block_and_an_arrow_for_each_column(table: Comparison) -> None:
    text = table.to_markdown()
    heads = [line for line in text.splitlines() if line.startswith("| model |")]
    assert len(heads) == 5
    assert all(any(arrow in cell for arrow in "↑↓→=") for head in heads for cell in head.split("|")[2:-1])
    assert text.count(f"| {NULL} (null control) |") == 5
    # nothing was forgotten, so nothing could be recovered
    line = next(line for line in text.partition("**Robustness**")[2].splitlines() if line.startswith("| original"))
    assert "| – |" in line
    # rates of the other attacks are in the JSON file alone
    assert "privacy.loss.tpr@fpr=1e-2" in known(table, "method") and "1e-2" not in text


def test_what_is_written_can_be_read_again(table: Comparison, tmp_path: Path) -> None:
    folder = table.write(tmp_path / "out", "unlearning")
    again = read(folder / "unlearning.json")
    assert again.to_json() == table.to_json()
    assert json.loads(json.dumps(table.to_json(), allow_nan=False)) == table.to_json()
    for place, row in enumerate(table.rows):
        kept = json.loads((folder / f"per-example-{place}.json").read_text())
        assert kept["label"] == row.label
        assert kept["values"]["forgetting.prob"] == row.samples["forgetting.prob"]
    assert not list(folder.glob("*.partial")) + list(folder.glob(".*.partial"))
    assert (folder / "unlearning.md").read_text() == table.to_markdown()
    assert NULL in (folder / "unlearning.html").read_text()
    about = again["method"].facts["about"]
    assert about == {"guarantee": "certified", "seeds": [7], "seconds": 1.5, "passes": 2.0}
    assert again["method"].facts["curves"]["relearnt"]["steps"] == [0, 2]
    assert again.facts["data"]["forget_n"] == 20


def test_a_row_that_is_missing_is_refused_before_any_model_is_opened(roles: Roles) -> None:
    def never_called() -> nn.Module:
        raise AssertionError("opened")

    with pytest.raises(RequestError, match="No model is called 'retrained'.*'retrain'"):
        unlearning_table({"original": never_called, "retrain": never_called}, **roles)
    with pytest.raises(RequestError, match="No model is called 'control'"):
        unlearning_table({"original": never_called}, **roles, retrained=None, null="control")
    one = {**roles, "forget": roles["forget"][:1]}
    with pytest.raises(RequestError, match="Relearning.*a single example"):
        unlearning_table({"original": never_called}, **one, retrained=None)


def test_images_have_the_columns_that_images_allow() -> None:
    parts: Roles = {
        "forget": examples_for("vit", 8, 0),
        "retain": examples_for("vit", 8, 1),
        "holdout": examples_for("vit", 8, 2),
    }
    models = {"original": FAMILIES["vit"](), "retrained": FAMILIES["vit"]()}
    values = known(unlearning_table(models, **parts, attacks=Attacks(steps=1)), "original")
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


def test_criteria_of_the_retrained_model_leak_nothing(never: nn.Module, table: Comparison, roles: Roles) -> None:
    area = known(table, "retrained")["privacy.min_k.auc"]
    found = criteria(
        never, roles["forget"], retain=roles["retain"], holdout=roles["holdout"], retrained_auc=area, limit=3
    )
    assert set(found) == {"knowledge", "leakage", "utility"}
    assert found["leakage"] == pytest.approx(0.0, abs=1e-9)
