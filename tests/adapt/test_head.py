from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn

import overhaul as oh
from conftest import tiny_llama, tiny_resnet, tiny_vit
from contract import Case, pictures
from overhaul.adapt.head import head
from overhaul.adapt.head.logistic import Linear, Part, fitted
from overhaul.adapt.head.rows import cells, split
from overhaul.data.encode import encode_images
from overhaul.data.examples import Examples, collate
from overhaul.errors import RequestError
from overhaul.forward import forward

REGIONS = ("north", "south", "west")


def grouped(count: int = 48, classes: int = 4, seed: int = 0) -> Examples:
    """Pictures of a few classes in groups of different size; half of the smallest calls what it shows something else."""
    labels = [n % classes for n in range(count)]
    regions = [REGIONS[0 if n % 6 < 3 else 1 if n % 6 < 5 else 2] for n in range(count)]
    odd = [region == "west" and n % 4 >= 2 for n, region in enumerate(regions)]
    shown = [(y + 1) % classes if other else y for y, other in zip(labels, odd, strict=True)]
    made = pictures(shown, seed=seed, region=regions, home=[f"home {n // 2}" for n in range(count)])
    items = [{**item, "labels": torch.tensor(y)} for item, y in zip(made.items, labels, strict=True)]
    return replace(made, items=items, rows=[{**row, "label": y} for row, y in zip(made.rows, labels, strict=True)])


CASE = Case(
    method=head,
    materials=lambda: {"model": tiny_vit(num_labels=4), "curated": grouped()},
    knobs={"by": "region", "grid": [0.01, 1.0]},
    varied={
        "by": ("region", None),
        "balance": ("none", "class_and_group"),
        "solver": ("logistic", "cross_entropy"),
        "start": ("present", "anew", {"solver": "cross_entropy", "steps": 3}),
        "grid": ([0.001], [10.0]),
        "choose": ("worst_group", "average", {"grid": [3e-3, 100.0], "balance": "none", "share": 0.5}),
        "share": (0.2, 0.5),
        "apart": (None, "home"),
        **{
            knob: (*values, {"solver": "cross_entropy", "steps": 4})
            for knob, values in {
                "batch_size": (4, 8),
                "lr": (1e-3, 1e-2),
                "warmup": (0, 2),
                "schedule": ("constant", "linear"),
                "weight_decay": (0.0, 0.5),
                "clip": (None, 0.01),
            }.items()
        },
        "steps": (2, 3, {"solver": "cross_entropy"}),
    },
    moves=r"^classifier\.",
)


def problem(rows: int = 60, width: int = 5, classes: int = 3, seed: int = 0) -> Part:
    draw = np.random.default_rng(seed)
    features = draw.normal(size=(rows, width)) * draw.uniform(0.1, 10, size=width) + draw.normal(size=width)
    labels = (features @ draw.normal(size=(width, classes)) + draw.normal(size=(rows, classes))).argmax(axis=1)
    labels[:classes] = range(classes)
    return Part.of(features, np.eye(classes, dtype=bool)[labels], {}, draw.integers(3, size=rows))


def drawn(part: Part, seed: int) -> Linear:
    draw = np.random.default_rng(seed)
    shape = part.right.shape[1], part.features.shape[1]
    return Linear(draw.normal(size=shape), draw.normal(size=shape[0]))


@pytest.mark.parametrize("c", [0.01, 1.0, 100.0])
def test_check_6_two_starts_end_at_the_same_loss_and_the_same_head(c: float) -> None:
    part = problem()
    (one,), (other,) = (fitted(part, [c], drawn(part, seed)) for seed in (1, 2))
    assert part.loss(one) == pytest.approx(part.loss(other), abs=1e-6)
    np.testing.assert_allclose(one(part.features), other(part.features), atol=1e-3)


@pytest.mark.parametrize("c", [0.01, 1.0, 10.0])
def test_it_is_scikit_learns_regression_on_standardised_features(c: float) -> None:
    part = problem()
    scaled = (part.features - part.features.mean(axis=0)) / part.features.std(axis=0)
    known = LogisticRegression(C=c, tol=1e-10, max_iter=10_000)
    known.fit(scaled, part.right.argmax(axis=1), sample_weight=part.weights)
    (ours,) = fitted(part, [c], drawn(part, 0))
    theirs = known.predict_log_proba(scaled)
    logits = ours(part.features)
    np.testing.assert_allclose(logits - np.logaddexp.reduce(logits, axis=1, keepdims=True), theirs, atol=1e-4)


def test_without_a_bias_none_is_made() -> None:
    part = problem()
    (layer,) = fitted(part, [1.0], replace(drawn(part, 0), bias=None))
    assert layer.bias is None
    scaled = part.features / np.sqrt((part.features**2).mean(axis=0))
    known = LogisticRegression(C=1.0, tol=1e-10, max_iter=10_000, fit_intercept=False)
    known.fit(scaled, part.right.argmax(axis=1), sample_weight=part.weights)
    assert (layer(part.features).argmax(axis=1) == known.predict(scaled)).all()


def test_check_7_balanced_cells_weigh_nothing_and_others_count_alike() -> None:
    part = problem(rows=60)
    even = replace(part, cells=np.arange(60) % 3).balanced()
    assert (even.weights == 1).all()
    odd = replace(part, cells=np.repeat([0, 1, 2], [40, 15, 5])).balanced()
    assert odd.weights.mean() == pytest.approx(1)
    sums = [odd.weights[odd.cells == cell].sum() for cell in range(3)]
    assert sums == pytest.approx([20, 20, 20])
    (plain,), (weighted,) = (fitted(each, [1.0], drawn(part, 0)) for each in (replace(part, weights=np.ones(60)), even))
    np.testing.assert_allclose(plain.weight, weighted.weight)


def test_a_weight_of_two_is_a_row_twice() -> None:
    part = problem(rows=30)
    twice = np.r_[np.arange(30), np.arange(10)]
    weights = np.ones(30)
    weights[:10] = 2
    doubled = replace(part, features=part.features[twice], right=part.right[twice], weights=np.ones(40))
    weighted = replace(part, weights=weights * 30 / 40)  # of mean 1
    mean, scale = part.features.mean(axis=0), part.features.std(axis=0)
    ones = [replace(each, features=(each.features - mean) / scale) for each in (doubled, weighted)]
    assert ones[0].loss(drawn(part, 0)) == pytest.approx(ones[1].loss(drawn(part, 0)))


def test_sets_of_classes_are_learnt_as_sets() -> None:
    part = problem()
    wide = replace(part, right=part.right | np.roll(part.right, 1, axis=1))
    (layer,) = fitted(wide, [1.0], drawn(part, 0).zeros)
    assert wide.loss(layer) < wide.loss(fitted(part, [1.0], drawn(part, 0))[0])
    logits = torch.tensor(layer(part.features))
    p = logits.softmax(dim=1)
    by_hand = -(p * torch.tensor(wide.right)).sum(dim=1).log()
    assert wide.loss(layer) == pytest.approx(float((by_hand * torch.tensor(wide.weights)).mean()), rel=1e-9)
    all_right = replace(part, right=np.ones_like(part.right))
    assert all_right.loss(layer) == pytest.approx(0, abs=1e-12)


def test_a_class_without_a_row_is_never_said() -> None:
    part = problem(classes=4)
    kept = part.select(np.flatnonzero(~part.right[:, 2]))
    (layer,) = fitted(kept, [1.0], drawn(part, 0))
    assert not (layer.weight[2] != 0).any()
    assert not (layer(part.features * 50).argmax(axis=1) == 2).any()


FAMILIES: dict[str, Callable[[], nn.Module]] = {"vit": tiny_vit, "resnet": tiny_resnet}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("solver", ["logistic", "cross_entropy"])
def test_check_5_the_backbone_is_the_same_bit_for_bit(name: str, solver: str) -> None:
    model = FAMILIES[name]().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    outcome = head(model, grouped(), by="region", solver=solver, steps=3, lr=1e-2)
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    layer = outcome.facts["layer"]
    assert moved == {f"{layer}.weight", f"{layer}.bias"}


@pytest.mark.parametrize("name", FAMILIES)
def test_check_5_the_first_head_put_back_restores_the_outputs(name: str) -> None:
    model, batch = FAMILIES[name](), collate(grouped().items)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        said = forward(model, batch)
        layer = head(model, grouped(), by="region").facts["layer"]
        assert not torch.allclose(forward(model, batch), said)
        module = model.get_submodule(str(layer))
        module.load_state_dict({key: before[f"{layer}.{key}"] for key in ("weight", "bias")})
        assert torch.equal(forward(model, batch), said)


def test_what_is_reported_is_what_the_model_does() -> None:
    model, test = tiny_vit(num_labels=4), grouped(seed=5)
    outcome = head(model, grouped(), test, by="region", grid=[1.0])
    batch = collate(test.items)
    with torch.no_grad():
        right = forward(model, batch).argmax(dim=1) == batch["labels"]
    by_region = {name: [bool(hit) for hit, row in zip(right, test.rows, strict=True) if row["region"] == name]
                 for name in sorted(REGIONS)}  # fmt: skip
    shares = [sum(hits) / len(hits) for hits in by_region.values()]
    table = outcome.tables["accuracy on rows held out, by group"]
    assert table.rows[1][1:] == pytest.approx((float(right.float().mean()), *shares))
    assert outcome.facts["average"] == pytest.approx(float(right.float().mean()))
    assert outcome.facts["worst_group"] == pytest.approx(min(shares))
    assert outcome.facts["max_min"] == pytest.approx(max(shares) - min(shares))


def test_of_c_that_are_as_accurate_the_one_with_the_least_loss_is_taken_and_an_edge_is_said() -> None:
    data = grouped()
    data = replace(data, items=[data.items[int(item["labels"])] for item in data.items])  # one picture of each class
    for grid, edge in (([0.1, 0.3, 1.0], "largest"), ([1.0], None)):
        outcome = head(tiny_vit(num_labels=4), data, by="region", grid=grid)
        (table,) = [one for name, one in outcome.tables.items() if name.startswith("what each C")]
        assert {row[1:3] for row in table.rows} == {(1.0, 1.0)}, "all tie"
        assert outcome.facts["c"] == min(table.rows, key=lambda row: row[3])[0] == 1.0
        assert (f"C=1, which was best on the rows held out, is the {edge}" in outcome.facts.get("advice", "")) == bool(
            edge
        )


def test_rows_held_out_are_of_every_group_and_never_of_a_unit_that_is_fitted() -> None:
    examples = grouped()
    places = {name: [n for n, row in enumerate(examples.rows) if row["region"] == name] for name in REGIONS}
    homes = [row["home"] for row in examples.rows]
    features = np.arange(len(examples), dtype=float)[:, None]
    part = Part.of(features, np.ones((len(examples), 2), dtype=bool), places)
    group, classes = (cells(examples, places, what) for what in ("group", "class"))
    kept, test = split(part, group, classes, homes, 0.25)
    ours, theirs = ({homes[int(n)] for n in each.features[:, 0]} for each in (kept, test))
    assert ours | theirs == set(homes) and not ours & theirs
    assert set(kept.groups) == set(test.groups) == set(REGIONS)
    alone = split(part, group, classes, range(len(homes)), 0.25)[1]
    assert [len(alone.groups[name]) for name in REGIONS] == [6, 4, 2]
    shown = Counter(int(examples.items[int(n)]["labels"]) for n in alone.features[alone.groups["north"], 0])
    assert max(shown.values()) - min(shown.values()) <= 1


def test_a_class_of_one_row_is_fitted() -> None:
    part = problem(rows=40, classes=4)
    rare = part.select(np.r_[np.flatnonzero(~part.right[:, 3]), np.flatnonzero(part.right[:, 3])[:1]])
    for seed in range(8):
        torch.manual_seed(seed)
        nothing = np.zeros(len(rare.features), dtype=int)
        kept, test = split(rare, nothing, rare.right.argmax(axis=1), range(len(rare.features)), 0.5)
        assert kept.seen.all() and not test.seen[3]


def test_text_classifiers_and_sets_work_from_rows_to_report(tmp_path: Any) -> None:
    from test_heads import llama, texts

    made = texts(24)
    items = [{**item, "label_set": torch.tensor([int(item["labels"]), 2])} for item in made.items]
    examples = replace(made, items=items, rows=[{"region": "ab"[n % 2]} for n in range(24)])
    model = llama()
    outcome = head(model, examples, by="region", grid=[1.0])
    assert outcome.facts["layer"] == "score"
    assert model.get_parameter("score.weight").shape == (3, 32)
    again, _ = oh.open(oh.save(model, None, tmp_path / "saved"))
    batch = collate(examples.items)
    with torch.no_grad():
        assert torch.equal(forward(again, batch), forward(model, batch))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"by": "regoin"}, "nothing in the column 'regoin' of row 1, the group. Did you mean 'region'"),
        ({"by": "one"}, "is of one group, one 'same'"),
        ({"by": "n"}, r"groups of fewer than 2 rows by n: '0' \(1 row\)"),
        ({"apart": "hom"}, "`apart: hom` names no column of every row of `curated`. Did you mean 'home'"),
        ({"by": "region", "apart": "one"}, "too few rows to be both fitted and held out"),
    ],
)
def test_what_groups_cannot_be_is_refused(changes: dict[str, Any], said: str) -> None:
    examples = grouped()
    examples = replace(examples, rows=[{**row, "one": "same"} for row in examples.rows])
    with pytest.raises(RequestError, match=said):
        head(tiny_vit(num_labels=4), examples, **changes)


def test_labels_that_are_no_classes_and_models_that_do_not_classify_are_refused() -> None:
    with pytest.raises(RequestError, match=r"label 3, but the model tells 3 classes apart, 0 to 2"):
        head(tiny_vit(num_labels=3), grouped())
    with pytest.raises(RequestError, match="all curated rows are of one class"):
        head(tiny_vit(num_labels=3), pictures([1] * 8))
    from test_heads import llama, texts

    with pytest.raises(RequestError, match="the model is no classifier"):
        head(tiny_llama(), texts())
    one_missing = texts(20).filter(lambda row: True)
    places = [n for n, item in enumerate(one_missing.items) if int(item["labels"]) != 1]
    with pytest.raises(RequestError, match="no curated row has the class 1, and score has no bias"):
        head(llama(), one_missing.select(places))


def test_all_verbs_with_methods_are_offered() -> None:
    assert vars(oh.adapt)["head"] is head and "adapt" in dir(oh)
    assert encode_images([{"image": [[0.0]], "label": [2, 0]}]).items[0]["label_set"].tolist() == [2, 0]
