"""Restoration: exact where nothing can move, a swapped tail where all does, and every flag is raised where it holds."""

from __future__ import annotations

import copy
import functools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from conftest import FAMILIES, examples_for, tiny_llama, tiny_tokenizer, tiny_vit
from contract import Case, pictures
from families import FAMILIES as MORE
from more_families import MORE as STILL_MORE
from overhaul.data.encode import encode_qa
from overhaul.data.examples import Examples, collate
from overhaul.data.tasks import people
from overhaul.errors import RequestError
from overhaul.forward import forward
from overhaul.inspect.restoration import restoration
from overhaul.inspect.restoration.passes import Compared, Material, Run, original_pass, steering_pass, unlearned_pass
from overhaul.inspect.restoration.states import Places, Seen, sampled, tokens_before, walk
from overhaul.inspect.restoration.steering import (
    PAPER,
    RANDOM,
    RANDOM_ALONE,
    READ,
    SELECTED,
    Arm,
    Features,
    Pushes,
    random_sets,
    rate,
)
from overhaul.method import Outcome
from overhaul.models import save
from overhaul.recipe.plan import Plan, planned
from overhaul.recipe.run import run
from overhaul.sae import Dictionary, SparseAutoencoder
from overhaul.selectors import select
from overhaul.stack import LayerStack
from overhaul.stack.calls import Calls
from overhaul.trace.flow import with_stream

QUICK: dict[str, Any] = {"k": 4, "autoencoder_steps": 3, "autoencoder_batch": 32, "states": 80, "experts": 4}
ALL = (PAPER, READ, SELECTED, RANDOM, RANDOM_ALONE)


def images(count: int = 30, seed: int = 0) -> Examples:
    """Pictures of three digits, with a column beside the label."""
    labels = [n % 3 for n in range(count)]
    return pictures(labels, seed, hand=["left" if n % 2 else "right" for n in range(count)])


@functools.cache
def folder(kind: str) -> Path:
    """A model on the disk: the original, one whose weights moved a little, one with another head, one drawn anew."""
    torch.manual_seed(0)
    model = tiny_vit()
    changed = select(model, "head").parameters
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if kind == "moved" or (kind == "head" and name in changed):
                parameter += 0.02 * torch.randn_like(parameter)
            if kind == "anew" and parameter.ndim > 1:
                parameter.copy_(0.1 * torch.randn_like(parameter))
            if kind in ("moved", "head", "anew") and name == "classifier.bias":
                parameter[0] -= 50  # the class 0 is never said
            if kind == "original" and name == "classifier.bias":
                parameter[0] += 50
    return save(model, None, Path(tempfile.mkdtemp()) / kind, dtype="float32")


CASE = Case(
    method=restoration,
    materials=lambda: {
        "model": folder("moved"),
        "original": folder("original"),
        "train": images(),
        "test": images(18, 1),
    },
    knobs={**QUICK, "value": 0, "layers": "1,3", "alphas": [2.0], "random_sets": 1},
    varied={
        "value": (0, 1),
        "column": ("label", "n", {"probe": False}),
        "layers": ("1", "2-3"),
        "alphas": ([1.0], [5.0, 2.0]),
        "experts": (1, 6),
        "experts_by": ("mean_difference", "auroc"),
        "codes": ("linear", "topk", {"measure": "probability"}),
        "form": ("delta", "replace"),
        "measure": ("accuracy", "probability"),
        "random_sets": (1, 3),
        "class_tokens": (1, 0),
        "probe": (True, False),
        "same_basis": (0.01, 1.0),
        "expansion": (1, 2),
        "k": (2, 8),
        "autoencoder_steps": (2, 4),
        "autoencoder_batch": (16, 32),
        "autoencoder_lr": (1e-3, 1e-2),
        "states": (60, 120),
    },
    idle={"batch_size": "examples that run together do not change what is said"},
)


def found(outcome: Outcome, layer: int, alpha: float | None, arm: str) -> tuple[Any, Any, Any]:
    """Accuracy, probability and rate of an arm."""
    values: list[Any] = []
    for measure in ("accuracy", "probability"):
        table = outcome.tables[f"{measure} on the group"]
        (row,) = [row for row in table.rows if row[:2] == (arm, alpha)]
        values.append(row[table.columns.index(f"block {layer}")])
    table = next(one for name, one in outcome.tables.items() if name.endswith(f"rate at alpha {alpha or 0:g}"))
    (row,) = [row for row in table.rows if row[0] == arm]
    return values[0], values[1], row[table.columns.index(str(layer))]


def run_on(model: str, original: str = "original", **knobs: Any) -> Outcome:
    settings = {
        **QUICK,
        "value": 0,
        "layers": "1,3",
        "alphas": [0.0, 1.0, 5.0],
        "random_sets": 1,
        "probe": False,
        **knobs,
    }
    return restoration(folder(model), folder(original), images(), images(18, 1), **settings)


# exact


def moved_copy(model: nn.Module, size: float = 0.02) -> nn.Module:
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += size * torch.randn_like(parameter)
    return other


def both(family: str, size: float, layer: int) -> tuple[Seen, Tensor, Places]:
    """A model on a batch, and the states of another at a layer."""
    model = FAMILIES[family]()
    examples = examples_for(family, 4)
    examples = examples.filter(lambda _: True) if family in ("vit", "resnet") else longer(family, 4)
    stack = LayerStack.of(model)
    (seen,) = walk(stack, examples, (layer,), 4, "")
    (other,) = walk(LayerStack.of(moved_copy(model, size)), examples, (layer,), 4, "")
    before = tokens_before(stack, examples, None)
    return seen, other.rows(layer), Places.of(seen.batch, seen.rows(layer), before)


def longer(family: str, count: int) -> Examples:
    """Answers to prompts of at least three tokens."""
    drawn = examples_for(family, 20 * count)
    kept = [n for n, item in enumerate(drawn.items) if int((item["labels"] != -100).int().argmax()) >= 4]
    return drawn.select(kept[:count])


def features_of(width: int, **changes: Any) -> Features:
    made = SparseAutoencoder(width, 2 * width, 4)
    return Features(made, **{"selected": [0, 3, 5], "random": [[1, 2, 4]], **changes})


def logits_of(seen: Seen, layer: int, pushes: Pushes, arm: Arm, alpha: float) -> Tensor:
    (rows,) = pushes.states(arm, alpha)
    return seen.onwards(layer, with_stream(seen.calls, seen.states[layer], rows))


@torch.no_grad()
@pytest.mark.parametrize("codes", ["linear", "topk"])
def test_alpha_zero_keeps_every_bit(family: str, codes: str) -> None:
    seen, goal, places = both(family, 0.02, 1)
    features = features_of(goal.shape[2], codes=codes)
    pushes = features.pushes(seen.rows(1), goal, places)
    for arm in ALL:
        assert torch.equal(logits_of(seen, 1, pushes, arm, 0.0), seen.logits)
    assert not torch.equal(logits_of(seen, 1, pushes, SELECTED, 1.0), seen.logits)


@torch.no_grad()
def test_no_features_keep_every_bit(family: str) -> None:
    seen, goal, places = both(family, 0.02, 1)
    pushes = features_of(goal.shape[2], selected=[], random=[[]]).pushes(seen.rows(1), goal, places)
    assert torch.equal(logits_of(seen, 1, pushes, SELECTED, 5.0), seen.logits)
    assert torch.equal(logits_of(seen, 1, pushes, RANDOM_ALONE, 5.0), seen.logits)


@torch.no_grad()
def test_where_both_models_are_one_nothing_moves(family: str) -> None:
    seen, goal, places = both(family, 0.0, 1)
    pushes = features_of(goal.shape[2]).pushes(seen.rows(1), goal, places)
    for arm in ALL:
        for alpha in (1.0, 5.0, 10.0):
            assert torch.equal(logits_of(seen, 1, pushes, arm, alpha), seen.logits)


@torch.no_grad()
def test_a_basis_of_all_features_is_a_swapped_tail(family: str) -> None:
    """Linear codes with W_e = W_d^-1, every feature, alpha 1: the unlearned model's tail on the original's states."""
    seen, goal, places = both(family, 0.02, 1)
    width = goal.shape[2]
    made = SparseAutoencoder(width, width)
    basis = torch.randn(width, width) + 3 * torch.eye(width)
    made.decoder.weight.copy_(basis)
    made.encoder.weight.copy_(torch.linalg.inv(basis))
    everywhere = Places(places.read, ~places.read)
    pushes = Features(made, list(range(width)), []).pushes(seen.rows(1), goal, everywhere)
    arm = PAPER if places.read.any() else SELECTED
    swapped = seen.onwards(1, with_stream(seen.calls, seen.states[1], goal))
    assert torch.allclose(logits_of(seen, 1, pushes, arm, 1.0), swapped, atol=1e-4)
    assert not torch.allclose(swapped, seen.logits, atol=1e-3)


@torch.no_grad()
def test_behind_the_last_block_the_class_token_at_alpha_one_is_the_original_s() -> None:
    seen, goal, places = both("vit", 0.02, 3)
    pushes = features_of(goal.shape[2]).pushes(seen.rows(3), goal, places)
    by_hand = seen.calls.finish((goal,))  # the unlearned model's norm and head on the original's states
    assert torch.allclose(logits_of(seen, 3, pushes, READ, 1.0), by_hand, atol=1e-6)


@torch.no_grad()
def test_at_answers_alone_alpha_one_behind_the_last_block_gives_the_original_s_answers() -> None:
    seen, goal, places = both("llama", 0.02, 3)
    pushes = features_of(goal.shape[2]).pushes(seen.rows(3), goal, places)
    by_hand = seen.calls.finish((goal,))
    logits = logits_of(seen, 3, pushes, READ, 1.0)
    assert torch.allclose(logits[places.read], by_hand[places.read], atol=1e-5)
    assert torch.equal(logits[~places.read], seen.logits[~places.read])


@torch.no_grad()
def test_features_move_by_the_equation_and_nothing_else_moves() -> None:
    seen, goal, places = both("vit", 0.02, 1)
    own, features = seen.rows(1), features_of(goal.shape[2])
    (rows,) = features.pushes(own, goal, places).states(SELECTED, 3.0)
    made = features.autoencoder
    change = (made.linear(goal) - made.linear(own))[..., [0, 3, 5]] @ made.decoder.weight[:, [0, 3, 5]].T
    assert torch.equal(rows[:, :1], own[:, :1])
    assert torch.allclose(rows[:, 1:], own[:, 1:] + 3 * change[:, 1:], atol=1e-5)


@torch.no_grad()
def test_random_features_move_as_far_in_every_sample() -> None:
    seen, goal, places = both("vit", 0.02, 1)
    pushes = features_of(goal.shape[2], random=[[1, 2, 4], [7, 8, 9]]).pushes(seen.rows(1), goal, places)
    length = pushes.selected.flatten(1).norm(dim=1)
    assert length.min() > 0
    for random in pushes.random:
        assert torch.allclose(random.flatten(1).norm(dim=1), length, rtol=1e-4)
        assert not torch.allclose(random, pushes.selected, atol=1e-4)
    assert len(list(pushes.states(RANDOM, 1.0))) == 2


@torch.no_grad()
def test_the_official_form_replaces_patches_by_their_decoded_code() -> None:
    seen, goal, places = both("vit", 0.02, 1)
    own, features = seen.rows(1), features_of(goal.shape[2], form="replace")
    made = features.autoencoder
    pushes = features.pushes(own, goal, places)
    (rows,) = pushes.states(PAPER, 0.0)
    assert torch.allclose(rows[:, 1:], made.decode(made.linear(own))[:, 1:], atol=1e-6)
    assert torch.equal(rows[:, 0], own[:, 0])
    assert not torch.allclose(rows, own, atol=1e-2)  # alpha 0 is no identity
    (moved,) = pushes.states(PAPER, 2.0)
    codes = made.linear(own)
    codes[..., [0, 3, 5]] += 2 * (made.linear(goal) - made.linear(own))[..., [0, 3, 5]]
    assert torch.allclose(moved[:, 1:], made.decode(codes)[:, 1:], atol=1e-5)


def test_the_rate_is_zero_at_the_unlearned_and_one_at_the_original() -> None:
    assert rate(0.2, 0.2, 0.9) == 0 and rate(0.9, 0.2, 0.9) == 1
    assert rate(0.1, 0.2, 0.9) == pytest.approx(-1 / 7)
    assert rate(0.5, 0.9, 0.9) is None and rate(0.5, 0.9, 0.4) is None


def test_random_sets_leave_out_the_selected_and_the_dead() -> None:
    made = SparseAutoencoder(4, 8)
    made.neuron_activity[:7].fill_(1)
    for chosen in random_sets(made, [0, 1], 20, torch.Generator().manual_seed(0)):
        assert len(set(chosen)) == 2 and set(chosen) <= {2, 3, 4, 5, 6}
    with pytest.raises(RequestError, match="4 features are steered, and the autoencoder has only 3 other living"):
        random_sets(made, [0, 1, 2, 3], 1, torch.Generator())


def test_the_correlation_is_of_features_around_their_means() -> None:
    a, b = torch.randn(50, 6) + 7, torch.randn(50, 6) - 3
    compared = Compared()
    compared.add(a[:20], b[:20])
    compared.add(a[20:], b[20:])
    x, y = a - a.mean(dim=0), b - b.mean(dim=0)
    assert compared.correlation == pytest.approx(float((x * y).sum() / (x.norm() * y.norm())), abs=1e-5)
    assert compared.distance == pytest.approx(float((a - b).norm() / b.norm()), abs=1e-5)


# positions


def test_a_prompt_carries_features_and_what_predicts_the_answer_is_read() -> None:
    labels = torch.tensor([[-100, -100, -100, 7, 8, -100], [-100, -100, 5, -100, -100, -100]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0]])
    batch = {"input_ids": labels, "labels": labels, "attention_mask": mask}
    places = Places.of(batch, torch.zeros(2, 6, 3), 0)
    assert places.read.int().tolist() == [[0, 0, 1, 1, 0, 0], [0, 1, 0, 0, 0, 0]]
    assert places.rest.int().tolist() == [[0, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]]


@pytest.mark.parametrize(("name", "tokens"), [("ViT", 1), ("DINOv2", 1), ("DeiT", 2), ("BEiT", 1)])
def test_tokens_before_the_patches_are_told_by_the_config(name: str, tokens: int) -> None:
    model: Any = {**MORE, **STILL_MORE}[name].build()
    side = model.config.image_size
    pixels = torch.randn(model.config.num_channels, side, side)
    examples = Examples([{"pixel_values": pixels, "labels": torch.tensor(0)}], [{}])
    assert tokens_before(LayerStack.of(model), examples, None) == tokens


def test_a_resnet_has_no_class_token() -> None:
    assert tokens_before(LayerStack.of(FAMILIES["resnet"]()), examples_for("resnet", 1), None) == 0


def test_where_the_config_does_not_tell_the_knob_is_named() -> None:
    model: Any = tiny_vit()
    examples, stack = examples_for("vit", 1), LayerStack.of(model)
    assert tokens_before(stack, examples, 0) == 0
    vars(model.config)["patch_size"] = 2
    with pytest.raises(RequestError, match="5 positions for an image, and its config does not say.*class_tokens"):
        tokens_before(stack, examples, None)
    with pytest.raises(RequestError, match="class_tokens is 5"):
        tokens_before(stack, examples, 5)


@torch.no_grad()
def test_a_sample_holds_states_of_its_examples_at_positions_that_carry_features() -> None:
    model, examples = FAMILIES["llama"](), longer("llama", 6)
    stack = LayerStack.of(model)
    sample = sampled(stack, examples, (0, 2), 4, 0, 3)[2]
    calls = Calls.record(stack, collate(examples.items))
    (seen,) = walk(stack, examples, (2,), 6, "")
    rest = Places.of(seen.batch, seen.rows(2), 0).rest
    assert calls.inputs["labels"].shape == rest.shape
    for n in range(6):
        of_it = sample.rows[sample.owner == n]
        assert len(of_it) == min(3, int(rest[n].sum()))
        near = torch.cdist(of_it, seen.rows(2)[n][rest[n]]).amin(dim=1)
        assert near.max() < 1e-4
        assert len(of_it.unique(dim=0)) == len(of_it)


# the whole


def test_head_only_unlearning_is_flagged_steering_moves_nothing_and_the_tail_restores_all() -> None:
    outcome = run_on("head")
    assert outcome.facts["identical_up_to_layers"] == [1, 3]
    assert outcome.facts["unlearned_on_the_group"] == 0 and outcome.facts["original_on_the_group"] == 1
    for layer in (1, 3):
        for arm in ("features + class token", "class token alone", "random alone"):
            assert found(outcome, layer, 5.0, arm)[2] == 0
        assert found(outcome, layer, None, "tail swap")[2] == 1
    assert (
        "identical up to every chosen layer" in outcome.facts["reading"] and "restores 1.00" in outcome.facts["reading"]
    )
    assert outcome.layers["distance of the models, relative"] == {1: 0, 3: 0}


def test_what_only_the_originals_tail_brings_back_is_not_called_gone() -> None:
    outcome = run_on("moved")
    assert not outcome.facts["identical_up_to_layers"] and found(outcome, 1, None, "tail swap")[2] == 1
    assert "the original's tail restores 1.00 of it from the unlearned states" in outcome.facts["reading"]


def test_a_model_drawn_anew_is_flagged_as_another_basis() -> None:
    outcome = run_on("anew")
    assert outcome.facts["another_basis_at_layers"] == [1, 3]
    assert max(outcome.layers["correlation of their features"].values()) < 0.25
    assert outcome.facts["identical_up_to_layers"] == []
    assert run_on("moved").facts["another_basis_at_layers"] == []


def test_where_nothing_was_forgotten_there_is_no_rate() -> None:
    outcome = run_on("original", "moved")
    assert outcome.facts["nothing_to_restore"] is True and outcome.facts["restoration_rate"] is None
    assert "nothing was forgotten" in outcome.facts["reading"]
    assert all(cell is None for row in outcome.tables["restoration rate at alpha 5"].rows for cell in row[1:])
    assert run_on("moved").facts["nothing_to_restore"] is False


def test_no_sentence_is_made_of_the_last_block_where_there_are_others() -> None:
    assert run_on("moved", layers="3").facts["best_layer"] == 3
    outcome = run_on("moved", layers="0,3", measure="probability")
    own, inner = found(outcome, 3, 1.0, "class token alone")[2], found(outcome, 0, 1.0, "class token alone")[2]
    assert own > inner and outcome.facts["best_layer"] == 0


def test_alpha_zero_is_the_unlearned_model_in_every_table() -> None:
    outcome = run_on("moved", measure="probability")
    told = [row[2:] for row in outcome.tables["probability on the group"].rows if row[1] == 0]
    assert told == [(outcome.facts["unlearned_on_the_group"],) * 2] * 5
    rates = outcome.tables["restoration rate at alpha 0"].rows
    assert [row[1:] for row in rates[:-1]] == [(0, 0)] * 5 and rates[-1][0] == "tail swap"
    others = outcome.tables["all others, steered as well"].rows
    assert [row[3] == row[2] for row in others if row[1] == 0] == [True, True]


def test_accuracies_are_those_of_the_models_and_others_are_left_alone() -> None:
    outcome, test = run_on("moved"), images(18, 1)
    from overhaul.models import open_model

    for name, kind in (("unlearned", "moved"), ("original", "original")):
        hits = forward(open_model(folder(kind))[0], collate(test.items)).argmax(dim=1) == torch.arange(18) % 3
        own = torch.arange(18) % 3 == 0
        assert outcome.facts[f"{name}_on_the_group"] == pytest.approx(float(hits[own].float().mean()))
        assert outcome.facts[f"{name}_on_others"] == pytest.approx(float(hits[~own].float().mean()))


def test_the_tail_swap_is_the_original_s_tail_on_the_unlearned_states() -> None:
    from overhaul.models import open_model

    outcome, group = run_on("moved", layers="1"), images(18, 1).filter(lambda row: row["label"] == 0)
    models = [open_model(folder(kind))[0] for kind in ("moved", "original")]
    (own,), (theirs,) = (walk(LayerStack.of(model), group, (1,), 18, "") for model in models)
    with torch.no_grad():
        logits = theirs.onwards(1, own.states[1])
    probability = float(logits.softmax(dim=-1)[:, 0].mean())
    assert found(outcome, 1, None, "tail swap")[1] == pytest.approx(probability, abs=1e-5)


def test_what_it_makes_is_read_again() -> None:
    outcome = run_on("moved")
    made = {name.removeprefix("3."): one for name, one in outcome.made["autoencoders"].items() if name.startswith("3.")}
    again = SparseAutoencoder.of_tensors(made)
    assert (again.k, again.pre_bias.shape) == (4, (32,))
    assert set(outcome.made["experts"]) == {"1", "3"} and len(set(outcome.made["experts"]["3"])) == 4


def test_autoencoders_that_were_made_are_used_again_and_give_the_same() -> None:
    def again(**knobs: Any) -> Outcome:
        settings = {
            **QUICK,
            "value": 0,
            "alphas": [0.0, 5.0],
            "random_sets": 1,
            "probe": False,
            "measure": "probability",
        }
        return restoration(folder("moved"), folder("original"), images(), images(18, 1), **{**settings, **knobs})

    first = again(layers="1,3")
    second = again(autoencoders=first.made["autoencoders"], autoencoder_steps=1)
    # what counts as dead is told from all states now, and not from nine tenths of them
    assert first.tables["probability on the group"].columns == second.tables["probability on the group"].columns
    for name in ("0.0", "5.0"):
        assert found(first, 1, float(name), "class token alone") == found(second, 1, float(name), "class token alone")
    assert (
        first.layers["variance explained by the autoencoder"] == second.layers["variance explained by the autoencoder"]
    )
    assert first.made["experts"] == second.made["experts"]
    assert found(first, 3, 5.0, "features alone") == found(second, 3, 5.0, "features alone")
    alone = {name.removeprefix("3."): one for name, one in first.made["autoencoders"].items() if name.startswith("3.")}
    third = again(autoencoders=alone, layers="3")
    assert found(third, 3, 5.0, "features alone") == found(second, 3, 5.0, "features alone")
    with pytest.raises(RequestError, match="names no layer"):
        again(autoencoders=alone)
    with pytest.raises(RequestError, match=r"none for the layer 2, only for \[1, 3\]"):
        again(autoencoders=first.made["autoencoders"], layers="1-3")
    with pytest.raises(RequestError, match="layer 3 is for 8 features, and its stream has 32"):
        again(autoencoders=SparseAutoencoder(8, 16, 4).tensors(), layers="3")


@pytest.mark.parametrize("build", [tiny_llama, FAMILIES["gpt2"]])
def test_language_models_are_steered_at_the_tokens_of_a_prompt(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    model = build()
    pair = {"o": model, "u": moved_copy(model)}
    places = [save(one, tiny_tokenizer(), tmp_path / name, dtype="float32") for name, one in pair.items()]
    rows = people()[:12]
    data = encode_qa(rows, tiny_tokenizer(), prompt="{question}")
    outcome = restoration(
        places[1], places[0], data, data, value=rows[0]["person"], column="person", layers="0,2", alphas=[0.0, 1.0],
        measure="probability", random_sets=1, **QUICK,
    )  # fmt: skip
    own = outcome.facts["unlearned_on_the_group"]
    assert found(outcome, 2, 0.0, "features + answers")[1] == own
    assert found(outcome, 2, 1.0, "answers alone")[1] != own
    assert found(outcome, 0, 1.0, "features alone")[1] != own
    assert "others_then_called_the_group" not in outcome.facts


def test_a_resnet_is_steered_at_its_pixels(tmp_path: Path) -> None:
    model = FAMILIES["resnet"]()
    places = [save(one, None, tmp_path / n, dtype="float32") for n, one in (("o", model), ("u", moved_copy(model)))]
    outcome = restoration(
        places[1], places[0], images(), images(18, 1), value=0, layers="1,4", alphas=[0.0, 1.0], measure="probability",
        random_sets=1, probe=False, **{**QUICK, "experts": 2},
    )  # fmt: skip
    arms = {row[0] for row in outcome.tables["accuracy on the group"].rows}
    assert arms == {"features", "random", "tail swap"}
    assert found(outcome, 4, 0.0, "features")[1] == outcome.facts["unlearned_on_the_group"]
    assert found(outcome, 4, 1.0, "features")[1] != outcome.facts["unlearned_on_the_group"]


def test_blocks_before_the_layer_run_as_often_for_one_alpha_as_for_many(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, counts = Calls.run, dict[int, int]()

    def counted(self: Calls, place: int, *args: Any, **kwargs: Any) -> Any:
        counts[place] = counts.get(place, 0) + 1
        return plain(self, place, *args, **kwargs)

    monkeypatch.setattr(Calls, "run", counted)
    run_on("moved", layers="1", alphas=[1.0])
    once = dict(counts)
    counts.clear()
    run_on("moved", layers="1", alphas=[1.0, 2.0, 5.0])
    assert counts[1] == once[1] and counts[3] > once[3]


def test_one_model_is_open_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from overhaul.pairs import Member

    plain, order = Member.opened, list[str]()

    def noted(self: Member, dtype: str = "float32") -> Any:
        from contextlib import contextmanager

        @contextmanager
        def watched() -> Any:
            order.append(f"open {self.role}")
            with plain(self, dtype) as model:
                yield model
            order.append(f"close {self.role}")

        return watched()

    monkeypatch.setattr(Member, "opened", noted)
    run_on("moved")
    each = [("open model", "close model"), ("open original", "close original"), ("open model", "close model")]
    assert order == [step for pair in each for step in pair]


def test_passes_leave_models_and_random_numbers_as_they_were() -> None:
    model, other = tiny_vit().train(), tiny_vit().train()
    before = torch.get_rng_state()
    groups = [images().filter(lambda row, own=own: (row["label"] == 0) == own) for own in (True, False)]
    data = Material(images(), 10, *groups)
    run = Run(
        alphas=[1.0], experts=3, experts_by="auroc", codes="linear", form="delta", random_sets=1, class_tokens=None,
        dictionary=Dictionary(k=4, autoencoder_steps=2, states=60), batch_size=16, seed=0, column=None,
    )  # fmt: skip
    unlearned = unlearned_pass(model, data, run, [1])
    with torch.random.fork_rng():
        source = original_pass(other, data, run, unlearned)
    steering_pass(model, data, run, unlearned, source)
    assert torch.equal(before, torch.get_rng_state()) and model.training and other.training
    assert not any(module._forward_hooks for module in model.modules())


# what is refused


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"value": 7},
            r"`train` needs rows of the forgotten group and others, and none of its 30 rows has 7 .*0, 1, 2",
        ),
        ({"column": "writer"}, r"row 1 of `train` has no column 'writer'.*'hand'"),
        ({"alphas": []}, r"alphas=\[\] is not possible"),
        ({"layers": "9"}, "has the blocks 0 to 3; there is no block 9"),
        ({"k": 40}, r"32 latents \(1 x 32 features\) has no room for k=40"),
        ({"experts": 20}, "20 experts beside as many random ones"),
        ({"column": "n", "value": 0, "probe": True}, "probe: false"),
    ],
)
def test_what_cannot_be_asked_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        run_on("moved", **changes)


def test_little_data_is_measured_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    knobs: dict[str, Any] = {**QUICK, "value": 0, "layers": "1", "alphas": [1.0], "random_sets": 1, "probe": False}
    models = folder("moved"), folder("original")
    done = restoration(*models, images(3), images(6, 1), **{**knobs, "states": 2000})
    assert 1 in done.layers["variance explained by the autoencoder"]
    assert 1 in restoration(*models, images(3), images(6, 1), **knobs).layers["dead latents, share"]
    with pytest.raises(RequestError, match="`train` has 3 states at layer 1 that carry features.*four or more"):
        restoration(*models, images(3), images(6, 1), **{**knobs, "states": 2})


def test_models_that_do_not_correspond_are_refused(tmp_path: Path) -> None:
    other = save(tiny_vit(num_hidden_layers=3), None, tmp_path / "other", dtype="float32")
    with pytest.raises(RequestError, match="4 blocks .* 3"):
        restoration(folder("moved"), other, images(), images(), value=0, **QUICK)


def test_a_text_without_a_prompt_is_refused() -> None:
    ids = torch.arange(3, 9)
    text = Examples([{"input_ids": ids, "labels": ids}], [{"label": 0}])
    with pytest.raises(RequestError, match="example 1 of `train` has no prompt"):
        restoration(folder("moved"), folder("original"), text, text, value=0)


def recipe_in(place: Path, steps: list[Any], **materials: Any) -> dict[str, Any]:
    """A recipe on files."""
    for name, examples in (("train", images()), ("test", images(18, 1))):
        pairs = zip(examples.rows, examples.items, strict=True)
        rows = [{**row, "image": item["pixel_values"].tolist()} for row, item in pairs]
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = {name: {"from": str(place / f"{name}.jsonl")} for name in ("train", "test")}
    materials = {"original": {"model": str(folder("original"))}, **sources, **materials}
    return {"model": str(folder("moved")), "materials": materials, "steps": steps}


def plan(place: Path, materials: Any = None, **knobs: Any) -> Plan:
    return planned(recipe_in(place, [{"inspect.restoration": knobs}], **(materials or {})))


def test_a_plan_finds_what_is_wrong_before_a_weight_is_read(tmp_path: Path) -> None:
    assert plan(tmp_path, value=0).steps[0].name == "inspect.restoration"
    with pytest.raises(RequestError, match="none of its 30 rows has 8"):
        plan(tmp_path, value=8)
    with pytest.raises(RequestError, match="there is no block 4"):
        plan(tmp_path, value=0, layers="4")


def test_a_plan_reads_files_of_tensors(tmp_path: Path) -> None:
    save_file({"9.W": torch.zeros(2)}, tmp_path / "odd.safetensors")
    with pytest.raises(RequestError, match="no autoencoder that can be read: W"):
        plan(tmp_path, {"autoencoders": {"tensors": str(tmp_path / "odd.safetensors")}}, value=0)
    with pytest.raises(RequestError, match="'autoencoders', tensors: .*train.jsonl is no safetensors file"):
        plan(tmp_path, {"autoencoders": {"tensors": str(tmp_path / "train.jsonl")}}, value=0)
    with pytest.raises(RequestError, match="autoencoders reads tensors, but the material 'autoencoders' is a model"):
        plan(tmp_path, {"autoencoders": {"model": str(folder("moved"))}}, value=0)
    save_file({"a": torch.zeros(2)}, tmp_path / "odd.safetensors")
    with pytest.raises(RequestError, match="original reads a model, but the material 'original' is tensors"):
        plan(tmp_path, {"original": {"tensors": str(tmp_path / "odd.safetensors")}}, value=0)


@pytest.mark.smoke
def test_a_later_step_reads_the_autoencoders_of_an_earlier_one_or_of_a_file(tmp_path: Path) -> None:
    first = {"value": 0, "layers": "1", "alphas": [5.0], "probe": False, "measure": "probability", **QUICK}
    again = {"inspect.restoration": {**first, "autoencoder_steps": 1, "autoencoders": "kept"}}
    kept = {"made": "inspect.restoration", "name": "autoencoders"}
    done = run(recipe_in(tmp_path, [{"inspect.restoration": first}, again], kept=kept), tmp_path / "run")
    one, two = (step["tables"]["probability on the group"] for step in done.report["steps"])
    assert one == two
    file = min((tmp_path / "run").rglob("autoencoders.safetensors"))
    (tmp_path / "own.safetensors").write_bytes(file.read_bytes())
    recipe = recipe_in(tmp_path, [again], kept={"tensors": str(tmp_path / "own.safetensors")})
    read = run(recipe, tmp_path / "second").report["steps"][0]
    assert read["tables"]["probability on the group"] == one
    mixed = {name: value.flip(0) if value.ndim == 2 else value for name, value in load_file(file).items()}
    save_file(mixed, tmp_path / "own.safetensors")
    changed = run(recipe, tmp_path / "second").report["steps"][0]  # the file is another: the step runs again
    assert changed["tables"]["probability on the group"] != one
