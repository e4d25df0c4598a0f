from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import examples_for
from fit.test_loop import KNOBS, small, weights
from overhaul.data.examples import Batch
from overhaul.fit import fit
from overhaul.fit.optimizers import adamw
from overhaul.objectives import Penalty, Term, answer_tokens, cross_entropy
from overhaul.stack import LayerStack


def test_an_optimizer_can_be_built_by_module_and_depth() -> None:
    """Matrices of linear layers at rates that halve with depth, everything else by AdamW at another."""
    model = small()
    before = weights(model)

    def build(model: nn.Module, trained: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
        stack = LayerStack.of(model)
        owners = {name: model.get_submodule(name.rpartition(".")[0]) for name in trained}
        linear = [n for n, p in trained.items() if isinstance(owners[n], nn.Linear) and p.ndim == 2]
        groups = [{"params": [trained[n]], "lr": 0.5 ** stack.depth(n)} for n in linear]
        return torch.optim.SGD([*groups, {"params": [p for n, p in trained.items() if n not in linear], "lr": 0.0}])

    def even(now: Mapping[str, Tensor]) -> Tensor:
        return torch.stack([p.sum() for p in now.values()]).sum()

    fit(model, [Penalty(even)], {}, steps=3, lr=0.1, warmup=2, schedule="linear", clip=None, optimizer=build)
    moved = {n: float((before[n] - p.detach()).mean()) for n, p in model.named_parameters()}
    for name, distance in moved.items():
        matrix = "proj" in name
        depth = int(name.split(".")[2]) if matrix else 0
        # rates of 0.05, 0.1 and 0.1 over three steps, each with a slope of one
        assert distance == pytest.approx(0.25 * 0.5**depth if matrix else 0.0, abs=1e-6), name


def test_groups_of_an_optimizer_keep_their_ratio_of_rates() -> None:
    def two_rates(model: nn.Module, trained: Any) -> torch.optim.Optimizer:
        first, *others = trained.values()
        return torch.optim.SGD([{"params": [first], "lr": 0.0}, {"params": others, "lr": 1.0}])

    model = small()
    before = weights(model)
    fit(model, [cross_entropy("a")], {"a": examples_for("llama", 4)}, steps=2, optimizer=two_rates, **KNOBS)
    changed = [name for name, tensor in model.named_parameters() if not torch.equal(tensor, before[name])]
    assert changed == [name for name, _ in model.named_parameters()][1:]


def test_matrices_decay_and_vectors_do_not() -> None:
    model = small()
    before = weights(model)

    def nothing(logits: Tensor, batch: Batch) -> Tensor:
        return logits.float().sum() * 0.0

    data = {"a": examples_for("llama", 4)}
    fit(model, [Term("a", nothing, answer_tokens)], data, steps=1, optimizer=adamw(weight_decay=0.5), **KNOBS)
    for name, parameter in model.named_parameters():
        factor = 1.0 - 1e-2 * 0.5 if parameter.ndim >= 2 else 1.0
        assert torch.allclose(parameter, factor * before[name], rtol=1e-6), name
