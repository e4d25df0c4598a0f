"""Pre-forgettable models: every class is unlocked by a prompt of its own, and is gone once the prompt is deleted.

"Pre-Forgettable Models: Prompt Learning as a Native Mechanism for Unlearning", ACM Multimedia 2025, arXiv:2509.15230.

    L = CE( f(x | the prompt of y among m wrong ones), y ) + KL( U || f(x | m' wrong ones alone) )     m, m' in 0..C-1

To forget a class, its prompt is taken out of the bank: no training, no data, no change of a weight.

How it differs from the paper and the released code:

1. It gates and does not erase: who holds the weights can fit a fresh prompt to a few labelled images and have the class
   back, and earlier copies of the model still hold the prompt. The facts say how much comes back. `harden` (not in the
   paper) also empties the class's row of the head.
2. The head reads what it always reads, behind the final norm; the released code leaves that norm out. The head of the given
   model is trained on; there, it is a fresh one.
3. An accuracy on forgotten classes near 1/C is what the loss asks for, not 0: forgotten images get a uniform output.
4. Adapters are merged into the weights at the end. They sit on the projections of queries and values, found by what they
   do; where query, key and value are one projection, on all three.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt, Lt
from jaxtyping import Float, Int
from torch import Tensor, nn

from overhaul import session
from overhaul.adapters import adapters, of_adapters
from overhaul.data.examples import Batch, Examples, collate, join
from overhaul.errors import RequestError
from overhaul.fit import fit
from overhaul.forget.prompt_tokens.gating import gated, logits_under, recover, uniform_kl
from overhaul.forget.prompt_tokens.prompts import PromptedClassifier, inputs_of
from overhaul.method import Outcome, method
from overhaul.objectives import Term, check_labelled, cross_entropy_sum, sequences
from overhaul.selectors import select
from overhaul.stack import LayerStack

MEASURED = 1000
"""Most examples of each part that the facts are measured on."""

KNOWN_TO_THE_ATTACK = 10
"""Labelled images of each forgotten class that the attack of the facts has, at most half of them."""


@method(verb="forget", paper="2509.15230", changes="architecture", memory="training", rank=of_adapters)
def prompt_tokens(
    model: nn.Module,
    full: Examples | None = None,
    forget: Examples | None = None,
    *,
    epochs: Annotated[float, Gt(0)] = 10.0,
    lr: Annotated[float, Gt(0)] = 1e-3,
    batch_size: Annotated[int, Ge(1)] = 32,
    weights: Literal["lora", "all"] = "lora",
    rank: Annotated[int, Ge(1)] = 4,
    alpha: Annotated[int, Ge(1)] = 4,
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.1,
    prompts_per_class: Annotated[int, Ge(1)] = 1,
    harden: bool = False,
) -> Outcome:
    """Train a classifier whose classes are unlocked by prompts, or remove the prompts of classes it is to forget.

    A plain model is trained on `full`, then forgets what is in `forget`, if that is given. A prompted one (made by this
    method, or opened again) only forgets, at once; the knobs of the training do not matter then.

    Prompts gate and do not erase: `recovered_accuracy` says what a fresh prompt fitted to a few labelled images brings back.

    Args:
        model: a transformer that classifies images (ViT, DeiT, DINOv2) or spectrograms (AST), with a logit for each class;
            or a prompted one.
        full: the labelled training set; needed for a plain model. For a prompted one it only serves the facts.
        forget: examples of the classes to be forgotten; only their labels matter. Needed for a prompted model.
        epochs: passes over `full`, two forwards a step.
        lr: rate of Adam, constant.
        batch_size: examples in one step.
        weights: what trains besides prompts and head: "lora", adapters on queries and values; "all", every weight.
        rank: of the adapters.
        alpha: of the adapters; they are scaled by alpha / rank.
        dropout: of the adapters' input.
        prompts_per_class: tokens of each class.
        harden: also empty the forgotten classes' rows of the head, and close them by their bias.

    Returns:
        A `PromptedClassifier`, which `overhaul.open` opens again. Facts: the classes that remain and those forgotten now;
        where examples are given, accuracy and mean KL to uniform on both parts, `false_unlocks` (forgotten images taken
        for a remaining class with more than one half), and `recovered_accuracy`, on the images of `forget` that the attack
        has not seen.

    Raises:
        RequestError: a role is missing or empty, a class is unknown or forgotten already, or the model cannot be prompted.
        RunError: training diverged (the last good weights are kept).
    """
    prompted = model if isinstance(model, PromptedClassifier) else None
    if prompted is None and not full:
        raise RequestError(
            "forget.prompt_tokens: a plain model is trained on the role `full`, which is missing or empty."
        )
    if prompted is not None and not forget:
        raise RequestError(
            "forget.prompt_tokens: this model has its prompts already; say with the role `forget` what it is to forget."
        )
    for role, examples in (("full", full), ("forget", forget)):
        if examples:
            check_labelled(role, examples)
    curves: dict[str, list[float]] = {}
    gone = _classes(forget)
    if prompted is None:
        assert full is not None
        prompted = PromptedClassifier.around(model, collate(full.items[:2]), prompts_per_class)
        _check_labels(full, prompted)
        prompted.check(gone, harden)
        adapted = _queries_and_values(prompted, full) if weights == "lora" else None
        session.begins(partial(_without, prompted, gone, harden))
        with _trainable(prompted, adapted, rank, alpha, dropout):
            steps = max(1, round(epochs * len(full) / batch_size))
            model, data = Gated(prompted, inputs_of(full[0], prompted)), {"full": full}
            curves = fit(
                model, terms(), data, steps=steps, batch_size=batch_size, lr=lr, clip=None, name="prompt tokens"
            ).curves
    prompted = _without(prompted, gone, harden)
    facts = {"remaining": prompted.available, "forgotten": gone, **_facts(prompted, full, forget)}
    return Outcome(prompted, facts=facts, curves=curves)


def _without(prompted: PromptedClassifier, gone: list[int], harden: bool) -> PromptedClassifier:
    """The same classifier, in which these classes are forgotten."""
    if gone:
        prompted.forget(gone, harden)
    return prompted


def _classes(examples: Examples | None) -> list[int]:
    return sorted({int(item["labels"]) for item in examples.items}) if examples else []


def _check_labels(full: Examples, model: PromptedClassifier) -> None:
    if strange := sorted(set(_classes(full)) - set(model.available)):
        raise RequestError(
            f"forget.prompt_tokens: `full` has the labels {strange}, but the model's head knows {model.available}. Give it "
            "a head with a logit for each class."
        )


@contextmanager
def _trainable(
    model: PromptedClassifier, adapted: list[str] | None, rank: int, alpha: int, dropout: float
) -> Iterator[None]:
    """What trains, and nothing else requires a gradient; adapters (on `adapted`) are part of the weights afterwards."""
    needed = {name: p.requires_grad for name, p in model.named_parameters()}
    heads = [parameter for head in model.heads() for parameter in head.parameters()]
    try:
        with adapters(model.inner, rank, alpha, dropout, adapted) if adapted else nullcontext():
            for parameter in [model.bank, *heads] if adapted else model.parameters():
                parameter.requires_grad_(parameter.is_floating_point())
            yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(needed[name])


def _queries_and_values(model: PromptedClassifier, full: Examples) -> list[str]:
    """The names of the projections that are adapted."""
    stack = LayerStack.at(model.inner, model.config.stack)
    inputs = {name: value for name, value in collate(full.items[:2]).items() if name != "labels"}
    try:
        return list(dict.fromkeys(p.module for p in select(stack, "attention.q, attention.v", inputs=inputs).parts))
    except RequestError as error:
        raise RequestError(f'forget.prompt_tokens: {error} Write weights: "all".') from None


class Gated(nn.Module):
    """A prompted classifier as it trains, with the prompts of all its classes; they come from torch's generator.

    Args:
        model: the classifier.
        reads: the names of its inputs in a batch.
    """

    def __init__(self, model: PromptedClassifier, reads: Collection[str]) -> None:
        super().__init__()
        self.model, self.reads = model, (*reads, "labels")

    def forward(self, labels: Int[Tensor, " b"], **inputs: Tensor) -> Float[Tensor, "2b classes"]:
        """Logits under prompts with the right one, and below them those under wrong ones."""
        classes, own = self.model.classes, labels.cpu()
        more, count = torch.randint(classes, (2,)).tolist()
        given = (mixed_prompts(own, classes, more), wrong_prompts(own, classes, count))
        return torch.cat([self.model(**inputs, prompts=prompts).logits for prompts in given])


def terms() -> list[Term]:
    """The two parts of the loss, each a mean over examples in nats, of what `Gated` returns."""

    def right(logits: Tensor, batch: Batch) -> Tensor:
        return cross_entropy_sum(logits[: sequences(batch)], batch)

    def wrong(logits: Tensor, batch: Batch) -> Tensor:
        return uniform_kl(logits[sequences(batch) :]).sum()

    return [
        Term("full", loss, sequences, name=f"under {name}")
        for loss, name in ((right, "the right prompt"), (wrong, "wrong prompts"))
    ]


def wrong_prompts(labels: Int[Tensor, " b"], classes: int, count: int) -> Int[Tensor, "b m"]:
    """For each label, `count` of the other classes in random order."""
    places = torch.rand(len(labels), classes)
    places[torch.arange(len(labels)), labels] = math.inf
    return places.argsort(dim=1)[:, :count]


def mixed_prompts(labels: Int[Tensor, " b"], classes: int, count: int) -> Int[Tensor, "b m+1"]:
    """For each label, `count` other classes in random order, and the label at one place, the same for all."""
    wrong = wrong_prompts(labels, classes, count)
    place = int(torch.randint(count + 1, ()))
    return torch.cat([wrong[:, :place], labels[:, None], wrong[:, place:]], dim=1)


def _facts(model: PromptedClassifier, full: Examples | None, forget: Examples | None) -> dict[str, float]:
    """What the examples at hand say of the model as it is now."""
    seed, left = torch.initial_seed(), set(model.available)
    stays = [i for i, item in enumerate(full.items) if int(item["labels"]) in left] if full else []
    retained = full.select(stays).shuffled(seed)[:MEASURED] if full else Examples([], [])
    forgotten = forget.shuffled(seed)[:MEASURED] if forget else Examples([], [])
    facts: dict[str, float] = {}
    if not len(retained) and not len(forgotten):
        return facts
    seen = gated(model, join([retained, forgotten]), model.available)
    if len(retained):
        facts |= {"retained_accuracy": seen.retained, "retained_kl": seen.retained_kl}
    if len(forgotten):
        facts |= {"forgotten_accuracy": seen.forgotten, "forgotten_kl": seen.forgotten_kl}
        facts |= {"false_unlocks": seen.false_unlocks, **_recovered(model, forgotten)}
    return facts


def _recovered(model: PromptedClassifier, forgotten: Examples) -> dict[str, float]:
    """Accuracy on forgotten classes once fresh prompts are fitted to a few of their images; on the others of them."""
    known: list[int] = []
    for name in _classes(forgotten):
        places = [i for i, item in enumerate(forgotten.items) if int(item["labels"]) == name]
        known += places[: min(KNOWN_TO_THE_ATTACK, len(places) // 2)]
    if not known:
        return {}
    rest = forgotten.select(sorted(set(range(len(forgotten))) - set(known)))
    logits, labels = logits_under(model, rest, extra=recover(model, forgotten.select(known)))
    return {"recovered_accuracy": float((logits.argmax(dim=-1) == labels).float().mean())}
