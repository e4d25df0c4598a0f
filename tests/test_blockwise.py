from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import examples_for, hidden_states, tiny_llama
from families import FAMILIES
from overhaul import session
from overhaul.blockwise import Site, blockwise
from overhaul.errors import RequestError, RunError
from overhaul.forward import forward
from overhaul.stack import LayerStack
from overhaul.stack.calls import invoke
from overhaul.trace import measure, statistics


def tensors(value: Any) -> list[Tensor]:
    """All tensors of a model's output, in order."""
    if isinstance(value, Tensor):
        return [value]
    parts = value.to_tuple() if hasattr(value, "to_tuple") else value
    return [tensor for part in parts for tensor in tensors(part)] if isinstance(parts, tuple | list) else []


def identical(one: Any, other: Any) -> bool:
    pairs = list(itertools.zip_longest(tensors(one), tensors(other)))
    return bool(pairs) and all(a is not None and b is not None and torch.equal(a, b) for a, b in pairs)


@torch.no_grad()
def scale(block: nn.Module, factor: float) -> None:
    for parameter in block.parameters():
        parameter.mul_(factor)


@torch.no_grad()
def outputs(site: Site) -> list[Any]:
    return [sample.finish(site.run(sample)) for sample in site.inputs]


@torch.no_grad()
def own_outputs(model: nn.Module, batches: list[dict[str, Any]]) -> list[Any]:
    return [invoke(model, batch) for batch in batches]


def llama_batches(count: int = 3) -> list[dict[str, Tensor]]:
    return [dict(batch, labels=batch["labels"]) for batch in examples_for("llama", 2 * count).batches(2)]


def batches_of(family: str) -> list[dict[str, Any]]:
    """Two batches of a family: its rows, and the same the other way round."""
    inputs = FAMILIES[family].inputs()
    rows = 2
    turned = {
        name: value.flip(0) if isinstance(value, Tensor) and value.shape[0] == rows else value
        for name, value in inputs.items()
    }
    return [inputs, turned]


@pytest.mark.parametrize("mode", ["uncut", "changed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_unchanged_pass_gives_the_models_own_output_bit_for_bit(family: str, mode: Any) -> None:
    model, batches = FAMILIES[family].build(), batches_of(family)
    expected = own_outputs(model, batches)
    stack = LayerStack.at(model, FAMILIES[family].stack)
    found: list[Any] = []
    places: list[int] = []
    for site in blockwise(stack, batches, mode):
        places.append(site.place)
        with torch.no_grad():
            assert all(
                identical(site.run(sample), target) for sample, target in zip(site.inputs, site.targets, strict=True)
            )
        if site.place == len(stack) - 1:
            found = outputs(site)
    assert places == list(range(len(stack)))
    assert len(found) == 2 and all(map(identical, found, expected))
    assert all(map(identical, own_outputs(model, batches), expected))


@pytest.mark.parametrize("family", FAMILIES)
def test_changed_inputs_are_those_of_the_changed_model_bit_for_bit(family: str) -> None:
    model, batches = FAMILIES[family].build(), batches_of(family)
    stack = LayerStack.at(model, FAMILIES[family].stack)
    found: list[Any] = []
    for site in blockwise(stack, batches, "changed"):
        scale(site.block, 0.7)
        if site.place == len(stack) - 1:
            found = outputs(site)
    changed = FAMILIES[family].build()
    for block in LayerStack.at(changed, FAMILIES[family].stack).blocks:
        scale(block, 0.7)
    assert all(map(identical, found, own_outputs(changed, batches)))
    assert not any(map(identical, found, own_outputs(FAMILIES[family].build(), batches)))


@pytest.mark.parametrize("mode", ["uncut", "changed"])
def test_inputs_follow_the_mode_and_targets_stay_those_of_the_uncut_model(mode: Any) -> None:
    model = tiny_llama()
    batches = llama_batches()
    uncut = [hidden_states(LayerStack.of(model), batch) for batch in batches]
    changed = copy.deepcopy(model)
    for block in LayerStack.of(changed).blocks:
        scale(block, 0.5)
    cut = [hidden_states(LayerStack.of(changed), batch) for batch in batches]
    for site in blockwise(LayerStack.of(model), batches, mode):
        scale(site.block, 0.5)
        expected = uncut if mode == "uncut" else cut
        entering = [sample.state[0] for sample in site.inputs]
        assert identical(entering, [states[site.place][0] for states in expected])
        assert identical([target[0] for target in site.targets], [states[site.place][1] for states in uncut])


@pytest.mark.parametrize(("mode", "targets", "runs"), [("uncut", True, 1), ("changed", True, 2), ("changed", False, 1)])
def test_each_block_runs_once_on_each_batch_in_each_stream(mode: Any, targets: bool, runs: int) -> None:
    model: Any = tiny_llama()
    batches, ran, heads = llama_batches(), [0] * 4, []
    model.lm_head.register_forward_hook(lambda *_: heads.append(1))
    for place, block in enumerate(model.model.layers):
        # attention runs only where its block does
        block.self_attn.register_forward_hook(lambda *_, place=place: ran.__setitem__(place, ran[place] + 1))
    for _ in blockwise(LayerStack.of(model), batches, mode, targets=targets):
        pass
    streams = [runs * len(batches)] * 4
    if mode == "changed":
        streams[3] -= len(batches)  # what leaves the last changed block enters nothing
    if not targets:
        streams[0] += len(batches)  # it shows how the other blocks are called
    assert ran == streams
    assert not heads


def test_a_replaced_block_counts_and_training_mode_and_gradients_are_the_callers() -> None:
    model: Any = tiny_llama(attention_dropout=0.5).train()
    batches = llama_batches()
    replacement = copy.deepcopy(model.model.layers[1])
    scale(replacement, 0.5)
    found: list[Any] = []
    for site in blockwise(LayerStack.of(model), batches):
        if site.place == 1:
            model.model.layers[1] = replacement
            assert site.block is replacement
            for sample, target in zip(site.inputs, site.targets, strict=True):
                leaving, wanted = site.run(sample)[0], target[0]
                assert leaving is not None and wanted is not None
                (leaving - wanted).square().sum().backward()
            assert all(parameter.grad is not None for parameter in replacement.parameters())
        if site.place == 3:
            assert model.training and site.block.training
            model.eval()
            found = outputs(site)
    assert all(map(identical, found, own_outputs(model, batches)))


@pytest.mark.parametrize("scratch", [False, True])
@pytest.mark.parametrize("family", ["Llama", "T5, decoder", "SD3", "ResNet"])
def test_what_exceeds_the_budget_lies_in_files_and_nothing_else_changes(
    family: str, scratch: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "elsewhere"))
    monkeypatch.setattr("tempfile.tempdir", None)
    (tmp_path / "elsewhere").mkdir()
    folder = tmp_path / ("scratch" if scratch else "elsewhere")
    model, batches = FAMILIES[family].build(), batches_of(family)
    stack = LayerStack.at(model, FAMILIES[family].stack)
    smallest = least_budget(stack, batches)
    most, found = 0, []
    with session.using(scratch=tmp_path / "scratch" if scratch else None):
        for site in blockwise(stack, batches, "changed", budget=smallest):
            assert [path.suffix for path in folder.rglob("*") if path.is_file()].count(".safetensors") >= 2
            most = max(most, site._flow.store.used)
            scale(site.block, 0.7)
            if site.place == len(stack) - 1:
                found = outputs(site)
    assert not list(folder.iterdir())
    assert most <= smallest
    assert all(map(identical, found, own_outputs(model, batches)))


def least_budget(stack: LayerStack, batches: list[dict[str, Any]]) -> int:
    """The smallest budget that is not refused, by bisection."""
    low, high = 0, 2**24
    while high - low > 1:
        middle = (low + high) // 2
        try:
            next(blockwise(stack, batches, budget=middle))
            high = middle
        except RequestError:
            low = middle
    return high


def test_a_budget_below_one_state_is_refused_with_the_way_out() -> None:
    stack, batches = LayerStack.of(tiny_llama()), llama_batches()
    assert least_budget(stack, batches) > max(batch["input_ids"].numel() for batch in batches) * 32 * 4
    with pytest.raises(RequestError, match=r"budget of 3,000 bytes cannot hold.*larger budget, or smaller batches"):
        next(blockwise(stack, batches, budget=3000))


def test_arguments_that_share_their_values_are_kept_once() -> None:
    model = tiny_llama()
    mask = torch.tensor([[1] * 9, [1] * 6 + [0] * 3])
    batch = {"input_ids": torch.randint(3, 64, (2, 9)), "attention_mask": mask}
    held: list[tuple[int, int]] = []
    for count in (1, 5):
        sites = blockwise(LayerStack.of(model), [batch] * count)
        site = next(sites)
        store = site._flow.store
        held.append((len(store.arguments), store.shared))
        samples = list(site.inputs)
        assert all(a is b for one in samples for a, b in zip(one.call.tensors, samples[0].call.tensors, strict=True))
    assert held[0] == held[1]
    assert held[0][0] == 4  # mask, positions, cosines, sines


def test_a_block_lies_on_the_device_only_while_the_loop_is_at_it() -> None:
    moves: list[tuple[int, str]] = []
    model: Any = tiny_llama()
    for place, block in enumerate(model.model.layers):
        move = block.to
        block.to = lambda device, place=place, move=move: moves.append((place, str(device))) or move("cpu")
    for site in blockwise(LayerStack.of(model), llama_batches(), device="cpu"):
        assert moves[-1] == (site.place, "cpu") and len(moves) == 2 * site.place + 1
    assert [place for place, _ in moves] == [0, 0, 1, 1, 2, 2, 3, 3]


def test_a_state_that_is_not_finite_names_the_block() -> None:
    model: Any = tiny_llama()
    visited: list[int] = []
    with pytest.raises(RunError, match=r"leaves block 1 of model\.layers, with the changes made so far, is not finite"):
        for site in blockwise(LayerStack.of(model), llama_batches()):
            visited.append(site.place)
            if site.place == 1:
                scale(site.block, float("nan"))
    assert visited == [0, 1]
    scale(model.model.layers[0], float("inf"))
    with pytest.raises(RunError, match="leaves block 0"):
        next(blockwise(LayerStack.of(model), llama_batches()))


def test_requests_that_cannot_be_met_are_refused() -> None:
    stack = LayerStack.of(tiny_llama())
    wrong: Any = "sequential"
    with pytest.raises(RequestError, match=r"'sequential' is neither \"uncut\" nor \"changed\""):
        blockwise(stack, llama_batches(), wrong)
    with pytest.raises(RequestError, match="no batch"):
        next(blockwise(stack, []))
    sites = blockwise(stack, llama_batches(), targets=False)
    first = next(sites)
    with pytest.raises(RequestError, match="targets=False"):
        next(first.targets)
    next(sites)
    with pytest.raises(RequestError, match="left block 0"):
        next(first.inputs)


def test_a_loop_that_is_left_early_leaves_no_file(tmp_path: Path) -> None:
    stack, batches = LayerStack.of(tiny_llama()), llama_batches()
    with session.using(scratch=tmp_path):
        sites: Any = blockwise(stack, batches, budget=least_budget(stack, batches))
        next(sites)
        assert list(tmp_path.rglob("*.safetensors"))
        sites.close()
    assert not list(tmp_path.iterdir())


def test_batches_may_come_from_a_generator_and_are_read_once() -> None:
    model, batches = tiny_llama(), llama_batches()
    read: list[int] = []

    def feed() -> Iterator[dict[str, Tensor]]:
        for n, batch in enumerate(batches):
            read.append(n)
            yield batch

    found: list[Any] = []
    for site in blockwise(LayerStack.of(model), feed()):
        found = outputs(site)
    assert read == [0, 1, 2]
    with torch.no_grad():
        assert all(map(identical, found, [forward(model, batch) for batch in batches]))


def test_what_enters_a_module_of_the_block_is_measured_as_in_the_whole_model_without_padding() -> None:
    model, batches = tiny_llama(), llama_batches()
    stack = LayerStack.of(model)
    names = ["into.mlp.down_proj", "self_attn.o_proj"]
    whole = ["into.model.layers.2.mlp.down_proj", "model.layers.2.self_attn.o_proj"]
    expected = list(measure(stack, batches, whole, statistics).values())
    for site in blockwise(stack, batches, targets=False):
        if site.place == 2:
            found = list(site.measure(names, statistics).values())
            assert [one.count for one in found] == [one.count for one in expected]
            assert found[0].count == sum(int(batch["attention_mask"].sum()) for batch in batches)
            assert all(
                torch.equal(one.second_moment, other.second_moment) for one, other in zip(found, expected, strict=True)
            )
            with pytest.raises(RequestError, match=r"There is no site 'model.layers.2.mlp.down'"):
                site.measure(["mlp.down"], statistics)
