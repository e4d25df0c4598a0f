"""Heal a cut model: a short training that brings back what the cut cost.

"On the Limits of Layer Pruning for Generative Reasoning in LLMs", arXiv:2602.01997, heals on the answers of the uncut model.

    tokens       mean over answer tokens of -log p(y_t)
    teacher      mean over answer tokens of KL( teacher(. | y_<t) || model(. | y_<t) )
    states       mean over tokens of |h_t - h'_t|^2 / |h'_t|^2, h' the teacher's last hidden states
    own_answers  as tokens, y drawn from the teacher at temperature 0.9 and top-p 0.95

How it differs from the released code:

1. The base is not quantised; there, adapters are trained over a 4-bit base and merging changes the numbers.
2. All weights train unless `weights="lora"`; adapters are merged at the end, so that the result is a plain model.
3. The teacher runs once, before training; its outputs or answers are kept, and no second model is held while training.
4. The number of steps is given; there it is one epoch of 90,000 examples at batch 8.
5. "states" is for models without a head (sentence encoders), which the paper does not heal.
6. What `shrink.prune` set to zero trains like all weights and does not stay zero; `zeros_filled` says how many went.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Lt
from torch import nn

from overhaul.adapters import adapters, of_adapters, projections
from overhaul.data.examples import Examples, collate
from overhaul.errors import RequestError
from overhaul.fit import Regime, adamw, fit
from overhaul.forward import headless
from overhaul.method import Outcome, method
from overhaul.objectives import Term, check_learnable, check_taken, cross_entropy, evaluate, states_term
from overhaul.references import cache_outputs, cache_states
from overhaul.rollouts import own_answers

PAPER = Regime(steps=200, batch_size=8, lr=2e-4, warmup=0.1, schedule="constant", weight_decay=1e-4)


@method(
    verb="shrink",
    paper="2602.01997",
    changes="weights",
    memory="training",
    makes={"answers": "examples"},
    only={"answers": {"target": ("own_answers",)}},
    rank=of_adapters,
    headless=lambda knobs: knobs["target"] == "states",
)
def heal(
    model: nn.Module,
    text: Examples,
    teacher: nn.Module | None = None,
    *,
    target: Literal["tokens", "teacher", "states", "own_answers"] = "tokens",
    weights: Literal["all", "lora"] = "all",
    training: Regime = PAPER,
    new_tokens: Annotated[int, Ge(1)] | None = None,
    rank: Annotated[int, Ge(1)] = 64,
    alpha: Annotated[int, Ge(1)] = 16,
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.05,
) -> Outcome:
    """Train a cut model for a short while on the data, on the uncut model's outputs, or on its answers.

    The default rate is the paper's, for models from 7B on; a model of some millions of parameters wants 1e-3.

    Args:
        model: the cut model (any model: nothing here depends on how it was made smaller).
        text: what it is healed on: texts, questions with answers, or labelled images.
        teacher: the uncut model; needed unless target is "tokens".
        target: "tokens", the next token (or the label) as given; "teacher", the teacher's distribution over it; "states",
            of a model without a head, the teacher's last hidden states; "own_answers", what the teacher answers to the
            prompts (the second half of a text counts as its answer).
        weights: "all", or "lora": adapters on every projection in the blocks, merged at the end.
        training: how long and how fast; AdamW has betas 0.9 and 0.99.
        new_tokens: most tokens of an own answer; if None, as many as the longest given one has.
        rank: of the adapters.
        alpha: of the adapters; they are scaled by alpha / rank.
        dropout: of the adapters' input.

    Returns:
        The same model, with curves of the loss. Facts: steps, examples and tokens seen, the number of parameters that
        trained, and how many weights were zero and are no longer. `made["answers"]` holds the teacher's answers where they
        were the target.

    Raises:
        RequestError: `text` is empty, a teacher is needed and not given, or the teacher has another vocabulary.
        RunError: training diverged (the last good weights are kept).
    """
    if not len(text):
        raise RequestError("shrink.heal: the role `text` is empty; there is nothing to heal the model on.")
    if target in ("tokens", "teacher"):
        check_learnable("text", text)
    if weights == "lora":
        projections(model)  # refuses a model that has none, before the teacher runs
    read = training.steps * training.batch_size
    if len(text) > read:  # the teacher need not answer what no step will read
        text = text.shuffled(torch.initial_seed())[:read]
    term, text = _target(teacher, model, text, target, training.batch_size, new_tokens)
    zeros = _zeros(model)
    with adapters(model, rank, alpha, dropout) if weights == "lora" else nullcontext(model) as trained:
        trained_parameters = sum(p.numel() for p in trained.parameters() if p.requires_grad)
        betas = {"optimizer": adamw((0.9, 0.99), training.weight_decay)}
        ledger = fit(trained, [term], {"text": text}, **{**training.fit, **betas}, name="heal")
    facts: dict[str, float | int | str | list[int]] = {
        "steps": ledger.step,
        "examples": ledger.examples["text"],
        "tokens": ledger.tokens["text"],
        "trained_parameters": trained_parameters,
        "zeros_filled": max(0, zeros - _zeros(model)),
    }
    made = {"answers": text} if target == "own_answers" else {}
    return Outcome(model, facts=facts, curves=ledger.curves, made=made)


def _target(
    teacher: nn.Module | None, model: nn.Module, text: Examples, target: str, batch_size: int, new_tokens: int | None
) -> tuple[Term, Examples]:
    """What is learnt and the examples with it; the teacher runs here and no more."""
    if target == "teacher":
        reference = cache_outputs(_checked(teacher, model, text, target), text, batch_size)
        return reference.kl_term("text", name="KL to the teacher"), reference.examples
    if target == "states":
        return states_term("text"), cache_states(_checked(teacher, model, text, target), text, batch_size)
    if target == "own_answers":
        text = own_answers(_checked(teacher, model, text, target), text, new_tokens)
    return cross_entropy("text"), text


def _zeros(model: nn.Module) -> int:
    """How many entries of the model's matrices are zero; embeddings have rows of zeros that were not pruned."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    return sum(int((each == 0).sum()) for each in model.parameters() if each.dim() > 1 and id(each) not in embeddings)


def _checked(teacher: nn.Module | None, model: nn.Module, text: Examples, target: str) -> nn.Module:
    """The teacher, if it is there and speaks the model's language."""
    if teacher is None:
        raise RequestError(
            f"shrink.heal: target={target!r} learns from the uncut model, but no `teacher` is given. Name the model as it "
            'was before the cut, or write target: "tokens".'
        )
    if target == "states":
        return _without_head(teacher, model)
    for each in (teacher, model):
        check_taken(each, text)
    first = collate(text.items[:1])
    theirs, ours = (evaluate(each, lambda logits, _: logits, [first])[0].shape[-1] for each in (teacher, model))
    if theirs != ours:
        raise RequestError(
            f"shrink.heal: the teacher has {theirs} outputs and the model {ours}, so it is not the model before the cut."
        )
    return teacher


def _without_head(teacher: nn.Module, model: nn.Module) -> nn.Module:
    """The teacher, if it and the model are networks without heads of one width."""
    headed = next((type(one).__name__ for one in (model, teacher) if not headless(one)), None)
    if headed is not None:
        raise RequestError(
            f'shrink.heal: target="states" is for models without a head, and {headed} has one. Write target: "teacher".'
        )
    theirs, ours = (one.config.hidden_size for one in (teacher, model))  # pyright: ignore[reportAttributeAccessIssue]
    if theirs != ours:
        raise RequestError(f"shrink.heal: the teacher's states have {theirs} features, the model's {ours}.")
    return teacher
