"""Checkpoint folders of tiny random models, and what tests of files look at."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from conftest import FAMILIES
from overhaul import models, weights
from overhaul.errors import RequestError


def tiny_t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes: dict[str, Any] = {"vocab_size": 64, "d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 2, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(num_decoder_layers=3, **sizes))


def tiny_clip() -> nn.Module:
    from transformers import CLIPConfig, CLIPModel

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    text = {**sizes, "num_hidden_layers": 2, "vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2}
    vision = {**sizes, "num_hidden_layers": 3, "image_size": 8, "patch_size": 4}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))


def tiny_mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes: dict[str, Any] = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 3}
    return MixtralForCausalLM(MixtralConfig(**sizes))


def tiny_gemma3_vision() -> nn.Module:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "head_dim": 8}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 3}
    vision |= {"image_size": 16, "patch_size": 4}
    return Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=60)
    )


def tiny_llava() -> nn.Module:
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    text = {**sizes, "model_type": "llama", "num_hidden_layers": 2, "vocab_size": 64, "num_key_value_heads": 2}
    vision = {**sizes, "model_type": "clip_vision_model", "num_hidden_layers": 3, "image_size": 8, "patch_size": 4}
    return LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=vision, image_token_index=60))


def tiny_qwen_vision() -> nn.Module:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text: dict[str, Any] = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1, "bos_token_id": 1, "eos_token_id": 2}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [1, 1, 2]}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "depth": 3, "out_hidden_size": 16}
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=text, vision_config={**vision, "fullatt_block_indexes": [1]})
    )


VISION_LANGUAGE: dict[str, Callable[..., nn.Module]] = {
    "gemma3": tiny_gemma3_vision, "llava": tiny_llava, "qwen": tiny_qwen_vision,
}  # fmt: skip
MORE: dict[str, Callable[..., nn.Module]] = {"t5": tiny_t5, "clip": tiny_clip, "mixtral": tiny_mixtral}
EVERY = {**FAMILIES, **MORE}


def make(family: str, folder: Path, seed: int, dtype: str | None = None) -> Path:
    torch.manual_seed(seed)
    return models.save(EVERY[family](), None, folder, dtype=dtype)


def two_llamas(folder: Path) -> list[Path]:
    """Two tiny Llamas in float32."""
    return [make("llama", folder / f"m{seed}", seed) for seed in (1, 2)]


def tensors(folder: Path) -> dict[str, Tensor]:
    return {k: v for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(path).items()}


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and bits(a[name]) == bits(b[name]) for name in a)


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors of a single-file checkpoint in place."""
    held = load_file(folder / "model.safetensors")
    change(held)
    save_file(held, folder / "model.safetensors", {"format": "pt"})


def sharded(model: Any, folder: Path, size: str) -> Path:
    model.save_pretrained(folder, max_shard_size=size)
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def depth_of(name: str) -> int:
    return int(name.split(".")[2]) if name.startswith("model.layers.") else 4 if "norm" in name else -1


def refused(sources: list[Path], out: Path, match: str, **options: Any) -> None:
    before = left(out.parent)
    with pytest.raises(RequestError, match=match):
        weights.blend(sources, [0.5] * len(sources), out, **options)
    assert left(out.parent) == before, "nothing is written"
