"""What is kept of a run is used again only where everything that it came from is still the same."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from conftest import tiny_vit
from overhaul import models
from overhaul.data.examples import Examples
from overhaul.errors import RequestError, RunError
from overhaul.recipe import finished
from overhaul.recipe.run import run
from overhaul.recipe.spec import read
from overhaul.recipe.store import key_of

ROWS = [{"person": p, "question": f"who is {p}?", "answer": p * 3} for p in "abcdefgh"]
PRUNE = {"shrink.prune": {"criterion": "magnitude"}}


def recipe_for(folder: Path, steps: Any = (PRUNE,), **changes: Any) -> dict[str, Any]:
    return {
        "model": str(folder),
        "materials": {"people": {"from": str(folder.parent / "people.jsonl")}},
        "steps": list(steps),
        "judge": {"kept": {"answer_probability": "people"}},
        **changes,
    }


@pytest.fixture
def own(folder: Path, tmp_path: Path) -> Path:
    """A model folder that a test may write into, with rows beside it."""
    (tmp_path / "people.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    return Path(shutil.copytree(folder, tmp_path / "base"))


def values(report: dict[str, Any]) -> list[Any]:
    return [measure["values"] for measure in report["measures"] if measure["group"] != "cost"]


def scaled(path: Path, factor: float) -> None:
    tensors = {name: tensor.clone() * factor for name, tensor in load_file(path).items()}
    save_file(tensors, path, {"format": "pt"})


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_a_changed_base_of_an_adapter_makes_a_finished_run_void(own: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model, _ = models.open_model(own)
    wrapped: Any = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    wrapped.peft_config["default"].base_model_name_or_path = str(own)
    wrapped.save_pretrained(tmp_path / "adapter")
    recipe = recipe_for(tmp_path / "adapter", materials={"people": {"from": str(tmp_path / "people.jsonl")}})
    first = run(recipe, tmp_path / "out").report
    assert finished.found(tmp_path / "out", read(recipe)) is not None
    scaled(own / "model.safetensors", 0.5)
    assert values(run(recipe, tmp_path / "out").report) != values(first)


def test_another_tokenizer_or_generation_config_makes_a_step_be_done_again(own: Path, tmp_path: Path) -> None:
    def keys() -> set[str]:
        run(recipe_for(own), tmp_path / "out")
        return {path.name for path in (tmp_path / "out" / "steps").iterdir()}

    first = keys()
    assert keys() == first and len(first) == 1
    for name in ("generation_config.json", "tokenizer_config.json"):
        path = own / name
        path.write_text(json.dumps({**json.loads(path.read_text()), "note": name}))
        assert len(keys()) == len(first) + 1
        first = keys()
    (own / "lineage.json").write_text(json.dumps({"materials_sha256": {}, "steps": []}))
    assert keys() == first, "what a model was made from is no part of what it says"


def test_a_step_that_other_versions_did_is_kept_and_said(own: Path, tmp_path: Path) -> None:
    assert run(recipe_for(own), tmp_path / "out").report["warnings"] == []
    (record,) = (tmp_path / "out" / "steps").glob("*/step.json")
    content = json.loads(record.read_text())
    assert content["libraries"]["torch"] == version("torch")
    record.write_text(json.dumps(content | {"libraries": {**content["libraries"], "torch": "1.0"}}))
    (tmp_path / "out" / "finished.json").unlink()
    (warning,) = run(recipe_for(own), tmp_path / "out").report["warnings"]
    assert warning.startswith("Step 1, shrink.prune, was done with torch 1.0 (now ")
    lineage = json.loads((tmp_path / "out" / "lineage.json").read_text())
    assert lineage["steps"][0]["libraries"]["torch"] == "1.0" and lineage["libraries"]["torch"] != "1.0"


def test_a_file_that_joins_the_data_makes_a_finished_run_void(tmp_path: Path) -> None:
    from transformers import ViTImageProcessor

    processor = ViTImageProcessor(size={"height": 8, "width": 8}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    models.save(tiny_vit(num_channels=3), processor, tmp_path / "vit")
    draw = np.random.default_rng(0)

    def picture(name: str) -> None:
        place = tmp_path / "pictures" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(place)

    for label in "0123":
        picture(f"{label}/one.png")
    recipe = {
        "model": str(tmp_path / "vit"),
        "materials": {"pictures": {"from": str(tmp_path / "pictures")}},
        "steps": [PRUNE],
        "judge": {"kept": {"answer_probability": "pictures"}},
    }
    first = run(recipe, tmp_path / "out").report
    for label in "0123":
        picture(f"{label}/two.png")
    assert values(run(recipe, tmp_path / "out").report) != values(first)


def test_a_link_that_leads_elsewhere_makes_a_finished_run_void(own: Path, tmp_path: Path) -> None:
    (tmp_path / "latest").symlink_to(own)
    recipe = recipe_for(tmp_path / "latest")
    first = run(recipe, tmp_path / "out").report
    shutil.copytree(own, tmp_path / "newer")
    scaled(tmp_path / "newer" / "model.safetensors", 0.5)
    (tmp_path / "latest").unlink()
    (tmp_path / "latest").symlink_to(tmp_path / "newer")
    assert values(run(recipe, tmp_path / "out").report) != values(first)


def test_a_run_inside_the_folder_of_its_model_is_known_as_finished(own: Path) -> None:
    recipe = recipe_for(own)
    run(recipe, own / "out")
    assert finished.found(own / "out", read(recipe)) is not None


@pytest.mark.smoke
def test_what_is_written_over_the_published_model_does_not_pass_for_what_the_step_made(
    own: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    first = run(recipe_for(own), out).report
    content = (out / "model" / "model.safetensors").read_bytes()
    with (out / "model" / "model.safetensors").open("r+b") as file:  # as a tool that writes in place does
        file.write(content[:-4000] + bytes(4000))
    more = recipe_for(own, [PRUNE, {"shrink.prune": {"criterion": "magnitude", "sparsity": 0.6}}])
    with pytest.warns(UserWarning, match="was changed after its step was finished"):
        again = run(more, out).report
    assert values(again) == values(run(more, tmp_path / "new").report)
    assert [both[:2] for both in values(again)] == values(first)


PROGRAM = (
    "import sys\n"
    "from pathlib import Path\n"
    "from overhaul.recipe.store import RunFolder\n"
    "folder = RunFolder.claim(Path(sys.argv[1]), 'recipe', 0)\n"
    "print('held', flush=True)\n"
    "sys.stdin.read()\n"
)


@pytest.mark.smoke
def test_two_processes_do_not_work_in_one_folder(own: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = [sys.executable, "-c", PROGRAM, str(out)]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(RequestError, match="Another process works on the run in .*out now"):
            run(recipe_for(own), out)
        other.kill()
    assert run(recipe_for(own), out).report["stages"] == ["before", "shrink.prune"], "a killed one lets go"


def test_a_run_that_failed_lets_go_of_its_folder(own: Path, tmp_path: Path) -> None:
    nothing = [PRUNE, PRUNE]  # the second changes nothing
    for _ in range(2):
        with pytest.raises(RunError, match="Step 2, shrink.prune"):
            run(recipe_for(own, nothing), tmp_path / "out")


def test_a_key_covers_all_of_an_array_and_of_a_picture_only_what_it_shows() -> None:
    one = np.zeros(5000)
    other = one.copy()
    other[2500] = 1  # where `str` shows dots
    few = np.array(["a", None], dtype=object)
    picture = Image.new("L", (4, 4))
    bright = Image.new("L", (4, 4), 255)
    same = [(one, one.copy()), (few, few.copy()), (picture, picture.copy()), ({"a", "b"}, {"b", "a"})]
    differ = [(one, other), (torch.tensor(one), torch.tensor(other)), (one, one.reshape(50, 100)), (picture, bright)]

    def digest(value: Any) -> str:
        return Examples([{"n": torch.zeros(1)}], [{"x": value}]).digest()

    assert all(key_of({"x": a}) == key_of({"x": b}) and digest(a) == digest(b) for a, b in same)
    assert all(key_of({"x": a}) != key_of({"x": b}) and digest(a) != digest(b) for a, b in differ)


def test_what_lies_there_already_needs_no_room(own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    first = run(recipe_for(own), out).report
    (out / "finished.json").unlink()
    size = (own / "model.safetensors").stat().st_size
    little = shutil.disk_usage(out)._replace(free=size + size // 2)  # the whole run writes two
    monkeypatch.setattr(shutil, "disk_usage", lambda _: little)
    assert values(run(recipe_for(own), out).report) == values(first)
    with pytest.raises(RequestError, match="this run writes about"):
        run(recipe_for(own), tmp_path / "new")


def test_a_pattern_of_files_is_known_as_finished_until_one_joins_or_changes(own: Path, tmp_path: Path) -> None:
    (tmp_path / "rows[1]").mkdir()
    for n in range(2):
        (tmp_path / "rows[1]" / f"{n}.jsonl").write_text("\n".join(map(json.dumps, ROWS[n::2])))
    recipe = tmp_path / "rows[1]" / "recipe.yaml"
    recipe.write_text(json.dumps(recipe_for(own, materials={"people": {"from": "*.jsonl"}})))
    document = read(recipe)
    run(recipe, tmp_path / "out")
    assert finished.found(tmp_path / "out", document) is not None
    (tmp_path / "rows[1]" / "2.jsonl").write_text(json.dumps({"question": "who is i?", "answer": "iii"}))
    assert finished.found(tmp_path / "out", document) is None
    (tmp_path / "rows[1]" / "2.jsonl").unlink()
    assert finished.found(tmp_path / "out", document) is not None
    (tmp_path / "rows[1]" / "1.jsonl").write_text(json.dumps(ROWS[0]))
    assert finished.found(tmp_path / "out", document) is None
