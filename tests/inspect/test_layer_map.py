"""Layer map: exact between a model and itself or another basis of it, and equal to a least squares fit of plain states."""

from __future__ import annotations

import copy
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import examples_for, tiny_gpt2, tiny_llama, tiny_qwen3, tiny_tokenizer
from overhaul.data.encode import encode_qa
from overhaul.data.examples import Examples
from overhaul.data.tasks import people
from overhaul.errors import RequestError
from overhaul.inspect.layer_map import layer_map
from overhaul.models import save
from overhaul.stack import LayerStack
from tracing import hooks_of

CASE = {
    "method": layer_map,
    "materials": lambda: {"model": tiny_llama(), "other": another_folder(), "text": facts()},
    "varied": {"held_out": (0.2, 0.5), "skip_first": (0, 3), "ridge": (1e-8, 1.0)},
    "idle": {
        "batch_size": "texts that run together do not change the errors",
        "budget": "sums that are held together do not change the errors",
    },
}
TABLE = "error of the map between layers"


def texts(count: int = 24, length: int = 18) -> Examples:
    draw = torch.Generator().manual_seed(1)
    items = []
    for n in range(count):
        ids = torch.randint(4, 60, (length + n % 4,), generator=draw)
        items.append({"input_ids": ids, "labels": ids.clone()})
    return Examples(items, [{}] * count, tiny_tokenizer())


def facts() -> Examples:
    """Questions with answers, which a recipe can read."""
    return encode_qa(people()[:20], tiny_tokenizer(), prompt="{question}")


@functools.cache
def another_folder() -> Path:
    """Another Llama of the same words, which stays as long as the tests run."""
    torch.manual_seed(4)
    folder = Path(tempfile.mkdtemp()) / "other"
    return save(tiny_llama(num_hidden_layers=2, hidden_size=16), tiny_tokenizer(), folder, dtype="float32")


@pytest.fixture
def other() -> Path:
    return another_folder()


def errors(outcome: Any) -> Tensor:
    return torch.tensor([row[1:] for row in outcome.tables[TABLE].rows])


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2, tiny_qwen3])
def test_the_map_of_a_model_to_itself_is_the_identity(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    model = build()
    outcome = layer_map(model, save(model, tiny_tokenizer(), tmp_path / "same", dtype="float32"), texts())
    assert errors(outcome).diagonal().tolist() == pytest.approx([0.0] * 5, abs=1e-5)
    off_diagonal = errors(outcome)[~torch.eye(5, dtype=torch.bool)]
    assert off_diagonal.min() > 1e-2
    assert outcome.facts["distance_from_the_diagonal"] == 0
    assert outcome.layers["relative depth of the best layer"] == {-1: 0, 0: 0.25, 1: 0.5, 2: 0.75, 3: 1}


@torch.no_grad()
def test_another_basis_of_the_stream_is_no_difference(tmp_path: Path) -> None:
    # features in another order: an attention-and-MLP network reads and writes them all alike
    model = tiny_llama()
    order = torch.randperm(32, generator=torch.Generator().manual_seed(2))
    turned = copy.deepcopy(model)
    for name, weight in turned.named_parameters():
        if weight.ndim == 1 or "o_proj" in name or "down_proj" in name:
            weight.copy_(weight[order])
        else:
            weight.copy_(weight[:, order])
    outcome = layer_map(model, save(turned, tiny_tokenizer(), tmp_path / "turned", dtype="float32"), texts())
    assert errors(outcome).diagonal().tolist() == pytest.approx([0.0] * 5, abs=1e-5)


@torch.no_grad()
def test_errors_are_those_of_a_least_squares_fit_of_plain_states(other: Path) -> None:
    from transformers import AutoModelForCausalLM

    model, text = tiny_llama(), texts()
    outcome = layer_map(model, other, text, held_out=0.25)
    opened = AutoModelForCausalLM.from_pretrained(other)

    def states(net: nn.Module, layer: int, part: Examples) -> Tensor:
        found: list[Tensor] = []
        block = LayerStack.of(net).blocks[layer]
        hook = block.register_forward_hook(lambda *call: found.append(call[2][0, 1:].double()))
        for item in part.items:
            net(input_ids=item["input_ids"][None], use_cache=False)
        hook.remove()
        return torch.cat(found)

    fitted, judged = text[:18], text[18:]
    for m, n in ((0, 0), (3, 1), (1, 0)):
        known, target = states(model, m, fitted), states(opened, n, fitted)
        slopes = torch.linalg.lstsq(torch.nn.functional.pad(known, (0, 1), value=1.0), target).solution
        told = torch.nn.functional.pad(states(model, m, judged), (0, 1), value=1.0) @ slopes
        right = states(opened, n, judged)
        expected = ((right - told).norm(dim=1) / right.norm(dim=1)).mean()
        assert float(errors(outcome)[m + 1, n + 1]) == pytest.approx(float(expected), rel=1e-4)
        alone = ((right - target.mean(0)).norm(dim=1) / right.norm(dim=1)).mean()
        assert outcome.layers["error of the mean state"][n] == pytest.approx(float(alone), rel=1e-6)
    assert outcome.facts["tokens_fitted"] == sum(len(item["input_ids"]) - 1 for item in fitted.items)


def test_neither_batches_nor_the_budget_change_a_value_and_nothing_is_left_behind(other: Path) -> None:
    model, text = tiny_llama(), texts()
    weights = copy.deepcopy(model.state_dict())
    whole = layer_map(model, other, text)
    parts = layer_map(model, other, text, budget=1, batch_size=3)
    assert torch.allclose(errors(whole), errors(parts), rtol=1e-5)
    assert whole.model is None
    assert not hooks_of(model)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    words = tiny_tokenizer()
    words.add_tokens(["hello"])
    folder = save(tiny_llama(), words, tmp_path / "foreign", dtype="float32")
    with pytest.raises(RequestError, match="another tokenizer"):
        layer_map(tiny_llama(), folder, texts())


def test_what_cannot_be_mapped_is_refused_in_words(other: Path) -> None:
    with pytest.raises(RequestError, match="anything"):
        layer_map(tiny_llama(), other, texts(count=2, length=10))
    with pytest.raises(RequestError, match="two texts"):
        layer_map(tiny_llama(), other, texts(count=1))
    with pytest.raises(RequestError, match="images"):
        layer_map(tiny_llama(), other, examples_for("vit", 4))
    with pytest.raises(RequestError, match="longer than 40"):
        layer_map(tiny_llama(), other, texts(), skip_first=40)
