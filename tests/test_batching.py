from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from along_paths import Net, alone, close, positions, read, restorations
from conftest import tiny_gemma3
from overhaul.prefix import run_paths
from overhaul.stack import LayerStack


def test_a_block_that_mixes_samples_runs_on_one_state_at_a_time() -> None:
    stack = LayerStack.of(Net(lambda x, extra: x - x.mean(dim=0) + extra))
    inputs = {"x": torch.randn(3, 5, 4), "extra": torch.zeros(1)}
    paths = restorations(stack)
    rows = positions(stack)
    found = run_paths(stack, paths, inputs, read=read)
    assert max(rows) > 3  # it was tried
    for path, output in zip(paths, found, strict=True):
        close(output, alone(stack, path, inputs))


@pytest.mark.parametrize(
    ("layout", "batched"),
    [
        (lambda extra: extra.view(-1, 2).sum(dim=1)[:, None, None], True),  # two values for each sample, side by side
        (lambda extra: extra.view(2, -1).sum(dim=0)[:, None, None], False),  # first values, then second values
    ],
)
def test_how_arguments_belong_to_samples_is_tried_again_when_they_begin_to_differ(layout: Any, batched: bool) -> None:
    stack = LayerStack.of(Net(lambda x, extra: x * layout(extra)))
    paths = restorations(stack)
    rows = positions(stack)
    # samples that are alike hide a wrong layout
    batches = [{"x": torch.randn(3, 5, 4), "extra": extra} for extra in (torch.ones(6), torch.randn(6), torch.randn(6))]

    def feed() -> Iterator[dict[str, Tensor]]:
        for batch in batches:
            rows.clear()
            yield batch

    found = run_paths(stack, paths, feed(), read=read)
    assert (max(rows) > 3) == batched
    for path, outputs in zip(paths, found, strict=True):
        for batch, output in zip(batches, outputs, strict=True):
            close(output, alone(stack, path, batch))


def test_a_table_that_is_as_long_as_the_batch_is_not_taken_for_an_argument_of_samples() -> None:
    stack = LayerStack.of(Net(lambda x, extra: x * extra))
    inputs = {"x": torch.randn(3, 3, 4), "extra": torch.randn(3, 4)}
    paths = restorations(stack)
    for path, output in zip(paths, run_paths(stack, paths, inputs, read=read), strict=True):
        close(output, alone(stack, path, inputs))


def test_samples_with_padding_of_their_own_keep_their_masks() -> None:
    stack = LayerStack.of(tiny_gemma3())
    mask = torch.tensor([[1] * 9, [1] * 6 + [0] * 3, [1] * 4 + [0] * 5])
    inputs = {"input_ids": torch.randint(3, 64, (3, 9)), "attention_mask": mask}
    paths = restorations(stack)
    rows = positions(stack)
    found = run_paths(stack, paths, inputs, read=read)
    assert max(rows) > 3
    for path, output in zip(paths, found, strict=True):
        close(output, alone(stack, path, inputs))
