"""Attacks on robustness: each on a copy, each equal to its formula."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from conftest import FAMILIES, examples_for, tiny_llama
from overhaul.data.encode import encode_qa
from overhaul.data.examples import IGNORED, Examples
from overhaul.data.tasks import people
from overhaul.errors import RequestError
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
    with pytest.raises(RequestError, match="a single one"):
        apart(questions[:10], 0.5, by="person")
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


def test_images_are_relearnt_and_rounded() -> None:
    found = attack(FAMILIES["resnet"](), examples_for("resnet", 12), Attacks(steps=1))
    assert set(found.values) == {"8bit", "4bit"}
    assert len(found.curves["relearnt"].values) == 2


def test_sampling_without_questions_is_refused() -> None:
    with pytest.raises(RequestError, match="count >= 1"):
        draws(tiny_llama(), examples_for("llama", 2), 0)
    with pytest.raises(RequestError, match="neither images, nor questions"):
        draws(tiny_llama(), examples_for("llama", 2), 1)
