"""Operations on checkpoints as vectors: exact limits, arithmetic by hand, and how much memory is held."""

from __future__ import annotations

import json
import os
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import FAMILIES, tiny_llama
from overhaul import models, weights
from overhaul.errors import RequestError
from overhaul.weights import index, pieces
from overhaul.weights.index import TensorFacts, TensorIndex
from tiny_checkpoints import (
    EVERY,
    bits,
    depth_of,
    make,
    rewrite,
    same_bits,
    tensors,
    two_llamas,
)


@pytest.fixture
def two(tmp_path: Path) -> list[Path]:
    return two_llamas(tmp_path)


# blending


@pytest.mark.parametrize("family", EVERY)
def test_a_blend_of_a_model_with_itself_is_that_model(family: str, tmp_path: Path) -> None:
    one = make(family, tmp_path / "m", 1)
    assert same_bits(tensors(weights.blend([one, one], [0.5, 0.5], tmp_path / "out")), tensors(one))
    half = make(family, tmp_path / "half", 1, dtype="bfloat16")
    assert same_bits(tensors(weights.blend([half] * 3, [0.2, 0.3, 0.5], tmp_path / "three")), tensors(half))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_coefficients_1_and_0_give_the_first_file_byte_for_byte(dtype: str, tmp_path: Path) -> None:
    one, other = (make("llama", tmp_path / f"m{seed}", seed, dtype) for seed in (1, 2))
    rewrite(one, lambda held: held["model.norm.weight"].copy_(torch.tensor([-0.0, 1e-7] * 16)))
    out = weights.blend([one, other], [1, 0], tmp_path / "out")
    assert same_bits(tensors(out), tensors(one))
    assert not same_bits(tensors(one), tensors(other))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_blend_is_arithmetic_in_float32(family: str, dtype: str, tmp_path: Path) -> None:
    folders = [make(family, tmp_path / f"m{seed}", seed, dtype) for seed in range(3)]
    # powers of two: products are exact, so fused and separate multiplications and additions agree
    out = tensors(weights.blend(folders, [0.5, 1, -0.25], tmp_path / "out"))
    thirds = tensors(weights.blend(folders, [1 / 3] * 3, tmp_path / "thirds"))
    a, b, c = map(tensors, folders)
    for name, made in out.items():
        if made.is_floating_point():
            by_hand = 0.5 * a[name].float() + b[name].float() - 0.25 * c[name].float()
            assert torch.equal(made, by_hand.to(made.dtype))
            mean = (a[name].float() + b[name].float() + c[name].float()) / 3
            assert torch.allclose(thirds[name].float(), mean, rtol=1e-6 if dtype == "float32" else 2**-8, atol=1e-7)
        else:
            assert torch.equal(made, a[name])


def test_a_coefficient_can_depend_on_depth(two: list[Path], tmp_path: Path) -> None:
    ramp: list[weights.Coefficient] = [lambda t: 1 - t.depth / 8, lambda t: t.depth / 8]
    out = tensors(weights.blend(two, ramp, tmp_path / "out"))
    a, b = map(tensors, two)
    for name, made in out.items():
        part = depth_of(name) / 8
        assert torch.allclose(made, (1 - part) * a[name] + part * b[name], rtol=1e-6, atol=1e-8)


def test_float64_is_not_rounded_to_float32(tmp_path: Path, two: list[Path]) -> None:
    def widen(held: dict[str, Tensor]) -> None:
        held.update({name: tensor.double() / 3 for name, tensor in held.items()})

    for folder in two:
        rewrite(folder, widen)
    made = tensors(weights.blend(two, [0.5, 0.25], tmp_path / "out"))
    a, b = map(tensors, two)
    assert all(torch.equal(made[name], 0.5 * a[name] + 0.25 * b[name]) for name in a)


# deltas, restoring


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scaling_by_1_gives_the_tuned_model_and_by_0_the_base(family: str, dtype: str, tmp_path: Path) -> None:
    base, tuned = (make(family, tmp_path / f"m{seed}", seed, dtype) for seed in (1, 2))
    assert same_bits(tensors(weights.scale_by_depth(base, tuned, 1, tmp_path / "all")), tensors(tuned))
    assert same_bits(tensors(weights.scale_by_depth(base, tuned, 0.0, tmp_path / "none")), tensors(base))


def test_scaling_by_a_ramp_is_lines(two: list[Path], tmp_path: Path) -> None:
    kept = "model.layers.1.mlp.up_proj.weight"
    rewrite(two[1], lambda held: held.update({kept: tensors(two[0])[kept]}))

    def ramp(t: TensorFacts) -> float:
        return 0.1 + 0.9 * min(max(t.depth, 0), t.blocks - 1) / (t.blocks - 1)

    made = tensors(weights.scale_by_depth(two[0], two[1], ramp, tmp_path / "out"))
    base, tuned = map(tensors, two)
    for name in base:
        factor = 0.1 + 0.3 * min(max(depth_of(name), 0), 3)
        assert torch.allclose(made[name], base[name] + factor * (tuned[name] - base[name]), rtol=1e-6, atol=1e-8)
    assert torch.equal(made[kept], base[kept]), "what training left alone is left alone"
    assert torch.equal(made["model.norm.weight"], tuned["model.norm.weight"])


def test_deltas_add_up(tmp_path: Path) -> None:
    base, one, other = (make("llama", tmp_path / f"m{seed}", seed) for seed in range(3))
    made = tensors(weights.add_deltas(base, [one, other], [0.4, -0.7], tmp_path / "out"))
    b, x, y = map(tensors, (base, one, other))
    for name in b:
        by_hand = b[name] + 0.4 * (x[name] - b[name]) - 0.7 * (y[name] - b[name])
        assert torch.allclose(made[name], by_hand, rtol=1e-6, atol=1e-7)
    alone = weights.add_deltas(base, [one, other], [0, 1], tmp_path / "alone")
    assert same_bits(tensors(alone), tensors(other))


def test_restored_blocks_are_the_bases_and_the_rest_is_the_tuned_models(family: str, tmp_path: Path) -> None:
    base, tuned = (make(family, tmp_path / f"m{seed}", seed, "bfloat16") for seed in (1, 2))
    if family == "resnet":  # training moves the counters, which are integers
        rewrite(tuned, lambda held: [t.add_(7) for name, t in held.items() if name.endswith("num_batches_tracked")])
    made = tensors(weights.restore(tuned, base, {1, 2}, tmp_path / "out"))
    b, t = tensors(base), tensors(tuned)
    depths = TensorIndex.of(base).tensors
    assert {name for name in made if depths[name].depth in {1, 2}}
    for name, tensor in made.items():
        assert bits(tensor) == bits((b if depths[name].depth in {1, 2} else t)[name])


def test_one_stack_of_several_is_restored_by_a_function(tmp_path: Path) -> None:
    base, tuned = (make("t5", tmp_path / f"m{seed}", seed) for seed in (1, 2))
    with pytest.raises(RequestError, match=r"no single stack.*decoder.block \(3 blocks\), encoder.block \(2 blocks\)"):
        weights.restore(tuned, base, {1}, tmp_path / "out")
    chosen = "decoder.block.1."
    out = weights.restore(tuned, base, lambda t: t.stack == "decoder.block" and t.depth == 1, tmp_path / "out")
    b, t = tensors(base), tensors(tuned)
    assert all(torch.equal(x, (b if name.startswith(chosen) else t)[name]) for name, x in tensors(out).items())


def test_batch_norms_of_differing_age_are_blended(tmp_path: Path) -> None:
    one, other = (make("resnet", tmp_path / f"m{seed}", seed) for seed in (1, 2))
    rewrite(other, lambda held: [t.add_(7) for name, t in held.items() if name.endswith("num_batches_tracked")])
    made, first = tensors(weights.blend([one, other], [0.5, 0.5], tmp_path / "out")), tensors(one)
    counters = [name for name in made if name.endswith("num_batches_tracked")]
    assert counters and all(torch.equal(made[name], first[name]) for name in counters)


# pieces, whole tensors, memory


def test_pieces_do_not_change_the_result(two: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    by_rows = weights.blend(two, [0.5, 0.25], tmp_path / "one")
    monkeypatch.setattr(pieces, "PIECE", 7)
    assert same_bits(tensors(weights.blend(two, [0.5, 0.25], tmp_path / "many")), tensors(by_rows))


def test_the_system_may_read_and_write_less_than_was_asked(
    two: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = tensors(weights.blend(two, [0.5, 0.5], tmp_path / "at-once"))
    read, write = os.preadv, os.pwrite
    monkeypatch.setattr("os.preadv", lambda file, views, place: read(file, [views[0][:1000]], place))
    monkeypatch.setattr("os.pwrite", lambda file, view, place: write(file, view[:999], place))
    assert same_bits(tensors(weights.blend(two, [0.5, 0.5], tmp_path / "bit-by-bit")), expected)


def test_whole_tensors_come_in_their_shape(two: list[Path], tmp_path: Path) -> None:
    def best_of_rank_2(_: TensorFacts, held: list[Tensor]) -> Tensor:
        if held[0].ndim < 2:
            return held[1]
        u, s, v = torch.linalg.svd(held[1] - held[0], full_matrices=False)
        return held[0] + (u[:, :2] * s[:2]) @ v[:2]

    made = tensors(weights.stream(two, best_of_rank_2, tmp_path / "out", whole=True))
    base, tuned = map(tensors, two)
    for name, tensor in made.items():
        if tensor.ndim == 2:
            assert torch.linalg.matrix_rank(tensor - base[name], atol=1e-4) == 2
        else:
            assert torch.equal(tensor, tuned[name])


def test_memory_does_not_grow_with_the_largest_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    big = models.save(tiny_llama(vocab_size=40_000), None, tmp_path / "big")
    largest = max(tensor.bytes for tensor in TensorIndex.of(big).tensors.values())
    monkeypatch.setattr(pieces, "PIECE", 1024)
    running, most, lock = 0, 0, threading.Lock()
    sizes: set[int] = set()

    def watched(_: TensorFacts, held: list[Tensor]) -> Tensor:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
            sizes.update(tensor.numel() for tensor in held)
        try:
            return held[0] * 0.5 + held[1] * 0.5
        finally:
            with lock:
                running -= 1

    def peak(out: str, whole: bool) -> int:
        """Bytes of buffers at most: they are Python's, so its allocator counts them."""
        tracemalloc.start()
        try:
            weights.stream([big, big], watched, tmp_path / out, whole=whole)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    weights.stream([big, big], watched, tmp_path / "first", whole=False)  # imports
    assert peak("pieces", whole=False) < largest / 10
    assert max(sizes) == 1024 and most <= pieces.THREADS
    assert peak("whole", whole=True) > 2 * largest, "the counter sees the buffers"
    assert max(sizes) == largest // 4


def test_the_architecture_is_built_only_where_depth_is_asked_for_and_names_leave_it_open(
    two: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[str] = []

    def counted(known: models.Checkpoint) -> None:
        built.append(known.folder.name)

    monkeypatch.setattr(index, "planned", counted)
    weights.blend(two, [0.5, 0.5], tmp_path / "same")
    assert not built
    weights.blend(two, [lambda t: t.depth / t.blocks, 1], tmp_path / "ramp")
    assert not built, "the names of an ordinary language model are enough"
    config = json.loads((two[0] / "config.json").read_text())
    for folder in two:
        (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    weights.blend(two, [lambda t: t.depth / t.blocks, 1], tmp_path / "longer")
    assert built == ["m1"]


def test_torchs_threads_are_as_before(two: list[Path], tmp_path: Path) -> None:
    torch.set_num_threads(2)
    weights.blend(two, [0.5, 0.5], tmp_path / "out")
    assert torch.get_num_threads() == 2
    with ThreadPoolExecutor(1) as pool:  # a new thread takes what was set last, by whichever thread
        assert pool.submit(torch.get_num_threads).result() == 2


# live models


def test_live_models_are_combined_by_the_same_functions(family: str, tmp_path: Path) -> None:
    a, b = FAMILIES[family](), FAMILIES[family]()
    folders = [models.save(model, None, tmp_path / name) for name, model in (("a", a), ("b", b))]
    rule = weights.weighted_deltas([lambda t: (t.depth + 1) / 5])
    state = weights.combined([a, b], rule)
    out = weights.stream(folders, rule, tmp_path / "out")
    a.load_state_dict(state)
    reloaded: Any = type(a)
    expected = reloaded.from_pretrained(out).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in a.state_dict().items())
    with pytest.raises(RequestError, match="do not have the same tensors"):
        weights.combined([a, tiny_llama(num_hidden_layers=2)], rule)


# numbers


def test_delta_norms_by_tensor_depth_and_in_total(two: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE", 100)
    norms = weights.delta_norms(*two)
    a, b = map(tensors, two)
    moved = {name: (b[name] - a[name]).double() for name in a}
    assert norms.by_tensor == pytest.approx({name: float(delta.norm()) for name, delta in moved.items()}, rel=1e-5)
    assert norms.total == pytest.approx(float(torch.cat([d.flatten() for d in moved.values()]).norm()), rel=1e-5)
    assert list(norms.by_depth) == [("model.layers", depth) for depth in range(-1, 5)]
    block = torch.cat([delta.flatten() for name, delta in moved.items() if depth_of(name) == 2])
    assert norms.by_depth["model.layers", 2] == pytest.approx(float(block.norm()), rel=1e-5)
    assert weights.delta_norms(two[0], two[0]).total == 0.0


def test_cosines_between_models_and_between_changes(tmp_path: Path) -> None:
    base, one, other = (make("llama", tmp_path / f"m{seed}", seed) for seed in range(3))
    back = weights.add_deltas(base, [one], [-1], tmp_path / "back")
    assert weights.cosine(one, one).total == pytest.approx(1)
    assert weights.cosine(one, back, base).total == pytest.approx(-1, abs=1e-5)
    assert weights.cosine(one, base, base).total == 0.0, "no change has no direction"
    b, x, y = (torch.cat([t.flatten() for t in tensors(m).values()]).double() for m in (base, one, other))
    assert weights.cosine(one, other, base).total == pytest.approx(
        float(torch.nn.functional.cosine_similarity(x - b, y - b, 0)), abs=1e-6
    )


def test_sums_over_whole_tensors(two: list[Path]) -> None:
    def nuclear(_: TensorFacts, held: list[Tensor]) -> Tensor:
        return torch.linalg.svdvals(held[0])[..., :1].flatten() if held[0].ndim == 2 else torch.zeros(1)

    found = weights.reduction(two[:1], nuclear, lambda sums: sums.item(), whole=True)
    for name, tensor in tensors(two[0]).items():
        expected = float(torch.linalg.matrix_norm(tensor, 2)) if tensor.ndim == 2 else 0.0
        assert found.by_tensor[name] == pytest.approx(expected, rel=1e-5)
