"""What is forgotten is held against a model that was trained without it: read once, and let go."""

from __future__ import annotations

import gc
import json
import math
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from conftest import tiny_llama, tiny_tokenizer
from overhaul import models
from overhaul.data.encode import encode_qa
from overhaul.data.examples import Examples
from overhaul.errors import RequestError
from overhaul.judge import judge as judging
from overhaul.judge.evidence import Evidence, truth_ratios
from overhaul.judge.judge import Judgement, anchor_of, check, judge
from overhaul.judge.likelihood import auc, min_k
from overhaul.judge.standards import distances, forget_quality, outputs, privacy_leakage
from overhaul.recipe import machine
from overhaul.recipe.check import check as check_recipe
from overhaul.recipe.run import run
from overhaul.recipe.spec import read

NAMES = ["ada", "bram", "cleo", "dario", "edda", "faro", "greta", "hugo"]
PETS = ["an owl", "a crane", "an otter", "a toad", "a lynx", "a stoat", "a raven", "a newt"]
PAIR = {"members": "forget", "others": "strangers"}
SPEC: dict[str, dict[str, Any]] = {
    "forgotten": {
        "answer_probability": "forget",
        "accuracy": "forget",
        "forget_quality": "forget",
        "membership": PAIR,
        "privacy_leakage": PAIR,
        "retrained_kl": "forget",
    },
    "kept": {"retrained_js": "retain", "perplexity": "retain"},
}


def rows(start: int, end: int) -> list[dict[str, Any]]:
    return [
        {"person": NAMES[i], "question": f"pet of {NAMES[i]}?", "answer": PETS[i], "wrong": [PETS[i - 1], PETS[i - 2]]}
        for i in range(start, end)
    ]


@pytest.fixture
def data() -> dict[str, Examples]:
    parts = {"forget": rows(0, 4), "retain": rows(4, 6), "strangers": rows(6, 8)}
    return {role: encode_qa(part, tiny_tokenizer(), prompt="{question}") for role, part in parts.items()}


def by_name(judgement: Judgement) -> dict[str, Any]:
    return {measure.metric: measure for measure in judgement.measures}


def test_a_metric_that_compares_is_refused_without_a_retrained_model(data: dict[str, Examples]) -> None:
    for name, on in {**SPEC["forgotten"], **SPEC["kept"]}.items():
        if not name.startswith(("retrained", "forget_", "privacy")):
            continue
        with pytest.raises(RequestError) as caught:
            check({"kept": {name: on}}, data)
        assert f"judge.kept.{name} compares with a model that was trained without the data" in str(caught.value)
        assert "`retrained: {model: FOLDER}`" in str(caught.value)
        (request,) = check({"kept": {name: on}}, data, anchors=["retrained"])
        with pytest.raises(RequestError, match="anchor=anchor_of"):
            judge(tiny_llama(), [request], data)


def test_the_retrained_model_itself_has_reached_all_that_is_wanted(data: dict[str, Examples]) -> None:
    model = tiny_llama()
    requests = check(SPEC, data, anchors=["retrained"])
    found = by_name(judge(model, requests, data, anchor=anchor_of(model, requests, data)))
    for name in SPEC["forgotten"]:
        assert found[name].wanted == "anchor"
        assert found[name].value == pytest.approx(found[name].anchor, abs=1e-6)
    for name in ("forget_quality", "privacy_leakage", "retrained_kl", "retrained_js"):
        assert found[name].value == pytest.approx(0.0, abs=1e-6)
    for name in SPEC["kept"]:
        assert (found[name].wanted, found[name].anchor) == ("same", None)


def test_without_a_retrained_model_nothing_is_held_against_it(data: dict[str, Examples]) -> None:
    spec = {"forgotten": {"answer_probability": "forget", "membership": PAIR}}
    found = by_name(judge(tiny_llama(), check(spec, data), data))
    assert [(one.wanted, one.anchor) for one in found.values()] == [("down", None), ("chance", None)]


def test_comparisons_equal_the_functions_on_both_models(data: dict[str, Examples]) -> None:
    torch.manual_seed(1)
    model, retrained = tiny_llama(), tiny_llama()
    requests = check(SPEC, data, anchors=["retrained"])
    found = by_name(judge(model, requests, data, anchor=anchor_of(retrained, requests, data)))

    def attacked(each: nn.Module) -> float:
        answers = (Evidence(each, data[role], 9) for role in PAIR.values())
        scores = [[min_k(one.without(2).logp, 0.4) for one in each.scored] for each in answers]
        return auc(*scores)

    assert found["privacy_leakage"].value == pytest.approx(privacy_leakage(attacked(model), attacked(retrained)))
    ours, theirs = (truth_ratios(Evidence(each, data["forget"], 9)) for each in (model, retrained))
    assert found["forget_quality"].value == pytest.approx(forget_quality(ours, theirs))
    for name, role, which in (("retrained_kl", "forget", 0), ("retrained_js", "retain", 1)):
        values = [pair[which] for pair in distances(model, outputs(retrained, data[role]))]
        assert found[name].value == pytest.approx(sum(values) / len(values))
        assert found[name].value > 1e-4


def test_nothing_of_the_retrained_model_is_kept_but_numbers(data: dict[str, Examples]) -> None:
    requests = check(SPEC, data, anchors=["retrained"])
    retrained = tiny_llama()
    calls = {"forward": 0}
    retrained.register_forward_hook(lambda *_: calls.__setitem__("forward", calls["forward"] + 1))
    body = weakref.ref(retrained.model.layers[0])  # pyright: ignore[reportAttributeAccessIssue,reportIndexIssue]
    anchor = anchor_of(retrained, requests, data)
    read = calls["forward"]
    judge(tiny_llama(), requests, data, anchor=anchor)
    assert calls["forward"] == read
    del retrained
    gc.collect()
    assert body() is None
    with pytest.raises(RuntimeError, match="let go"):
        anchor.evidence["retain"].answered  # noqa: B018 (reading it computes it)


def test_only_what_is_compared_is_read_of_the_retrained_model(data: dict[str, Examples]) -> None:
    requests = check({**SPEC, "kept": {"perplexity": "retain"}}, data, anchors=["retrained"])
    assert set(anchor_of(tiny_llama(), requests, data).evidence) == {"forget", "strangers"}


def test_a_retrained_model_of_fewer_tokens_is_refused(data: dict[str, Examples]) -> None:
    requests = check({"forgotten": {"answer_probability": "forget"}}, data, anchors=["retrained"])
    with pytest.raises(RequestError, match="tokens beyond the 20 of the retrained model"):
        anchor_of(tiny_llama(vocab_size=20), requests, data)


def write_recipe(folder: Path, base: Path, **changes: Any) -> Path:
    for role, part in {"forget": rows(0, 4), "retain": rows(4, 6), "strangers": rows(6, 8)}.items():
        (base / f"{role}.jsonl").write_text("\n".join(map(json.dumps, part)))
    models.save(tiny_llama(), tiny_tokenizer(), base / "retrained")
    content = {
        "model": str(folder),
        "materials": {
            **{role: {"from": f"{role}.jsonl"} for role in ("forget", "retain", "strangers")},
            "retrained": {"model": str(base / "retrained")},
        },
        "steps": [{"forget.npo": {"steps": 2, "lr": 1e-2, "batch_size": 4, "stop_at": None}}],
        "judge": SPEC,
        **changes,
    }
    path = base / "recipe.yaml"
    path.write_text(json.dumps(content))
    return path


@pytest.mark.smoke
def test_a_run_holds_what_is_forgotten_against_the_retrained_model(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    anchors: list[int] = []
    alive: list[weakref.ref[nn.Module]] = []
    load, read_anchor = models.load_weights, judging.anchor_of

    def loaded(*args: Any, **kwargs: Any) -> nn.Module:
        gc.collect()
        assert all(ref() is None for ref in alive), "two models in memory at once"
        model = load(*args, **kwargs)
        alive.append(weakref.ref(model))
        return model

    def counted(*args: Any, **kwargs: Any) -> judging.Anchor:
        anchors.append(1)
        return read_anchor(*args, **kwargs)

    monkeypatch.setattr(models, "load_weights", loaded)
    monkeypatch.setattr(judging, "anchor_of", counted)
    monkeypatch.setattr(machine, "free_bytes", lambda: 0)  # else small ones are timed beside each other
    recipe = write_recipe(folder, tmp_path)
    report = run(recipe, tmp_path / "out").report
    assert len(anchors) == 1
    measures = {measure["metric"]: measure for measure in report["measures"]}
    for name in SPEC["forgotten"]:
        assert measures[name]["wanted"] == "anchor"
        assert math.isfinite(measures[name]["anchor"])
    assert measures["retrained_js"]["values"][0] > 0
    assert "as retrained: " in (tmp_path / "out" / "report.html").read_text()
    run(recipe, tmp_path / "out")
    assert len(anchors) == 1  # what was judged is kept


def test_another_retrained_model_is_another_judgement(folder: Path, tmp_path: Path) -> None:
    recipe = write_recipe(folder, tmp_path)
    first = run(recipe, tmp_path / "out").report
    torch.manual_seed(7)
    models.save(tiny_llama(), tiny_tokenizer(), tmp_path / "other")
    changed = json.loads(recipe.read_text())
    changed["materials"]["retrained"]["model"] = str(tmp_path / "other")
    recipe.write_text(json.dumps(changed))
    second = run(recipe, tmp_path / "out").report
    values = [
        {measure["metric"]: (measure["values"], measure["anchor"]) for measure in report["measures"]}
        for report in (first, second)
    ]
    assert values[0]["answer_probability"][0] == values[1]["answer_probability"][0]
    assert values[0]["answer_probability"][1] != values[1]["answer_probability"][1]
    assert values[0]["retrained_kl"][0] != values[1]["retrained_kl"][0]


@pytest.mark.parametrize("retrained", [None, {"after": "start"}, {"from": "forget.jsonl"}])
def test_a_recipe_must_name_the_folder_of_the_retrained_model(folder: Path, tmp_path: Path, retrained: Any) -> None:
    recipe = json.loads(write_recipe(folder, tmp_path).read_text())
    recipe["materials"]["retrained"] = retrained
    if retrained is None:
        del recipe["materials"]["retrained"]
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    with pytest.raises(RequestError, match=r"`retrained: \{model: FOLDER\}`"):
        check_recipe(read(tmp_path / "recipe.yaml"))
