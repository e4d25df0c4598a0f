"""Texts with a class: encoded, judged, learnt and forgotten by models that classify sequences."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import overhaul as oh
from overhaul import models
from overhaul.data import lazy
from overhaul.data.examples import collate
from overhaul.errors import RequestError
from overhaul.forget.ssd import ssd
from overhaul.judge.evidence import Evidence
from overhaul.judge.metrics import METRICS
from overhaul.objectives import evaluate
from overhaul.recipe.check import check
from overhaul.recipe.spec import read
from overhaul.shrink.drop_layers import drop_layers
from overhaul.shrink.heal import heal
from test_encoders import SIZES, WORDS, sentences, words

CLASSES: dict[str, Any] = {"num_labels": 3, "pad_token_id": 0}


def classifier(family: str, **options: Any) -> Any:
    import transformers

    sizes = {
        "Bert": SIZES,
        "DistilBert": {"vocab_size": 64, "dim": 32, "hidden_dim": 48, "n_layers": 4, "n_heads": 4},
        "GPT2": {"vocab_size": 64, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 160},
    }[family]
    config = getattr(transformers, f"{family}Config")(**{**sizes, **CLASSES, **options})
    return getattr(transformers, f"{family}ForSequenceClassification")(config).eval()


def rows() -> list[dict[str, Any]]:
    """The class of a text is the number of its first word by threes."""
    return [{**row, "label": list[str](WORDS).index(row["text"].split()[0]) % 3} for row in sentences(24)]


def data() -> Any:
    return oh.examples(rows(), words(), form="classified", length=32)


FAMILIES = ["Bert", "DistilBert", "GPT2"]


def test_texts_keep_the_tokenizers_special_tokens_and_one_label_each() -> None:
    found = data()
    assert found.kind == "tokens" and found.classified
    assert [item["input_ids"].tolist() for item in found] == [words()(row["text"])["input_ids"] for row in rows()]
    assert collate(found.items[:5])["labels"].tolist() == [row["label"] for row in rows()[:5]]
    with pytest.raises(RequestError, match=r"A text has 11 tokens, more than `length: 8`"):
        oh.examples([{"text": "the cat sat on the mat and the dog", "label": 0}], words(), form="classified", length=8)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_does_not_change_what_a_classifier_says(family: str) -> None:
    model, examples = classifier(family, pad_token_id=5), data()
    (together,) = evaluate(model, lambda logits, _: logits, [collate(examples.items)])
    alone = [evaluate(model, lambda logits, _: logits, [collate([item])])[0] for item in examples.items]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_accuracy_healing_dropping_and_forgetting_work_on_classes(family: str, tmp_path: Path) -> None:
    model, examples = classifier(family), data()
    heal(model, examples, steps=60, batch_size=24, lr=5e-3, warmup=0, weight_decay=0)
    model.eval()
    with torch.no_grad():
        right = [int(model(item["input_ids"][None]).logits.argmax()) == int(item["labels"]) for item in examples]
    accuracy, count = METRICS["accuracy"].call(Evidence(model, examples, 10))
    assert (accuracy, count) == (pytest.approx(sum(right) / 24), 24) and accuracy > 0.6
    forget = examples.filter(lambda row: row["label"] == 1)
    known = METRICS["answer_probability"]
    before, _ = known.call(Evidence(model, forget, 10))
    done = ssd(model, forget, examples, alpha=1.5, lam=0.1)
    assert known.call(Evidence(model, forget, 10))[0] < before and done.model is model
    for criterion in ("block_influence", "perplexity"):
        drop_layers(model, examples, count=1, criterion=criterion)
    opened, _ = models.open_model(models.save(model, words(), tmp_path / "m"))
    assert sum(isinstance(part, nn.ModuleList) and len(part) == 2 for part in opened.modules())
    teacher = classifier(family)
    heal(opened, examples, teacher, target="teacher", steps=2)


@pytest.mark.parametrize(
    ("family", "options", "form", "message"),
    [
        ("Bert", {}, "text", r"does not fit BertForSequenceClassification\. The model is a classifier.*as: classified"),
        ("GPT2", {"pad_token_id": None}, "classified", "names no pad_token_id"),
    ],
)
def test_plan_refuses_what_does_not_fit(
    family: str, options: dict[str, Any], form: str, message: str, tmp_path: Path
) -> None:
    place = models.save(classifier(family, **options), words(), tmp_path / "m")
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, rows())))
    material = {"text": {"from": str(tmp_path / "texts.jsonl"), "as": form}}
    recipe = {
        "model": str(place),
        "materials": material,
        "steps": ["shrink.heal"],
        "judge": {"kept": {"accuracy": "text"}},
    }
    with pytest.raises(RequestError, match=message):
        check(read(recipe))


def test_a_language_model_does_not_take_classes_for_tokens(folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, rows())))
    material = {"text": {"from": str(tmp_path / "texts.jsonl"), "as": "classified"}}
    with pytest.raises(RequestError, match="no classifier"):
        check(read({"model": str(folder), "materials": material, "steps": ["shrink.heal"]}))
    with pytest.raises(RequestError, match="no classifier"):
        heal(models.open_model(folder)[0], data(), steps=1)
    with pytest.raises(RequestError, match="as: classified"):
        heal(classifier("Bert"), oh.examples(sentences(), words(), length=16), steps=1)


def test_a_large_file_of_classes_is_a_small_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [json.dumps({"text": f"ada {n}", "label": ("good", "bad")[n % 2]}) for n in range(20)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    small, numbers = oh.examples("a.jsonl", words(), base=tmp_path, form="classified"), {"good": 0, "bad": 1}
    monkeypatch.setattr(lazy, "LARGE", 100)
    for labels, first in ((None, [1, 0]), (numbers, [0, 1]), ({"good": 1, "bad": 0}, [1, 0])):
        made = oh.examples("a.jsonl", words(), base=tmp_path, form="classified", labels=labels)
        assert [int(item["labels"]) for item in made][:2] == first
        assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(made, small, strict=True))
