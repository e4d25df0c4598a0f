"""`stack: PATH` in a recipe: the blocks that its steps mean."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from more_families import MORE
from overhaul import models
from overhaul.errors import RequestError
from overhaul.recipe import check, runner, spec
from overhaul.stack import LayerStack


def recipe(tmp_path: Path, **more: Any) -> dict[str, Any]:
    folder = models.save(MORE["Llava"].build(), None, tmp_path / "llava")
    return {"model": str(folder), "steps": [{"shrink.drop_layers": {"drop": [1]}}], **more}


@pytest.mark.smoke
def test_the_named_stack_is_shortened_and_the_other_is_not(tmp_path: Path) -> None:
    runner.start(spec.read(recipe(tmp_path, stack="model.vision_tower.encoder.layers")), tmp_path / "out")
    lengths = {s.path: len(s) for s in LayerStack.find(models.open_model(tmp_path / "out" / "model")[0])}
    assert lengths == {"model.vision_tower.encoder.layers": 2, "model.language_model.layers": 4}


def test_a_stack_that_the_model_lacks_is_refused_before_work(tmp_path: Path) -> None:
    said = r"no list of modules at 'model.vision.encoder.layers'.*Did you mean 'model.vision_tower.encoder.layers'"
    with pytest.raises(RequestError, match=said):
        check.check(spec.read(recipe(tmp_path, stack="model.vision.encoder.layers")))
