"""The shipped starters are as good as their cards say."""

from __future__ import annotations

import pytest

from overhaul import cli, models
from overhaul.data.starters import QUALITY
from overhaul.errors import RequestError
from overhaul.recipe.check import check
from overhaul.recipe.spec import read


def holds(value: float, bar: str) -> bool:
    sign, _, number = bar.partition(" ")
    limit = float(number.split()[0])
    return value >= limit if sign == ">=" else value <= limit


@pytest.mark.parametrize("name", ["docs-llama", "digits-vit", "digits-resnet"])
def test_a_starter_is_as_good_as_it_is_held_to(name: str) -> None:
    folder = models.starters()[name]
    measured = QUALITY[name](folder)
    held = {what: (value, bar) for what, (value, bar) in measured.items() if bar[:2] in (">=", "<=")}
    assert held
    for what, (value, bar) in held.items():
        assert holds(value, bar), f"{name}: {what} is {value:.4f}, held to {bar}"
    card = (folder / "README.md").read_text()
    assert all(what in card for what in measured)
    size = sum(path.stat().st_size for path in folder.iterdir())
    assert size <= 8e6


def test_the_demo_recipe_is_in_order() -> None:
    checked = check(read(cli.recipe_path("forget-and-shrink")))
    assert [step.name for step in checked.steps] == ["forget.npo", "shrink.drop_layers", "shrink.heal"]


def test_an_unknown_starter_is_answered_with_the_nearest() -> None:
    with pytest.raises(RequestError, match="Did you mean 'docs-llama'"):
        models.locate("starter:docs-lama")
