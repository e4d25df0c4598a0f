"""Formatting and verdicts: what a reader is told follows from the numbers and from what was wanted."""

from __future__ import annotations

import math
from typing import Any

import pytest

from overhaul.report import numbers, sentences


def measure(unit: str, wanted: str, *values: float | None, better: str = "up", group: str = "kept") -> dict[str, Any]:
    fixed = {"group": group, "metric": "m", "label": "accuracy", "on": "retain", "n": 100}
    return {**fixed, "unit": unit, "better": better, "wanted": wanted, "values": list(values)}


@pytest.mark.parametrize(
    ("value", "unit", "written"),
    [
        (None, "share", "–"),
        (math.nan, "share", "not finite"),
        (0.9731, "share", "97.3%"),
        (1.0, "share", "100%"),
        (0.0, "share", "0%"),
        (0.9997, "share", "99.97%"),
        (0.0004, "share", "0.04%"),
        (3.1e-05, "probability", "3.1e-05"),
        (0.93, "probability", "0.93"),
        (0.0, "probability", "0"),
        (4_301_112, "bytes", "4.30 MB"),
        (512, "bytes", "512 B"),
        (2_134_528.0, "", "2.13 M"),
        (7_240_000_000, "", "7.24 B"),
        (4_218_880, "FLOPs/token", "4.22 MFLOPs"),
        (999_950, "FLOPs/image", "1.00 MFLOPs"),
        (6.398, "ms", "6.40 ms"),
        (2500, "ms/token", "2.50 s"),
        (1.63421, "bits/byte", "1.634"),
        (12480.4, "", "12,480"),
        (8e307, "", "8e+307"),
    ],
)
def test_humanise(value: float | None, unit: str, written: str) -> None:
    assert numbers.humanise(value, unit) == written


@pytest.mark.parametrize(
    ("seconds", "written"),
    [(0.844, "0.84 s"), (12.34, "12.3 s"), (59.97, "1 min 0 s"), (125, "2 min 5 s"), (3840, "1 h 4 min")],
)
def test_duration(seconds: float, written: str) -> None:
    assert numbers.duration(seconds) == written


def test_plain_writes_any_knob() -> None:
    values = [None, True, 5e-4, 1e-5, 1_228_800, [5, 6], [], {"a": 0.5}, "gdr", -12000]
    written = ["none", "yes", "0.0005", "1e-05", "1,228,800", "5, 6", "none", "a: 0.5", "gdr", "−12,000"]
    assert [numbers.plain(value) for value in values] == written


@pytest.mark.parametrize(
    ("unit", "wanted", "better", "before", "after", "word", "good"),
    [
        ("share", "down", "up", 0.9, 0.1, "as wanted", True),
        ("share", "down", "up", 0.1, 0.9, "wrong way", False),
        ("share", "down", "up", 0.90, 0.88, "hardly changed", False),
        ("share", "down", "up", 1.0, 0.967, "a little", None),  # moved, but nobody would call it forgotten
        ("share", "down", "up", 1.0, 0.51, "a little", None),
        ("probability", "down", "up", 0.999, 0.939, "a little", None),
        ("probability", "down", "up", 0.999, 0.4995, "as wanted", True),
        ("share", "up", "up", 0.1, 0.9, "as wanted", True),
        ("share", "up", "up", 0.1, 0.2, "a little", None),
        ("share", "up", "up", 0.90, 0.96, "as wanted", True),  # half of what was missing
        ("bits/byte", "down", "down", 1.60, 1.50, "a little", None),
        ("bits/byte", "down", "down", 1.60, 1.40, "as wanted", True),
        ("", "up", "down", 10.0, 20.0, "as wanted", True),  # perplexity of what is to be forgotten
        ("", "down", "down", 10.0, 20.0, "wrong way", False),
        ("share", "same", "up", 0.95, 0.92, "stayed", True),  # the margin itself still counts
        ("share", "same", "up", 0.95, 0.919, "got worse", False),
        ("share", "same", "up", 0.90, 0.95, "improved", True),
        ("share", "same", "down", 0.90, 0.95, "got worse", False),
        ("bits/byte", "same", "down", 1.60, 1.68, "stayed", True),
        ("bits/byte", "same", "down", 1.60, 1.69, "got worse", False),
        ("bits/byte", "same", "down", 1.60, 1.40, "improved", True),
        ("probability", "down", "up", 0.03, 3e-5, "as wanted", True),  # within 3 points, yet a thousand times less
        ("", "chance", "up", 0.99, 0.58, "at chance", True),
        ("", "chance", "up", 0.99, 0.41, "at chance", True),
        ("", "chance", "up", 0.99, 0.70, "nearer chance", None),
        ("", "chance", "up", 0.99, 0.97, "not nearer", False),
        ("", "chance", "up", 0.99, 0.10, "overshot chance", False),
        ("share", "same", "up", None, 0.5, "not compared", None),
        ("share", "same", "up", 0.5, None, "not compared", None),
        ("", "same", "down", 10.0, math.inf, "broke", False),
    ],
)
def test_a_verdict_depends_on_what_was_wanted(
    unit: str, wanted: str, better: str, before: float | None, after: float | None, word: str, good: bool | None
) -> None:
    seen = numbers.verdict(measure(unit, wanted, before, 0.123, after, better=better))
    assert (seen.word, seen.good) == (word, good)


@pytest.mark.parametrize(
    ("unit", "before", "after", "anchor", "word", "good"),
    [
        ("", 0.966, 0.380, 0.359, "as retrained", True),  # an AUC whose target is not 0.5
        ("", 0.966, 0.500, 0.359, "nearer", None),
        ("", 0.966, 0.024, 0.359, "overshot", False),
        ("", 0.966, 0.960, 0.359, "not nearer", False),
        ("share", 0.90, 0.28, 0.26, "as retrained", True),  # shared words are extracted from any model
        ("share", 0.90, 0.00, 0.26, "overshot", False),
        ("probability", 0.998, 0.060, 0.039, "as retrained", True),
        ("probability", 0.998, 0.130, 0.039, "nearer", None),
        ("probability", 0.998, 2e-7, 0.039, "overshot", False),  # close in points, and telling
        ("probability", 0.998, 0.0, 0.039, "overshot", False),
        ("log10 p", -16.8, -1.2, 0.0, "as retrained", True),
        ("log10 p", -239.0, -15.0, 0.0, "nearer", None),  # a tenth of the way left, and still p = 1e-15
        ("", -99.8, 55.0, 0.0, "overshot", False),
        ("", 0.5, 0.5, 0.5, "as retrained", True),
        ("", 0.5, 0.7, 0.5, "not nearer", False),
    ],
)
def test_a_retrained_model_is_reached_neared_or_overshot(
    unit: str, before: float, after: float, anchor: float, word: str, good: bool | None
) -> None:
    seen = numbers.verdict(
        {**measure(unit, "anchor", before, after, group="forgotten"), "anchor": anchor, "like": "retrained"}
    )
    assert (seen.word, seen.good) == (word, good)


def test_the_value_of_the_retrained_model_stands_beside_what_was_measured() -> None:
    row = {**measure("share", "anchor", 0.9, 0.3, group="forgotten"), "anchor": 0.26, "like": "retrained"}
    assert numbers.aim(row) == "as retrained: 26.0%"
    assert numbers.small_print(row).endswith("as retrained: 26.0%")
    assert numbers.small_print({**row, "help": "right answers"}).startswith("right answers · n")
    assert numbers.aim({**row, "like": "base"}) == "as base: 26.0%"
    assert numbers.verdict({**row, "like": "base", "anchor": 0.3}).word == "as base"


def test_a_cost_is_better_when_less_and_neutral_when_equal() -> None:
    words = [
        numbers.verdict(measure("bytes", "down", 5.0, after, better="down", group="cost")) for after in (4.0, 5.2, 6.0)
    ]
    assert [(seen.word, seen.good) for seen in words] == [("less", True), ("as before", None), ("more", False)]


def timed(*runs: list[float]) -> dict[str, Any]:
    return {**measure("ms", "down", *map(min, runs), better="down", group="cost"), "runs": list(runs)}


@pytest.mark.parametrize(
    ("before", "after", "word", "good"),
    [
        ([5.0, 5.1, 5.4], [4.9, 5.2, 5.3], "within noise", None),
        # two equal models, timed while the machine was idle and while it was busy
        ([5.0, 5.6, 9.0], [6.7, 8.0, 9.0], "within noise", None),
        ([5.0, 5.1, 5.2], [6.4, 6.5, 6.6], "more", False),
        ([6.4, 6.5, 6.6], [5.0, 5.1, 5.2], "less", True),
        ([6.4, 6.5, 6.6], [5.0, 5.3, 5.4], "within noise", None),  # 6.4 / 5.3 is less than 1.25
    ],
)
def test_a_time_gets_a_verdict_outside_its_noise_only(
    before: list[float], after: list[float], word: str, good: bool | None
) -> None:
    seen = numbers.verdict(timed(before, after))
    assert (seen.word, seen.good) == (word, good)


@pytest.mark.parametrize(
    ("errors", "word"),
    [
        ([0.03, 0.04], "got worse"),  # 0.11 apart, two errors of the difference are 0.10
        ([0.06, 0.04], "within noise"),
        ([None, 0.04], "got worse"),
    ],
)
def test_within_two_standard_errors_nothing_is_said_to_have_moved(errors: list[float | None], word: str) -> None:
    moved = {**measure("share", "same", 0.61, 0.5), "stderrs": errors}
    seen = numbers.verdict(moved)
    assert (seen.word, seen.good) == (word, False if word == "got worse" else None)
    assert numbers.verdict({**moved, "values": [0.51, 0.5]}).word == "stayed"
    assert numbers.spread({**moved, "stderrs": [0.03, None]}, 0) == "± 3.0%"
    assert (
        numbers.spread({**moved, "stderrs": [0.03, None]}, 1) == numbers.spread(measure("share", "same", 1.0), 0) == ""
    )


def test_of_a_time_whose_runs_are_not_known_nothing_is_said() -> None:
    seen = numbers.verdict(measure("ms", "down", 5.0, 9.0, better="down", group="cost"))
    assert (seen.word, seen.good) == ("within noise", None)
    (said,) = sentences.group_verdicts([timed([5.0, 5.6, 9.0], [6.7, 8.0])])
    assert said.sentence == "As before: accuracy 6.70 ms (within noise)."


def test_the_sign_tells_the_verdict_without_colour() -> None:
    signs = {numbers.Verdict("", good).sign for good in (True, False, None)}
    assert len(signs) == 3


@pytest.mark.parametrize(
    ("unit", "before", "after", "written"),
    [
        ("share", 0.925, 0.845, "−8.0 points"),
        ("share", 0.5, 0.50001, "no visible change"),
        ("share", 0.5, 0.5, "no change"),
        ("probability", 0.93, 3.1e-5, "30,000× lower"),
        ("probability", 0.93, 1e-30, "over 1,000,000× lower"),
        ("probability", 0.5, 0.0, "−0.5"),
        ("bytes", 0, 12, "+12 B"),
        ("bytes", 4_000_000, 3_000_000, "−25.0%"),
        ("", 10.0, 25.0, "2.5× higher"),
        ("", 10.0, 997.0, "100× higher"),
        ("", 10.0, 11.0, "+10.0%"),
        ("", 10.0, None, "–"),
        ("", 10.0, math.nan, "–"),
    ],
)
def test_change(unit: str, before: float, after: float | None, written: str) -> None:
    assert numbers.change(measure(unit, "same", before, after)) == written


def test_a_change_towards_chance_is_a_difference() -> None:
    assert numbers.change(measure("", "chance", 0.993, 0.571)) == "−0.422"


def in_short(*measures: dict[str, Any]) -> list[str]:
    return [said.sentence for said in sentences.group_verdicts(measures)]


def test_sentences_say_yes_no_and_in_part() -> None:
    good, bad = measure("share", "same", 0.9, 0.9), measure("share", "same", 0.9, 0.5)
    unknown, nearer = measure("share", "same", 0.9, None), measure("", "chance", 0.99, 0.7, group="forgotten")
    assert in_short(good) == ["Yes: accuracy on retain 90.0% → 90.0% (no change)."]
    assert in_short(good, good)[0].startswith("Yes: all 2 measures stayed, such as accuracy on retain")
    assert in_short(bad) == ["No: accuracy on retain 90.0% → 50.0% (got worse)."]
    assert in_short(bad, bad)[0].startswith("No: none of 2 measures stayed: accuracy")
    assert in_short(good, bad) == [
        "In part: 1 of 2 measures stayed; the rest: accuracy on retain 90.0% → 50.0% (got worse)."
    ]
    assert in_short(bad, unknown)[0].startswith("No: none of 2 measures stayed")
    assert in_short(unknown) == ["Not compared: accuracy on retain 90.0% → – (not compared)."]
    assert in_short(nearer, nearer)[0].startswith("In part: none of 2 measures quite came out as wanted: ")
    assert in_short(nearer) == ["In part: accuracy on retain 0.99 → 0.7 (nearer chance)."]


def test_groups_come_in_order_and_unknown_ones_last() -> None:
    rows = [measure("", "same", 1.0, 1.0, group=group) for group in ("my_group", "cost", "kept", "forgotten")]
    said = sentences.group_verdicts(rows)
    assert [one.heading for one in said] == ["To be forgotten", "To be kept", "Cost", "My group"]


def test_cost_sentence_tells_what_it_costs_now() -> None:
    rows = [
        {**measure("bytes", "down", 4e6, 3e6, better="down", group="cost"), "label": "weights on disk"},
        {**measure("ms", "down", 5.0, 5.0, better="down", group="cost"), "label": "one forward"},
    ]
    (said,) = sentences.group_verdicts(rows)
    assert said.sentence == "Now: weights on disk 3.00 MB (−25.0%); one forward 5.00 ms."
    assert said.overall.good is True


def test_costs_that_pull_both_ways_are_neither_good_nor_bad() -> None:
    rows = [measure("bytes", "down", 5.0, after, better="down", group="cost") for after in (1.0, 9.0)]
    assert sentences.group_verdicts(rows)[0].overall == numbers.Verdict("mixed", None)


def test_uncertainty_is_that_of_the_smallest_share() -> None:
    rows = [measure("share", "same", 1.0), {**measure("share", "same", 1.0), "n": 25}, measure("", "same", 1.0)]
    assert "n = 25 is itself uncertain by up to ±19.6 points" in sentences.uncertainty(rows)
    assert sentences.uncertainty(rows[2:]) == ""


@pytest.mark.parametrize("paper", ["2308.07707", "arXiv:2308.07707", "2308.07707v2", "cs/0101001", "math.GT/0309136"])
def test_an_arxiv_number_has_an_address(paper: str) -> None:
    assert numbers.paper_address(paper) == f"https://arxiv.org/abs/{paper.removeprefix('arXiv:')}"


@pytest.mark.parametrize(
    "paper", [None, "", "javascript:alert(1)", "2308.07707/../x", "https://example.org/2308.07707"]
)
def test_nothing_else_has_one(paper: str | None) -> None:
    assert numbers.paper_address(paper) is None


def test_a_time_gets_no_verdict_where_the_network_does_the_same_work() -> None:
    time = {**measure("ms/token", "down", 100.0, 10.0, better="down", group="cost"), "runs": [[100.0], [10.0]]}
    size = measure("bytes", "down", 5.0, 5.0, better="down", group="cost")
    for cost, word in ((size, "same work"), ({**size, "values": [5.0, 4.0]}, "less")):
        (*_, found) = numbers.by_group([cost, time])["cost"]
        assert numbers.verdict(found).word == word
        (said,) = sentences.group_verdicts([cost, time])
        assert ("(same work)" in said.sentence) == (word == "same work")


def test_what_was_never_there_is_not_said_to_have_stayed() -> None:
    seen = numbers.verdict(measure("share", "same", 0.0, 0.0))
    assert (seen.word, seen.good) == ("nothing to keep", None)
    (said,) = sentences.group_verdicts([measure("share", "same", 0.0, 0.0), measure("share", "same", 0.9, 0.9)])
    assert said.sentence.startswith("In part: 1 of 2 measures stayed") and "0% → 0% (nothing to keep)" in said.sentence


def test_a_measure_with_nothing_to_keep_is_no_part_of_what_stayed() -> None:
    nothing, worse = measure("share", "same", 0.0, 0.0), measure("share", "same", 0.8, 0.3)
    (said,) = sentences.group_verdicts([nothing, worse])
    assert said.overall.good is False and said.sentence.startswith("No: none of 2 measures stayed: ")
    (said,) = sentences.group_verdicts([nothing])
    assert said.overall.good is None and not said.sentence.startswith("In part")
