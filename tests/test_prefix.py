from __future__ import annotations

import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from along_paths import Block, Net, Paths, alone, close, drops, other_blocks, positions, read, restorations, tensors
from conftest import FAMILIES as SMALL
from conftest import examples_for, tiny_llama
from families import FAMILIES
from overhaul.data.examples import Examples
from overhaul.errors import RequestError, RunError
from overhaul.objectives import cross_entropy_sum, evaluate, units
from overhaul.prefix import path_losses, run_paths
from overhaul.stack import LayerStack
from overhaul.stack.arrangement import Entry
from overhaul.stack.calls import Calls

# every family


@pytest.mark.parametrize("family", FAMILIES)
def test_paths_over_every_family_give_what_each_gives_alone(family: str) -> None:
    model, inputs = FAMILIES[family].build(), FAMILIES[family].inputs()
    stack = LayerStack.at(model, FAMILIES[family].stack)
    whole: list[Entry] = list(range(len(stack)))
    free = stack.droppable
    repeated = sorted([*whole, free[0], free[-1]])
    paths: Paths = [whole, *drops(stack), list(repeated), *restorations(stack)]
    if len(stack.lists) == 1:
        swapped = [place if place not in free else free[::-1][free.index(place)] for place in range(len(stack))]
        paths.append(list(swapped))
    before = alone(stack, whole, inputs)
    found = run_paths(stack, paths, inputs, read=read)
    for path, output in zip(paths, found, strict=True):
        close(output, alone(stack, path, inputs))
    assert all(map(torch.equal, alone(stack, whole, inputs), before))
    assert len({output[0].sum().item() for output in found}) > len(free)


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_by_hand_give_the_models_own_output_bit_for_bit(family: str) -> None:
    model, inputs = FAMILIES[family].build(), FAMILIES[family].inputs()
    stack = LayerStack.at(model, FAMILIES[family].stack)
    expected = alone(stack, range(len(stack)), inputs)
    with torch.no_grad():
        calls = Calls.record(stack, inputs)
        state = calls.entering
        for place in range(len(stack)):
            state = calls.run(place, state)
        found = tensors(calls.finish(state))
    assert len(found) == len(expected) and all(map(torch.equal, found, expected))
    assert not any("forward" in vars(module) for module in model.modules())


# what is shared


def test_each_prefix_runs_once_and_equal_blocks_run_together() -> None:
    stack = LayerStack.of(tiny_llama())
    paths = drops(stack)
    prefixes = {tuple(path[:n]) for path in paths for n in range(1, len(path) + 1)}
    rows = positions(stack)
    per_batch: list[list[int]] = []

    def batches() -> Iterator[dict[str, Tensor]]:
        for seed in range(3):
            rows.clear()
            yield {"input_ids": torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(seed))}
            per_batch.append(list(rows))

    run_paths(stack, paths, batches(), read=read)
    # idle blocks are called to finish each path and, but for the first, to record the calls; they are given 2 rows
    idle = (len(stack) - 1) + len(paths) * len(stack) - 1
    assert sum(per_batch[-1]) == 2 * (len(prefixes) + idle)
    assert len(per_batch[-1]) < len(prefixes) + idle
    assert sum(per_batch[0]) > sum(per_batch[-1])  # batches were compared with single runs


def test_paths_that_are_equal_are_read_once_and_results_keep_the_order() -> None:
    stack = LayerStack.of(tiny_llama())
    inputs = {"input_ids": torch.randint(3, 64, (2, 9))}
    paths: Paths = [[0, 3], [0, 1, 2, 3], [0, 3], [0, (1, stack.blocks[1]), 2, 3]]
    reads: list[int] = []
    found = run_paths(stack, paths, inputs, read=lambda output, _: (reads.append(1), output.logits)[1])
    assert len(reads) == 2
    assert found[0] is found[2] and found[1] is found[3]
    close([found[0]], alone(stack, [0, 3], inputs))
    assert run_paths(stack, [], inputs, read=read) == []


def test_several_batches_give_a_list_for_each_path() -> None:
    stack = LayerStack.of(tiny_llama())
    batches = list(examples_for("llama", 5).batches(2))
    found = run_paths(stack, drops(stack), iter(batches), read=cross_entropy_sum)
    for path, losses in zip(drops(stack), found, strict=True):
        with stack.following(path):
            expected = evaluate(stack.model, cross_entropy_sum, batches)
        torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)


def test_a_model_in_training_mode_is_run_at_rest_and_put_back_also_after_an_error() -> None:
    model: Any = tiny_llama(attention_dropout=0.5).train()
    stack = LayerStack.of(model)
    inputs = {"input_ids": torch.randint(3, 64, (2, 9))}
    other = other_blocks(stack)
    found = run_paths(stack, [[0, (1, other[1]), 3]], inputs, read=read)
    assert all(module.training for module in [*model.modules(), *other[1].modules()])
    model.eval()
    close(found[0], alone(stack, [0, (1, other[1].eval()), 3], inputs))
    with pytest.raises(ZeroDivisionError):
        run_paths(stack, [[0, 3]], inputs, read=lambda *_: 1 // 0)
    assert not any("forward" in vars(module) for module in model.modules())


# memory


@pytest.mark.parametrize("capacity", [2, 3, 5, 8, 16, 40])
def test_states_stay_within_the_budget_and_results_are_the_same(capacity: int) -> None:
    stack = LayerStack.of(tiny_llama(num_hidden_layers=6))
    inputs = {"input_ids": torch.randint(3, 64, (2, 9))}
    size = 2 * 9 * 32 * 4
    paths = restorations(stack)
    expected = run_paths(stack, paths, inputs, read=read)
    modules = [*stack.blocks, *(entry[1] for path in paths for entry in path if not isinstance(entry, int))]
    living: list[weakref.ref[Tensor]] = []
    most = [0]

    def count(_: nn.Module, args: Any, output: Tensor) -> None:
        if all(output is not ref() for ref in living):
            living.append(weakref.ref(output))
        living[:] = [ref for ref in living if ref() is not None]
        most[0] = max(most[0], sum(ref().nbytes for ref in living))  # pyright: ignore[reportOptionalMemberAccess]

    hooks = [module.register_forward_hook(count) for module in dict.fromkeys(modules)]
    found = run_paths(stack, paths, inputs, read=lambda output, inputs: read(output, inputs), budget=capacity * size)
    for hook in hooks:
        hook.remove()
    # the state that left the first block is kept beside the budget, like the one that entered it
    assert most[0] <= (capacity + 1) * size
    for output, path in zip(found, expected, strict=True):
        close(output, path)


def test_a_small_budget_computes_again_what_a_large_one_shares() -> None:
    stack = LayerStack.of(tiny_llama(num_hidden_layers=8))
    inputs = {"input_ids": torch.randint(3, 64, (2, 9))}
    rows = positions(stack)
    used: list[int] = []
    for states in (2, 3, 100):
        rows.clear()
        run_paths(stack, drops(stack), inputs, read=read, budget=states * 2 * 9 * 32 * 4)
        used.append(sum(rows))
    assert used[0] > used[1] > used[2]


def test_a_budget_below_two_states_is_refused_before_any_path_is_run() -> None:
    stack = LayerStack.of(tiny_llama())
    inputs = {"input_ids": torch.randint(3, 64, (2, 9))}
    two = 2 * (2 * 9 * 32 * 4)
    assert len(run_paths(stack, drops(stack), inputs, read=read, budget=two)) == 4
    reads: list[int] = []
    with pytest.raises(RequestError, match=f"two states at once.*{two:,} bytes.*larger one, or smaller batches"):
        run_paths(stack, drops(stack), inputs, read=lambda *_: reads.append(1), budget=two - 1)
    assert not reads


# losses


@pytest.mark.parametrize("family", SMALL)
def test_losses_are_those_of_the_model_along_each_path(family: str) -> None:
    stack = LayerStack.of(SMALL[family]())
    examples = examples_for(family, 7)
    paths: Paths = [list(range(len(stack))), *drops(stack), *restorations(stack)]
    found = path_losses(stack, paths, examples, 3)
    batches = list(examples.batches(3))
    for path, loss in zip(paths, found, strict=True):
        with stack.following(path):
            expected = sum(value.item() for value in evaluate(stack.model, cross_entropy_sum, batches))
        assert loss == pytest.approx(expected / sum(map(units, batches)), abs=1e-5)


@pytest.mark.parametrize("family", ["Llama", "Gemma2", "GPT-NeoX", "Bloom"])
def test_the_head_is_applied_where_labels_carry_loss_and_nowhere_else(family: str) -> None:
    model: Any = FAMILIES[family].build()  # Gemma 2 caps its logits behind the head
    stack = LayerStack.of(model)
    examples = examples_for("llama", 6)
    batches = list(examples.batches(2))
    applied: list[int] = []
    hook = model.get_output_embeddings().register_forward_hook(
        lambda _, args, out: applied.append(args[0][..., 0].numel())
    )
    path_losses(stack, drops(stack), examples, 2)
    hook.remove()
    whole = batches[0]["labels"].numel()
    assert applied == [whole, *(units(batch) for batch in batches for _ in stack.droppable)]


def test_a_head_that_cannot_be_spared_is_applied_to_all_positions() -> None:
    class Normalised(nn.Module):
        """Divides logits by their mean over all positions."""

        def __init__(self) -> None:
            super().__init__()
            self.inner: Any = tiny_llama()

        def get_output_embeddings(self) -> nn.Module:
            return self.inner.lm_head

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
            logits = self.inner(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
            return SimpleNamespace(logits=logits / logits.abs().mean())

    stack = LayerStack.of(Normalised())
    examples = examples_for("llama", 4)
    batches = list(examples.batches(2))
    for path, loss in zip(drops(stack), path_losses(stack, drops(stack), examples, 2), strict=True):
        with stack.following(path):
            expected = sum(value.item() for value in evaluate(stack.model, cross_entropy_sum, batches))
        assert loss == pytest.approx(expected / sum(map(units, batches)), abs=1e-5)


def test_a_first_batch_without_loss_decides_nothing() -> None:
    stack = LayerStack.of(tiny_llama())
    examples = examples_for("llama", 4)
    silent = [{**item, "labels": torch.full_like(item["labels"], -100)} for item in examples.items[:2]]
    mixed = Examples([*silent, *examples.items[2:]], [{}] * 4)
    found = path_losses(stack, drops(stack), mixed, 2)
    assert found == pytest.approx(path_losses(stack, drops(stack), examples[2:], 2), abs=1e-5)
    assert path_losses(stack, drops(stack), mixed[:2], 2) == [0.0] * 4


# refusals


def test_a_path_that_cannot_run_is_refused() -> None:
    stack = LayerStack.of(tiny_llama())
    with pytest.raises(RequestError, match="there is no block 4"):
        run_paths(stack, [[0, 1], [0, 4]], {"input_ids": torch.tensor([[3, 4]])}, read=read)


def test_a_block_that_writes_into_its_input_is_refused() -> None:
    class Writing(Block):
        def forward(self, x: Tensor, extra: Tensor) -> Tensor:
            x += extra
            return x + self.inner(x)

    model = Net(None)
    model.blocks = nn.ModuleList([Writing(None) for _ in range(3)])
    inputs = {"x": torch.randn(2, 5, 4), "extra": torch.ones(1)}
    with pytest.raises(RunError, match="Block 0 of blocks in Net writes into what enters it"):
        run_paths(LayerStack.of(model), [[0, 1], [0, 2]], inputs, read=read)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([0, 1, 2, 3, 0, 1, 2, 3], "more than once"),
        ([0, 1, 3, 2], r"not run once each, in their order, on these inputs, but so: \[0, 1, 3\]"),
        ([0, 1, "double", 2, 3], "what block 1 of blocks returns is not what enters block 2"),
    ],
)
def test_a_model_whose_blocks_do_not_follow_each_other_is_refused(steps: list[Any], message: str) -> None:
    class Other(Net):
        def forward(self, x: Tensor, extra: Tensor) -> Tensor:
            for step in steps:
                x = 2 * x if step == "double" else self.blocks[step](x, extra)
            return x

    stack = LayerStack.of(Other(lambda x, extra: x * extra))
    inputs = {"x": torch.randn(2, 5, 4), "extra": torch.ones(1)}
    with pytest.raises(RequestError, match=message):
        run_paths(stack, [[0, 1, 2, 3]], inputs, read=read)
