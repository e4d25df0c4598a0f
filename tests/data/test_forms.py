"""Forms: what each makes of a row, told from its columns or named, and how its examples are batched."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import numpy
import pytest
import torch
from PIL import Image

from conftest import tiny_llama
from overhaul.data.examples import IGNORED, collate, join, length
from overhaul.data.forms import FORMS
from overhaul.data.materials import Source, encode, examples, form_of, positions_of
from overhaul.errors import MaterialWarning, RequestError
from overhaul.forward import forward
from overhaul.objectives import pair_nll, sequence_nll

PAIRS = [
    {"prompt": "2 + 2", "chosen": "four", "rejected": "it is five", "by": "a"},
    {"prompt": "name a bird", "chosen": "a heron", "rejected": "ox", "by": "b"},
]
PICTURE = numpy.zeros((8, 8), dtype="float32")
ROWS: dict[str, dict[str, Any]] = {
    "text": {"text": "some words that are long enough for two pieces"},
    "qa": {"question": "who?", "answer": "me"},
    "chat": {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]},
    "classified": {"text": "good words", "label": 2},
    "image": {"image": PICTURE, "label": 3},
    "images": {"image": PICTURE, "group": "left"},
    "image_text": {"image": PICTURE, "text": "a square"},
    "preference": PAIRS[0],
    "prompt": {"prompt": "2 + 2", "answer": "4"},
    "rows": {"anything": [1, 2]},
}
"""A row of each form."""

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def talking(tokenizer: Any) -> Any:
    talking = copy.deepcopy(tokenizer)
    talking.chat_template = TEMPLATE
    return talking


@pytest.mark.parametrize("name", FORMS)
def test_every_form_makes_what_it_says(name: str, talking: Any) -> None:
    spec = Source.model_validate({"from": "rows", "as": name, "length": 16})
    made = encode([ROWS[name]] * 2, spec, talking)
    assert made.kind == FORMS[name].kind
    assert len(made) >= 2 and len(made.items) == len(made.rows)
    positions = positions_of(spec, ROWS[name])
    assert all(each > 0 for each in positions) and (len(positions) == len(made) / 2 or name in ("rows", "text"))


@pytest.mark.parametrize("name", [name for name, form in FORMS.items() if form.told is not None])
def test_a_form_is_told_from_its_columns(name: str) -> None:
    assert form_of(Source.model_validate({"from": "rows"}), [ROWS[name]]) == name


def test_a_form_that_is_not_there_is_named(tokenizer: Any) -> None:
    with pytest.raises(RequestError, match=r"no form 'preferense'. Did you mean 'preference'"):
        examples(PAIRS, tokenizer, form="preferense")
    with pytest.raises(RequestError, match="needs a tokenizer"):
        examples(PAIRS, None)


def test_a_preference_is_two_answers_to_one_prompt(tokenizer: Any) -> None:
    pairs = examples(PAIRS, tokenizer, prompt="q: {question} a:")
    for item, row in zip(pairs.items, PAIRS, strict=True):
        for prefix, answer in (("", row["chosen"]), ("other_", row["rejected"])):
            ids, labels = item[f"{prefix}input_ids"], item[f"{prefix}labels"]
            assert tokenizer.decode(ids) == f"<s>q: {row['prompt']} a: {answer}</s>"
            assert tokenizer.decode(labels[labels != IGNORED]) == f" {answer}</s>"
        assert length(item) == len(item["input_ids"]) + len(item["other_input_ids"])
    assert [row["by"] for row in pairs.rows] == ["a", "b"]
    assert pairs.rows[1]["answer"] == "a heron" and pairs.rows[1]["rejected"] == "ox"


def test_each_side_of_a_batch_of_pairs_is_padded_by_itself_and_scored_as_alone(tokenizer: Any) -> None:
    pairs, model = examples(PAIRS, tokenizer, prompt="{question}"), tiny_llama()
    batch = collate(pairs.items)
    assert batch["input_ids"].shape != batch["other_input_ids"].shape
    for prefix in ("", "other_"):
        mask = batch[f"{prefix}attention_mask"].bool()
        assert mask.sum(dim=1).tolist() == [len(item[f"{prefix}input_ids"]) for item in pairs.items]
        assert (batch[f"{prefix}labels"][~mask] == IGNORED).all() and (batch[f"{prefix}input_ids"][~mask] == 0).all()
    with torch.no_grad():
        chosen, rejected = pair_nll(forward(model, batch), batch)
    for prefix, both in (("", chosen), ("other_", rejected)):
        for n, item in enumerate(pairs.items):
            alone = collate([{name: item[f"{prefix}{name}"] for name in ("input_ids", "labels")}])
            with torch.no_grad():
                expected = sequence_nll(forward(model, alone), alone["labels"])
            torch.testing.assert_close(both[n : n + 1], expected, rtol=1e-4, atol=1e-4)


def test_a_column_as_long_as_the_other_sequence_is_padded_with_it() -> None:
    def item(first: int, second: int) -> dict[str, torch.Tensor]:
        return {
            "input_ids": torch.arange(first), "other_input_ids": torch.arange(second),
            "other_labels": torch.arange(second), "other_reference": torch.ones(second, 2), "nll": torch.tensor(1.0),
        }  # fmt: skip

    batch = collate([item(3, 3), item(5, 4)])
    assert batch["other_reference"].shape == (2, 4, 2) and batch["other_reference"][0, 3].tolist() == [0, 0]
    assert batch["other_labels"].tolist() == [[0, 1, 2, IGNORED], [0, 1, 2, 3]]
    assert batch["nll"].tolist() == [1.0, 1.0] and batch["input_ids"].shape == (2, 5)


def test_preferences_that_are_chats_go_through_the_template(talking: Any, tokenizer: Any) -> None:
    asked = [{"role": "user", "content": "hi"}]
    row = {
        "prompt": asked,
        "chosen": [*asked, {"role": "assistant", "content": "yes"}],
        "rejected": [{"role": "assistant", "content": "no no"}],
    }
    (item,) = examples([row], talking).items
    assert talking.decode(item["input_ids"]) == "user: hi\nassistant: yes\n"
    assert talking.decode(item["other_labels"][item["other_labels"] != IGNORED]) == "no no\n"
    with pytest.raises(RequestError, match="need a tokenizer with a chat template"):
        examples([row], tokenizer)
    with pytest.raises(RequestError, match="must end with an assistant turn"):
        examples([{**row, "chosen": asked}], talking)
    with pytest.raises(RequestError, match="begins with a turn of 'user' that is not the prompt's last one"):
        examples([{**row, "chosen": [{"role": "user", "content": "ho"}, row["chosen"][-1]]}], talking)
    with pytest.raises(RequestError, match="row 1: .rejected. is empty"):
        examples([{**PAIRS[0], "rejected": " "}], talking)


def test_a_prompt_carries_no_loss_and_keeps_its_verifier(tokenizer: Any) -> None:
    rows = [{"question": "17 + 25", "answer": "so 17 + 25 #### 42"}]
    options: dict[str, Any] = {"form": "prompt", "columns": {"prompt": "question"}, "prompt": "{question} ="}
    made = examples(rows, tokenizer, verify="gsm8k", **options)
    assert tokenizer.decode(made.items[0]["input_ids"]) == "<s>17 + 25 ="
    assert (made.items[0]["labels"] == IGNORED).all()
    assert made.rows[0] == {**rows[0], "prompt": "17 + 25 =", "verify": "gsm8k"}
    with pytest.raises(RequestError, match=r"no verifier 'gsm8'. Did you mean 'gsm8k'"):
        examples(rows, tokenizer, verify="gsm8", **options)
    with pytest.raises(RequestError, match="no column 'pattern'"):
        examples(rows, tokenizer, verify="regex", **options)


def test_images_without_a_class_keep_their_group_and_captions_their_tokens(tokenizer: Any) -> None:
    grouped = examples([ROWS["images"]] * 3, None)
    assert set(grouped.items[0]) == {"pixel_values"} and grouped.rows[0] == {"group": "left"}
    assert collate(grouped.items)["pixel_values"].shape == (3, 1, 8, 8)
    labelled = examples([ROWS["image"]], None, form="images")
    assert set(labelled.items[0]) == {"pixel_values"} and labelled.rows[0] == {"label": 3}
    captions = [{"image": PICTURE, "text": text} for text in ("a square", "no")]
    batch = collate(examples(captions, tokenizer).items)
    assert batch["pixel_values"].shape == (2, 1, 8, 8) and batch["attention_mask"].sum(dim=1).tolist() == [9, 3]


def test_a_processor_of_both_reads_pictures_and_captions(tokenizer: Any) -> None:
    class Both:
        def __init__(self) -> None:
            self.tokenizer = tokenizer

        def image_processor(self, images: Any, return_tensors: str) -> Any:
            return {"pixel_values": torch.from_numpy(numpy.array(images)).permute(2, 0, 1)[None].float()}

    rows = [{"image": Image.new("RGB", (4, 4), (255, 0, 0)), "text": "red"}]
    (item,) = examples(rows, Both()).items
    assert item["pixel_values"][:, 0, 0].tolist() == [255, 0, 0] and len(item["input_ids"]) == 4


def test_kinds_do_not_mix(tokenizer: Any) -> None:
    with pytest.raises(RequestError, match="cannot mix pairs and tokens"):
        join([examples(PAIRS, tokenizer), examples([ROWS["qa"]], tokenizer)])


def test_pairs_of_one_answer_are_counted(tokenizer: Any) -> None:
    same = {"prompt": "name a bird", "chosen": "a heron", "rejected": " a heron"}
    with pytest.warns(
        MaterialWarning, match=r"^rows: in 2 of 4 rows the chosen answer is the rejected one \(first: rows, row 2\)"
    ):
        examples([PAIRS[0], {**same, "rejected": same["chosen"]}, PAIRS[1], same], tokenizer)


@pytest.mark.parametrize("form", ["qa", "preference", "prompt"])
def test_a_tokenizer_without_an_end_is_said(form: str, tokenizer: Any) -> None:
    endless = copy.deepcopy(tokenizer)
    endless.eos_token = None
    with pytest.warns(
        MaterialWarning, match="the tokenizer has no EOS, so an answer that is learnt has no end"
    ) as said:
        examples([ROWS[form]], endless, form=form)
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", MaterialWarning)
        examples([ROWS[form]], tokenizer, form=form)
        examples([ROWS["text"]], endless)
