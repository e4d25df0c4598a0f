"""Recording a gradient ledger: train on examples as `fit` does, and keep what each tracked one did to the weights.

    g_e(z) = gradient of the summed answer NLL of z alone, at the weights that epoch e's step found

1. Recording changes nothing of a training: `fit` trains, with its own order, clipping and dropout; a term of it asks
   autograd for the gradient of each tracked sample in the forward pass that is trained on, so dropout is the same.
2. A gradient is what training did only for plain SGD. `stores="update"` keeps the optimizer's real displacement of that
   step instead, divided among the step's samples by their answer tokens: all entries of all epochs add up to the way back.
3. Entries are written as they arise. The ledger appears under its name when the training is complete; a recording that is
   killed begins anew.
"""

from __future__ import annotations

import math
import os
import shutil
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from overhaul import processes, session
from overhaul.data.examples import IGNORED, Batch, Examples
from overhaul.errors import RequestError, writing
from overhaul.fit import Ledger, fit
from overhaul.fit.optimizers import OptimizerFactory, adamw
from overhaul.forget.first_epoch.ledger import (
    Entry,
    GradientLedger,
    Gradients,
    Stores,
    Where,
    architecture,
    chosen,
    file_of,
    identity,
    packed,
    read,
    weights_digest,
)
from overhaul.objectives import Term, answer_tokens, sequence_nll

PLACE = "place"
"""The column that tells which example of the training set a row of a batch is."""


def record(
    model: nn.Module,
    examples: Examples,
    folder: str | Path,
    *,
    tracked: Collection[int] | None = None,
    where: Where | list[int] = "all",
    every_epoch: bool = False,
    stores: Stores = "gradient",
    epochs: int = 3,
    batch_size: int = 16,
    lr: float = 1e-4,
    clip: float | None = 1.0,
    optimizer: OptimizerFactory | None = None,
) -> tuple[GradientLedger, Ledger]:
    """Train a language model on examples, by `fit`, and keep what each tracked one did.

    Args:
        model: trained in place, all its parameters, whatever `where` is.
        examples: the training set.
        folder: where the ledger goes; it must not exist yet. It appears when the training is complete.
        tracked: places of the examples to be recorded; all if not given.
        where: the parameters of which gradients are kept, see `chosen`.
        every_epoch: record all epochs, not the first alone.
        stores: the gradient, or the optimizer's displacement.
        epochs: passes over the examples.
        batch_size: examples in a step; all of them where there are fewer.
        lr: learning rate, constant.
        clip: largest gradient norm in training; what is stored is not clipped.
        optimizer: as in `fit`; AdamW if not given.

    Returns:
        The ledger of gradients, and `fit`'s of the training.

    Raises:
        RequestError: the folder exists, there are images, or several processes train.
        RunError: training diverged, or the disk is full.
    """
    folder = Path(folder).expanduser()
    if folder.exists():
        raise RequestError(f"{folder} exists already; a recording never replaces a ledger. Choose another name.")
    if examples.kind == "images":
        raise RequestError("A gradient ledger is recorded of language models; these examples are images.")
    if processes.count() > 1:
        raise RequestError("A gradient ledger is recorded in one process; start this run without a launcher.")
    places = range(len(examples)) if tracked is None else set(tracked)
    partial = folder.with_name(f".{folder.name}.partial")
    with writing(folder):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    recorder = _Recorder(partial, chosen(model, where), examples, places, every_epoch, stores)
    # one by one where most are tracked: a sample's gradient goes back through the forward pass of its whole batch
    alone, size = 4 * len(places) > len(examples), min(batch_size, len(examples))
    try:
        training = _train(model, recorder, epochs, (1, size) if alone else (size, 1), lr, clip, optimizer)
        shapes = {name: tuple(parameter.shape) for name, parameter in recorder.parameters.items()}
        digests = (architecture(model), weights_digest(model))
        GradientLedger(partial, stores, shapes, *digests, recorder.entries).write_index()
        with writing(folder):
            os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return GradientLedger.open(folder, model), training


def _train(
    model: nn.Module,
    recorder: _Recorder,
    epochs: int,
    sizes: tuple[int, int],
    lr: float,
    clip: float | None,
    optimizer: OptimizerFactory | None,
) -> Ledger:
    batch_size, accumulation = sizes
    numbered = recorder.examples.with_column(PLACE, torch.arange(len(recorder.examples)))
    steps = math.ceil(epochs * len(numbered) / (batch_size * accumulation))
    # what was recorded before a checkpoint would be lost, so none is written
    with session.using(scratch=None):
        return fit(
            model,
            [Term("full", recorder.loss, answer_tokens, name="cross-entropy")],
            {"full": numbered},
            steps=steps,
            batch_size=batch_size,
            accumulation=accumulation,
            lr=lr,
            clip=clip,
            optimizer=recorder.watching(optimizer or adamw()),
            name="record",
        )


@dataclass
class _Recorder:
    """Sits in a training as its loss and beside its optimizer, and writes entries.

    Attributes:
        folder: where they go.
        parameters: of which gradients are kept.
        examples: the training set.
        tracked: places of what is recorded.
        every_epoch: or the first alone.
        stores: gradients or displacements.
        entries: what was recorded so far.
    """

    folder: Path
    parameters: Mapping[str, nn.Parameter]
    examples: Examples
    tracked: Collection[int]
    every_epoch: bool
    stores: Stores
    entries: dict[str, Entry] = field(default_factory=dict)
    _seen: Counter[int] = field(default_factory=Counter)
    _step: list[tuple[int, int, int]] = field(default_factory=list)  # place, epoch, answer tokens
    _tokens: int = 0
    _before: Gradients = field(default_factory=dict)

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """The summed NLL of the batch; the gradients of its tracked samples are taken on the way."""
        nll = sequence_nll(logits, batch["labels"])
        counts = (batch["labels"][:, 1:] != IGNORED).sum(dim=1).tolist()
        self._tokens += sum(counts)
        for row, place in enumerate(batch[PLACE].tolist()):
            self._seen[place] += 1  # every example is drawn once an epoch
            if place not in self.tracked or (self._seen[place] > 1 and not self.every_epoch):
                continue
            if self.stores == "update":
                self._step.append((place, self._seen[place], counts[row]))
                continue
            values = list(self.parameters.values())
            gradients = torch.autograd.grad(nll[row], values, retain_graph=True, allow_unused=True)
            named = zip(self.parameters, gradients, strict=True)
            self.write(place, self._seen[place], {name: g for name, g in named if g is not None})
        return nll.sum()

    def watching(self, make: OptimizerFactory) -> OptimizerFactory:
        """The same optimizer, looked at before and after each of its steps."""

        def build(model: nn.Module, trained: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
            optimizer = make(model, trained)
            optimizer.register_step_pre_hook(lambda *_: self._remember())
            optimizer.register_step_post_hook(lambda *_: self._share_out())
            return optimizer

        return build

    def _remember(self) -> None:
        if self._step:
            self._before = {name: p.detach().clone() for name, p in self.parameters.items()}

    def _share_out(self) -> None:
        for place, epoch, count in self._step:
            share = count / self._tokens
            way_back = {name: (self._before[name] - p.detach()) * share for name, p in self.parameters.items()}
            self.write(place, epoch, way_back)
        self._step.clear()
        self._before.clear()
        self._tokens = 0

    def write(self, place: int, epoch: int, gradients: Gradients) -> None:
        """Add one sample's gradients to its entry."""
        item = self.examples.items[place]
        name = identity(item)
        entry = self.entries.setdefault(name, Entry(item["input_ids"].tolist()))
        wide = {key: g.detach().to("cpu", torch.promote_types(g.dtype, torch.float32)) for key, g in gradients.items()}
        path = file_of(self.folder, name, epoch)
        if epoch in entry.epochs:  # an example that stands in the training set twice
            shapes = {key: tuple(g.shape) for key, g in wide.items()}
            earlier = read(path, shapes, list(wide))
            wide = {key: g + earlier[key] if key in earlier else g for key, g in wide.items()}
        else:
            entry.epochs.append(epoch)
        stored = {key: tensor for name, g in wide.items() for key, tensor in packed(name, g)}
        with writing(self.folder):
            save_file(stored, path)
