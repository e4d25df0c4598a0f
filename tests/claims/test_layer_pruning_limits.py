from __future__ import annotations

import pytest
import torch

from overhaul.claims.layer_pruning_limits import CLAIM, CUTS, Characters, Size, _encode, accuracy, experiment
from overhaul.claims.layer_pruning_limits import _majorities as majorities
from overhaul.claims.layer_pruning_limits import _sums as sums

SMALL = Size(training_steps=2, healing_steps=1, healing_prompts=8, judged=6, searched=4, batch=12)


@pytest.mark.smoke
def test_one_short_experiment_gives_every_number_that_the_checks_read() -> None:
    found = experiment(0, SMALL)
    assert not CLAIM.checks[0].passes(found)  # two steps teach nothing
    assert {type(check.passes(found)) for check in CLAIM.checks} == {bool}
    cuts = [f"{how} {k}" for k in CUTS for how in ("reverse", "block_influence", "any", "greedy")]
    healed = [f"greedy {k}, {on} answers" for k in CUTS for on in ("own", "true", "shuffled")]
    labels = ["full", *cuts, *healed]
    named = {f"{task}, {label}" for task in ("classification", "addition") for label in labels}
    assert set(found) == {*named, "own answers that are right"}


def test_the_tasks_are_what_they_say() -> None:
    import random

    for question, answer in majorities(random.Random(0), 50):
        letters = question.removesuffix("=")
        assert len(letters) == 9 and all(letters.count(answer) > letters.count(x) for x in "abc" if x != answer)
    pairs = sums(random.Random(0))
    assert len(dict(pairs)) == 8100
    assert all(sum(map(int, question[:-1].split("+"))) == int(answer[::-1]) for question, answer in pairs)


def test_accuracy_counts_whole_answers() -> None:
    examples = _encode([("1+2=", "300"), ("a", "b")])

    class Parrot(torch.nn.Module):
        """Knows the first answer, and the second but for its end."""

        def __init__(self) -> None:
            super().__init__()
            self.unused = torch.nn.Parameter(torch.zeros(1))

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            logits = torch.nn.functional.one_hot(input_ids.roll(-1, dims=1), 20).float()
            logits[1, 1] = 0.0
            return logits

    assert accuracy(Parrot(), examples) == 0.5
    assert Characters().decode(examples[0]["input_ids"].tolist()) == "1+2=300"
