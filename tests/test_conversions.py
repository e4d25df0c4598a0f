"""Conversions: built onto real classes, recorded, saved, opened again, taken back; and what is refused."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from conftest import FAMILIES, examples_for, tiny_gpt2, tiny_llama
from families import FAMILIES as EVERY
from guarantees import output
from overhaul import models, weights
from overhaul.conversions import conversion, convert, records, revert
from overhaul.conversions.classes import MODEL_TYPE, plain_class
from overhaul.conversions.records import known_as
from overhaul.errors import RequestError, RunError
from overhaul.fit import fit
from overhaul.objectives import cross_entropy
from overhaul.stack import LayerStack

IDS = torch.arange(18).reshape(2, 9) % 60


class Damped(nn.Module):
    """Multiplies what a block returns by exp(-rate), one number for each feature."""

    def __init__(self, start: float, width: int) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.full((width,), start))

    def damp(self, _: nn.Module, __: Any, out: Any) -> Any:
        first = out[0] if isinstance(out, tuple) else out
        damped = first * torch.exp(-self.rate)
        return (damped, *out[1:]) if isinstance(out, tuple) else damped


def undamped(model: nn.Module, *, start: float, width: int) -> None:
    for block in LayerStack.of(model).blocks:
        block._forward_hooks.clear()
        del block.damping


@conversion(inverse=undamped)
def damping(model: nn.Module, *, start: float, width: int) -> None:
    for block in LayerStack.of(model).blocks:
        like = next(block.parameters())
        block.damping = Damped(start, width).to(like.device, like.dtype)
        block.register_forward_hook(block.damping.damp)


@conversion
def forgetful(model: nn.Module, *, width: int) -> None:
    """Builds something else on the meta device."""
    if next(model.parameters()).device.type != "meta":
        model.extra = nn.Linear(width, width)


@conversion(version=3)
def tied_head(model: nn.Module) -> None:
    model.second = nn.Linear(32, 4, bias=False)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(IDS).logits


def random_rates(model: nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("damping.rate"):
                parameter.normal_(0, 0.3)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_converted_model_opens_with_nothing_missing_and_nothing_left_over(
    family: str, dtype: str | None, tmp_path: Path
) -> None:
    model: Any = FAMILIES[family]()
    plain = type(model)
    assert convert(model, "damping", starts_as_identity=True, start=0.0, width=32) == 0.0
    assert isinstance(model, plain) and type(model).__name__ == f"Converted{plain.__name__}"
    random_rates(model)
    folder = models.save(model, None, tmp_path / "m", dtype=dtype)
    known = models.facts(folder)
    models.check_shapes(known)
    assert known.architecture == f"Converted{plain.__name__}" and known.config["model_type"] == MODEL_TYPE
    again: Any
    again, _ = models.open_model(folder)
    assert type(again) is type(model) and records(again) == records(model) and plain_class(type(again)) is plain
    if dtype is None:
        assert torch.equal(logits(again), logits(model))
    assert {n: p.shape for n, p in again.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    second = models.save(again, None, tmp_path / "again", dtype=dtype)
    assert weights.relative_change(folder, second).total == 0


def test_it_generates_with_a_cache_trains_and_is_copied(tmp_path: Path) -> None:
    model: Any = tiny_llama()
    convert(model, "damping", start=0.1, width=32)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cached, without = (model.generate(IDS, use_cache=use, **options) for use in (True, False))
    assert torch.equal(cached, without)
    twin = copy.deepcopy(model)
    before = logits(model)
    fit(model, [cross_entropy("text")], {"text": examples_for("llama", 8)}, steps=2, batch_size=4, lr=1e-2)
    assert not torch.equal(logits(model), before) and torch.equal(logits(twin), before)
    assert any(float(p.detach().sub(0.1).abs().max()) for n, p in model.named_parameters() if n.endswith("rate"))
    assert torch.equal(logits(models.open_model(models.save(model, None, tmp_path / "m"))[0]), logits(model))


def test_blocks_are_found_dropped_and_followed_on_a_converted_model(tmp_path: Path) -> None:
    model: Any = EVERY["Qwen3, alternating windows"].build()
    convert(model, "damping", start=0.0, width=32)
    random_rates(model)
    stack = LayerStack.of(model)
    assert stack.depth("model.layers.2.damping.rate") == 2
    stack.drop([1])
    with stack.following([2, 0, 0]):
        said = logits(model)
        folder = models.save(model, None, tmp_path / "m")
    assert [
        record["name"] for record in json.loads((folder / "config.json").read_text())["overhaul"]["conversions"]
    ] == [
        "damping",
        "path",
    ]
    again, _ = models.open_model(folder)
    assert torch.equal(logits(again), said) and [r["name"] for r in records(again)] == ["damping"]
    assert all(tensor.stack for tensor in weights.TensorIndex.of(folder).tensors.values())


def test_tied_and_sharded_weights_are_stored_once(tmp_path: Path) -> None:
    model: Any = tiny_gpt2()
    convert(model, "damping", start=0.2, width=32)
    model.save_pretrained(tmp_path / "m", max_shard_size="20KB")
    known = models.facts(tmp_path / "m")
    assert len(known.weight_files) > 2 and "lm_head.weight" not in known.shapes
    assert known.parameters == sum(p.numel() for p in model.parameters())
    again: Any
    again, _ = models.open_model(tmp_path / "m")
    assert again.lm_head.weight is again.transformer.wte.weight and torch.equal(logits(again), logits(model))


def test_a_new_start_draws_what_was_built_too(tmp_path: Path) -> None:
    model: Any = tiny_llama()
    convert(model, "damping", start=0.25, width=32)
    folder = models.save(model, None, tmp_path / "m")
    known = models.facts(f"new:{folder}")
    assert known.shapes == models.facts(folder).shapes
    assert known.bytes == 4 * sum(math.prod(shape) for shape in known.shapes.values())
    drawn: Any = known.open()
    assert float(drawn.model.layers[3].damping.rate.detach().min()) == 0.25


@pytest.mark.parametrize("family", ["SD3", "ViT", "BERT", "Mixtral", "T5, decoder"])
def test_every_kind_of_class_can_be_converted(family: str, tmp_path: Path) -> None:
    model, inputs = EVERY[family].build(), EVERY[family].inputs()
    with torch.no_grad():
        convert(model, "tied_head", starts_as_identity=True, inputs=inputs)
    second: Any = model.second
    said = output(model, inputs)
    again: Any
    again, _ = models.open_model(models.save(model, None, tmp_path / "m", dtype="float32"))
    assert torch.equal(output(again, inputs), said) and torch.equal(again.second.weight, second.weight)


# the library alone


def test_the_auto_classes_open_it_and_those_of_another_kind_do_not(tmp_path: Path) -> None:
    model: Any = tiny_llama()
    convert(model, "damping", start=0.3, width=32)
    folder = models.save(model, None, tmp_path / "m")
    opened = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    assert type(opened) is type(model) and opened.config._attn_implementation == "eager"
    torch.testing.assert_close(logits(opened), logits(model))
    assert AutoConfig.from_pretrained(folder).vocab_size == 64
    with pytest.raises(
        ValueError, match="AutoModelForSequenceClassification does not open a converted LlamaForCausalLM"
    ):
        AutoModelForSequenceClassification.from_pretrained(folder)


def test_plain_transformers_refuses_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = tiny_llama()
    plain: Any = type(model)
    convert(model, "damping", start=0.3, width=32)
    folder = models.save(model, None, tmp_path / "m")
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        plain.from_pretrained(folder)
    monkeypatch.delitem(CONFIG_MAPPING._extra_content, MODEL_TYPE)
    with pytest.raises(ValueError, match=MODEL_TYPE):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.slow
@pytest.mark.parametrize("first", ["overhaul", "transformers"])
def test_importing_overhaul_is_enough(first: str, tmp_path: Path) -> None:
    model: Any = tiny_llama()
    with LayerStack.of(model).following([2, 0]):
        folder = models.save(model, None, tmp_path / "m")
    second = {"overhaul": "transformers", "transformers": "overhaul"}[first]
    code = f"""
import sys, {first}
{"assert 'torch' not in sys.modules" if first == "overhaul" else "from transformers import AutoModelForCausalLM"}
import {second}
from transformers import AutoModelForCausalLM
print(len(AutoModelForCausalLM.from_pretrained({str(folder)!r}).model.layers))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "2"


# back, and refused


def test_the_inverse_gives_back_a_plain_checkpoint(tmp_path: Path) -> None:
    model: Any = tiny_llama()
    before, plain = logits(model), type(model)
    convert(model, "tied_head")
    convert(model, "damping", start=0.5, width=32)
    with pytest.raises(RequestError, match="tied_head is not the last conversion .* which has: tied_head, damping"):
        revert(model, "tied_head")
    revert(model, "damping")
    assert [record["name"] for record in records(model)] == ["tied_head"] and torch.equal(logits(model), before)
    with pytest.raises(RequestError, match="has no inverse"):
        revert(model, "tied_head")
    single: Any = tiny_llama()
    said = logits(single)
    convert(single, "damping", start=0.5, width=32)
    revert(single, "damping")
    assert type(single) is plain and not hasattr(single.config, "overhaul")
    folder = models.save(single, None, tmp_path / "m")
    assert torch.equal(logits(plain.from_pretrained(folder).eval()), said)


def state(model: nn.Module) -> list[Any]:
    config: Any = model.config
    return [
        type(model),
        sorted(model.state_dict()),
        len(list(model.modules())),
        config.to_dict(),
        logits(model).tolist(),
    ]


def test_what_cannot_be_kept_or_is_no_identity_leaves_the_model_as_it_was() -> None:
    model: Any = tiny_llama()
    before = state(model)
    with pytest.raises(RunError, match="should start as the identity, but an output differs by"):
        convert(model, "damping", starts_as_identity=True, start=0.01, width=32)
    assert state(model) == before
    with pytest.raises(RunError, match=r"what its record does not build again: extra\.bias"):
        convert(model, "forgetful", width=2)
    assert state(model) == before
    with pytest.raises(RuntimeError):
        convert(model, "damping", start=0.0, width=31)
    assert state(model) == before
    with pytest.raises(RequestError, match=r"no conversion 'dampin'.*Did you mean 'damping'"):
        convert(model, "dampin")
    damaged: list[Any] = [{"start": 0.0}, {"start": float("nan"), "width": 32}, {"start": torch.ones(1), "width": 32}]
    for wrong in damaged:
        with pytest.raises(RequestError, match="cannot be recorded with these arguments"):
            convert(model, "damping", **wrong)
    with pytest.raises(RequestError, match="no config that could record"):
        convert(nn.Linear(2, 2), "damping", start=0.0, width=2)
    with LayerStack.of(model).following([1, 0]), pytest.raises(RequestError, match="follows a path"):
        convert(model, "damping", start=0.0, width=32)
    with pytest.raises(RequestError, match="put in force"):
        convert(model, "path", stack="model.layers", blocks=[0])
    assert state(model) == before


def test_a_record_that_is_damaged_unknown_or_of_another_version_is_refused(tmp_path: Path) -> None:
    model: Any = tiny_llama()
    convert(model, "tied_head")
    folder = models.save(model, None, tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    record = config["overhaul"]["conversions"][0]
    assert record == {"name": "tied_head", "module": __name__, "version": 3, "arguments": {}}
    assert load_file(folder / "model.converted.safetensors").keys() >= {"second.weight"}
    for change, message in (
        ({"version": 2}, "was converted by version 2 of 'tied_head'; this is version 3"),
        ({"name": "gone"}, f"by 'gone' of {__name__}, which is not known here. Import {__name__} first"),
        ({"name": "gone", "module": "overhaul.no.such"}, "which is not known here"),
        ({"name": None, "module": None}, "which is not known here"),
    ):
        config["overhaul"]["conversions"] = [{**record, **change}]
        (folder / "config.json").write_text(json.dumps(config))
        for refused in (models.open_model, lambda place: models.check_shapes(models.facts(place))):
            with pytest.raises(RequestError, match=message):
                refused(folder)
    for damaged in ([{}], ["tied_head"]):
        config["overhaul"]["conversions"] = damaged
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(RequestError, match="damaged record"):
            models.open_model(folder)
    config["overhaul"] = {"class": "NoSuchForCausalLM", "conversions": [record]}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(RequestError, match="has no class 'NoSuchForCausalLM' to convert"):
        models.open_model(folder)


def test_only_a_function_of_a_model_and_named_arguments_is_a_conversion() -> None:
    with pytest.raises(TypeError, match="must take"):
        conversion(lambda model, size: None)
    with pytest.raises(TypeError, match="has a conversion damping already"):
        other = copy.copy(known_as("tied_head").build)
        other.__name__, other.__module__ = "damping", "elsewhere"
        conversion(other)
