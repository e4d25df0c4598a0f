"""A model in training, on one process or spread over several: whole copies that add up their gradients, or shards.

1. Copies add up their gradients after the last micro-batch. DistributedDataParallel, which does so during the backward
   pass, wants every parameter in every forward and every forward through its wrapper; a path over some blocks, or a term
   that leaves a part of the model out, would fail there or go wrong unnoticed.
2. Shards are accelerate's FSDP2, as `accelerate launch` configures it. They train in a copy, gradients reduced after every
   micro-batch. The model that was given stays a plain module and has the trained weights afterwards, in every process; each
   process needs main memory for two whole models.
3. accelerate 1.x knows FSDP2 on accelerators only and would quietly train copies on CPUs. Its FSDP2 works there: it is
   switched on.
4. While it trains, each process draws from a random stream of its own (dropout); afterwards all are where the main one is.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType
from torch import Tensor, nn

from overhaul import processes
from overhaul.data.examples import Encoded
from overhaul.errors import RequestError, RunError
from overhaul.fit.checkpoints import random_states, set_random_states, whole
from overhaul.fit.optimizers import OptimizerFactory


class Diverged(RunError):
    """A step whose loss or gradient is not finite: all processes see the same numbers and stop together."""


@dataclass
class Workers:
    """The training as this process sees it.

    Attributes:
        accelerator: device and precision.
        model: what forwards go through.
        optimizer: accelerate's wrapper of the one that was built, which is its `optimizer`.
        named: the parameters that train; shards where `sharded`.
        statistics: buffers of the model's state, such as batch norm's running means: a forward changes them.
        sharded: whether this process holds a shard of each parameter, or all of it.
    """

    accelerator: Accelerator
    model: nn.Module
    optimizer: Any
    named: Sequence[tuple[str, nn.Parameter]]
    statistics: Sequence[tuple[str, Tensor]]
    sharded: bool

    @property
    def gradient_scale(self) -> float:
        """By what a loss is multiplied, so that the reduced gradient is the sum over processes: FSDP takes the mean."""
        return float(processes.count()) if self.sharded else 1.0

    def check(self, sizes: Mapping[str, int]) -> None:
        """Refuse batches of which a shard's holder would get no example: all must run the same forwards."""
        for role, size in sizes.items():
            if self.sharded and size < processes.count():
                raise RequestError(
                    f"The role {role!r} is drawn {size} at a time, but {processes.count()} processes hold shards of the "
                    f"model and each needs an example. Set the batch size to {processes.count()} or more."
                )

    def share(self, items: Sequence[Encoded]) -> Sequence[Encoded]:
        """The part of a batch that falls to this process."""
        return items[processes.rank() :: processes.count()]

    def add_up_gradients(self) -> None:
        """Make each gradient the sum over the processes; one that no process has stays absent."""
        if self.sharded or processes.count() == 1:
            return
        parameters = [parameter for _, parameter in self.named]
        users = processes.total(torch.tensor([float(p.grad is not None) for p in parameters])).tolist()
        used = [parameter for parameter, count in zip(parameters, users, strict=True) if count]
        for parameter in used:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        processes.add_up([p.grad for p in used if p.grad is not None])

    def clip(self, limit: float) -> float:
        """Scale the gradient down to a norm of at most `limit`; the norm before."""
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), limit)
        return 0.0 if norm is None else float(whole(norm))

    @contextmanager
    def guarded_statistics(self) -> Iterator[None]:
        """Take the statistics back if the block fails; else they move by the mean of what the processes saw."""
        before = [tensor.clone() for _, tensor in self.statistics]
        try:
            yield
        except BaseException:
            for (_, tensor), old in zip(self.statistics, before, strict=True):
                tensor.copy_(old)
            raise
        if processes.count() > 1:
            for (_, tensor), old in zip(self.statistics, before, strict=True):
                if tensor.is_floating_point():
                    tensor.copy_(old + processes.total(tensor - old) / processes.count())

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        """The parameters that train by name, whole and differentiable; a shard's is gathered when it is looked up."""
        return _Whole(dict(self.named)) if self.sharded else dict(self.named)

    @torch.no_grad()
    def bring_home(self, model: nn.Module) -> None:
        """Put the trained weights and statistics of shards into the model that was given."""
        if self.sharded:
            for name, shard in self.named:
                model.get_parameter(name).copy_(whole(shard))
            for name, tensor in self.statistics:
                model.get_buffer(name).copy_(tensor)


class _Whole(Mapping[str, Tensor]):
    """Shards by name, gathered one by one when they are looked up."""

    def __init__(self, shards: Mapping[str, Tensor]) -> None:
        self.shards = shards

    def __getitem__(self, name: str) -> Tensor:
        return whole(self.shards[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.shards)

    def __len__(self) -> int:
        return len(self.shards)


@contextmanager
def workers(model: nn.Module, trained: Collection[str], make: OptimizerFactory) -> Iterator[Workers]:
    """Prepare a model for training with the parameters named `trained`; afterwards it is as plain as before.

    Raises:
        RequestError: the launcher asks for a way of training that this is not made for.
    """
    accelerator = _accelerator()
    sharded = accelerator.distributed_type is DistributedType.FSDP
    home = next(model.parameters()).device
    subject = copy.deepcopy(model.to("cpu")) if sharded else model
    optimizer = make(subject, {name: p for name, p in subject.named_parameters() if name in trained})
    if sharded:
        _same_everywhere(subject)
        prepared, stepper = accelerator.prepare(subject, optimizer)
    else:
        # "for evaluation" leaves DistributedDataParallel out; device and precision are those of training
        prepared = accelerator.prepare_model(subject, evaluation_mode=True)
        stepper = accelerator.prepare_optimizer(optimizer)
        _same_everywhere(subject)
    named = [(_plain(name), p) for name, p in prepared.named_parameters() if _plain(name) in trained]
    team = Workers(accelerator, prepared, stepper, named, _statistics(prepared), sharded)
    try:
        with _own_random_stream():
            yield team
        team.bring_home(model)
    except Diverged:
        team.bring_home(model)
        raise
    finally:
        if sharded:
            model.to(home)


def _accelerator() -> Accelerator:
    processes.start()
    accelerator = Accelerator(mixed_precision="bf16" if _has_fast_bf16() else "no")
    wants_shards = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if wants_shards and accelerator.distributed_type is DistributedType.MULTI_CPU:
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
        accelerator.state.distributed_type = DistributedType.FSDP
    kind = accelerator.distributed_type
    if kind is DistributedType.FSDP and not accelerator.is_fsdp2:
        raise RequestError("Training in shards is made for FSDP2. Write `fsdp_version: 2` (or --fsdp_version 2).")
    if kind not in (DistributedType.NO, DistributedType.FSDP) and not kind.value.startswith("MULTI_"):
        raise RequestError(
            f"Training is made for one process, copies (MULTI_GPU, MULTI_CPU) and FSDP2, not for {kind.value}, whose engine "
            "steps inside the backward pass. Launch with --use_fsdp --fsdp_version 2 instead."
        )
    return accelerator


def _has_fast_bf16() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported()


def _statistics(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Buffers that are part of what is saved, by their plain names."""
    passing = {
        f"{path}.{name}".lstrip(".")
        for path, module in model.named_modules()
        for name in module._non_persistent_buffers_set
    }
    return [(_plain(name), buffer) for name, buffer in model.named_buffers() if name not in passing]


def _plain(name: str) -> str:
    """The name without what activation checkpointing and compilation put into it."""
    return name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")


@torch.no_grad()
def _same_everywhere(model: nn.Module) -> None:
    """Begin with the main process's weights: what was computed before may differ in the last bits."""
    if processes.count() > 1:
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.copy_(processes.from_main(tensor))


@contextmanager
def _own_random_stream() -> Iterator[None]:
    if processes.count() == 1:
        yield
        return
    if not processes.is_main():
        torch.manual_seed((torch.initial_seed() + 7919 * processes.rank()) % 2**63)
    yield
    set_random_states({device: processes.from_main(state) for device, state in random_states().items()})
