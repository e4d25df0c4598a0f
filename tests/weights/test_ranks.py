"""The k-th largest number of a checkpoint is exact, whatever the sample says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from merging import flat
from overhaul.errors import RunError
from overhaul.weights import TensorFacts, TensorIndex, cuts, kth_largest, pieces, ranks, sums_of
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


def test_a_cut_is_to_the_number_and_takes_the_first_of_equal_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make("gpt2", tmp_path / "m", 0)
    rewrite(folder, lambda held: [one.copy_((one * 20).round()) for one in held.values()])
    index = TensorIndex.of(folder)
    monkeypatch.setattr(pieces, "PIECE", 70)

    def wanted(tensor: TensorFacts) -> list[int]:
        return [tensor.numbers // 3, 0, tensor.numbers]

    inputs = [[one] for one in index.tensors.values()]
    found = cuts(inputs, lambda _, held: 3 * [held[0].abs()], wanted)
    for name, tensor in tensors(folder).items():
        sizes = tensor.abs().flatten()
        order = sizes.argsort(descending=True, stable=True)
        for cut, rank in zip(found[name], wanted(index.tensors[name]), strict=True):
            starts = range(0, len(sizes), 70)
            kept = torch.cat([cut.inside(sizes[start : start + 70], start) for start in starts])
            assert kept.sum() == rank and torch.equal(kept.nonzero().flatten(), order[:rank].sort().values), name


def test_sums_of_tensors_that_are_of_several_numbers_of_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = (TensorIndex.of(make("llama", tmp_path / f"m{seed}", seed)).tensors for seed in range(2))
    monkeypatch.setattr(pieces, "PIECE", 70)
    names = list(one)[:3]
    inputs = [[one[name], two[name]][: 1 + n % 2] for n, name in enumerate(names)]
    found = sums_of(inputs, lambda _, held: torch.stack([each.double().square().sum() for each in held]))
    for name, given in zip(names, inputs, strict=True):
        expected = [float(tensors(tensor.file.parent)[name].double().square().sum()) for tensor in given if tensor.file]
        assert found[name] == pytest.approx(expected, rel=1e-12)
