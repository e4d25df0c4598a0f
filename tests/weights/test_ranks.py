"""The k-th largest number of a checkpoint is exact, whatever the sample says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from merging import flat
from overhaul.errors import RunError
from overhaul.weights import kth_largest, ranks
from tiny_checkpoints import make, rewrite, tensors


@pytest.mark.parametrize("rank", [-1, 1, 2, 1000, 12_345, 10**9])
def test_the_rank_is_exact_even_if_the_sample_misleads(
    rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models_ = [make("llama", tmp_path / f"m{seed}", seed) for seed in range(2)]
    monkeypatch.setattr(ranks, "SAMPLE", 64)
    monkeypatch.setattr(ranks, "SPREAD", 0.001)
    found = kth_largest(models_, lambda _, held: [held[0].abs(), held[1].square()], lambda _: rank)
    for place, sizes in enumerate((flat(tensors(models_[0])).abs(), flat(tensors(models_[1])).square())):
        ordered = sizes.sort(descending=True).values
        expected = torch.inf if rank <= 0 else float(ordered[rank - 1]) if rank <= len(ordered) else 0.0
        assert {values[place] for values in found.values()} == {expected}


def test_ranks_within_each_tensor(tmp_path: Path) -> None:
    folder = make("gpt2", tmp_path / "m", 0)
    found = kth_largest([folder], lambda _, held: [held[0].abs()], lambda numbers: numbers // 3, by_tensor=True)
    for name, tensor in tensors(folder).items():
        ordered = tensor.abs().flatten().sort(descending=True).values
        assert found[name] == [float(ordered[tensor.numel() // 3 - 1])]


def test_numbers_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    folder = make("llama", tmp_path / "m", 0)
    rewrite(folder, lambda held: held["model.norm.weight"].fill_(torch.nan))
    with pytest.raises(RunError, match="not finite"):
        kth_largest([folder], lambda _, held: [held[0].abs()], lambda _: 5)
