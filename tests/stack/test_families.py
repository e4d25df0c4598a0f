"""Every guarantee of a stack, on every family it has a meaning for."""

from __future__ import annotations

from pathlib import Path

import pytest

from families import FAMILIES
from guarantees import GUARANTEES
from overhaul.stack import LayerStack

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
