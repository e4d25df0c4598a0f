"""Adapters over a base in low precision."""

from __future__ import annotations

import pytest
import torch

from conftest import examples_for, tiny_llama
from overhaul.adapters import adapters
from overhaul.fit import fit
from overhaul.objectives import cross_entropy


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapters_are_float32_and_train_over_a_base_that_stays_what_it_is(dtype: torch.dtype) -> None:
    model = tiny_llama(initializer_range=0.2).to(dtype)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with adapters(model, rank=4, alpha=8, dropout=0.0) as wrapped:
        trained = {name: p for name, p in wrapped.named_parameters() if p.requires_grad}
        assert len(trained) == 56 and all(p.dtype is torch.float32 for p in trained.values())
        lessons = {"a": examples_for("llama", 8)}
        ledger = fit(wrapped, [cross_entropy("a")], lessons, steps=20, batch_size=8, lr=1e-2)
        assert all(p.dtype is torch.float32 for p in trained.values())
    assert ledger.curves["loss"][-1] < 0.7 * ledger.curves["loss"][0]
    assert {p.dtype for p in model.parameters()} == {dtype}
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if "_proj" in name}
