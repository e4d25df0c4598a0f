from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conftest import FAMILIES, examples_for, mean_loss, tiny_llama, tiny_resnet
from contract import Case, some_facts
from overhaul.adapters import adapters, projections
from overhaul.data.encode import answered, encode_qa, encode_text
from overhaul.data.examples import IGNORED, Examples, collate
from overhaul.errors import RequestError
from overhaul.fit import adamw, fit
from overhaul.forward import forward
from overhaul.objectives import cross_entropy
from overhaul.rollouts import own_answers, prompt_of
from overhaul.shrink.drop_layers import drop_layers
from overhaul.shrink.heal import heal
from overhaul.stack import LayerStack

FAST: dict[str, Any] = {"batch_size": 8, "lr": 1e-2, "warmup": 0}


CASE = Case(
    method=heal,
    materials=lambda: {"model": tiny_llama(num_hidden_layers=2), "text": some_facts(0, 8), "teacher": tiny_llama()},
    knobs={"steps": 4, "batch_size": 4, "lr": 1e-3},
    varied={
        "target": ("tokens", "teacher"),
        "weights": ("all", "lora"),
        "steps": (4, 3),
        "batch_size": (4, 3),
        "lr": (1e-3, 1e-2),
        "warmup": (0.0, 2),
        "schedule": ("constant", "linear"),
        "weight_decay": (1e-4, 0.5),
        "clip": (1e-3, None),
        "new_tokens": (1, 2, {"target": "own_answers"}),
        "rank": (4, 2, {"weights": "lora"}),
        "alpha": (16, 4, {"weights": "lora"}),
        "dropout": (0.0, 0.5, {"weights": "lora"}),
    },
)


@pytest.fixture
def questions(tokenizer: Any) -> Examples:
    rows = [{"question": f"{a} + {b}", "answer": str(a + b)} for a in range(4) for b in range(3)]
    return encode_qa(rows, tokenizer, prompt="{question} =")


@pytest.fixture
def texts(tokenizer: Any) -> Examples:
    return encode_text([{"text": "a plain text to be continued, piece by piece."}], tokenizer, length=16)


def cut(model: nn.Module, blocks: int = 1) -> nn.Module:
    shorter = copy.deepcopy(model)
    drop_layers(shorter, count=blocks, criterion="reverse")
    return shorter


@torch.no_grad()
def logits(model: nn.Module, examples: Examples) -> Tensor:
    return forward(model, collate(examples.items))


def kl(teacher: nn.Module, model: nn.Module, examples: Examples) -> float:
    keep = collate(examples.items)["labels"]
    ours, theirs = (F.log_softmax(logits(m, examples), dim=-1) for m in (model, teacher))
    if keep.ndim == 2:
        at = keep[:, 1:] != IGNORED
        ours, theirs = ours[:, :-1][at], theirs[:, :-1][at]
    return F.kl_div(ours, theirs, reduction="batchmean", log_target=True).item()


# targets


def test_healing_on_tokens_lowers_the_loss_of_every_family(family: str) -> None:
    model, examples = cut(FAMILIES[family]()), examples_for(family, 16)
    before = mean_loss(model, examples)
    outcome = heal(model, examples, steps=10, **FAST)
    assert outcome.model is model and not model.training
    assert mean_loss(model, examples) < before - 0.1
    assert outcome.facts["steps"] == len(outcome.curves["loss"]) == 10
    assert outcome.facts["examples"] == 80


def test_healing_on_a_teacher_brings_the_model_nearer_to_it(family: str) -> None:
    options: dict[str, Any] = {} if family == "resnet" else {"initializer_range": 0.2}
    teacher, examples = FAMILIES[family](**options), examples_for(family, 16)
    model = cut(teacher)
    before = kl(teacher, model, examples)
    outcome = heal(model, examples, teacher, target="teacher", steps=20, **FAST)
    assert outcome.curves["KL to the teacher"][0] > outcome.curves["KL to the teacher"][-1]
    # an untrained ResNet's running statistics say nothing of its activations, so only what it trains on can tell
    assert family == "resnet" or kl(teacher, model, examples) < 0.7 * before


def test_a_model_that_is_its_own_teacher_has_nothing_to_learn(family: str) -> None:
    teacher, examples = FAMILIES[family](), examples_for(family, 4)
    for parameter in teacher.parameters():
        parameter.requires_grad_(True)
    outcome = heal(copy.deepcopy(teacher), examples, teacher, target="teacher", steps=1, batch_size=4)
    first = outcome.curves["loss"][0]
    assert first == pytest.approx(0.0, abs=1e-5) if family != "resnet" else first > 0  # batch statistics in training


def test_the_teacher_is_read_once_and_left_as_it_was(questions: Examples) -> None:
    teacher: Any = tiny_llama()
    model = cut(teacher)
    state, calls = copy.deepcopy(teacher.state_dict()), []
    teacher.register_forward_hook(lambda *_: calls.append(1))
    heal(model, questions, teacher, target="teacher", steps=12, batch_size=4)
    # three batches of four, and one example to compare the vocabularies
    assert len(calls) == 4
    assert all(torch.equal(value, state[name]) for name, value in teacher.state_dict().items())
    assert not teacher.training and not any(p.grad is not None for p in teacher.parameters())


def test_healing_on_own_answers_is_training_on_what_the_teacher_says(questions: Examples) -> None:
    """A teacher that says one word with certainty, so that nothing is left to chance."""
    teacher: Any = tiny_llama(tie_word_embeddings=False)
    teacher.lm_head = nn.Linear(32, 64)
    with torch.no_grad():
        teacher.lm_head.weight.zero_()
        teacher.lm_head.bias.fill_(-100.0)
        teacher.lm_head.bias[10] = 0.0
    model = cut(tiny_llama())
    by_hand = copy.deepcopy(model)
    outcome = heal(model, questions, teacher, target="own_answers", steps=6, new_tokens=4, **FAST)
    said = [answered(prompt_of(item).tolist(), [10] * 4, None) for item in questions]
    for mine, expected in zip(outcome.made["answers"], said, strict=True):
        assert all(torch.equal(mine[name], expected[name]) for name in ("input_ids", "labels"))
    data = {"text": Examples(said, questions.rows)}
    fit(by_hand, [cross_entropy("text")], data, steps=6, batch_size=8, lr=1e-2, optimizer=adamw((0.9, 0.99), 1e-4))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(model.parameters(), by_hand.parameters(), strict=True))


# own answers


def test_loss_falls_on_the_answer_alone_against_a_hand_made_template(tokenizer: Any) -> None:
    (item,) = encode_qa([{"question": "1 + 2", "answer": "3"}], tokenizer, prompt="Q: {question} A:")
    prompt = tokenizer("q: 1 + 2 a:")["input_ids"]
    answer = [*tokenizer(" 3", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    assert item["input_ids"].tolist() == [*prompt, *answer]
    assert item["labels"].tolist() == [IGNORED] * len(prompt) + answer


def test_own_answers_keep_the_prompts_and_carry_loss_on_the_new_answers_only(questions: Examples) -> None:
    answers = own_answers(tiny_llama(), questions, new_tokens=5)
    assert len(answers) == len(questions) and answers.processor is questions.processor
    for mine, given, row in zip(answers, questions, answers.rows, strict=True):
        prompt = prompt_of(given)
        assert torch.equal(mine["input_ids"][: len(prompt)], prompt)
        assert (mine["labels"][: len(prompt)] == IGNORED).all()
        said = mine["labels"][len(prompt) :]
        assert torch.equal(said, mine["input_ids"][len(prompt) :])
        # an answer of full length did not end; a shorter one did
        assert 1 <= len(said) <= 5 and (len(said) == 5 or said[-1] == 2)
        assert row["answer"] == answers.processor.decode(said[said != 2])


def test_own_answers_depend_on_the_seed_alone_and_leave_the_generator_as_it_was(questions: Examples) -> None:
    teacher = tiny_llama()
    before = torch.get_rng_state()
    first = own_answers(teacher, questions)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    assert own_answers(teacher, questions).digest() == first.digest()
    torch.manual_seed(1)
    assert own_answers(teacher, questions).digest() != first.digest()


def test_own_answers_are_drawn_at_the_papers_temperature_and_nucleus() -> None:
    """A head that always gives the probabilities .5 .3 .16 .04: at T = 0.9 the last lies outside the nucleus of 0.95."""
    teacher: Any = tiny_llama(tie_word_embeddings=False)
    wanted = torch.tensor([0.5, 0.3, 0.16, 0.04])
    teacher.lm_head = nn.Linear(32, 64)
    with torch.no_grad():
        teacher.lm_head.weight.zero_()
        teacher.lm_head.bias.fill_(-100.0)
        teacher.lm_head.bias[10:14] = wanted.log()
    asked = {"input_ids": torch.tensor([1, 9]), "labels": torch.tensor([IGNORED, 9])}
    answers = own_answers(teacher, Examples([asked] * 40, [{}] * 40, Ends()), new_tokens=50)
    drawn = torch.cat([item["input_ids"][1:] for item in answers])
    shares = torch.bincount(drawn, minlength=64)[10:14] / len(drawn)
    expected = (wanted[:3] ** (1 / 0.9)) / (wanted[:3] ** (1 / 0.9)).sum()
    assert len(drawn) == 2000 and shares[3] == 0
    torch.testing.assert_close(shares[:3], expected, atol=0.04, rtol=0)


class Ends:
    """A tokenizer that knows its EOS and no more."""

    eos_token_id = 2

    def decode(self, tokens: list[int]) -> str:
        return str(tokens)


def test_the_second_half_of_a_text_counts_as_its_answer(texts: Examples) -> None:
    answers = own_answers(tiny_llama(), texts)
    assert [len(prompt_of(item)) for item in texts] == [len(item["input_ids"]) // 2 for item in texts]
    for mine, given in zip(answers, texts, strict=True):
        half = len(given["input_ids"]) // 2
        assert torch.equal(mine["input_ids"][:half], given["input_ids"][:half])
        assert (mine["labels"][:half] == IGNORED).all() and (mine["labels"][half:] != IGNORED).all()


# adapters


@pytest.mark.parametrize("name", ["llama", "gpt2", "vit"])
def test_adapters_train_alone_and_are_merged_into_a_plain_model(name: str, tmp_path: Path) -> None:
    model: Any = cut(FAMILIES[name]())
    kind, examples = type(model), examples_for(name, 16)
    stack = LayerStack.of(model)
    before = {n: p.clone() for n, p in model.named_parameters()}
    loss = mean_loss(model, examples)
    outcome = heal(model, examples, weights="lora", rank=4, alpha=8, steps=20, **FAST)
    assert type(outcome.model) is kind and outcome.model is model
    assert list(before) == [n for n, _ in model.named_parameters()]
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {f"{n}.weight" for n in projections(model)}
    assert all(0 <= stack.depth(n) < 3 for n in changed)
    assert all(p.requires_grad for p in model.parameters())
    assert mean_loss(model, examples) < loss
    model.save_pretrained(tmp_path)
    again = kind.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again, examples), logits(model, examples))


def test_adapters_have_the_rank_asked_for_and_sit_on_every_projection() -> None:
    model = tiny_llama()
    outcome = heal(model, examples_for("llama", 4), weights="lora", rank=2, steps=1)
    # q, k, v, o, gate, up, down: rank * (inputs + outputs) each, in four blocks
    sizes = [(32, 32), (32, 16), (32, 16), (32, 32), (32, 48), (32, 48), (48, 32)]
    assert outcome.facts["trained_parameters"] == 4 * 2 * sum(a + b for a, b in sizes)
    assert len(projections(model)) == 4 * 7


def test_adapters_are_gone_after_an_error() -> None:
    model = tiny_llama()
    names = [name for name, _ in model.named_modules()]
    frozen = next(model.parameters()).requires_grad_(False)
    with pytest.raises(ZeroDivisionError), adapters(model, 2, 4, 0.0):
        raise ZeroDivisionError
    assert [name for name, _ in model.named_modules()] == names
    assert not frozen.requires_grad and sum(not p.requires_grad for p in model.parameters()) == 1


def test_merging_changes_no_output() -> None:
    model, examples = tiny_llama(), examples_for("llama", 8)
    with adapters(model, 4, 8, 0.0) as adapted:
        fit(adapted, [cross_entropy("text")], {"text": examples}, steps=5, lr=1e-2)
        inside = logits(adapted, examples)
    torch.testing.assert_close(logits(model, examples), inside, atol=1e-5, rtol=0)


# bad requests


@pytest.mark.parametrize("target", ["teacher", "own_answers"])
def test_a_missing_or_foreign_teacher_is_named(target: Any, questions: Examples) -> None:
    with pytest.raises(RequestError, match="no `teacher` is given"):
        heal(tiny_llama(), questions, target=target)
    with pytest.raises(RequestError, match="the teacher has 80 outputs and the model 64"):
        heal(tiny_llama(), questions, tiny_llama(vocab_size=80), target=target)


def test_empty_text_is_named() -> None:
    with pytest.raises(RequestError, match="`text` is empty"):
        heal(tiny_llama(), Examples([], []))


def test_images_have_no_own_answers_and_convolutions_no_adapters() -> None:
    model, images = tiny_resnet(), examples_for("resnet", 4)
    with pytest.raises(RequestError, match='For images, and texts with a class, take target="teacher"'):
        heal(model, images, copy.deepcopy(model), target="own_answers")
    with pytest.raises(RequestError, match="no linear projections for LoRA"):
        heal(model, images, weights="lora")


def test_zeros_that_training_filled_are_counted(questions: Examples) -> None:
    model = tiny_llama(num_hidden_layers=1)
    weight = model.get_parameter("model.layers.0.mlp.up_proj.weight")
    with torch.no_grad():
        weight.zero_()
    outcome = heal(model, questions, steps=1, **FAST)
    assert 0 < outcome.facts["zeros_filled"] == weight.numel() - int((weight == 0).sum())


@pytest.mark.parametrize(
    ("teacher", "said"), [(lambda: tiny_llama(vocab_size=20), "ends at 19"), (FAMILIES["vit"], "it reads images")]
)
def test_a_teacher_that_cannot_read_the_text_is_refused_in_words(teacher: Any, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        heal(tiny_llama(), some_facts(0, 8), teacher(), target="teacher", steps=1, **FAST)
