"""Models that do not belong together: every merge says so in a sentence, in a plan too, and writes nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import tiny_gpt2, tiny_llama, tiny_tokenizer
from contract import some_facts
from overhaul import models, session
from overhaul.errors import RequestError
from overhaul.method import methods
from overhaul.recipe.check import check
from overhaul.recipe.plan import plan
from overhaul.recipe.spec import read

MERGES = sorted(
    name
    for name, known in methods().items()
    if known.verb == "merge" and known.subject and known.subject.name == "base"
)
KNOBS: dict[str, dict[str, Any]] = {
    "merge.lines": {"alpha": 0.5},
    "merge.stack": {"slices": [{"model": 0, "blocks": "0-3"}, {"model": 1, "blocks": "0-1"}]},
    "merge.consensus": {"agree": 1},
}
WIDTHS = r"intermediate_size is 48 in .*base and 40 in .*other\."
STRANGERS: dict[str, tuple[Callable[[], Any], str]] = {
    "another architecture": (tiny_gpt2, r"base is a LlamaForCausalLM, .*other a GPT2LMHeadModel"),
    "another depth": (
        lambda: tiny_llama(num_hidden_layers=3),
        r"do not have the same tensors.* num_hidden_layers is 4 in .*base and 3 in .*other\.",
    ),
    "another vocabulary": (lambda: tiny_llama(vocab_size=70), r"have vocabularies of 64 and 70 tokens"),
    "another width": (lambda: tiny_llama(intermediate_size=40), WIDTHS),
}
FITS_A_STACK = ("another depth", "another vocabulary")


@pytest.mark.parametrize("stranger", STRANGERS)
@pytest.mark.parametrize("name", MERGES)
def test_it_is_refused_before_work(name: str, stranger: str, tmp_path: Path) -> None:
    if name == "merge.stack" and stranger in FITS_A_STACK:
        return  # blocks alone are taken
    make, match = STRANGERS[stranger]
    base, other = models.save(tiny_llama(), None, tmp_path / "base"), models.save(make(), None, tmp_path / "other")
    before = sorted(tmp_path.iterdir())
    known = methods()[name]
    others = next(material for material in known.materials if material.is_model and material is not known.subject)
    given: dict[str, Any] = {others.name: [other] if others.many else other}
    if name == "merge.soup":
        given |= {"held_out": some_facts(0, 4), "kind": "greedy"}
    with session.using(planning=True), pytest.raises(RequestError, match=match):
        known.call(base=base, **given, **KNOBS.get(name, {}), out=tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


def test_a_plan_says_it_with_the_step(tmp_path: Path) -> None:
    base = models.save(tiny_llama(), tiny_tokenizer(), tmp_path / "base")
    other = models.save(tiny_llama(num_hidden_layers=3), tiny_tokenizer(), tmp_path / "other")
    recipe = {
        "model": str(base),
        "materials": {"tuned": [{"model": str(other)}]},
        "steps": [{"merge.dare": {"density": 0.5}}],
    }
    with pytest.raises(RequestError, match=r"Step 1, merge.dare: .*do not have the same tensors"):
        plan(check(read(recipe)))
