"""Restoring blocks: what is scored, what is chosen, and what is written."""

from __future__ import annotations

import itertools
import math
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import tiny_llama, tiny_tokenizer
from contract import Case, as_recipe
from overhaul import models
from overhaul.data import tasks
from overhaul.data.encode import encode_qa
from overhaul.data.examples import Examples
from overhaul.errors import MaterialWarning, RequestError, RunError
from overhaul.merge.restore_layers import _requests, restore_layers, score
from overhaul.models import Checkpoint
from overhaul.recipe.check import check
from overhaul.recipe.plan import plan
from overhaul.recipe.spec import read
from overhaul.rollouts import prompt_of
from tiny_checkpoints import make, same_bits

WORDS = sorted(word for word in tiny_tokenizer().get_vocab() if word.isalpha())


def requests(count: int = 8) -> Examples:
    """Questions of one word whose right answers are words that are one token."""
    rows = [
        {"question": f"{WORDS[n]} {WORDS[n + 1]}", "answer": WORDS[n + 2], "valid": WORDS[n + 2 : n + 5]}
        for n in range(count)
    ]
    return encode_qa(rows, tiny_tokenizer(), prompt="{question}")


def pair(folder: Path) -> tuple[nn.Module, Checkpoint]:
    """A base, and a model that is sure of its answers, some of them wrong: its words lie far apart."""
    base = models.facts(make("llama", folder / "base", 1))
    model = models.facts(make("llama", folder / "post", 0)).open()
    with torch.no_grad():
        model.get_parameter("model.embed_tokens.weight").mul_(20)
    return model, base


def _case(folder: Path) -> dict[str, Any]:
    model, base = pair(folder)
    return {"model": model, "base": base, "prompts": requests()}


CASE = Case(
    method=restore_layers,
    materials=_case,
    knobs={"floor": 0.0, "held_out": 0.25},
    varied={"layers": (None, "1-2"), "floor": (0.0, 0.99), "held_out": (0.25, 0.5), "soups": (0, 3)},
    idle={"batch_size": "it does not change the values"},
    apart={"peak": "the battery widens the model and leaves the base as it is"},
    moves=r".*layers\.\d+\..*",
)


def test_validity_is_mass_and_diversity_is_entropy_within_it() -> None:
    answers = [[torch.tensor([0]), torch.tensor([1]), torch.tensor([2, 3])]]
    uniform = torch.tensor([[0.2, 0.2, 0.15, 0.05, 0.4]])
    assert score(uniform, answers).validity == pytest.approx(0.6)
    assert score(uniform, answers).diversity == pytest.approx(1.0)  # two spellings of one answer are one answer
    certain = torch.tensor([[0.5, 0.0, 0.0, 0.0, 0.5]])
    assert (score(certain, answers).validity, score(certain, answers).diversity) == pytest.approx((0.5, 0.0))
    outside = torch.tensor([[0.1, 0.1, 0.05, 0.05, 0.7]])
    assert score(outside, answers).diversity == pytest.approx(1.0) and score(outside, answers).validity < 0.4
    with pytest.raises(RunError, match="not finite"):
        score(torch.tensor([[math.nan] * 5]), answers)


def rebuilt(folder: Path, run: range) -> nn.Module:
    """The hybrid as a model of its own."""
    model, base = pair(folder / f"hybrid {run.start} {run.stop}")
    model.load_state_dict(
        {
            name: value
            for name, value in base.open().state_dict().items()
            if any(f"layers.{place}." in name for place in run)
        },
        strict=False,
    )
    return model


@torch.no_grad()
def chances(model: nn.Module, prompts: Examples) -> Tensor:
    return torch.cat([model(input_ids=prompt_of(item)[None]).logits[:, -1].softmax(-1) for item in prompts.items])


def test_the_search_is_that_of_every_hybrid_rebuilt_and_the_best_is_written(tmp_path: Path) -> None:
    model, base = pair(tmp_path)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    done = restore_layers(model, base, requests(), floor=0.0, soups=0, batch_size=3)
    points: dict[str, tuple[float, float]] = {
        str(name): (float(str(x)), float(str(y))) for name, x, y in done.tables["validity and diversity"].rows
    }
    assert len(points) == 1 + 10
    torch.manual_seed(0)
    prompts = requests()
    words = tiny_tokenizer().get_vocab()
    answers = {row["question"]: [torch.tensor([words[word]]) for word in row["valid"]] for row in prompts.rows}
    best = max(points, key=lambda name: points[name][1])
    for first, last in itertools.combinations_with_replacement(range(4), 2):
        hybrid = rebuilt(tmp_path, range(first, last + 1))
        found = [
            score(chances(hybrid, part), [answers[row["question"]] for row in part.rows]).validity
            for part in (prompts[n : n + 1] for n in range(len(prompts)))
        ]
        assert min(found) <= points[f"blocks {first}-{last}"][0] <= max(found)
    assert best == f"blocks {done.facts['first_block']}-{done.facts['last_block']}"
    run = range(int(str(done.facts["first_block"])), int(str(done.facts["last_block"])) + 1)
    theirs = base.open().state_dict()
    for name, value in model.state_dict().items():
        restored = any(f"layers.{place}." in name for place in run)
        assert torch.equal(value, theirs[name] if restored else before[name]), name


def test_named_layers_are_restored_and_all_of_them_leave_the_ends(tmp_path: Path) -> None:
    model, base = pair(tmp_path)
    done = restore_layers(model, base, requests(), layers="all", soups=0)
    assert (done.facts["first_block"], done.facts["last_block"]) == (0, 3)
    hybrid = rebuilt(tmp_path, range(4))
    assert same_bits(dict(model.state_dict()), dict(hybrid.state_dict()))


def test_a_base_that_is_the_model_changes_nothing_and_says_so(tmp_path: Path) -> None:
    base = models.facts(make("llama", tmp_path / "post", 0))
    with pytest.raises(RunError, match="no run of blocks is more varied"):
        restore_layers(base.open(), base, requests(), soups=0)


def test_what_cannot_be_searched_is_refused(tmp_path: Path) -> None:
    model, base = pair(tmp_path)
    with pytest.raises(RequestError, match="or their tensors differ"):
        restore_layers(tiny_llama(num_hidden_layers=3), base, requests())
    with pytest.raises(RequestError, match="fewer than two right answers"):
        restore_layers(model, base, encode_qa([{"question": "a", "answer": "b"}] * 8, tiny_tokenizer()))
    several = [{"question": WORDS[0], "answer": WORDS[1], "valid": [WORDS[1], f"{WORDS[2]} {WORDS[3]}"]}] * 8
    with pytest.raises(RequestError, match="is no single token"):
        restore_layers(model, base, encode_qa(several, tiny_tokenizer(), prompt="{question}"))
    with pytest.raises(RequestError, match="too few to hold some out"):
        restore_layers(model, base, requests(1))


def test_every_character_of_the_starter_is_one_token_of_a_real_vocabulary() -> None:
    tokenizer = models.load_processor(models.facts("starter:docs-llama"))
    found = _requests(encode_qa(tasks.characters(), tokenizer))
    assert [len(spelt) for spelt in found.answers] == [len(row["valid"]) for row in found.examples.rows]
    digit = next(n for n, row in enumerate(found.examples.rows) if row["allowed"] == "13579")
    assert {tokenizer.decode(tokens).strip() for tokens in found.answers[digit]} == {"1", "3", "5", "7", "9"}
    space = tokenizer.encode(" a", add_special_tokens=False)
    letters = next(n for n, row in enumerate(found.examples.rows) if row["allowed"] == "abcdef")
    assert len(space) == 1 and space[0] in found.answers[letters][0].tolist()  # " a" and "a" are one answer


def test_a_strange_base_is_said_and_a_soups_copy_is_planned(tmp_path: Path) -> None:
    model, base = pair(tmp_path)
    with pytest.warns(MaterialWarning, match="the model may not have come from the base"):
        done = restore_layers(model, base, requests(), layers="1", soups=0)
    assert done.facts["far_share"] == [1.0] and "may not have come from the base" in done.facts["advice"]
    near = base.open()
    with torch.no_grad():
        for weight in near.parameters():
            weight.mul_(1.01)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        done = restore_layers(near, base, requests(), layers="1", soups=0)
    assert done.facts["relative_change"] == pytest.approx([0.01], rel=1e-3)
    peaks: list[int] = []
    for soups in (0, 3):
        recipe = as_recipe(replace(CASE, knobs={"soups": soups}), Path(tempfile.mkdtemp(dir=tmp_path)))
        (step,) = plan(check(read(recipe)), 1e9)
        peaks.append(step.peak_bytes)
    assert peaks[1] - peaks[0] == 4 * base.parameters
