"""Consensus: the masks of the released code, and their limits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from contract import Case
from merging import VARIED, base_and_two, flat, mixed, trimmed, unflat
from overhaul import models
from overhaul.errors import RequestError
from overhaul.merge.consensus import consensus
from overhaul.merge.task_arithmetic import task_arithmetic
from overhaul.weights import pieces
from tiny_checkpoints import make, same_bits, tensors

CASE = Case(
    method=consensus,
    idle={"tokenizer": "the models of the case have one vocabulary and no tokenizer"},
    materials=base_and_two,
    knobs={"scale": 0.5},
    varied={
        "agree": (1, 2),
        "tall": (0.2, [0.3, 0.6]),
        "density": (0.2, 0.5, {"merge": "ties"}),
        **VARIED,
    },
)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("agree", [1, 2, 3])
def test_it_is_the_released_code(ties: bool, agree: int, tmp_path: Path) -> None:
    base, *tuned = (make("llama", tmp_path / f"m{seed}", seed) for seed in range(4))
    tall = [0.3, 0.4, 0.6]
    merge: Any = "ties" if ties else "task_arithmetic"
    done = consensus(base, tuned, agree=agree, tall=tall, merge=merge, scale=0.5, out=tmp_path / "out")
    b = tensors(base)
    fine = torch.stack([flat(tensors(path)) for path in tuned])
    changes = fine - flat(b)
    kept = torch.stack([trimmed(change, 0.2) for change in changes]) if ties else changes
    merged = mixed(kept, [1.0] * 3, ties, False)
    away, left = (flat(b) - fine).abs(), (flat(b) + merged - fine).abs()
    masks = away > left * torch.tensor(tall)[:, None]
    near = ((away - left * torch.tensor(tall)[:, None]).abs() < 1e-5).any(0)  # where rounding may decide otherwise
    expected = flat(b) + 0.5 * merged * (masks.sum(0) >= agree)
    made = flat(tensors(done.model))
    assert near.float().mean() < 0.02 and torch.allclose(made[~near], expected[~near], atol=1e-6)
    assert done.facts["needed_share"] == pytest.approx(masks.float().mean(1).tolist(), abs=2e-3)
    assert done.facts["agreed_share"] == pytest.approx([float((masks.sum(0) >= agree).float().mean())], abs=2e-3)
    assert unflat(made, b).keys() == b.keys()
    models.open_model(done.model)


def test_its_limits(tmp_path: Path) -> None:
    base, *tuned = (make("llama", tmp_path / f"m{seed}", seed) for seed in range(3))
    plain = tensors(task_arithmetic(base, tuned, scale=0.4, out=tmp_path / "plain").model)
    unmasked = tensors(consensus(base, tuned, agree=0, scale=0.4, out=tmp_path / "unmasked").model)
    assert all(torch.allclose(made, plain[name], atol=1e-6) for name, made in unmasked.items())
    with pytest.raises(
        RequestError, match=r"agree=3, but there are 2 tuned checkpoints, so every weight would be the base's"
    ):
        consensus(base, tuned, agree=3, out=tmp_path / "out")
    with pytest.raises(RequestError, match=r"2 tuned checkpoints and 3 numbers in tall"):
        consensus(base, tuned, tall=[0.1, 0.2, 0.3], out=tmp_path / "out")
    with pytest.raises(RequestError, match=r"are the base itself"):
        consensus(base, [base, base], out=tmp_path / "out")


def test_pieces_do_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, *tuned = (make("llama", tmp_path / f"m{seed}", seed) for seed in range(3))
    one = tensors(consensus(base, tuned, merge="ties", out=tmp_path / "one").model)
    monkeypatch.setattr(pieces, "PIECE", 321)
    assert same_bits(tensors(consensus(base, tuned, merge="ties", out=tmp_path / "two").model), one)
