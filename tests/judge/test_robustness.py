"""Attacks on robustness: each on a copy, each equal to its formula."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from conftest import FAMILIES, examples_for, tiny_llama, tiny_tokenizer
from overhaul.data.encode import encode_chat, encode_qa
from overhaul.data.examples import IGNORED, Examples
from overhaul.data.tasks import people
from overhaul.errors import RequestError
from overhaul.judge.evidence import Evidence
from overhaul.judge.robustness import (
    Attacks,
    Relearnt,
    apart,
    attack,
    draws,
    prefixed,
    probabilities,
    quantised,
    relearn,
    reworded,
    shown,
)


@pytest.fixture(scope="module")
def questions(tokenizer: Any) -> Examples:
    return encode_qa(people()[:40], tokenizer, prompt="{question}")


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(model: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_recovered_is_0_as_unlearnt_1_as_the_original_and_undefined_where_nothing_was_forgotten() -> None:
    assert Relearnt([0, 1, 2], [0.2, 0.5, 0.8]).recovered(0.8) == pytest.approx([0.0, 0.5, 1.0])
    assert all(map(math.isnan, Relearnt([0, 1], [0.8, 0.9]).recovered(0.8)))


def test_a_person_is_never_divided_between_what_is_shown_and_what_is_judged(questions: Examples) -> None:
    shown, rest = apart(questions, 0.3, by="person")
    names = [{row["person"] for row in part.rows} for part in (shown, rest)]
    assert [len(each) for each in names] == [1, 3]
    assert not names[0] & names[1]
    assert len(shown) + len(rest) == len(questions)
    assert apart(questions, 0.3, by="person")[0].digest() == shown.digest()


@pytest.mark.parametrize(("share", "count"), [(0.001, 1), (0.25, 10), (0.999, 39)])
def test_both_parts_have_at_least_one_example(questions: Examples, share: float, count: int) -> None:
    shown, rest = apart(questions, share)
    assert (len(shown), len(rest)) == (count, 40 - count)


def test_a_forget_set_that_cannot_be_divided_is_refused(questions: Examples) -> None:
    with pytest.raises(RequestError, match=r"'person' is the same in the whole forget set. `Attacks\(\)` without `by`"):
        apart(questions[:10], 0.5, by="person")
    with pytest.raises(RequestError, match="a single example"):
        apart(questions[:1], 0.5)
    with pytest.raises(RequestError, match="'city': not every row"):
        apart(questions, 0.5, by="city")
    with pytest.raises(RequestError, match="must lie between 0 and 1"):
        apart(questions, 1.0)


def test_relearning_is_done_on_a_copy_and_brings_back_what_it_shows(questions: Examples) -> None:
    model = tiny_llama()
    before = weights(model)
    curve = relearn(model, questions, questions, steps=6, every=4, lr=1e-2)
    assert curve.steps == [0, 4, 6]
    assert curve.values[0] == pytest.approx(sum(probabilities(model, questions)) / 40)
    assert curve.values[2] > 1.5 * curve.values[0]
    assert same(model, before)


def test_measuring_on_the_way_does_not_change_where_relearning_leads(questions: Examples) -> None:
    shown, rest = apart(questions, 0.5)
    ends = [relearn(tiny_llama_of(3), shown, rest, steps=4, every=every, lr=1e-2).values[-1] for every in (1, 4)]
    assert ends[0] == pytest.approx(ends[1], rel=1e-5)


def tiny_llama_of(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return tiny_llama()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_rounding_leaves_every_weight_within_half_a_step_on_a_grid_of_its_channel(bits: int, family: str) -> None:
    model = FAMILIES[family]()
    before = weights(model)
    rounded = quantised(model, bits)
    assert same(model, before)
    checked = 0
    for name, module in rounded.named_modules():
        transposed = type(module).__name__ == "Conv1D"
        if not (isinstance(module, nn.Linear | nn.Conv2d) or transposed) or name == "lm_head" or "classifier" in name:
            continue
        pair = (rounded.state_dict()[f"{name}.weight"], before[f"{name}.weight"])
        new, old = ((each.T if transposed else each).flatten(1) for each in pair)
        levels = 2 ** (bits - 1) - 1
        step = old.abs().amax(dim=1, keepdim=True) / levels
        assert float(((new - old).abs() - step / 2).max()) < 1e-6
        steps = new / step
        assert float((steps - steps.round()).abs().max()) < 1e-3
        assert float(steps.abs().max()) < levels + 1e-3
        checked += 1
    assert checked > 4


def test_embeddings_norms_and_a_tied_head_stay() -> None:
    model = tiny_llama()
    before = weights(model)
    changed = {
        name for name, tensor in quantised(model, 4).state_dict().items() if not torch.equal(before[name], tensor)
    }
    assert changed and all("proj" in name for name in changed)


def test_more_bits_and_smaller_groups_are_closer_to_the_model() -> None:
    model, examples = tiny_llama(), examples_for("llama", 30)
    true = torch.tensor(probabilities(model, examples))

    def off(bits: int, group: int | None = None) -> float:
        return float((torch.tensor(probabilities(quantised(model, bits, group), examples)) - true).abs().mean())

    assert 0 < off(8) < off(4) < off(2)
    assert off(3, 4) < off(3)


def test_rounding_what_cannot_be_rounded_is_refused() -> None:
    with pytest.raises(RequestError, match="2 to 8 bits"):
        quantised(tiny_llama(), 1)
    with pytest.raises(RequestError, match="no linear or convolution layer"):
        quantised(nn.Sequential(nn.Embedding(4, 4), nn.LayerNorm(4)), 8)


def test_a_prefix_stands_between_prompt_and_answer_and_carries_no_loss(questions: Examples, tokenizer: Any) -> None:
    changed = prefixed(questions, "sure:")
    opening = tokenizer(" sure:", add_special_tokens=False)["input_ids"]
    for item, new, row in zip(questions.items, changed.items, changed.rows, strict=True):
        first = int((item["labels"] != IGNORED).nonzero()[0])
        ids = item["input_ids"].tolist()
        assert new["input_ids"].tolist() == [*ids[:first], *opening, *ids[first:]]
        assert new["labels"][new["labels"] != IGNORED].tolist() == item["labels"][item["labels"] != IGNORED].tolist()
        assert row["prompt"].endswith(" sure:")
    assert probabilities(tiny_llama(), prefixed(questions, "")) != probabilities(tiny_llama(), changed)


def test_a_question_in_other_words_is_put_once_and_is_the_paraphrase_of_the_evidence(questions: Examples) -> None:
    model = tiny_llama()
    changed = reworded(questions, "paraphrase")
    assert len(changed) == 20  # two phrasings share one paraphrase
    assert [row["prompt"] for row in changed.rows] == [row["paraphrase"] for row in questions.rows[::2]]
    expected = [one.probability for one in Evidence(model, questions, 1).paraphrased]
    assert probabilities(model, changed) == pytest.approx(expected)


def test_a_translated_question_keeps_its_prompt_and_takes_its_own_answer_where_there_is_one(tokenizer: Any) -> None:
    rows = [
        {
            "question": "where lives ada?",
            "answer": "in ket",
            "translation": "wo wohnt ada?",
            "translated_answer": "zu ket",
        },
        {"question": "who is ada?", "answer": "a painter", "translation": "wer ist ada?"},
    ]
    asked = encode_qa(rows, tokenizer, prompt="q: {question} a:")
    changed = reworded(asked, "translation", "translated_answer")
    said = [(tokenizer.decode(i["input_ids"]), tokenizer.decode(i["labels"][i["labels"] != IGNORED])) for i in changed]
    assert said == [
        ("<s>q: wo wohnt ada? a: zu ket</s>", " zu ket</s>"),
        ("<s>q: wer ist ada? a: a painter</s>", " a painter</s>"),
    ]
    assert [row["answer"] for row in changed.rows] == ["zu ket", "a painter"]
    with pytest.raises(RequestError, match="no 'translated_answer' to be put"):
        reworded(asked, "translated_answer")


def short(tokenizer: Any, *questions: str) -> Examples:
    rows = [{"question": one, "answer": f"{one} it is"} for one in questions]
    return encode_qa(rows, tokenizer, prompt="q: {question} a:")


def test_shots_stand_above_the_question_after_one_bos_and_leave_the_answer_alone(tokenizer: Any) -> None:
    asked, others = short(tokenizer, "x", "y"), short(tokenizer, "b", "c", "d")
    changed = shown(asked, others, count=2)
    for item, new, row in zip(asked.items, changed.items, changed.rows, strict=True):
        text = tokenizer.decode(new["input_ids"])
        first, second, last = text.split("\n\n")
        assert {first, "<s>" + second} < {f"<s>q: {letter} a: {letter} it is" for letter in "bcd"}
        assert last == tokenizer.decode(item["input_ids"]).removeprefix("<s>")
        assert int((new["input_ids"] == tokenizer.bos_token_id).sum()) == 1
        assert new["labels"][new["labels"] != IGNORED].tolist() == item["labels"][item["labels"] != IGNORED].tolist()
        begins = int((new["labels"] != IGNORED).nonzero()[0])
        assert tokenizer.decode(new["input_ids"][:begins]) == f"<s>{row['prompt']}"
    assert shown(asked, others, count=2).digest() == changed.digest()


def test_as_many_shots_are_shown_as_fit(tokenizer: Any) -> None:
    asked, others = short(tokenizer, "x"), short(tokenizer, *"bcdefgh")
    assert shown(asked, others).rows[0]["prompt"].count("q:") == 5
    longer = short(tokenizer, *(letter * 20 for letter in "bcdefgh"))  # 128 tokens are the tokenizer's limit
    assert shown(asked, longer).rows[0]["prompt"].count("q:") == 3
    with pytest.raises(RequestError, match="model_max_length is 128"):
        shown(asked, short(tokenizer, "b" * 80))


def test_shots_that_give_the_answer_away_and_roles_that_are_no_questions_are_refused(tokenizer: Any) -> None:
    asked = short(tokenizer, "x", "y")
    with pytest.raises(RequestError, match="take the shots from `retain`"):
        shown(asked, short(tokenizer, "z", "y"))
    with pytest.raises(RequestError, match="neither images with labels, nor questions"):
        shown(asked, examples_for("llama", 2))
    speaker = tiny_tokenizer()
    speaker.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    turns = [{"role": "user", "content": "who?"}, {"role": "assistant", "content": "ada"}]
    with pytest.raises(RequestError, match="read `as: qa`"):
        shown(encode_chat([{"messages": turns}], speaker), asked)


def test_more_tries_find_at_least_as_much_and_are_the_same_each_time(questions: Examples) -> None:
    model, few = tiny_llama(), questions[:4]
    state = torch.get_rng_state()
    found = draws(model, few, 6, temperature=2.0)
    assert torch.equal(torch.get_rng_state(), state)
    assert [len(each) for each in found] == [6] * 4
    assert found == draws(model, few, 6, temperature=2.0)
    best = [sum(max(each[:k]) for each in found) for k in (1, 3, 6)]
    assert best == sorted(best)


def test_at_a_temperature_towards_zero_every_try_is_the_greedy_answer(questions: Examples) -> None:
    found = draws(tiny_llama(), questions[:4], 3, temperature=1e-6)
    assert all(len(set(each)) == 1 for each in found)


def test_one_call_tries_every_attack_that_the_data_allows(questions: Examples) -> None:
    model = tiny_llama()
    before = weights(model)
    how = Attacks(share=0.3, by="person", steps=2, every=2, count=2, unrelated=examples_for("llama", 8))
    found = attack(model, questions, how)
    assert set(found.values) == {"8bit", "4bit", "paraphrase", "prefix", "best_of_k"}
    assert {name: len(each) for name, each in found.values.items()}["8bit"] == len(questions)
    assert len(found.values["paraphrase"]) == len(questions) // 2  # two phrasings share one paraphrase
    assert {name: curve.steps for name, curve in found.curves.items()} == {"relearnt": [0, 2], "unrelated": [0, 2]}
    assert same(model, before)


def test_shots_and_translations_are_tried_where_the_data_has_them(tokenizer: Any) -> None:
    asked = short(tokenizer, "x", "y", "z")
    rows = [{**row, "translation": f"{row['question']}?"} for row in asked.rows]
    translated, others = replace(asked, rows=rows), short(tokenizer, "b", "c")
    model, how = tiny_llama(), Attacks(share=0.5, steps=1, count=1, bits=(8,))
    assert set(attack(model, asked, how).values) == {"8bit", "prefix", "best_of_k"}
    found = attack(model, translated, replace(how, shots=others)).values
    assert set(found) == {"8bit", "prefix", "best_of_k", "translated", "few_shot"}
    assert found["few_shot"] == pytest.approx(probabilities(model, shown(asked, others)))
    assert found["translated"] == pytest.approx(probabilities(model, reworded(translated, "translation")))
    own = probabilities(model, asked)
    assert found["few_shot"] != pytest.approx(own) and found["translated"] != pytest.approx(own)


def test_images_are_relearnt_and_rounded() -> None:
    found = attack(FAMILIES["resnet"](), examples_for("resnet", 12), Attacks(steps=1))
    assert set(found.values) == {"8bit", "4bit"}
    assert len(found.curves["relearnt"].values) == 2


def test_sampling_without_questions_is_refused() -> None:
    with pytest.raises(RequestError, match="count >= 1"):
        draws(tiny_llama(), examples_for("llama", 2), 0)
    with pytest.raises(RequestError, match="neither images with labels, nor questions"):
        draws(tiny_llama(), examples_for("llama", 2), 1)
