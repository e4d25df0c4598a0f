"""WiSE-FT: a straight line between two models, which may be steeper in late blocks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from contract import Case
from merging import base_and_two
from overhaul import models
from overhaul.errors import RequestError
from overhaul.merge.lines import lines
from overhaul.merge.wise_ft import wise_ft
from tiny_checkpoints import make, same_bits, tensors, two_llamas

CASE = Case(
    method=wise_ft,
    idle={"tokenizer": "the models of the case have one vocabulary and no tokenizer"},
    materials=lambda folder: {"base": (both := base_and_two(folder))["base"], "tuned": both["tuned"][0]},
    knobs={"scale": 0.4},
    varied={
        "scale": (0.4, 0.7),
        "beta": (0.0, 0.3),
        "outside": ("alpha", "by_position", {"beta": 0.3}),
    },
)


def test_it_is_the_formula_and_lines_with_a_flat_ramp(tmp_path: Path) -> None:
    base, tuned = two_llamas(tmp_path)
    done = wise_ft(base, tuned, scale=0.3, out=tmp_path / "out")
    b, t, made = map(tensors, (base, tuned, done.model))
    assert all(torch.equal(made[name], torch.lerp(b[name], t[name], 0.3)) for name in b)
    flat = lines(base, [tuned], alpha=0.3, beta=0.0, out=tmp_path / "flat").model
    assert same_bits(made, tensors(flat)), "LiNeS with beta 0"
    models.open_model(done.model)


def test_a_ramp_is_that_of_lines(tmp_path: Path) -> None:
    base, tuned = two_llamas(tmp_path)
    for outside in ("alpha", "by_position"):
        ours = wise_ft(base, tuned, scale=0.2, beta=0.8, outside=outside, out=tmp_path / outside)
        theirs = lines(base, [tuned], alpha=0.2, outside=outside, out=tmp_path / f"lines-{outside}")
        assert same_bits(tensors(ours.model), tensors(theirs.model))
        assert ours.layers == theirs.layers


def test_its_ends_are_the_models_and_what_is_trained_in_bfloat16_is_rounded_once(tmp_path: Path) -> None:
    base, tuned = (make("gpt2", tmp_path / f"m{seed}", seed, "bfloat16") for seed in (1, 2))
    whole = wise_ft(base, tuned, scale=1.0, out=tmp_path / "whole").model
    assert same_bits(tensors(whole), tensors(tuned))
    b, t, made = map(tensors, (base, tuned, wise_ft(base, tuned, scale=0.5, out=tmp_path / "half").model))
    assert all(torch.equal(made[n], torch.lerp(b[n].float(), t[n].float(), 0.5).bfloat16()) for n in b)
    with pytest.raises(RequestError, match=r"merge.wise_ft: scale 0 would change nothing"):
        wise_ft(base, tuned, scale=0.0, out=tmp_path / "none")
    with pytest.raises(RequestError, match=r"are the base itself"):
        wise_ft(base, base, out=tmp_path / "none")
