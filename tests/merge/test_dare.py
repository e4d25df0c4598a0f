"""DARE: which entries are kept, what they become, and how several changes are one."""

from __future__ import annotations

import shutil
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
from overhaul.merge.task_arithmetic import task_arithmetic
from overhaul.weights import TensorIndex, pieces, uniform
from tiny_checkpoints import make, rewrite, same_bits, tensors

CASE = Case(
    method=dare,
    idle={"tokenizer": "the models of the case have one vocabulary and no tokenizer"},
    materials=base_and_two,
    knobs={"density": 0.5},
    varied={"density": (0.2, 0.5), "rescale": ("density", "norm"), **VARIED},
)


def kept(base: Path, tuned: list[Path], density: float, norm: bool = False) -> dict[str, Tensor]:
    """What is kept of each change [t, ...], from the numbers that are drawn for its entries."""
    b, *t = map(tensors, (base, *tuned))
    found: dict[str, Tensor] = {}
    for name, facts in TensorIndex.of(base).tensors.items():
        changes = torch.stack([state[name].float() - b[name].float() for state in t])
        drawn = torch.stack([uniform(torch.initial_seed(), n, facts, change) for n, change in enumerate(changes)])
        masked = changes * (drawn < density)
        sizes = [each.abs().flatten(1).sum(1).view(-1, *[1] * (changes.ndim - 1)) for each in (changes, masked)]
        found[name] = masked * (sizes[0] / torch.where(sizes[1] == 0, 1.0, sizes[1]) if norm else 1 / density)
    return found


@pytest.mark.parametrize(("ties", "normalize"), [(False, False), (False, True), (True, False), (True, True)])
@pytest.mark.parametrize("rescale", ["density", "norm"])
def test_it_is_the_formula(ties: bool, normalize: bool, rescale: Any, tmp_path: Path) -> None:
    torch.manual_seed(3)
    base, *tuned = (make("llama", tmp_path / f"m{seed}", seed) for seed in range(4))
    torch.manual_seed(3)
    merge = "ties" if ties else "task_arithmetic"
    done = dare(
        base, tuned, density=0.3, rescale=rescale, merge=merge, weights=[1.0, 0.5, 0.25], normalize=normalize,
        scale=0.7, out=tmp_path / "out",
    )  # fmt: skip
    b = tensors(base)
    for name, each in kept(base, tuned, 0.3, rescale == "norm").items():
        expected = b[name] + 0.7 * mixed(each, [1.0, 0.5, 0.25], ties, normalize)
        assert torch.allclose(tensors(done.model)[name], expected, atol=1e-6), name
    assert done.facts["seed"] == 3
    assert done.facts["kept_share"] == pytest.approx([0.3] * 3, abs=0.02)
    models.open_model(done.model)


def test_in_expectation_it_is_the_change(tmp_path: Path) -> None:
    base, tuned = (make("llama", tmp_path / f"m{seed}", seed) for seed in range(2))
    name = "model.layers.0.self_attn.k_proj.weight"
    b, t = tensors(base)[name].double(), tensors(tuned)[name].double()
    total = torch.zeros_like(b)
    draws = 400
    for seed in range(draws):
        facts = TensorIndex.of(base).tensors[name]
        total += (t - b) * (uniform(seed, 0, facts, b) < 0.5) / 0.5
    deviation = (t - b).abs() / draws**0.5  # of the mean: |tau| sqrt((1 - p) / p) / sqrt(n)
    off = (total / draws - (t - b)).abs() / deviation
    assert float((off > 3).double().mean()) < 0.01 and float(off.max()) < 6


def test_density_1_is_the_merge_underneath(tmp_path: Path) -> None:
    base, *tuned = (make("llama", tmp_path / f"m{seed}", seed) for seed in range(3))
    plain = tensors(task_arithmetic(base, tuned, scale=0.4, out=tmp_path / "plain").model)
    for rescale in ("density", "norm"):
        made = tensors(dare(base, tuned, density=1.0, rescale=rescale, scale=0.4, out=tmp_path / rescale).model)
        assert all(torch.allclose(made[name], plain[name], atol=1e-6) for name in plain)


def test_neither_pieces_nor_files_nor_the_order_of_threads_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, *tuned = (make("llama", tmp_path / f"m{seed}", seed) for seed in range(3))
    one = tensors(dare(base, tuned, merge="ties", out=tmp_path / "one").model)
    monkeypatch.setattr(pieces, "PIECE", 777)
    assert same_bits(tensors(dare(base, tuned, merge="ties", out=tmp_path / "two").model), one)


def test_models_and_seeds_draw_apart(tmp_path: Path) -> None:
    base, tuned = (make("llama", tmp_path / f"m{seed}", seed) for seed in range(2))
    pair = [tuned, Path(shutil.copytree(tuned, tmp_path / "again"))]
    torch.manual_seed(0)
    twice = tensors(dare(base, pair, density=0.5, out=tmp_path / "twice").model)
    b, t = tensors(base), tensors(tuned)
    name = "model.layers.1.mlp.down_proj.weight"
    times = ((twice[name] - b[name]) / (t[name] - b[name])).round()
    assert {float(n) for n in times.unique()} == {0.0, 2.0, 4.0}, "the same model twice is not dropped twice alike"
    torch.manual_seed(1)
    assert not same_bits(tensors(dare(base, pair, density=0.5, out=tmp_path / "other").model), twice)


def test_bfloat16_is_rounded_once(tmp_path: Path) -> None:
    base, tuned = (make("llama", tmp_path / f"m{seed}", seed, "bfloat16") for seed in range(2))
    made = tensors(dare(base, [tuned], density=0.25, scale=0.1, out=tmp_path / "out").model)
    b = tensors(base)
    for name, each in kept(base, [tuned], 0.25).items():
        assert torch.equal(made[name], torch.add(b[name].float(), each[0], alpha=0.1).bfloat16()), name


def test_what_was_not_trained_stays_bit_for_bit(tmp_path: Path) -> None:
    base, tuned = (make("llama", tmp_path / f"m{seed}", seed) for seed in range(2))
    frozen = tensors(base)["model.embed_tokens.weight"]
    rewrite(tuned, lambda held: held.update({"model.embed_tokens.weight": frozen}))
    for rescale in ("density", "norm"):
        made = tensors(dare(base, [tuned], rescale=rescale, out=tmp_path / rescale).model)
        assert torch.equal(made["model.embed_tokens.weight"], frozen)


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    base, tuned = (make("llama", tmp_path / f"m{seed}", seed) for seed in range(2))
    with pytest.raises(RequestError, match=r"density=0"):
        dare(base, [tuned], density=0, out=tmp_path / "out")
    with pytest.raises(RequestError, match=r"1 tuned checkpoints and 2 weights"):
        dare(base, [tuned], weights=[1.0, 1.0], out=tmp_path / "out")
    with pytest.raises(RequestError, match=r"cannot be divided by, since not all are above 0. Write normalize: false"):
        dare(base, [tuned, tuned], merge="ties", weights=[1.0, -1.0], out=tmp_path / "out")
    with pytest.raises(RequestError, match=r"weights \[0.0\] would change nothing"):
        dare(base, [tuned], weights=[0.0], out=tmp_path / "out")
    with pytest.raises(RequestError, match=r"merge.dare: there is no tuned checkpoint"):
        dare(base, [], out=tmp_path / "out")
    with pytest.raises(RequestError, match=r"are the base itself"):
        dare(base, [base], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
