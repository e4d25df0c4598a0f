from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import overhaul as oh
from conftest import CHARACTERS, tiny_llama, tiny_resnet, tiny_tokenizer, tiny_vit
from contract import Case, pictures, some_facts
from overhaul.data.examples import Examples
from overhaul.errors import RequestError
from overhaul.inspect.groups import groups
from overhaul.inspect.groups.disparity import Hits, expected_max_min, max_min
from overhaul.inspect.groups.measuring import check_read_alike
from overhaul.inspect.groups.progress import Rates, slopes, stretched
from overhaul.models import Checkpoint, facts, save

REGIONS = ("north", "south", "west")


def rows(count: int = 36, seed: int = 0) -> Examples:
    """Pictures of ten classes in three groups of different size, two of every home, three sets."""
    labels = [n * 7 % 10 for n in range(count)]
    columns: dict[str, list[str]] = {
        "region": [REGIONS[0 if n % 6 < 3 else 1 if n % 6 < 5 else 2] for n in range(count)],
        "income": ["low" if n % 4 < 2 else "high" for n in range(count)],
        "home": [f"home {n // 3}" for n in range(count)],
        "set": ["one" if n % 2 else "two" for n in range(count)],
    }
    return pictures(labels, seed=seed, **columns)


def some_models(folder: Path, count: int = 4) -> list[Checkpoint]:
    """Random classifiers of one label space and two families."""
    found: list[Checkpoint] = []
    for n in range(count):
        torch.manual_seed(n)
        model = tiny_vit() if n % 2 else tiny_resnet(hidden_sizes=[8, 8 + 8 * n])
        found.append(facts(save(model, None, folder / f"model-{n}")))
    return found


CASE = Case(
    method=groups,
    materials=lambda folder: {
        "models": some_models(folder), "data": rows(), "reference": rows(seed=1), "standard": rows(seed=2)
    },
    knobs={"by": "region", "least": 4},
    varied={
        "by": ("region", ["region", "income"], {"least": 2}),
        "pair": (["north", "south"], ["south", "north"]),
        "top": (5, 3),
        "apart": (None, "home"),
        "benchmark": (None, "set"),
        "families": (None, ["a", "b", "a", "c"]),
        "scale": ("probit", "logit"),
    },
    idle={"least": "every group has six rows or more; a test refuses a smaller one"},
)  # fmt: skip


def hits(models: int = 3, count: int = 120, seed: int = 0) -> Hits:
    draw = np.random.default_rng(seed)
    groups = {name: np.flatnonzero(np.arange(count) % 6 == n) for n, name in enumerate("abc")}
    groups["d"] = np.flatnonzero(np.arange(count) % 6 >= 3)
    return Hits(draw.random((models, count)) < 0.6, groups, np.arange(count) // 6 % 5)


def test_check_1_a_constant_accuracy_has_no_disparity_and_the_spread_is_no_less_than_any_pair() -> None:
    some = hits()
    for right in (np.ones((2, 120), dtype=bool), np.zeros((2, 120), dtype=bool)):
        same = replace(some, right=right)
        assert (max_min(same.accuracy) == 0).all()
        assert same.chance.tolist() == [0, 0]
    pairs = some.accuracy[:, :, None] - some.accuracy[:, None, :]
    assert (max_min(some.accuracy)[:, None, None] >= np.abs(pairs)).all()


def test_check_1_permuted_groups_give_what_is_expected_by_chance() -> None:
    some, draw = hits(models=1, count=600), np.random.default_rng(0)
    order = np.arange(600)
    spread = [max_min(replace(some, right=some.right[:, draw.permutation(order)]).accuracy)[0] for _ in range(2000)]
    assert float(np.mean(spread)) == pytest.approx(float(some.chance[0]), rel=0.1)


def test_what_chance_does_is_exact() -> None:
    # two groups of one row: they differ with probability 2 p (1 - p)
    assert expected_max_min(0.3, [1, 1]) == pytest.approx(2 * 0.3 * 0.7)
    # one row and two rows, every outcome by hand
    p = 0.4
    by_hand = sum(
        (p if a else 1 - p) * {0: (1 - p) ** 2, 1: 2 * p * (1 - p), 2: p**2}[b] * abs(a - b / 2)
        for a in (0, 1)
        for b in (0, 1, 2)
    )
    assert expected_max_min(p, [1, 2]) == pytest.approx(by_hand)
    assert expected_max_min(1.0, [7, 30]) == 0
    draw = np.random.default_rng(0)
    sizes = [10, 40, 40, 7]
    drawn = np.stack([draw.binomial(size, 0.8, 200_000) / size for size in sizes], axis=1)
    assert expected_max_min(0.8, sizes) == pytest.approx(float(max_min(drawn).mean()), abs=2e-3)


def test_check_2_the_trend_of_a_gap_is_the_difference_of_slopes() -> None:
    draw = np.random.default_rng(0)
    x, y = draw.random(9), draw.random((2, 9))
    one, other, gap = slopes(x, np.stack([*y, y[0] - y[1]]))
    assert gap == pytest.approx(one - other, abs=1e-12)
    assert slopes(x, np.stack([x, x + 0.3, 2 * x])) == pytest.approx([1, 1, 2], abs=1e-12)
    assert slopes(x, y) == pytest.approx([float(np.polyfit(x, each, 1)[0]) for each in y], abs=1e-12)
    assert np.isnan(slopes(np.full(9, 0.5), y)).all()


def test_check_3_the_groups_weighted_by_their_rows_are_the_average() -> None:
    some = hits()
    np.testing.assert_allclose(some.accuracy @ some.sizes / sum(some.sizes), some.average, atol=1e-12)


def test_groups_that_differ_in_their_classes_alone_are_no_disparity_once_adjusted() -> None:
    # class 0 is easy and class 1 hard, alike in both groups, of which one has more of the hard class
    classes = np.array([0] * 8 + [1] * 2 + [0] * 2 + [1] * 8)
    right = np.array([[1] * 8 + [1, 0] + [1] * 2 + [1, 0] * 4], dtype=bool)
    some = Hits(right, {"a": np.arange(10), "b": np.arange(10, 20)}, classes)
    assert max_min(some.accuracy)[0] == pytest.approx(0.3)
    adjusted = some.adjusted
    assert adjusted is not None and adjusted[1] == 2
    assert max_min(adjusted[0])[0] == pytest.approx(0)
    assert replace(some, classes=np.arange(20)).adjusted is None


def test_intervals_of_groups_are_binomial_and_wider_where_rows_belong_together() -> None:
    draw = np.random.default_rng(1)
    right = np.repeat(draw.random(200) < 0.7, 5)[None]
    some = Hits(right, {"a": np.arange(500), "b": np.arange(500, 1000)}, None)
    alone, together = (some.drawn([n // size for n in range(1000)], 0, 400) for size in (1, 5))
    assert alone.shape == (400, 1, 2)
    p = float(some.accuracy[0, 0])
    assert float(alone[:, 0, 0].std()) == pytest.approx((p * (1 - p) / 500) ** 0.5, rel=0.15)
    assert float(together[:, 0, 0].std()) == pytest.approx((p * (1 - p) / 100) ** 0.5, rel=0.15)


def test_intervals_of_slopes_are_drawn_over_families() -> None:
    draw = np.random.default_rng(0)
    x = np.linspace(0.4, 0.9, 12)
    y = {"data": 0.5 * x + 0.02 * draw.normal(size=12)}
    rates = Rates.of(x, y, range(12), 0)
    value, low, high = rates.row("data")
    assert value is not None and low is not None and high is not None and low < value < high
    # three copies of each model say no more than one
    thrice = Rates.of(np.tile(x, 3), {"data": np.tile(y["data"], 3)}, [*range(12)] * 3, 0)
    assert thrice.row("data") == pytest.approx((value, low, high))
    few = Rates.of(x, y, ["a", "b"] * 6, 0)
    assert few.row("data")[0] == pytest.approx(value) and few.row("data")[1:] == (None, None)


def test_a_progress_gap_is_a_difference_and_a_ratio_of_slopes() -> None:
    x = np.linspace(0.4, 0.9, 6)
    rates = Rates.of(x, {"standard": 0.8 * x, "data": 0.4 * x + 0.1, "flat": 0 * x}, range(6), 0)
    assert rates.gap("standard", "data") == pytest.approx((0.4, 0.4, 0.4))
    assert rates.ratio("standard", "data") == pytest.approx((2, 2, 2))
    assert rates.ratio("standard", "flat") == (None, None, None)


def test_stretched_scales_have_no_ends_and_keep_the_middle() -> None:
    assert stretched(np.array([0.5, 0.8413447]), 10, "probit") == pytest.approx([0, 1], abs=1e-6)
    assert stretched(np.array([0.5, 0.75]), 10, "logit") == pytest.approx([0, np.log(3)])
    assert np.isfinite(stretched(np.array([0.0, 1.0]), 10, "probit")).all()


def test_what_is_reported_is_what_each_model_does(tmp_path: Path) -> None:
    known, data = some_models(tmp_path, 2), rows()
    outcome = groups(known, data, by="region", least=4, pair=["north", "west"])
    table, top = outcome.tables["accuracy by group"], outcome.tables["top-5 accuracy by group"]
    for (name, average, *each), (_, more, *_), one in zip(table.rows, top.rows, known, strict=True):
        model = one.open()
        with torch.no_grad():
            logits = model(torch.stack([item["pixel_values"] for item in data.items])).logits
        labels = torch.stack([item["labels"] for item in data.items])
        right = logits.argmax(dim=1) == labels
        assert name == one.folder.name and average == pytest.approx(float(right.float().mean()))
        north = [n for n, row in enumerate(data.rows) if row["region"] == "north"]
        assert each[0] == pytest.approx(float(right[north].float().mean()))
        within = (logits.topk(5).indices == labels[:, None]).any(dim=1)
        assert more == pytest.approx(float(within.float().mean()))
    assert outcome.facts["rows"] == 36 and outcome.facts["groups"] == 3
    assert "progress" not in outcome.tables


def test_language_models_are_measured_by_their_answers(tmp_path: Path) -> None:
    from conftest import tiny_tokenizer
    from learnt import by_heart

    data = some_facts(0, 6)
    data = replace(data, rows=[{**row, "half": "first" if n < 3 else "second"} for n, row in enumerate(data.rows)])
    taught = by_heart(tiny_llama(), {"first": data[:3]}, steps=120, batch_size=3, lr=5e-3)
    known = [facts(save(taught, tiny_tokenizer(), tmp_path / "taught"))]
    outcome = groups(known, data, by="half", least=3)
    assert outcome.tables["accuracy by group"].rows == (("taught", 0.5, 1.0, 0.0),)
    assert outcome.facts["worst_group"] == "second" and "max_min_class_adjusted" not in outcome.facts


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({"by": "regin"}, "nothing in the column 'regin' of row 1, the group. Did you mean 'region'"),
        ({"by": "one"}, "is of one group, one 'same'"),
        ({"by": "n"}, r"groups of fewer than 4 rows by n: '0' \(1 row\), '1'"),
        ({"by": "region", "least": 8}, r"groups of fewer than 8 rows by region: 'west' \(6 rows\)"),
        ({"by": "region", "pair": ["north", "sout"]}, "`pair` names 'sout', which is no group. Did you mean 'south'"),
        ({"by": "region", "pair": ["north", "north"]}, "`pair` is two different groups"),
        ({"by": "region", "apart": "hom"}, "`apart: hom` names no column of every row of `data`. Did you mean 'home'"),
        ({"by": "region", "benchmark": "set"}, "names no column of every row of `standard`. There is no such role"),
        (
            {"by": "region", "apart": "region"},
            "the 18 rows of the group 'north' have 1 value of `apart: region`, 'north'",
        ),
        ({"by": []}, "is to be grouped by no column: `by` is empty"),
        ({"by": ["region", "region"]}, "grouped by the column 'region' twice: name each once"),
        ({"by": "region", "families": ["a"]}, "`families` has 1 names for 2 models"),
    ],
)
def test_what_is_not_there_is_refused(knobs: dict[str, Any], said: str, tmp_path: Path) -> None:
    data = rows()
    data = replace(data, rows=[{**row, "one": "same"} for row in data.rows])
    with pytest.raises(RequestError, match=said):
        groups(some_models(tmp_path, 2), data, **{"least": 4, **knobs})


def test_models_that_cannot_be_compared_are_refused(tmp_path: Path) -> None:
    first, second = some_models(tmp_path, 2)
    knobs: dict[str, Any] = {"by": "region", "least": 4}
    fewer = facts(save(tiny_vit(num_labels=7), None, tmp_path / "fewer"))
    with pytest.raises(RequestError, match="model-0 tells 10 classes apart and fewer 7"):
        groups([first, fewer], rows(), **knobs)
    with pytest.raises(RequestError, match=r"row 2 of the role `data` has the label 7, but the models tell 7 classes"):
        groups([fewer], rows(), **knobs)
    named = {f"n{n}": n for n in range(10)}
    one, other = (
        facts(save(tiny_vit(label2id=given, id2label={n: name for name, n in given.items()}), None, tmp_path / place))
        for place, given in (("one", named), ("other", {**named, "n3": 4, "n4": 3}))
    )
    with pytest.raises(RequestError, match="class 3 is 'n4' to other, but not to one"):
        groups([one, other], rows(), **knobs)
    language = facts(save(tiny_llama(), tiny_tokenizer(), tmp_path / "language"))
    with pytest.raises(RequestError, match=r"language \(LlamaForCausalLM\) has no classes by its config"):
        groups([language], rows(), **knobs)
    with pytest.raises(RequestError, match="a slope on `reference` needs at least two models"):
        groups([first], rows(), rows(), **knobs)
    with pytest.raises(RequestError, match="`standard` is compared by its slope on `reference`"):
        groups([first, second], rows(), None, rows(), **knobs)


def test_data_that_a_model_reads_otherwise_is_refused(tmp_path: Path) -> None:
    data = some_facts(0, 6)
    data = replace(data, rows=[{**row, "half": "first" if n < 3 else "second"} for n, row in enumerate(data.rows)])
    other = tiny_tokenizer()
    other.add_tokens([f"{CHARACTERS[5]}{CHARACTERS[6]}"])
    known = [facts(save(tiny_llama(), each, tmp_path / name)) for name, each in (("a", tiny_tokenizer()), ("b", other))]
    with pytest.raises(RequestError, match="b reads its data by another .* than the rows were encoded with"):
        groups(known, data, by="half", least=3)


def test_padding_and_truncation_of_the_last_call_are_no_other_tokenizer(tmp_path: Path) -> None:
    used = tiny_tokenizer()
    used([CHARACTERS[:2], CHARACTERS[:4]], padding=True, truncation=True, max_length=3)
    folder = save(tiny_llama(), used, tmp_path / "used")
    assert json.loads((folder / "tokenizer.json").read_text())["padding"], "the file keeps it"
    check_read_alike([facts(folder)], ["used"], {"data": some_facts(0, 2)})


def test_plan_refuses_a_group_that_is_too_small(tmp_path: Path) -> None:
    known = some_models(tmp_path, 1)
    lines = [
        {"image": item["pixel_values"][0].tolist(), **row} for item, row in zip(rows().items, rows().rows, strict=True)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    recipe = {
        "model": str(known[0].folder),
        "materials": {"models": [{"model": str(known[0].folder)}], "data": {"from": str(tmp_path / "rows.jsonl")}},
        "steps": [{"inspect.groups": {"by": "region", "least": 8}}],
    }
    with pytest.raises(RequestError, match="groups of fewer than 8 rows"):
        oh.plan(recipe)
