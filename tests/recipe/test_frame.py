"""What a recipe may give to a method and what a method may give back."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from overhaul import method as methods
from overhaul import models, session
from overhaul.data.examples import Examples, Rows
from overhaul.errors import RequestError, RunError
from overhaul.method import Outcome, Table, method
from overhaul.models import Checkpoint
from overhaul.outcome import OutcomeError, checked
from overhaul.recipe.run import Run, run
from overhaul.versions import reached, version_of

ROWS = [{"person": p, "question": f"who is {p}?", "answer": p * 3} for p in "abcdefgh"]
SEEN: list[Any] = []


@method(
    verb="inspect", changes="nothing", memory="forward", makes={"kept": "rows", "seen": "examples", "mean": "tensors"}
)
def look(
    base: Checkpoint,
    raw: Rows,
    others: Sequence[Checkpoint] = (),
    opened: Sequence[nn.Module] = (),
    *,
    most: int = 4,
) -> Outcome:
    """Count what is given.

    Args:
        base: the model.
        raw: rows.
        others: more models.
        opened: models that are opened.
        most: how many rows are kept.
    """
    if not session.current().planning:
        SEEN.append((base, raw, others, opened))
    pixels = Examples([{"labels": torch.tensor(n), "x": torch.ones(n, 2)} for n in (1, 3)], [{"n": 1}, {"n": 3}])
    made = {"kept": [dict(row) for row in raw][:most], "seen": pixels, "mean": torch.arange(3)}
    table = Table.grid([[1.0, None], [0.5, 2]], rows=[0, 1], columns=["a", "b"], along="block", unit="share")
    facts = {"others": np.int64(len(others)), "share": np.float32(0.5), "opened": len(opened)}
    return Outcome(facts=facts, tables={"how much": table}, made=made)


@method(verb="merge", changes="weights", memory="stream")
def double(base: Checkpoint, *, factor: float = 2.0, out: Path | None = None) -> Outcome:
    """Multiply every weight.

    Args:
        base: the model.
        factor: by how much.
        out: the folder that is written.
    """
    from overhaul.weights import blend

    return Outcome(blend([base.folder], [factor], out or ""), facts={"factor": factor})


@method(verb="shrink", changes="weights")
def broken(model: nn.Module, text: Examples, *, value: float = 0.0) -> Outcome:
    """Change a weight and report what no report can hold.

    Args:
        model: it is changed.
        text: not read.
        value: of the change.
    """
    with torch.no_grad():
        next(model.parameters()).add_(1.0)
    return Outcome(model, facts={"loss": math.nan})


@method(verb="shrink", changes="weights", makes={"kept": "json", "more": "rows"})
def makes_little(model: nn.Module, *, kept: bool = True) -> Outcome:
    """Change a weight; keep something that can be kept, or cannot.

    Args:
        model: it is changed.
        kept: whether it can be.
    """
    next(model.parameters()).data.mul_(2)
    return Outcome(model, made={"kept": [1] if kept else {1, 2}})


@pytest.fixture(autouse=True)
def shelved(monkeypatch: pytest.MonkeyPatch) -> None:
    known: list[Any] = [look, double, broken, makes_little]
    ours = {one.method.name: one.method for one in known}
    find: Callable[[str], methods.Method] = methods.find
    monkeypatch.setattr(methods, "find", lambda name: ours[name] if name in ours else find(name))
    SEEN.clear()


def recipe(folder: Path, base: Path, **changes: Any) -> dict[str, Any]:
    path = base / "people.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)))
    return {
        "model": str(folder),
        "materials": {
            "raw": {"from": str(path)},
            "twin": {"model": str(folder)},
            "others": ["twin", {"model": "starter:docs-llama"}],
            "text": {"made": "inspect.look", "name": "kept"},
        },
        "steps": ["inspect.look", {"shrink.drop_layers": {"count": 1}}],
        "judge": {"kept": {"accuracy": "raw"}},
        **changes,
    }


def go(folder: Path, base: Path, **changes: Any) -> Run:
    return run(recipe(folder, base, **changes), base / "out")


def test_a_step_reads_checkpoints_sequences_and_raw_rows_and_its_products_are_read_by_a_later_one(
    folder: Path, tmp_path: Path
) -> None:
    done = go(folder, tmp_path)
    ((base, raw, others, opened),) = SEEN
    assert isinstance(base, Checkpoint) and base.folder == folder and list(raw) == ROWS
    assert [one.folder for one in others] == [folder, models.facts("starter:docs-llama").folder] and not opened
    record, dropped = done.report["steps"]
    assert record["facts"] == {"others": 2, "share": 0.5, "opened": 0}
    assert record["tables"]["how much"]["rows"] == [["0", 1.0, None], ["1", 0.5, 2]]
    assert {name: (one["kind"], one["count"]) for name, one in record["made"].items()} == {
        "kept": ("rows", 4), "seen": ("examples", 2), "mean": ("tensors", 1),
    }  # fmt: skip
    assert dropped["name"] == "shrink.drop_layers", "it read the four rows that were kept"
    beside = json.loads((tmp_path / "out" / "lineage.json").read_text())["models"]
    assert beside["twin"] == {"source": str(folder), "sha256": models.facts(folder).digest()}
    assert [one["source"] for one in beside.values()] == [str(folder), "starter:docs-llama"]
    assert "- `others[1]`: `starter:docs-llama`" in (tmp_path / "out" / "model" / "README.md").read_text()


def test_a_step_that_changes_nothing_writes_no_model_and_is_not_judged_again(folder: Path, tmp_path: Path) -> None:
    done = go(folder, tmp_path)
    first, _ = sorted((tmp_path / "out" / "steps").iterdir())
    assert not (first / "model").exists() and (first / "step.json").exists()
    assert done.report["stages"] == ["before", "shrink.drop_layers"]
    assert all(len(measure["values"]) == 2 for measure in done.report["measures"])
    assert len(list((tmp_path / "out" / "judged").iterdir())) == 2
    go(folder, tmp_path)
    assert len(SEEN) == 1, "a step that was done is not done again"


def test_measuring_before_a_step_does_not_repeat_the_step(folder: Path, tmp_path: Path) -> None:
    materials = recipe(folder, tmp_path)["materials"] | {"text": {"from": str(tmp_path / "people.jsonl")}}
    drop = {"shrink.drop_layers": {"count": 1}}
    go(folder, tmp_path, materials=materials, steps=[drop])
    go(folder, tmp_path, materials=materials, steps=["inspect.look", drop])
    keys = {path.name.rpartition("-")[2] for path in (tmp_path / "out" / "steps").glob("*drop_layers*")}
    assert len(keys) == 1


def test_a_method_that_writes_a_folder_hands_it_on(folder: Path, tmp_path: Path) -> None:
    done = go(folder, tmp_path, materials={}, judge={}, steps=[{"merge.double": {"factor": 3.0}}])
    before, after = (models.load_weights(models.facts(one), "float32") for one in (folder, done.folder / "model"))
    for (name, old), new in zip(before.state_dict().items(), after.state_dict().values(), strict=True):
        assert torch.allclose(3 * old, new, rtol=1e-2), name
    assert (done.folder / "model" / "tokenizer.json").exists()
    with pytest.raises(RequestError, match="writes a folder: say where, with out=FOLDER"):
        double("starter:docs-llama")


def test_what_cannot_be_reported_is_an_error_that_names_it_and_the_model_is_kept(folder: Path, tmp_path: Path) -> None:
    materials = {"raw": {"from": str(tmp_path / "people.jsonl")}, "text": ["raw"]}
    with pytest.raises(RunError, match=r"facts\['loss'\] is nan.*The model that it made is kept in (.*refused)"):
        go(folder, tmp_path, materials=materials, steps=["shrink.broken"])
    (kept,) = (tmp_path / "out" / "steps").glob("*.refused")
    assert models.facts(kept).shapes == models.facts(folder).shapes
    model = models.load_weights(models.facts(folder), "float32")
    with pytest.raises(OutcomeError) as caught:
        broken(model, Examples([], []))
    assert caught.value.outcome.model is model


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([{"inspect.look": {"others": "twin"}}], None),
        ([{"inspect.look": {"others": "raw"}}], "others reads a model, but the material 'raw' is data"),
        ([{"inspect.look": {"raw": ["raw", "raw"]}}], "raw reads one of `materials:`, not 2 \\(raw, raw\\)"),
        ([{"inspect.look": {"raw": {"from": "x.jsonl"}}}], "raw reads a material by its name, not {'from'"),
        ([{"inspect.look": {"raw": "twin"}}], "raw reads data, but the material 'twin' is a model"),
        ([{"inspect.look": {"others": []}}], "others is an empty list"),
        ([{"inspect.look": {"base": "twin"}}], "'base' is the model that the step before hands on"),
        (["shrink.drop_layers"], "is made by 'inspect.look', which is no step before"),
        ([{"inspect.look": {"others": "twni"}}], "needs a model 'twni'.*Did you mean 'twin'"),
    ],
)
def test_roles_are_checked_before_anything_runs(steps: Any, message: str | None, folder: Path, tmp_path: Path) -> None:
    if message is None:
        assert go(folder, tmp_path, steps=steps).report["steps"][0]["facts"]["others"] == 1
        return
    with pytest.raises(RequestError, match=message):
        go(folder, tmp_path, steps=steps)
    assert not (tmp_path / "out").exists() and not SEEN


@pytest.mark.parametrize(
    ("product", "message"),
    [
        ({"made": "inspect.look", "name": "kpt"}, "makes no 'kpt'.*Did you mean 'kept'"),
        ({"made": "inspect.look"}, "must say which product"),
        ({"made": "inspect.look", "name": "mean"}, "text reads data, but the material 'text' is tensors"),
        ({"made": "inspect.look", "name": "kept", "form": "qa"}, "has no option 'form'"),
        ({"made": 3, "name": "kept"}, "made: 3 is no name"),
    ],
)
def test_products_are_checked_before_anything_runs(product: Any, message: str, folder: Path, tmp_path: Path) -> None:
    materials = recipe(folder, tmp_path)["materials"] | {"text": product}
    with pytest.raises(RequestError, match=message):
        go(folder, tmp_path, materials=materials)
    assert not SEEN


def test_every_product_comes_back_as_it_was(tmp_path: Path) -> None:
    from overhaul.recipe import products

    examples = Examples(
        [
            {"input_ids": torch.arange(n), "labels": torch.arange(n) - 100, "weight": torch.tensor(n / 3)}
            for n in (2, 5)
        ],
        [{"question": "a\u2028b"}, {"question": "é"}],
    )
    for kind, value in {
        "examples": examples,
        "rows": [{"text": "line\u2028separator", "n": None}],
        "tensors": {"a": torch.randn(2, 3), "b": torch.tensor([1, 2])},
        "json": {"plan": [1, 2, {"x": None}]},
    }.items():
        place = products.place_of(tmp_path, kind, kind)  # pyright: ignore[reportArgumentType]
        products.write(value, kind, place)  # pyright: ignore[reportArgumentType]
        again = products.read(kind, place)  # pyright: ignore[reportArgumentType]
        if kind == "examples":
            assert again.digest() == examples.digest()
        elif kind == "tensors":
            assert all(torch.equal(again[name], tensor) for name, tensor in value.items())
        else:
            assert again == value
    with pytest.raises(RunError, match="'bad' cannot be kept as json"):
        products.write({"x": math.nan}, "json", products.place_of(tmp_path, "bad", "json"))


def test_a_product_that_would_come_back_as_something_else_is_refused(tmp_path: Path) -> None:
    from overhaul.recipe import products

    one = torch.arange(6.0).reshape(2, 3)
    place = products.place_of(tmp_path, "views", "tensors")
    products.write({"a": one, "b": one, "c": one[0]}, "tensors", place)
    assert {name: tensor.shape for name, tensor in products.read("tensors", place).items()} == {
        "a": (2, 3), "b": (2, 3), "c": (3,),
    }  # fmt: skip
    place = products.place_of(tmp_path, "value", "tensors")
    products.write({"value": one}, "tensors", place)
    assert torch.equal(products.read("tensors", place)["value"], one), "a name of its own is no sign"
    place = products.place_of(tmp_path, "rows", "examples")
    products.write(Examples([{"x": one}], [{"label": np.int64(3), "age": math.nan}]), "examples", place)
    assert list(products.read("examples", place).rows) == [{"label": 3, "age": None}]
    mixed = Examples([{"x": torch.tensor(1)}, {"x": torch.tensor(0.5)}], [{}, {}])
    for n, (value, kind, message) in enumerate(
        [
            ({1: 2}, "json", "the key 1 is no text"),
            ([{"a": {1: 2}}], "rows", "the key 1 is no text"),
            (mixed, "examples", "of several dtypes"),
            ({"a": one.to_sparse()}, "tensors", "cannot be kept as tensors"),
            ({"a": one.to("meta")}, "tensors", "cannot be kept as tensors"),
        ]
    ):
        with pytest.raises(RunError, match=message):
            products.write(value, kind, products.place_of(tmp_path, f"bad{n}", kind))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    "outcome",
    [
        {"curves": {"loss": 3.0}},
        {"curves": {"loss": torch.tensor(3.0)}},
        {"curves": {"loss": "text"}},
        {"facts": {math.nan: 1}},
        {"facts": [1]},
        {"layers": {"share": [1.0]}},
        {"layers": {"share": {None: 1.0}}},
        {"layers": {"share": {0.5: 1.0}}},
        {"facts": {"x": torch.ones((), device="meta")}},
        {"tables": {"x": Table((math.nan,), ((1,),))}},  # pyright: ignore[reportArgumentType]
        {"tables": {"x": Table(("a",), ((1,),), unit=np.float32(1))}},  # pyright: ignore[reportArgumentType]
        {"tables": {3: Table(("a",), ((1,),))}},
        {"made": None},
    ],
)
def test_what_no_report_can_hold_is_told_where_it_returns_and_loses_no_model(outcome: dict[str, Any]) -> None:
    model = nn.Linear(1, 1)
    with pytest.raises(OutcomeError, match="method returned a value that cannot be reported") as caught:
        checked(Outcome(model, **outcome), "method", {})
    assert caught.value.outcome.model is model


def test_a_product_that_cannot_be_kept_loses_no_model(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"Step 1, shrink.makes_little: .*'kept' cannot be kept as json.*is kept in"):
        go(folder, tmp_path, materials={}, judge={}, steps=[{"shrink.makes_little": {"kept": False}}])
    (kept,) = (tmp_path / "out" / "steps").glob("*.refused")
    assert models.facts(kept).shapes == models.facts(folder).shapes


def test_a_product_that_was_declared_and_not_made_is_told_to_who_reads_it(folder: Path, tmp_path: Path) -> None:
    materials = {"raw": {"made": "shrink.makes_little", "name": "more"}}
    steps = ["shrink.makes_little", "inspect.look"]
    with pytest.raises(RunError, match=r"shrink.makes_little made no 'more' for the material 'raw'"):
        go(folder, tmp_path, materials=materials, judge={}, steps=steps)


@pytest.mark.smoke
def test_after_says_which_of_two_steps_of_a_name(folder: Path, tmp_path: Path) -> None:
    twice = ["shrink.makes_little", "shrink.makes_little", {"inspect.look": {"others": "middle"}}]
    read: dict[str, Any] = {"raw": {"from": str(tmp_path / "people.jsonl")}}
    with pytest.raises(RequestError, match="which the steps 1, 2 are. Write the number"):
        go(folder, tmp_path, materials=read | {"middle": {"after": "makes_little"}}, judge={}, steps=twice)
    for number in (1, 2):
        SEEN.clear()
        out = tmp_path / str(number)
        run(recipe(folder, tmp_path, materials=read | {"middle": {"after": number}}, judge={}, steps=twice), out)
        ((_, _, (middle,), _),) = SEEN
        assert middle.folder.parent.name.startswith(f"0{number}-")


def test_a_steps_version_covers_the_code_that_it_imports(tmp_path: Path) -> None:
    root = tmp_path / "overhaul"
    (root / "forget").mkdir(parents=True)
    (root / "forget" / "__init__.py").write_text("from overhaul.method import shelve\n")
    (root / "method.py").write_text("X = 1\n")
    (root / "forget" / "npo.py").write_text("def f():\n    from overhaul.forget import (\n    _losses,  # why\n    )\n")
    (root / "forget" / "_losses.py").write_text("import overhaul.sums as sums\n")
    (root / "sums.py").write_text("BETA = 1\n")
    (root / "forget" / "ssd.py").write_text("ALPHA = 1\n")
    before = version_of("overhaul.forget.npo", root)
    assert {path.name for path in reached("overhaul.forget.npo", root)} == {
        "__init__.py", "method.py", "npo.py", "_losses.py", "sums.py",
    }  # fmt: skip
    (root / "forget" / "ssd.py").write_text("ALPHA = 2\n")
    assert version_of("overhaul.forget.npo", root) == before, "a neighbour does not count"
    (root / "sums.py").write_text("BETA = 2\n")
    assert version_of("overhaul.forget.npo", root) != before, "a formula two imports away does"
    real = {path.name for path in reached("overhaul.forget.npo")}
    assert {"npo.py", "_training.py", "loop.py", "objectives.py", "references.py"} <= real


def test_annotations_that_no_recipe_can_give_are_refused_when_a_method_is_defined() -> None:
    with pytest.raises(TypeError, match="'where' is .*Path.*which no recipe can give"):

        @method(verb="merge", changes="weights")
        def wrong(model: nn.Module, where: Path) -> Outcome:
            """Nothing.

            Args:
                model: it stays.
                where: a place.
            """
            return Outcome(model)


def test_a_limit_fails_the_step_that_breaks_it_and_the_report_shows_why(folder: Path, tmp_path: Path) -> None:
    raw = {"raw": {"from": str(tmp_path / "people.jsonl")}}
    judge = {"kept": {"perplexity": {"on": "raw", "at_most": 1e9}, "accuracy": {"on": "raw", "at_least": 1.0}}}
    steps = ["inspect.look", {"merge.double": {"factor": 1.5}}, {"merge.double": {"factor": 2.0}}]
    words = (
        r"Step 2, merge.double: accuracy on raw is 0, below its limit of 1. .*report.html.* it was so already: accuracy"
    )
    with pytest.raises(RunError, match=words):
        go(folder, tmp_path, materials=raw, steps=steps, judge=judge)
    out = tmp_path / "out"
    report = json.loads((out / "report.json").read_text())
    assert report["stages"] == ["before", "merge.double"] and "below its limit of 1" in report["warnings"][-1]
    assert (out / "report.html").exists() and not (out / "model").exists()
    assert len(list((out / "steps").glob("03*"))) == 0
    judge["kept"].pop("accuracy")
    assert go(folder, tmp_path, materials=raw, steps=steps, judge=judge).report["stages"][2:] == ["merge.double"]


def test_any_model_of_the_materials_is_an_anchor(folder: Path, tmp_path: Path) -> None:
    materials = {"raw": {"from": str(tmp_path / "people.jsonl")}, "twin": {"model": str(folder)}}
    judge = {"kept": {"perplexity": {"on": "raw", "anchor": "twin"}}}
    done = go(folder, tmp_path, materials=materials, steps=[{"merge.double": {"factor": 1.5}}], judge=judge)
    (measure,) = [one for one in done.report["measures"] if one["metric"] == "perplexity"]
    before, after = measure["values"]
    assert measure["anchor"] == pytest.approx(before) and after != before
    judge["kept"]["perplexity"]["anchor"] = "twni"
    with pytest.raises(RequestError, match="'twni' is no model of the materials. Did you mean 'twin'"):
        go(folder, tmp_path, materials=materials, steps=[{"merge.double": {}}], judge=judge)


@pytest.mark.parametrize(
    ("step", "said"),
    [
        ({"merge.double": {"factor": 1.5}}, "nothing else is needed"),
        ({"rewire.attention_residuals": {"steps": 0}}, "`from_pretrained` after `import overhaul`"),
    ],
)
def test_the_card_says_how_the_model_loads(step: Any, said: str, folder: Path, tmp_path: Path) -> None:
    materials = {"text": {"from": str(tmp_path / "people.jsonl")}}
    go(folder, tmp_path, materials=materials, steps=[step], judge={})
    assert said in (tmp_path / "out" / "model" / "README.md").read_text()


def test_a_step_without_effect_says_what_it_measured(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"changed nothing .* it measured \{'factor': 1.0\}\. If nothing there says why"):
        go(folder, tmp_path, materials={}, steps=[{"merge.double": {"factor": 1.0}}], judge={})
