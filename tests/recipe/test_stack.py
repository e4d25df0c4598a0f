"""`stack: PATH` in a recipe: the blocks that its steps mean."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from families import FAMILIES
from overhaul import models
from overhaul.errors import RequestError
from overhaul.recipe import check, runner, spec
from overhaul.stack import LayerStack


def recipe(tmp_path: Path, **more: Any) -> dict[str, Any]:
    folder = tmp_path / "t5"
    if not folder.exists():
        models.save(FAMILIES["T5, decoder"].build(), None, folder)
    return {"model": str(folder), "steps": [{"shrink.drop_layers": {"drop": [2]}}], **more}


def test_the_named_stack_is_shortened_and_the_other_is_not(tmp_path: Path) -> None:
    runner.start(spec.read(recipe(tmp_path, stack="encoder.block")), tmp_path / "out")
    lengths = {s.path: len(s) for s in LayerStack.find(models.open_model(tmp_path / "out" / "model")[0])}
    assert lengths == {"encoder.block": 2, "decoder.block": 4}


def test_a_stack_that_the_model_lacks_is_refused_before_work(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"no list of modules at 'encoder.blocks'.*Did you mean 'encoder.block'"):
        check.check(spec.read(recipe(tmp_path, stack="encoder.blocks")))


def test_two_stacks_and_no_word_which_is_refused_with_what_to_write(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"no single main one.*or in a recipe `stack: encoder.block`"):
        runner.start(spec.read(recipe(tmp_path)), tmp_path / "out")
