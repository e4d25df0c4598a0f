"""The stream of a state that is run by hand: the right part of it, as rows, and put back in its own form."""

from __future__ import annotations

import pytest
import torch

import families
from conftest import hidden_states
from overhaul.stack import LayerStack
from overhaul.stack.calls import Calls
from overhaul.trace.flow import states, stream, with_stream
from tracing import batch, llama


def test_states_are_what_enters_and_leaves_the_blocks() -> None:
    stack, inputs = llama(), batch()
    seen = hidden_states(stack, inputs)
    expected = [seen[0][0], *(left for _, left in seen)]
    calls = Calls.record(stack, inputs)
    found = [stream(calls, state) for state in states(calls)]
    assert len(found) == 5
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", ["Llama", "T5, decoder", "ViT", "SD3", "ResNet"])
@torch.no_grad()
def test_another_stream_takes_the_place_of_the_first_and_of_nothing_else(name: str) -> None:
    family = families.FAMILIES[name]
    calls = Calls.record(LayerStack.at(family.build(), family.stack), family.inputs())
    rows = stream(calls, calls.entering)
    assert rows.ndim == 3
    changed = with_stream(calls, calls.entering, rows.double() + 1)
    assert torch.allclose(stream(calls, changed), rows + 1)
    moved = [
        n
        for n, (a, b) in enumerate(zip(calls.entering, changed, strict=True))
        if a is not None and b is not None and not torch.equal(a, b)
    ]
    assert len(moved) == 1
    assert [None if one is None else (one.shape, one.dtype) for one in changed] == [
        None if one is None else (one.shape, one.dtype) for one in calls.entering
    ]
