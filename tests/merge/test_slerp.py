"""Slerp: the arc by its definition, its ends, and vectors between which there is no arc."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from contract import Case
from merging import base_and_two
from overhaul import models
from overhaul.errors import RequestError
from overhaul.merge.slerp import slerp
from overhaul.weights import pieces
from tiny_checkpoints import depth_of, make, rewrite, same_bits, tensors, two_llamas

CASE = Case(
    method=slerp,
    idle={"tokenizer": "the models of the case have one vocabulary and no tokenizer"},
    materials=lambda folder: {"base": (both := base_and_two(folder))["base"], "tuned": both["tuned"][0]},
    knobs={"scale": 0.4},
    varied={
        "scale": (0.4, 0.7),
        "beta": (0.0, 0.3),
        "outside": ("alpha", "by_position", {"beta": 0.3}),
    },
)


def arc(a: Tensor, b: Tensor, t: float) -> Tensor:
    """By its definition: rotate the direction of a towards that of b; each length counts by its own share of the angle."""
    a, b = a.double(), b.double()
    turn = float((a * b).sum() / (a.norm() * b.norm()))
    if abs(turn) > 0.9995:
        return (1 - t) * a + t * b
    omega = math.acos(turn)
    return (math.sin((1 - t) * omega) * a + math.sin(t * omega) * b) / math.sin(omega)


@pytest.mark.parametrize("family", ["llama", "gpt2", "resnet"])
def test_it_is_the_arc(family: str, tmp_path: Path) -> None:
    base, tuned = (make(family, tmp_path / f"m{seed}", seed) for seed in (1, 2))
    done = slerp(base, tuned, scale=0.3, out=tmp_path / "out")
    b, t, made = map(tensors, (base, tuned, done.model))
    for name in (name for name in b if b[name].is_floating_point() and b[name].any() and t[name].any()):
        assert torch.allclose(made[name].double(), arc(b[name], t[name], 0.3), atol=1e-6), name
    models.open_model(done.model)


def test_vectors_of_one_length_keep_it(tmp_path: Path) -> None:
    base, tuned = two_llamas(tmp_path)
    for path in (base, tuned):
        rewrite(path, lambda held: held.update({name: t / t.norm() for name, t in held.items()}))
    done = slerp(base, tuned, out=tmp_path / "out")
    assert all(float(made.norm()) == pytest.approx(1, abs=1e-5) for made in tensors(done.model).values())
    assert done.facts["angle"] > 45


def test_t_follows_the_depth(tmp_path: Path) -> None:
    base, tuned = two_llamas(tmp_path)
    done = slerp(base, tuned, scale=0.1, beta=0.6, outside="by_position", out=tmp_path / "out")
    b, t, made = map(tensors, (base, tuned, done.model))
    for name in b:
        share = min(max(depth_of(name), 0), 3) / 3
        assert torch.allclose(made[name].double(), arc(b[name], t[name], 0.1 + 0.6 * share), atol=1e-6), name
    assert done.layers["coefficient"][4] == pytest.approx(0.7)


def test_its_ends_are_the_models(tmp_path: Path) -> None:
    base, tuned = two_llamas(tmp_path)
    assert same_bits(tensors(slerp(base, tuned, scale=1.0, out=tmp_path / "end").model), tensors(tuned))
    with pytest.raises(RequestError, match=r"merge.slerp: scale 0 would change nothing"):
        slerp(base, tuned, scale=0.0, out=tmp_path / "none")


def test_where_there_is_no_arc(tmp_path: Path) -> None:
    base, tuned = two_llamas(tmp_path)
    longer, opposite, none = (f"model.layers.{n}.mlp.up_proj.weight" for n in range(3))
    held = tensors(base)
    rewrite(tuned, lambda t: t.update({longer: 3 * held[longer], opposite: -held[opposite], none: 0 * held[none]}))
    b, t, made = held, tensors(tuned), tensors(slerp(base, tuned, scale=0.25, out=tmp_path / "out").model)
    assert torch.allclose(made[longer], 1.5 * b[longer], atol=1e-7), "parallel: the chord"
    assert torch.allclose(made[opposite], 0.5 * b[opposite], atol=1e-7), "opposite: the chord"
    assert torch.allclose(made[none], math.sin(0.75 * math.pi / 2) * b[none], atol=1e-6), "zeros: perpendicular"
    assert torch.isfinite(made[none]).all() and not t[none].any()


def test_a_piece_is_no_vector_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, tuned = two_llamas(tmp_path)
    whole = tensors(slerp(base, tuned, out=tmp_path / "one").model)
    monkeypatch.setattr(pieces, "PIECE", 100)
    cut = tensors(slerp(base, tuned, out=tmp_path / "two").model)
    assert all(torch.allclose(cut[name], whole[name], atol=1e-7) for name in whole)
