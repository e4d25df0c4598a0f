"""What is stored of every claim says what the claim says, and its verdicts follow from its numbers."""

from __future__ import annotations

import math

import pytest

from overhaul.claims._claim import SEEDS_TO_STORE, claims_page, find, slugs, stored, verdict
from overhaul.report.numbers import humanise

RESULTS = {result["slug"]: result for result in stored()}


def test_every_claim_has_a_stored_result_and_every_stored_result_a_claim() -> None:
    assert sorted(RESULTS) == slugs()


@pytest.mark.parametrize("slug", slugs())
def test_a_stored_result_has_the_words_of_its_claim_and_the_verdicts_of_its_numbers(slug: str) -> None:
    (claim,), result = find([slug]), RESULTS[slug]
    assert [result[key] for key in ("paper", "title", "statement")] == [claim.paper, claim.title, claim.statement]
    assert [check["text"] for check in result["checks"]] == [check.text for check in claim.checks]
    seeds = len(result["seconds"])
    assert seeds >= SEEDS_TO_STORE
    for seed in range(seeds):
        numbers = {
            name: math.inf if values[seed] is None else values[seed] for name, values in result["numbers"].items()
        }
        for check, said in zip(claim.checks, result["checks"], strict=True):
            assert said["passed"][seed] == check.passes(numbers), f"seed {seed}: {check.text}"


@pytest.mark.parametrize("slug", slugs())
def test_the_page_shows_every_verdict_and_number_that_is_stored(slug: str) -> None:
    result = RESULTS[slug]
    (section,) = [part for part in claims_page().split("\n## ") if part.startswith(f"{result['title']}\n")]
    lines = section.splitlines()
    for check in result["checks"]:
        assert f"| {check['text']} | {verdict(check['passed'])} |".replace("\\|", "|") in [
            line.replace("\\|", "|") for line in lines
        ]
    for name, values in result["numbers"].items():
        shown = ["not finite" if value is None else humanise(value, "") for value in values]
        assert f"| {name} | {' | '.join(shown)} |" in [line.replace("\\|", "|") for line in lines]
