from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import FAMILIES, examples_for, tiny_llama, tiny_resnet
from contract import Case, some_facts
from overhaul.errors import RequestError
from overhaul.fit import fit
from overhaul.fit.optimizers import sgd
from overhaul.objectives import cross_entropy
from overhaul.recipe.run import run
from overhaul.shrink._zeros import Chosen, Parts, training_parts, zeros
from overhaul.shrink.prune import prune
from overhaul.shrink.retrain import retrain

FAST: dict[str, Any] = {"steps": 3, "batch_size": 4, "lr": 1e-2, "rank": 2}


def pruned(family: str = "llama", sparsity: float = 0.5, **changes: Any) -> nn.Module:
    torch.manual_seed(0)
    model = FAMILIES[family](**changes)
    prune(model, criterion="magnitude", sparsity=sparsity)
    return model


CASE = Case(
    method=retrain,
    materials=lambda: {"model": pruned(), "text": some_facts(0, 8)},
    knobs=FAST,
    varied={
        "trains": (["norms"], ["head"]), "form": ("mask_lora", "scale_lora"), "rank": (2, 3), "alpha": (4.0, 32.0),
        "steps": (3, 4), "batch_size": (3, 4), "lr": (1e-3, 1e-2), "warmup": (0.0, 2), "schedule": ("constant", "linear"),
        "weight_decay": (0.0, 0.5), "clip": (1e-3, None),
    },
    apart={"random state": "the factors of the adapters are drawn"},
)  # fmt: skip


def of(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same(before: dict[str, Tensor], model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])}


@pytest.mark.parametrize("family", FAMILIES)
def test_zeros_stay_and_only_the_parts_move(family: str) -> None:
    if family == "resnet":
        with pytest.raises(RequestError, match="has no projections"):
            retrain(FAMILIES[family](), examples_for(family, 8))
        return
    model, text = pruned(family), examples_for(family, 8)
    before = of(model)
    outcome = retrain(model, text, trains=["norms", "adapters"], **FAST)
    assert outcome.facts["zeros_before"] == outcome.facts["zeros_after"] == pytest.approx(0.5, abs=1e-3)
    for name, mask in outcome.made["masks"].items():
        assert not model.get_parameter(name)[mask == 0].any() and torch.equal(mask != 0, before[name] != 0)
    norms = {name for name in before if "norm" in name.lower() or "ln_" in name}
    assert before.keys() - norms - outcome.made["masks"].keys() <= same(before, model) < before.keys()


def test_norms_alone_are_well_under_one_percent() -> None:
    model = pruned(hidden_size=64, intermediate_size=256)
    before = of(model)
    outcome = retrain(model, some_facts(0, 8), trains=["norms"], **FAST)
    moved = set(before) - same(before, model)
    assert moved and all("norm" in name for name in moved)
    assert outcome.facts["trained_parameters"] == sum(before[name].numel() for name in moved)
    assert outcome.facts["trained_share"] < 0.01


def test_training_the_masked_weights_is_descent_on_the_masked_gradient() -> None:
    model, text = pruned(), some_facts(0, 4)
    kept = zeros("a test", model, None)
    by_hand = copy.deepcopy(model)
    parts = Parts(trains=("weights",))
    with training_parts(model, Chosen.of("a test", model, parts), parts, kept) as learnt:
        assert all("parametrizations" in name for name in learnt)
        fit(model, [cross_entropy("text")], {"text": text}, steps=1, batch_size=4, lr=0.1, clip=None, optimizer=sgd())
    fit(by_hand, [cross_entropy("text")], {"text": text}, steps=1, batch_size=4, lr=0.1, clip=None, optimizer=sgd(),
        trainable=lambda name: name in kept)  # fmt: skip
    for name, mask in kept.items():
        torch.testing.assert_close(model.get_parameter(name), by_hand.get_parameter(name) * mask)


def test_an_n_of_m_pattern_stays() -> None:
    model = pruned()
    prune(model, criterion="magnitude", pattern="2:4")
    retrain(model, some_facts(0, 8), **FAST)
    for name in zeros("a test", model, None):
        weight = model.get_parameter(name)
        assert int((weight.view(-1, 4) == 0).sum(1).min()) >= 2


def test_lora_fills_the_zeros_and_says_so() -> None:
    outcome = retrain(pruned(), some_facts(0, 8), form="lora", **FAST)
    assert outcome.facts["zeros_after"] < 0.01 < outcome.facts["zeros_before"]


@pytest.mark.parametrize(
    ("build", "knobs", "said"),
    [
        (tiny_llama, {}, "nothing was pruned that could be kept"),
        (pruned, {"trains": ["biases"]}, "names nothing that LlamaForCausalLM has: no biases"),
        (pruned, {"masks": {"model.layers.0.mlp.up_proj.weight": torch.ones(3, 3)}}, r"is \(3, 3\), and the model has"),
        (pruned, {"masks": {"nowhere.weight": torch.ones(3, 3)}}, "has no such weight there"),
        (pruned, {"masks": {"model.layers.0.mlp.up_proj.weight": torch.zeros(48, 32)}}, "filled the zeros"),
        (tiny_resnet, {}, "has no projections"),
    ],
)
def test_what_cannot_be_kept_is_refused(build: Any, knobs: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        retrain(build(), some_facts(0, 4), **{**FAST, **knobs})


def test_masks_that_a_step_made_are_read_by_the_next(folder: Path, tmp_path: Path) -> None:
    rows = [json.dumps(dict(row)) for row in some_facts(0, 8).rows]
    (tmp_path / "facts.jsonl").write_text("\n".join(rows))
    materials = {"text": {"from": str(tmp_path / "facts.jsonl"), "as": "qa"}}
    masks = {"made": "shrink.prune", "name": "masks"}
    prunes = {"shrink.prune": {"criterion": "magnitude", "sparsity": 0.3}}
    trains = {"shrink.retrain": {"steps": 2, "batch_size": 2, "rank": 2, "lr": 1e-3}}
    recipe = {"model": str(folder), "materials": {**materials, "masks": masks}, "steps": [prunes, trains]}
    done = run(recipe, tmp_path / "out")
    facts = done.report["steps"][-1]["facts"]
    assert facts["zeros_before"] == facts["zeros_after"] == pytest.approx(0.3, abs=0.01)
    with pytest.raises(RequestError, match="masks reads tensors, but the material 'masks' is data"):
        run({**recipe, "materials": {**materials, "masks": materials["text"]}}, tmp_path / "bad")
    with pytest.raises(RequestError, match="text reads data, but the material 'masks' is tensors"):
        run({**recipe, "steps": [prunes, {"shrink.retrain": {"text": "masks"}}]}, tmp_path / "bad")
