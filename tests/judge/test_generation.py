"""Greedy answers: exactly what the model says one prompt at a time, whatever its generation config asks for."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from conftest import FAMILIES, tiny_gpt2, tiny_llama, tiny_vit
from overhaul.errors import RequestError, RunError
from overhaul.generation import _plan, generate, stop_tokens
from overhaul.judge.generation import common_subsequence, repeated_share, rouge_l, rouge_l_f1


def prompts_of(lengths: list[int]) -> list[Tensor]:
    draw = torch.Generator().manual_seed(1)
    return [torch.randint(3, 64, (length,), generator=draw) for length in lengths]


def by_hand(model: nn.Module, prompt: Tensor, new_tokens: int) -> list[int]:
    """The most probable next token, again and again, without a cache."""
    ids = prompt
    for _ in range(new_tokens):
        with torch.no_grad():
            ids = torch.cat([ids, model(input_ids=ids[None], use_cache=False).logits[0, -1:].argmax(-1)])
    return ids[len(prompt) :].tolist()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_batches_say_what_each_prompt_says_alone_without_cache(family: str) -> None:
    model = FAMILIES[family]()
    prompts = prompts_of([5, 3, 5, 9, 3, 25, 1])
    expected = [by_hand(model, prompt, 8) for prompt in prompts]
    assert generate(model, prompts, 8, ()) == expected
    assert generate(model, prompts[::-1], 8, ()) == expected[::-1]
    assert [generate(model, [prompt], 8, ())[0] for prompt in prompts] == expected
    assert len({tuple(answer) for answer in expected}) > 1


def test_an_answer_ends_before_its_stop_token() -> None:
    model, prompts = tiny_llama(), prompts_of([4, 4, 6])
    whole = [by_hand(model, prompt, 10) for prompt in prompts]
    stop = whole[0][2]
    expected = [list(itertools.takewhile(lambda token: token != stop, answer)) for answer in whole]
    assert len(expected[0]) <= 2
    assert generate(model, prompts, 10, [stop]) == expected


def test_a_stop_token_inside_a_prompt_ends_nothing() -> None:
    model, prompts = tiny_llama(), prompts_of([3, 8])
    whole = [by_hand(model, prompt, 6) for prompt in prompts]
    inside = next(token for token in prompts[1].tolist()[3:] if token not in {*whole[0], *whole[1]})
    assert generate(model, prompts, 6, [inside]) == whole


def test_no_batch_reads_on_for_longer_than_it_answers_or_holds_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [sorted(batch) for batch in _plan([5, 30, 6, 5, 13, 14], 8)] == [[0, 2, 3, 4], [5], [1]]
    monkeypatch.setattr("overhaul.generation.BATCH_TOKENS", 40)
    assert [len(batch) for batch in _plan([12] * 5, 8)] == [2, 2, 1]


def test_habits_of_the_checkpoint_are_set_aside_and_put_back() -> None:
    model: Any = tiny_llama()
    prompts = prompts_of([4, 7])
    expected = generate(model, prompts, 8, ())
    habits = GenerationConfig(do_sample=True, temperature=3.0, top_k=5, repetition_penalty=5.0, max_length=6)
    model.generation_config = habits
    assert generate(model, prompts, 8, ()) == expected
    assert model.generation_config is habits
    with pytest.raises(IndexError):
        generate(model, [torch.tensor([500])], 8, ())
    assert model.generation_config is habits


def test_sampling_draws_from_the_model_alone() -> None:
    model: Any = tiny_llama()
    prompts = prompts_of([3, 6])
    assert generate(model, prompts, 8, (), sampling={"temperature": 1e-4}) == generate(model, prompts, 8, ())
    hot = generate(model, prompts, 60, (), sampling={"temperature": 100.0})
    assert len({*hot[0], *hot[1]}) > 50  # top-k, 50 unless said otherwise in transformers, is off
    torch.manual_seed(0)
    first = generate(model, prompts, 8, (), sampling={"temperature": 1.0})
    torch.manual_seed(0)
    assert generate(model, prompts, 8, (), sampling={"temperature": 1.0}) == first


def test_outputs_that_are_not_numbers_stop_generation() -> None:
    model: Any = tiny_llama()
    torch.nn.init.constant_(model.model.norm.weight, torch.nan)
    with pytest.raises(RunError, match="NaN"):
        generate(model, prompts_of([3]), 4, ())


def test_generation_ends_where_learnt_positions_end() -> None:
    model = tiny_gpt2(n_positions=10)
    short, long = generate(model, prompts_of([2, 7]), 6, ())
    assert (len(short), len(long)) == (6, 3)


def test_a_classifier_cannot_generate() -> None:
    with pytest.raises(RequestError, match="ViTForImageClassification cannot generate"):
        generate(tiny_vit(), prompts_of([2]), 2, ())


def test_stops_are_those_of_tokenizer_and_checkpoint(tokenizer: Any) -> None:
    model: Any = tiny_llama()
    model.generation_config.eos_token_id = [2, 7]
    assert stop_tokens(model, tokenizer) == [2, 7]
    model.generation_config.eos_token_id = None
    assert stop_tokens(model, tokenizer) == [2]


@pytest.mark.parametrize(
    ("expected", "text", "recall", "f1"),
    [
        ("the cat sat on the mat", "the cat is on the mat", 5 / 6, 5 / 6),
        ("Ada Quill was born in Ket.", "She was born in Ket, by the sea", 2 / 3, 4 / 7),
        ("running dogs", "the dog runs", 0.0, 0.0),  # with stemming 1 / 2 and 2 / 5
        ("an otter", "a cat", 0.0, 0.0),
        ("1984, in Paris", "Paris 1984", 1 / 3, 2 / 5),
        ("It's Anna's friends' studies", "the study of Anna s friend", 1 / 3, 1 / 3),  # with stemming 1 / 2 and 1 / 2
        ("don't", "do not", 0.0, 0.0),  # both cut "don't" into don and t, and both find "do" in neither
        ("well-known facts", "well known fact", 2 / 3, 2 / 3),  # with stemming 1 and 1
    ],
)
def test_rouge_l_is_that_of_the_rouge_score_package_without_stemming(
    expected: str, text: str, recall: float, f1: float
) -> None:
    """Values of rouge_score 0.1.2, `RougeScorer(["rougeL"], use_stemmer=False)`."""
    assert (rouge_l(expected, text), rouge_l_f1(expected, text)) == pytest.approx((recall, f1), abs=1e-6)


@pytest.mark.parametrize(
    ("expected", "text", "recall"),
    [
        ("The Distant Harbour", "The Distant Harbour", 1.0),
        ("The Distant Harbour", "the harbour, distant!", 2 / 3),  # "the distant" or "the harbour"
        ("The Distant Harbour", "", 0.0),
        ("The Distant Harbour", "It is called 'The very Distant old Harbour', I think.", 1.0),
        ("police killed the gunman", "police kill the gunman", 3 / 4),  # the examples of Lin (2004), section 3.1
        ("police killed the gunman", "the gunman kill police", 2 / 4),
        ("a b c d", "d c b a", 1 / 4),
        (") ] }", ") } ]", 2 / 3),
        ("...", "?", 0.0),
        ("Ångström über", "über ångström", 1 / 2),
        ("snake_case", "snake", 1 / 2),
    ],
)
def test_rouge_l_recall(expected: str, text: str, recall: float) -> None:
    assert rouge_l(expected, text) == pytest.approx(recall)


def test_common_subsequence_equals_brute_force() -> None:
    def brute(a: str, b: str) -> int:
        def subsequences(text: str) -> set[tuple[str, ...]]:
            return {c for n in range(len(text) + 1) for c in itertools.combinations(text, n)}

        return max(map(len, subsequences(a) & subsequences(b)))

    draw = torch.Generator().manual_seed(0)
    for _ in range(40):
        a, b = ("".join("xyz"[int(k)] for k in torch.randint(3, (7,), generator=draw)) for _ in range(2))
        assert common_subsequence(a, b) == brute(a, b)


def test_repeated_share_of_n_grams() -> None:
    assert repeated_share("a a a a".split(), 2) == pytest.approx(1 - 1 / 3)
    assert repeated_share("a b c d".split(), 2) == 0.0
    assert repeated_share("a b a b".split(), 2) == pytest.approx(1 / 3)
    assert repeated_share(["a"], 2) == repeated_share([], 2) == 0.0
    assert repeated_share("a a a a".split(), 4) == 0.0


@pytest.mark.parametrize(
    ("expected", "text", "common", "words", "said"),
    [
        ("the cat sat", "the cat sat", 3, 3, 3),
        ("the cat sat", "the cat", 2, 3, 2),
        ("the cat sat", "sat cat the", 1, 3, 3),
        ("the cat sat", "The CAT, sat!", 3, 3, 3),
        ("the cat sat", "", 0, 3, 0),
        ("the cat sat", "dogs run", 0, 3, 2),
        ("the cat sat", "the the the", 1, 3, 3),
        ("the cat sat on the mat", "the mat the cat sat on", 4, 6, 6),
        ("police killed the gunman", "police kill the gunman", 3, 4, 4),
        ("police killed the gunman", "the gunman kill police", 2, 4, 4),
        ("police killed the gunman", "the gunman police killed", 2, 4, 4),
        ("a b c d e f g", "a c e g", 4, 7, 4),
        ("a b c d e f g", "g f e d c b a", 1, 7, 7),
        ("badge G042", "the badge is g042.", 2, 2, 4),
        ("badge G042", "badge g 042", 1, 2, 3),
        ("The Silent Harbour", "the silent harbours", 2, 3, 3),
        ("well-known fact", "well known fact", 3, 3, 3),
        ("an otter", "an otter an otter an otter", 2, 2, 6),
        ("x", "y x y", 1, 1, 3),
        ("one two three four five", "zero one two six four seven", 3, 5, 6),
    ],
)
def test_rouge_l_of_twenty_pairs_worked_out_by_hand(
    expected: str, text: str, common: int, words: int, said: int
) -> None:
    recall, precision = common / words, common / said if said else 0.0
    assert rouge_l(expected, text) == pytest.approx(recall)
    both = recall + precision
    assert rouge_l_f1(expected, text) == pytest.approx(2 * recall * precision / both if both else 0.0)


def test_rouge_l_of_nothing_expected_is_zero() -> None:
    assert rouge_l("", "words") == rouge_l_f1("", "words") == rouge_l_f1("", "") == 0.0
