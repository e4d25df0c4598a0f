"""Model Breadcrumbs: the entries between two ranks of each tensor, whatever the size of a piece."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from contract import Case
from merging import VARIED, base_and_two, mixed
from overhaul import models
from overhaul.errors import RequestError
from overhaul.merge.breadcrumbs import breadcrumbs
from overhaul.weights import pieces, ranks
from tiny_checkpoints import make, rewrite, same_bits, tensors

CASE = Case(
    method=breadcrumbs,
    idle={"tokenizer": "the models of the case have one vocabulary and no tokenizer"},
    materials=base_and_two,
    knobs={"density": 0.5},
    varied={
        "density": (0.2, 0.5),
        "outliers": (0.0, 0.1),
        **VARIED,
    },
)


def between(change: Tensor, density: float, outliers: float) -> Tensor:
    """mergekit's choice, on the sorted whole."""
    numbers = change.numel()
    target, top = int(density * numbers), int(outliers * numbers)
    bottom = numbers - target - top
    if bottom < 0:
        top, bottom = top + bottom, 0
    order = change.abs().flatten().sort().indices[bottom : numbers - top]
    mask = torch.zeros(numbers)
    mask[order] = 1
    return change * mask.view_as(change)


@pytest.mark.parametrize(("density", "outliers"), [(0.09, 0.01), (0.5, 0.2), (0.9, 0.3), (1.0, 0.0), (0.3, 0.0)])
@pytest.mark.parametrize("ties", [False, True])
def test_it_is_the_formula(density: float, outliers: float, ties: bool, tmp_path: Path) -> None:
    base, *tuned = (make("llama", tmp_path / f"m{seed}", seed) for seed in range(3))
    done = breadcrumbs(
        base, tuned, density=density, outliers=outliers, merge="ties" if ties else "task_arithmetic",
        weights=[1.0, 0.5], scale=0.6, out=tmp_path / "out",
    )  # fmt: skip
    b, *t = map(tensors, (base, *tuned))
    for name, made in tensors(done.model).items():
        kept = torch.stack([between(state[name] - b[name], density, outliers) for state in t])
        assert torch.allclose(made, b[name] + 0.6 * mixed(kept, [1.0, 0.5], ties, ties), atol=1e-6), name
    models.open_model(done.model)


def test_the_largest_entries_are_left_out(tmp_path: Path) -> None:
    base, tuned = (make("llama", tmp_path / f"m{seed}", seed) for seed in range(2))
    name = "model.layers.2.mlp.gate_proj.weight"
    rewrite(tuned, lambda held: held[name].view(-1)[:3].fill_(50.0))
    made = tensors(breadcrumbs(base, [tuned], outliers=0.01, density=0.9, scale=1.0, out=tmp_path / "out").model)
    assert torch.equal(made[name].flatten()[:3], tensors(base)[name].flatten()[:3])
    assert float(made[name].abs().max()) < 10


def test_neither_pieces_nor_samples_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, *tuned = (make("gpt2", tmp_path / f"m{seed}", seed) for seed in range(3))
    one = tensors(breadcrumbs(base, tuned, out=tmp_path / "one").model)
    monkeypatch.setattr(pieces, "PIECE", 100)
    monkeypatch.setattr(ranks, "SAMPLE", 50)
    monkeypatch.setattr(ranks, "SPREAD", 0.0)
    assert same_bits(tensors(breadcrumbs(base, tuned, out=tmp_path / "two").model), one)


def test_entries_of_one_size_stay_together_and_it_is_said(tmp_path: Path) -> None:
    base, tuned = (make("llama", tmp_path / f"m{seed}", seed) for seed in range(2))
    held = tensors(base)
    rewrite(tuned, lambda t: t.update({name: each + 0.5 for name, each in held.items()}))
    rewrite(base, lambda t: t.update({name: (each * 4).round() / 4 for name, each in held.items()}))
    rewrite(tuned, lambda t: t.update({name: each + 0.5 for name, each in tensors(base).items()}))
    done = breadcrumbs(base, [tuned], density=0.1, out=tmp_path / "out")
    assert done.facts["kept_share"] == [1.0], "all changes are 0.5"


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    base, tuned = (make("llama", tmp_path / f"m{seed}", seed) for seed in range(2))
    for knobs in ({"density": 0.0}, {"density": 1.1}, {"outliers": 1.0}, {"outliers": -0.1}):
        with pytest.raises(RequestError, match=r"is not possible"):
            breadcrumbs(base, [tuned], out=tmp_path / "out", **knobs)
    with pytest.raises(RequestError, match=r"are the base itself"):
        breadcrumbs(base, [base], out=tmp_path / "out")
