"""Task arithmetic: the formula by hand, what is refused, and a folder that opens."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from contract import Case
from overhaul import models
from overhaul.errors import RequestError, RunError
from overhaul.merge.task_arithmetic import task_arithmetic
from tiny_checkpoints import make, rewrite, same_bits, tensors, two_llamas

CASE = Case(
    method=task_arithmetic,
    idle={"tokenizer": "the models of the case have one vocabulary and no tokenizer"},
    materials=lambda folder: dict(zip(("base", "tuned"), _case(folder), strict=True)),
    knobs={"scale": 0.4},
    varied={
        "scale": (0.4, 0.7),
        "beta": (0.0, 0.3),
        "outside": ("alpha", "by_position", {"beta": 0.3}),
        "weights": ([1.0, 1.0], [0.5, 1.0]),
    },
)


def _case(folder: Path) -> tuple[models.Checkpoint, list[models.Checkpoint]]:
    base, *tuned = (models.facts(make("llama", folder / f"case{seed}", seed)) for seed in range(3))
    return base, tuned


def test_the_changes_are_added(tmp_path: Path) -> None:
    base, *tuned = (make("llama", tmp_path / f"m{seed}", seed) for seed in range(3))
    done = task_arithmetic(base, tuned, scale=0.5, weights=[1.0, -0.5], out=tmp_path / "out")
    b, x, y = map(tensors, (base, *tuned))
    for name, made in tensors(done.model).items():
        assert torch.allclose(made, b[name] + 0.5 * (x[name] - b[name]) - 0.25 * (y[name] - b[name]), atol=1e-7)
    depths = range(-1, 5)
    assert done.layers["coefficient of change 1"] == dict.fromkeys(depths, 0.5)
    assert done.layers["coefficient of change 2"] == dict.fromkeys(depths, -0.25)
    alike = task_arithmetic(base, tuned, scale=0.5, out=tmp_path / "alike")
    assert alike.layers == {"coefficient": dict.fromkeys(depths, 0.5)}
    norms = sum("norm" in name for name in b)
    assert (done.facts["tensors"], done.facts["tensors_changed"]) == (len(b), len(b) - norms), "norms are ones in all"
    models.open_model(done.model)


def test_it_is_exact_at_its_ends(tmp_path: Path) -> None:
    base, tuned = two_llamas(tmp_path)
    whole = task_arithmetic(base, [tuned], scale=1.0, out=str(tmp_path / "whole")).model  # pyright: ignore[reportArgumentType]
    assert whole == tmp_path / "whole", "a folder is a Path, however it was named"
    assert same_bits(tensors(whole), tensors(tuned))


def test_it_is_stored_as_the_base_is(tmp_path: Path) -> None:
    base, tuned = make("gpt2", tmp_path / "base", 0, "bfloat16"), make("gpt2", tmp_path / "tuned", 1)
    made = tensors(task_arithmetic(base, [tuned], scale=0.3, out=tmp_path / "out").model)
    b, t = tensors(base), tensors(tuned)
    for name, tensor in made.items():
        assert torch.equal(tensor, torch.lerp(b[name].float(), t[name], 0.3).bfloat16())


def test_what_changes_nothing_is_an_error(tmp_path: Path) -> None:
    base, tuned = two_llamas(tmp_path)
    same = shutil.copytree(base, tmp_path / "same")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(RunError, match="changed nothing.*every tensor is the base's"):
        task_arithmetic(base, [same], out=tmp_path / "out")
    with pytest.raises(RequestError, match="the tuned checkpoints are the base itself"):
        task_arithmetic(base, [base, base], out=tmp_path / "out")
    with pytest.raises(RequestError, match=r"scale=1e\+39 is larger than a weight can be"):
        task_arithmetic(base, [tuned], scale=1e39, out=tmp_path / "out")
    with pytest.raises(RequestError, match="would change nothing"):
        task_arithmetic(base, [tuned], scale=0.0, out=tmp_path / "out")
    with pytest.raises(RequestError, match="2 tuned checkpoints and 1 weights"):
        task_arithmetic(base, [tuned, tuned], weights=[1.0], out=tmp_path / "out")
    with pytest.raises(RequestError, match="no tuned checkpoint"):
        task_arithmetic(base, [], out=tmp_path / "out")
    with pytest.raises(RequestError, match="say where, with out="):
        task_arithmetic(base, [tuned])
    assert sorted(tmp_path.iterdir()) == before


def test_what_rounding_takes_away_is_said(tmp_path: Path) -> None:
    base, tuned = (make("llama", tmp_path / f"m{seed}", seed, "bfloat16") for seed in (1, 2))
    with pytest.raises(RunError, match="lost in rounding"):
        task_arithmetic(base, [tuned], scale=1e-9, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_variance_below_0_is_refused(tmp_path: Path) -> None:
    base, tuned = (make("resnet", tmp_path / f"m{seed}", seed) for seed in (1, 2))
    rewrite(tuned, lambda held: [t.mul_(2) for name, t in held.items() if name.endswith("running_var")])
    with pytest.raises(RunError, match="running_var became negative"):
        task_arithmetic(base, [tuned], scale=-2.0, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
