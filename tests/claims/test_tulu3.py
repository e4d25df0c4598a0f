from __future__ import annotations

import random

from overhaul.claims.tulu3 import BETAS, CLAIM, Size, _pairs, experiment, right

SMALL = Size(
    teaching_parts=1,
    steps_in_part=2,
    pairs=8,
    dpo_steps=1,
    rlvr_steps=1,
    rlvr_prompts=2,
    samples=2,
    judged=4,
    watched=4,
)


def test_one_short_experiment_gives_every_number_that_the_checks_read() -> None:
    found = experiment(0, SMALL)
    assert not CLAIM.checks[0].passes(found)  # two steps teach nothing
    assert {type(check.passes(found)) for check in CLAIM.checks} == {bool}
    judged = ["start", "RLVR", "RLVR, shuffled rewards"]
    ways = [f"DPO {loss}, {kind}" for loss in BETAS for kind in ("length differs", "one length")]
    named = {f"{label}: {what}" for label in [*judged, *ways] for what in ("success", "repeats")}
    assert set(found) == named | {f"{way}: {what}" for way in ways for what in ("steps", "pairs won")}


def test_pairs_are_what_they_say() -> None:
    sums = [(a, a + 3) for a in range(10, 60)]
    for differs in (True, False):
        pairs = _pairs(sums, differs, random.Random(0))
        words = pairs.processor
        for item, row in zip(pairs, pairs.rows, strict=True):
            chosen, rejected = (
                words.decode(item[name][item[label] >= 0].tolist())
                for name, label in (("input_ids", "labels"), ("other_input_ids", "other_labels"))
            )
            assert right(row, chosen) == 1.0 and right(row, rejected) == 0.0
            assert len(chosen) > len(rejected) if differs else len(chosen) == len(rejected)
