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
5. What is below float32 trains through a float32 master copy: a weight of bfloat16 holds 8 bits, so a step of less than a
   256th of it would be lost. Forward and backward stay in bfloat16, each gradient is added to the master's in float32 and
   let go. float16 overflows above 65504 and loses gradients below 6e-8: while it trains, such a model is float32 wholly.
   With AdamW a parameter takes 16 bytes in float32 (weight, gradient, two moments), 18 in bfloat16 (2 for the weight
   beside the master), 16 in float16; in shards 16 of which each process holds its part.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from overhaul import processes
from overhaul.data.examples import Encoded
from overhaul.errors import RequestError, RunError
from overhaul.fit.checkpoints import random_states, set_random_states, whole
from overhaul.fit.optimizers import OptimizerFactory

if TYPE_CHECKING:
    from accelerate import Accelerator


class Diverged(RunError):
    """A step whose loss or gradient is not finite: all processes see the same numbers and stop together."""


@dataclass
class Workers:
    """The training as this process sees it.

    Attributes:
        accelerator: device and precision.
        model: what forwards go through.
        optimizers: accelerate's wrappers of those that were built, each of which is the `optimizer` of its own.
        named: what the optimizers step on: the parameters that train, shards where `sharded`, and the float32 masters of
            those that are held in less.
        low: the weights that have masters beside them, by name; outside shards.
        stored: the dtype of each trained weight that the given model holds in less than float32.
        statistics: buffers of the model's state, such as batch norm's running means: a forward changes them.
        sharded: whether this process holds a shard of each parameter, or all of it.
    """

    accelerator: Accelerator
    model: nn.Module
    optimizers: Mapping[str, Any]
    named: Sequence[tuple[str, nn.Parameter]]
    low: Mapping[str, nn.Parameter]
    stored: Mapping[str, torch.dtype]
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
        parameters = self.model.parameters() if self.sharded else [master for _, master in self.named]
        norm = self.accelerator.clip_grad_norm_(parameters, limit)
        return 0.0 if norm is None else float(whole(norm))

    def step(self, which: str) -> None:
        """Let one optimizer step, and give its masters' values to the weights."""
        self.optimizers[which].step()
        self.drop_gradients()
        self.write_back()

    def drop_gradients(self) -> None:
        """Forget what backward passes have left, in the weights that do not train too."""
        for parameter in (*self.model.parameters(), *(master for _, master in self.named)):
            parameter.grad = None

    @torch.no_grad()
    def write_back(self) -> None:
        """Round the masters to the weights that forwards use."""
        for name, master in self.named:
            if name in self.low:
                self.low[name].copy_(master)

    def statistics_now(self) -> list[Tensor]:
        """A copy of the statistics."""
        return [tensor.clone() for _, tensor in self.statistics]

    def take_back_statistics(self, before: Sequence[Tensor]) -> None:
        """Put a copy back."""
        for (_, tensor), old in zip(self.statistics, before, strict=True):
            tensor.copy_(old)

    def agree_on_statistics(self, before: Sequence[Tensor]) -> None:
        """Let them have moved from `before` by the mean of what the processes saw."""
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
def workers(model: nn.Module, trained: Collection[str], make: Mapping[str, OptimizerFactory]) -> Iterator[Workers]:
    """Prepare a model for training with the parameters named `trained`; afterwards it is as plain as before.

    Raises:
        RequestError: the launcher asks for a way of training that this is not made for.
    """
    accelerator = _accelerator()
    stored = {_plain(name): p.dtype for name, p in model.named_parameters() if name in trained and _is_low(p)}
    prepare = _sharded if accelerator.distributed_type.value == "FSDP" else _whole
    with prepare(model, accelerator, trained, make, stored) as team:
        try:
            with _own_random_stream():
                yield team
            team.bring_home(model)
        except Diverged:
            team.bring_home(model)
            raise


@contextmanager
def _sharded(
    model: nn.Module,
    accelerator: Accelerator,
    trained: Collection[str],
    make: Mapping[str, OptimizerFactory],
    stored: Mapping[str, torch.dtype],
) -> Iterator[Workers]:
    """Shards of a copy, in float32: its shards are their own masters."""
    if len(make) > 1:
        raise RequestError(f"Training in shards is made for one optimizer, not for {len(make)}. Train copies instead.")
    home = next(model.parameters()).device
    subject = copy.deepcopy(model.to("cpu"))
    if any(_is_low(p) for p in subject.parameters()):
        subject = subject.float()
    _same_everywhere(subject)
    ((which, build),) = make.items()
    optimizer = build(subject, {name: p for name, p in subject.named_parameters() if name in trained})
    prepared, stepper = accelerator.prepare(subject, optimizer)
    named = [(_plain(name), p) for name, p in prepared.named_parameters() if _plain(name) in trained]
    try:
        yield Workers(accelerator, prepared, {which: stepper}, named, {}, stored, _statistics(prepared), sharded=True)
    finally:
        model.to(home)


@contextmanager
def _whole(
    model: nn.Module,
    accelerator: Accelerator,
    trained: Collection[str],
    make: Mapping[str, OptimizerFactory],
    stored: Mapping[str, torch.dtype],
) -> Iterator[Workers]:
    """The model itself, with masters of what is below float32."""
    with _float16_widened(model), ExitStack() as undo:
        # "for evaluation" leaves DistributedDataParallel out; device and precision are those of training
        prepared = accelerator.prepare_model(model, evaluation_mode=True)
        _same_everywhere(model)
        own = {name: p for name, p in model.named_parameters() if name in trained}
        masters = {name: nn.Parameter(p.detach().float()) if _is_low(p) else p for name, p in own.items()}
        low = {name: p for name, p in own.items() if p is not masters[name]}
        for name, parameter in low.items():
            hook = partial(_hand_over, masters[name])
            undo.callback(parameter.register_post_accumulate_grad_hook(hook).remove)
        steppers = {which: accelerator.prepare_optimizer(build(model, masters)) for which, build in make.items()}
        named = [(_plain(name), master) for name, master in masters.items()]
        low = {_plain(name): parameter for name, parameter in low.items()}
        yield Workers(accelerator, prepared, steppers, named, low, stored, _statistics(prepared), sharded=False)


def _is_low(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.element_size() < 4


def _hand_over(master: nn.Parameter, weight: Tensor) -> None:
    """A hook after each backward pass: the weight's gradient is added to its master's and let go."""
    gradient, weight.grad = weight.grad, None
    if gradient is not None:
        master.grad = gradient.float() if master.grad is None else master.grad.add_(gradient)


@contextmanager
def _float16_widened(model: nn.Module) -> Iterator[None]:
    """Float32 in place of all that is float16, if anything is; afterwards float16 again."""
    tensors = [tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.dtype is torch.float16]
    for tensor in tensors:
        tensor.data = tensor.data.float()
    try:
        yield
    finally:
        for tensor in tensors:
            tensor.data = tensor.data.half()


def _accelerator() -> Accelerator:
    from accelerate import Accelerator, FullyShardedDataParallelPlugin  # a second of imports that only training needs
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    processes.start()
    home = processes.device()
    if processes.count() == 1:
        if AcceleratorState._shared_state and AcceleratorState().device.type != home.type:
            AcceleratorState._reset_state(reset_partial_state=True)  # an earlier training was somewhere else
        if home.index is not None:
            torch.accelerator.set_device_index(home.index)
    on_cpu = home.type == "cpu"
    accelerator = Accelerator(mixed_precision="bf16" if not on_cpu and _has_fast_bf16() else "no", cpu=on_cpu)
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
