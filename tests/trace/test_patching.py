"""Patch grids: what `intervene` gives one by one, on padded batches of several families; and the facts that hold exactly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import tiny_gemma3, tiny_gpt2, tiny_llama, tiny_qwen3
from families import FAMILIES
from overhaul.data.examples import IGNORED, collate
from overhaul.errors import RequestError
from overhaul.forward import forward
from overhaul.modes import at_rest
from overhaul.stack import LayerStack
from overhaul.trace import Patch, Replace, Where, intervene, patch_grid, states_of
from overhaul.trace.beginnings import after_beginning
from tracing import hooks_of

LENGTHS = (9, 7, 9)


def asked(seed: int) -> dict[str, Tensor]:
    """Three prompts, one shorter, each with a token to predict at its end."""
    draw = torch.Generator().manual_seed(seed)
    items = []
    for length in LENGTHS:
        ids = torch.randint(4, 60, (length,), generator=draw)
        labels = torch.full_like(ids, IGNORED)
        labels[-1] = ids[-1]
        items.append({"input_ids": ids, "labels": labels})
    return collate(items)


def at(*places: int) -> Tensor:
    """A mask of one position in each prompt, counted from the token that is predicted."""
    mask = torch.zeros(len(LENGTHS), max(LENGTHS), dtype=torch.bool)
    for row, (length, place) in enumerate(zip(LENGTHS, places, strict=True)):
        mask[row, length - 1 - place] = True
    return mask


def grid(stack: LayerStack, source: Any) -> list[Patch]:
    masks = [at(1, 1, 1), at(2, 3, 4), at(5, 5, 5), at(1, 2, 3) | at(3, 4, 5)]
    return [Patch(place, mask, source.states[place][mask]) for place in range(len(stack)) for mask in masks]


@torch.no_grad()
def one_by_one(stack: LayerStack, batch: dict[str, Tensor], patch: Patch) -> Tensor:
    value = torch.zeros(*patch.positions.shape, patch.value.shape[1])
    value[patch.positions] = patch.value.float()
    edit = {f"leaving.{patch.place}": Replace(value, Where(patch.positions))}
    with at_rest(stack.model), intervene(stack, edit):
        return forward(stack.model, batch)[:, :-1][batch["labels"][:, 1:] != IGNORED]


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2, tiny_qwen3, tiny_gemma3])
def test_a_grid_is_what_single_interventions_give(build: Callable[[], nn.Module]) -> None:
    stack, false = LayerStack.of(build()), asked(1)
    patches = grid(stack, states_of(stack, asked(0)))
    found = patch_grid(stack, false, patches, lambda logits: logits.clone())
    for patch, logits in zip(patches, found, strict=True):
        assert torch.allclose(logits, one_by_one(stack, false, patch), atol=1e-5), patch.place
    assert not hooks_of(stack.model)


@pytest.mark.parametrize("name", ["Bloom", "GPT-NeoX", "Mixtral", "OPT", "Phi3"])
def test_families_that_batch_otherwise_give_the_same(name: str) -> None:
    stack, false = LayerStack.of(FAMILIES[name].build()), asked(1)
    patches = grid(stack, states_of(stack, asked(0)))[::3]
    found = patch_grid(stack, false, patches, lambda logits: logits.clone())
    for patch, logits in zip(patches, found, strict=True):
        assert torch.allclose(logits, one_by_one(stack, false, patch), atol=1e-4), patch.place


def test_a_run_with_its_own_states_is_unchanged_to_the_bit() -> None:
    stack, batch = LayerStack.of(tiny_llama()), asked(1)
    own = states_of(stack, batch)
    first = at(8, 6, 8)  # where a text begins, so that nothing is read before and all runs as it did
    for patch in [*grid(stack, own), Patch(1, first, own.states[1][first])]:
        whole = patch.positions | first
        (logits,) = patch_grid(
            stack, batch, [Patch(patch.place, whole, own.states[patch.place][whole])], lambda logits: logits.clone()
        )
        assert torch.equal(logits, own.logits)
        (logits,) = patch_grid(stack, batch, [patch], lambda logits: logits.clone())
        assert torch.allclose(logits, own.logits, atol=1e-6)


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2, tiny_qwen3, tiny_gemma3])
@torch.no_grad()
def test_what_lies_before_the_first_patch_is_read_once(build: Callable[[], nn.Module]) -> None:
    stack, batch = LayerStack.of(build()), asked(1)
    with at_rest(stack.model):
        rest = after_beginning(stack, batch, 4)
        assert rest is not None and rest["input_ids"].shape == (3, 5)
        again = forward(stack.model, rest)
        assert torch.equal(forward(stack.model, rest), again)  # nothing was added to what is kept
        assert after_beginning(stack, batch, 0) is None
    bert = FAMILIES["BERT"].build()
    assert after_beginning(LayerStack.of(bert), batch, 4) is None


def test_all_positions_of_a_layer_give_the_other_runs_answer_and_the_last_layer_only_its_last_position() -> None:
    stack, true, false = LayerStack.of(tiny_llama()), asked(0), asked(1)
    theirs, own = states_of(stack, true), states_of(stack, false)
    everywhere = true["attention_mask"].bool()
    whole = [Patch(place, everywhere, theirs.states[place][everywhere]) for place in range(len(stack))]
    for logits in patch_grid(stack, false, whole, lambda logits: logits.clone()):
        assert torch.allclose(logits, theirs.logits, atol=1e-6)
    last = len(stack) - 1
    ends = [Patch(last, at(*[back] * 3), theirs.states[last][at(*[back] * 3)]) for back in (1, 2)]
    at_end, before = patch_grid(stack, false, ends, lambda logits: logits.clone())
    assert torch.allclose(at_end, theirs.logits, atol=1e-6) and torch.allclose(before, own.logits, atol=1e-6)


def test_neither_the_budget_nor_the_order_changes_a_value() -> None:
    stack, false = LayerStack.of(tiny_llama()), asked(1)
    patches = grid(stack, states_of(stack, asked(0)))
    whole = patch_grid(stack, false, patches, lambda logits: logits.clone())
    size = 3 * 9 * 32 * 4
    narrow = patch_grid(stack, false, patches[::-1], lambda logits: logits.clone(), budget=5 * size)[::-1]
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(whole, narrow, strict=True))
    with pytest.raises(RequestError, match="three states at once"):
        patch_grid(stack, false, patches, lambda logits: logits, budget=2 * size)


def test_what_does_not_fit_is_refused_in_words() -> None:
    stack, batch = LayerStack.of(tiny_llama()), asked(1)
    for patch, said in (
        (Patch(4, at(1, 1, 1), torch.zeros(3, 32)), "block 4; model.layers has the blocks 0 to 3"),
        (Patch(0, at(1, 1, 1)[:, 1:], torch.zeros(3, 32)), "the batch is"),
        (Patch(0, torch.zeros(3, 9, dtype=torch.bool), torch.zeros(0, 32)), "at least one"),
        (Patch(0, at(1, 1, 1), torch.zeros(2, 32)), r"values \[2, 32\] for 3 positions"),
        (Patch(0, at(1, 1, 1), torch.zeros(3, 16)), "of 32 features"),
    ):
        with pytest.raises(RequestError, match=said):
            patch_grid(stack, batch, [patch], lambda logits: logits)
    with pytest.raises(RequestError, match="with labels"):
        patch_grid(stack, {"input_ids": batch["input_ids"]}, [], lambda logits: logits)
