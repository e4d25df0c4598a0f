"""PERP, block by block: train a small part of each pruned block until it gives what the block gave before it was pruned.

Zimmer et al., "PERP: Rethinking the Prune-Retrain Paradigm in the Era of LLMs", arXiv:2312.15230.

    X_l   what the pruned and reconstructed blocks before block l make of the calibration data
    Y_l   = f_l(X_l), f_l the block as it was before pruning
    min   mean (f'_l(X_l) - Y_l)^2 over biases, norms and adapters of the pruned block f'_l, whose zeros stay
    X_l+1 = f'_l(X_l)

The parts and their formulas are those of `shrink.retrain`. No labels and no gradient through the whole model are needed:
one block at a time is trained, in float32.

How it differs from the paper's code:

1. The block is left as it was pruned where training did not lower its error on the calibration data.
2. Pruning is a step of its own, so that Wanda and SparseGPT see pruned predecessors, not reconstructed ones.
3. The error counts each token once; the code averages over padded windows.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import closing
from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor, nn

from overhaul.blockwise import Sample, blockwise
from overhaul.data.examples import Examples, Tensors
from overhaul.errors import RequestError
from overhaul.fit import Regime
from overhaul.method import Outcome, method
from overhaul.modes import at_rest
from overhaul.objectives import check_positions, check_taken
from overhaul.pairs import corresponding
from overhaul.reconstruction import in_float32, reconstruct_block, samples_of
from overhaul.selectors import blocks_of
from overhaul.shrink._zeros import Chosen, Parts, as_made, share_of_zeros, training_parts, zeros
from overhaul.stack import LayerStack

NAME = "shrink.reconstruct"
FAR = 0.7
"""Relative distance of kept weights from which on a teacher is another model: unrelated ones have 1.4."""
PAPER = Regime(steps=200, batch_size=8, lr=5e-4, warmup=0.1, schedule="linear")


@method(verb="shrink", paper="2312.15230", changes="weights", memory="forward", makes={"masks": "tensors"},
        headless=lambda knobs: True)  # fmt: skip
def reconstruct(
    model: nn.Module,
    text: Examples,
    teacher: nn.Module,
    masks: Tensors | None = None,
    *,
    parts: Parts = Parts(trains=("biases", "norms", "adapters")),
    training: Regime = PAPER,
    blocks: str = "all",
    samples: Annotated[int, Ge(1)] = 128,
) -> Outcome:
    """Train each block of a pruned model to give what it gave before it was pruned; its zeros stay.

    Args:
        model: a model that was pruned.
        text: calibration data: texts, answers, or images; labels are not read.
        teacher: the model before it was pruned: `{after: start}`.
        masks: which weights are pruned, as `shrink.prune` made them. If not given, those of the projections that are 0.
        parts: what trains in each block; "head" lies in none.
        training: of each block.
        blocks: "all", "3", "1-4", "first:10,last:2".
        samples: how many examples of `text` are used at most, drawn by the seed.

    Returns:
        The same model. Facts: how many parameters trained, blocks that were left as they were, the share of zeros in the
        masked matrices before and after. Layers: the error of each block before and after. `made["masks"]` are the masks.

    Raises:
        RequestError: `text` is empty, nothing was pruned, or masks, teacher or parts do not belong to the model.
        RunError: a state is not finite.
    """
    if not len(text):
        raise RequestError(f"{NAME}: the role `text` is empty; there is nothing to measure the blocks on.")
    if "head" in parts.trains:
        raise RequestError(f"{NAME}: trains=head lies in no block. Leave it out here, or train it with shrink.retrain.")
    corresponding(NAME, {"model": model, "teacher": teacher}, words_matter=False)
    stack, dense = LayerStack.of(model), LayerStack.of(teacher)
    check_taken(teacher, text)
    check_positions(model, text)
    by_block = {place: Chosen.of(NAME, model, parts, str(place)) for place in blocks_of(stack, blocks)}
    kept = zeros(NAME, model, masks)
    _check_teacher(model, teacher, kept)
    before_share, trained = share_of_zeros(model, kept), 0
    errors: dict[str, dict[int, float]] = {"error before": {}, "error after": {}}
    batches = text.shuffled(torch.initial_seed())[:samples].batches(training.batch_size)
    with closing(blockwise(stack, batches, "changed", targets=False)) as flow:
        for site in flow:
            if site.place in by_block:
                chosen = by_block[site.place]
                with in_float32(site.block), training_parts(model, chosen, parts, kept) as learnt:
                    inputs = samples_of(site)
                    goals = _goals(site.place, inputs, dense.blocks[site.place])
                    before, after = reconstruct_block(site, inputs, goals, learnt, training)
                trained += sum(one.numel() for one in learnt.values())
                errors["error before"][site.place], errors["error after"][site.place] = before, after
            if site.place == max(by_block):
                break
    left = sum(errors["error after"][place] >= errors["error before"][place] for place in by_block)
    facts = {
        "trained_parameters": trained,
        "blocks_left_as_they_were": left,
        "zeros_before": before_share,
        "zeros_after": share_of_zeros(model, kept),
    }
    return Outcome(model, facts=facts, layers=errors, made={"masks": as_made(kept)})


@torch.no_grad()
def _check_teacher(model: nn.Module, teacher: nn.Module, masks: Tensors) -> None:
    """Refuse a teacher that cannot be the model before pruning: it has other weights where nothing was pruned.

    SparseGPT changes what it keeps, so that a teacher is told by how far off it is.
    """
    for name, mask in masks.items():
        ours, theirs = (one.get_parameter(name).detach().float()[mask != 0] for one in (model, teacher))
        off = float((ours - theirs).norm() / theirs.norm().clamp(min=1e-30))
        if not off <= FAR:
            raise RequestError(
                f"{NAME}: {name} of the teacher differs by {off:.2f} of its length from the model's where nothing was "
                "pruned, so it is not the model before pruning. Name that one: `{after: start}`."
            )


@torch.no_grad()
def _goals(place: int, inputs: Sequence[Sample], block: nn.Module) -> list[Tensor]:
    """What the block before pruning gives on what enters the pruned one."""
    block = copy.deepcopy(block).float()
    with at_rest(block):
        found = [sample.calls.run(place, sample.state, block=block, call=sample.call)[0] for sample in inputs]
    return [goal for goal in found if goal is not None]
