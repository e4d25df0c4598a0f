"""Looking costs little: per-depth statistics against a plain forward, and a path of equal length against the plain order."""

from __future__ import annotations

import torch
from _timing import alternate, median_ratio, rounds, show
from torch import nn

from overhaul.models import open_model
from overhaul.stack import LayerStack
from overhaul.stack.calls import invoke
from overhaul.trace import capture, statistics, turn, windows

BATCH, TOKENS, VOCABULARY, FORWARDS = 16, 128, 2048, 2


@torch.no_grad()
def run(model: nn.Module, batch: dict[str, torch.Tensor]) -> None:
    for _ in range(FORWARDS):
        invoke(model, batch)


def main() -> None:
    times = rounds(15)
    model, _ = open_model("starter:docs-llama")
    stack = LayerStack.of(model)
    ids = torch.randint(3, VOCABULARY, (BATCH, TOKENS), generator=torch.Generator().manual_seed(0))
    padded = torch.ones_like(ids)
    padded[::2, TOKENS - 16 :] = 0
    whole, part = {"input_ids": ids}, {"input_ids": ids, "attention_mask": padded}
    depths = ["entering", f"leaving.{len(stack) - 1}"]
    order = [0, 2, 1, *range(4, len(stack)), 3]

    def with_statistics(batch: dict[str, torch.Tensor]) -> None:
        with capture(stack, depths, statistics):
            run(model, batch)

    def with_turns() -> None:
        with capture(stack, windows(stack), turn):
            run(model, whole)

    def along_a_path() -> None:
        with stack.following(order):
            run(model, whole)

    seconds = alternate(
        {
            "plain": lambda: run(model, whole),
            "statistics": lambda: with_statistics(whole),
            "cosines": with_turns,
            "path": along_a_path,
            "plain, padded": lambda: run(model, part),
            "statistics, padded": lambda: with_statistics(part),
        },
        times,
    )
    statistic, cosine, path = (
        median_ratio(seconds[name], seconds["plain"]) for name in ("statistics", "cosines", "path")
    )
    with_padding = median_ratio(seconds["statistics, padded"], seconds["plain, padded"])
    show(f"Forward of {BATCH} x {TOKENS} tokens on starter:docs-llama", seconds, FORWARDS, "forward", [
        (f"{statistic:.3f} times a plain forward with statistics at every depth (target: at most 1.15)", statistic <= 1.15),
        (f"{with_padding:.3f} times the same with padded texts (target: at most 1.15)", with_padding <= 1.15),
        (f"{cosine:.3f} times a plain forward with the cosine over each block", None),
        (f"{path:.3f} times a plain forward along a path of equal length (target: at most 1.03)", path <= 1.03),
    ])  # fmt: skip


if __name__ == "__main__":
    main()
