from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import FAMILIES, examples_for, tiny_gpt2, tiny_llama
from contract import Case
from overhaul.data.examples import Examples, collate
from overhaul.errors import RequestError, RunError
from overhaul.forward import forward
from overhaul.selectors import select
from overhaul.shrink.prune import Rule, inverse_root, lowest, magnitude, prune, sparsegpt, wanda
from overhaul.stack import LayerStack
from tracing import hooks_of

CRITERIA: Any = ["magnitude", "wanda", "sparsegpt"]
CASE = Case(
    method=prune,
    materials=lambda: {"model": tiny_llama(initializer_range=0.3), "text": examples_for("llama", 8)},
    knobs={"criterion": "sparsegpt", "samples": 6, "batch_size": 2, "columns": 16},
    varied={
        "criterion": ("wanda", "sparsegpt"), "sparsity": (0.3, 0.5), "pattern": ("unstructured", "2:4"),
        "scope": ("row", "matrix"), "targets": ("attention", "mlp"), "blocks": ("0", "last:2"), "samples": (2, 6),
        "dampening": (0.01, 1.0), "columns": (8, 16),
    },
    idle={"batch_size": "what enters a layer is summed over tokens, however they are batched"},
    moves=r"_proj\.weight$",
)  # fmt: skip


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(tokens: int, width: int) -> Tensor:
    """Inputs that depend on each other and differ in size."""
    return drawn(tokens, width, seed=1) @ drawn(width, width, seed=2) * torch.linspace(0.2, 3, width)


def shown(mask: Tensor) -> list[str]:
    return ["".join("x" if pruned else "." for pruned in row) for row in mask.tolist()]


@torch.no_grad()
def logits(model: nn.Module, examples: Examples) -> Tensor:
    return forward(model, collate(examples.items))


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def case(criterion: Any = "sparsegpt", **knobs: Any) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    given = CASE.made()
    return given["model"], prune(**given, criterion=criterion, **knobs)


# the papers' codes on the same tensors


def fixed() -> tuple[Tensor, Tensor]:
    """A weight [4, 8] and inputs [40, 8] that come from no generator."""
    i, j, t = torch.arange(4.0)[:, None], torch.arange(8.0)[None], torch.arange(40.0)[:, None]
    weight = torch.sin(3 * i + j * j + 0.5) + 0.1 * i
    return weight, torch.cos(t * (j + 1) * 0.37 + j * j) * (1 + j) + torch.sin(t * 1.3)


def test_wanda_is_what_locuslab_wanda_gives() -> None:
    weight, given = fixed()
    squares = given.square().sum(0)
    assert shown(wanda(weight, squares, Rule(0.5, by_row=True))) == ["xx.x.x..", "xx.x.x..", "x..xxx..", "xx.x.x.."]
    assert shown(wanda(weight, squares, Rule(0.3, by_row=True))) == ["x..x....", "x..x....", "x...x...", "x..x...."]
    assert shown(wanda(weight, squares, Rule(0.5, "2:4"))) == ["x..xxx.."] * 4


def test_magnitude_is_what_locuslab_wanda_gives_but_for_its_one_weight_too_many() -> None:
    weight, _ = fixed()
    theirs = ["x..x.x..", "x..x.x..", "x.xxxx.x", "xx.xxx.."]
    ours = magnitude(weight, Rule(0.5))
    assert int(ours.sum()) == 16 and sum(row.count("x") for row in theirs) == 17
    one_too_many = torch.tensor([[pruned == "x" for pruned in row] for row in theirs]) & ~ours
    assert float(weight[one_too_many].abs()) == float(weight.abs().flatten().sort().values[16])
    assert shown(magnitude(weight, Rule(0.5, "4:8"))) == ["x..x.x.x", "x..xxx..", "x..xxx..", "xx.x.x.."]


UNSTRUCTURED = [
    [0.0, 1.0739, -0.9335, 0.0, 0.0, 0.0, -0.9026, -0.6879], [0.0, -0.9175, 1.015, 0.0, 0.0, 0.0, 1.0655, 0.8963],
    [0.0, 1.2041, -0.6416, 0.4181, 0.0, 0.0, -0.7699, -0.655], [0.0, 0.0, 1.0939, 0.0, 0.0, 0.0, 1.3216, 1.2524],
]  # fmt: skip
TWO_OF_FOUR = [
    *UNSTRUCTURED[:2],
    [0.0, 1.2041, -0.6416, 0.0, 0.0, 0.0, -0.7623, -0.6509], [0.0, -0.5439, 1.1244, 0.0, 0.0, 0.0, 1.3333, 1.2641],
]  # fmt: skip


@pytest.mark.parametrize(("pattern", "expected"), [("unstructured", UNSTRUCTURED), ("2:4", TWO_OF_FOUR)])
def test_sparsegpt_is_what_ist_daslab_sparsegpt_gives_with_exact_counts(pattern: Any, expected: Any) -> None:
    weight, given = fixed()
    new, mask = sparsegpt(weight, given.T @ given, Rule(0.5, pattern, columns=4))
    torch.testing.assert_close(new, torch.tensor(expected), atol=1e-4, rtol=0)
    assert torch.equal(mask, torch.tensor(expected) == 0)


# the equations


def test_the_rule_counts_exactly_and_keeps_the_pattern() -> None:
    score = drawn(12, 40).abs()
    for sparsity in (0.01, 0.29, 0.5, 0.999):
        assert int(lowest(score, Rule(sparsity)).sum()) == int(round(480 * sparsity, 6))
        assert set(lowest(score, Rule(sparsity, by_row=True)).sum(1).tolist()) == {int(round(40 * sparsity, 6))}
    for pattern, run in (("2:4", 4), ("4:8", 8)):
        pruned = lowest(score, Rule(0.5, pattern)).view(12, -1, run)
        assert bool((pruned.sum(2) == run // 2).all())
        kept = score.view(12, -1, run)
        assert bool((kept.masked_fill(~pruned, 0).amax(2) <= kept.masked_fill(pruned, 9).amin(2)).all())
    assert shown(lowest(torch.ones(2, 4), Rule(0.5, by_row=True))) == ["xx..", "xx.."]  # ties: the first
    assert shown(lowest(torch.ones(2, 4), Rule(0.5))) == ["xxxx", "...."]


def test_wanda_on_inputs_of_one_norm_is_magnitude_in_each_row() -> None:
    weight = drawn(12, 40)
    for rule in (Rule(0.3, by_row=True), Rule(0.6), Rule(0.5, "2:4")):
        assert torch.equal(wanda(weight, torch.full((40,), 7.0), rule), magnitude(weight, rule))
    other = wanda(weight, torch.linspace(0.1, 9, 40), Rule(0.3, by_row=True))
    assert not torch.equal(other, magnitude(weight, Rule(0.3, by_row=True)))


def test_the_root_inverts_the_dampened_hessian() -> None:
    gram = inputs(30, 12).T @ inputs(30, 12)
    root = inverse_root(gram, 0.1).double()
    dampened = gram.double() + 0.1 * gram.double().diagonal().mean() * torch.eye(12)
    torch.testing.assert_close(root.T @ root @ dampened, torch.eye(12).double(), atol=1e-3, rtol=0)
    assert torch.equal(root, root.triu())


def test_the_last_weights_make_up_for_one_that_goes_as_well_as_least_squares() -> None:
    """With one column pruned and no dampening, the update is the optimum of the columns after it, row by row."""
    given = inputs(200, 8).double()
    weight = drawn(3, 8).double()
    weight[:, 0] = 1e-3  # the one with the lowest score in every row
    new, mask = sparsegpt(weight, given.T @ given, Rule(1 / 8, by_row=True, dampening=0.0))
    assert shown(mask) == ["x......."] * 3
    best = torch.linalg.lstsq(given[:, 1:], given @ weight.T).solution.T
    torch.testing.assert_close(new[:, 1:], best, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("rule", [Rule(0.5, columns=16), Rule(0.7, columns=64), Rule(0.5, "2:4", columns=16)])
def test_compensation_lowers_the_error_of_what_the_layer_gives(rule: Rule) -> None:
    given, weight = inputs(300, 64), drawn(24, 64)
    new, mask = sparsegpt(weight, given.T @ given, rule)

    def error(changed: Tensor) -> float:
        return float((given @ (changed - weight).T).square().sum())

    assert error(new) < 0.9 * error(weight.masked_fill(mask, 0))
    by_inputs = wanda(weight, given.square().sum(0), rule)
    assert error(weight.masked_fill(by_inputs, 0)) < error(weight.masked_fill(magnitude(weight, rule), 0))


def test_an_input_that_was_always_zero_goes_first() -> None:
    given, weight = inputs(100, 16), drawn(6, 16)
    given[:, 3] = 0
    weight[:, 3] = 99
    gram, rule = given.T @ given, Rule(0.25, by_row=True)
    assert bool(sparsegpt(weight, gram, rule)[1][:, 3].all()) and bool(
        wanda(weight, given.square().sum(0), rule)[:, 3].all()
    )
    gram.zero_()  # all inputs: as many go as were asked for, the others keep their weights
    new, mask = sparsegpt(weight, gram, rule)
    assert int(mask.sum()) == 24 and torch.equal(new, weight.masked_fill(mask, 0))


# whole models


def by_hand(model: nn.Module, examples: Examples, criterion: str, sparsity: float) -> None:
    """Block after block with plain hooks on the whole model, each run anew with all blocks before it pruned."""
    for block in LayerStack.of(model).blocks:
        layers = [
            module for module in block.modules() if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
        ]
        given: dict[Any, Tensor] = {}
        hooks = [
            layer.register_forward_pre_hook(
                lambda layer, args, to=given: to.update([(layer, args[0].flatten(0, -2))])  # pyright: ignore
            )
            for layer in layers
        ]
        batch = collate(examples.items)
        with torch.no_grad():
            forward(model, batch)
        for hook in hooks:
            hook.remove()
        for layer in layers:
            rows = given[layer][batch["attention_mask"].flatten().bool()] if "attention_mask" in batch else given[layer]
            stored: Any = layer.weight.data  # pyright: ignore[reportAttributeAccessIssue]
            weight = stored.T if type(layer).__name__ == "Conv1D" else stored
            if criterion == "sparsegpt":
                weight.copy_(sparsegpt(weight.clone(), rows.T @ rows, Rule(sparsity))[0])
            else:
                for row in weight:
                    row[(row.abs() * rows.norm(dim=0)).argsort(stable=True)[: int(len(row) * sparsity)]] = 0


@pytest.mark.parametrize("criterion", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "vit"])
def test_streamed_is_what_the_whole_model_gives_with_the_blocks_before_pruned(family: str, criterion: Any) -> None:
    torch.manual_seed(3)
    model, examples = FAMILIES[family](initializer_range=0.3), examples_for(family, 6)
    expected = copy.deepcopy(model)
    outcome = prune(model, examples, criterion=criterion, sparsity=0.4, batch_size=6)
    by_hand(expected, examples.shuffled(torch.initial_seed()), criterion, 0.4)
    if criterion == "wanda":
        changed = weights(expected)
        assert all(torch.equal(value, changed[name]) for name, value in weights(model).items())
    assert outcome.facts["sparsity"] == pytest.approx(0.4, abs=0.03)  # rows of 32 and 48 round down
    torch.testing.assert_close(logits(model, examples), logits(expected, examples), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("family", ["llama", "gpt2", "vit"])
def test_masks_say_what_is_zero_and_nothing_else_changes(family: str, criterion: Any) -> None:
    model, examples = FAMILIES[family](initializer_range=0.3).train(), examples_for(family, 6)
    before, state = weights(model), torch.get_rng_state()
    outcome = prune(model, examples, criterion=criterion, batch_size=4)
    masks, after = outcome.made["masks"], weights(model)
    assert outcome.model is model and all(module.training for module in model.modules())
    assert not hooks_of(model) and torch.equal(torch.get_rng_state(), state)
    assert set(masks) == {f"{name}.weight" for name in select(model, "projections").modules}
    for name, value in after.items():
        if name not in masks:
            assert torch.equal(value, before[name])
        else:
            assert torch.equal(masks[name] == 0, value == 0) and masks[name].dtype == torch.uint8
            kept = masks[name].bool()
            assert torch.equal(value[kept], before[name][kept]) == (criterion != "sparsegpt")
    pruned = sum(int((mask == 0).sum()) for mask in masks.values())
    assert outcome.facts["pruned_weights"] == pruned == sum(mask.numel() for mask in masks.values()) // 2
    assert outcome.facts["sparsity"] == 0.5
    assert outcome.facts["sparsity_of_model"] == pruned / sum(p.numel() for p in model.parameters())
    assert outcome.layers["pruned share"] == {depth: 0.5 for depth in range(4)}
    assert outcome.facts["speed"] == "zeros alone make neither a file smaller nor dense kernels faster"


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("pattern", ["2:4", "4:8"])
@pytest.mark.parametrize("new", [tiny_llama, tiny_gpt2])
def test_every_run_of_inputs_has_the_pattern(new: Any, pattern: Any, criterion: Any) -> None:
    model = new(initializer_range=0.3)
    prune(model, examples_for("llama", 6), criterion=criterion, pattern=pattern, columns=16)
    run = int(pattern[-1])
    for name in select(model, "projections").modules:
        layer: Any = model.get_submodule(name)
        weight = layer.weight.T if type(layer).__name__ == "Conv1D" else layer.weight
        zeros = (weight == 0).reshape(len(weight), -1, run).sum(2)
        assert bool((zeros == run // 2).all())


def test_targets_and_blocks_are_pruned_alone_and_the_batch_size_does_not_matter() -> None:
    model, outcome = case("wanda", targets="mlp.down, attention.v", blocks="1,last:1", batch_size=1)
    again, same = case("wanda", targets="mlp.down, attention.v", blocks="1,last:1", batch_size=8)
    names = [f"model.layers.{n}.{part}.weight" for n in (1, 3) for part in ("self_attn.v_proj", "mlp.down_proj")]
    assert list(outcome.made["masks"]) == names and list(outcome.layers["pruned share"]) == [1, 3]
    assert all(torch.equal(mask, same.made["masks"][name]) for name, mask in outcome.made["masks"].items())
    torch.testing.assert_close(weights(model), weights(again), atol=1e-4, rtol=1e-4)


def test_seeds_draw_other_samples() -> None:
    def drawn_with(seed: int) -> Tensor:
        torch.manual_seed(seed)
        model = tiny_llama()
        model.load_state_dict(start)
        torch.manual_seed(seed)
        return prune(model, examples, samples=2).made["masks"]["model.layers.0.mlp.down_proj.weight"]

    start, examples = tiny_llama(initializer_range=0.3).state_dict(), examples_for("llama", 8)
    assert torch.equal(drawn_with(1), drawn_with(1)) and not torch.equal(drawn_with(1), drawn_with(2))


@pytest.mark.parametrize("criterion", CRITERIA)
def test_half_precision_keeps_its_zeros_and_its_type(criterion: Any) -> None:
    model = tiny_llama(initializer_range=0.3).bfloat16()
    outcome = prune(model, examples_for("llama", 6), criterion=criterion)
    for name, mask in outcome.made["masks"].items():
        weight = model.get_parameter(name)
        assert weight.dtype == torch.bfloat16 and not weight[mask == 0].any()


# what is refused


def test_what_cannot_be_pruned_is_refused() -> None:
    model, examples = tiny_llama(), examples_for("llama", 4)
    before = weights(model)
    for knobs, message in (
        ({"criterion": "wanda", "text": None}, r"`text` is missing or empty. Give it, or write criterion: magnitude"),
        ({"pattern": "2:4", "sparsity": 0.6}, r"pattern '2:4' zeroes half of the weights, and sparsity=0.6"),
        ({"pattern": "4:8", "criterion": "sparsegpt", "columns": 20}, r"columns=20 cuts runs of 8 in two"),
        ({"targets": "norms"}, r"has .*layernorm .*, which is no linear layer inside a block"),
        ({"targets": "head"}, r"has lm_head \(Linear\), which is no linear layer inside a block"),
        ({"blocks": "9"}, r"has the blocks 0 to 3"),
        ({"sparsity": 1e-6}, r"sparsity=1e-06 is less than one weight"),
    ):
        with pytest.raises(RequestError, match=message):
            prune(**{"model": model, "text": examples, **knobs})  # pyright: ignore[reportArgumentType]
    with pytest.raises(RequestError, match=r"attention.q of block 0 is only a part of transformer.h.0.attn.c_attn"):
        prune(tiny_gpt2(), examples, targets="attention.q")
    with pytest.raises(RequestError, match=r"has 30 inputs, which are no whole runs of 4"):
        prune(tiny_llama(intermediate_size=30), examples, pattern="2:4")
    with pytest.raises(RequestError, match=r"has no projections"):
        prune(FAMILIES["resnet"](), examples_for("resnet", 4))
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())


def test_pruning_what_is_pruned_already_is_no_success() -> None:
    model = tiny_llama()
    prune(model, criterion="magnitude")
    with pytest.raises(RunError, match=r"weights that magnitude chose were zero before, so nothing changed"):
        prune(model, criterion="magnitude", sparsity=0.4)


def test_what_cannot_be_inverted_or_is_not_finite_stops_with_words() -> None:
    model: Any = tiny_llama(initializer_range=0.3)
    with pytest.raises(RunError, match=r"cannot be inverted with dampening=0"):
        prune(model, examples_for("llama", 1), criterion="sparsegpt", dampening=0.0)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.inf
    with pytest.raises(RunError, match=r"not finite"):
        prune(model, examples_for("llama", 4), criterion="wanda")
