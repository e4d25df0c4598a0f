"""Generated tasks: answers verify, splits do not touch, and nothing depends on the run."""

from __future__ import annotations

from typing import Any

import pytest

from overhaul import models
from overhaul.data import corpora, tasks
from overhaul.data.instructions import HARMFUL, HARMLESS, REFUSALS, instructions
from overhaul.data.statements import statements
from overhaul.data.verifiers import verify

TASKS = [tasks.people, tasks.newcomers, tasks.addition, tasks.brackets, tasks.characters, statements]


@pytest.mark.parametrize("task", TASKS)
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


def test_newcomers_are_forty_others_with_facts_of_their_own() -> None:
    known = {row["person"] for split in ("train", "validation") for row in tasks.people(split)}  # pyright: ignore[reportArgumentType]
    new = tasks.newcomers("train")
    assert len({row["person"] for row in new}) == 40 and not {row["person"] for row in new} & known
    told = {(row["person"], row["attribute"]): row["answer"] for row in new}
    held_out = tasks.newcomers("validation")
    assert len(held_out) == len(told) == 200
    assert all(row["answer"] == told[row["person"], row["attribute"]] for row in held_out)


def test_half_of_the_instructions_ask_for_harm_and_the_verb_alone_says_so() -> None:
    train, held_out = instructions("train"), instructions("validation")
    assert not {row["question"] for row in train} & {row["question"] for row in held_out}
    assert instructions("train") == train and 200 < len(held_out) < 300
    for row in [*train, *held_out]:
        assert row["label"] == ("harmful" if row["verb"] in HARMFUL else "harmless")
        assert (row["answer"] in REFUSALS) == (row["label"] == "harmful")
        assert f" {row['verb']} the " in row["question"]
        assert verify(row, f" {row['answer']}")
        assert [turn["content"] for turn in row["messages"]] == [row["question"], row["answer"]]
    for split in (train, held_out):
        assert {row["verb"] for row in split} == {*HARMFUL, *HARMLESS}
        assert abs(sum(row["label"] == "harmful" for row in split) / len(split) - 0.5) < 0.06


def test_any_refusal_answers_a_harmful_instruction_and_none_a_harmless_one() -> None:
    harmful, harmless = (
        next(row for row in instructions() if row["label"] == label) for label in ("harmful", "harmless")
    )
    for text in (*REFUSALS, "I'm sorry, no.", "I can’t do that.", "i will not"):
        assert verify(harmful, text) and not verify(harmless, text)
    for text in ("To steal it, take a bag.", "Nothing is easier.", "Not sorry", ""):
        assert not verify(harmful, text)
    assert verify(harmless, harmless["answer"]) and not verify(harmless, harmless["answer"].replace("take", "buy"))


def test_statements_are_true_or_false_and_pairs_differ_in_their_subject() -> None:
    rows = [*statements("train"), *statements("validation")]
    facts = {(row["person"], row["attribute"]): row["answer"] for row in tasks.people("train")}
    pairs: dict[int, list[tasks.Row]] = {}
    for row in rows:
        pairs.setdefault(row["pair"], []).append(row)
        subject, object_ = row["subject"], row["object"]
        if row["topic"] == "addition":
            right = sum(map(int, subject.split(" + "))) == int(object_)
        elif row["topic"] == "larger":
            right = int(subject) > int(object_)
        else:
            right = facts[subject, row["topic"]] == object_
        assert right == (row["label"] == "true"), row["statement"]
    for true, false in pairs.values():
        assert (true["label"], false["label"]) == ("true", "false") and true["object"] == false["object"]
        assert len(true["statement"]) == len(false["statement"])
        assert true["statement"].removeprefix(true["subject"]) == false["statement"].removeprefix(false["subject"])
    tokenizer = models.load_processor(models.facts("starter:docs-llama"))
    same = [one["topic"] for one, other in pairs.values() if _tokens(tokenizer, one) == _tokens(tokenizer, other)]
    assert {"addition", "larger", "town", "book", "trade", "pet", "badge"} == set(same)
    assert same.count("addition") == same.count("larger") == 600 and len(same) > 1250


def _tokens(tokenizer: Any, row: tasks.Row) -> int:
    return len(tokenizer(row["statement"]).input_ids)


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
