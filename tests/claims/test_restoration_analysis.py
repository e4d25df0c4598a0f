from __future__ import annotations

import pytest
import torch

from claims.test_stored import RESULTS
from overhaul.claims.restoration_analysis import CLAIM, FORGOTTEN, Size, experiment, unlearned
from overhaul.data import corpora
from overhaul.data.encode import encode_images
from overhaul.selectors import select


@pytest.mark.smoke
def test_a_short_experiment_gives_every_number_that_is_stored() -> None:
    size = Size(training_steps=4, unlearning_steps=2, autoencoder_steps=2)
    assert experiment(0, size).keys() == RESULTS[CLAIM.slug]["numbers"].keys()


def test_only_the_head_is_trained_where_that_is_said_and_all_weights_elsewhere() -> None:
    full = encode_images(corpora.digits("train"))[:200]
    models = unlearned(full, 0, Size(training_steps=1, unlearning_steps=1))
    assert models.keys() == {"original", "relabelled", "head", "retrained"}
    before = dict(models["original"].named_parameters())
    head = set(select(models["original"], "head").parameters)
    moved = {
        name: {key for key, value in model.named_parameters() if not torch.equal(value, before[key])}
        for name, model in models.items()
    }
    assert moved["head"] == head
    assert moved["relabelled"] > head
    assert FORGOTTEN in {row["label"] for row in full.rows}
