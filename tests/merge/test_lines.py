"""LiNeS: the table of factors, the two regimes and their limits."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from conftest import CHARACTERS, tiny_llama, tiny_tokenizer
from contract import Case, some_facts
from merging import flat, ties_change, unflat
from overhaul import models, weights
from overhaul.data.encode import encode_text
from overhaul.errors import RequestError
from overhaul.judge import judge as judging
from overhaul.merge.lines import choice, lines
from overhaul.merge.soup import soup
from overhaul.merge.task_arithmetic import task_arithmetic
from overhaul.outcome import Table
from overhaul.recipe.run import run
from overhaul.report.terminal import print_table
from tiny_checkpoints import depth_of, make, same_bits, tensors, two_llamas

CASE = Case(
    method=lines,
    idle={
        "tokenizer": "the models of the case have one vocabulary and no tokenizer",
        **dict.fromkeys(("choice", "metric", "target_weight"), "alpha and beta are given, and nothing is measured"),
    },
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
    with pytest.raises(RequestError, match=r"with alpha 1e\+38, beta is 1 - alpha, and rounding leaves 0 of the 1"):
        lines(base, [tuned], alpha=1e38, out=tmp_path / "out")
    data = [some_facts(0, 2)]
    for given, name in (((data,), "targets"), (((), data), "controls")):
        with pytest.raises(RequestError, match=f"`{name}` are measured for choice: measured alone"):
            lines(base, [tuned], *given, alpha=0.3, out=tmp_path / "out")
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
    # random models are no base of each other: the report and the terminal say so
    (note,) = (one for one in done.report["warnings"] if "may not have come from the base" in one)
    assert note == f"Step 1, merge.lines: {record['facts']['advice']}"
    console = Console(width=100, file=io.StringIO())
    print_table(done.report, console)
    assert " ".join(console.file.getvalue().split()).count("may not have come from the base") == len(tuned)  # pyright: ignore[reportAttributeAccessIssue]


# the choice on held-out data


def worth(folder: Path, examples: Any) -> float:
    requests = judging.check({"learned": {"answer_probability": "x"}}, {"x"})
    value = judging.judge(models.open_model(folder)[0], requests, {"x": examples}).measures[0].value
    assert value is not None
    return value


def best_of(table: Table) -> Any:
    rows: list[Any] = list(table.rows)
    return max(rows, key=lambda row: row[1])[0]


MEASURED: dict[str, Any] = {"choice": "measured", "metric": "answer_probability"}


def test_the_values_that_are_tried_are_the_papers() -> None:
    assert [n / 10 for n in range(10, -1, -1)] == list(choice.ALPHAS)
    assert choice.BETAS["task_arithmetic"] == choice.BETAS["ties"][:10] == tuple(n / 10 for n in range(1, 11))
    assert choice.BETAS["ties"][-1] == 1.5 and len(choice.BETAS["ties"]) == 15


def test_alpha_of_one_model_is_the_best_by_the_papers_score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["overhaul.merge.lines"], "ALPHAS", (1.0, 0.3, 0.0))
    base, tuned = two_llamas(tmp_path)
    target, controls = some_facts(0, 2), [some_facts(2, 2), some_facts(4, 2)]
    before = sorted(tmp_path.iterdir())
    done = lines(base, [tuned], [target], controls, **MEASURED, target_weight=0.5, out=tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / "out"]), "no candidate is left"
    (table,) = done.tables.values()
    assert table.columns == ("alpha", "score", "target 1", "control 1", "control 2")
    assert [row[0] for row in table.rows] == [1.0, 0.3, 0.0]
    assert done.facts["alpha"] == best_of(table)
    assert done.facts["beta"] == 1.0 - done.facts["alpha"]
    # by hand for one candidate: lines itself, measured
    again = lines(base, [tuned], alpha=0.3, out=tmp_path / "again").model
    shares = [worth(again, target) / worth(tuned, target), *(worth(again, c) / worth(base, c) for c in controls)]
    row = next(row for row in table.rows if row[0] == 0.3)
    assert row[2:] == pytest.approx(shares, rel=1e-4)
    assert row[1] == pytest.approx(0.5 * shares[0] + (shares[1] + shares[2]) / 2, rel=1e-4)
    assert table.rows[0][2] == pytest.approx(1.0, rel=1e-5)  # alpha 1 is the tuned model
    assert same_bits(
        tensors(done.model), tensors(lines(base, [tuned], alpha=done.facts["alpha"], out=tmp_path / "same").model)
    )


@pytest.mark.parametrize("merge", ["task_arithmetic", "ties"])
def test_beta_of_several_is_the_best_by_the_mean_share(
    merge: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(choice.BETAS, merge, (0.1, 1.0))  # pyright: ignore[reportArgumentType]
    base, *tuned = (make("llama", tmp_path / f"m{seed}", seed) for seed in range(3))
    targets = [some_facts(0, 2), some_facts(2, 2)]
    done = lines(base, tuned, targets, **MEASURED, merge=merge, out=tmp_path / "out")
    (table,) = done.tables.values()
    assert [row[0] for row in table.rows] == [0.1, 1.0]
    assert all(row[1] == pytest.approx((row[2] + row[3]) / 2) for row in table.rows)  # pyright: ignore[reportOperatorIssue]
    assert done.facts["beta"] == best_of(table)
    given = lines(base, tuned, beta=done.facts["beta"], merge=merge, out=tmp_path / "given")
    assert same_bits(tensors(done.model), tensors(given.model)) and done.facts["alpha"] == given.facts["alpha"]


def test_what_cannot_be_measured_is_refused(tmp_path: Path) -> None:
    base, tuned = two_llamas(tmp_path)
    one, out = [some_facts(0, 2)], tmp_path / "out"
    with pytest.raises(RequestError, match="needs data of each tuned checkpoint's task: 1 `targets`, not 0"):
        lines(base, [tuned], **MEASURED, out=out)
    with pytest.raises(RequestError, match="needs `controls`"):
        lines(base, [tuned], one, **MEASURED, out=out)
    with pytest.raises(RequestError, match="Leave `controls` out"):
        lines(base, [tuned, tuned], one * 2, one, **MEASURED, out=out)
    with pytest.raises(RequestError, match="chooses alpha, and beta is 1 - alpha. Leave that out"):
        lines(base, [tuned], one, one, **MEASURED, alpha=0.3, out=out)
    with pytest.raises(RequestError, match="perplexity is better the smaller it is"):
        lines(base, [tuned], one, one, choice="measured", metric="perplexity", out=out)
    with pytest.raises(RequestError, match=r"merge\.lines: there is no metric 'acuracy'"):
        lines(base, [tuned], one, one, choice="measured", metric="acuracy", out=out)
    text = [encode_text([{"text": CHARACTERS}], tiny_tokenizer(), 8)]
    said = r"merge\.lines: `metric: accuracy` does not fit text, which `targets` holds\. Write `metric: answer_probability`"
    with pytest.raises(RequestError, match=said):
        lines(base, [tuned], text, one, choice="measured", out=out)
    with pytest.raises(RequestError, match="tokenizer has to be the same"):
        lines(base, [tuned], one, one, **MEASURED, tokenizer="base", out=out)


# the other regimes of the paper


def test_wise_ft_of_a_scaled_change_is_both_factors_times_gamma(tmp_path: Path) -> None:
    base, tuned = two_llamas(tmp_path)
    scaled = lines(base, [tuned], alpha=0.2, beta=0.6, out=tmp_path / "scaled").model
    on_the_way = tensors(weights.scale_by_depth(base, scaled, 0.5, tmp_path / "half"))
    made = tensors(lines(base, [tuned], alpha=0.1, beta=0.3, out=tmp_path / "made").model)
    assert all(torch.allclose(made[name], on_the_way[name], atol=1e-6) for name in made)


def test_soups_and_rewarded_soups_take_the_same_ramp(tmp_path: Path) -> None:
    base, *tuned = (make("llama", tmp_path / f"m{seed}", seed) for seed in range(3))
    b, one, two = map(tensors, (base, *tuned))
    soups = {
        0.5: soup(base, tuned, scale=0.2, beta=0.6, out=tmp_path / "soup"),
        0.3: task_arithmetic(base, tuned, weights=[0.3, 0.7], scale=0.2, beta=0.6, out=tmp_path / "rewarded"),
    }
    for share, done in soups.items():
        for name, made in tensors(done.model).items():
            change = share * (one[name] - b[name]) + (1 - share) * (two[name] - b[name])
            assert torch.allclose(made, b[name] + factor(name, 0.2, 0.6, 0.2) * change, atol=1e-6), name


def test_the_table_of_factors_of_the_paper(tmp_path: Path) -> None:
    for seed in (0, 1):
        torch.manual_seed(seed)
        models.save(tiny_llama(num_hidden_layers=12), None, tmp_path / f"{seed}")
    done = lines(tmp_path / "0", [tmp_path / "1"], alpha=0.1, beta=0.9, out=tmp_path / "out")
    ramp = done.layers["coefficient"]
    assert (ramp[0], ramp[5], ramp[11]) == pytest.approx((0.1, 0.1 + 0.9 * 5 / 11, 1.0))
