"""Checkpoint folders: what is refused before it is opened, and what is saved."""

from __future__ import annotations

import errno
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from conftest import tiny_llama, tiny_resnet
from overhaul import models
from overhaul.errors import RequestError, RunError
from overhaul.weights import relative_change


def test_headers_tell_parameters_and_dtype_without_reading_weights(folder: Path) -> None:
    known = models.facts(folder)
    model = tiny_llama()
    assert known.architecture == "LlamaForCausalLM"
    assert known.parameters == sum(p.numel() for p in model.parameters())
    assert known.dtype == "bfloat16"
    assert known.bytes == (folder / "model.safetensors").stat().st_size


def test_open_gives_model_and_tokenizer_and_save_round_trips(folder: Path, tmp_path: Path) -> None:
    model, tokenizer = models.open_model(folder)
    assert next(model.parameters()).dtype == torch.float32 and not model.training
    saved = models.save(model, tokenizer, tmp_path / "out", dtype="bfloat16")
    assert relative_change(folder, saved).total == 0
    assert next(model.parameters()).dtype == torch.float32, "the held model is not cast"
    assert not list(tmp_path.glob(".*")), "nothing half-written is left"
    with torch.no_grad():
        next(model.parameters()).add_(1.0)
    changed = models.save(model, tokenizer, tmp_path / "changed", dtype="bfloat16")
    assert relative_change(saved, changed).total > 0


def test_a_model_without_a_processor_opens(tmp_path: Path) -> None:
    models.save(tiny_resnet(), None, tmp_path / "resnet")
    model, processor = models.open_model(tmp_path / "resnet")
    assert processor is None and isinstance(model, nn.Module)


def test_saving_never_replaces_a_folder(folder: Path) -> None:
    with pytest.raises(RequestError, match="exists already"):
        models.save(tiny_llama(), None, folder)


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    model = tiny_llama()
    with torch.no_grad():
        next(model.parameters())[0, 0] = float("nan")
    with pytest.raises(RunError, match="not finite"):
        models.save(model, None, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_full_or_read_only_disk_is_said_in_words(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(number, "no")

    monkeypatch.setattr(models, "write_checkpoint", refuse)
    with pytest.raises(RunError, match=r"disk is full|read-only|permission was denied"):
        models.save(tiny_llama(), None, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"no config.json"):
        models.facts(tmp_path)


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(RequestError, match=r"only pickled weights \(pytorch_model.bin\)"):
        models.facts(tmp_path)


def test_a_truncated_file_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    content = (folder / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[:-100])
    with pytest.raises(RequestError, match="cut short"):
        models.facts(tmp_path)


def test_a_damaged_header_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    for noise in (b"{no json", b"\xff\xfe\xfd"):
        (tmp_path / "model.safetensors").write_bytes(len(noise).to_bytes(8, "little") + noise)
        with pytest.raises(RequestError, match="its header is not JSON"):
            models.facts(tmp_path)


def test_missing_tensors_are_not_filled_at_random(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    tensors = load_file(folder / "model.safetensors")
    lost = "model.layers.2.mlp.up_proj.weight"
    save_file({k: v for k, v in tensors.items() if k != lost}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(RequestError, match=f"lack 1 tensors, such as '{lost}'"):
        models.open_model(tmp_path)


def test_a_tokenizer_that_is_too_large_is_refused(folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    models.save(tiny_llama(vocab_size=32), tokenizer, tmp_path / "small")
    with pytest.raises(RequestError, match="60 tokens but the model only 32"):
        models.open_model(tmp_path / "small")


def test_an_unknown_source_names_the_possibilities() -> None:
    with pytest.raises(RequestError, match="does not exist"):
        models.facts("./nowhere")
    with pytest.raises(RequestError, match="no starter model 'docs-lama'"):
        models.facts("starter:docs-lama")


def test_config_and_weights_that_do_not_belong_together_are_refused(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 40}))
    models.check_shapes(models.facts(folder))
    with pytest.raises(RequestError, match=r"has the shape .* but config.json describes"):
        models.check_shapes(models.facts(tmp_path))


def test_a_class_of_ours_is_found_by_the_module_that_its_config_names(folder: Path) -> None:
    known = models.facts(folder)
    ours = replace(known, config={**known.config, "overhaul": "overhaul.models", "architectures": ["Checkpoint"]})
    assert models.class_of(ours) is models.Checkpoint
    theirs = replace(known, config={**known.config, "overhaul": "os.path"})
    assert models.class_of(theirs) is models.class_of(known)
