"""Causal-tracing grids: `trace.patch_grid` against one forward a patch, and all patches of one model into another.

A grid of every block by the last 14 positions of a prompt, at least four times as fast as `trace.intervene` with one forward
for each patch, and the same numbers, which is checked first. The prompt is what the paper asks: four answered examples and a
statement, 64 tokens in all.
"""

from __future__ import annotations

import torch
from _timing import alternate, median_ratio, rounds, show
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from overhaul.data.examples import IGNORED, collate
from overhaul.models import open_model
from overhaul.objectives import evaluate
from overhaul.stack import LayerStack
from overhaul.trace import Patch, Replace, Where, intervene, patch_grid, states_of

TOKENS, PATCHED = 64, 14


def llama(width: int, blocks: int, vocabulary: int) -> nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary, hidden_size=width, intermediate_size=width * 11 // 4, num_hidden_layers=blocks,
            num_attention_heads=width // 32, num_key_value_heads=width // 64, tie_word_embeddings=False,
            pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )
    ).eval()  # fmt: skip


def prompts(pairs: int, seed: int, vocabulary: int, like: Tensor | None = None) -> dict[str, Tensor]:
    """Prompts with one token to predict; those of a pair differ in the statement's subject, and nowhere before it."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, vocabulary, (pairs, TOKENS + 1), generator=draw)
    if like is not None:
        subject = slice(TOKENS - PATCHED, TOKENS - PATCHED + 3)
        own, ids = ids, like.clone()
        ids[:, subject] = own[:, subject]
    labels = torch.full_like(ids, IGNORED)
    labels[:, -1] = ids[:, -1]
    return collate([{"input_ids": a, "labels": b} for a, b in zip(ids, labels, strict=True)])


def mask(pairs: int, position: int) -> Tensor:
    chosen = torch.zeros(pairs, TOKENS + 1, dtype=torch.bool)
    chosen[:, position] = True
    return chosen


def one_by_one(stack: LayerStack, batch: dict[str, Tensor], patches: list[Patch]) -> list[Tensor]:
    found: list[Tensor] = []
    for patch in patches:
        value = patch.value[:, None].expand(-1, TOKENS + 1, -1)
        with intervene(stack, {f"leaving.{patch.place}": Replace(value, Where(patch.positions))}):
            found += evaluate(stack.model, lambda logits, _: logits[:, -2].clone(), [batch])
    return found


def compare(title: str, stack: LayerStack, vocabulary: int, pairs: int, times: int, target: float | None) -> None:
    true = prompts(pairs, 0, vocabulary)
    false = prompts(pairs, 1, vocabulary, true["input_ids"])
    clean = states_of(stack, true)
    patches = [
        Patch(place, chosen, clean.states[place][chosen])
        for place in range(len(stack))
        for chosen in (mask(pairs, position) for position in range(TOKENS - PATCHED, TOKENS))
    ]
    ours = patch_grid(stack, false, patches, lambda logits: logits.clone())
    apart = max(float((a - b).abs().max()) for a, b in zip(ours, one_by_one(stack, false, patches), strict=True))
    scale = float(torch.stack(ours).std())
    seconds = alternate(
        {
            "patch_grid": lambda: patch_grid(stack, false, patches, lambda logits: logits.clone()),
            "one patch a forward": lambda: one_by_one(stack, false, patches),
        },
        times,
    )
    faster = median_ratio(seconds["one patch a forward"], seconds["patch_grid"])
    wanted = "no target" if target is None else f"target: at least {target:g}"
    show(f"{len(patches)} patches, {title}", seconds, len(patches), "patch", [
        (f"{faster:.2f} times as fast ({wanted})", None if target is None else faster >= target),
        (f"{apart / scale:.1e} standard deviations between the logits at most (target: 1e-4)", apart <= 1e-4 * scale),
    ])  # fmt: skip


def main() -> None:
    times = rounds(3, 1)
    model, _ = open_model("starter:docs-llama")
    stack = LayerStack.of(model)
    compare("starter:docs-llama, a pair of 64 tokens", stack, 2048, 1, times, 4)
    compare("starter:docs-llama, 8 pairs together", stack, 2048, 8, times, 4)
    stack = LayerStack.of(llama(256, 12, 16_384))
    compare("Llama of 12 blocks, width 256, a pair of 64 tokens", stack, 16_384, 1, times, 4)
    compare("Llama of 12 blocks, width 256, 8 pairs together", stack, 16_384, 8, times, 4)


if __name__ == "__main__":
    main()
