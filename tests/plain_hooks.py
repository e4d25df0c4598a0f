"""What the tests of depth use share: models that say something, texts, and skips by plain hooks in whole forwards."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from conftest import tiny_gemma3, tiny_gpt2, tiny_llama, tiny_qwen3, tiny_tokenizer
from overhaul.data.encode import answered
from overhaul.data.examples import Examples

LANGUAGE: dict[str, Callable[..., nn.Module]] = {
    "llama": tiny_llama,
    "gpt2": tiny_gpt2,
    "qwen3": tiny_qwen3,
    "gemma3": tiny_gemma3,
}


def awake(model: Any) -> Any:
    """With weights so large that every block says something."""
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.copy_(torch.randn(weight.shape, generator=draw) * 0.15)
    return model


def texts(*lengths: int, prompt: int = 0) -> Examples:
    """Random tokens that all carry loss but for a prompt; the levels are easy and hard by turns."""
    draw = torch.Generator().manual_seed(1)
    items = []
    for length in lengths:
        ids = torch.randint(4, 60, (length,), generator=draw).tolist()
        items.append(answered(ids[:prompt], ids[prompt:], None))
    rows = [{"level": ("easy", "hard")[n % 2]} for n in range(len(lengths))]
    return Examples(items, rows, tiny_tokenizer())


def parts(model: Any) -> tuple[Any, str, str]:
    """Blocks, and the names of what adds to the stream in them, as the released code names them."""
    if hasattr(model, "transformer"):
        return model.transformer.h, "attn", "mlp"
    sandwich = hasattr(model.model.layers[0], "pre_feedforward_layernorm")
    names = ("post_attention_layernorm", "post_feedforward_layernorm") if sandwich else ("self_attn", "mlp")
    return model.model.layers, names[0], names[1]


def first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


@torch.no_grad()
def plainly(model: Any, ids: Tensor, place: int, part: str, end: int | None) -> tuple[list[Tensor], Tensor]:
    """What every block adds, and the probabilities, in a whole forward in which positions 1 to `end` lose a part."""
    blocks, attention, mlp = parts(model)
    added: list[Tensor] = []

    def merged(changed: Tensor, own: Tensor) -> Tensor:
        own = own.clone()
        own[:, 1:end] = changed[:, 1:end]
        return own

    def zeroed(_: Any, args: Any, output: Any) -> Any:
        left = merged(torch.zeros_like(first(output)), first(output))
        return (left, *output[1:]) if isinstance(output, tuple) else left

    def skipped(_: Any, args: Any, kwargs: Any, output: Any) -> Any:
        left = merged(args[0] if args else kwargs["hidden_states"], first(output))
        return (left, *output[1:]) if isinstance(output, tuple) else left

    def note(_: Any, args: Any, kwargs: Any, output: Any) -> None:
        added.append(first(output) - (args[0] if args else kwargs["hidden_states"]))

    with ExitStack() as undo:
        if part == "block":
            undo.callback(blocks[place].register_forward_hook(skipped, with_kwargs=True).remove)
        elif part:
            module = getattr(blocks[place], attention if part == "attention" else mlp)
            undo.callback(module.register_forward_hook(zeroed).remove)
        for block in blocks:
            undo.callback(block.register_forward_hook(note, with_kwargs=True).remove)
        logits = model(input_ids=ids[None], use_cache=False).logits
    return added, logits.softmax(-1)
