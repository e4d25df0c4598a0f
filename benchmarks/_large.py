"""A large random Llama checkpoint in bfloat16, written shard by shard so that making it takes the memory of one tensor.

`make_llama` writes what `LlamaForCausalLM.from_pretrained` loads: the real config, the real tensor names, several shards and
their index. Making 1.1 billion parameters takes seconds, not the minute that drawing normal numbers would take: random bits
are used as they are, with the exponent held where trained weights lie.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from overhaul.weights.output import create

WIDTH_STEP = 64
"""Widths are multiples of it: the size of one attention head."""
_SIGN_AND_FRACTION, _LEAST = np.uint16(0x80FF), np.uint16(0x3C00)
"""Bits that are drawn, and those that are set: +-2**-7 to +-2**-5 in bfloat16, about what trained weights measure."""
_ONE = 0x3F80


def llama_config(parameters: int) -> LlamaConfig:
    """A Llama of 22 blocks and 32,000 tokens whose width gives about so many parameters (1.1e9: TinyLlama's 2048)."""
    fixed, square = 2 * 32_000, 22 * (2 + 0.25 + 3 * 2.75)
    width = (math.sqrt(fixed**2 + 4 * square * parameters) - fixed) / (2 * square)
    heads = max(1, round(width / WIDTH_STEP))
    return LlamaConfig(
        vocab_size=32_000, hidden_size=heads * WIDTH_STEP, intermediate_size=heads * WIDTH_STEP * 11 // 4,
        num_hidden_layers=22, num_attention_heads=heads, num_key_value_heads=math.gcd(heads, 4),
        max_position_embeddings=2048, tie_word_embeddings=False, architectures=["LlamaForCausalLM"], dtype="bfloat16",
    )  # fmt: skip


def make_llama(folder: str | Path, parameters: int, shards: int, seed: int) -> Path:
    """Write a random checkpoint.

    Args:
        folder: is created; must not hold a checkpoint yet.
        parameters: about how many; at least 5 million, below which the vocabulary alone is larger.
        shards: number of files of about equal size, few enough that each gets a tensor.
        seed: of the weights; norms are ones in every checkpoint.

    Returns:
        The folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True)
    config = llama_config(parameters)
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    total = 2 * sum(math.prod(shape) for shape in shapes.values())
    split: list[dict[str, tuple[int, ...]]] = [{} for _ in range(shards)]
    before = 0
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        split[(2 * before + size) * shards // (2 * total)][name] = shape
        before += size
    if not all(split):
        raise ValueError(f"{shards} shards are too many for {parameters} parameters: one would hold no tensor")
    draw = np.random.default_rng(seed)
    where: dict[str, str] = {}
    for number, tensors in enumerate(split, 1):
        file = "model.safetensors" if shards == 1 else f"model-{number:05}-of-{shards:05}.safetensors"
        _write(folder / file, tensors, draw)
        where |= dict.fromkeys(tensors, file)
    if shards > 1:
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return folder


def _write(path: Path, tensors: dict[str, tuple[int, ...]], draw: np.random.Generator) -> None:
    """One shard: its header, then the tensors in the header's order."""
    starts = create(path, {name: (torch.bfloat16, shape) for name, shape in tensors.items()}, {"format": "pt"})
    with path.open("r+b") as file:
        file.seek(min(starts.values()))
        for shape in tensors.values():
            file.write(_bits(shape, draw).data)


def _bits(shape: tuple[int, ...], draw: np.random.Generator) -> np.ndarray:
    """The bfloat16 bits of one tensor, as 16-bit integers: ones for a norm, random for a matrix."""
    count = math.prod(shape)
    if len(shape) == 1:
        return np.full(count, _ONE, np.uint16)
    words = draw.integers(0, 2**64, (count + 3) // 4, dtype=np.uint64)
    bits = words.view(np.uint16)[:count]
    bits &= _SIGN_AND_FRACTION
    bits |= _LEAST
    return bits
