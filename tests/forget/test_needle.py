"""Needle: d numbers for each vector and every other bit as it was, whatever the optimizer's decay; and what is refused."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import nn

from conftest import tiny_gemma3, tiny_gpt2, tiny_llama
from contract import some_facts
from families import FAMILIES
from overhaul.errors import RequestError, RunError
from overhaul.forget.needle import needle
from overhaul.value_vectors import Location, ValueVectors

CASE = {
    "method": needle,
    "materials": lambda: {"model": tiny_llama(), "forget": some_facts(0, 8), "retain": some_facts(8, 8)},
    "knobs": {
        "k": 8, "contrast": 1.05, "steps": 12, "lr": 1e-2, "sigma": 0.01, "count": 2, "batch_size": 4, "stop_at": None,
    },
    "varied": {
        "edit": ("ascent", "noise"), "sigma": (0.0, 0.1), "at": ("", "1:3"), "count": (1, 2), "words": ("", "w, z"),
        "k": (2, 8), "contrast": (1.05, 1.3), "steps": (2, 3), "lr": (1e-2, 5e-2), "batch_size": (2, 8),
        "weight_decay": (0.0, 50.0), "schedule": ("linear", "constant"), "warmup": (0.0, 2.0),
        "stop_at": (4.0, None, {"lr": 0.5, "steps": 6}), "epochs": (1.0, 2.0, {"steps": None}),
        "retain_drop": (1e-7, None, {"lr": 0.5, "steps": 6}),
    },
    "moves": r"down_proj\.weight$",
}  # fmt: skip
PLACES = [{"layer": 1, "index": 3}, {"layer": 1, "index": 7}, {"layer": 3, "index": 40}]


def moved(before: dict[str, torch.Tensor], model: nn.Module) -> dict[str, int]:
    return {name: count for name, value in model.state_dict().items() if (count := int((value != before[name]).sum()))}


def at_places(model: nn.Module, rows: list[dict[str, Any]]) -> list[torch.Tensor]:
    own = ValueVectors.of(model, "test")
    return [own.vector(Location(**row)) for row in rows]


@pytest.mark.parametrize("edit", ["ascent", "noise", "zero"])
@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2, tiny_gemma3, FAMILIES["Mixtral"].build])
def test_the_numbers_of_the_vectors_move_and_every_other_bit_stays(build: Any, edit: str) -> None:
    model = build()
    mixed = "Mixtral" in type(model).__name__
    places = [{**row, "expert": n} for n, row in enumerate(PLACES)] if mixed else PLACES
    before = {name: value.clone() for name, value in model.state_dict().items()}
    needed = {name: p.requires_grad for name, p in model.named_parameters()}
    outcome = needle(
        model, some_facts(0, 8), vectors=places, edit=edit, steps=3, lr=0.05, weight_decay=0.1, stop_at=None
    )
    own = ValueVectors.of(model, "test")
    assert moved(before, model) == {own.writers[1].parameter: 64, own.writers[3].parameter: 32}
    for row in places:  # with their old numbers in their places, all is as it was
        place = Location(**row)
        name = own.writers[place.layer].parameter
        own.weight(name)[own.writers[place.layer].place(place)] = before[name][own.writers[place.layer].place(place)]
    assert not moved(before, model)
    assert outcome.facts["numbers_changed"] == 96 and outcome.facts["vectors"] == 3
    assert {name: p.requires_grad for name, p in model.named_parameters()} == needed
    assert not any("parametrizations" in name for name, _ in model.named_modules())
    assert [type(module) for module in model.modules()] == [type(module) for module in build().modules()]


def test_noise_has_its_size_and_zero_is_zero() -> None:
    model = tiny_llama(hidden_size=256)
    before = at_places(model, PLACES)
    needle(model, vectors=PLACES, edit="noise", sigma=0.5)
    added = torch.stack([b - a for a, b in zip(before, at_places(model, PLACES), strict=True)])
    assert float(added.std()) == pytest.approx(0.5, rel=0.1) and abs(float(added.mean())) < 0.1
    needle(model, vectors=PLACES, edit="zero")
    assert not any(bool(one.any()) for one in at_places(model, PLACES))


def test_the_ascent_goes_up_the_gradient_of_the_loss() -> None:
    """The first step of AdamW goes by the rate along the sign of the gradient, which is computed here by hand."""
    model, facts = tiny_llama(), some_facts(0, 4)
    weight: Any = model.get_parameter("model.layers.2.mlp.down_proj.weight")
    batch = next(facts.batches(4))
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    labels = batch["labels"][:, 1:]
    nll = nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), labels, ignore_index=-100)
    (gradient,) = torch.autograd.grad(nll, weight)
    column, wanted = weight.detach()[:, 5].clone(), gradient[:, 5].sign()
    needle(
        model, facts, at="2:5", sigma=0.0, steps=1, lr=0.01, batch_size=4, stop_at=None, warmup=0, schedule="constant"
    )
    step = weight.detach()[:, 5] - column
    clear = gradient[:, 5].abs() > 1e-6
    assert int(clear.sum()) > 20
    torch.testing.assert_close(step[clear], 0.01 * wanted[clear], rtol=0.05, atol=1e-5)


def test_noise_that_has_done_as_much_alone_is_followed_by_no_ascent() -> None:
    outcome = needle(tiny_llama(), some_facts(0, 4), at="2:5", sigma=0.1, stop_at=0.5)
    assert outcome.facts["steps"] == 0 and "noise alone" in outcome.facts["stopped_because"]


def test_where_training_diverges_the_model_is_whole_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def broken(*_: Any, **__: Any) -> Any:
        raise RunError("not finite")

    monkeypatch.setattr(sys.modules["overhaul.forget.needle"], "unlearn", broken)
    with pytest.raises(RunError):
        needle(model, some_facts(0, 4), at="2:5", stop_at=None)
    assert set(moved(before, model)) == {"model.layers.2.mlp.down_proj.weight"}
    assert model.state_dict().keys() == before.keys()


def same(model: nn.Module) -> nn.Module:
    return model


def zeroed(model: nn.Module) -> nn.Module:
    needle(model, at="1:3", edit="zero")
    return model


@pytest.mark.parametrize(
    ("change", "given", "said"),
    [
        (zeroed, {"edit": "zero"}, "they are zero already"),
        (nn.Module.bfloat16, {"edit": "noise", "sigma": 1e-9}, "too small for weights of size"),
        (same, {"forget": some_facts(0, 4), "sigma": 0.0, "stop_at": 0.5}, "the model as it is makes the answers"),
    ],
)
def test_where_no_number_changes_that_is_an_error(change: Any, given: dict[str, Any], said: str) -> None:
    model = change(tiny_llama())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(RunError, match=f"changed no number of 1 vectors: .*{said}"):
        needle(model, at="1:3", **given)
    assert not moved(before, model)


def with_nan(model: nn.Module) -> nn.Module:
    model.get_parameter("model.layers.1.mlp.down_proj.weight").data[0, 3] = torch.nan
    return model


@pytest.mark.parametrize(
    ("change", "given", "said"),
    [
        (nn.Module.half, {"edit": "noise", "sigma": 1e6}, "larger than torch.float16 holds"),
        (same, {"edit": "noise", "sigma": 1e38}, "larger than torch.float32 holds"),
        (with_nan, {"edit": "noise"}, "not finite .*layers.1.mlp.down_proj"),
        (with_nan, {"forget": some_facts(0, 4)}, "not finite .*layers.1.mlp.down_proj"),
        (zeroed, {"forget": some_facts(0, 4), "sigma": 0.0}, "the vectors are zero, so no rate"),
    ],
)
def test_what_would_not_be_finite_is_refused_before_it_is_written(change: Any, given: Any, said: str) -> None:
    model = change(tiny_llama())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(RequestError, match=said):
        needle(model, at="1:3", **given)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)


def test_a_token_that_the_model_lacks_is_refused_and_no_noise_stays() -> None:
    model = tiny_llama(vocab_size=20)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(RequestError, match="the embedding of LlamaForCausalLM ends at 19"):
        needle(model, some_facts(0, 8), at="1:3")
    assert not moved(before, model)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "an ascent needs the role `forget`"),
        ({"edit": "zero"}, "the role `forget` is missing"),
        ({"forget": some_facts(0, 4)}, "the role `retain` is missing"),
        ({"edit": "noise", "sigma": 0.0, "at": "0:0"}, "sigma=0 changes nothing"),
        ({"forget": some_facts(0, 4), "at": "9:0"}, "block 9 is none of the blocks 0 to 3"),
        ({"forget": some_facts(0, 4), "at": "0:0", "lr": 20.0}, "more than 100 times the size"),
        ({"forget": some_facts(0, 4), "retain": some_facts(4, 4), "k": 64}, "only 64 tokens"),
        ({"forget": some_facts(0, 4), "retain": some_facts(0, 4), "k": 8}, "nothing tells `forget` from `retain`"),
        ({"vectors": [], "edit": "zero"}, "`vectors` is empty"),
        ({"vectors": [3], "edit": "zero"}, "vector 1: 3 is no place"),
        ({"at": "1:" + "9" * 5000, "edit": "zero"}, "names no value vector"),
    ],
)
def test_what_cannot_be_meant_is_refused(given: dict[str, Any], said: str) -> None:
    model = tiny_llama()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(RequestError, match=said):
        needle(model, **given)
    assert not moved(before, model)
