"""Pools of LoRAs: each formula against whole matrices, peft's own merge, what stands beside, and what is refused."""

from __future__ import annotations

import functools
import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import learnt as trained
from conftest import FAMILIES, examples_for, tiny_llama
from contract import Case, pictures, some_facts
from overhaul import models, session
from overhaul.adapter_folders import LowRank, low_rank_scales, read_low_rank
from overhaul.data.examples import IGNORED, collate
from overhaul.errors import RequestError, RunError
from overhaul.fit import Regime
from overhaul.forward import forward
from overhaul.merge.loras import (
    BASE,
    BOTH,
    FRESH,
    MERGE,
    RANDOM,
    RANDOM_BOTH,
    RESCALED,
    ROUTED,
    formulas,
    loras,
    names_of,
)
from overhaul.merge.loras.choosing import likeness, product, squared
from overhaul.merge.loras.controls import Arrow, prototype, redrawn, routed
from overhaul.merge.loras.how import How
from overhaul.merge.loras.layers import Fixed, Mixed, added, concatenated, exchanged, fold
from overhaul.merge.loras.learning import Learnt, Lesson, learnt, measured, mixture
from overhaul.merge.loras.trial import Trial
from overhaul.recipe.check import check
from overhaul.recipe.spec import read as read_recipe
from pools import lora, three
from tiny_checkpoints import make

SMALL = {"steps": 3, "batch_size": 4, "every": 2, "rank": 2, "count": 2, "lora_lr": 1e-2}


def _materials(folder: Path) -> dict[str, Any]:
    base = make("llama", folder / "base", 0)
    return _given(base, three(base, folder))


def _given(base: Path, folders: Sequence[Path]) -> dict[str, Any]:
    pool = [models.facts(one) for one in folders]
    return {
        "model": models.open_model(base)[0], "adapters": pool, "train": some_facts(0, 8), "valid": some_facts(8, 4),
        "test": some_facts(12, 4),
    }  # fmt: skip


@functools.cache
def _kept() -> tuple[Path, list[Path]]:
    """A base and its pool that no test writes to."""
    folder = Path(tempfile.mkdtemp(dir=trained.place))
    base = make("llama", folder / "base", 0)
    return base, three(base, folder)


SEARCHED = {"kind": "search", "with_fresh": True, "lora_lr": 0.03, "steps": 12, "evaluations": 8}
CASE = Case(
    method=loras,
    materials=lambda: _given(*_kept()),
    knobs=SMALL,
    varied={
        "kind": ("adaptive", "average"),
        "per": ("module", "expert"),
        "activation": ("leaky_relu", "sigmoid"),
        "start": ("zero", "equal"),
        "evaluations": (4, 8, {"kind": "search"}),
        "rule": (
            "exact",
            "separate",
            {"kind": "search", "with_fresh": True, "lora_lr": 0.03, "steps": 12, "evaluations": 8},
        ),
        "density": (0.2, 0.9, {"kind": "ties"}),
        "triplets": (1, 2, {"kind": "tsv"}),
        "with_fresh": (False, True),
        "choice": ("evaluation", "rank"),
        "count": (1, 2),
        "every": (1, 3),
        "rank": (2, 3),
        "lora_lr": (1e-3, 1e-2),
        "control_steps": (None, 1),
        "steps": (3, 4),
        "batch_size": (2, 4),
        "lr": (1e-2, 1e-1),
        "warmup": (0, 2),
        "schedule": ("cosine", "constant"),
        "weight_decay": (0.0, 5.0),
        "clip": (None, 1e-9),
    },
    apart={"peak": "the pool is made for a model of this width"},
)


def random_lora(out: int, wide: int, rank: int, seed: int, dtype: torch.dtype = torch.double) -> LowRank:
    draw = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(shape, generator=draw, dtype=dtype) for shape in ((rank, wide), (out, rank)))
    return LowRank(a, b, torch.full((rank,), 0.5 + seed, dtype=dtype))


POOL = [random_lora(7, 5, rank, seed) for seed, rank in enumerate((2, 3, 5), 1)]


# (1) the concatenated product


@pytest.mark.parametrize("missing", [None, 1])
def test_the_pool_in_one_product_is_the_sum_of_its_changes(missing: int | None) -> None:
    layer, x = nn.Linear(5, 7).double(), torch.randn(3, 4, 5, dtype=torch.double)
    parts = [None if n == missing else part for n, part in enumerate(POOL)]
    here = [part for part in parts if part is not None]
    w = torch.tensor([0.3, -0.7, 1.1], dtype=torch.double)
    strength = Learnt(nn.Parameter(w), parts, "identity", by_rank=False).double()
    given = Mixed(layer, concatenated(here), strength)(x)
    change = sum((w[n] * part.scale[0] * part.b @ part.a for n, part in enumerate(parts) if part), torch.zeros(()))
    assert torch.allclose(given, layer(x) + x @ change.T, atol=1e-10, rtol=0)
    assert torch.allclose(given, layer(x) + torch.einsum("...i,ri,r,or->...o", x, torch.cat([p.a for p in here]), strength(x), torch.cat([p.b for p in here], 1)), atol=1e-10, rtol=0)  # fmt: skip  # noqa: E501


def test_a_coefficient_of_every_rank_and_what_a_softmax_is_over() -> None:
    by_rank = Learnt(nn.Parameter(torch.arange(10.0)), POOL, "identity", by_rank=True)
    assert by_rank.coefficients().tolist() == list(range(10)) and by_rank.by_expert() == {0: 0.5, 1: 3.0, 2: 7.0}
    absent = Learnt(nn.Parameter(torch.tensor([1.0, 9.0, 1.0])), [POOL[0], None, POOL[2]], "softmax", by_rank=False)
    assert absent.by_expert() == {0: 0.5, 2: 0.5}


@pytest.mark.parametrize(("activation", "value"), [("identity", -0.5), ("squared", 0.25), ("sigmoid", 0.37754067), ("leaky_relu", -0.005)])  # fmt: skip  # noqa: E501
def test_activations(activation: str, value: float) -> None:
    found = Learnt(nn.Parameter(torch.tensor([-0.5])), POOL[:1], activation, by_rank=False).coefficients()
    assert found.tolist() == pytest.approx([value] * 2)


# (2) and (3) base, peft, fold


def logits(model: nn.Module, examples: Any) -> Tensor:
    with torch.no_grad():
        return forward(model.eval(), collate(examples.items))


def read(folder: Path, model: nn.Module) -> dict[str, LowRank]:
    known = models.facts(folder)
    return read_low_rank(known, low_rank_scales(known, model))


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True, "r": 4},
    "patterns": {"rank_pattern": {"up_proj": 3}, "alpha_pattern": {"layers.1.self_attn.q_proj": 9}},
    "some blocks": {"layers_to_transform": [1, 2]},
    "eva's name": {"init_lora_weights": "gaussian"},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_one_adapter_alone_is_pefts_merge(option: str, tmp_path: Path) -> None:
    base = make("llama", tmp_path / "base", 0)
    folder, examples = lora(base, tmp_path / "a", **OPTIONS[option]), some_facts(0, 4)
    model, theirs = models.open_model(base)[0], models.open_model(folder)[0]
    adapter = read(folder, model)
    before = logits(model, examples)
    layers = mixture(model, [adapter], How(), torch.Generator())
    with exchanged(model, layers):
        assert torch.equal(logits(model, examples), before), "coefficients of 0 give the base bit for bit"
        for layer in layers.values():
            strength: Any = layer.strength
            nn.init.ones_(strength.w)
        assert torch.allclose(logits(model, examples), logits(theirs, examples), atol=1e-5)
    assert torch.equal(logits(model, examples), before)
    fold(model, adapter)
    for (name, ours), other in zip(model.named_parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(ours, other, atol=1e-6), name
    assert not torch.allclose(logits(model, examples), before, atol=1e-2)


PLACES = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "c_fc"], "vit": ["query", "fc1"]}


@pytest.mark.parametrize("family", ["llama", "gpt2", "vit"])
def test_folded_says_what_was_beside_the_weights(family: str, tmp_path: Path) -> None:
    base = make(family, tmp_path / "base", 0)
    model = models.open_model(base)[0]
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    places = [name for name in PLACES[family] if name in names] or ["q_proj"]
    folder = lora(base, tmp_path / "a", target_modules=places, fan_in_fan_out=family == "gpt2")
    examples, adapter = examples_for(family, 4), read(folder, model)
    before = logits(model, examples)
    with added(model, adapter):
        beside = logits(model, examples)
    assert torch.equal(logits(model, examples), before)
    fold(model, adapter)
    assert torch.allclose(logits(model, examples), beside, atol=1e-4)
    assert torch.allclose(beside, logits(models.open_model(folder)[0], examples), atol=1e-4)
    assert not torch.allclose(beside, before, atol=1e-2)


def test_a_pool_folded_is_the_mean_of_what_peft_makes_of_each(tmp_path: Path) -> None:
    given = _materials(tmp_path)
    base = {name: value.clone() for name, value in given["model"].state_dict().items()}
    each = [one.open().state_dict() for one in given["adapters"]]
    done = loras(**given, **{**SMALL, "count": 3}, kind="average")
    for name, value in done.model.state_dict().items():
        mean = sum((one[name] - base[name] for one in each), torch.zeros(())) / 3
        assert torch.allclose(value, base[name] + mean, atol=1e-5), name
    saved = models.save(done.model, None, tmp_path / "saved")
    assert torch.equal(logits(models.open_model(saved)[0], some_facts(0, 2)), logits(done.model, some_facts(0, 2)))


# (4) likeness


def test_likeness_needs_no_matrix_and_is_that_of_the_matrices() -> None:
    one, other = POOL[0], POOL[1]
    adapter = {"x": one, "y": random_lora(4, 4, 2, 9)}
    negative = {name: LowRank(part.a, -part.b, part.scale) for name, part in adapter.items()}
    assert likeness(adapter, adapter) == pytest.approx(1) and likeness(adapter, negative) == pytest.approx(-1)
    assert product(one, other) == pytest.approx(float((one.dense * other.dense).sum()))
    assert torch.allclose(squared(one).dense, one.dense.square())
    assert product(one, other, "fisher") == pytest.approx(float((one.dense.square() * other.dense.square()).sum()))
    entries = one.dense * other.dense
    assert product(one, other, "clamp") == pytest.approx(float(entries[entries > 0].sum()))
    assert product(one, other, "abs") == pytest.approx(float(entries.abs().sum()))
    whole = torch.cat([part.dense.flatten() for part in adapter.values()])
    assert likeness({"x": other}, adapter) == pytest.approx(
        float((other.dense * one.dense).sum() / other.dense.norm() / whole.norm())
    )
    assert likeness({"z": other}, adapter) == 0.0


# (5) Arrow


def test_arrows_prototype_is_the_first_singular_vector_and_absent_adapters_have_no_weight() -> None:
    for part in POOL:
        found = prototype(part)
        _, _, vh = torch.linalg.svd(part.dense)
        assert float(found.norm()) == pytest.approx(1) and abs(float(found @ vh[0])) == pytest.approx(1)
    x = torch.randn(2, 3, 5, dtype=torch.double)
    weights = Arrow(POOL)(x) / torch.cat([part.scale for part in POOL])
    by_expert = weights[..., [0, 2, 5]]
    assert torch.allclose(by_expert.sum(-1), torch.ones(2, 3, dtype=torch.double))
    scores = torch.stack([(x @ prototype(part)).abs() for part in POOL], -1)
    assert torch.allclose(by_expert, scores.softmax(-1))
    alone = routed(nn.ModuleDict({"x": nn.Linear(5, 7).double()}), [{"x": POOL[0]}, {"y": POOL[1]}][:1])["x"]
    assert torch.allclose(alone(x), alone.inner(x) + x @ POOL[0].dense.T)


def test_singular_values_of_a_product_are_those_of_the_matrix() -> None:
    for part in (*POOL, random_lora(3, 4, 6, 2)):  # the rank may be larger than the matrix
        u, s, vh = part.svd()
        assert torch.allclose((u * s) @ vh, part.dense)
        assert torch.allclose(s, torch.linalg.svdvals(part.dense)[: len(s)])


# (6) and the other formulas


def test_tsv() -> None:
    alone = formulas.tsv([{"x": POOL[1]}], rank=3)["x"]
    assert torch.allclose(alone.dense, POOL[1].dense)
    cut = formulas.tsv([{"x": POOL[2]}], rank=1)["x"].dense
    u, s, vh = torch.linalg.svd(POOL[2].dense)
    assert torch.allclose(cut, s[0] * u[:, :1] @ vh[:1])
    both = formulas.tsv([{"x": POOL[0]}, {"x": POOL[1]}], rank=2)["x"]
    assert torch.allclose(both.a @ both.a.T, torch.eye(4, dtype=torch.double), atol=1e-10)
    assert torch.allclose(both.b.T @ both.b, torch.eye(4, dtype=torch.double), atol=1e-10)
    halves = torch.cat([torch.linalg.svdvals(part.dense)[:2] for part in POOL[:2]]) / 2
    assert torch.allclose(both.scale, halves)


def test_ties_by_hand() -> None:
    changes = [torch.tensor([[3.0, -1.0, 0.5], [2.0, -4.0, 1.0]]), torch.tensor([[-1.0, -2.0, 4.0], [6.0, 1.0, 0.1]])]
    pool = [{"x": LowRank(torch.eye(3), change, torch.ones(3))} for change in changes]
    merged = formulas.ties(pool, density=0.5)["x"].dense
    # kept: [3, ., . / 2, -4, .] and [., -2, 4 / 6, ., .]
    assert torch.allclose(merged, torch.tensor([[3.0, -2.0, 4.0], [4.0, -4.0, 0.0]]))


# (7) LoraHub


def test_separate_sums_have_cross_terms() -> None:
    plain = [LowRank(part.a, part.b, torch.ones_like(part.scale)) for part in POOL]
    (alone,) = formulas.weighted([{"x": plain[0]}], [0.5], "separate").values()
    assert torch.allclose(alone.dense, 0.25 * plain[0].b @ plain[0].a)
    w, (one, other) = (0.5, -0.8), plain[:2]
    (both,) = formulas.weighted([{"x": one}, {"x": other}], w, "separate").values()
    a, b = torch.zeros(3, 5).double(), torch.zeros(7, 3).double()
    a[:2], b[:, :2] = w[0] * one.a, w[0] * one.b
    assert torch.allclose(both.dense, (b + w[1] * other.b) @ (a + w[1] * other.a))
    (scaled,) = formulas.weighted([{"x": POOL[0]}], [0.5], "separate").values()
    assert torch.allclose(scaled.dense, 0.25 * POOL[0].dense)
    (exact,) = formulas.weighted([{"x": POOL[0]}, {"x": POOL[1]}], w).values()
    assert torch.allclose(exact.dense, w[0] * POOL[0].dense + w[1] * POOL[1].dense)


def test_the_search_is_bounded_counts_its_evaluations_and_finds_a_minimum() -> None:
    asked: list[list[float]] = []

    def loss(w: list[float]) -> float:
        asked.append(w)
        return (w[0] - 0.6) ** 2 + (w[1] + 3) ** 2

    best, tried = formulas.search(loss, 2, 60)
    assert len(asked) == len(tried) <= 60 and asked[0] == [0.0, 0.0]
    assert all(abs(value) <= 1.5 for w in asked for value in w)
    assert best == pytest.approx([0.5875, -1.5], abs=0.02)  # the penalty moves the first by 0.05 / 2 / 2
    assert min(tried) == pytest.approx(loss(best) + 0.05 * sum(map(abs, best)) / 2)
    with pytest.raises(RunError, match="none of 7 mixtures has a finite loss"):
        formulas.search(lambda _: math.nan, 3, 7)
    some, _ = formulas.search(lambda w: (w[0] - 1) ** 2 if w[0] < 0.6 else math.nan, 1, 30)
    assert 0 <= some[0] < 0.6


# (8) the random control


def test_redrawn_matrices_have_the_spread_of_the_pool_and_leave_what_is_not_given_alone() -> None:
    big = [random_lora(120, 150, rank, seed, torch.float32) for seed, rank in enumerate((4, 8), 1)]
    pool = [{"x": big[0]}, {"x": big[1], "y": POOL[0]}]
    drawn = redrawn(pool, torch.Generator().manual_seed(0))
    assert [each.keys() for each in drawn] == [each.keys() for each in pool]
    for side in ("a", "b"):
        ours, theirs = (torch.cat([getattr(each["x"], side).flatten() for each in one]) for one in (drawn, pool))
        sigma = float(theirs.std())
        assert abs(float(ours.std()) - sigma) < 3 * sigma / math.sqrt(2 * len(ours))
        assert abs(float(ours.mean())) < 3 * sigma / math.sqrt(len(ours))
        assert abs(float(torch.corrcoef(torch.stack([ours, theirs]))[0, 1])) < 0.1
    assert all(torch.equal(each["x"].scale, old["x"].scale) for each, old in zip(drawn, pool, strict=True))
    assert torch.equal(big[0].a, random_lora(120, 150, 4, 1, torch.float32).a)


def test_the_fresh_lora_is_not_redrawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, Sequence[Any]]] = []
    plain = Trial.merge

    def noted(self: Any, name: str, experts: Sequence[Any], lesson: Any) -> Any:
        seen.append((name, experts))
        return plain(self, name, experts, lesson)

    monkeypatch.setattr(Trial, "merge", noted)
    loras(**_materials(tmp_path), **{**SMALL, "count": 3})
    pools = dict(seen)
    target = pools[RESCALED][0]
    assert pools[BOTH][0] is target and pools[RANDOM_BOTH][0] is target
    assert len(pools[MERGE]) == len(pools[BOTH]) == 3, "it takes the place of the last"
    assert pools[BOTH][1:] == pools[MERGE][:2]
    for new, old in zip(pools[RANDOM], pools[MERGE], strict=True):
        assert not any(torch.equal(new[name].a, old[name].a) for name in old)


# (9) the gradient


@pytest.mark.parametrize("per", ["expert", "layer", "sublayer", "module", "rank"])
def test_the_gradient_of_coefficients_is_that_of_differences(per: Any, tmp_path: Path) -> None:
    base = make("gpt2", tmp_path / "base", 0)  # its norms compute in the dtype that they are given
    model = models.open_model(base)[0].double()
    both, ours = {"target_modules": ["c_attn", "c_fc"]}, {"fan_in_fan_out": True}
    folders = [
        lora(base, tmp_path / "a", 1, **both, **ours),
        lora(base, tmp_path / "b", 2, r=3, **both, **ours),
        lora(base, tmp_path / "c", 3, r=5, target_modules=["c_attn"], **ours),
    ]
    pool = [
        {n: LowRank(p.a.double(), p.b.double(), p.scale.double()) for n, p in read(one, model).items()}
        for one in folders
    ]
    layers = mixture(model, pool, How(per=per, activation="sigmoid", start="normal"), torch.Generator().manual_seed(0))
    batch = collate(some_facts(0, 4).items)
    with exchanged(model, layers):
        model.double().requires_grad_(False)
        ws = {id(layer.strength.w): layer.strength.w.requires_grad_() for layer in layers.values()}  # pyright: ignore
        expected = {"expert": 1, "layer": 4, "sublayer": 8, "module": 8, "rank": 8}[per]
        assert len(ws) == expected
        w: Any = next(iter(ws.values()))

        def loss() -> Tensor:
            flat = forward(model, batch)[:, :-1].flatten(0, 1)
            return cross_entropy(flat, batch["labels"][:, 1:].flatten(), ignore_index=IGNORED)

        (gradient,) = torch.autograd.grad(loss(), [w])
        assert gradient.shape == ((10,) if per == "rank" else (3,))
        for n in (0, len(w) - 1):
            values: list[float] = []
            for step in (1e-4, -1e-4):
                with torch.no_grad():
                    w[n] += step
                    values.append(float(loss()))
                    w[n] -= step
            assert float(gradient[n]) == pytest.approx((values[0] - values[1]) / 2e-4, rel=1e-5, abs=1e-9)


# what is learnt, kept and told


def test_what_is_kept_is_what_was_best_on_the_held_out_examples(tmp_path: Path) -> None:
    given = _materials(tmp_path)
    model = given["model"]
    pool = [read(one.folder, model) for one in given["adapters"]]
    lesson = Lesson(given["train"], given["valid"], Regime(steps=8, batch_size=4, lr=3.0, warmup=0), every=1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    adapter, coefficients, curves, count = learnt(model, pool, How(), lesson, torch.Generator(), "x")
    assert count == 3 * len(coefficients) == 36 and len(curves["loss on valid"]) == 8
    with added(model, adapter):
        assert measured(model, given["valid"])[0] == pytest.approx(min(curves["loss on valid"]), rel=1e-5)
    seldom = learnt(model, pool, How(), replace(lesson, every=3), torch.Generator(), "y")[2]["loss on valid"]
    every = curves["loss on valid"]
    assert seldom == pytest.approx([every[2]] * 3 + [every[5]] * 3 + [every[7]] * 2)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())
    for name, part in adapter.items():
        own = [one[name].scale[0] for one in pool if name in one]
        ranks = [one[name].rank for one in pool if name in one]
        expected = [c * s for (c, s) in zip(coefficients[name].values(), own, strict=True)]
        assert torch.allclose(part.scale, torch.tensor(expected).repeat_interleave(torch.tensor(ranks)))


def test_the_share_right_is_what_greedy_decoding_says(tmp_path: Path) -> None:
    from overhaul.fit import fit
    from overhaul.judge import judge as judging
    from overhaul.objectives import cross_entropy as term

    model, facts = tiny_llama(), some_facts(0, 6)
    fit(model, [term("x")], {"x": facts}, steps=60, batch_size=6, lr=1e-2)
    loss, right = measured(model, facts)
    requests = judging.check({"kept": {"accuracy": "x"}}, {"x": facts})
    assert right == pytest.approx(judging.judge(model, requests, {"x": facts}).measures[0].value)
    assert right > 0 and loss < 1


def test_every_control_is_in_the_table_and_the_map_has_blocks_and_adapters(tmp_path: Path) -> None:
    given = _materials(tmp_path)
    done = loras(**given, **SMALL, with_fresh=True)
    rows = {row[0]: row for row in done.tables["scores"].rows}
    assert list(rows) == [
        BASE, FRESH, RESCALED, MERGE, BOTH, RANDOM, RANDOM_BOTH,
        ROUTED,
    ]  # fmt: skip
    assert rows[BOTH][1] == pytest.approx(measured(done.model, given["test"])[0], rel=1e-4)
    grid = done.tables["coefficients"]
    assert grid.columns[1] == FRESH and grid.columns[2] in "abc" and len(grid.rows) == 4
    made = done.made["coefficients"]
    layer = "model.layers.2.self_attn.q_proj"
    block = [each[FRESH] for name, each in made.items() if ".2." in name]
    assert grid.rows[2][1] == pytest.approx(sum(block) / len(block)) and set(made[layer]) == set(grid.columns[1:])
    worths = {row[0]: row for row in done.tables["the pool by evaluation"].rows}
    assert done.facts["evaluated"] == 3 and done.facts["merged"] == 2
    order = sorted(worths.values(), key=lambda row: float(row[1] or 0))
    assert [row[2] for row in order] == [False, False, True], "the fresh one takes the place of the last"
    assert [row[0] for row in order if row[2]] == [grid.columns[2]]
    shorter = loras(**_materials(tmp_path / "again"), **SMALL, control_steps=1)
    assert {row[0]: row[3] for row in shorter.tables["scores"].rows}[RANDOM] == 1


def test_what_is_merged_is_counted_where_the_only_one_stays_beside_the_fresh() -> None:
    done = loras(**_given(*_kept()), **{**SMALL, "count": 1, "steps": 1}, kind="average", with_fresh=True)
    names = done.tables["coefficients"].columns[1:]
    assert names[0] == FRESH and len(names) == done.facts["merged"] == 2
    assert [row[0] for row in done.tables["the pool by evaluation"].rows if row[2]] == [names[1]]


def test_names_tell_adapters_apart_and_are_short(tmp_path: Path) -> None:
    def named(*folders: str) -> list[str]:
        return names_of([replace(_given(*_kept())["adapters"][0], folder=tmp_path / folder) for folder in folders])

    assert named("llama-lora-a", "llama-lora-b") == ["a", "b"]
    assert named("x/one", "y/one", "y/two") == ["x/one", "y/one", "y/two"]
    assert named("lora-one") == ["lora-one"] and named("lora", "lora-two") == ["lora", "lora-two"]


def test_images_too(tmp_path: Path) -> None:
    base = make("vit", tmp_path / "base", 0)
    model = models.open_model(base)[0]
    places = {name.rpartition(".")[2] for name, _ in model.named_modules()} & {"query", "q_proj", "fc1", "dense"}
    pool = [lora(base, tmp_path / name, seed, target_modules=[*places]) for seed, name in enumerate("ab")]
    done = loras(model, pool, pictures([0, 1] * 6), pictures([0, 1] * 3, 1), **{**SMALL, "rank": 1})
    models.open_model(models.save(done.model, None, tmp_path / "out"))
    assert done.facts["merged"] == 2 and len(done.tables["scores"].rows) == 8


# what is refused


def edited(folder: Path, **changes: Any) -> Path:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


MORE: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"use_dora": True}, "use_dora"),
    "bias of B": ({"lora_bias": True}, "lora_bias"),
    "bias": ({"bias": "all", "target_modules": ["q_proj"]}, "bias: all|on one side"),
    "saved modules": ({"modules_to_save": ["norm"]}, "modules_to_save"),
    "embedding": ({"target_modules": ["q_proj", "embed_tokens"]}, "ties to another module|kind Embedding"),
}


@pytest.mark.parametrize("what", MORE)
def test_what_is_more_than_a_product_is_refused_by_name(what: str, tmp_path: Path) -> None:
    options, said = MORE[what]
    given = _materials(tmp_path)
    odd = lora(tmp_path / "base", tmp_path / "odd", 9, **options)
    with session.using(planning=True), pytest.raises(RequestError, match=said) as error:
        loras(given["model"], [*given["adapters"], odd], given["train"], given["valid"])
    assert "odd" in str(error.value)


def test_an_adapter_that_changed_its_base_is_refused(tmp_path: Path) -> None:
    given = _materials(tmp_path)
    odd = edited(given["adapters"][0].folder, init_lora_weights="pissa")
    with pytest.raises(RequestError, match="init_lora_weights: pissa"):
        low_rank_scales(models.facts(odd), given["model"])


def test_adapters_for_another_model_are_refused_before_work(tmp_path: Path) -> None:
    given = _materials(tmp_path)
    wide = models.save(tiny_llama(hidden_size=48), None, tmp_path / "wide")
    deep = models.save(tiny_llama(num_hidden_layers=5), None, tmp_path / "deep")
    other = make("gpt2", tmp_path / "gpt2", 0)
    for base, places in ((wide, ["q_proj"]), (deep, ["q_proj"]), (other, ["c_attn"])):
        odd = lora(base, tmp_path / f"for-{base.name}", target_modules=places, fan_in_fan_out=base is other)
        with (
            session.using(planning=True),
            pytest.raises(RequestError, match=f"for-{base.name} was made for .*another model"),
        ):
            loras(given["model"], [odd], given["train"], given["valid"])
    with pytest.raises(RequestError, match="is a whole model and no adapter"):
        loras(given["model"], [tmp_path / "base"], given["train"], given["valid"])
    with pytest.raises(RequestError, match="there are no adapters"):
        loras(given["model"], [], given["train"], given["valid"])


def test_an_adapter_that_names_no_base_is_one_of_the_recipes_model(tmp_path: Path) -> None:
    base = make("llama", tmp_path / "base", 0)
    adapter = edited(lora(base, tmp_path / "a"), base_model_name_or_path=None)
    wide = models.save(tiny_llama(hidden_size=48), None, tmp_path / "wide")
    with pytest.raises(RequestError, match="does not name its base"):
        models.facts(adapter)
    for model in (base, wide):
        materials = {"adapters": [{"model": str(adapter)}]}
        recipe = {"model": str(model), "materials": materials, "steps": [{"merge.soup": {"tuned": "adapters"}}]}
        (known,) = check(read_recipe(recipe)).references_read()
        assert known.base is not None and known.base.folder == model
    with pytest.raises(RequestError, match=r"a does not fit its base .*wide: .* has the shape"):
        low_rank_scales(known, models.open_model(wide)[0])


def test_a_base_with_other_weights_is_told(tmp_path: Path) -> None:
    given = _materials(tmp_path)
    assert "advice" not in loras(**given, **SMALL).facts
    other = models.open_model(make("llama", tmp_path / "other", 7))[0]
    told = loras(other, given["adapters"][:2], given["train"], given["valid"], **SMALL).facts["advice"]
    assert "not those that" in told and str(given["adapters"][1].source) in told


def test_the_same_adapter_twice_and_one_that_is_nothing_are_refused(tmp_path: Path) -> None:
    given = _materials(tmp_path)
    pool = given["adapters"]
    with session.using(planning=True), pytest.raises(RequestError, match="is given twice"):
        loras(given["model"], [*pool, pool[0]], given["train"], given["valid"])
    copy = lora(tmp_path / "base", tmp_path / "copy", 1)
    with pytest.raises(RequestError, match="have the same weights"):
        loras(given["model"], [*pool, copy], given["train"], given["valid"])
    empty = lora(tmp_path / "base", tmp_path / "empty", 5)
    held = load_file(empty / "adapter_model.safetensors")
    save_file({n: 0 * t if "lora_B" in n else t for n, t in held.items()}, empty / "adapter_model.safetensors")
    with pytest.raises(RequestError, match="changes nothing: it was not trained"):
        loras(given["model"], [*pool, empty], given["train"], given["valid"])
    still = edited(lora(tmp_path / "base", tmp_path / "still", 6), lora_alpha=0)
    with pytest.raises(RequestError, match=r"still changes nothing: `lora_alpha` in its adapter_config.json is 0"):
        loras(given["model"], [*pool, still], given["train"], given["valid"])
    held["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"][0, 0] = math.nan
    save_file(held, empty / "adapter_model.safetensors")
    with pytest.raises(RequestError, match="is not finite"):
        loras(given["model"], [*pool, empty], given["train"], given["valid"])


def test_starts_and_examples_from_which_nothing_is_learnt_are_refused(tmp_path: Path) -> None:
    given = _materials(tmp_path)
    with session.using(planning=True):
        with pytest.raises(RequestError, match='activation "squared" has no slope at 0'):
            loras(**given, activation="squared")
        with pytest.raises(RequestError, match="'valid' holds nothing that carries loss"):
            loras(**{**given, "valid": given["valid"][:0]})


def test_a_search_that_finds_the_base_alone_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formulas, "search", lambda loss, count, evaluations: ([0.0] * count, [1.0]))
    given = _materials(tmp_path)
    before = {name: value.clone() for name, value in given["model"].state_dict().items()}
    with pytest.raises(RunError, match="the best mixture that was found is none.*Try more `evaluations`"):
        loras(**given, **SMALL, kind="search")
    assert all(torch.equal(value, before[name]) for name, value in given["model"].state_dict().items())


@pytest.mark.parametrize("kind", get_args(get_type_hints(How)["kind"]))
def test_what_to_try_instead_is_of_the_kind(kind: Any) -> None:
    assert ("evaluations" in How(kind=kind).instead) == (kind == "search")
    assert ("kind: adaptive" in How(kind=kind).instead) == (kind != "adaptive")


def test_a_layer_looks_like_its_own_and_a_pool_may_be_fixed() -> None:
    inner = FAMILIES["gpt2"]().get_submodule("transformer.h.0.mlp.c_fc")
    part = random_lora(128, 32, 2, 1, torch.float32)
    mixed = Mixed(inner, part, Fixed(part.scale))
    assert mixed.weight is inner.weight and mixed.bias is inner.bias
    x = torch.randn(2, 32)
    assert torch.allclose(mixed(x), inner(x) + x @ part.dense.T, atol=1e-4)


def test_images_are_not_given_to_a_language_model(tmp_path: Path) -> None:
    given = _materials(tmp_path)
    with pytest.raises(RequestError, match="holds images, which LlamaForCausalLM does not take"):
        loras(tiny_llama(), given["adapters"], pictures(range(4)), pictures(range(4)), **SMALL)
