"""Python code that comes with a checkpoint: it runs where it is trusted, whatever stands on standard input."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import overhaul as oh
from overhaul import models
from overhaul.errors import OverhaulError, RequestError
from overhaul.recipe.check import check
from overhaul.recipe.spec import read
from overhaul.shrink.drop_layers import drop_layers

CODE = """
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
{first}

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""
EVIL = 'import pathlib\npathlib.Path({place!r}).write_text("ran")'
WORDS = "modeling_own.OwnTokenizer"
MAP = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}


def edited(path: Path, **changes: Any) -> None:
    """Change entries of a JSON file; None takes one away."""
    content = json.loads(path.read_text()) if path.exists() else {}
    content |= changes
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


def config(**changes: Any) -> Callable[[Path], None]:
    return lambda place: edited(place / "config.json", **changes)


def tokenizer(**changes: Any) -> Callable[[Path], None]:
    return lambda place: edited(place / "tokenizer_config.json", **changes)


def generating(place: Path) -> None:
    (place / "custom_generate").mkdir()
    shutil.copyfile(place / "modeling_own.py", place / "custom_generate" / "generate.py")
    edited(place / "generation_config.json", custom_generate=str(place), trust_remote_code=True)


def image_processor(place: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (place / name).unlink()
    edited(place / "preprocessor_config.json", auto_map={"AutoImageProcessor": WORDS})


OWN = {"model_type": "own", "architectures": ["OwnForCausalLM"], "auto_map": MAP}
HOSTILE: dict[str, Callable[[Path], None]] = {
    "all of it": config(**OWN),
    "the class alone": config(architectures=["OwnForCausalLM"], auto_map=MAP),
    "no architectures": config(**{**OWN, "architectures": None}),
    "an Auto class as class": config(architectures=["AutoModelForCausalLM"], auto_map=MAP),
    "another Auto class": config(architectures=["AutoModel"], auto_map={**MAP, "AutoModel": MAP["AutoConfig"]}),
    "a known class with code": config(auto_map=MAP),
    "it trusts itself": config(**OWN, trust_remote_code=True),
    "a pipeline as class": config(architectures=["pipeline"], auto_map=MAP),
    "a diffusers pipeline": config(architectures=None, _class_name="DiffusionPipeline", auto_map=MAP),
    "the tokenizer": tokenizer(tokenizer_class="OwnTokenizer", auto_map={"AutoTokenizer": [WORDS, None]}),
    "the tokenizer, fast": tokenizer(tokenizer_class=None, auto_map={"AutoTokenizer": [None, WORDS]}),
    "the tokenizer, in an old form": tokenizer(tokenizer_class=None, auto_map=[WORDS, None]),
    "the tokenizer, in the config": config(auto_map={"AutoTokenizer": [WORDS, None]}, tokenizer_class="OwnTokenizer"),
    "the image processor": image_processor,
    "generation": generating,
    "a kernel": config(attn_implementation="somebody/attention"),
    "a conversion of an Auto class": config(
        overhaul={"class": "AutoModelForCausalLM", "model_type": "own", "conversions": []}, auto_map=MAP
    ),
}  # fmt: skip


@pytest.fixture
def hostile(request: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A folder that would write a marker, and where; standard input says yes to everything."""
    place, marker = tmp_path / "hostile", tmp_path / "marker"
    shutil.copytree(folder, place)
    (place / "modeling_own.py").write_text(CODE.format(first=EVIL.format(place=str(marker))))
    HOSTILE[request.param](place)
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 99))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    return place, marker


def tried(what: Callable[[], Any], marker: Path) -> str:
    """What happened: it went through, or one sentence."""
    try:
        what()
        said = ""
    except OverhaulError as error:
        said = str(error)
    assert not marker.exists(), "code of the folder ran"
    assert sys.stdin.readline() == "y\n", "nobody asked"
    return said


@pytest.mark.parametrize("hostile", HOSTILE, indirect=True)
def test_no_code_of_a_folder_runs_unless_it_is_trusted(hostile: tuple[Path, Path], tmp_path: Path) -> None:
    place, marker = hostile
    (tmp_path / "text.txt").write_text("a short text of some words. " * 20)
    recipe = {
        "model": str(place),
        "materials": {"text": {"from": str(tmp_path / "text.txt"), "length": 16}},
        "steps": ["inspect.layer_map", {"shrink.drop_layers": {"count": 1}}],
    }
    refused = [
        tried(lambda: check(read(recipe)), marker),
        tried(lambda: oh.open(place), marker),
        tried(lambda: oh.open(f"new:{place}"), marker),
        tried(lambda: models.check_shapes(models.facts(place)), marker),
    ]
    if refused[1]:  # what cannot be opened, plan refuses
        assert refused[0], refused
        refused.append(tried(lambda: oh.run(recipe, tmp_path / "run"), marker))
        assert refused[-1] == refused[0] and not (tmp_path / "run").exists()
    for said in filter(None, refused):
        assert "\n" not in said and len(said) < 600, said


def test_a_refusal_names_the_field(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "m")
    config(**OWN)(tmp_path / "m")
    with pytest.raises(RequestError, match=r"no model class 'OwnForCausalLM'.*`auto_map`.*`trust_remote_code: true`"):
        check(
            read(
                {"model": str(tmp_path / "m"), "steps": [{"shrink.drop_layers": {"count": 1, "criterion": "reverse"}}]}
            )
        )


def test_an_adapter_does_not_choose_what_is_imported(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter_model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    options = {"peft_type": "LORA", "megatron_config": {"a": 1}, "megatron_core": "evil"}
    (tmp_path / "adapter_config.json").write_text(json.dumps({**options, "base_model_name_or_path": str(folder)}))
    with pytest.raises(RequestError, match="lets peft import the module 'evil'"):
        oh.open(tmp_path)


def test_plan_refuses_a_teacher_whose_code_is_not_trusted(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "m")
    config(**OWN)(tmp_path / "m")
    (tmp_path / "text.txt").write_text("a short text of some words. " * 20)
    materials = {"text": {"from": str(tmp_path / "text.txt")}, "teacher": {"model": str(tmp_path / "m")}}
    recipe = {"model": str(folder), "materials": materials, "steps": [{"shrink.heal": {"target": "teacher"}}]}
    with pytest.raises(RequestError, match="no model class 'OwnForCausalLM'"):
        check(read(recipe))


@pytest.mark.smoke
def test_a_yes_on_standard_input_of_the_command_runs_nothing(folder: Path, tmp_path: Path) -> None:
    place, marker = tmp_path / "hostile", tmp_path / "marker"
    shutil.copytree(folder, place)
    (place / "modeling_own.py").write_text(CODE.format(first=EVIL.format(place=str(marker))))
    config(**OWN)(place)
    HOSTILE["the tokenizer"](place)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {place}\nsteps: [{{shrink.drop_layers: {{count: 1, criterion: reverse}}}}]\n")
    for command in (["plan", str(recipe)], ["run", str(recipe), "-o", str(tmp_path / "out")]):
        done = subprocess.run(
            [sys.executable, "-m", "overhaul", *command], input="y\n" * 9, capture_output=True, text=True
        )
        assert done.returncode == 2 and "trust_remote_code" in done.stderr, done.stderr
        assert not marker.exists()


def own_folder(folder: Path, place: Path) -> Path:
    """A checkpoint whose class, config and tokenizer are its own."""
    shutil.copytree(folder, place)
    (place / "modeling_own.py").write_text(CODE.format(first="from .helping_own import HELP"))
    (place / "helping_own.py").write_text("HELP = 1\n")
    config(**OWN)(place)
    HOSTILE["the tokenizer"](place)
    return place


def test_trusted_code_opens_runs_and_is_saved_with_the_model(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = own_folder(folder, tmp_path / "own")
    plain, ids = oh.open(folder)[0], torch.arange(10)[None]
    model, words = oh.open(place, trust_remote_code=True)
    assert type(model).__name__ == "OwnForCausalLM" and type(words).__name__ == "OwnTokenizer"
    torch.testing.assert_close(model(ids).logits, plain(ids).logits)
    drop_layers(model, count=1, criterion="reverse")
    said = model(ids).logits
    out = oh.save(model, words, tmp_path / "out")
    shutil.rmtree(place)
    again = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    torch.testing.assert_close(again(ids).logits, said)
    assert type(AutoTokenizer.from_pretrained(out, trust_remote_code=True)).__name__ == "OwnTokenizer"
    with pytest.raises(RequestError, match="trust_remote_code: true"):
        oh.open(out)
    torch.testing.assert_close(oh.open(out, trust_remote_code=True)[0](ids).logits, said)


@pytest.mark.smoke
def test_a_recipe_runs_a_model_whose_code_is_trusted(folder: Path, tmp_path: Path) -> None:
    place = own_folder(folder, tmp_path / "own")
    (tmp_path / "text.txt").write_text("a short text of some words. " * 20)
    recipe = {
        "model": str(place),
        "trust_remote_code": True,
        "materials": {"text": {"from": str(tmp_path / "text.txt"), "length": 16}},
        "steps": [{"shrink.drop_layers": {"count": 1}}, {"shrink.heal": {"steps": 2}}],
        "judge": {"kept": {"perplexity": "text"}},
    }
    done = oh.run(recipe, tmp_path / "run")
    model: Any = oh.open(done.folder / "model", trust_remote_code=True)[0]
    assert model.config.num_hidden_layers == 3
    assert (done.folder / "model" / "helping_own.py").exists()


def test_code_of_a_class_that_the_library_has_is_not_needed_and_not_named_again(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "m")
    config(auto_map=MAP)(tmp_path / "m")
    model, words = oh.open(tmp_path / "m")
    out = oh.save(model, words, tmp_path / "out")
    assert "auto_map" not in json.loads((out / "config.json").read_text())
