"""Recipes whose fault shows in what a step is given: the network that the steps before it hand on, and its examples."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from breaking import (
    HEAL,
    NPO,
    Change,
    base_recipe,
    both,
    drop,
    judge,
    lay_out,
    material,
    merged,
    planned,
    rows,
    steps,
    without,
)
from conftest import tiny_gpt2, tiny_resnet, tiny_tokenizer, tiny_vit
from overhaul import models
from overhaul.errors import RequestError
from overhaul.recipe import ahead, stand_ins
from overhaul.recipe.run import run

TEXT = {"from": "text.jsonl", "length": 32}
TWO = {"from": "two.jsonl"}
PROMPTS = {"from": "tasks.jsonl", "as": "prompt", "verify": "exact"}
ENSEMBLE = {"forget.sisa": {"shards": 2, "slices": 2, "epochs": 1, "batch_size": 4}}
CLASSES = {"forget.prompt_tokens": {"epochs": 1}}
RESIDUALS = {"rewire.attention_residuals": {"steps": 1}}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification

    base = lay_out(tmp_path_factory.mktemp("steps"))
    tokenizer = tiny_tokenizer()
    sizes: Any = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 48}
    sizes |= {"vocab_size": 64, "max_position_embeddings": 128, "pad_token_id": 0}
    models.save(tiny_gpt2(), tokenizer, base / "gpt2")
    models.save(tiny_resnet(), None, base / "resnet")
    models.save(tiny_vit(num_labels=2), None, base / "vit2")
    models.save(BertForMaskedLM(BertConfig(**sizes)).eval(), tokenizer, base / "masked")
    models.save(
        BertForSequenceClassification(BertConfig(**{**sizes, "num_labels": 3})).eval(), tokenizer, base / "classifier"
    )
    file = shutil.copytree(base / "llama", base / "damaged") / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(tensors, file, {"format": "pt"})

    def picture(n: int, **more: Any) -> dict[str, Any]:
        return {"image": [[n / 24, 0.5, 0, 0.1, 0.2, 0.3, 0.4, 0.5]] * 8, **more}

    rows(base / "two.jsonl", *(picture(n, label=n % 2) for n in range(24)))
    rows(base / "grouped.jsonl", *(picture(n + 30, label=n % 2, group="ab"[n // 2 % 2]) for n in range(8)))
    rows(base / "one-group.jsonl", *(picture(n + 40, label=n % 2, group="a") for n in range(8)))
    rows(base / "one-label.jsonl", *(picture(n + 50, label=0, group="ab"[n % 2]) for n in range(8)))
    rows(base / "ten.jsonl", *(picture(n, label=n % 10) for n in range(20)))
    rows(base / "unlabelled.jsonl", *(picture(n) for n in range(4)))
    rows(base / "preferences.jsonl", *({"prompt": "who?", "chosen": "abc", "rejected": "x" * n} for n in (1, 180)))
    rows(base / "preferred.jsonl", *({"prompt": "who?", "chosen": "abc", "rejected": "xy"} for _ in range(4)))
    rows(base / "mood.jsonl", *({"text": f"text {n} is good", "label": n % 3} for n in range(6)))
    return base


def of(model: str, materials: Mapping[str, Any], *each: Any) -> Change:
    """A recipe of its own: a model, materials (a text is a file) and steps."""

    def change(recipe: dict[str, Any]) -> None:
        found = {name: {"from": value} if isinstance(value, str) else value for name, value in materials.items()}
        recipe.update(model=model, judge={}, steps=list(each), materials=found)

    return change


def prune(**knobs: Any) -> dict[str, Any]:
    return {"shrink.prune": {"sparsity": 0.5, **knobs}}


def heal(**knobs: Any) -> dict[str, Any]:
    return {"shrink.heal": {"steps": 1, **knobs}}


def fair(calibration: str, **knobs: Any) -> Change:
    ensemble = {"forget.sisa": {**ENSEMBLE["forget.sisa"], **knobs}}
    return of("vit2", {"full": "two.jsonl", "calibration": calibration}, ensemble, "forget.fair_sisa")


MADE = material("made", {"made": "heal", "name": "answers"})
TEACHER = material("teacher", {"model": "tuned"})
MAP: Any = "inspect.layer_map"

BROKEN: dict[str, tuple[Change, str]] = {
    # what would change nothing
    "no block": (steps(drop(0)), "'count': 0.* would change nothing"),
    "a merge of the base": (merged("merge.ties", "llama"), "the tuned checkpoints are the base itself"),
    "a merge of the start": (
        lambda r: r.update(steps=["merge.ties"], judge={}, materials={"tuned": [{"after": "start"}]}), "the base itself"
    ),
    "a ramp of nothing": (merged({"merge.lines": {"alpha": 0, "beta": 0}}, "tuned"), "would change nothing"),
    "a scale that no weight has": (merged({"merge.ties": {"scale": 1e39}}, "tuned"), r"scale=1e\+39 is larger"),
    # parts that the network lacks
    "gates in GPT-2": (of("gpt2", {"text": TEXT}, prune(targets="mlp.gate")), "has no mlp.gate"),
    "half a layer": (of("gpt2", {"text": TEXT}, prune(targets="attention.q")), "cannot be taken by halves"),
    "experts": (steps(prune(targets="experts")), "has no experts"),
    "projections of a ResNet": (of("resnet", {"text": "ten.jsonl"}, prune()), "has no projections"),
    "adapters in a ResNet, learning from a teacher": (
        of("resnet", {"text": "ten.jsonl", "teacher": {"after": "start"}}, heal(weights="lora", target="teacher")),
        "no linear projections for LoRA",
    ),
    "residuals of a ResNet": (of("resnet", {"text": "ten.jsonl"}, RESIDUALS), "are not all pre-norm"),
    "residuals behind norms": (of("masked", {"text": TEXT}, RESIDUALS), "Step 1, rewire.attention_residuals"),
    "prompts in a ResNet": (of("resnet", {"full": "ten.jsonl"}, CLASSES), "these are no tokens"),
    "prompts in a language model": (of("llama", {"full": "people.jsonl"}, CLASSES), "reads text"),
    "an ensemble over running statistics": (of("resnet", {"full": "ten.jsonl"}, ENSEMBLE), "running statistics"),
    "answers of what says none": (
        of("masked", {"prompts": PROMPTS}, {"align.rlvr": {"steps": 1, "new_tokens": 2}}), "cannot generate text"
    ),
    "neighbours with one between that stays": (
        steps(drop(2, criterion="window", keep=[2])), "no 2 neighbouring blocks"
    ),
    # what an earlier step hands on
    "gates after a drop": (of("gpt2", {"text": TEXT}, drop(1), prune(targets="mlp.gate")), "Step 2.*has no mlp.gate"),
    "blocks after residuals": (steps(RESIDUALS, drop(2), drop(2)), "Step 3.*count=2"),
    "a fair rule for one network": (
        of("vit2", {"calibration": "grouped.jsonl"}, "forget.fair_sisa"), "reads the votes of an ensemble"
    ),
    "a fair rule without groups": (fair("ten.jsonl"), "line|classes|`group`"),
    "a fair rule for two that have none": (fair("two.jsonl"), "Step 2.*have no `group`"),
    "a fair rule for one group": (fair("one-group.jsonl"), "compares groups, and there are 1"),
    "a fair rule for one label": (fair("one-label.jsonl"), "has no example of label 1"),
    "a fair rule for many members": (fair("grouped.jsonl", shards=14, slices=1), "14 members have too many patterns"),
    "a fair rule for ten classes": (
        of("vit", {"full": "ten.jsonl", "calibration": "grouped.jsonl"}, ENSEMBLE, "forget.fair_sisa"), "tells 10 apart"
    ),
    "an ensemble twice": (of("vit", {"full": "ten.jsonl"}, ENSEMBLE, ENSEMBLE), "Step 2.*is an ensemble already"),
    "blocks of an ensemble": (
        of("vit", {"full": "ten.jsonl", "text": "ten.jsonl"}, ENSEMBLE, drop(1)), "Step 2.*No entry in the config"
    ),
    "prompts twice": (of("vit", {"full": "ten.jsonl"}, CLASSES, CLASSES), "Step 2.*has its prompts already"),
    "a class that is gone": (
        of("vit", {"full": "ten.jsonl", "forget": "one-label.jsonl"}, CLASSES, CLASSES), "Step 2.*forgotten already"
    ),
    "a merge with what was deeper": (
        both(material("tuned", [{"after": "start"}]), steps(drop(1), "merge.ties")), "Step 2.*do not have the same tensors"
    ),
    "a merge with other words after a training": (
        both(material("tuned", [{"model": "other-words"}]), steps(NPO, "merge.ties")), "Step 2.*number 2 words differently"
    ),
    # products
    "a product that a knob leaves out": (
        both(MADE, steps(heal(), {"shrink.drop_layers": {"count": 1, "text": "made"}})),
        "makes 'answers' for the material 'made' only with target: own_answers",
    ),
    "a product read as something else": (
        both(
            TEACHER, material("made", {"made": "heal", "name": "answers", "as": "preference"}),
            steps(heal(target="own_answers"), {"align.dpo": {"steps": 1, "preferences": "made"}}),
        ),
        "makes 'answers' as examples, and `as:` is for rows alone",
    ),
    "too many blocks, by a product": (
        both(TEACHER, MADE, steps(heal(target="own_answers"), {"shrink.drop_layers": {"count": 7, "text": "made"}})),
        "Step 2.*count=7",
    ),
    # nothing to learn
    "pictures without a class to heal on": (of("vit", {"text": "unlabelled.jsonl"}, heal()), "without a label"),
    "pictures without a class to forget": (
        of("vit", {"forget": "unlabelled.jsonl", "retain": "ten.jsonl"}, NPO), "'forget' holds examples without a label"
    ),
    "pictures without a class to dampen": (
        of("vit", {"forget": "unlabelled.jsonl", "retain": "ten.jsonl"}, "forget.ssd"), "without a label"
    ),
    "pictures without a class for prompts": (of("vit", {"full": "unlabelled.jsonl"}, CLASSES), "without a label"),
    "pictures without a class in shards": (of("vit", {"full": "unlabelled.jsonl"}, ENSEMBLE), "without a label"),
    "pictures without a class to look into": (of("vit", {"text": "unlabelled.jsonl"}, "inspect.depth_use"), "a label"),
    "pictures without a class to drop by": (
        of("vit", {"text": "unlabelled.jsonl"}, drop(1, criterion="perplexity")), "without a label"
    ),
    "pictures without a class for parties": (
        of("vit", {"forget": "unlabelled.jsonl"}, {"forget.vertical": {"recover": False}}), "needs images with a label"
    ),
    "pictures without a class to judge": (
        both(of("vit", {"text": "ten.jsonl", "more": "unlabelled.jsonl"}, heal()), judge(kept={"accuracy": "more"})),
        "judge.kept.accuracy reads the role 'more'",
    ),
    "prompts to heal on": (of("llama", {"text": PROMPTS}, heal()), "holds nothing that carries loss"),
    "prompts to rewire on": (of("llama", {"text": PROMPTS}, RESIDUALS), "holds nothing that carries loss"),
    "prompts in shards": (of("llama", {"full": PROMPTS}, ENSEMBLE), "holds nothing that carries loss"),
    "prompts to dampen": (of("llama", {"forget": PROMPTS, "retain": TEXT}, "forget.ssd"), "nothing that carries loss"),
    "pairs to heal on": (of("llama", {"text": "preferred.jsonl"}, HEAL), "'text' holds pairs of answers"),
    "pairs to drop by": (of("llama", {"text": "preferred.jsonl"}, drop(1, criterion="greedy")), "holds pairs of answers"),
    "pairs to look into": (of("llama", {"text": "preferred.jsonl"}, "inspect.depth_use"), "holds pairs of answers"),
    "pairs to map by": (of("llama", {"text": "preferred.jsonl", "other": {"model": "tuned"}}, MAP), "text` holds pairs"),
    "texts with a class to look into": (
        of("classifier", {"text": {"from": "mood.jsonl", "as": "classified"}}, "inspect.depth_use"), "texts with a class"
    ),
    "texts with a class to answer": (
        of(
            "classifier",
            {"text": {"from": "mood.jsonl", "as": "classified"}, "teacher": {"after": "start"}},
            heal(target="own_answers"),
        ),
        "texts with a class",
    ),
    "a rejected answer beyond the context": (
        of("llama", {"preferences": "preferences.jsonl"}, {"align.dpo": {"steps": 1}}), "'preferences' has an example of"
    ),
    # other models
    "tokens fewer than the model is wide": (
        both(material("other", {"model": "deep"}), material("text", {"from": "people.jsonl", "limit": 2}), steps(MAP)),
        "tokens to fit to, but LlamaForCausalLM is 32 wide|give at least two",
    ),
    "another model with other words": (both(material("other", {"model": "other-words"}), steps(MAP)), "another tokenizer"),
    # comparisons
    "a method that nobody can compare with": (
        lambda r: r.update(compare=["forget.npo", {"shrink.drop_layers": {"count": 1}}]), "within one verb"
    ),
    "one of two that cannot be": (
        without("retain", lambda r: r.update(compare=["forget.gradient_ascent", "forget.npo"], steps=[], judge={})),
        "the role `retain` is missing",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_stopped_by_plan(name: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = base_recipe(place)
    recipe["materials"]["text"] = dict(TEXT)
    change, said = BROKEN[name]
    change(recipe)
    with pytest.raises(RequestError, match=f"(?s){said}") as caught:
        planned(recipe, monkeypatch, place)
    assert len(str(caught.value)) < 1000


NEED_NUMBERS = {
    "gates in GPT-2", "half a layer", "experts", "residuals behind norms", "gates after a drop", "blocks after residuals",
    "prompts twice", "a class that is gone", "a merge with what was deeper",
}  # fmt: skip
"""What shows only where a network has numbers: of one too large to be drawn, the run finds it."""


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(BROKEN.keys() - NEED_NUMBERS))
def test_what_is_broken_about_a_large_network_is_stopped_too(
    name: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (ahead, stand_ins):
        monkeypatch.setattr(module, "DRAWN", 0)
    test_what_is_broken_is_stopped_by_plan(name, place, monkeypatch)


SOUND: dict[str, Change] = {
    "a drop, a drop and a heal": steps(drop(1), drop(1), HEAL),
    "residuals and a drop": steps(RESIDUALS, drop(2)),
    "an ensemble that learns and forgets": of(
        "vit2", {"full": "two.jsonl", "forget": {**TWO, "where": {"label": 1}, "limit": 2}}, ENSEMBLE
    ),
    "an ensemble and a fair rule": fair("grouped.jsonl"),
    "prompts and a class that goes": of("vit", {"full": "ten.jsonl", "forget": "one-label.jsonl"}, CLASSES),
    "a drop and a merge with it": both(
        material("tuned", [{"after": "1"}, {"after": "2"}]), steps(drop(1), NPO, {"merge.task_arithmetic": {}})
    ),
    "own answers that a drop is measured on": both(
        TEACHER, MADE, steps(heal(target="own_answers"), {"shrink.drop_layers": {"count": 1, "text": "made"}})
    ),
    "pairs that blocks are dropped by": of("llama", {"text": "preferred.jsonl"}, drop(1)),
}


@pytest.mark.parametrize("name", SOUND)
def test_what_is_sound_is_in_order(name: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = base_recipe(place)
    recipe["materials"]["text"] = dict(TEXT)
    SOUND[name](recipe)
    planned(recipe, monkeypatch, place)


def test_a_weight_that_is_no_number_stops_a_run_before_its_first_step(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = base_recipe(place)
    recipe["materials"]["text"] = dict(TEXT)
    recipe["model"] = "damaged"
    monkeypatch.chdir(place)
    with pytest.raises(RequestError, match=r"damaged/model.safetensors: 'model.layers.1.mlp.up_proj.weight' holds"):
        run(recipe, tmp_path / "out")
    assert not list((tmp_path / "out" / "steps").glob("*"))
