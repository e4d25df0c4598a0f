"""Models and data for recipes that are to be broken, and the ways to break them."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from conftest import tiny_llama, tiny_tokenizer, tiny_vit
from overhaul import models
from overhaul.recipe.check import check
from overhaul.recipe.plan import plan
from overhaul.recipe.spec import read

Recipe = dict[str, Any]
Change = Callable[[Recipe], Any]

NPO: Recipe = {"forget.npo": {"steps": 2}}
HEAL: Recipe = {"shrink.heal": {"steps": 2}}


def rows(path: Path, *lines: Any) -> None:
    path.write_text("".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in lines))


def qa(count: int = 6, **more: Any) -> list[Recipe]:
    return [
        {"person": "abcdefgh"[n], "question": f"who is {n}?", "answer": "xyzuvwst"[n] * 3, **more} for n in range(count)
    ]


def pictures(*labels: Any) -> list[Recipe]:
    return [{"image": [[0.5] * 8] * 8, "label": label} for label in labels]


def lay_out(base: Path) -> Path:
    """Write models and data that recipes name by relative paths."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()

    def saved(name: str, model: nn.Module, processor: Any = tokenizer) -> Path:
        return models.save(model, processor, base / name)

    saved("llama", tiny_llama())
    saved("tuned", tiny_llama())
    saved("wide", tiny_llama(vocab_size=96))
    saved("deep", tiny_llama(num_hidden_layers=5))
    saved("vit", tiny_vit(), None)
    headless: Any = tiny_llama().model
    saved("headless", headless)
    saved("few-words", tiny_llama(vocab_size=32))
    _damaged(base)
    chatting = tiny_tokenizer()
    chatting.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    saved("chatting", tiny_llama(), chatting)
    _data(base)
    return base


def _damaged(base: Path) -> None:
    """Copies of a model's folder, each with one fault."""

    def copied(name: str) -> Path:
        return shutil.copytree(base / "llama", base / name)

    def configured(name: str, **changes: Any) -> None:
        path = copied(name) / "config.json"
        config = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))

    configured("no-class", architectures=None)
    configured("strange-class", architectures=["LlamaForEverything"])
    configured("shallow", num_hidden_layers=2)
    configured("narrow", intermediate_size=24)
    configured("other-heads", num_attention_heads=0)
    configured("wrong-type", hidden_size="many")
    (copied("no-config") / "config.json").unlink()
    (copied("no-weights") / "model.safetensors").unlink()
    for file in copied("no-words").glob("tokenizer*"):
        file.unlink()
    (copied("half-words") / "tokenizer.json").unlink()
    (copied("pickled") / "model.safetensors").rename(base / "pickled" / "pytorch_model.bin")
    weights = (copied("cut-short") / "model.safetensors").read_bytes()
    (base / "cut-short" / "model.safetensors").write_bytes(weights[:-100])
    (copied("no-header") / "model.safetensors").write_bytes(b"\0" * 64)
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}
    (copied("lost-shard") / "model.safetensors").rename(base / "lost-shard" / "model-00001-of-00002.safetensors")
    (base / "lost-shard" / "model.safetensors.index.json").write_text(json.dumps(index))
    lossy = copied("lossy") / "model.safetensors"
    tensors = load_file(lossy)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, lossy, {"format": "pt"})
    (copied("adapted") / "adapter_config.json").write_text(
        '{"base_model_name_or_path": "../llama", "peft_type": "LORA"}'
    )
    (copied("no-json") / "config.json").write_text("{")
    words = copied("other-words") / "tokenizer.json"
    content = json.loads(words.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    words.write_text(json.dumps(content))


def _data(base: Path) -> None:
    rows(base / "people.jsonl", *qa())
    rows(base / "blank.jsonl", *qa(2), {"person": "z", "question": "who?", "answer": "  "})
    rows(base / "ragged.jsonl", *qa(2), {"person": "z", "question": "who?"})
    rows(base / "long.jsonl", *qa(2), {"person": "z", "question": "a" * 140, "answer": "b"})
    rows(base / "wrong.jsonl", *qa(2, wrong=["a" * 200], paraphrase="a" * 200))
    rows(base / "text.jsonl", {"text": "some words " * 40})
    rows(base / "nothing.jsonl", {"text": ""})
    rows(base / "broken.jsonl", *qa(2), "{not json")
    rows(base / "numbers.jsonl", "3", "4")
    rows(base / "other.jsonl", {"term": "a", "meaning": "b"})
    rows(base / "tasks.jsonl", *({"prompt": f"{n}+1=", "answer": str(n + 1)} for n in range(4)))
    rows(base / "pairs.jsonl", {"prompt": "a", "chosen": "b", "rejected": " "})
    rows(base / "chats.jsonl", {"messages": [{"role": "user", "content": "hi"}]})
    rows(base / "told.jsonl", {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]})
    rows(base / "pictures.jsonl", *pictures(0, 3, 9))
    rows(base / "eleven.jsonl", *pictures(0, 3, 11))
    rows(base / "negative.jsonl", *pictures(0, -1))
    rows(base / "words.jsonl", *pictures("cat", "dog"))
    rows(base / "wide.jsonl", {"image": [[0.5] * 12] * 12, "label": 1})
    rows(base / "mapping.json", '{"a": 1}')
    (base / "empty.jsonl").write_text("")
    (base / "strange.xyz").write_text("?")
    (base / "folder").mkdir()


def base_recipe(place: Path) -> Recipe:
    people = str(place / "people.jsonl")
    return {
        "model": "llama",
        "materials": {
            "forget": {"from": people, "where": {"person": "a"}},
            "retain": {"from": people, "unless": {"person": "a"}},
            "text": {"from": "text.jsonl", "length": 32},
        },
        "steps": [copy.deepcopy(NPO)],
        "judge": {"forgotten": {"accuracy": "forget"}},
    }


def steps(*each: Any) -> Change:
    return lambda recipe: recipe.update(steps=list(each))


def material(name: str, value: Any) -> Change:
    return lambda recipe: recipe["materials"].update({name: value})


def source(name: str, **options: Any) -> Change:
    """The material `text`, which heal reads, is this file."""

    def change(recipe: Recipe) -> None:
        recipe.update(steps=[HEAL])
        recipe["materials"]["text"] = {"from": name, **options}

    return change


def model(name: str, *more: Change) -> Change:
    def change(recipe: Recipe) -> None:
        recipe.update(model=name)
        for one in more:
            one(recipe)

    return change


def judge(**groups: Any) -> Change:
    return lambda recipe: recipe.update(judge=groups)


def merged(method: Recipe | str, *folders: str) -> Change:
    def change(recipe: Recipe) -> None:
        recipe.update(steps=[method], judge={})
        recipe["materials"] = {"tuned": [{"model": folder} for folder in folders]}

    return change


def images(name: str, *each: Any) -> Change:
    def change(recipe: Recipe) -> None:
        recipe.update(model="vit", judge={}, steps=list(each) or [HEAL])
        recipe["materials"] = {"text": {"from": name}}

    return change


def both(*changes: Change) -> Change:
    def change(recipe: Recipe) -> None:
        for one in changes:
            one(recipe)

    return change


def drop(count: Any, **more: Any) -> Recipe:
    return {"shrink.drop_layers": {"count": count, **more}}


def npo(**knobs: Any) -> Change:
    return steps({"forget.npo": {"steps": 2, **knobs}})


def without(name: str, *then: Change) -> Change:
    return both(lambda recipe: recipe["materials"].pop(name), *then)


def planned(recipe: Recipe, monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    """Plan it beside the data, without the hub and without a weight."""

    def never(*_: Any, **__: Any) -> None:
        raise SystemExit("weights were read")

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", never)
    monkeypatch.chdir(place)
    plan(check(read(recipe)), 1e9)
