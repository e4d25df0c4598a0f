"""Random numbers by place: the same however a tensor is cut, others for another seed, model or name, and uniform."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from conftest import tiny_llama
from overhaul.weights import TensorFacts, TensorIndex, chosen, uniform

TENSOR: TensorFacts = next(iter(TensorIndex.of(tiny_llama()).tensors.values()))


def drawn(start: int, count: int, seed: int = 0, model: int = 0, tensor: TensorFacts = TENSOR) -> Tensor:
    return uniform(seed, model, replace(tensor, start=start), torch.empty(count))


def test_the_same_wherever_a_piece_begins() -> None:
    whole = drawn(0, 1000)
    for size in (1, 2, 7, 256, 999):
        cut = [drawn(start, min(size, 1000 - start)) for start in range(0, 1000, size)]
        assert torch.equal(torch.cat(cut), whole), size
    rows = uniform(0, 0, replace(TENSOR, start=30), torch.empty(3, 10))
    assert torch.equal(rows.flatten(), whole[30:60])


def test_another_seed_model_or_name_draws_others() -> None:
    first = drawn(0, 1000)
    others = [drawn(0, 1000, seed=1), drawn(0, 1000, model=1), drawn(0, 1000, tensor=replace(TENSOR, name="another"))]
    for other in others:
        assert abs(float(torch.corrcoef(torch.stack([first, other]))[0, 1])) < 0.1
        assert not (first == other).any()


def test_they_are_the_same_on_every_machine() -> None:
    known = [0.1727092266, 0.2205489278, 0.7479699850, 0.1959397793]
    assert drawn(0, 4, tensor=replace(TENSOR, name="a.weight")).tolist() == pytest.approx(known, abs=1e-7)


def test_they_are_uniform_and_below_1() -> None:
    many = drawn(0, 1_000_000, seed=2**64 - 1)
    assert float(many.min()) >= 0 and float(many.max()) < 1
    counts = torch.histc(many, 10, 0, 1)
    assert float((counts - 100_000).abs().max()) < 5 * (100_000 * 0.9) ** 0.5


@pytest.mark.parametrize("share", [1e-9, 0.1, 1 / 3, 0.5, 1 - 2**-24, 1.0])
def test_chosen_is_where_they_are_below_a_share(share: float) -> None:
    for start, count in ((0, 1000), (7, 500), (8, 1), (1, 2)):
        piece = replace(TENSOR, start=start)
        below = uniform(3, 1, piece, torch.empty(count)) < share
        assert torch.equal(chosen(3, 1, piece, torch.empty(count), share), below)
    assert chosen(3, 1, TENSOR, torch.empty(2, 5), share).shape == (2, 5)
