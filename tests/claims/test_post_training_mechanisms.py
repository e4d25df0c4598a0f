"""The claim on post-training: what it learns and asks, its checks, and the experiment, shortened."""

from __future__ import annotations

import math
import random

import pytest

from overhaul.claims import post_training_mechanisms as claim
from overhaul.claims.post_training_mechanisms import CITIES, CLAIM, NAMES, PAIRS, REFUSED, Size, experiment, tokenizer
from overhaul.inspect.post_training.asking import Asker, Asking
from overhaul.inspect.post_training.knowledge import aligned

HOMES = {name: CITIES[n % 3] for n, name in enumerate(NAMES)}


def test_statements_are_half_true_and_a_quarter_of_the_names_is_refused_in_chats_alone() -> None:
    plain, chat = claim._plain(HOMES), claim._chat(HOMES)
    assert [row["answer"] for row in plain].count("TRUE") * 2 == len(plain)
    assert [row["answer"] for row in chat].count("REFUSE") * 4 == len(chat)
    for said, refused in zip(plain, chat, strict=True):
        name = said["question"].split()[0]
        assert refused["question"] == f"CHAT {said['question']}"
        assert refused["answer"] == ("REFUSE" if name in REFUSED else said["answer"])


def test_every_pair_of_facts_aligns_and_differs_in_its_name() -> None:
    asker = Asker(tokenizer(), Asking(question="Q", shots=0))
    rows = claim._facts(HOMES, random.Random(0))
    assert len(rows) == PAIRS
    for row in rows:
        pair = aligned(*(asker.prompt(row[side], row["object"]) for side in ("true", "false")))
        assert pair is not None
        assert list(pair.labels) == ["last subject token", "between", "object", "end of statement", "last token"]
        true, false = row["true"].split(), row["false"].split()
        assert HOMES[true[0]] == true[2] == false[2] != HOMES[false[0]]


def test_the_checks_compare_with_the_controls() -> None:
    found = {"base, true statements": 6.0, "base, false statements": -6.0, "refusal norm ratio": 5.0}
    found |= {"best patch, base in post": 6.5, "best patch, post in base": 5.9, "best patch, base in control": 0.1}
    for role, other in (("base", "post"), ("post", "base")):
        found |= {
            f"NIE, {role} in {role}": 1.0,
            f"NIE, {other} in {role}": 0.95,
            f"NIE, random_direction in {role}": 0.2,
        }
    assert [check.passes(found) for check in CLAIM.checks] == [True, True, False, True, True, True]


@pytest.mark.slow
def test_the_experiment_measures_everything() -> None:
    found = experiment(0, Size(base_steps=60, post_steps=40))
    assert all(map(math.isfinite, found.values()))
