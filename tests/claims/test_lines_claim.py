"""The claim of LiNeS: its texts and its null controls; the experiment itself, shortened, is a slow test."""

from __future__ import annotations

import math

import pytest

from overhaul.claims import lines
from overhaul.claims.lines import CLAIM, Size, character_names, differences, experiment


def test_what_is_learnt_and_what_is_judged_do_not_overlap() -> None:
    for rows in (character_names, differences):
        train, held = ({str(sorted(row.items())) for row in rows(held_out=held)} for held in (False, True))
        assert train and held and not train & held
        assert len(held) < len(train)
    assert {"question": "What is 71 - 25?", "answer": "46"} in differences(held_out=False) + differences(held_out=True)
    assert any("GREEK SMALL LETTER ALPHA" in row["text"] for row in character_names(held_out=False))


def test_the_checks_compare_with_the_controls() -> None:
    found = {"base, target": 4.0, "tuned, target": 2.0, "base, control": 3.0, "tuned, control": 4.0}
    for name, undone, kept in (("lines", 0.8, 0.8), ("reversed", 0.7, 0.7), ("constant", 0.79, 0.8)):
        found |= {f"{name}, share undone": undone, f"{name}, share kept": kept}
    found |= {"merged lines, share kept of both": 0.5, "task arithmetic, share kept of both": 0.48}
    assert [check.passes(found) for check in CLAIM.checks] == [True, True, True, False, True]


@pytest.mark.slow
def test_the_experiment_measures_everything() -> None:
    found = experiment(0, Size(steps=30, judged=16, candidates=2))
    assert all(map(math.isfinite, found.values()))
    assert 0 < found["length of the change that is left"] < 1
    assert found["lines, control"] < found["tuned, control"]
    assert lines.SCALES[0] <= found["task arithmetic, chosen"] <= lines.SCALES[1]
