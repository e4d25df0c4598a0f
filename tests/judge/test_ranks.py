"""Which class a classifier finds most probable, where one or several are right, from the rows to the judge."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import overhaul as oh
from conftest import tiny_vit
from contract import pictures
from overhaul.data.classes import Labels
from overhaul.data.examples import Examples, collate, places_by, right_classes, wrong_label
from overhaul.errors import MaterialWarning, RequestError
from overhaul.judge.judge import check, judge
from overhaul.judge.likelihood import ranks

ANIMALS: Labels = {"cat": 0, "dog": 1, "owl": 2, "fox": 3}


def with_sets(examples: Examples, sets: list[list[int]]) -> Examples:
    items = [{**item, "label_set": torch.tensor(each)} for item, each in zip(examples.items, sets, strict=True)]
    return replace(examples, items=items)


class Fixed(nn.Module):
    """Logits that stand in the pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.scale * pixel_values[:, 0, 0]


def saying(*logits: list[float], labels: list[int]) -> Examples:
    items = [
        {"pixel_values": torch.tensor([[row]]), "labels": torch.tensor(y)}
        for row, y in zip(logits, labels, strict=True)
    ]
    return Examples(items, [{"region": "ab"[n % 2]} for n in range(len(items))])


def test_ranks_count_what_is_more_probable_and_ties_go_to_the_first() -> None:
    examples = saying([3, 2, 1, 0], [3, 2, 1, 0], [1, 1, 1, 0], [1, 1, 1, 0], labels=[0, 3, 0, 2])
    assert ranks(Fixed(), examples) == [0, 3, 0, 2]
    assert ranks(Fixed(), with_sets(examples, [[1, 2], [3, 1], [3, 2], [2, 1]])) == [1, 1, 2, 1]


def test_check_4_sets_of_one_are_labels_and_larger_sets_are_no_harder() -> None:
    model, examples = tiny_vit(), pictures([n % 10 for n in range(40)])
    own = [[int(item["labels"])] for item in examples.items]
    plain = ranks(model, examples)
    with torch.no_grad():
        logits = model(torch.stack([item["pixel_values"] for item in examples.items])).logits
    labels = torch.tensor([label for (label,) in own])
    for k in (1, 5):
        within = (logits.topk(k).indices == labels[:, None]).any(dim=1).tolist()
        assert [rank < k for rank in plain] == within
    assert ranks(model, with_sets(examples, own)) == plain
    larger = ranks(model, with_sets(examples, [[label, (label + 3) % 10] for (label,) in own]))
    assert all(a <= b for a, b in zip(larger, plain, strict=True)) and larger != plain


def test_the_judge_counts_any_right_class_and_the_first_k_by_group_too() -> None:
    examples = saying([3, 2, 1, 0], [3, 2, 1, 0], [3, 2, 1, 0], labels=[1, 3, 0])
    data = {"animals": examples, "sets": with_sets(examples, [[1, 0], [3, 2], [0]])}
    spec: dict[str, Any] = {
        "accuracy": ["animals", "sets"],
        "top_k_accuracy": [{"on": "animals", "k": 2, "by": "region"}, {"on": "sets", "k": 3}],
    }
    found = judge(Fixed(), check({"kept": spec}, data), data).measures
    values = {(one.metric, one.on): one.value for one in found}
    assert values["accuracy", "animals"] == pytest.approx(1 / 3)
    assert values["accuracy", "sets"] == pytest.approx(2 / 3)
    assert values["top_k_accuracy(k=2)", "animals"] == pytest.approx(2 / 3)
    assert values["top_k_accuracy(k=2).worst", "animals"] == 0  # the second row alone is b
    assert values["top_k_accuracy(k=3)", "sets"] == 1


def test_a_row_may_list_classes_by_name_or_number() -> None:
    rows = [
        {"image": [[0.0]], "label": ["owl", "dog"]},
        {"image": [[0.0]], "label": [3]},
        {"image": [[0.0]], "label": "cat"},
    ]
    with pytest.warns(MaterialWarning, match="1 of 3 rows list several classes"):
        made = oh.examples(rows, form="image", labels=ANIMALS)
    assert [int(item["labels"]) for item in made.items] == [2, 3, 0]
    batch = collate(made.items)
    assert right_classes(batch, 4).tolist() == [
        [False, True, True, False],
        [False, False, False, True],
        [True, False, False, False],
    ]


@pytest.mark.parametrize(
    ("label", "said"), [([], "lists no class"), (["owl", "cow"], "the model has no class cow"), ([1, 7], "is 7, but")]
)
def test_lists_that_are_no_classes_are_refused(label: Any, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        oh.examples([{"image": [[0.0]], "label": label}], form="image", labels=ANIMALS)


def test_a_label_beyond_the_classes_is_found_in_sets_too() -> None:
    examples = pictures([1, 2, 3])
    assert wrong_label(examples, 4) is None and wrong_label(examples, 3) == (2, 3)
    assert wrong_label(with_sets(examples, [[1], [2, 9], [3]]), 5) == (1, 9)
    with pytest.raises(RequestError, match="the label 3, but the model tells 3 classes apart"):
        right_classes(collate(examples.items), 3)


def test_places_by_one_column_or_several() -> None:
    rows = [{"a": "x", "b": 1}, {"a": "y", "b": 1}, {"a": "x", "b": 2}, {"a": "x", "b": 1}]
    assert places_by(rows, "a") == {"x": [0, 2, 3], "y": [1]}
    assert places_by(rows, ["a", "b"]) == {"x, 1": [0, 3], "x, 2": [2], "y, 1": [1]}
    alike = [{"a": "x", "b": "y, z"}, {"a": "x, y", "b": "z"}, {"a": "x", "b": "y, z"}]
    assert places_by(alike, ["a", "b"]) == {"'x', 'y, z'": [0, 2], "'x, y', 'z'": [1]}
