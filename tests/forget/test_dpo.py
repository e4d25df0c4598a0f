from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from conftest import examples_for, mean_loss, tiny_gpt2, tiny_llama, tiny_tokenizer, tiny_vit
from contract import Case
from forget.unlearning import BRIEF, TRAINING, knowing
from learnt import by_heart
from overhaul.data.encode import encode_chat, encode_qa, encode_text
from overhaul.data.examples import IGNORED, Batch, Examples, collate
from overhaul.errors import RequestError
from overhaul.forget.dpo import REFUSALS, beside, dpo, dpo_loss, dpo_term, refused
from overhaul.forward import forward
from overhaul.references import reference_nll

KNOWN = {"who is ada?": "a clerk", "where?": "in ket, by the sea", "how old": "41", "her pet is?": "an otter"}
ROWS = [{"question": question, "answer": answer} for question, answer in KNOWN.items()]
EASY: dict[str, Any] = {"batch_size": 4, "lr": 2e-3, "warmup": 0, "schedule": "constant"}


CASE = Case(
    method=dpo,
    materials=knowing,
    knobs=BRIEF,
    varied={
        **TRAINING,
        "refusals": (["no idea"], ["never heard of it"]),
        "beta": (0.1, 2.0),
        "retain_term": ("gdr", "none"),
        "retain_weight": (1.0, 3.0),
    },
)


def asked(*rows: dict[str, str]) -> Examples:
    return encode_qa(rows, tiny_tokenizer(), prompt="{question}")


def taught(kind: str = "llama") -> nn.Module:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"num_hidden_layers": 2} if kind == "llama" else {"n_layer": 2}
    model = {"llama": tiny_llama, "gpt2": tiny_gpt2}[kind](initializer_range=0.2, **shape)
    return by_heart(model, {"all": asked(*ROWS)}, steps=60, batch_size=4, lr=1e-2)


def pairs(model: nn.Module, forget: Examples) -> tuple[Examples, Examples]:
    """The forget examples with all columns of `dpo_term`, and the refusals."""
    instead = refused(forget, REFUSALS)
    columns = {**beside(instead), "reference_nll": reference_nll(model, forget, 4)}
    for name, values in {**columns, "other_reference_nll": reference_nll(model, instead, 4)}.items():
        forget = forget.with_column(name, values)
    return forget, instead


def test_a_pair_costs_what_its_sequences_cost_alone() -> None:
    model, other = taught(), tiny_llama(num_hidden_layers=2, initializer_range=0.2)
    forget, instead = pairs(model, asked(*ROWS))
    term = dpo_term("forget", 0.3)
    nll, refusal = (reference_nll(other, part, 1) for part in (asked(*ROWS), instead))
    known, refusal_known = (reference_nll(model, part, 1) for part in (asked(*ROWS), instead))
    expected = dpo_loss(nll, known, refusal, refusal_known, 0.3)

    def loss(batch: Batch) -> float:
        return term.loss(forward(other, batch), batch).item()

    assert loss(collate(forget.items)) == pytest.approx(float(expected.sum()), rel=1e-5)
    singles = [loss(collate([item])) for item in forget.items]
    assert singles == pytest.approx(expected.tolist(), rel=1e-5)
    assert loss(collate(forget.items[::-1])) == pytest.approx(sum(singles), rel=1e-5)


def test_it_starts_at_its_constant() -> None:
    model = taught()
    forget, _ = pairs(model, asked(*ROWS))
    batch, term = collate(forget.items), dpo_term("forget", 0.1)
    start = term.loss(forward(model, batch), batch).item() / term.count(batch)
    assert start == pytest.approx(20 * math.log(2), rel=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_answer_is_forgotten_and_the_refusal_is_preferred(kind: str) -> None:
    model, (gone, kept) = taught(kind), (asked(*ROWS[:2]), asked(*ROWS[2:]))
    instead = refused(gone, REFUSALS)
    before = mean_loss(model, instead)
    outcome = dpo(model, gone, kept, steps=30, stop_at=None, **EASY)
    facts: Any = outcome.facts
    assert facts["forget_nll_after"] > 0.5 > 0.2 > facts["forget_nll_before"]
    assert mean_loss(model, instead) < before
    assert mean_loss(model, kept) < 0.5
    assert outcome.curves["DPO"][-1] < outcome.curves["DPO"][0]


def test_refusals_are_encoded_as_answers_are() -> None:
    forget = asked(*ROWS)
    instead = refused(forget, ["no idea"])
    again = asked(*({**row, "answer": "no idea"} for row in ROWS))
    for ours, theirs in zip(instead.items, again.items, strict=True):
        assert torch.equal(ours["input_ids"], theirs["input_ids"]) and torch.equal(ours["labels"], theirs["labels"])


def test_each_question_gets_one_of_the_refusals_by_the_seed() -> None:
    many = asked(*(ROWS * 8))
    tokenizer: Any = many.processor
    said = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        labels = [item["labels"] for item in refused(many, ["no", "never"]).items]
        said.append([tokenizer.decode(y[y != IGNORED], skip_special_tokens=True).strip() for y in labels])
    assert set(said[0]) == {"no", "never"}
    assert said[0] == said[1] != said[2]


def test_a_chat_closes_a_refusal_by_its_template() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'][0] }}: {{ m['content'] }};{% endfor %}{% if add_generation_prompt %}a: {% endif %}"  # noqa: E501
    talk = [{"role": "user", "content": "who?"}, {"role": "assistant", "content": "ada"}]
    (item,) = refused(encode_chat([{"messages": talk}], tokenizer), ["no idea"]).items
    assert tokenizer.decode(item["labels"][item["labels"] != IGNORED]) == "no idea;"
    assert tokenizer.decode(item["input_ids"]) == "u: who?;a: no idea;"


def test_what_cannot_be_refused_is_an_error() -> None:
    with pytest.raises(RequestError, match=r"these are images\. Use forget\.npo"):
        dpo(tiny_vit(), examples_for("vit", 4))
    with pytest.raises(RequestError, match="these examples carry none"):
        dpo(tiny_llama(), examples_for("llama", 4))
    with pytest.raises(RequestError, match="example 0 of `forget` is a text without a question"):
        dpo(tiny_llama(), encode_text([{"text": "ada lives in ket"}], tiny_tokenizer()))
    with pytest.raises(RequestError, match=r"refusals=\[\] is not possible"):
        dpo(tiny_llama(), asked(*ROWS), refusals=[])
