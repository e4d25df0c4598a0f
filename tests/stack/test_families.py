"""Every guarantee of a stack, on every family it has a meaning for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from families import FAMILIES
from guarantees import GUARANTEES, a_shorter_model_is_plain, output
from more_families import MORE
from overhaul import session
from overhaul.errors import RequestError
from overhaul.stack import LayerStack
from overhaul.stack.calls import Calls

CELLS = [(f, g) for f, family in FAMILIES.items() for g, guarantee in GUARANTEES.items() if guarantee.applies(family)]


@pytest.mark.parametrize(("family", "guarantee"), CELLS)
def test_guarantee(family: str, guarantee: str, tmp_path: Path) -> None:
    GUARANTEES[guarantee].check(FAMILIES[family], tmp_path)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_stack_is_found_with_its_blocks_and_those_that_cannot_move(name: str) -> None:
    family = FAMILIES[name]
    found = {stack.path: stack for stack in LayerStack.find(family.build())}
    stack = found[family.stack]
    assert len(stack) == family.blocks
    assert [i for i in range(len(stack)) if i not in stack.droppable] == list(family.pinned)


@pytest.mark.parametrize("name", MORE)
def test_a_shorter_model_of_more_families_is_plain(name: str, tmp_path: Path) -> None:
    a_shorter_model_is_plain(MORE[name], tmp_path)


@pytest.mark.parametrize("name", {**FAMILIES, **MORE})
def test_the_main_stack_is_the_only_one_or_that_of_language_or_is_named(name: str) -> None:
    family = {**FAMILIES, **MORE}[name]
    model = family.build()
    if family.alone:
        assert LayerStack.of(model).path == family.stack
    else:
        with pytest.raises(RequestError, match="no single main one"):
            LayerStack.of(model)
        with session.using(stack=family.stack):
            assert LayerStack.of(model).path == family.stack


@pytest.mark.parametrize("name", ["Granite-MoE-Hybrid", "Llava", "Qwen3-VL"])
def test_blocks_run_without_a_cache_where_the_forward_does_not_name_it(name: str) -> None:
    model, inputs = MORE[name].build(), MORE[name].inputs()
    calls = Calls.record(LayerStack.of(model), inputs)
    state = calls.entering
    for place in range(len(calls.stack)):
        state = calls.run(place, state)
    assert torch.equal(calls.finish(state).logits, output(model, inputs))
