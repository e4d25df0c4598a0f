"""Generated tasks: answers verify, splits do not touch, and nothing depends on the run."""

from __future__ import annotations

import pytest

from overhaul.data import corpora, tasks
from overhaul.data.verifiers import verify


@pytest.mark.parametrize("task", [tasks.people, tasks.addition, tasks.brackets, tasks.characters])
def test_answers_verify_and_splits_do_not_touch(task: object) -> None:
    train, held_out = task("train"), task("validation")  # pyright: ignore[reportCallIssue]
    assert train and held_out
    assert not {row["question"] for row in train} & {row["question"] for row in held_out}
    for row in [*train[:200], *held_out[:200]]:
        assert verify(row, f" {row['answer']}")
        assert not verify(row, f" {row['answer']} 1")
    assert task("train") == train  # pyright: ignore[reportCallIssue]


def test_people_are_forty_and_twenty_with_answers_of_their_own() -> None:
    known, strangers = tasks.people("train"), tasks.people("validation")
    assert len({row["person"] for row in known}) == 40 and len(known) == 400
    assert len({row["person"] for row in strangers}) == 20
    for row in known:
        assert row["paraphrase"] not in {other["question"] for other in known}
        assert len(row["wrong"]) == 5


def test_any_sequence_that_balances_is_right() -> None:
    row = {"task": "brackets", "question": "close ( [", "answer": "] )"}
    assert verify(row, "])") and verify(row, " ] ( ) )")
    assert not verify(row, ") ]") and not verify(row, "]")


def test_prose_passages_are_unique_and_split_by_content() -> None:
    train, held_out = corpora.docs("train"), corpora.docs("validation")

    def paragraphs(rows: list[tasks.Row]) -> set[str]:
        return {" ".join(p.split()) for row in rows for p in row["text"].split("\n\n")}

    assert not paragraphs(train) & paragraphs(held_out)
    assert 20_000 < sum(len(row["text"]) for row in held_out) < 80_000


def test_digits_are_scaled_and_split() -> None:
    train, held_out = corpora.digits("train"), corpora.digits("validation")
    assert len(train) + len(held_out) == 1797 and len(held_out) == 360
    assert train[0]["image"].min() >= -1 and train[0]["image"].max() <= 1
