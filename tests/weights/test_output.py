"""New checkpoints: what is in the folder, what is refused, and that nothing is left when something goes wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from conftest import tiny_llama
from families import FAMILIES
from overhaul import models, session, weights
from overhaul.errors import RequestError, RunError
from tiny_checkpoints import (
    EVERY,
    depth_of,
    left,
    make,
    refused,
    rewrite,
    sharded,
    tensors,
    two_llamas,
)


@pytest.fixture
def two(tmp_path: Path) -> list[Path]:
    return two_llamas(tmp_path)


# the new folder


@pytest.mark.parametrize("size", [None, 40_000])
def test_files_are_called_as_the_first_models_are(size: int | None, tmp_path: Path) -> None:
    pair = [models.save(FAMILIES["DiT"].build(), None, tmp_path / f"m{n}") for n in range(2)]
    storage: Any = {} if size is None else {"shard_bytes": size}
    made = weights.blend(pair, [0.5, 0.5], tmp_path / "out", **storage)
    files = [name for name in left(made) if ".safetensors" in name]
    assert all(name.startswith("diffusion_pytorch_model") for name in files) and len(files) == (
        1 if size is None else 6
    )
    models.open_model(made)


@pytest.mark.parametrize("family", EVERY)
def test_the_result_loads_with_from_pretrained(family: str, tmp_path: Path) -> None:
    folders = [make(family, tmp_path / f"m{seed}", seed) for seed in (1, 2)]
    out = weights.blend(folders, [0.5, 0.5], tmp_path / "out")
    kind: Any = type(EVERY[family]())
    model, told = kind.from_pretrained(out, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"] and not told["mismatched_keys"]
    assert models.facts(out).config == models.facts(folders[0]).config
    loaded = [kind.from_pretrained(folder).state_dict() for folder in folders]
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            assert torch.allclose(tensor, (loaded[0][name] + loaded[1][name]) / 2)


def test_tokenizer_and_licence_come_along_and_old_weights_and_lineage_do_not(folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "m"
    source.mkdir()
    for path in folder.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    for name in ("LICENSE", "lineage.json", "pytorch_model.bin", "optimizer.pt"):
        (source / name).write_text("{}")
    out = weights.blend([source, folder], [0.5, 0.5], tmp_path / "out")
    assert left(out) == sorted([*left(folder), "LICENSE", "README.md", "lineage.json"])
    _, tokenizer = models.open_model(out)
    assert tokenizer is not None


def test_shards_of_different_layouts_are_matched_and_the_first_layout_is_kept(tmp_path: Path) -> None:
    a, b = tiny_llama(), tiny_llama()
    one, other = sharded(a, tmp_path / "a", "20KB"), sharded(b, tmp_path / "b", "33KB")
    third = models.save(b, None, tmp_path / "c")
    assert len(left(one)) != len(left(other))
    out = weights.blend([one, other, third], [0.5, 0.25, 0.25], tmp_path / "out")
    assert left(out) == sorted([*left(one), "README.md", "lineage.json"])
    for path in one.glob("*.safetensors"):
        assert load_file(path).keys() == load_file(out / path.name).keys()
        with safe_open(str(out / path.name), framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
    assert json.loads((out / "model.safetensors.index.json").read_text())["weight_map"].keys() == tensors(one).keys()
    made, x, y = tensors(out), tensors(one), tensors(other)
    assert all(torch.allclose(made[name], (x[name] + y[name]) / 2) for name in x)
    kind: Any = type(a)
    _, told = kind.from_pretrained(out, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]


def test_shards_and_dtype_as_asked(two: list[Path], tmp_path: Path) -> None:
    out = weights.blend(two, [0.5, 0.5], tmp_path / "out", dtype="bfloat16", shard_bytes=20_000)
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 2 and all(path.stat().st_size < 20_000 + 4_000 for path in files)
    assert all(tensor.dtype == torch.bfloat16 for tensor in tensors(out).values())
    a, b = map(tensors, two)
    assert all(torch.equal(t, (0.5 * a[name] + 0.5 * b[name]).bfloat16()) for name, t in tensors(out).items())
    model, _ = models.open_model(out, dtype="bfloat16")
    assert models.facts(out).config["dtype"] == "bfloat16" and next(model.parameters()).dtype == torch.bfloat16
    back = weights.blend([out], [1], tmp_path / "back", dtype="float32", shard_bytes=10**9)
    assert [path.name for path in back.glob("*.safetensors*")] == ["model.safetensors"]


def test_numbers_stay_aligned_to_their_size(two: list[Path], tmp_path: Path) -> None:
    for folder in two:  # in bfloat16 the odd one would push the integers to an uneven place
        odd = {"a.odd": torch.ones(3), "model.layers.0.count": torch.arange(4).int()}
        rewrite(folder, lambda held, odd=odd: held.update(odd))
    whole = weights.blend(two, [0.5, 0.5], tmp_path / "whole", dtype="bfloat16")
    for folder in (whole, weights.blend(two, [0.5, 0.5], tmp_path / "parts", dtype="bfloat16", shard_bytes=9_000)):
        assert all(t.offset % t.dtype.itemsize == 0 for t in weights.TensorIndex.of(folder).tensors.values())
        assert tensors(folder)["model.layers.0.count"].tolist() == [0, 1, 2, 3]


def test_only_some_tensors_are_combined(two: list[Path], tmp_path: Path) -> None:
    made = tensors(weights.blend(two, [0, 1], tmp_path / "out", only={0, 3}))
    a, b = map(tensors, two)
    assert all(torch.equal(t, (b if depth_of(name) in {0, 3} else a)[name]) for name, t in made.items())


def test_wrong_arguments_are_refused(two: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    refused(two, two[0], "exists already")
    refused(two, out, r"dtype 'bfloat61' is not possible. Did you mean 'bfloat16'", dtype="bfloat61")
    refused(two, out, "shard_bytes is 0", shard_bytes=0)
    refused(two, out, r"depths -1 to 4 .* none are at \[5, 9\]", only={0, 5, 9})
    refused(two, out, "none are at no depth at all", only=set())
    refused(two, out, "chooses none of the 38 tensors", only=lambda t: t.depth > 9)
    with pytest.raises(RequestError, match="2 models and 1 coefficients"):
        weights.blend(two, [1.0], out)
    with pytest.raises(RequestError, match="nan is not a finite number"):
        weights.blend(two, [1.0, float("nan")], out)
    with pytest.raises(RequestError, match="no coefficient"):
        weights.add_deltas(two[0], [], [], out)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    refused(two, out, r"needs 0\.0 GB, but .* has 0\.0 GB left")


# what goes wrong under way


def fails(match: str, work: Callable[[], object], folder: Path) -> None:
    before = left(folder)
    with pytest.raises(RunError, match=match):
        work()
    assert left(folder) == before, "nothing is left half-written"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_numbers_that_are_not_finite_are_named(value: float, dtype: str, tmp_path: Path) -> None:
    one, other = (make("llama", tmp_path / f"m{seed}", seed, dtype) for seed in (1, 2))
    rewrite(other, lambda held: held["model.layers.2.mlp.up_proj.weight"][3].fill_(value))
    said = r"m2/model\.safetensors: model\.layers\.2\.mlp\.up_proj\.weight holds values that are not finite"
    fails(said, lambda: weights.blend([one, other], [0.5, 0.5], tmp_path / "out"), tmp_path)
    fails(said, lambda: weights.restore(one, other, {2}, tmp_path / "out"), tmp_path)
    fails(said, lambda: weights.delta_norms(one, other), tmp_path)


def test_large_finite_numbers_are_finite(two: list[Path], tmp_path: Path) -> None:
    name = "model.norm.weight"
    rewrite(two[0], lambda held: held[name].fill_(3e38))
    made = weights.scale_by_depth(two[0], two[1], 0, tmp_path / "out")
    assert torch.equal(tensors(made)[name], torch.full((32,), 3e38))


def test_a_result_too_large_for_its_dtype_is_named(tmp_path: Path) -> None:
    one = make("llama", tmp_path / "m", 1, "float16")
    said = r"new model\.norm\.weight \(depth 4\) is not finite in torch\.float16"
    chosen: dict[str, Any] = {"only": lambda t: t.name == "model.norm.weight"}
    fails(said, lambda: weights.blend([one], [65520.0], tmp_path / "out", **chosen), tmp_path)
    fits = weights.blend([one], [65519.0], tmp_path / "fits", **chosen)
    assert torch.equal(tensors(fits)["model.norm.weight"], torch.full((32,), 65504.0).half())


def test_integers_that_differ_are_named(two: list[Path], tmp_path: Path) -> None:
    for number, folder in enumerate(two):
        rewrite(folder, lambda held, n=number: held.update({"model.layers.0.codes": torch.tensor([1, 2, n])}))
    said = r"model\.layers\.0\.codes \(torch\.int64\) differs between .*m1.* and .*m2"
    fails(said, lambda: weights.blend(two, [0.5, 0.5], tmp_path / "out"), tmp_path)
    kept = weights.blend(two, [0.5, 0.5], tmp_path / "kept", only=lambda t: "codes" not in t.name)
    assert tensors(kept)["model.layers.0.codes"].tolist() == [1, 2, 0]


def test_a_coefficient_function_that_fails_is_named(two: list[Path], tmp_path: Path) -> None:
    rule: list[weights.Coefficient] = [1, lambda t: float("inf") if t.depth == 3 else 0.0]
    said = r"coefficient of model\.layers\.3\..* \(depth 3\) is inf"
    fails(said, lambda: weights.blend(two, rule, tmp_path / "out"), tmp_path)


def test_a_combining_function_that_changes_the_shape_is_told_so(two: list[Path], tmp_path: Path) -> None:
    fails("has to keep the shape", lambda: weights.stream(two, lambda _, m: m[0].sum(), tmp_path / "out"), tmp_path)


def test_an_interruption_leaves_nothing(two: list[Path], tmp_path: Path) -> None:
    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    before = left(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        weights.stream(two, interrupted, tmp_path / "out")
    with session.using(report=interrupted), pytest.raises(KeyboardInterrupt):
        weights.blend(two, [0.5, 0.5], tmp_path / "out")
    assert left(tmp_path) == before
    (tmp_path / ".out.partial").mkdir()  # a killed process could not clean up
    weights.blend(two, [0.5, 0.5], tmp_path / "out")
    assert left(tmp_path) == sorted([*before, "out"])


def test_a_file_that_shrinks_is_named(two: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.preadv", lambda *_: 0)
    fails("was cut short while .* was read", lambda: weights.blend(two, [0.5, 0.5], tmp_path / "out"), tmp_path)


def test_a_full_disk_is_said_in_words(two: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.pwrite", full)
    fails("the disk is full", lambda: weights.blend(two, [0.5, 0.5], tmp_path / "out"), tmp_path)
