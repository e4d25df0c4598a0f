"""The world of people: the roles do not overlap, words survive the tokenizer, seeds repeat, models can be saved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import overhaul as oh
from overhaul.claims._people import VALUE_PLACE, Size, World, build, new_tokenizer, rows, value_probabilities
from overhaul.data.encode import encode_qa
from overhaul.data.examples import IGNORED
from overhaul.data.verifiers import verify
from overhaul.judge.evidence import Evidence, truth_ratios
from overhaul.models import save

SMALL = Size(people=6, forgotten=2, holdout=2, hidden=32, blocks=1, steps=60, batch=30, lr=1e-2)


@pytest.fixture(scope="module")
def world() -> World:
    torch.set_num_threads(1)
    return build(3, SMALL)


def test_roles_hold_different_people_and_ten_questions_about_each(world: World) -> None:
    people = {role: {row["person"] for row in part.rows} for role, part in world.roles().items()}
    assert {role: len(each) for role, each in people.items()} == {"forget": 2, "retain": 4, "holdout": 2, "full": 6}
    assert not people["forget"] & people["retain"] and not people["holdout"] & people["full"]
    assert all(len(part) == 10 * len(people[role]) for role, part in world.roles().items())


def test_every_word_is_known_and_is_read_back(world: World) -> None:
    tokenizer = world.tokenizer
    for row, item in zip(world.full.rows, world.full.items, strict=True):
        assert tokenizer.unk_token_id not in item["input_ids"].tolist()
        said = item["labels"][item["labels"] != IGNORED]
        assert verify(row, tokenizer.decode(said, skip_special_tokens=True))
        assert tokenizer.decode([int(said[VALUE_PLACE])]) == row["value"]


def test_wrong_answers_differ_from_the_right_one_in_the_value_alone() -> None:
    for row in rows(0, 5):
        assert len({row["answer"], *row["wrong"]}) == 6
        frame = str(row["answer"]).replace(str(row["value"]), "{}")
        for wrong in row["wrong"]:
            differing = [a != b for a, b in zip(wrong.split(), str(row["answer"]).split(), strict=True)]
            assert differing == [part == "{}" for part in frame.split()]


def test_the_paraphrase_is_neither_phrasing() -> None:
    asked = rows(0, 5)
    assert not {row["paraphrase"] for row in asked} & {row["question"] for row in asked}


def test_the_same_seed_gives_the_same_world_and_another_another() -> None:
    short = Size(people=3, forgotten=1, holdout=1, hidden=32, blocks=1, steps=2, batch=8)
    first, second, third = build(5, short), build(5, short), build(6, short)
    assert first.forget.digest() == second.forget.digest() != third.forget.digest()
    states = [each.original.state_dict() for each in (first, second, third)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert any(not torch.equal(states[0][name], states[2][name]) for name in states[0])


def test_the_original_knows_more_of_the_forgotten_than_the_retrained(world: World) -> None:
    known, never = (sum(value_probabilities(model, world.forget)) / 20 for model in (world.original, world.retrained))
    assert known > 2 * never


def test_judges_of_likelihood_and_generation_work_on_it(world: World) -> None:
    evidence = Evidence(world.original, world.forget, 4)
    assert len(truth_ratios(evidence)) == 20
    assert len(evidence.answered) == 4
    assert len(evidence.paraphrased) == 10


def test_its_models_are_saved_and_open_again(world: World, tmp_path: Path) -> None:
    folder = save(world.original, world.tokenizer, tmp_path / "original")
    model, tokenizer = oh.open(folder)
    again = encode_qa(world.forget.rows, tokenizer, prompt="{question}")
    assert value_probabilities(model, again) == pytest.approx(
        value_probabilities(world.original, world.forget), abs=1e-6
    )


def test_the_tokenizer_knows_the_words_of_common_prefixes() -> None:
    tokenizer = new_tokenizer()
    ids = tokenizer(" Sure, here is the answer:", add_special_tokens=False)["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids) == "sure , here is the answer :"
