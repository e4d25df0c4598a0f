from __future__ import annotations

import math

import pytest

from claims.test_stored import RESULTS
from overhaul.claims.first_epoch_ga import (
    ALPHABET,
    CLAIM,
    GROUPS,
    SOURCES,
    Seen,
    Size,
    biographies,
    experiment,
    selectivity,
)

SMALL = Size(people=14, forgotten=2, probed=4, epochs=2, batch=4, hidden=16, blocks=3, rise=0.02)


@pytest.mark.smoke
def test_a_short_experiment_gives_every_number_that_is_stored() -> None:
    found = experiment(0, SMALL)
    assert {f"{source}, {where}" for source in SOURCES for where in GROUPS} <= found.keys()
    assert all(math.isfinite(value) for value in found.values())
    assert found.keys() == RESULTS[CLAIM.slug]["numbers"].keys()


def test_selectivity_is_the_rise_of_what_stays_over_that_of_what_goes() -> None:
    before = Seen(forget=0.5, retain=0.5, extraction=0.0)
    assert selectivity(before, Seen(1.5, 0.75, 0.0)) == 0.25
    assert selectivity(before, Seen(1.5, 1.5, 0.0)) == 1.0  # no selection at all


def test_biographies_are_one_sentence_a_person_and_depend_on_the_seed() -> None:
    some = biographies(0, 20)
    texts = ["".join(ALPHABET[i] for i in item["input_ids"].tolist()) for item in some.items]
    assert all(" was born in " in text and text.endswith(".\n") for text in texts)
    assert len({text.partition(" was")[0] for text in texts}) == 20
    other = biographies(1, 20)
    assert some.digest() != other.digest() and some.digest() == biographies(0, 20).digest()
