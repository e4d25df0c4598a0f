from __future__ import annotations

import torch

from claims.test_stored import RESULTS
from overhaul.claims.vfl_label_unlearning import CLAIM, FORGOTTEN, PER_CLASS, SAMPLES, Size, experiment, few, masked
from overhaul.data import corpora
from overhaul.data.encode import encode_images
from overhaul.parties.model import VerticalConfig, VerticalModel


def test_the_few_samples_are_as_many_as_said_and_the_digit_is_in_one_part_only() -> None:
    forget, recovery = few(encode_images(corpora.digits("train")))
    assert [int(item["labels"]) for item in forget.items] == [FORGOTTEN] * SAMPLES
    counts = torch.bincount(torch.tensor([int(item["labels"]) for item in recovery.items]), minlength=10).tolist()
    assert counts == [0] + [PER_CLASS] * 9


def test_a_masked_head_never_names_the_digit_and_keeps_the_order_of_the_others() -> None:
    model = VerticalModel(VerticalConfig(columns=[[0, 4], [4, 8]], bottoms=[{"widths": [32, 8]}] * 2, top=[16, 10]))
    pixels = torch.randn(50, 1, 8, 8)
    before, after = model(pixels).logits, masked(model)(pixels).logits
    assert torch.equal(before[:, 1:], after[:, 1:])
    assert not (after.argmax(dim=-1) == FORGOTTEN).any()


def test_a_short_experiment_gives_every_number_that_is_stored() -> None:
    found = experiment(0, Size(training_epochs=3))
    assert all(0.0 <= value <= 1.0 for name, value in found.items() if not name.endswith("epochs"))
    assert found.keys() == RESULTS[CLAIM.slug]["numbers"].keys()
