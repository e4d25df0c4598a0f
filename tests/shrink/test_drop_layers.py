from __future__ import annotations

import copy
import functools
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from conftest import (
    FAMILIES,
    examples_for,
    hidden_states,
    mean_loss,
    tiny_gemma3,
    tiny_llama,
    tiny_resnet,
    tiny_vit,
)
from contract import Case, some_facts
from more_families import MORE
from overhaul import models, session
from overhaul.data.examples import Examples, collate
from overhaul.errors import RequestError
from overhaul.forward import forward
from overhaul.modes import uncompiled
from overhaul.shrink.drop_layers import Choice, drop_layers, greedy, influence, ranked
from overhaul.stack import LayerStack

CRITERIA: Any = ["block_influence", "window", "perplexity", "greedy", "reverse"]


CASE = Case(
    method=drop_layers,
    materials=lambda: {"model": idle_first(), "text": some_facts(0, 6)},
    knobs={"count": 1},
    varied={
        "count": (1, 2),
        "criterion": ("block_influence", "reverse"),
        "drop": ([1], [2]),
        "keep": ([1, 2], [2, 3]),
        "keep_first": (True, False),
        "skip_first_token": (True, False),
    },
    idle={"batch_size": "it does not change the choice"},
    apart={"modes": "the model's mode is put back as a whole"},
    moves=r"layers\.",
)


def wild(family: str) -> nn.Module:
    """A tiny model whose blocks differ enough in what they do for a criterion to tell them apart."""
    options: dict[str, Any] = {} if family == "resnet" else {"initializer_range": 0.3}
    return FAMILIES[family](**options)


def silence(block: nn.Module) -> None:
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        nn.init.zeros_(block.get_parameter(f"{name}.weight"))


def idle_first() -> nn.Module:
    """Its first block adds nothing, so that it goes first if it may."""
    model: Any = tiny_llama(initializer_range=0.2)
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
    return model


def facts(model: nn.Module, examples: Examples | None, **knobs: Any) -> dict[str, Any]:
    return drop_layers(model, examples, **knobs).facts


@torch.no_grad()
def logits(model: nn.Module, examples: Examples) -> torch.Tensor:
    return forward(model, collate(examples.items))


# the card's exact checks


@pytest.mark.parametrize("criterion", CRITERIA)
def test_removing_no_block_is_the_identity(family: str, criterion: Any) -> None:
    model, examples = wild(family), examples_for(family, 4)
    before = logits(model, examples)
    assert facts(model, examples, count=0, criterion=criterion)["removed"] == []
    assert torch.equal(logits(model, examples), before)


def test_block_influence_of_a_block_that_adds_zero_is_0_and_it_goes_first() -> None:
    model: Any = wild("llama")
    examples = examples_for("llama", 8)
    silence(model.model.layers[2])
    before = logits(model, examples)
    outcome = drop_layers(model, examples, count=1)
    assert outcome.layers["block influence"][2] == 0.0
    assert min(outcome.layers["block influence"][i] for i in (0, 1, 3)) > 0.01
    assert outcome.facts["removed"] == [2]
    assert torch.equal(logits(model, examples), before)


def test_window_of_one_block_is_the_ranking_of_block_influence() -> None:
    model, examples = wild("llama"), examples_for("llama", 8)
    by_window = drop_layers(copy.deepcopy(model), examples, count=1, keep_first=False, criterion="window")
    singly = drop_layers(model, examples, count=1, keep_first=False)
    assert by_window.layers["window influence"] == singly.layers["block influence"]
    assert by_window.facts["removed"] == singly.facts["removed"]


def test_greedy_with_one_block_equals_brute_force() -> None:
    model, examples = wild("llama"), examples_for("llama", 8)
    stack = LayerStack.of(model)
    losses = {}
    for i in (1, 2, 3):
        with stack.skipping([i]):
            losses[i] = mean_loss(model, examples)
    outcome = drop_layers(model, examples, count=1, criterion="greedy", batch_size=8)
    assert outcome.facts["removed"] == [min(losses, key=lambda i: losses[i])]
    assert outcome.layers["loss without the block"] == pytest.approx(losses)


def test_greedy_with_an_additive_score_equals_exhaustive_search() -> None:
    harm = {1: 0.5, 2: 0.1, 3: 0.9, 4: 0.3, 5: 0.2}

    def loss(removed: list[int]) -> float:
        return sum(harm[i] for i in removed)

    best = min(itertools.combinations(harm, 3), key=lambda chosen: loss(list(chosen)))
    assert sorted(greedy(lambda cuts: list(map(loss, cuts)), Choice(3, (), list(harm)))) == sorted(best)


def test_saved_and_loaded_model_equals_the_one_in_memory(family: str, tmp_path: Path) -> None:
    model: Any = wild(family)
    examples = examples_for(family, 4)
    drop_layers(model, examples, count=2)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(type(model).from_pretrained(tmp_path).eval(), examples), logits(model, examples))


# the criteria


def test_block_influence_is_one_minus_the_mean_cosine_over_real_tokens() -> None:
    model, examples = wild("llama"), examples_for("llama", 5)
    stack = LayerStack.of(model)
    for skip in (True, False):
        cosines = [
            F.cosine_similarity(entering[0, skip:], leaving[0, skip:], dim=-1)
            for item in examples
            for entering, leaving in [hidden_states(stack, collate([item]))[1]]
        ]
        expected = 1 - torch.cat(cosines).mean().item()
        assert influence(stack, examples, 1, skip, 3)[1] == pytest.approx(expected, abs=1e-6)


def test_window_influence_compares_the_two_ends_of_the_window() -> None:
    model, examples = wild("llama"), examples_for("llama", 1)
    states = hidden_states(LayerStack.of(model), collate(examples.items))
    expected = 1 - F.cosine_similarity(states[1][0][0, 1:], states[3][1][0, 1:], dim=-1).mean().item()
    scores = influence(LayerStack.of(model), examples, 3, True, 4)
    assert list(scores) == [0, 1] and scores[1] == pytest.approx(expected, abs=1e-6)


def test_batch_size_does_not_change_the_scores(family: str) -> None:
    model, examples = wild(family), examples_for(family, 7)
    stack = LayerStack.of(model)
    one, many = (influence(stack, examples, 1, True, size) for size in (1, 7))
    assert one == pytest.approx(many, abs=1e-5)
    by_loss: Any = [
        drop_layers(copy.deepcopy(model), examples, count=1, criterion="perplexity", batch_size=size).layers
        for size in (1, 7)
    ]
    assert by_loss[0]["loss without the block"] == pytest.approx(by_loss[1]["loss without the block"], rel=1e-5)


def test_window_takes_the_neighbours_that_together_turn_the_stream_least() -> None:
    model: Any = wild("llama")
    silence(model.model.layers[1])
    silence(model.model.layers[2])
    outcome = drop_layers(model, examples_for("llama", 4), count=2, criterion="window")
    assert outcome.facts["removed"] == [1, 2]
    assert outcome.layers["window influence"][1] == 0.0


def test_perplexity_takes_the_blocks_without_which_alone_the_loss_is_lowest() -> None:
    outcome = drop_layers(wild("llama"), examples_for("llama", 8), count=2, criterion="perplexity")
    scores = outcome.layers["loss without the block"]
    assert outcome.facts["removed"] == sorted(scores, key=lambda i: scores[i])[:2]
    assert sorted(scores) == [1, 2, 3]


def test_greedy_measures_again_after_each_block() -> None:
    # blocks 1 and 2 are each other's replacement: alone either may go, but not both
    def loss(removed: list[int]) -> float:
        return {1: 0.1, 2: 0.1, 3: 0.2}[removed[-1]] + (5.0 if {1, 2} <= set(removed) else 0.0)

    assert greedy(lambda cuts: list(map(loss, cuts)), Choice(2, (), [1, 2, 3])) == [2, 3]
    assert ranked({1: 0.1, 2: 0.1, 3: 0.2}, [1, 2, 3]) == [2, 1, 3]


def test_reverse_takes_the_last_blocks_and_needs_no_examples() -> None:
    model = wild("llama")
    outcome = drop_layers(model, count=2, criterion="reverse")
    assert outcome.facts["removed"] == [3, 2]
    assert outcome.layers == {"removed": {0: 0.0, 1: 0.0, 2: 1.0, 3: 1.0}}
    assert facts(wild("resnet"), None, count=3, criterion="reverse")["removed"] == [5, 4, 2]


def test_the_first_block_stays_unless_asked_for() -> None:
    model: Any = wild("llama")
    silence(model.model.layers[0])
    assert 0 not in facts(model, examples_for("llama", 4), count=1)["removed"]
    assert facts(model, examples_for("llama", 4), count=1, keep_first=False)["removed"] == [0]


@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_criterion_shortens_every_family(family: str, criterion: Any) -> None:
    model: Any = wild(family)
    parameters = model.num_parameters()
    found = facts(model, examples_for(family, 4), count=2, criterion=criterion)
    stack = LayerStack.of(model)
    blocks = 6 if family == "resnet" else 4
    assert (found["blocks_before"], found["blocks_after"], len(stack)) == (blocks, blocks - 2, blocks - 2)
    assert found["parameters_before"] == parameters
    assert found["parameters_after"] == sum(p.numel() for p in model.parameters()) < parameters
    assert len(set(found["removed"])) == 2


def test_a_resnet_block_that_adds_zero_has_influence_0_and_stage_openings_have_no_score() -> None:
    model: Any = tiny_resnet(downsample_in_first_stage=True)
    last: Any = LayerStack.of(model).blocks[4].get_submodule("layer.1.normalization")
    nn.init.zeros_(last.weight)
    outcome = drop_layers(model, examples_for("resnet", 4), count=1)
    scores = outcome.layers["block influence"]
    assert scores[4] == 0.0 and outcome.facts["removed"] == [4]
    assert sorted(scores) == [1, 2, 4, 5]


def test_bfloat16_models_are_scored_in_float32() -> None:
    model = wild("llama").to(torch.bfloat16)
    scores = drop_layers(model, examples_for("llama", 4), count=1).layers["block influence"]
    assert all(0 < score < 2 for score in scores.values())


# blocks that are named


def test_named_blocks_go_without_examples_and_the_first_too() -> None:
    model: Any = tiny_llama()
    blocks = list(model.model.layers)
    assert facts(model, None, drop=[3, 0])["removed"] == [3, 0]
    assert list(model.model.layers) == [blocks[1], blocks[2]]


@pytest.mark.parametrize("criterion", CRITERIA)
def test_named_blocks_go_first_and_others_stay_whatever_the_criterion(criterion: Any) -> None:
    examples = examples_for("llama", 4)
    found = facts(wild("llama"), examples, count=2, drop=[2], keep=[3], criterion=criterion)["removed"]
    assert (sorted(found) if criterion == "window" else found) == ([1, 2] if criterion == "window" else [2, 1])


def test_kept_blocks_are_passed_over() -> None:
    model, examples = wild("llama"), examples_for("llama", 4)
    scores = influence(LayerStack.of(model), examples, 1, True, 16)
    order = ranked(scores, [1, 2, 3])
    assert facts(model, examples, count=1, keep=order[:1])["removed"] == order[1:2]


# kinds of blocks and models


def hybrid() -> nn.Module:
    """Its blocks 1 and 3 have attention, 0 and 2 none."""
    return MORE["Bamba"].build()


@pytest.mark.parametrize("criterion", CRITERIA)
def test_a_hybrid_keeps_a_block_with_attention(criterion: Any) -> None:
    examples = examples_for("llama", 4)
    assert LayerStack.of(hybrid()).with_attention == [1, 3]
    count = 2 if criterion == "window" else 3
    removed = facts(hybrid(), examples, count=count, criterion=criterion, keep_first=False)["removed"]
    assert len(removed) == count and not {1, 3} <= set(removed)
    with pytest.raises(RequestError, match=r"only 3 can be dropped \(one with attention must stay\)"):
        drop_layers(hybrid(), examples, count=4, criterion=criterion, keep_first=False)
    with pytest.raises(RequestError, match=r"only the blocks \[1, 3\] have attention"):
        drop_layers(hybrid(), None, drop=[1, 3])


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize(("name", "allowed"), [("Zamba2", {2}), ("DeepSeek-V3", {1, 2, 3}), ("GPT-Neo", {1, 2, 3})])
def test_the_criterion_chooses_among_what_the_config_can_do_without(
    name: str, allowed: set[int], criterion: Any, tmp_path: Path
) -> None:
    model = MORE[name].build()
    assert set(facts(model, examples_for("llama", 2), count=1, criterion=criterion)["removed"]) <= allowed
    models.open_model(models.save(model, None, tmp_path / "m"))


def test_blocks_that_go_only_together_are_said_to_be_that_and_can_be_named() -> None:
    model, examples = MORE["Jamba"].build(), examples_for("llama", 2)
    with pytest.raises(
        RequestError, match=r"only 1 can be dropped \(keep_first.*2 only together with others.*name them"
    ):
        drop_layers(model, examples, count=2)
    assert facts(model, None, drop=[2, 3])["removed"] == [2, 3]


@pytest.mark.parametrize("name", ["Gemma 3, with images", "Qwen2.5-VL", "Llava", "Mistral 3"])
def test_the_blocks_of_a_model_that_sees_are_those_of_its_language_model(name: str) -> None:
    model, examples = MORE[name].build(), examples_for("llama", 4)
    before = {s.path: len(s) for s in LayerStack.find(model)}
    facts(model, examples, count=1)
    after = {s.path: len(s) for s in LayerStack.find(model)}
    assert {path: count - after[path] for path, count in before.items() if count != after[path]} == {
        MORE[name].stack: 1
    }


def test_another_stack_is_named() -> None:
    model = MORE["Llava"].build()
    with session.using(stack="model.vision_tower.encoder.layers"):
        facts(model, None, drop=[1])
    lengths = {stack.path: len(stack) for stack in LayerStack.find(model)}
    assert lengths == {"model.vision_tower.encoder.layers": 2, "model.language_model.layers": 4}


@pytest.mark.parametrize("where", ["forward", "generate"])
def test_a_shorter_model_that_no_longer_runs_is_refused_and_is_as_it_was(where: str) -> None:
    model: Any = tiny_llama()
    examples = examples_for("llama", 2)
    said = logits(model, examples)

    def needs_four(*_: Any, **__: Any) -> None:
        if len(model.model.layers) < 4:
            raise ValueError("four blocks are needed")

    if where == "forward":
        model.register_forward_pre_hook(needs_four)
    else:
        prepare = model.prepare_inputs_for_generation
        model.prepare_inputs_for_generation = functools.wraps(prepare)(lambda *a, **k: needs_four() or prepare(*a, **k))
    with pytest.raises(RequestError, match=r"no longer runs \(ValueError: four blocks are needed\)\. Choose others"):
        drop_layers(model, examples, count=1)
    assert model.config.num_hidden_layers == 4 and torch.equal(logits(model, examples), said)


def test_an_encoder_shorter_than_its_decoder_is_refused_where_the_library_cannot_generate_with_it() -> None:
    """It sizes the decoder's cache by the encoder."""
    from transformers import T5Config, T5ForConditionalGeneration

    sizes: dict[str, Any] = {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_heads": 2, "num_layers": 3}
    sizes["decoder_start_token_id"] = 0
    model = T5ForConditionalGeneration(T5Config(**sizes)).eval()
    with session.using(stack="encoder.block"), pytest.raises(RequestError, match="no longer runs"):
        drop_layers(model, None, drop=[1])
    assert len(LayerStack.at(model, "encoder.block")) == 3
    with session.using(stack="decoder.block"):
        assert facts(model, None, drop=[1])["blocks_after"] == 2


@pytest.mark.parametrize("compiled", [range(4), (1, 2)])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gemma3])
def test_blocks_that_were_compiled_one_by_one_are_saved_under_plain_names(
    make: Any, compiled: Any, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    plain = make()
    drop_layers(plain, None, drop=[1])
    torch.manual_seed(0)
    model = make()
    for place in compiled:
        model.model.layers[place] = torch.compile(model.model.layers[place], backend="eager")
    drop_layers(model, None, drop=[1])
    again, _ = models.open_model(models.save(model, None, tmp_path / "m"))
    expected = plain.state_dict()
    assert again.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.state_dict().items())
    assert hasattr(model.model.layers[1], "_orig_mod")


def test_a_block_that_is_compiled_and_repeated_has_a_slot_of_its_own() -> None:
    model: Any = tiny_llama()
    ids = torch.arange(3, 12)[None]
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 4, "pad_token_id": 0, "eos_token_id": None}
    with LayerStack.of(model).following([0, 1, 1, 2]):
        expected = model.generate(ids, **options)
    model.model.layers[1] = torch.compile(model.model.layers[1], backend="eager")
    with uncompiled(), LayerStack.of(model).following([0, 1, 1, 2]):
        assert torch.equal(model.generate(ids, **options), expected)


# bad requests


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"count": 4}, r"count=4, but of the 4 blocks of model\.layers only 3 can be dropped \(keep_first"),
        ({"count": 5, "keep_first": False}, "only 4 can be dropped"),
        ({"count": -1}, "greater than or equal to 0"),
        ({"count": 1, "criterion": "perplexety"}, "criterion='perplexety' is not possible"),
        ({"count": 1, "kount": 2}, "no knob 'kount'. Did you mean 'count'"),
        ({}, r"say how many blocks are to go \(`count: 2`\) or which"),
        ({"drop": [4]}, "drop names block 4, but the blocks of model.layers are numbered from 0 to 3, the last one"),
        ({"drop": [-1]}, "drop names block -1, but the blocks"),
        ({"count": 1, "keep": [-1]}, "keep names block -1"),
        ({"drop": [2, 2]}, "drop names a block twice"),
        ({"drop": [1, 2], "keep": [2]}, "drop and keep both name block 2"),
        ({"drop": [1, 2], "count": 1}, "count=1, but drop names 2 blocks"),
        ({"drop": [0, 1, 2, 3]}, "at least one must stay"),
        ({"count": 3, "keep": [2]}, r"only 2 can be dropped \(keep_first holds the first; keep names some"),
        ({"count": 4, "keep_first": False, "criterion": "reverse"}, "at least one must stay"),
    ],
)
def test_impossible_requests_say_why_and_change_nothing(knobs: dict[str, Any], message: str) -> None:
    model, examples = tiny_llama(), examples_for("llama", 2)
    before = logits(model, examples)
    with pytest.raises(RequestError, match=message):
        drop_layers(model, examples, **knobs)
    assert torch.equal(logits(model, examples), before)


@pytest.mark.parametrize("examples", [None, Examples([], [])])
def test_a_criterion_without_examples_says_what_it_needs(examples: Examples | None) -> None:
    with pytest.raises(RequestError, match=r"'block_influence' is measured on examples.*`text` is missing or empty"):
        drop_layers(tiny_vit(), examples, count=1)


def test_a_window_that_would_hold_the_opening_of_a_stage_is_refused() -> None:
    with pytest.raises(RequestError, match="no 3 neighbouring blocks"):
        drop_layers(tiny_resnet(), examples_for("resnet", 2), count=3, criterion="window")


def test_texts_of_one_token_have_no_second_to_measure() -> None:
    one = Examples([{"input_ids": torch.tensor([5]), "labels": torch.tensor([5])}], [{}])
    with pytest.raises(RequestError, match="skip_first_token: false"):
        drop_layers(tiny_llama(), one, count=1)
