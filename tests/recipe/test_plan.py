"""Plan and measurement: estimates follow what they should follow; peaks are of the stretch that was measured."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

import overhaul as oh
from overhaul.data.examples import Examples
from overhaul.errors import RequestError
from overhaul.method import Outcome, Step, method
from overhaul.models import Checkpoint
from overhaul.recipe.check import check
from overhaul.recipe.machine import describe, measured
from overhaul.recipe.plan import Planned, _trained, matmul_speed, plan
from overhaul.recipe.spec import read


def planned(folder: Path, base: Path, **changes: object) -> list[Planned]:
    rows = "\n".join(f'{{"question": "{c}", "answer": "{c * 2}"}}' for c in "abcdef")
    (base / "a.jsonl").write_text(rows)
    (base / "b.jsonl").write_text(rows.replace('"a"', '"z"').replace('"aa"', '"zz"'))
    recipe = {
        "model": str(folder),
        "materials": {"forget": {"from": "a.jsonl", "limit": 1}, "text": {"from": "b.jsonl"}},
        "steps": [{"shrink.drop_layers": {"count": 1}}, {"shrink.heal": {"steps": 10, "batch_size": 8}}],
        **changes,
    }
    (base / "r.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    return plan(check(read(base / "r.yaml")), flops_per_second=1e9)


def test_training_needs_more_than_a_forward_and_time_follows_steps(folder: Path, tmp_path: Path) -> None:
    drop, heal = planned(folder, tmp_path)
    assert heal.peak_bytes > drop.peak_bytes > 0
    assert drop.reads == {"text": 6}
    longer = [{"shrink.heal": {"steps": 30, "batch_size": 8}}]
    assert planned(folder, tmp_path, steps=longer)[0].seconds == 3 * heal.seconds


def test_models_that_are_read_beside_are_listed(folder: Path, tmp_path: Path) -> None:
    one = {"model": str(shutil.copytree(folder, tmp_path / "twin"))}
    materials = {"a": one, "b": one, "tuned": ["a", "b"]}
    (ties,) = planned(folder, tmp_path, materials=materials, steps=["merge.ties"])
    assert ties.reads == {} and ties.others == {"tuned": ("a", "b")}


def test_rows_that_are_read_as_they_are_are_counted(folder: Path, tmp_path: Path) -> None:
    base = str(shutil.copytree(folder, tmp_path / "base"))
    rows = [f'{{"statement": "{c}", "label": {n % 2}}}' for n, c in enumerate("abcdefghijklmnop")]
    (tmp_path / "raw.jsonl").write_text("\n".join(rows))
    materials = {"base": {"model": base}, "statements": {"from": str(tmp_path / "raw.jsonl"), "as": "rows"}}
    (step,) = planned(folder, tmp_path, materials=materials, steps=[{"inspect.post_training": {"shots": 2}}])
    assert step.reads == {"statements": 16}


def test_dtype_changes_memory(folder: Path, tmp_path: Path) -> None:
    drop = [{"shrink.drop_layers": {"count": 1}}]
    wide = planned(folder, tmp_path, steps=drop)[0].peak_bytes
    assert planned(folder, tmp_path, steps=drop, dtype="bfloat16")[0].peak_bytes < wide


@pytest.mark.parametrize(
    ("dtype", "weights", "frozen", "trained"),
    [
        ("float32", "all", 0, 4 + 4 + 8),
        ("bfloat16", "all", 0, 2 + 4 + 4 + 8),  # weight, master, gradient, moments
        ("float16", "all", 0, 4 + 4 + 8),  # float32 while it trains
        ("float32", "lora", 4, 4 + 4 + 8),
        ("bfloat16", "lora", 2, 4 + 4 + 8),
        ("float16", "lora", 4, 4 + 4 + 8),
    ],
)
def test_bytes_of_a_trained_parameter_by_hand(
    dtype: str, weights: str, frozen: int, trained: int, folder: Path, tmp_path: Path
) -> None:
    knobs = {"steps": 1, "batch_size": 1, "weights": weights, "rank": 16}
    (heal,) = planned(folder, tmp_path, steps=[{"shrink.heal": knobs}], dtype=dtype)
    # q, k, v, o: 32x32, 16x32, 16x32, 32x32; gate, up, down: 48 and 32; two norms a block; embedding and the last norm
    block = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32 + 2 * 32
    model = 4 * block + 64 * 32 + 32
    adapters = 16 * 4 * (2 * (32 + 32) + 2 * (16 + 32) + 3 * (48 + 32))
    # one short row: its activations are less than the gradients, with which they take turns
    assert heal.peak_bytes == frozen * model + trained * (adapters if weights == "lora" else model)


@method(verb="shrink", changes="weights", rank=lambda knobs: knobs["narrow"], singly=lambda knobs: knobs["alone"])
def squeeze(model: nn.Module, text: Examples, *, narrow: int | None = None, alone: bool = False) -> Outcome:
    """Train something.

    Args:
        model: it is changed.
        text: what it is trained on.
        narrow: how wide adapters are.
        alone: whether each example has a gradient.
    """
    raise RequestError("it is only planned")


def test_what_a_method_holds_is_asked_of_the_method_whatever_its_knobs_are_called() -> None:
    known = squeeze.method  # pyright: ignore[reportFunctionMemberAccess]
    shapes = {"h.0.q.weight": (8, 4), "h.0.norm.weight": (4,), "head.weight": (64, 4)}
    model = Checkpoint("m", Path(), {}, shapes, "float32", 0)
    for knobs, expected in (({}, (None, 292)), ({"narrow": 2}, (2, 2 * (8 + 4)))):
        assert _trained(Step(1, known, known.check(knobs), {}), model) == expected
    assert [known.singly(known.check({"alone": each})) for each in (False, True)] == [False, True]


def test_the_peak_is_of_the_measured_stretch() -> None:
    big = torch.ones(30_000_000)
    del big
    with measured() as small:
        pass
    with measured() as large:
        held = torch.ones(30_000_000)
    assert held.numel() == 30_000_000 and large.seconds > 0
    assert large.peak_bytes - small.peak_bytes > 60_000_000


def test_the_machine_is_described_and_its_speed_is_plausible() -> None:
    said = describe()
    assert said["cores"] >= 1 and said["memory_bytes"] > 1e9 and said["torch"] == torch.__version__
    assert 1e8 < matmul_speed(128) < 1e16


def test_a_plan_counts_what_opening_judging_and_saving_take(folder: Path, tmp_path: Path) -> None:
    recipe = {
        "model": str(folder),
        "materials": {"text": {"from": "starter:docs", "limit": 4, "length": 64}},
        "steps": [{"shrink.drop_layers": {"count": 1}}],
    }
    quiet = oh.plan(recipe)
    facts = quiet.model
    assert quiet.around_bytes == 4 * facts.parameters + facts.bytes
    judged = oh.plan({**recipe, "judge": {"kept": {"perplexity": "text"}}})
    assert judged.around_bytes > quiet.around_bytes
    assert "opening, judging and saving" in repr(judged) and " to " in repr(judged)
