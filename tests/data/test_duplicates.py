"""Exact and near duplicates, against the definition and against all pairs."""

from __future__ import annotations

import random

import numpy as np

from overhaul.data.duplicates import identity, near_duplicates, said


def test_a_row_is_itself_whatever_the_order_of_its_columns() -> None:
    assert identity({"a": 1, "b": "x"}) == identity({"b": "x", "a": 1})
    assert identity({"a": 1, "b": "x"}) != identity({"a": 1, "b": "y"})
    assert identity({"a": "bc"}) != identity({"ab": "c"})


def test_large_images_that_differ_in_one_pixel_are_two() -> None:
    image = np.zeros((64, 64), dtype=np.float32)
    other = image.copy()
    other[32, 32] = 1.0
    assert str(image) == str(other), "numpy shortens what it prints"
    assert identity({"image": image}) != identity({"image": other})
    assert identity({"image": image}) == identity({"image": image.copy()})


def test_the_words_of_a_question_and_its_answer_count_and_nothing_else() -> None:
    row = {"question": "Where was Ada Quill born?", "answer": "Marrowick", "person": "x", "wrong": ["a", "b"]}
    same = {"question": "where was ADA quill born", "answer": "marrowick.", "person": "y", "wrong": ["c", "d"]}
    other = {"question": "Where was Thea Sable born?", "answer": "Ketford"}
    assert near_duplicates([row], [other, same]) == [(0, 1)]
    assert near_duplicates([row], [other]) == []
    assert near_duplicates([{"text": "..."}], [{"text": "?"}]) == [], "no words, no overlap"


def test_conversations_are_compared_by_what_is_asked_and_answered_last() -> None:
    def turns(asked: str, answered: str) -> dict[str, object]:
        told = {
            "role": "system",
            "content": "You are the help desk of a large shop, and you answer in a single sentence.",
        }
        talk = [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
        return {"messages": [told, *talk], "topic": asked}

    row, other = turns("Where is the vault?", "Below the stairs."), turns("Where is the rose?", "Behind the hedge.")
    assert said(row) == "Where is the vault? Below the stairs."
    assert near_duplicates([row], [other]) == []
    assert near_duplicates([row], [other, turns("where is the VAULT", "below the stairs")]) == [(0, 1)]


def test_the_nearest_is_found_as_by_comparing_all_pairs() -> None:
    draw = random.Random(0)
    rows = [{"text": " ".join(draw.choices("abcdefghijkl", k=draw.randint(1, 12)))} for _ in range(120)]

    def overlap(a: int, b: int) -> float:
        x, y = ({*rows[i]["text"].split()} for i in (a, b))
        return len(x & y) / len(x | y)

    for threshold in (0.5, 0.8, 1.0):
        found = dict(near_duplicates(rows[:60], rows[60:], threshold))
        for i in range(60):
            best = max(overlap(i, j) for j in range(60, 120))
            assert (i in found) == (best >= threshold - 1e-9)
            if i in found:
                assert overlap(i, 60 + found[i]) == best
