"""Quantised checkpoints: opened as plain models where transformers can do so on a CPU, refused by plan otherwise."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import overhaul as oh
from conftest import tiny_llama
from overhaul import models, quantised
from overhaul.errors import RequestError


def said_to_be(place: Path, **quantisation: Any) -> Path:
    path = place / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": quantisation}))
    return place


@pytest.mark.parametrize(
    "quantisation",
    [
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "awq", "bits": 4},
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {"load_in_8bit": True},
        {"quant_method": "compressed-tensors", "format": "pack-quantized"},
        {"quant_method": "quanto"},
        {"quant_method": "made-up"},
        {"quant_method": 7},
    ],
)
def test_what_cannot_become_plain_weights_here_is_refused_before_it_is_read(
    quantisation: dict[str, Any], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantised, "find_spec", lambda _: None)  # what one of them needs is not installed
    place = said_to_be(Path(shutil.copytree(folder, tmp_path / "m")), **quantisation)
    for what in (lambda: models.check_shapes(models.facts(place)), lambda: oh.open(place)):
        with pytest.raises(RequestError, match=r"is quantised .*plain"):
            what()


def test_fp8_weights_become_plain_ones_and_are_saved_as_such(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model: Any = tiny_llama(hidden_size=128, intermediate_size=128, num_attention_heads=4)
    place = models.save(model, None, tmp_path / "m", dtype="bfloat16")
    held, size = load_file(place / "model.safetensors"), [128, 128]
    expected = dict(held)
    for name in [name for name in held if "_proj" in name]:
        blocks = held[name].float().unflatten(0, (-1, min(128, held[name].shape[0])))
        scale = blocks.abs().amax(dim=(1, 2)) / 448
        held[name] = (blocks / scale[:, None, None]).flatten(0, 1).to(torch.float8_e4m3fn)
        held[f"{name}_scale_inv"] = scale[:, None]
        expected[name] = (held[name].float().unflatten(0, (len(scale), -1)) * scale[:, None, None]).flatten(0, 1)
    save_file(held, place / "model.safetensors", {"format": "pt"})
    said_to_be(place, quant_method="fp8", weight_block_size=size, activation_scheme="dynamic")
    known = models.facts(place)
    assert known.dtype == "bfloat16"
    models.check_shapes(known)
    opened, _ = oh.open(place)
    for name, tensor in expected.items():
        torch.testing.assert_close(opened.state_dict()[name], tensor.float(), rtol=1e-2, atol=1e-6)
    out = oh.save(opened, None, tmp_path / "out", dtype=known.dtype)
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    ids = torch.arange(9)[None]
    again = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    torch.testing.assert_close(again(ids).logits, opened(ids).logits, rtol=2e-2, atol=2e-2)


def test_mxfp4_experts_become_plain_ones(tmp_path: Path) -> None:
    from transformers import GptOssConfig, GptOssForCausalLM

    sizes: dict[str, Any] = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32, "num_local_experts": 2}
    torch.manual_seed(0)
    model: Any = GptOssForCausalLM(GptOssConfig(**sizes, num_experts_per_tok=1)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    place = models.save(model, None, tmp_path / "m", dtype="bfloat16")
    held = load_file(place / "model.safetensors")
    codes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    expected = {}
    for name in [name for name in held if name.endswith(("gate_up_proj", "down_proj"))]:
        # as the published files lie: [experts, outputs, blocks, 16 bytes of two values], with one power of two a block
        outputs, inputs = held[name].shape[2], held[name].shape[1]
        indices = torch.randint(16, (2, outputs, inputs // 32, 32), generator=torch.Generator().manual_seed(1))
        del held[name]
        held[f"{name}_blocks"] = (indices[..., 0::2] | (indices[..., 1::2] << 4)).to(torch.uint8)
        held[f"{name}_scales"] = torch.full((2, outputs, inputs // 32), 127 - 5, dtype=torch.uint8)
        expected[name] = (codes[indices] * 2.0**-5).flatten(2).transpose(1, 2)
    save_file(held, place / "model.safetensors", {"format": "pt"})
    said_to_be(place, quant_method="mxfp4", modules_to_not_convert=[])
    known = models.facts(place)
    models.check_shapes(known)
    opened, _ = oh.open(place)
    for name, tensor in expected.items():
        torch.testing.assert_close(opened.state_dict()[name], tensor)
    out = oh.save(opened, None, tmp_path / "out", dtype="bfloat16")
    torch.testing.assert_close(oh.open(out)[0].state_dict(), opened.state_dict(), rtol=1e-2, atol=1e-2)
