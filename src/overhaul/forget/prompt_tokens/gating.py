"""What a prompted classifier says without some of its prompts, and what its weights still know.

    KL(U || p) = -(1/C) sum_c log p_c - log C        p = softmax(logits)

1. Removing a prompt closes a gate; it erases nothing. `recover` fits a fresh prompt to a few labelled images, and
   `linear_probe` reads what enters the head: what they bring back was there all the time.
2. A false unlock is an image of a forgotten class that is taken for a remaining one with a probability above one half: the
   class that wins an almost uniform output says nothing.
"""

from __future__ import annotations

import itertools
import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from overhaul.data.examples import Examples
from overhaul.forget.prompt_tokens.prompts import PromptedClassifier, inputs_of
from overhaul.judge.representation import classifier
from overhaul.modes import at_rest

BATCH = 64
"""Examples in one forward; it does not change what is measured."""


def uniform_kl(logits: Float[Tensor, "b classes"]) -> Float[Tensor, " b"]:
    """KL(U || softmax(logits)) in nats, U uniform over the classes: 0 where all logits are equal."""
    return -logits.float().log_softmax(dim=-1).mean(dim=-1) - math.log(logits.shape[-1])


@torch.no_grad()
def logits_under(
    model: PromptedClassifier, data: Examples, prompts: Sequence[int] | None = None, extra: Tensor | None = None
) -> tuple[Float[Tensor, "n classes"], Int[Tensor, " n"]]:
    """Logits and labels of all examples, on the CPU, in eval mode.

    Args:
        model: its mode is put back afterwards.
        data: n labelled examples.
        prompts: classes; all that are left if None.
        extra: vectors [k, d] behind these prompts.
    """
    tokens = model.bank[model.rows(model.available if prompts is None else prompts)].flatten(0, 1)
    tokens = tokens if extra is None else torch.cat([tokens, extra])
    with at_rest(model):
        found = [
            (model.with_tokens(tokens, **inputs_of(b, model)).float().cpu(), b["labels"]) for b in data.batches(BATCH)
        ]
    return torch.cat([logits for logits, _ in found]), torch.cat([labels for _, labels in found])


@dataclass(frozen=True)
class Gated:
    """What a classifier says without some of its prompts; accuracies and rates are shares, KL is to uniform in nats.

    Attributes:
        forgotten: accuracy on the classes without a prompt.
        retained: accuracy on the others.
        forgotten_kl: mean KL to uniform on images of the former; near 0 where the output says nothing.
        retained_kl: mean KL to uniform on the others.
        false_unlocks: forgotten images that are taken for a remaining class with a probability above one half.
    """

    forgotten: float
    retained: float
    forgotten_kl: float
    retained_kl: float
    false_unlocks: float


def gated(model: PromptedClassifier, data: Examples, left: Sequence[int]) -> Gated:
    """Judge a classifier under the prompts of the classes `left` alone; a part without examples gives NaN."""
    logits, labels = logits_under(model, data, left)
    stays = torch.isin(labels, torch.tensor(list(left)))
    best, guess = logits.softmax(dim=-1).max(dim=-1)
    right, kl = (guess == labels).float(), uniform_kl(logits)
    claimed = ((best > 0.5) & torch.isin(guess, torch.tensor(list(left)))).float()
    values = (right[~stays], right[stays], kl[~stays], kl[stays], claimed[~stays])
    return Gated(*(float(value.mean()) for value in values))


def all_subsets(
    model: PromptedClassifier, data: Examples, count: int, limit: int = 300
) -> dict[str, tuple[float, float]]:
    """The paper's protocol: forget every set of `count` classes in turn, without changing a weight.

    Args:
        model: nothing in it is changed.
        data: labelled examples of its classes.
        count: classes forgotten at a time, fewer than have a prompt.
        limit: where there are more sets than this, as many drawn at random, the same every time.

    Returns:
        Mean and standard deviation over the sets for each attribute of `Gated`.
    """
    sets = list(itertools.combinations(model.available, count))
    if len(sets) > limit:
        sets = random.Random(0).sample(sets, limit)
    found = [vars(gated(model, data, [name for name in model.available if name not in gone])) for gone in sets]
    columns = {name: [one[name] for one in found] for name in found[0]}
    return {name: (statistics.fmean(values), statistics.pstdev(values)) for name, values in columns.items()}


def recover(model: PromptedClassifier, known: Examples, *, steps: int = 100, lr: float = 0.1) -> Float[Tensor, "k d"]:
    """An attack: fit fresh prompts to some labelled images of forgotten classes; everything else is frozen.

    Args:
        model: left as it is.
        known: what the attacker has. Every class in it gets `prompts_per_class` vectors.
        steps: of Adam, each on all of `known`.
        lr: of Adam.

    Returns:
        The vectors, to be given as `extra`.
    """
    gone = {int(item["labels"]) for item in known.items}
    fresh = torch.randn(len(gone) * model.config.prompts_per_class, model.config.width).to(model.bank)
    fresh.requires_grad_()
    optimizer = torch.optim.Adam([fresh], lr)
    with at_rest(model):
        for _ in range(steps):
            total = torch.zeros_like(fresh)
            for batch in known.batches(BATCH):
                tokens = torch.cat([model.bank.detach().flatten(0, 1), fresh])
                logits = model.with_tokens(tokens, **inputs_of(batch, model))
                loss = F.cross_entropy(logits.float(), batch["labels"].to(logits.device), reduction="sum") / len(known)
                total += torch.autograd.grad(loss, fresh)[0]
            fresh.grad = total
            optimizer.step()
    return fresh.detach()


def linear_probe(model: PromptedClassifier, train: Examples, test: Examples) -> dict[int, float]:
    """An attack: a linear classifier on what enters the head, under the prompts that are left.

    Args:
        model: left as it is.
        train: labelled examples of all classes, forgotten ones too.
        test: labelled examples that the probe is judged on.

    Returns:
        The probe's accuracy on each class of `test`.
    """
    seen: list[Tensor] = []
    hook = model.heads()[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].float().cpu()))
    try:
        labels = [logits_under(model, data)[1] for data in (train, test)]
    finally:
        hook.remove()
    features = torch.cat(seen).split([len(train), len(test)])
    probe = classifier(features[0], labels[0].tolist())
    right = torch.from_numpy(probe.predict(features[1].numpy())) == labels[1]
    return {name: float(right[labels[1] == name].float().mean()) for name in sorted(set(labels[1].tolist()))}
