from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import FAMILIES, examples_for, tiny_llama
from overhaul.adapters import projections
from overhaul.data.examples import collate
from overhaul.forward import forward
from overhaul.masked import masked

FORMS: Any = ["weights", "mask_lora", "scale_lora", "lora_prune", "lora"]


def pruned(family: str = "llama", share: float = 0.5) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model and its masks; half of the entries of every projection are 0."""
    torch.manual_seed(0)
    model = FAMILIES[family]()
    masks = {
        f"{name}.weight": torch.rand_like(model.get_parameter(f"{name}.weight")) > share for name in projections(model)
    }
    with torch.no_grad():
        for name, mask in masks.items():
            model.get_parameter(name).mul_(mask)
    return model, masks


def say(model: nn.Module, family: str = "llama") -> Tensor:
    with torch.no_grad():
        return forward(model, collate(examples_for(family, 4).items))


def moved(model: nn.Module) -> None:
    """Everything that requires gradients becomes something else."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))


@pytest.mark.parametrize("form", FORMS)
def test_at_the_start_the_model_says_what_it_said(form: Any) -> None:
    model, masks = pruned()
    before = say(model)
    with masked(model, projections(model), form, masks, rank=4):
        if form == "scale_lora":  # a sum of four products of 1 / 2
            torch.testing.assert_close(say(model), before, rtol=0, atol=1e-6)
        else:
            assert torch.equal(say(model), before)
    assert torch.equal(say(model), before)


@pytest.mark.parametrize("family", ["llama", "gpt2", "vit"])
@pytest.mark.parametrize("form", ["weights", "mask_lora", "scale_lora"])
def test_what_is_merged_is_what_was_trained_and_zeros_stay(form: Any, family: str) -> None:
    model, masks = pruned(family)
    before = copy.deepcopy(model)
    with masked(model, projections(model), form, masks, rank=3):
        moved(model)
        inside = say(model, family)
    torch.testing.assert_close(say(model, family), inside, rtol=0, atol=1e-5)
    assert not torch.equal(say(before, family), inside)
    for name, mask in masks.items():
        assert not model.get_parameter(name)[~mask].any()


def test_lora_prune_loses_at_the_end_what_the_mask_takes_and_lora_fills_the_zeros() -> None:
    ends: dict[str, nn.Module] = {}
    inside: dict[str, Tensor] = {}
    for form in ("lora_prune", "lora"):
        model, masks = pruned()
        torch.manual_seed(1)
        with masked(model, projections(model), form, masks, rank=3):
            moved(model)
            inside[form] = say(model)
        ends[form] = model
    assert torch.equal(inside["lora_prune"], inside["lora"]), "trained alike"
    torch.testing.assert_close(say(ends["lora"]), inside["lora"], rtol=0, atol=1e-5)
    assert (say(ends["lora_prune"]) - inside["lora_prune"]).abs().max() > 1e-3
    for name, mask in masks.items():
        full, cut = (ends[form].get_parameter(name) for form in ("lora", "lora_prune"))
        assert bool(full[~mask].any()) and not cut[~mask].any()
        torch.testing.assert_close(full[mask], cut[mask])


def test_the_gradient_of_the_second_factor_is_that_of_the_masked_weight() -> None:
    layer, mask = nn.Linear(5, 4, bias=False), torch.rand(4, 5) > 0.5
    model, x, rank, alpha = nn.Sequential(layer), torch.randn(7, 5), 2, 3.0
    with masked(model, ["0"], "mask_lora", {"0.weight": mask}, rank=rank, alpha=alpha):
        moved(model)
        effective = layer.weight.detach().requires_grad_()
        (g,) = torch.autograd.grad((x @ effective.T).square().sum(), effective)
        change: Any = layer.parametrizations.weight[0]  # pyright: ignore[reportIndexIssue, reportAttributeAccessIssue]
        (found,) = torch.autograd.grad(model(x).square().sum(), change.B)
        torch.testing.assert_close(found, alpha / rank * (mask * g) @ change.A.T)


def test_factors_are_float32_over_bfloat16_and_parameters_are_the_same_objects_in_the_same_order() -> None:
    model, masks = pruned("gpt2")
    model.bfloat16()
    before = list(model.named_parameters())
    with masked(model, projections(model), "mask_lora", masks, rank=2):
        trained = [p for p in model.parameters() if p.requires_grad]
        assert {p.dtype for p in trained if p.ndim == 2 and 2 in p.shape} == {torch.float32}
    after = list(model.named_parameters())
    assert [name for name, _ in before] == [name for name, _ in after]
    assert all(a is b for (_, a), (_, b) in zip(before, after, strict=True))
    assert all(p.requires_grad for _, p in after)


def test_a_tied_weight_stays_tied_and_is_changed_once() -> None:
    model: Any = tiny_llama()
    before = model.lm_head.weight.detach().clone()
    with masked(model, ["lm_head"], "lora", {}, rank=2, alpha=2.0):
        moved(model)
        effective = model.lm_head.weight.detach().clone()
        assert torch.equal(model.model.embed_tokens.weight, effective)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, effective) and not torch.equal(effective, before)


def test_an_error_inside_leaves_a_plain_model() -> None:
    model, masks = pruned()
    with pytest.raises(RuntimeError, match="stop"), masked(model, projections(model), "mask_lora", masks):
        raise RuntimeError("stop")
    assert not [name for name, _ in model.named_parameters() if "parametrizations" in name]
