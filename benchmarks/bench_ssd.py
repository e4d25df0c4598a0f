"""SSD importance: batches against a plain autograd loop (no slower), samples by vmap against a loop (at least 8 times)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from _timing import alternate, median_ratio, rounds, show
from torch import Tensor, nn

from overhaul.data import corpora
from overhaul.data.encode import encode_images
from overhaul.data.examples import Examples
from overhaul.importance import batch_importance, sample_importance
from overhaul.starters.builds import new_vit

SAMPLES = 512


def by_backward(model: nn.Module, images: Examples, size: int) -> dict[str, Tensor]:
    """Importance as it is usually written: one backward a batch, squared gradients added up."""
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    batches = list(images.batches(size))
    for batch in batches:
        model.zero_grad()
        F.cross_entropy(model(pixel_values=batch["pixel_values"]).logits, batch["labels"]).backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                total[name] += parameter.grad.detach() ** 2 / len(batches)
    model.zero_grad()
    return total


def main() -> None:
    times = rounds(9)
    torch.manual_seed(0)
    model = new_vit().eval()
    images = encode_images(corpora.digits("train"))[:SAMPLES]
    seconds = alternate(
        {
            "importance of batches of 64": lambda: batch_importance(model, images, 64, "loss", ""),
            "autograd loop over batches of 64": lambda: by_backward(model, images, 64),
        },
        times,
    )
    ratio = median_ratio(*(seconds[name] for name in reversed(seconds)))
    show(f"importance of {SAMPLES} digits, ViT of 4 blocks", seconds, SAMPLES, "sample", [
        (f"{ratio:.2f} times as fast as the loop (target: at least 0.97, no slower but for noise)", ratio >= 0.97),
    ])  # fmt: skip
    seconds = alternate(
        {
            "vmap over samples": lambda: sample_importance(model, images, "loss", ""),
            "autograd loop over samples": lambda: by_backward(model, images, 1),
        },
        max(2, times // 3),
    )
    ratio = median_ratio(*(seconds[name] for name in reversed(seconds)))
    show(f"per-sample importance of {SAMPLES} digits, ViT of 4 blocks", seconds, SAMPLES, "sample", [
        (f"{ratio:.2f} times as fast as the loop (target: at least 8)", ratio >= 8.0),
    ])  # fmt: skip


if __name__ == "__main__":
    main()
