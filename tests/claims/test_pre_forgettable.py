from __future__ import annotations

import pytest
import torch
from torch import nn

from claims.test_stored import RESULTS
from overhaul.claims.pre_forgettable import CLAIM, Size, _another_removed, _masked, experiment
from overhaul.data import corpora
from overhaul.data.encode import encode_images
from overhaul.data.examples import collate
from overhaul.forget.prompt_tokens.gating import logits_under
from overhaul.forget.prompt_tokens.prompts import PromptedClassifier
from overhaul.starters.builds import new_vit


def test_a_short_experiment_gives_every_number_that_is_stored() -> None:
    found = experiment(0, Size(images=100, epochs=1, sets=2, attacked=1, attack_steps=2))
    assert all(value >= 0.0 for value in found.values())
    assert all(value <= 1.0 for name, value in found.items() if not name.endswith("_kl"))
    assert found.keys() == RESULTS[CLAIM.slug]["numbers"].keys()


class Sure(nn.Module):
    """Reads the class off the first pixel and is certain of it."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(5.0))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.scale * nn.functional.one_hot(pixel_values[:, 0, 0, 0].long(), 10).float()


def test_masking_a_logit_keeps_the_rest_and_its_kl_is_over_the_classes_that_are_left() -> None:
    rows = [{"image": torch.full((8, 8), float(n % 10)).numpy(), "label": n % 10} for n in range(20)]
    found = _masked(Sure(), encode_images(rows))
    assert found["no bank, accuracy"] == found["masked logit, retained"] == 1.0
    assert found["masked logit, forgotten_kl"] == pytest.approx(0.0, abs=1e-6)  # what is left of a sure output is flat
    p = torch.tensor([5.0] + [0.0] * 8).softmax(0)
    assert found["masked logit, retained_kl"] == pytest.approx(float((1 / 9 * (1 / 9 / p).log()).sum()), abs=1e-5)


def test_the_null_control_removes_the_prompt_of_the_next_class() -> None:
    images = encode_images(corpora.digits("validation"))[:100]
    model = PromptedClassifier.around(new_vit().eval(), collate(images.items[:2]))
    right = 0
    for name in range(10):
        part = images.filter(lambda row, name=name: row["label"] == name)
        logits, _ = logits_under(model, part, [one for one in range(10) if one != (name + 1) % 10])
        right += int((logits.argmax(dim=-1) == name).sum())
    assert _another_removed(model, images) == pytest.approx(right / len(images))
