"""DELLA: chances by rank within a row, what becomes of what is kept, and rows that are never cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from contract import Case
from merging import VARIED, base_and_two, mixed
from overhaul import models
from overhaul.errors import RequestError
from overhaul.merge.dare import dare
from overhaul.merge.della import chances, della
from overhaul.weights import TensorIndex, pieces, uniform
from tiny_checkpoints import make, same_bits, tensors

CASE = Case(
    method=della,
    idle={"tokenizer": "the models of the case have one vocabulary and no tokenizer"},
    materials=base_and_two,
    knobs={"density": 0.5},
    varied={"density": (0.2, 0.5), "epsilon": (0.0, 0.1), "rescale": ("density", "norm"), **VARIED},
)


def test_chances_by_hand() -> None:
    rows = torch.tensor([[0.3, -0.1, 0.0, -0.4, 0.2], [5.0, 4.0, 3.0, 2.0, 1.0]])
    expected = torch.tensor([[0.55, 0.45, 0.4, 0.6, 0.5], [0.6, 0.55, 0.5, 0.45, 0.4]])
    assert torch.allclose(chances(rows, 0.5, 0.1), expected)
    assert torch.equal(chances(torch.ones(3, 1), 0.5, 0.1), torch.full((3, 1), 0.5)), "one entry has no rank"
    assert torch.equal(chances(torch.ones(1, 3), 0.5, 0.0), torch.full((1, 3), 0.5))


def sampled(change: Tensor, n: int, facts: Any, density: float, epsilon: float, norm: bool) -> Tensor:
    rows = change.flatten(1) if change.ndim > 3 else change.reshape(-1, change.shape[-1])
    ranks = rows.abs().argsort(1).argsort(1)
    p = density - epsilon + 2 * epsilon * ranks / max(1, rows.shape[1] - 1) if rows.shape[1] > 1 else density
    mask = uniform(torch.initial_seed(), n, facts, rows) < p
    kept = rows * mask
    kept = kept * (rows.abs().sum() / kept.abs().sum() if norm and kept.any() else 1.0) if norm else kept / p
    return kept.view_as(change)


@pytest.mark.parametrize("family", ["llama", "resnet"])
@pytest.mark.parametrize(("ties", "norm"), [(False, False), (True, False), (True, True)])
def test_it_is_the_formula(family: str, ties: bool, norm: bool, tmp_path: Path) -> None:
    base, *tuned = (make(family, tmp_path / f"m{seed}", seed) for seed in range(3))
    torch.manual_seed(5)
    done = della(
        base, tuned, density=0.4, epsilon=0.2, rescale="norm" if norm else "density", weights=[1.0, 0.5],
        merge="ties" if ties else "task_arithmetic", normalize=False, scale=0.5, out=tmp_path / "out",
    )  # fmt: skip
    b, *t = map(tensors, (base, *tuned))
    made = tensors(done.model)
    for name, facts in TensorIndex.of(base).tensors.items():
        if not facts.dtype.is_floating_point or name.endswith("running_var"):
            continue
        kept = torch.stack([sampled(s[name] - b[name], n, facts, 0.4, 0.2, norm) for n, s in enumerate(t)])
        assert torch.allclose(made[name], b[name] + 0.5 * mixed(kept, [1.0, 0.5], ties, False), atol=2e-6), name
    models.open_model(done.model)


def test_without_a_window_it_is_dare(tmp_path: Path) -> None:
    base, *tuned = (make("llama", tmp_path / f"m{seed}", seed) for seed in range(3))
    ours = della(
        base, tuned, density=0.5, epsilon=0.0, merge="task_arithmetic", scale=1.0, out=tmp_path / "della"
    ).model
    theirs = tensors(dare(base, tuned, density=0.5, out=tmp_path / "dare").model)
    assert all(torch.allclose(made, theirs[name], atol=1e-6) for name, made in tensors(ours).items())


def test_large_entries_are_kept_more_often(tmp_path: Path) -> None:
    base, tuned = (make("llama", tmp_path / f"m{seed}", seed) for seed in range(2))
    made = della(base, [tuned], density=0.5, epsilon=0.4, scale=1.0, out=tmp_path / "out").model
    b, t, m = map(tensors, (base, tuned, made))
    sizes = torch.cat(
        [
            (t[name] - b[name]).abs().argsort(1).argsort(1).flatten() / b[name].shape[1]
            for name in b
            if b[name].ndim == 2
        ]
    )
    kept = torch.cat([(m[name] != b[name]).flatten() for name in b if b[name].ndim == 2]).float()
    assert kept[sizes < 0.25].mean() < 0.3 < 0.7 < kept[sizes >= 0.75].mean()


def test_rows_are_never_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, *tuned = (make("gpt2", tmp_path / f"m{seed}", seed) for seed in range(3))
    one = tensors(della(base, tuned, out=tmp_path / "one").model)
    for size in (1, 50, 1000):
        monkeypatch.setattr(pieces, "PIECE", size)
        assert same_bits(tensors(della(base, tuned, out=tmp_path / f"{size}").model), one)


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    base, tuned = (make("llama", tmp_path / f"m{seed}", seed) for seed in range(2))
    for density, epsilon in ((0.1, 0.1), (0.95, 0.06), (0.05, 0.2)):
        with pytest.raises(RequestError, match=r"They have to be above 0 and at most 1: take a smaller epsilon"):
            della(base, [tuned], density=density, epsilon=epsilon, out=tmp_path / "out")
    whole = tensors(della(base, [tuned], density=1.0, epsilon=0.0, scale=1.0, out=tmp_path / "whole").model)
    assert all(torch.allclose(made, tensors(tuned)[name], atol=1e-6) for name, made in whole.items())
    with pytest.raises(RequestError, match=r"are the base itself"):
        della(base, [base], out=tmp_path / "out")
