from __future__ import annotations

import copy

import pytest
import torch

from claims.test_stored import RESULTS
from overhaul.claims.ssd import CLAIM, FORGOTTEN, Size, _parts, experiment, random_mask
from overhaul.data import corpora
from overhaul.data.encode import encode_images
from overhaul.starters.builds import new_vit


def test_the_parts_are_the_forgotten_class_and_the_rest() -> None:
    images = encode_images(corpora.digits("train"))
    forget, retain = _parts(images)
    assert len(forget) + len(retain) == len(images) == 1437
    assert {int(item["labels"]) for item in forget.items} == {FORGOTTEN}
    assert FORGOTTEN not in {int(item["labels"]) for item in retain.items}


@pytest.mark.smoke
def test_a_short_experiment_gives_every_number_that_is_stored() -> None:
    found = experiment(0, Size(training_steps=5, fine_tuning_epochs=1, random_masks=1))
    assert all(0.0 <= value <= 1.0 for value in found.values())
    assert found.keys() == RESULTS[CLAIM.slug]["numbers"].keys()


def test_the_random_mask_shrinks_as_many_weights_as_much_in_every_tensor() -> None:
    original = new_vit()
    dampened = copy.deepcopy(original)
    with torch.no_grad():
        for parameter in dampened.parameters():
            parameter.view(-1)[::7] *= 0.25
    masked = random_mask(original, dampened, torch.Generator().manual_seed(0))
    moved = 0
    for before, ours, random in zip(original.parameters(), dampened.parameters(), masked.parameters(), strict=True):
        some = before != 0
        factors = (random / before)[some]
        if some.all():
            assert (
                torch.isclose(factors, torch.tensor(0.25)).sum()
                == torch.isclose(ours / before, torch.tensor(0.25)).sum()
            )
        assert (torch.isclose(factors, torch.tensor(0.25)) | torch.isclose(factors, torch.tensor(1.0))).all()
        moved += int((random != ours).sum())
    assert moved > 0
