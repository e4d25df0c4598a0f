"""Prompt and answer as one text: the ids of the whole, and where in them the answer begins, for every kind of tokenizer."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import pytest
import torch

from conftest import tiny_llama
from made_tokenizers import KINDS, byte_level, metaspace, word_piece
from overhaul.data import boundary
from overhaul.data.boundary import following, joined, without_overlap
from overhaul.data.encode import encode_qa, encode_text
from overhaul.data.examples import IGNORED, PROMPT_OVERLAP, Examples
from overhaul.data.materials import Source, encode, examples
from overhaul.errors import MaterialWarning, RequestError
from overhaul.fit import fit
from overhaul.forget.dpo import refused
from overhaul.judge.evidence import Evidence
from overhaul.objectives import cross_entropy
from overhaul.rollouts import prompt_of, rollouts

PROMPTS = (
    "Question: {question}\nAnswer:",
    "[INST] {question} [/INST]",
    "<|user|>\n{question}</s>\n<|assistant|>\n",
    "A: {question} ",
    "{question}\n\n",
)
ANSWERS = ("In Marrowick.", "yes", "é", "🦦", "\nno")


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return KINDS[request.param]()


def learnt(item: dict[str, torch.Tensor]) -> list[int]:
    return item["labels"][item["labels"] != IGNORED].tolist()


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_question_with_its_answer_has_the_tokens_of_the_whole_text(prompt: str, tokenizer: Any) -> None:
    rows = [{"question": "where?", "answer": answer} for answer in ANSWERS]
    made = encode_qa(rows, tokenizer, prompt=prompt)
    for item, row in zip(made.items, made.rows, strict=True):
        text = row["prompt"] + ("" if prompt[-1].isspace() or row["answer"][0].isspace() else " ") + row["answer"]
        ids = tokenizer(text)["input_ids"]
        closing = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        assert item["input_ids"].tolist() == ids + closing
        said = learnt(item)
        assert item["input_ids"].tolist()[-len(said) :] == said and len(said) < len(item["input_ids"])
        # nothing of the answer stands before it, and nothing of the prompt but the overlap within
        begun = tokenizer.decode(item["input_ids"][: -len(said)], skip_special_tokens=True)
        overlap = row.get(PROMPT_OVERLAP, "")
        tight = "".join(tokenizer.decode(tokenizer(row["prompt"])["input_ids"], skip_special_tokens=True).split())
        assert "".join(begun.split()) + "".join(overlap.split()) == tight
        if overlap:
            assert row["prompt"].endswith(overlap)


def test_what_is_told_from_bytes_is_told_from_offsets(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(0)
    pieces = [*"ab Z.é🦦\n7:", "  ", "</s>", "<s>", "yes", " where", "In Marrowick", "\u00a0", "\u3000"]
    said = ["".join(draw.choices(pieces, k=draw.randrange(12))) for _ in range(800)]
    pairs = [boundary.joined(one, other) for one, other in itertools.pairwise(said) if other.strip()]
    texts, spans = zip(*pairs, strict=True)
    told = boundary.find(tokenizer, texts, spans)
    monkeypatch.setattr(boundary, "MANY", len(texts) + 1)
    assert told == boundary.find(tokenizer, texts, spans)


def test_the_answer_gains_no_space(tokenizer: Any) -> None:
    (item,) = encode_qa([{"question": "hi", "answer": "yes"}], tokenizer, prompt="<|user|>\n{question}\n").items
    assert tokenizer.decode(learnt(item), skip_special_tokens=True).lstrip(" ") == "yes"
    spaced = encode_qa([{"question": "hi", "answer": "yes"}], tokenizer, prompt="[INST] {question} [/INST]").items[0]
    assert "▁▁" not in "".join(tokenizer.convert_ids_to_tokens(spaced["input_ids"].tolist()))


@pytest.mark.parametrize("scheme", ["first", "always", "never", None])
def test_a_model_that_learnt_the_whole_text_knows_the_answer(scheme: str | None) -> None:
    tokenizer = metaspace(scheme)
    texts = ["[INST] where does Ada live? [/INST] In Marrowick.</s>", "[INST] hi [/INST] Hello.</s>"]
    ids = [torch.tensor(tokenizer(text)["input_ids"]) for text in texts]
    model = tiny_llama(vocab_size=len(tokenizer), num_hidden_layers=1)
    read = Examples([{"input_ids": one, "labels": one} for one in ids], [{}, {}], tokenizer)
    torch.manual_seed(0)
    fit(model, [cross_entropy("text")], {"text": read}, steps=60, batch_size=2, lr=1e-2)
    rows = [{"question": "where does Ada live?", "answer": "In Marrowick."}, {"question": "hi", "answer": "Hello."}]
    asked = encode_qa(rows, tokenizer, prompt="[INST] {question} [/INST]")
    evidence = Evidence(model.eval(), asked, limit=2)
    assert min(one.probability for one in evidence.scored) > 0.9
    assert [one.text for one in evidence.answered] == ["In Marrowick.", "Hello."]


def test_special_tokens_are_there_once() -> None:
    row = {"question": "hi", "answer": "yes"}
    for tokenizer in (metaspace("first"), metaspace(None)):
        plain = encode_qa([row], tokenizer, prompt="[INST] {question} [/INST]").items[0]["input_ids"].tolist()
        written = encode_qa([row], tokenizer, prompt="<s>[INST] {question} [/INST]").items[0]["input_ids"].tolist()
        ended = encode_qa([{**row, "answer": "yes</s>"}], tokenizer, prompt="[INST] {question} [/INST]").items[0]
        assert (plain.count(1), plain.count(2)) == (written.count(1), written.count(2)) == (1, 1)
        assert ended["input_ids"].tolist() == plain
    bert = word_piece()
    ids = encode_qa([row], bert).items[0]["input_ids"].tolist()
    assert (ids[0], ids[-1]) == (2, 3) and ids.count(2) == ids.count(3) == 1


def test_a_text_that_writes_bos_has_it_once() -> None:
    tokenizer = metaspace("first")
    for count in (1, 2):
        plain, written = ([{"text": f"{mark}[INST] hi [/INST] yes"}] * count for mark in ("", "<s>"))
        ours, theirs = encode_text(plain, tokenizer), encode_text(written, tokenizer)
        assert ours.rows == theirs.rows and ours.items[0]["input_ids"].tolist().count(1) == 1
        assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(ours.items, theirs.items, strict=True))


def test_a_token_over_the_boundary_is_the_answers_and_is_said() -> None:
    tokenizer = byte_level()
    rows = [{"question": "where?", "answer": answer} for answer in ("yes", "no", "\nno")]
    with pytest.warns(MaterialWarning, match=r"in 2 of 3 rows the boundary .* inside a token .*' ' before 'yes'"):
        made = examples(rows, tokenizer, prompt="Q: {question} A: ")
    first = made.items[0]
    assert tokenizer.convert_ids_to_tokens(learnt(first)) == ["Ġyes", "</s>"]
    assert tokenizer.decode(prompt_of(first)) == "Q: where? A:"
    assert [row.get(PROMPT_OVERLAP) for row in made.rows] == [" ", " ", None]
    across = byte_level(across=True)
    (row,) = encode_qa([{"question": "", "answer": "In Marrowick."}], across).rows
    assert row[PROMPT_OVERLAP] and row["prompt"].endswith(row[PROMPT_OVERLAP])
    assert without_overlap(row[PROMPT_OVERLAP] + " In Marrowick.", row) == " In Marrowick."
    assert without_overlap("yes", first_row := made.rows[0]) == without_overlap(" yes", first_row) == "yes"


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "across" not in kind])
def test_a_prompt_without_an_answer_has_the_tokens_before_one(kind: str) -> None:
    tokenizer = KINDS[kind]()
    for prompt in PROMPTS:
        rows = [{"question": "where?", "prompt": "where?", "answer": "yes"}]
        spec = Source.model_validate({"from": "rows", "as": "prompt", "prompt": prompt})
        asked = encode(rows, spec, tokenizer)
        answered = encode_qa(rows, tokenizer, prompt=prompt)
        assert torch.equal(asked.items[0]["input_ids"], prompt_of(answered.items[0]))


@pytest.mark.parametrize("kind", ["byte level", "metaspace, always", "slow"])
def test_what_is_written_later_is_one_text_too(kind: str) -> None:
    tokenizer = KINDS[kind]()
    rows = [{"question": "hi", "answer": "yes"}]
    asked = encode_qa(rows, tokenizer, prompt="[INST] {question} [/INST]")
    torch.manual_seed(0)
    (item,) = refused(asked, ["no"]).items
    whole = [*tokenizer("[INST] hi [/INST] no")["input_ids"], tokenizer.eos_token_id]
    assert item["input_ids"].tolist() == whole
    assert following(tokenizer, " no") == whole[-len(following(tokenizer, " no")) - 1 : -1]
    pairs = [{"prompt": "hi", "chosen": "yes", "rejected": "no"}]
    (pair,) = examples(pairs, tokenizer, prompt="[INST] {question} [/INST]").items
    assert torch.equal(pair["input_ids"], asked.items[0]["input_ids"])
    assert torch.equal(pair["other_input_ids"], item["input_ids"])


def test_rollouts_and_samples_leave_out_the_end_of_a_prompt() -> None:
    tokenizer = byte_level()
    rows = [{"question": "hi", "answer": "yes"}]
    asked = encode_qa(rows, tokenizer, prompt="{question}: ")
    model = tiny_llama(vocab_size=len(tokenizer), num_hidden_layers=1)
    torch.manual_seed(0)
    fit(model, [cross_entropy("text")], {"text": asked}, steps=40, batch_size=1, lr=1e-2)
    (drawn,) = rollouts(model.eval(), asked, new_tokens=4, temperature=0.01, seed=0).rows
    assert drawn["rollout"] == "yes" and drawn["ended"]
    evidence = Evidence(model, asked, limit=1)
    assert evidence.answered[0].text == "yes" and evidence.sampled(2, 0.01)[0].texts == ["yes", "yes"]
    assert math.isclose(evidence.scored[0].probability, 1.0, abs_tol=0.1)


def test_an_answer_of_which_no_token_is_made_is_refused() -> None:
    rows = [{"question": "hi", "answer": "yes"}, {"question": "hi", "answer": "\x00"}]
    with pytest.raises(RequestError, match=r"rows, row 2: the tokenizer makes no token of its answer"):
        examples(rows, word_piece())


def test_one_space_stands_between_where_there_is_none() -> None:
    assert joined("A:", "b") == ("A: b", (2, 4, 4))
    assert joined("A: ", "b")[0] == joined("A:", " b")[0] == "A: b"
    assert joined("A:\n", "b")[0] == "A:\nb" and joined("", "b") == ("b", (0, 1, 1))
