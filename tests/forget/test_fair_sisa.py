from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from sklearn.base import BaseEstimator, ClassifierMixin
from torch import nn

from conftest import tiny_llama, tiny_vit
from contract import Case, pictures
from overhaul.data.examples import Examples, collate
from overhaul.errors import RequestError
from overhaul.forget.fair_sisa import fair_sisa
from overhaul.forget.fair_sisa.fairness import DecisionTable, error, fair_table, gap, joint, majority, rates, solve
from overhaul.forget.sisa import sisa
from overhaul.forget.sisa.ensemble import Ensemble
from overhaul.models import open_model, save

SEEDS = range(8)
PROGRAMS: tuple[Any, ...] = ("ensemble", "count", "aggregate_first")
CONSTRAINTS: tuple[Any, ...] = ("equalised_odds", "demographic_parity")

Sample = tuple[np.ndarray, np.ndarray, np.ndarray]


CASE = Case(
    method=fair_sisa,
    materials=lambda: {
        "model": trained(pictures([n % 2 for n in range(24)])),
        "calibration": pictures([n % 2 for n in range(40)], 1, group=["aab"[n % 3] for n in range(40)]),
    },
    varied={
        "constraint": ("equalised_odds", "demographic_parity"),
        "processor": ("ensemble", "count"),
        "seed": (0, 1),
    },
    idle={"batch_size": "it does not change the result"},
)


def sample(seed: int, count: int = 400, members: int = 3, groups: int = 2) -> Sample:
    """Votes that know the label better in some groups than in others, groups and labels."""
    draw = np.random.default_rng(seed)
    group = draw.integers(groups, size=count)
    labels = (draw.random(count) < 0.35 + 0.2 * group / groups).astype(int)
    skill = 0.9 - 0.25 * group / groups + 0.05 * draw.random((members, 1))
    hard = draw.random(count) < 0.3  # members err together
    right = draw.random((members, count)) < np.where(hard, 0.55, skill)
    return np.where(right, labels, 1 - labels).T, np.array([f"g{one}" for one in group]), labels


class Said(ClassifierMixin, BaseEstimator):
    """A fitted classifier that repeats what it is given."""

    classes_ = np.array([0, 1])

    def __sklearn_is_fitted__(self) -> bool:
        return True

    def fit(self, x: np.ndarray, y: np.ndarray) -> Said:
        return self

    def predict(self, x: np.ndarray) -> np.ndarray:
        return x[:, 0]


def chances(data: Sample, processor: Any, constraint: Any = "equalised_odds") -> np.ndarray:
    votes, groups, labels = data
    return fair_table(votes, groups, labels, processor=processor, constraint=constraint).chance(votes, groups)


# the programs


@pytest.mark.parametrize("processor", PROGRAMS)
@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_check_1_groups_are_treated_alike_on_the_calibration_sample(processor: Any, constraint: Any) -> None:
    for seed, (members, groups) in itertools.product(SEEDS, [(1, 2), (3, 2), (5, 2), (3, 4)]):
        data = sample(seed, members=members, groups=groups)
        assert gap(chances(data, processor, constraint), *data[1:], constraint) < 1e-9


@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_check_2_more_is_read_fewer_errors_are_made(constraint: Any) -> None:
    strictly = 0
    for seed, members in itertools.product(SEEDS, (2, 3, 5)):
        data = sample(seed, members=members)
        ensemble, count, aggregate = (error(chances(data, one, constraint), data[2]) for one in PROGRAMS)
        assert ensemble <= count + 1e-12 and count <= aggregate + 1e-12
        strictly += ensemble < count - 1e-6 < aggregate - 2e-6
    assert strictly > 0


def test_check_2_with_one_member_all_three_are_one_program() -> None:
    for seed in SEEDS:
        data = sample(seed, members=1)
        one, two, three = (chances(data, processor) for processor in PROGRAMS)
        assert np.allclose(one, two, atol=1e-9) and np.allclose(one, three, atol=1e-9)
        assert np.allclose(one, chances(data, "post_first"), atol=1e-9)


def test_check_2_with_one_member_fairlearn_finds_the_same_rates() -> None:
    from fairlearn.postprocessing import ThresholdOptimizer

    for seed in SEEDS:
        votes, groups, labels = sample(seed, members=1)
        theirs = ThresholdOptimizer(
            estimator=Said(), constraints="equalized_odds", objective="accuracy_score", prefit=True,
            predict_method="predict", grid_size=20_000,
        )  # fmt: skip
        theirs.fit(votes, labels, sensitive_features=groups)
        expected = theirs._pmf_predict(votes, sensitive_features=groups)[:, 1]
        ours = chances((votes, groups, labels), "ensemble")
        assert error(ours, labels) == pytest.approx(error(expected, labels), abs=2e-4)
        found, known = rates(ours, groups, labels), rates(expected, groups, labels)
        assert all(found[group] == pytest.approx(known[group], abs=2e-3) for group in found)


def test_check_3_members_that_agree_leave_nothing_to_gain() -> None:
    for seed in SEEDS:
        votes, groups, labels = sample(seed, members=1)
        data = (np.repeat(votes, 5, axis=1), groups, labels)
        assert np.allclose(chances(data, "ensemble"), chances(data, "aggregate_first"), atol=1e-9)


def test_check_4_votes_that_are_fair_and_right_are_believed() -> None:
    cells = {(0, 0): 40, (1, 0): 10, (0, 1): 10, (1, 1): 30}  # (vote, label): the same in both groups
    rows = [(vote, group, label) for (vote, label), n in cells.items() for group in "ab" for _ in range(n)]
    votes, groups, labels = (np.array(column) for column in zip(*rows, strict=True))
    for processor in (*PROGRAMS, "post_first"):
        assert np.allclose(chances((votes[:, None], groups, labels), processor), votes, atol=1e-9)


def test_check_5_no_point_of_a_fine_grid_beats_the_program() -> None:
    steps = np.linspace(0, 1, 101)
    for seed in SEEDS:
        votes, groups, labels = sample(seed, members=1)
        best = error(chances((votes, groups, labels), "ensemble"), labels)
        shares = joint(votes[:, 0], (groups == "g1").astype(int), labels, 2)
        fpr, tpr = ((shares[:, y, 1] / shares[:, y].sum(axis=1)) for y in (0, 1))
        # p_1 and p_0 of the first group on the grid; the second group's follow from equal rates
        p0, p1 = (one.ravel() for one in np.meshgrid(steps, steps))
        rate = [p1 * on[0] + p0 * (1 - on[0]) for on in (fpr, tpr)]
        matrix = np.array([[1 - fpr[1], fpr[1]], [1 - tpr[1], tpr[1]]])
        other = np.linalg.solve(matrix, np.stack(rate))
        possible = ((other > -1e-9) & (other < 1 + 1e-9)).all(axis=0)
        positive = labels.mean()
        wrong = rate[0] * (1 - positive) + (1 - rate[1]) * positive
        assert possible.sum() > 10
        assert best <= wrong[possible].min() + 1e-9
        assert best >= wrong[possible].min() - 0.02


def test_post_first_is_the_chance_that_most_of_the_fair_draws_are_1() -> None:
    votes, groups, labels = sample(3, members=3)
    table = fair_table(votes, groups, labels, processor="post_first")
    single = [fair_table(votes[:, [s]], groups, labels, processor="count") for s in range(3)]
    for group, pattern in itertools.product(("g0", "g1"), itertools.product((0, 1), repeat=3)):
        ones = [one.chance(np.array([[vote]]), [group])[0] for one, vote in zip(single, pattern, strict=True)]
        most = sum(
            np.prod([p if drawn else 1 - p for p, drawn in zip(ones, draws, strict=True)])
            for draws in itertools.product((0, 1), repeat=3)
            if sum(draws) > 1
        )
        assert table.chance(np.array([pattern]), [group])[0] == pytest.approx(most)


def test_post_first_is_not_fair_although_every_member_is() -> None:
    data = sample(0, members=3, count=2000)
    for member in range(3):
        alone = (data[0][:, [member]], *data[1:])
        assert gap(chances(alone, "count"), *data[1:]) < 1e-9
    assert gap(chances(data, "post_first"), *data[1:]) > 0.005


def test_patterns_that_the_sample_lacks_take_the_value_of_their_count() -> None:
    votes, groups, labels = sample(1, members=3)
    keep = ~((groups == "g0") & (votes == [1, 0, 1]).all(axis=1))
    votes, groups, labels = votes[keep], groups[keep], labels[keep]
    patterns, counts = (fair_table(votes, groups, labels, processor=p) for p in ("ensemble", "count"))
    assert (patterns.empty, counts.empty) == (1, 0)
    assert patterns.chance(np.array([[1, 0, 1]]), ["g0"]) == counts.chance(np.array([[1, 0, 1]]), ["g0"])


def test_counts_that_the_sample_lacks_take_the_value_of_their_majority_and_that_of_the_vote() -> None:
    votes, groups, labels = sample(1, members=3)
    keep = ~((groups == "g0") & (votes.sum(axis=1) == 3))
    few = votes[keep], groups[keep], labels[keep]
    counts, most = (fair_table(*few, processor=p) for p in ("count", "aggregate_first"))
    unseen = np.ones((1, 3), dtype=int)
    assert counts.empty == 1 and counts.chance(unseen, ["g0"]) == most.chance(unseen, ["g0"])
    never = (groups == "g0") & (majority(votes) == 1)
    lost = fair_table(votes[~never], groups[~never], labels[~never], processor="aggregate_first")
    assert lost.empty == 1 and lost.chance(unseen, ["g0"]) == 1.0


def test_few_chances_are_neither_0_nor_1() -> None:
    for seed in SEEDS:
        votes, groups, labels = sample(seed, members=5, groups=3)
        shares = joint(votes @ (1 << np.arange(5)), np.unique(groups, return_inverse=True)[1], labels, 32)
        found = solve(shares, "equalised_odds")
        assert ((found > 1e-9) & (found < 1 - 1e-9)).sum() <= 2 * (3 - 1)


def test_metrics_by_hand() -> None:
    groups, labels = list("aaaabbbb"), np.array([0, 0, 1, 1, 0, 0, 1, 1])
    decided = np.array([1, 0, 1, 1, 0, 0, 1, 0])
    assert rates(decided, groups, labels) == {"a": (0.5, 1.0), "b": (0.0, 0.5)}
    assert gap(decided, groups, labels) == 0.5
    assert gap(decided, groups, labels, "demographic_parity") == 0.5
    assert error(decided, labels) == 0.25
    uneven = np.array([1, 0, 1, 1, 0, 0, 1, 1])
    assert rates(uneven, groups, labels) == {"a": (0.5, 1.0), "b": (0.0, 1.0)}
    assert gap(uneven, groups, labels) == 0.5, "the larger of both labels' differences, 0.5 and 0, not their mean"
    assert error(np.full(8, 0.5), labels) == 0.5
    assert majority(np.array([[1, 1, 0], [1, 0, 0]])).tolist() == [1, 0]
    assert majority(np.array([[1, 0]])).tolist() == [0]


def test_check_10_decisions_are_drawn_with_the_tables_chances() -> None:
    table = DecisionTable("count", "equalised_odds", 1, ("a", "b"), np.array([[0.0, 0.3], [0.85, 1.0]]), 0, seed=4)
    count = 4000
    names = [f"example {n}" for n in range(count)]
    for vote, group, chance in ((1, "a", 0.3), (0, "b", 0.85)):
        ones = int(table.decide(np.full((count, 1), vote), [group] * count, names).sum())
        assert binomtest(ones, count, chance).pvalue > 1e-3
    for vote, group in ((0, "a"), (1, "b")):
        assert set(table.decide(np.full((count, 1), vote), [group] * count, names)) == {vote}


def test_an_example_is_always_decided_alike_and_another_seed_draws_anew() -> None:
    table = DecisionTable("count", "equalised_odds", 1, ("a", "b"), np.full((2, 2), 0.5), 0, seed=4)
    names, votes = [f"example {n}" for n in range(100)], np.ones((100, 1), dtype=int)
    first = table.decide(votes, ["a"] * 100, names)
    alone = [int(table.decide(votes[:1], ["a"], [name])[0]) for name in names[::-1]][::-1]
    assert first.tolist() == alone
    other = DecisionTable.from_json({**table.to_json(), "seed": 5})
    assert other.decide(votes, ["a"] * 100, names).tolist() != alone


@pytest.mark.parametrize("processor", (*PROGRAMS, "post_first"))
def test_a_table_survives_json(processor: Any) -> None:
    votes, groups, labels = sample(0)
    table = fair_table(votes, groups, labels, processor=processor)
    again = DecisionTable.from_json(json.loads(json.dumps(table.to_json())))
    assert np.array_equal(again.chance(votes, groups), table.chance(votes, groups))


def test_samples_that_cannot_be_used_say_why() -> None:
    votes, groups, labels = sample(0)
    with pytest.raises(RequestError, match=r"votes must be \[n, members\].*\(399, 3\), 400, 400"):
        fair_table(votes[1:], groups, labels)
    with pytest.raises(RequestError, match="must be 0 or 1"):
        fair_table(votes + 1, groups, labels)
    with pytest.raises(RequestError, match="compares groups, and there are 1"):
        fair_table(votes, ["a"] * 400, labels)
    with pytest.raises(RequestError, match="13 members.*processor: count"):
        fair_table(np.ones((400, 13), dtype=int), groups, labels)
    one_sided = np.where(groups == "g1", 1, labels)
    with pytest.raises(RequestError, match="The group g1 has no example of label 0.*demographic_parity"):
        fair_table(votes, groups, one_sided)
    assert fair_table(votes, groups, one_sided, constraint="demographic_parity").members == 3
    table = fair_table(votes, groups, labels)
    with pytest.raises(RequestError, match="no group 'g7'; it knows g0, g1"):
        table.chance(votes[:1], ["g7"])
    with pytest.raises(RequestError, match="the votes of 3 members"):
        table.chance(votes[:1, :2], ["g0"])


# networks


def images(count: int, seed: int) -> Examples:
    """Images whose brightness tells the label, better in group a than in group b."""
    draw = torch.Generator().manual_seed(seed)
    items, rows = [], []
    for n in range(count):
        label, group = n % 2, "ab"[(n // 2) % 2]
        noise = torch.randn(1, 8, 8, generator=draw)
        shift = torch.randn((), generator=draw) * (0.4 if group == "a" else 1.5)
        items.append({"pixel_values": noise + (2 * label - 1) + shift, "labels": torch.tensor(label)})
        rows.append({"group": group, "n": n})
    return Examples(items, rows)


def texts(count: int, seed: int) -> Examples:
    """Texts of a label each: the label's token stands at their end."""
    draw = torch.Generator().manual_seed(seed)
    items, rows = [], []
    for n in range(count):
        label, group = n % 2, "ab"[(n // 2) % 2]
        words = torch.randint(3, 60, (int(torch.randint(2, 6, (1,), generator=draw)),), generator=draw)
        items.append({"input_ids": torch.cat([words, torch.tensor([60 + label])]), "labels": torch.tensor(label)})
        rows.append({"group": group})
    return Examples(items, rows)


def trained(full: Examples) -> Ensemble:
    model = tiny_vit(num_labels=2)
    made = sisa(model, full, shards=3, slices=1, epochs=6.0, weights="all", batch_size=8, lr=1e-3).model
    assert isinstance(made, Ensemble)
    return made


@pytest.fixture
def full() -> Examples:
    return images(48, 0)


def decided(model: nn.Module, examples: Examples) -> list[int]:
    assert isinstance(model, Ensemble)
    batch = {name: tensor for name, tensor in collate(examples.items).items() if name != "labels"}
    groups, names = [row["group"] for row in examples.rows], [f"{n}" for n in range(len(examples))]
    return model.decide(batch, groups, names).tolist()


def test_an_ensemble_of_networks_decides_fairly_and_says_the_same_in_forward(full: Examples, tmp_path: Path) -> None:
    model, calibration = trained(full), images(400, 1)
    batch = {"pixel_values": collate(calibration.items)["pixel_values"]}
    with torch.no_grad():
        before = model(**batch).logits
        outcome = fair_sisa(model, calibration)
        assert torch.equal(model(**batch).logits, before)
        votes = model.votes(**batch).numpy()
    assert outcome.facts["gap"] < 1e-9 < 0.02 < outcome.facts["gap_before"]  # pyright: ignore[reportOperatorIssue]
    groups = [row["group"] for row in calibration.rows]
    ones = np.array(decided(model, calibration))
    certain = np.isin(table := DecisionTable.from_json(outcome.made["table"]).chance(votes, groups), (0.0, 1.0))
    assert np.array_equal(ones[certain], table[certain])
    opened, _ = open_model(save(model, None, tmp_path / "fair"))
    assert decided(opened, calibration) == ones.tolist()


def test_forgetting_drops_the_decisions_of_the_members_that_were(full: Examples) -> None:
    model, calibration = trained(full), images(100, 1)
    with pytest.raises(RequestError, match="no decision table; run forget.fair_sisa"):
        decided(model, calibration)
    fair_sisa(model, calibration)
    assert len(decided(model, calibration)) == 100
    sisa(model, full, full.select([0]))
    with pytest.raises(RequestError, match="no decision table"):
        decided(model, calibration)
    fair_sisa(model, calibration)


def test_calibration_examples_that_were_learnt_or_forgotten_are_refused(full: Examples) -> None:
    model, calibration = trained(full), images(100, 1)
    mixed = Examples([*calibration.items, full.items[0]], [*calibration.rows, full.rows[0]])
    with pytest.raises(RequestError, match="1 examples of `calibration` were learnt"):
        fair_sisa(model, mixed)
    sisa(model, full, full.select([0]))
    with pytest.raises(RequestError, match="1 examples of `calibration` were forgotten"):
        fair_sisa(model, mixed)


def test_text_classifiers_vote_too() -> None:
    from transformers import BertConfig, BertForSequenceClassification

    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 64, "num_labels": 2}
    config = BertConfig(num_hidden_layers=2, num_attention_heads=4, **sizes)
    knobs: Any = {"shards": 3, "slices": 2, "epochs": 12.0, "batch_size": 8, "lr": 1e-2}
    made = sisa(BertForSequenceClassification(config).eval(), texts(48, 0), aggregate="mean", **knobs)
    outcome = fair_sisa(made.model, texts(200, 1), constraint="demographic_parity", processor="count")
    assert outcome.facts["error"] < 0.4 and outcome.facts["gap"] < 1e-9  # pyright: ignore[reportOperatorIssue]
    assert len(decided(made.model, texts(20, 2))) == 20


def test_what_is_no_two_class_ensemble_is_refused(full: Examples) -> None:
    calibration = images(20, 1)
    with pytest.raises(RequestError, match="reads the votes of an ensemble; ViTForImageClassification is none"):
        fair_sisa(tiny_vit(), calibration)
    model = trained(full)
    with pytest.raises(RequestError, match="2 of 20 rows of `calibration` have no `group`, first row 3"):
        rows = [{} if n in (3, 5) else row for n, row in enumerate(calibration.rows)]
        fair_sisa(model, Examples(calibration.items, rows))
    with pytest.raises(RequestError, match="`calibration` has no examples"):
        fair_sisa(model, Examples([], []))
    answers = Examples([{"input_ids": torch.arange(5) + 3 + n, "labels": torch.arange(5)} for n in range(6)], [{}] * 6)
    speaking = sisa(tiny_llama(), answers, shards=2, slices=1, epochs=1.0).model
    with pytest.raises(RequestError, match="these are the answers of a language model"):
        fair_sisa(speaking, Examples(answers.items, [{"group": "a"}] * 6))
