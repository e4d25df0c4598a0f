"""mergekit's formulas, written out on whole tensors in memory, against what the streams make of files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mergekit_files import file, held, made, near
from merging import mixed
from overhaul.mergekit import formulas, merge_config
from overhaul.mergekit.methods import METHODS
from overhaul.weights import pieces
from tiny_checkpoints import bits, same_bits, tensors

FAMILIES = ("llama", "gpt2", "mixtral")
WEIGHTS = (0.7, 0.4)
DENSITY = 0.4


def places(shape: torch.Size, start: int = 0) -> Tensor:
    count = shape.numel()
    return ((torch.arange(start, start + count) * 2654435761) % 2**24).float().div(2**24).view(shape)


def drawn(change: Tensor) -> Tensor:
    return torch.where(places(change.shape) < DENSITY, change, 0)


def drawn_by_size(change: Tensor, epsilon: float = 0.15) -> Tensor:
    rows = change.view(-1, change.shape[-1]) if change.ndim > 1 else change.view(1, -1)
    rank = rows.abs().argsort(1).argsort(1)
    chance = DENSITY - epsilon + 2 * epsilon * rank / (rows.shape[1] - 1)
    return torch.where(places(rows.shape) < chance, rows, 0).view(change.shape)


def largest(change: Tensor, above: float = 0.0) -> Tensor:
    count = change.numel()
    kept, left = int(DENSITY * count), int(above * count)
    kept = kept if above else max(1, kept)
    order = change.abs().flatten().argsort(descending=True)
    mask = torch.zeros(count, dtype=torch.bool)
    mask[order[left : left + kept]] = True
    return torch.where(mask.view(change.shape), change, 0)


def as_large(keep: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda change: (kept := keep(change)) * (change.abs().sum() / kept.abs().sum())


CHANGES: dict[str, tuple[Callable[[Tensor], Tensor], bool, bool]] = {
    "task_arithmetic": (lambda change: change, False, False),
    "ties": (largest, True, True),
    "dare_linear": (as_large(drawn), False, False),
    "dare_ties": (as_large(drawn), True, False),
    "della": (as_large(drawn_by_size), True, True),
    "della_linear": (as_large(drawn_by_size), False, False),
    "breadcrumbs": (lambda change: largest(change, 0.01), False, False),
    "breadcrumbs_ties": (lambda change: largest(change, 0.01), True, False),
}
"""What each method keeps of a change; whether signs are elected; whether weights are divided by."""


@pytest.fixture
def same_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formulas, "uniform", lambda _, n, tensor, like: places(like.shape, tensor.start))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", sorted(CHANGES))
@pytest.mark.usefixtures("same_draws")
def test_merges_of_changes(method: str, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, *tuned = near(family, tmp_path)
    keep, elect, normalize = CHANGES[method]
    parameters: dict[str, Any] = {"lambda": 0.8} | ({"density": DENSITY} if method != "task_arithmetic" else {})
    config = file(method, base, tuned, WEIGHTS, parameters=parameters)
    result = made(config, tmp_path / "out")
    b, *others = map(held, (base, *tuned))
    assert result.keys() == b.keys()
    for name, start in b.items():
        kept = torch.stack([keep(one[name] - start) for one in others])
        expected = start + 0.8 * mixed(kept, WEIGHTS, elect, normalize)
        assert torch.allclose(result[name], expected, rtol=1e-5, atol=1e-7), name
    if family != "gpt2":
        return
    monkeypatch.setattr(pieces, "PIECE", 96)
    monkeypatch.setattr(pieces, "THREADS", 3)
    again = made(config, tmp_path / "again")
    close = all(torch.allclose(again[name], one, rtol=1e-6, atol=1e-8) for name, one in result.items())
    assert close and again.keys() == result.keys(), "whatever the size of a piece"


def test_every_method_is_tried_here() -> None:
    assert METHODS.keys() == {*CHANGES, "linear", "slerp", "nuslerp", "model_stock", "passthrough"}


@pytest.mark.usefixtures("same_draws")
def test_normalize_rescale_and_density_are_the_files(tmp_path: Path) -> None:
    base, *tuned = near("llama", tmp_path)
    b, *others = map(held, (base, *tuned))
    options = {"normalize": False, "rescale": True, "density": DENSITY}
    result = made(file("ties", base, tuned, WEIGHTS, parameters=options), tmp_path / "ties")
    plain = made(
        file("dare_linear", base, tuned, WEIGHTS, parameters={"rescale": False, "density": DENSITY}), tmp_path / "d"
    )
    for name, start in b.items():
        kept = torch.stack([as_large(largest)(one[name] - start) for one in others])
        assert torch.allclose(result[name], start + mixed(kept, WEIGHTS, True, False), rtol=1e-5, atol=1e-7), name
        kept = torch.stack([drawn(one[name] - start) for one in others])
        assert torch.equal(plain[name], start + mixed(kept, WEIGHTS, False, False)), name
    whole = made(file("ties", base, tuned[:1], [1.0], parameters={"density": [1, 1.0]}), tmp_path / "whole")
    close = [torch.allclose(whole[name], one, atol=1e-8) for name, one in others[0].items()]
    assert all(close), "all of one change is that model"


@pytest.mark.parametrize("family", FAMILIES)
def test_linear_is_bit_for_bit_a_fused_sum(family: str, tmp_path: Path) -> None:
    base, *tuned = near(family, tmp_path)
    models = [base, *tuned]
    result = made(file("linear", None, models, [0.2, 0.3, 0.9]), tmp_path / "out")
    raw = made(file("linear", None, models, [0.2, 0.3, 0.9], parameters={"normalize": False}), tmp_path / "raw")
    every = list(map(held, models))
    for name in every[0]:
        total = torch.zeros_like(every[0][name])
        for one, weight in zip(every, (0.2, 0.3, 0.9), strict=True):
            total.addcmul_(one[name], torch.tensor(weight))
        assert torch.equal(raw[name], total)
        assert torch.equal(result[name], total / torch.tensor([0.2, 0.3, 0.9]).sum()), name


def test_a_base_that_linear_has_no_use_for_is_a_model_like_the_others(tmp_path: Path) -> None:
    base, *tuned = near("llama", tmp_path)
    config = file("linear", base, tuned, [0.3, 0.9], parameters={"weight": 0.8})
    result = made(config, tmp_path / "out")
    every = [held(one) for one in (*tuned, base)]
    for name, one in result.items():
        expected = torch.stack([w * h[name] for w, h in zip((0.3, 0.9, 0.8), every, strict=True)]).sum(0) / 2.0
        assert torch.allclose(one, expected, atol=1e-7)


def arc(t: float, a: Tensor, b: Tensor) -> Tensor:
    turn = torch.nn.functional.cosine_similarity(a.flatten().double(), b.flatten().double(), dim=0)
    angle = turn.acos()
    return (((1 - t) * angle).sin() * a + (t * angle).sin() * b) / angle.sin()


@pytest.mark.parametrize("family", FAMILIES)
def test_arcs(family: str, tmp_path: Path) -> None:
    base, *tuned = near(family, tmp_path, step=0.05)
    b, first, second = map(held, (base, *tuned))
    slerp = made(
        {"merge_method": "slerp", "base_model": base, "models": [{"model": tuned[0]}], "parameters": {"t": 0.3}},
        tmp_path / "slerp",
    )
    from_base = made(file("nuslerp", base, tuned, [0.3, 0.9]), tmp_path / "from base")
    plain = made(file("nuslerp", None, tuned, [0.3, 0.9]), tmp_path / "plain")
    bent = 0
    for name, start in b.items():
        one, two = first[name], second[name]
        turn = torch.nn.functional.cosine_similarity(start.flatten(), one.flatten(), dim=0)
        zero = not start.any()
        lerp = bool(turn.abs() > 0.9995)
        bent += not lerp and not zero
        expected = torch.lerp(start, one, 0.3) if lerp else arc(0.3, start, one)
        assert zero or torch.allclose(slerp[name], expected.float(), atol=1e-6), name
        assert torch.allclose(from_base[name], start + arc(0.75, one - start, two - start).float(), atol=1e-6), name
        assert torch.allclose(plain[name], arc(0.75, one, two).float(), atol=1e-5), name
    assert bent > 5


def test_model_stock(tmp_path: Path) -> None:
    base, *tuned = near("gpt2", tmp_path, 3)
    config = {"merge_method": "model_stock", "base_model": base, "models": [{"model": one} for one in tuned]}
    result = made(config, tmp_path / "out")
    b, *others = map(held, (base, *tuned))
    for name, start in b.items():
        changes = torch.stack([(one[name] - start).flatten() for one in others]).double()
        unit = changes / changes.norm(dim=1, keepdim=True)
        turn = (unit @ unit.T)[torch.triu(torch.ones(3, 3), 1).bool()].mean()
        t = 3 * turn / (1 + 2 * turn)
        mean = torch.stack([one[name] for one in others]).mean(0)
        assert torch.allclose(result[name], (t * mean + (1 - t) * start).float(), atol=1e-6), name


def test_changes_are_rounded_as_the_files_are_unless_a_dtype_is_given(tmp_path: Path) -> None:
    base, *tuned = near("llama", tmp_path, dtype=torch.bfloat16)
    b, *others = map(held, (base, *tuned))
    plain = made(file("task_arithmetic", base, tuned, WEIGHTS), tmp_path / "plain")
    exact = made(
        file("task_arithmetic", base, tuned, WEIGHTS, dtype="float32", out_dtype="bfloat16"), tmp_path / "exact"
    )
    wide = made(file("task_arithmetic", base, tuned, WEIGHTS, dtype="float32"), tmp_path / "wide")
    for name, start in b.items():
        changes = torch.stack([one[name] - start for one in others])
        assert changes.dtype == torch.bfloat16
        weighed = changes * torch.tensor(WEIGHTS, dtype=torch.bfloat16).view(-1, *[1] * start.ndim)
        assert bits(plain[name]) == bits(start + weighed.sum(0)), name
        floats = torch.stack([one[name].float() - start.float() for one in others])
        total = start.float() + mixed(floats, WEIGHTS, False, False)
        assert torch.allclose(wide[name], total, atol=1e-7) and wide[name].dtype == torch.float32
        assert bits(exact[name]) == bits(wide[name].bfloat16())
    assert any(not torch.equal(plain[name], exact[name]) for name in b)


def test_equal_changes_are_kept_to_the_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16 many changes have one size; as many as mergekit's are kept, the first of them."""
    base, *tuned = near("llama", tmp_path, dtype=torch.bfloat16)
    config = file("ties", base, tuned[:1], [1.0], parameters={"density": DENSITY})
    result = made(config, tmp_path / "out")
    monkeypatch.setattr(pieces, "PIECE", 100)
    assert same_bits(made(config, tmp_path / "again"), result)
    b, other = map(held, (base, tuned[0]))
    equal = 0
    for name, start in b.items():
        change = other[name] - start
        sizes = change.abs().float().flatten()
        least = sizes.sort(descending=True).values[max(1, int(DENSITY * len(sizes))) - 1]
        moved = int((result[name] != start).sum())
        assert moved <= max(1, int(DENSITY * len(sizes))), name
        equal += int((sizes == least).sum()) > 1
    assert equal > 3


def test_the_seed_decides_what_is_drawn(tmp_path: Path) -> None:
    base, *tuned = near("llama", tmp_path)
    config = file("dare_ties", base, tuned, WEIGHTS, parameters={"density": 0.5})
    one, same, other = (
        tensors(merge_config(config, tmp_path / f"o{n}", seed=seed).model) for n, seed in enumerate((3, 3, 4))
    )
    assert same_bits(one, same) and not same_bits(one, other)
