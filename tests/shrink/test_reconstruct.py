from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import FAMILIES, examples_for, tiny_llama
from contract import Case
from overhaul.blockwise import blockwise
from overhaul.data.examples import Examples
from overhaul.errors import RequestError
from overhaul.fit import Regime
from overhaul.masked import masked
from overhaul.reconstruction import reconstruct_block, samples_of
from overhaul.shrink.prune import prune
from overhaul.shrink.reconstruct import reconstruct
from overhaul.stack import LayerStack

FAST: dict[str, Any] = {"steps": 6, "batch_size": 4, "lr": 1e-2, "rank": 2, "samples": 8}


def pair(family: str = "llama", **changes: Any) -> tuple[nn.Module, nn.Module]:
    """A pruned model, and what it was before."""
    torch.manual_seed(0)
    dense = FAMILIES[family](**changes)
    model = copy.deepcopy(dense)
    prune(model, criterion="magnitude", sparsity=0.5)
    return model, dense


def given() -> dict[str, Any]:
    model, dense = pair(initializer_range=0.3)
    return {"model": model, "teacher": dense, "text": examples_for("llama", 8)}


CASE = Case(
    method=reconstruct,
    materials=given,
    knobs=FAST,
    varied={
        "trains": (["norms"], ["adapters"]), "form": ("mask_lora", "scale_lora"), "rank": (2, 3), "alpha": (4.0, 32.0),
        "steps": (6, 7), "batch_size": (3, 4), "lr": (3e-3, 1e-2), "warmup": (0.0, 2), "schedule": ("constant", "linear"),
        "weight_decay": (0.0, 0.5), "clip": (1e-3, None), "blocks": ("0", "last:2"), "samples": (4, 8),
    },
    apart={"random state": "the factors of the adapters are drawn"},
)  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "gpt2", "vit"])
def test_no_block_is_worse_than_before_and_zeros_stay(family: str) -> None:
    model, dense = pair(family)
    text = examples_for(family, 8)
    outcome = reconstruct(model, text, dense, **FAST)
    before, after = outcome.layers["error before"], outcome.layers["error after"]
    assert list(before) == list(range(len(LayerStack.of(model)))) and all(after[n] <= before[n] for n in before)
    assert outcome.facts["zeros_before"] == outcome.facts["zeros_after"] == pytest.approx(0.5, abs=1e-3)
    for name, mask in outcome.made["masks"].items():
        assert not model.get_parameter(name)[mask == 0].any()


def test_what_differs_in_nothing_has_no_error_and_is_left() -> None:
    model, _ = pair()
    before = copy.deepcopy(model.state_dict())
    outcome = reconstruct(model, examples_for("llama", 8), copy.deepcopy(model), **FAST)
    assert set(outcome.layers["error before"].values()) == {0.0} and outcome.facts["blocks_left_as_they_were"] == 4
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_the_error_is_that_of_the_pruned_block_on_what_enters_it() -> None:
    model, dense = pair()
    text = examples_for("llama", 8)
    wanted: list[float] = []
    changed, whole = LayerStack.of(model), LayerStack.of(dense)
    for site in blockwise(changed, text.batches(4), "changed", targets=False):
        total = count = 0
        for sample in site.inputs:
            ours = site.run(sample)[0]
            theirs = sample.calls.run(site.place, sample.state, block=whole.blocks[site.place], call=sample.call)[0]
            assert ours is not None and theirs is not None and sample.mask is not None
            kept = (ours - theirs)[sample.mask.bool()]
            total, count = total + float(kept.detach().square().sum()), count + kept.numel()
        wanted.append(total / count)
    outcome = reconstruct(model, text, dense, **{**FAST, "steps": 1, "lr": 1e-30})
    assert list(outcome.layers["error before"].values()) == pytest.approx(wanted, rel=1e-4)


class Lines(nn.Module):
    """A network whose two blocks are one matrix each."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(6, 6, bias=False)) for _ in range(2)])
        self.layers[0].load_state_dict({"0.weight": weight})

    def forward(self, hidden: Tensor) -> Tensor:
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


@pytest.mark.parametrize("form", ["weights", "mask_lora"])
def test_the_best_of_one_matrix_is_masked_least_squares_row_by_row(form: Any) -> None:
    draw = torch.Generator().manual_seed(0)
    weight, mask = torch.randn(6, 6, generator=draw), torch.rand(6, 6, generator=draw) > 0.4
    x = torch.randn(40, 1, 6, generator=draw) @ torch.randn(6, 6, generator=draw)
    goal = x @ weight.T
    model = Lines(weight * mask).requires_grad_(False)
    regime = Regime(steps=2500, batch_size=40, lr=0.03, warmup=0.0, schedule="cosine", clip=None)
    flow = blockwise(LayerStack.at(model, "layers"), [{"hidden": x}], "changed", targets=False)
    site = next(flow)
    with masked(model, ["layers.0.0"], form, {"layers.0.0.weight": mask}, rank=6, alpha=6.0):
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        reconstruct_block(site, samples_of(site), [goal], trained, regime)
    flow.close()
    flat, wanted = x.reshape(-1, 6), goal.reshape(-1, 6)
    best = torch.zeros(6, 6)
    for row, kept in enumerate(mask):
        best[row, kept] = torch.linalg.lstsq(flat[:, kept], wanted[:, row]).solution
    torch.testing.assert_close(model.get_parameter("layers.0.0.weight").data, best, rtol=0.02, atol=0.02)


def test_a_block_whose_training_diverged_is_left_as_it_was_pruned() -> None:
    model, dense = pair()
    before = copy.deepcopy(model.state_dict())
    outcome = reconstruct(model, examples_for("llama", 8), dense, **{**FAST, "lr": 1e30, "clip": None})
    assert outcome.facts["blocks_left_as_they_were"] == 4
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_bfloat16_is_trained_in_float32_and_stays_bfloat16() -> None:
    model, dense = pair(initializer_range=0.3)
    model, dense = model.bfloat16(), dense.bfloat16()
    outcome = reconstruct(model, examples_for("llama", 8), dense, **FAST)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert outcome.facts["zeros_after"] >= outcome.facts["zeros_before"]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"teacher": tiny_llama(num_hidden_layers=2)}, "has 4 blocks and teacher .* 2"),
        ({"teacher": FAMILIES["gpt2"]()}, "is a LlamaForCausalLM and teacher"),
        ({"teacher": tiny_llama(initializer_range=0.3)}, "so it is not the model before pruning"),
        ({"masks": {}}, "`masks` holds none"),
        ({"trains": []}, "trains is empty"),
        ({"trains": ["weights", "adapters"]}, "two ways to train the same projections"),
        ({"trains": ["head"]}, "lies in no block"),
        ({"text": Examples([], [])}, "the role `text` is empty"),
        ({"trains": ["biases"]}, "names nothing that LlamaForCausalLM has"),
    ],
)
def test_what_cannot_be_is_refused(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        reconstruct(**{**given(), **FAST, **changed})


@pytest.mark.parametrize(
    ("teacher", "said"),
    [
        (lambda: FAMILIES["vit"](num_hidden_layers=4), "is a LlamaForCausalLM and teacher"),
        (lambda: tiny_llama(hidden_size=64), "has 32 features in its stream and teacher"),
        (lambda: tiny_llama(vocab_size=20), "the embedding of LlamaForCausalLM ends at 19"),
    ],
)
def test_a_teacher_that_cannot_have_been_the_model_is_refused_in_words(teacher: Any, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        reconstruct(pair()[0], examples_for("llama", 4), teacher(), **FAST)
