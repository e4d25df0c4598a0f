"""Wrong requests are refused before any weight is read, in words that name the mend."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from overhaul import models
from overhaul.errors import RequestError
from overhaul.recipe.check import Checked, check
from overhaul.recipe.spec import read

PEOPLE = [{"person": p, "question": f"{p}?", "answer": a} for p, a in (("ada", "x1"), ("bo", "y2"), ("cy", "z3"))]


def recipe(folder: Path, base: Path, **changes: Any) -> dict[str, Any]:
    path = base / "people.jsonl"
    path.write_text("\n".join(map(json.dumps, PEOPLE)))
    return {
        "model": str(folder),
        "materials": {
            "forget": {"from": str(path), "where": {"person": "ada"}},
            "retain": {"from": str(path), "unless": {"person": "ada"}},
        },
        "steps": [{"forget.npo": {"steps": 2}}],
        "judge": {"forgotten": {"accuracy": "forget"}},
        **changes,
    }


def refused(text: str, folder: Path, base: Path, **changes: Any) -> None:
    with pytest.raises(RequestError, match=text):
        check(read(recipe(folder, base, **changes)))


@pytest.fixture(autouse=True)
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(models, "load_weights", never)


def checked(folder: Path, base: Path, **changes: Any) -> Checked:
    return check(read(recipe(folder, base, **changes)))


def test_a_good_recipe_knows_its_steps_knobs_and_roles(folder: Path, tmp_path: Path) -> None:
    good = checked(folder, tmp_path)
    (step,) = good.steps
    assert step.name == "forget.npo" and step.knobs["steps"] == 2 and step.knobs["beta"] == 0.1
    assert step.reads == {"forget": "forget", "retain": "retain"}
    assert good.used == ["forget", "retain"]


def test_a_role_can_read_another_material(folder: Path, tmp_path: Path) -> None:
    (step,) = checked(folder, tmp_path, steps=[{"forget.npo": {"forget": "retain", "retain": "forget"}}]).steps
    assert step.reads == {"forget": "retain", "retain": "forget"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": [{"forget.nop": {}}]}, r"no method 'forget.nop'. Did you mean 'forget.npo'"),
        ({"steps": [{"forget.npo": {"bta": 1}}]}, r"no knob 'bta'. Did you mean 'beta'"),
        ({"steps": [{"forget.npo": {"beta": -1}}]}, r"beta=-1 is not possible"),
        ({"steps": [{"forget.npo": {}, "shrink.heal": {}}]}, "a step is"),
        ({"steps": []}, "no steps"),
        ({"steps": [{"forget.sisa": {}}]}, r"needs the material 'full'"),
        ({"steps": [{"forget.npo": {"retain": "retian"}}]}, r"needs the material 'retian'.*Did you mean 'retain'"),
        ({"materials": {}}, r"needs the material 'forget'"),
        ({"judge": {"forgoten": {"accuracy": "forget"}}}, r"Did you mean 'forgotten'"),
        ({"judge": {"kept": {"acuracy": "forget"}}}, r"Did you mean 'accuracy'"),
        ({"judge": {"kept": {"accuracy": "retian"}}}, r"Did you mean 'retain'"),
        ({"dtype": "float8"}, r"dtype 'float8'"),
        ({"model": "nowhere/"}, "does not exist"),
        ({"modle": "x"}, r"no field 'modle'. Did you mean 'model'"),
        ({"seed": "many"}, "seed"),
    ],
)
def test_wrong_names_are_answered_with_the_right_ones(
    changes: dict[str, Any], message: str, folder: Path, tmp_path: Path
) -> None:
    refused(message, folder, tmp_path, **changes)


def test_materials_are_checked(folder: Path, tmp_path: Path) -> None:
    rows = recipe(folder, tmp_path)["materials"]
    one = rows["forget"]["from"]
    refused("must say where it comes from", folder, tmp_path, materials={"forget": 3})
    refused("no option 'wher'. Did you mean 'where'", folder, tmp_path, materials={"forget": {"from": one, "wher": {}}})
    refused("limit: Input should be greater than 0", folder, tmp_path, materials={"forget": {"from": one, "limit": 0}})
    empty = {**rows, "forget": {"from": one, "where": {"person": "dee"}}}
    refused("none of its 3 rows is left", folder, tmp_path, materials=empty)
    refused("includes 'x', which is not a material above it", folder, tmp_path, materials={"forget": ["x"]})


def test_forgetting_everything_is_refused(folder: Path, tmp_path: Path) -> None:
    one = recipe(folder, tmp_path)["materials"]["forget"]["from"]
    refused(
        "forget set contains the whole training set",
        folder,
        tmp_path,
        materials={"forget": {"from": one}, "full": {"from": one}},
        steps=["forget.ssd"],
    )
    refused(
        "3 examples are in `forget` and in `retain`",
        folder,
        tmp_path,
        materials={"forget": {"from": one}, "retain": {"from": one}},
    )


def test_forgetting_most_of_the_data_is_refused_with_the_better_way(folder: Path, tmp_path: Path) -> None:
    one = recipe(folder, tmp_path)["materials"]["forget"]["from"]
    most = {"from": one, "where": {"person": ["ada", "bo"]}}
    materials = {"forget": most, "full": {"from": one}}
    refused("2 of the 3 examples.*training on the rest", folder, tmp_path, materials=materials, steps=["forget.ssd"])


def test_near_duplicates_are_warned_about_and_not_refused(folder: Path, tmp_path: Path) -> None:
    rows = recipe(folder, tmp_path)["materials"]
    assert checked(folder, tmp_path).warnings == []
    nearly = tmp_path / "nearly.jsonl"
    nearly.write_text(json.dumps({"person": "someone", "question": "ADA !", "answer": "x1"}))
    (warning,) = checked(folder, tmp_path, materials={**rows, "retain": {"from": str(nearly)}}).warnings
    assert "Step 1, forget.npo: 1 examples of `forget` are nearly in `retain`" in warning
    assert "'ada? x1' beside 'ADA ! x1'" in warning


def test_an_answer_beyond_the_positions_is_refused_not_cut(folder: Path, tmp_path: Path) -> None:
    rows = recipe(folder, tmp_path)["materials"]
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"person": "z", "question": "a" * 130, "answer": "b"}))
    good = checked(folder, tmp_path, materials={**rows, "forget": {"from": str(long)}})
    with pytest.raises(
        RequestError, match=r"'forget' has an example of 15\d tokens.*the question 'aaa.*ends at 128 pos"
    ):
        good.encode()
    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"text": "a" * 200}))
    wide = {**rows, "forget": {"from": str(text), "length": 200}}
    with pytest.raises(RequestError, match="Write `length: 128`"):
        checked(folder, tmp_path, materials=wide).encode()


def test_models_named_after_a_step_must_exist_and_come_before(folder: Path, tmp_path: Path) -> None:
    rows = recipe(folder, tmp_path)["materials"]
    text = {**rows, "text": ["retain"]}
    heal = {"shrink.heal": {"steps": 1, "target": "teacher"}}
    npo = {"forget.npo": {"steps": 1}}
    good = checked(folder, tmp_path, materials={**text, "teacher": {"after": "forget.npo"}}, steps=[npo, heal])
    assert good.steps[1].reads == {"text": "text", "teacher": "teacher"}
    assert checked(folder, tmp_path, materials={**text, "teacher": {"after": "npo"}}, steps=[npo, heal])
    refused(
        "is no step. Known: forget.npo",
        folder,
        tmp_path,
        materials={**text, "teacher": {"after": "nop"}},
        steps=[npo, heal],
    )
    refused("before that", folder, tmp_path, materials={**text, "teacher": {"after": "forget.npo"}}, steps=[heal, npo])


def test_text_needs_a_tokenizer(folder: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((folder / name).read_bytes())
    refused("has no tokenizer", bare, tmp_path)


def test_files_that_are_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no recipe at"):
        read(tmp_path / "x.yaml")
    (tmp_path / "x.yaml").write_text("a: [")
    with pytest.raises(RequestError, match=r"recipe x.yaml is not valid YAML: [^\"]*\n  in line 1, column 5"):
        read(tmp_path / "x.yaml")
    (tmp_path / "x.yaml").write_text("model: a\nsteps:\n  forget.npo: {}")
    with pytest.raises(
        RequestError, match=r"x.yaml, steps: a list is wanted here, one line with `- ...` for each thing."
    ):
        read(tmp_path / "x.yaml")
    (tmp_path / "x.yaml").write_text("- 1")
    with pytest.raises(RequestError, match="must be a mapping"):
        read(tmp_path / "x.yaml")
    (tmp_path / "x.yaml").write_text("model: !!python/object:os.system x")
    with pytest.raises(RequestError, match="not valid YAML"):
        read(tmp_path / "x.yaml")
