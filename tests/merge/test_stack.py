"""Stacks of blocks: the tensors of their models, a config that follows, and what the network of blocks computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from conftest import FAMILIES, tiny_tokenizer
from contract import Case
from families import FAMILIES as KNOWN
from merging import base_and_two
from overhaul import models
from overhaul.errors import RequestError
from overhaul.merge.stack import stack
from overhaul.recipe.check import check
from overhaul.recipe.plan import plan
from overhaul.recipe.spec import read
from overhaul.stack import LayerStack
from tiny_checkpoints import VISION_LANGUAGE, make, same_bits, tensors

CASE = Case(
    method=stack,
    materials=lambda folder: {"base": (made := base_and_two(folder))["base"], "others": made["tuned"][:1]},
    knobs={"slices": [{"model": 0, "blocks": "0-2"}, {"model": 1, "blocks": "1-3"}]},
    varied={
        "slices": (
            [{"model": 0, "blocks": "0-2"}, {"model": 1, "blocks": "1-3"}],
            [{"model": 0, "blocks": 0}, {"model": 1, "blocks": 3}],
        )
    },
)


def slices(*runs: tuple[int, str]) -> list[Any]:
    return [{"model": model, "blocks": blocks} for model, blocks in runs]


def ids() -> torch.Tensor:
    return torch.randint(5, 60, (2, 9), generator=torch.Generator().manual_seed(0))


def test_blocks_are_bit_for_bit_and_the_rest_is_the_base(tmp_path: Path) -> None:
    base, other = (make("llama", tmp_path / f"m{seed}", seed) for seed in (1, 2))
    done = stack(base, [other], slices=slices((0, "0-2"), (1, "1-3"), (0, "3")), out=tmp_path / "out")
    b, o, made = map(tensors, (base, other, done.model))
    places = [(b, 0), (b, 1), (b, 2), (o, 1), (o, 2), (o, 3), (b, 3)]
    expected = {name: tensor for name, tensor in b.items() if ".layers." not in name}
    for position, (state, block) in enumerate(places):
        start = f"model.layers.{block}."
        expected |= {
            f"model.layers.{position}.{name.removeprefix(start)}": tensor
            for name, tensor in state.items()
            if name.startswith(start)
        }
    assert same_bits(made, expected)
    assert json.loads((done.model / "config.json").read_text())["num_hidden_layers"] == 7
    assert (done.facts["blocks_before"], done.facts["blocks_after"]) == (4, 7)
    assert done.layers["its place there"] == dict(enumerate([0, 1, 2, 1, 2, 3, 3]))
    assert done.layers["model it came from"] == dict(enumerate([0, 0, 0, 1, 1, 1, 0]))
    lineage = json.loads((done.model / "lineage.json").read_text())
    assert [one["source"] for one in lineage["made_of"]] == [str(base), str(other)]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_one_model_over_itself_is_that_path_through_it(family: str, tmp_path: Path) -> None:
    base = make(family, tmp_path / "m", 0)
    network = models.open_model(base)[0]
    of = LayerStack.of(network)
    if of.lists != (of.path,):
        with pytest.raises(RequestError, match=r"come in stages"):
            stack(base, slices=slices((0, "0-1"), (0, "0-1")), out=tmp_path / "out")
        return
    last = len(of) - 1
    path = [*range(last + 1), *range(1, last + 1)]
    done = stack(base, slices=slices((0, f"0-{last}"), (0, f"1-{last}")), out=tmp_path / "out")
    opened = models.open_model(done.model)[0]
    given = {"input_ids": ids()} if hasattr(network.config, "vocab_size") else {"pixel_values": torch.randn(2, 1, 8, 8)}
    with torch.no_grad(), of.following(path):
        expected = network(**given).logits
    assert torch.allclose(opened(**given).logits, expected, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_it_loads_plainly_and_generates_with_its_cache(family: str, tmp_path: Path) -> None:
    base, other = (make(family, tmp_path / f"m{seed}", seed) for seed in (1, 2))
    last = len(LayerStack.of(models.open_model(base)[0])) - 1
    done = stack(base, [other], slices=slices((1, f"0-{last}"), (0, f"1-{last}")), out=tmp_path / "out")
    loaded: Any = AutoModelForCausalLM.from_pretrained(done.model, output_loading_info=True)
    model, loading = loaded
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    said = [
        model.generate(ids(), max_new_tokens=6, do_sample=False, use_cache=cache, pad_token_id=0, eos_token_id=None)
        for cache in (True, False)
    ]
    assert torch.equal(*said)


def test_lists_that_speak_of_each_block_follow_the_blocks(tmp_path: Path) -> None:
    base = models.save(KNOWN["Qwen3, alternating windows"].build(), None, tmp_path / "m")
    kinds = json.loads((base / "config.json").read_text())["layer_types"]
    done = stack(base, slices=slices((0, "1-2"), (0, "0-3"), (0, "3")), out=tmp_path / "out")
    made = json.loads((done.model / "config.json").read_text())
    assert made["layer_types"] == [kinds[n] for n in (1, 2, 0, 1, 2, 3, 3)] and made["num_hidden_layers"] == 7
    network = models.open_model(base)[0]
    with torch.no_grad(), LayerStack.of(network).following([1, 2, 0, 1, 2, 3, 3]):
        expected = network(input_ids=ids()).logits
    assert torch.allclose(models.open_model(done.model)[0](input_ids=ids()).logits, expected, atol=1e-5)


def test_the_language_blocks_of_a_model_that_sees_are_meant(tmp_path: Path) -> None:
    base = models.save(VISION_LANGUAGE["gemma3"](), None, tmp_path / "m")
    done = stack(base, slices=slices((0, "0-1"), (0, "0-1")), out=tmp_path / "out")
    config = json.loads((done.model / "config.json").read_text())
    assert (config["text_config"]["num_hidden_layers"], config["vision_config"]["num_hidden_layers"]) == (4, 3)
    models.open_model(done.model)


def test_a_model_of_diffusers_keeps_its_files_names(tmp_path: Path) -> None:
    base = models.save(KNOWN["PixArt"].build(), None, tmp_path / "m")
    done = stack(base, slices=slices((0, "0-3"), (0, "2-3")), out=tmp_path / "out")
    assert len(LayerStack.of(models.open_model(done.model)[0])) == 6


def test_models_of_another_depth_and_dtype_are_taken_from(tmp_path: Path) -> None:
    base = make("llama", tmp_path / "base", 1, "bfloat16")
    deep = stack(make("llama", tmp_path / "m", 2), slices=slices((0, "0-3"), (0, "0-3")), out=tmp_path / "deep").model
    done = stack(base, [deep], slices=slices((0, "0-1"), (1, "6-7")), out=tmp_path / "out")
    b, d, made = map(tensors, (base, deep, done.model))
    name = "self_attn.q_proj.weight"
    assert torch.equal(made[f"model.layers.1.{name}"], b[f"model.layers.1.{name}"])
    assert torch.equal(made[f"model.layers.3.{name}"], d[f"model.layers.7.{name}"].bfloat16())
    assert {tensor.dtype for tensor in made.values()} == {torch.bfloat16}
    models.open_model(done.model)


def test_what_cannot_be_is_refused_in_a_sentence(tmp_path: Path) -> None:
    base, other = (make("llama", tmp_path / f"m{seed}", seed) for seed in (1, 2))
    out = tmp_path / "out"
    for given, match in (
        (slices((0, "0-1"), (2, "0-1")), r"a slice names model 2, but there are 2: 0 is the base, 1 the last"),
        (slices((0, "0-1"), (1, "2-4")), r"has the blocks 0 to 3, and both ends belong to a slice"),
        (slices((0, "0-1"), (1, "3-2")), r"blocks: 3-2"),
        (slices((0, "0-1"), (1, "-1")), r"'-1' is no run of blocks. Write the first and the last: 3-7"),
        (slices((0, "0-3"), (0, "2-3")), r"no slice takes a block of .*m2. Leave it out of `others`"),
    ):
        with pytest.raises(RequestError, match=match):
            stack(base, [other], slices=given, out=out)
    with pytest.raises(RequestError, match=r"the slices are the base as it is"):
        stack(base, slices=slices((0, "0-1"), (0, "2-3")), out=out)
    with pytest.raises(RequestError, match=r"the slices are empty"):
        stack(base, slices=[], out=out)
    with pytest.raises(RequestError, match=r"slices=.* is not possible"):
        stack(base, slices=[{"model": 0, "blocks": "0-3", "scale": 2}], out=out)
    with pytest.raises(RequestError, match=r"would not load again"):
        stack(base, [make("gpt2", tmp_path / "gpt2", 1)], slices=slices((0, "0-1"), (1, "0-1")), out=out)
    assert not out.exists()


def test_plan_refuses_what_run_would(tmp_path: Path) -> None:
    from conftest import tiny_llama

    base, other = (models.save(tiny_llama(), tiny_tokenizer(), tmp_path / f"m{n}") for n in range(2))
    recipe = {
        "model": str(base),
        "materials": {"others": [{"model": str(other)}]},
        "steps": [{"merge.stack": {"slices": slices((0, "0-3"), (1, "2-9"))}}],
    }
    with pytest.raises(RequestError, match=r"has the blocks 0 to 3"):
        plan(check(read(recipe)))
