"""LiNeS: the table of factors, the two regimes and their limits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import tiny_llama, tiny_tokenizer
from contract import Case
from merging import flat, ties_change, unflat
from overhaul import models, weights
from overhaul.errors import RequestError
from overhaul.merge.lines import lines
from overhaul.recipe.run import run
from tiny_checkpoints import depth_of, make, same_bits, tensors, two_llamas

CASE = Case(
    method=lines,
    idle={"tokenizer": "the models of the case have one vocabulary and no tokenizer"},
    materials=lambda folder: dict(zip(("base", "tuned"), _case(folder), strict=True)),
    knobs={"alpha": 0.3, "beta": 0.5},
    varied={
        "alpha": (0.3, 0.5),
        "beta": (0.5, 0.7),
        "merge": ("task_arithmetic", "ties"),
        "outside": ("alpha", "by_position"),
        "density": (0.2, 0.5, {"merge": "ties"}),
    },
)


def _case(folder: Path) -> tuple[models.Checkpoint, list[models.Checkpoint]]:
    base, *tuned = (models.facts(make("llama", folder / f"case{seed}", seed)) for seed in range(3))
    return base, tuned


def factor(name: str, alpha: float, beta: float, after: float) -> float:
    depth = depth_of(name)
    return alpha if depth < 0 else after if depth > 3 else alpha + beta * depth / 3


@pytest.mark.parametrize("outside", ["alpha", "by_position"])
def test_one_change_is_scaled_by_depth(outside: Any, tmp_path: Path) -> None:
    base, tuned = two_llamas(tmp_path)
    done = lines(base, [tuned], alpha=0.25, outside=outside, out=tmp_path / "out")
    b, t = tensors(base), tensors(tuned)
    after = 1.0 if outside == "by_position" else 0.25
    for name, made in tensors(done.model).items():
        assert torch.allclose(made, b[name] + factor(name, 0.25, 0.75, after) * (t[name] - b[name]), atol=1e-7)
    assert done.layers["coefficient"] == pytest.approx({-1: 0.25, 0: 0.25, 1: 0.5, 2: 0.75, 3: 1.0, 4: after})
    assert (done.facts["alpha"], done.facts["beta"]) == (0.25, 0.75)
    models.open_model(done.model)


def test_alpha_1_is_the_tuned_model_and_a_flat_line_is_an_interpolation(tmp_path: Path) -> None:
    base, tuned = two_llamas(tmp_path)
    whole = lines(base, [tuned], alpha=1.0, out=tmp_path / "whole").model
    assert same_bits(tensors(whole), tensors(tuned))
    flat_line = lines(base, [tuned], alpha=0.4, beta=0.0, out=tmp_path / "flat").model
    assert same_bits(tensors(flat_line), tensors(weights.scale_by_depth(base, tuned, 0.4, tmp_path / "wise")))


def test_it_is_linear_in_the_changes(tmp_path: Path) -> None:
    base, one, other = (make("llama", tmp_path / f"m{seed}", seed) for seed in range(3))
    together = lines(base, [one, other], alpha=0.2, beta=0.6, out=tmp_path / "both").model
    apart = [
        lines(base, [tuned], alpha=0.2, beta=0.6, out=tmp_path / tuned.name / "lines").model for tuned in (one, other)
    ]
    b, made, x, y = map(tensors, (base, together, *apart))
    assert all(torch.allclose(made[name] - b[name], x[name] + y[name] - 2 * b[name], atol=1e-6) for name in b)


def test_alpha_of_a_plain_sum_is_one_over_the_number(tmp_path: Path) -> None:
    base, *tuned = (make("llama", tmp_path / f"m{seed}", seed) for seed in range(4))
    done = lines(base, tuned, beta=0.5, out=tmp_path / "out")
    assert done.facts["alpha"] == 1 / 3
    b, *t = map(tensors, (base, *tuned))
    name = "model.layers.1.mlp.up_proj.weight"
    expected = b[name] + (1 / 3 + 0.5 / 3) * sum((state[name] - b[name] for state in t), torch.zeros_like(b[name]))
    assert torch.allclose(tensors(done.model)[name], expected, atol=1e-6)


def test_alpha_of_ties_is_the_ratio_of_the_norms(tmp_path: Path) -> None:
    base, *tuned = (make("llama", tmp_path / f"m{seed}", seed) for seed in range(3))
    done = lines(base, tuned, beta=0.5, merge="ties", density=0.3, out=tmp_path / "out")
    b = tensors(base)
    changes = [flat(tensors(path)) - flat(b) for path in tuned]
    merged = ties_change(changes, 0.3)
    alpha = float((changes[0] + changes[1]).abs().sum() / merged.abs().sum()) / 2
    assert done.facts["alpha"] == pytest.approx(alpha, rel=1e-5)
    change: dict[str, Tensor] = unflat(merged, b)
    for name, made in tensors(done.model).items():
        assert torch.allclose(made, b[name] + factor(name, alpha, 0.5, alpha) * change[name], atol=1e-6)


def test_every_stack_has_a_ramp_and_names_with_two_numbers_are_read_right(tmp_path: Path) -> None:
    base, tuned = (make("t5", tmp_path / f"m{seed}", seed) for seed in (1, 2))
    done = lines(base, [tuned], alpha=0.2, out=tmp_path / "out")
    assert done.layers["coefficient, encoder.block"] == pytest.approx({-1: 0.2, 0: 0.2, 1: 1.0, 2: 0.2})
    assert done.layers["coefficient, decoder.block"] == pytest.approx({0: 0.2, 1: 0.6, 2: 1.0, 3: 0.2})
    b, t, made = map(tensors, (base, tuned, done.model))
    name = "decoder.block.1.layer.0.SelfAttention.k.weight"
    assert torch.allclose(made[name], b[name] + 0.6 * (t[name] - b[name]), atol=1e-7)


def test_what_the_formulas_leave_open_is_asked_for(tmp_path: Path) -> None:
    base, tuned = two_llamas(tmp_path)
    with pytest.raises(RequestError, match="with one tuned checkpoint, alpha has to be given"):
        lines(base, [tuned], out=tmp_path / "out")
    with pytest.raises(RequestError, match="with 2 tuned checkpoints, beta has to be given"):
        lines(base, [tuned, tuned], out=tmp_path / "out")
    with pytest.raises(RequestError, match="alpha=-1"):
        lines(base, [tuned], alpha=-1, out=tmp_path / "out")


def test_a_recipe_merges_folders_and_gives_what_the_call_gives(tmp_path: Path) -> None:
    base, *tuned = (models.save(tiny_llama(), tiny_tokenizer(), tmp_path / f"m{n}") for n in range(3))
    (tmp_path / "rows.jsonl").write_text('{"question": "who?", "answer": "a"}\n' * 4)
    done = run(
        {
            "model": str(base),
            "materials": {
                "first": {"model": str(tuned[0])},
                "tuned": ["first", {"model": str(tuned[1])}],
                "text": {"from": str(tmp_path / "rows.jsonl")},
            },
            "steps": [{"merge.lines": {"beta": 0.5, "merge": "ties"}}],
            "judge": {"kept": {"accuracy": "text"}},
        },
        tmp_path / "run",
    )
    called = lines(base, tuned, beta=0.5, merge="ties", out=tmp_path / "out")
    assert same_bits(tensors(done.folder / "model"), tensors(called.model))
    (record,) = done.report["steps"]
    assert record["facts"]["alpha"] == pytest.approx(called.facts["alpha"])
