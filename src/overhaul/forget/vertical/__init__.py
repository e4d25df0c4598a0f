"""Label unlearning in a network split between parties: leave a class by its mixed embeddings, then recover the others.

LUV, ICLR 2026, arXiv:2410.10922.

    Z_k = lam H_k[i] + (1 - lam) H_k[j]    for all pairs i < j of one label, lam in {1/4, 1/2, 3/4}, alike in every party
    forget    theta <- theta + lr d log(1 - p_y(Z_1 .. Z_K)) / d theta    the active party and, through dL/dH_k, every other
    recover   theta <- theta + lr d log p_y(M_1 .. M_K) / d theta         M mixes members of one class, lam ~ Beta(1, 1)

How it differs from the paper and from the released code:

1. The paper climbs cross-entropy, -log p_y (`loss="cross_entropy"`), which is flat where the network is sure, then steep,
   and has no end: where training had left no loss, nothing moved in 100 epochs, or one of two labels was lost and the
   other stayed; and what a lost label goes on climbing for costs the labels that stay. The default is the unlikelihood of
   Welleck et al. (arXiv:1908.04319): steepest where the network is sure, and flat once the label is not believed any more.
   On digits it forgets in 4 epochs what takes 5 to 94 by climbing, and the other digits keep more.
2. `gradient="chain_rule"` is the derivative through the mixing. The released code ("legacy") orders the pairs by i, cuts
   them into n chunks and credits sample m with the mean of chunk m, whichever samples and weights it holds, and takes the
   recovery's mixing for the identity. Its gradients are about 1.5 n times smaller, so it needs a larger rate.
3. The released rate, 2e-7 for 16 epochs, changes no prediction here: it belongs to gradients that are summed over batches
   of pairs. Each party clips its own gradient (`clip`), and the work ends where the accuracy on `forget` is no better than
   chance (`stop_at`).
4. Norm statistics stay as they are (`freeze_norms`): batches of one class would overwrite them.
5. A label with a single sample in a batch has no pairs, and stays unmixed; the code fails there.
6. An ordinary image classifier is the case of one party: it is cut before its last linear layer.
7. Gradients of one class tell a passive party which samples are of it. `interleave` puts forget and recovery samples in one
   round, so that a message holds both; it makes the inference harder and proves nothing.

All parties are in one process here. With `overhaul.parties` each can be on a machine of its own (docs/federated.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt, Lt
from jaxtyping import Float, Int
from torch import Tensor, nn

from overhaul import session
from overhaul.data.examples import Examples, collate, join
from overhaul.errors import RequestError, RunError
from overhaul.forget.vertical.mixup import LegacyMix, Mixing, class_mixing, mix, pair_mixing
from overhaul.forward import forward
from overhaul.method import Outcome, method
from overhaul.parties.messages import InProcess
from overhaul.parties.model import VerticalModel
from overhaul.parties.party import ActiveParty, Objective, PassiveParty, Rates

Gradient = Literal["chain_rule", "legacy"]
Loss = Literal["unlikelihood", "cross_entropy"]


@dataclass(frozen=True)
class Unlearning:
    """The objective of a round: forgotten labels become unlikely, and the others likely.

    Attributes:
        top: the active party's network.
        forgotten: the labels to forget.
        mixup: mix embeddings.
        gradient: of the mixing.
        loss: on samples of forgotten labels; "cross_entropy" is climbed.
    """

    top: nn.Module
    forgotten: Tensor
    mixup: bool = True
    gradient: Gradient = "chain_rule"
    loss: Loss = "unlikelihood"

    def __call__(self, embeddings: list[Tensor], labels: Tensor) -> Tensor:
        """The loss of these embeddings, by party."""
        going = torch.isin(labels, self.forgotten.to(labels.device))
        total = embeddings[0].new_zeros(())
        for rows, mixing, loss in ((going, pair_mixing, self._forgetting), (~going, class_mixing, F.cross_entropy)):
            if rows.any():
                parts, own = [embedded[rows] for embedded in embeddings], labels[rows]
                total = total + loss(*self._logits(parts, own, mixing(own) if self.mixup else None))
        return total

    def _logits(self, embeddings: list[Tensor], labels: Tensor, mixing: Mixing | None) -> tuple[Tensor, Tensor]:
        """[m, classes] and the labels [m] of the mixed rows."""
        if mixing is not None:
            through: Any = mix if self.gradient == "chain_rule" else LegacyMix.apply
            embeddings, labels = [through(part, mixing) for part in embeddings], labels[mixing.first]
        return self.top(torch.cat(embeddings, dim=1)).float(), labels

    def _forgetting(self, logits: Tensor, labels: Tensor) -> Tensor:
        return unlikelihood(logits, labels) if self.loss == "unlikelihood" else -F.cross_entropy(logits, labels)


def unlikelihood(logits: Float[Tensor, "m classes"], labels: Int[Tensor, " m"]) -> Float[Tensor, ""]:
    """Mean of -log(1 - p_y): its gradient at the logit y is p_y. Exact where p_y rounds to 1."""
    own = F.one_hot(labels, logits.shape[1]).bool()
    return (logits.logsumexp(dim=1) - logits.masked_fill(own, -torch.inf).logsumexp(dim=1)).mean()


def unlearn(
    active: ActiveParty,
    forget: Int[Tensor, " f"],
    recovery: Int[Tensor, " r"],
    objective: Objective,
    *,
    epochs: int,
    batch_size: int,
    interleave: bool = False,
    limit: float | None = None,
) -> dict[str, list[float]]:
    """The active party's side of it, over any transport.

    Args:
        active: the party.
        forget: ids of the samples to forget.
        recovery: ids of samples that stay; may be empty.
        objective: see `Unlearning`.
        epochs: passes over both.
        batch_size: samples of one round, and of either kind where they are interleaved.
        interleave: put both into the same rounds.
        limit: end once the accuracy on `forget` is no higher.

    Returns:
        Curves: accuracy on `forget`, before and after each epoch, and the objective of each round.
    """
    curves: dict[str, list[float]] = {"forget accuracy": [_accuracy(active, forget)], "objective": []}
    for _ in session.progress(range(epochs), "forgetting", epochs):
        for ids in _rounds(forget, recovery, batch_size, interleave):
            curves["objective"].append(active.round(ids, objective))
        curves["forget accuracy"].append(_accuracy(active, forget))
        if limit is not None and curves["forget accuracy"][-1] <= limit:
            break
    return curves


def _rounds(forget: Tensor, recovery: Tensor, size: int, interleave: bool) -> list[Tensor]:
    """The samples of each round of an epoch."""
    going, staying = (list(_shuffled(ids).split(size)) if len(ids) else [] for ids in (forget, recovery))
    if not interleave:
        return going + staying
    staying = _shuffled(recovery).tensor_split(len(going))
    return [_shuffled(torch.cat(both)) for both in zip(going, staying, strict=True)]


def _shuffled(ids: Tensor) -> Tensor:
    return ids[torch.randperm(len(ids))]


def _accuracy(active: ActiveParty, ids: Tensor) -> float:
    right = active.logits(ids).argmax(dim=-1).cpu() == active.labels[ids]
    return right.float().mean().item()


@method(verb="forget", paper="2410.10922", changes="weights", memory="training")
def vertical(
    model: nn.Module,
    forget: Examples,
    recovery: Examples | None = None,
    *,
    epochs: Annotated[int, Ge(1)] = 50,
    lr: Annotated[float, Gt(0)] = 0.01,
    batch_size: Annotated[int, Ge(1)] = 32,
    loss: Loss = "unlikelihood",
    mixup: bool = True,
    recover: bool = True,
    gradient: Gradient = "chain_rule",
    interleave: bool = False,
    stop_at: Annotated[float, Ge(0), Lt(1)] | Literal["chance"] | None = "chance",
    freeze_norms: bool = True,
    momentum: Annotated[float, Ge(0), Lt(1)] = 0.9,
    weight_decay: Annotated[float, Ge(0)] = 5e-4,
    clip: Annotated[float, Gt(0)] | None = 1.0,
) -> Outcome:
    """Forget whole classes of a split network from a few dozen samples, and recover the others from a few each.

    Args:
        model: a `VerticalModel`, or an image classifier whose last linear layer gives its logits.
        forget: samples (40 or so) of each class to forget; every class that occurs in them is forgotten.
        recovery: a few samples (3 or so) of every class that stays; needed unless recover is false.
        epochs: passes over both, at most.
        lr: learning rate of SGD in every party.
        batch_size: samples in a round; n samples of a label become 3 n (n - 1) / 2 mixed rows at the top.
        loss: what is lowered on `forget`; "cross_entropy" is climbed instead, as in the paper, and may want 100 epochs.
        mixup: forget on pairs within a label and recover on mixtures within a class, instead of on samples.
        recover: train on `recovery` after each pass over `forget`.
        gradient: of the mixing: "chain_rule", or the released code's ("legacy").
        interleave: put forget and recovery samples in the same rounds.
        stop_at: end once the accuracy on `forget` is no higher than this; "chance" is 1 / classes, None never.
        freeze_norms: keep the statistics of batch norms, and dropout off.
        momentum: of SGD.
        weight_decay: of SGD.
        clip: largest norm of each party's own gradient, or None.

    Returns:
        The model. Curves: accuracy on `forget` by epoch (first is before), objective by round.

    Raises:
        RequestError: a role is missing, has no images or the wrong classes, or no head was found.
        RunError: the model does not know `forget`, or a loss is not finite (all parties are as after the last round).
    """
    forgotten = _check(forget, recovery, recover, interleave)
    # in random order, or the ids would tell who is who
    whole = join([forget, recovery] if recover and recovery else [forget])
    whole = whole.select(torch.randperm(len(whole)).tolist())
    batch = collate(whole.items)
    going = torch.isin(batch["labels"], forgotten)
    rates = Rates(lr, momentum, weight_decay, clip)
    with split(model, batch["pixel_values"]) as parts:
        active = in_process(parts, batch["labels"], rates, training=not freeze_norms)
        limit = 1 / parts.classes if stop_at == "chance" else stop_at
        ids = torch.arange(len(whole))
        _check_known(before := _accuracy(active, ids[going]), limit)
        objective = Unlearning(parts.top, forgotten, mixup, gradient, loss)
        curves = unlearn(
            active, ids[going], ids[~going], objective,
            epochs=epochs, batch_size=batch_size, interleave=interleave, limit=limit,
        )  # fmt: skip
    after = curves["forget accuracy"]
    facts: dict[str, float | int | str | list[int]] = {
        "labels": forgotten.tolist(),
        "epochs": len(after) - 1,
        "rounds": active.held,
        "stopped_early": "yes" if limit is not None and after[-1] <= limit else "no",
        "forget_accuracy_before": before,
        "forget_accuracy_after": after[-1],
    }
    return Outcome(model, facts=facts, curves=curves)


def train(model: VerticalModel, examples: Examples, *, epochs: int, rates: Rates, batch_size: int = 32) -> list[float]:
    """Train a split network from messages alone, in this process. Returns the mean loss of each epoch."""
    batch = collate(examples.items)
    losses: list[float] = []
    with split(model, batch["pixel_values"]) as parts:
        active = in_process(parts, batch["labels"], rates, training=True)
        # nothing is forgotten: the objective is plain cross-entropy
        objective = Unlearning(parts.top, torch.empty(0, dtype=torch.long), mixup=False)
        for _ in session.progress(range(epochs), "training", epochs):
            rounds = _shuffled(torch.arange(len(examples))).split(batch_size)
            losses.append(sum(active.round(ids, objective) for ids in rounds) / len(rounds))
    return losses


class Parts(NamedTuple):
    """A network cut at its embeddings.

    Attributes:
        bottoms: one network a passive party.
        blocks: what each reads of all samples.
        top: embeddings side by side -> logits.
        classes: how many logits.
    """

    bottoms: list[nn.Module]
    blocks: list[Tensor]
    top: nn.Module
    classes: int


def in_process(parts: Parts, labels: Tensor, rates: Rates, *, training: bool) -> ActiveParty:
    """All parties of a cut network, in this process; the active one reaches the others."""
    both = enumerate(zip(parts.bottoms, parts.blocks, strict=True))
    passive = [PassiveParty(k, bottom, block, rates, training=training) for k, (bottom, block) in both]
    return ActiveParty(parts.top, labels, InProcess(passive), rates, training=training)


class _Body(nn.Module):
    """A classifier whose head is set aside: what it calls logits are embeddings."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return forward(self.model, {"pixel_values": pixel_values})


@contextmanager
def split(model: nn.Module, pixel_values: Tensor) -> Iterator[Parts]:
    """Cut a network at its embeddings for the duration of a block.

    Raises:
        RequestError: it is no `VerticalModel`, and no linear layer at its end gives its logits.
    """
    if isinstance(model, VerticalModel):
        yield Parts(list(model.bottoms), model.blocks(pixel_values), model.top, model.config.top[-1])
        return
    name, head = _head(model)
    body = _Body(model.eval())
    few = pixel_values[:2].to(head.weight.device, head.weight.dtype)
    with torch.no_grad():
        expected = body(few)
        model.set_submodule(name, nn.Identity())
        try:
            found = body(few)
            if found.shape[-1] != head.in_features or not torch.allclose(head(found), expected, atol=1e-4):
                raise RequestError(f"forget.vertical: the layer {name!r} does not by itself give this model's logits.")
        except BaseException:
            model.set_submodule(name, head)
            raise
    try:
        yield Parts([body], [pixel_values], head, head.out_features)
    finally:
        model.set_submodule(name, head)


def _head(model: nn.Module) -> tuple[str, nn.Linear]:
    """The last linear layer with as many outputs as there are labels."""
    classes = getattr(getattr(model, "config", None), "num_labels", None)
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and m.out_features == classes]
    if not found:
        raise RequestError(
            f"forget.vertical: this {type(model).__name__} has no linear layer with as many outputs as it has labels "
            f"({classes}), so it cannot be cut before its head. Give an image classifier or a VerticalModel."
        )
    return found[-1]


def _check(forget: Examples, recovery: Examples | None, recover: bool, interleave: bool) -> Tensor:
    """The labels to forget."""
    for role, examples in (("forget", forget), ("recovery", recovery)):
        if examples and not (examples.kind == "images" and all("labels" in item for item in examples.items)):
            raise RequestError(f"forget.vertical: the role `{role}` needs images with a label each (as: image).")
    if not forget:
        raise RequestError("forget.vertical: the role `forget` is empty.")
    forgotten = torch.stack([item["labels"] for item in forget.items]).unique()
    if recover and not (recovery and recovery.kind == "images"):
        raise RequestError(
            "forget.vertical: recovery needs a few samples of every class that stays, but the role `recovery` is missing "
            "or has no images. Give it, or write recover: false (which costs much of the other classes)."
        )
    if interleave and not recover:
        raise RequestError(
            "forget.vertical: interleave: true needs recovery samples; write recover: true, or leave it."
        )
    if recover and recovery:
        both = sorted({int(item["labels"]) for item in recovery.items} & set(forgotten.tolist()))
        if both:
            raise RequestError(
                f"forget.vertical: label {both[0]} is in `forget` and in `recovery`, so it would be forgotten and learnt "
                "again. Leave it out of `recovery`."
            )
    return forgotten


def _check_known(accuracy: float, limit: float | None) -> None:
    if limit is not None and accuracy <= limit:
        raise RunError(
            f"forget.vertical: the accuracy on `forget` is {accuracy:.2f} already, not above stop_at = {limit:.2f}: there "
            "is nothing to forget. Check the labels, or write stop_at: null."
        )
