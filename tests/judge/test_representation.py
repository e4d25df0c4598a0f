"""Lens, probe, CKA and patching: exact on tiny models of several families, and telling what hides from what forgot."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import families
from conftest import examples_for, tiny_gpt2, tiny_llama, tiny_resnet, tiny_vit
from overhaul.claims._people import Size, World, build
from overhaul.data.encode import encode_qa, encode_text
from overhaul.data.examples import IGNORED, Encoded, Examples
from overhaul.errors import RequestError, RunError
from overhaul.fit import fit
from overhaul.forward import forward
from overhaul.judge.likelihood import loss_score, score
from overhaul.judge.representation import Depth, cka, depth, lens, probe
from overhaul.objectives import cross_entropy
from overhaul.stack import LayerStack
from tracing import hooks_of

LANGUAGE = ["Llama", "GPT-2", "GPT-NeoX", "Gemma2", "OPT", "Bloom"]
SMALL = Size(people=8, forgotten=3, holdout=1, hidden=48, blocks=3, steps=80, batch=20, lr=5e-3)


def own(model: nn.Module, examples: Examples) -> list[float]:
    return [loss_score(one) for one in score(model, examples)]


def redrawn(model: nn.Module, *parts: str) -> nn.Module:
    """A copy with other weights where a name contains one of these."""
    other = copy.deepcopy(model)
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, weight in other.named_parameters():
            if any(part in name for part in parts):
                weight.copy_(torch.randn(weight.shape, generator=draw) * 0.3)
    return other


# lens


@pytest.mark.parametrize("name", LANGUAGE)
def test_the_last_layer_of_the_lens_is_the_models_own_answer(name: str) -> None:
    model, examples = families.FAMILIES[name].build(), examples_for("llama", 20)
    seen = lens(model, examples)
    assert len(seen.logp) == len(LayerStack.of(model)) + 1
    assert seen.logp[-1] == pytest.approx(own(model, examples), abs=1e-5)
    assert seen.whole[-1] == [bool(one.hits.all()) for one in score(model, examples)]
    assert seen.probability[-1] == pytest.approx(sum(map(math.exp, seen.logp[-1])) / 20)
    assert max(abs(a - b) for a, b in zip(seen.logp[1], seen.logp[-1], strict=True)) > 1e-3


def test_a_layer_of_the_lens_is_what_the_model_says_when_the_blocks_after_it_are_left_out() -> None:
    model, examples = families.FAMILIES["Llama"].build(), examples_for("llama", 10)
    seen, stack = lens(model, examples), LayerStack.of(model)
    for layer in (1, 2, 3):
        with stack.skipping(range(layer, 4)):
            assert seen.logp[layer] == pytest.approx(own(model, examples), abs=1e-5)


def test_an_image_is_an_answer_of_one_token() -> None:
    model, examples = tiny_vit(), examples_for("vit", 12)
    seen = lens(model, examples)
    assert seen.logp[-1] == pytest.approx(own(model, examples), abs=1e-5)
    logits = forward(model, {"pixel_values": torch.stack([item["pixel_values"] for item in examples.items])})
    assert seen.whole[-1] == [int(row.argmax()) == int(i["labels"]) for row, i in zip(logits, examples, strict=True)]


def test_blocks_in_stages_a_model_without_blocks_and_no_answers_are_refused() -> None:
    few = examples_for("llama", 2)
    with pytest.raises(RequestError, match="stages of other shapes"):
        lens(tiny_resnet(), examples_for("resnet", 2))
    with pytest.raises(RequestError, match="no list of repeated blocks"):
        lens(nn.Sequential(nn.Embedding(4, 4), nn.Linear(4, 4)), few)
    with pytest.raises(RequestError, match="no examples"):
        lens(tiny_llama(), few[:0])
    silent = {**few.items[1], "labels": torch.full_like(few.items[1]["labels"], IGNORED)}
    with pytest.raises(RequestError, match="Example 1 has no token that carries loss"):
        lens(tiny_llama(), replace(few, items=[few.items[0], silent]))


# similarity


def rows_of(model: nn.Module, examples: Examples) -> list[Tensor]:
    """The states that predict answer tokens, by the library's own `output_hidden_states`; its last one is normed."""
    found: list[list[Tensor]] = []
    for item in examples.items:
        with torch.no_grad():
            states: Any = model(input_ids=item["input_ids"][None], output_hidden_states=True).hidden_states
        keep = item["labels"][1:] != IGNORED
        found.append([state[0, :-1][keep] for state in states[:-1]])
    return [torch.cat(layer).double() for layer in zip(*found, strict=True)]


def gram_cka(first: Tensor, second: Tensor) -> float:
    """CKA by the matrices of samples against samples."""
    centre = torch.eye(len(first), dtype=torch.float64) - 1 / len(first)
    one, two = (centre @ each @ each.T @ centre for each in (first, second))
    return float((one * two).sum() / (one.norm() * two.norm()))


@pytest.mark.parametrize("name", LANGUAGE)
def test_a_model_is_like_itself_and_less_like_another(name: str) -> None:
    model, examples = families.FAMILIES[name].build(), examples_for("llama", 20)
    assert cka(model, model, examples) == pytest.approx([1.0] * 5)
    stranger = redrawn(model, *(f".{n}." for n in (2, 3)))
    alike = cka(model, stranger, examples)
    assert alike[:3] == pytest.approx([1.0] * 3)
    assert max(alike[3:]) < 0.98


@pytest.mark.parametrize("tokens", [8, 4096])
def test_summed_over_batches_cka_is_its_form_over_samples(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("overhaul.judge._layers.budget", lambda _: tokens)
    examples = examples_for("llama", 15)
    one, two = tiny_llama(), tiny_llama(hidden_size=48)
    expected = [gram_cka(*pair) for pair in zip(rows_of(one, examples), rows_of(two, examples), strict=True)]
    assert cka(one, two, examples)[:-1] == pytest.approx(expected, abs=1e-5)
    assert all(0.1 < value < 0.99 for value in expected)


def test_cka_does_not_see_rotation_and_scale_and_sees_a_stretch() -> None:
    from overhaul.judge._layers import Products

    first = torch.randn(40, 6, dtype=torch.float64) + 100
    second = first[:, :4] ** 2 / 50 + torch.randn(40, 4, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q

    def of(one: Tensor, two: Tensor) -> float:
        products = Products(one[0], two[0])
        for part in (slice(0, 7), slice(7, 40)):
            products.add(one[part], two[part])
        return products.cka()

    assert of(first, second) == pytest.approx(gram_cka(first, second), abs=1e-9)
    assert of(7 * first @ rotation + 3, second) == pytest.approx(of(first, second), abs=1e-9)
    assert of(first @ rotation, first) == pytest.approx(1.0, abs=1e-9)
    assert abs(of(first * torch.tensor([9.0, 1, 1, 1, 1, 1]), second) - of(first, second)) > 1e-2


def test_models_of_other_widths_compare_and_of_other_depths_do_not() -> None:
    wide, deep = tiny_llama(hidden_size=48), tiny_llama(num_hidden_layers=5)
    examples = examples_for("llama", 10)
    assert all(0 < value < 1 for value in cka(tiny_llama(), wide, examples))
    for compare in (cka, depth):
        with pytest.raises(RequestError, match="have 4 and 5 blocks"):
            compare(tiny_llama(), deep, examples)
    with pytest.raises(RequestError, match="only where both are of one width"):
        depth(wide, tiny_llama(), examples)


def test_where_all_samples_are_alike_there_is_no_similarity() -> None:
    item: Encoded = {"input_ids": torch.tensor([5, 6, 7]), "labels": torch.tensor([IGNORED, IGNORED, 7])}
    same = Examples([item] * 4, [{}] * 4)
    assert all(map(math.isnan, cka(tiny_llama(), tiny_llama(), same)))


def test_images_are_compared_through_stages() -> None:
    model, examples = tiny_resnet(), examples_for("resnet", 12)
    assert cka(model, model, examples) == pytest.approx([1.0] * 7)


# patching


@pytest.mark.parametrize("name", LANGUAGE)
def test_patched_by_itself_nothing_changes_and_by_another_it_ends_as_that_one(name: str) -> None:
    model, examples = families.FAMILIES[name].build(), examples_for("llama", 12)
    mean = sum(own(model, examples)) / 12
    same = depth(model, copy.deepcopy(model), examples)
    assert same.curve == [same.original] * 5
    assert same.original == pytest.approx(mean, abs=1e-5)
    assert math.isnan(same.gone)
    other = redrawn(model, ".2.")
    found = depth(other, model, examples)
    assert found.curve[:3] == [same.original] * 3  # norm, head and the first two blocks are the same
    assert found.curve[-1] == pytest.approx(sum(own(other, examples)) / 12, abs=1e-5)
    assert found.curve[3] == pytest.approx(found.curve[4], abs=1e-5)
    assert abs(found.curve[4] - same.original) > 1e-3


def test_images_are_patched_through_stages() -> None:
    model, examples = tiny_resnet(), examples_for("resnet", 6)
    other = redrawn(model, "stages.1.layers.2")
    found = depth(other, model, examples)
    assert found.curve[:-1] == [found.original] * 6
    assert found.curve[-1] == pytest.approx(sum(own(other, examples)) / 6, abs=1e-5)


def test_gone_is_from_where_the_curve_stays_below_the_middle() -> None:
    assert Depth(-1.0, [-1.0, -1.0, -3.0, -3.0, -3.0]).gone == 0.5
    assert Depth(-1.0, [-3.0, -1.0, -3.0]).gone == 1.0  # what comes back was not gone
    assert Depth(-1.0, [-2.5, -3.0, -3.0]).gone == 0.0
    assert math.isnan(Depth(-1.0, [-1.0, -3.0, -1.0]).gone)


# probe


def coloured(count: int, seed: int, offset: float = 4.0) -> Examples:
    """Images of noise, brighter by class, with the class in the item and its name in the row."""
    draw = torch.Generator().manual_seed(seed)
    items = [
        {"pixel_values": torch.randn(1, 8, 8, generator=draw) + offset * (n % 3), "labels": torch.tensor(n % 3)}
        for n in range(count)
    ]
    return Examples(items, [{"name": "abc"[n % 3]} for n in range(count)])


@pytest.mark.parametrize("build_model", [tiny_vit, tiny_resnet])
def test_classes_that_differ_are_told_apart_and_classes_that_do_not_are_not(
    build_model: Callable[[], nn.Module],
) -> None:
    model = build_model()
    found = probe(model, coloured(30, 0), coloured(30, 1))
    assert len(found.accuracy) == len(LayerStack.of(model)) + 1
    assert min(found.accuracy) > 0.9
    assert set(found.recall) == {0, 1, 2}
    for layer, share in enumerate(found.accuracy):
        assert sum(each[layer] for each in found.recall.values()) / 3 == pytest.approx(share)
    assert found.majority == pytest.approx(1 / 3)
    assert max(found.shuffled) < 0.8
    assert probe(model, coloured(30, 0), coloured(30, 1), by="name").accuracy == found.accuracy
    assert max(probe(model, coloured(30, 0, 0.0), coloured(60, 1, 0.0)).accuracy) < 0.65


def test_a_probe_reads_the_last_prompt_token_and_no_answer() -> None:
    """The answer spells the label; prompts say nothing, so only a look at the answer could tell."""
    items = [
        {"input_ids": torch.tensor([1, 9, 5, 40 + n % 2]), "labels": torch.tensor([IGNORED] * 3 + [40 + n % 2])}
        for n in range(24)
    ]
    rows = [{"kind": n % 2} for n in range(24)]
    blind = probe(tiny_gpt2(), Examples(items, rows), Examples(items, rows), by="kind")
    assert blind.accuracy == [0.5] * 5
    for n, item in enumerate(items):
        item["input_ids"][1] = 30 + n % 2
    told = probe(tiny_gpt2(), Examples(items, rows), Examples(items, rows), by="kind")
    assert told.accuracy[0] == 0.5 and told.accuracy[1:] == [1.0] * 4  # attention has carried it to the last token


def test_labels_that_no_probe_can_learn_are_refused(tokenizer: Any) -> None:
    model, train = tiny_vit(), coloured(9, 0)
    with pytest.raises(RequestError, match="1 has 1 training examples"):
        probe(model, train.select([0, 1, 2, 3, 5]), train)
    with pytest.raises(RequestError, match="2 has 0 training examples"):
        probe(model, train.select([0, 1, 3, 4]), train)
    with pytest.raises(RequestError, match="have 0 alone"):
        probe(model, train.select([0, 3, 6]), train)
    with pytest.raises(RequestError, match="Row 0 has no column 'person'"):
        probe(model, train, train, by="person")
    with pytest.raises(RequestError, match="name the row column"):
        probe(tiny_llama(), examples_for("llama", 4), examples_for("llama", 4))
    texts = encode_text([{"text": "a lantern", "kind": 0}], tokenizer)
    with pytest.raises(RequestError, match="texts have none"):
        probe(tiny_llama(), texts, texts, by="kind")


# what all of them promise


def test_models_and_random_state_are_left_as_they_were() -> None:
    model, other = tiny_llama(attention_dropout=0.5).train(), tiny_llama().train()
    model.get_submodule("model.layers.1").eval()
    modes = [module.training for module in model.modules()]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state, examples = torch.get_rng_state(), examples_for("llama", 8)
    labelled = replace(examples, rows=[{"kind": n % 2} for n in range(8)])
    for _ in range(2):
        lens(model, examples)
        cka(model, other, examples)
        depth(model, other, examples)
        probe(model, labelled, labelled, by="kind")
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not hooks_of(model) and not hooks_of(other)
    assert not any("forward" in vars(module) for module in model.modules())


def test_values_do_not_change_with_batches_and_order(monkeypatch: pytest.MonkeyPatch) -> None:
    model, other, examples = tiny_llama(), tiny_llama(), examples_for("llama", 10)
    whole, curve = lens(model, examples).logp, depth(other, model, examples).curve
    monkeypatch.setattr("overhaul.judge._layers.budget", lambda _: 8)
    order = torch.randperm(10).tolist()
    small = lens(model, examples.select(order)).logp
    for layer, parts in zip(whole, small, strict=True):
        assert parts == pytest.approx([layer[i] for i in order], abs=1e-5)
    assert depth(other, model, examples.select(order)).curve == pytest.approx(curve, abs=1e-5)


def test_a_model_that_is_broken_is_named_so() -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.down_proj.weight").fill_(math.nan)
    looks: tuple[Callable[[Examples], object], ...] = (
        lambda data: lens(model, data),
        lambda data: cka(model, model, data),
        lambda data: depth(model, model, data),
    )
    for look in looks:
        with pytest.raises(RunError, match="not finite"):
            look(examples_for("llama", 3))


# a small world


@dataclass(frozen=True)
class Trained:
    """A world of people, and its original with the last block's MLP trained to say something else about some of them."""

    world: World
    hiding: nn.Module


@pytest.fixture(scope="module")
def trained() -> Trained:
    torch.set_num_threads(1)
    world = build(0, SMALL)
    hiding = copy.deepcopy(world.original)
    rows = [{**row, "answer": row["wrong"][0]} for row in world.forget.rows]
    wrong = encode_qa(rows, world.tokenizer, prompt="{question}")
    last = f"layers.{SMALL.blocks - 1}.mlp"
    fit(
        hiding, [cross_entropy("wrong")], {"wrong": wrong}, steps=40, batch_size=30, lr=5e-3,
        trainable=lambda name: last in name,
    )  # fmt: skip
    return Trained(world, hiding)


def test_the_lens_finds_answers_in_the_original_and_none_where_there_are_none(trained: Trained) -> None:
    world = trained.world
    known = lens(world.original, world.forget).probability
    assert max(known) > 0.4
    destroyed = redrawn(world.original, "mlp", "self_attn")
    for ignorant in (world.retrained, destroyed):
        assert max(lens(ignorant, world.forget).probability) < max(known) - 0.1


def test_what_hides_has_depth_at_the_end_and_the_retrained_model_early(trained: Trained) -> None:
    world = trained.world
    hidden = depth(trained.hiding, world.original, world.forget)
    assert hidden.curve[-1] < hidden.original - 0.1
    assert hidden.gone == 1.0
    assert depth(world.retrained, world.original, world.forget).gone <= 0.5


def test_the_lens_shows_that_what_hides_knows_more_than_it_says(trained: Trained) -> None:
    hidden = lens(trained.hiding, trained.world.forget)
    assert hidden.best == SMALL.blocks - 1
    assert hidden.probability[hidden.best] > hidden.probability[-1] + 0.03
    assert lens(trained.world.original, trained.world.forget).best == SMALL.blocks


def test_what_hides_is_like_the_original_until_its_last_block(trained: Trained) -> None:
    alike = cka(trained.hiding, trained.world.original, trained.world.forget)
    assert alike[:-1] == pytest.approx([1.0] * SMALL.blocks)
    assert alike[-1] < 0.97
