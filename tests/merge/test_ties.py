"""TIES: equal to the released code's formulas on the same tensors, whatever the size of a piece."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from contract import Case
from merging import flat, ties_change, unflat
from overhaul import models
from overhaul.errors import RequestError, RunError
from overhaul.merge.ties import ties
from overhaul.weights import pieces, ranks
from tiny_checkpoints import make, rewrite, same_bits, tensors

CASE = Case(
    method=ties,
    idle={"tokenizer": "the models of the case have one vocabulary and no tokenizer"},
    materials=lambda folder: dict(zip(("base", "tuned"), _case(folder), strict=True)),
    knobs={"density": 0.5},
    varied={
        "density": (0.2, 0.5),
        "scale": (1.0, 0.5),
        "beta": (0.0, 0.3),
        "outside": ("alpha", "by_position", {"beta": 0.3}),
        "sign": ("size", "count"),
        "scope": ("model", "tensor", {"density": 0.02}),
        "rule": ("released", "paper"),
    },
)


def _case(folder: Path) -> tuple[models.Checkpoint, list[models.Checkpoint]]:
    base, *tuned = (models.facts(folder) for folder in four(folder))
    return base, tuned


def four(folder: Path, dtype: str | None = None) -> list[Path]:
    """A base and three models on a grid of 1/64, so that changes of one size and changes that cancel are common."""
    made = [make("llama", folder / f"grid{seed}", seed, dtype) for seed in range(4)]
    for path in made:
        rewrite(path, lambda held: held.update({name: (t * 64).round() / 64 for name, t in held.items()}))
    return made


@pytest.mark.parametrize("density", [0.05, 0.2, 0.9, 1.0])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_is_the_released_code(density: float, dtype: str, tmp_path: Path) -> None:
    base, *tuned = (make("llama", tmp_path / f"m{seed}", seed, dtype) for seed in range(4))
    done = ties(base, tuned, density=density, scale=0.7, out=tmp_path / "out")
    changes, b = _changes(base, tuned)
    expected = unflat(flat(b) + 0.7 * ties_change(changes, density), b)
    for name, made in tensors(done.model).items():
        assert torch.allclose(made.float(), expected[name], rtol=2**-7 if dtype == "bfloat16" else 1e-6, atol=1e-7)
    kept = [float((c.abs() >= _threshold(c, density)).float().mean()) for c in changes]
    if density < 1:
        assert done.facts["kept_share"] == pytest.approx(kept)
    models.open_model(done.model)


def _threshold(change: Tensor, density: float) -> Tensor:
    ordered = change.abs().sort(descending=True).values
    return ordered[min(int(density * len(ordered)), len(ordered) - 1)]


def _changes(base: Path, tuned: list[Path]) -> tuple[list[Tensor], dict[str, Tensor]]:
    b = tensors(base)
    return [flat(tensors(path)) - flat(b) for path in tuned], b


def test_what_cancels_takes_the_sign_of_most_weights(tmp_path: Path) -> None:
    base, *tuned = four(tmp_path)
    changes, b = _changes(base, tuned[:2])
    assert ((changes[0] + changes[1] == 0) & (changes[0] != 0)).sum() > 100, "the grid makes changes cancel"
    released = ties(base, tuned[:2], density=0.5, out=tmp_path / "released").model
    assert torch.equal(flat(tensors(released)), flat(b) + ties_change(changes, 0.5))
    paper = flat(tensors(ties(base, tuned[:2], density=0.5, rule="paper", out=tmp_path / "paper").model))
    threshold = [_kth(change, int(0.5 * len(change))) for change in changes]
    kept = [torch.where(change.abs() >= t, change, 0) for change, t in zip(changes, threshold, strict=True)]
    cancelled = (kept[0] + kept[1] == 0) & (kept[0] != 0)
    assert cancelled.any() and torch.equal(paper[cancelled], flat(b)[cancelled])


def _kth(change: Tensor, k: int) -> Tensor:
    return change.abs().sort(descending=True).values[k - 1]


def test_signs_can_be_counted(tmp_path: Path) -> None:
    base, *tuned = (make("llama", tmp_path / f"m{seed}", seed) for seed in range(4))
    changes, b = _changes(base, tuned)
    all_of_them = torch.stack(changes)
    up = all_of_them.sign().sum(0) > 0
    chosen = torch.where(torch.where(up, all_of_them > 0, all_of_them < 0), all_of_them, 0)
    expected = flat(b) + chosen.sum(0) / (chosen != 0).sum(0).clamp(min=1)
    made = ties(base, tuned, density=1.0, sign="count", out=tmp_path / "out").model
    assert torch.allclose(flat(tensors(made)), expected, atol=1e-7)


def test_each_tensor_can_have_its_own_threshold(tmp_path: Path) -> None:
    base, *tuned = (make("gpt2", tmp_path / f"m{seed}", seed) for seed in range(3))
    b, *t = map(tensors, (base, *tuned))
    made = tensors(ties(base, tuned, scope="tensor", out=tmp_path / "out").model)
    for name in ("transformer.h.1.mlp.c_fc.weight", "transformer.wte.weight"):
        changes = [(state[name] - b[name]).flatten() for state in t]
        kept = torch.stack([torch.where(c.abs() >= _threshold(c, 0.2), c, 0) for c in changes])
        sign = kept.sum(0).sign()
        chosen = torch.where(kept.sign() == sign, kept, 0)
        expected = b[name] + (chosen.sum(0) / (chosen != 0).sum(0).clamp(min=1)).view_as(b[name])
        assert torch.allclose(made[name], expected, atol=1e-7)


def test_one_model_untrimmed_is_that_model(tmp_path: Path) -> None:
    base, tuned = (make("resnet", tmp_path / f"m{seed}", seed) for seed in range(2))
    made = tensors(ties(base, [tuned], density=1.0, out=tmp_path / "out").model)
    t = tensors(tuned)
    assert all(torch.allclose(made[name].float(), t[name].float(), atol=1e-6) for name in t)


def test_disagreement_is_counted_by_depth(tmp_path: Path) -> None:
    base, *tuned = (make("llama", tmp_path / f"m{seed}", seed) for seed in range(3))
    done = ties(base, tuned, density=0.4, out=tmp_path / "out")
    changes, b = _changes(base, tuned)
    kept = [torch.where(c.abs() >= _threshold(c, 0.4), c, 0) for c in changes]
    conflict = kept[0] * kept[1] < 0
    changed = (kept[0] != 0) | (kept[1] != 0)
    assert done.facts["disagreement"] == pytest.approx(float(conflict.sum() / changed.sum()))
    assert done.facts["merged_share"] == pytest.approx(float(changed.float().mean()))
    by_name = {
        name: (c, a) for (name, c), a in zip(unflat(conflict, b).items(), unflat(changed, b).values(), strict=True)
    }
    block = [pair for name, pair in by_name.items() if name.startswith("model.layers.2.")]
    share = sum(int(c.sum()) for c, _ in block) / sum(int(a.sum()) for _, a in block)
    assert done.layers["disagreement"][2] == pytest.approx(share)


def test_pieces_and_samples_do_not_change_the_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, *tuned = (make("llama", tmp_path / f"m{seed}", seed) for seed in range(3))
    expected = tensors(ties(base, tuned, out=tmp_path / "one").model)
    monkeypatch.setattr(pieces, "PIECE", 1000)
    monkeypatch.setattr(ranks, "SAMPLE", 50)
    monkeypatch.setattr(ranks, "SPREAD", 0.0)
    monkeypatch.setattr(ranks, "BINS", 8)
    assert same_bits(tensors(ties(base, tuned, out=tmp_path / "two").model), expected)


def test_what_changes_nothing_is_an_error(tmp_path: Path) -> None:
    base = make("llama", tmp_path / "m", 0)
    same = shutil.copytree(base, tmp_path / "same")
    with pytest.raises(RunError, match="merge.ties changed nothing"):
        ties(base, [base, same], out=tmp_path / "out")
    with pytest.raises(RequestError, match="the tuned checkpoints are the base itself"):
        ties(base, [base], out=tmp_path / "out")
    with pytest.raises(RequestError, match="scale 0"):
        ties(base, [same], scale=0.0, out=tmp_path / "out")
    with pytest.raises(RequestError, match="density"):
        ties(base, [base], density=0.0, out=tmp_path / "out")
