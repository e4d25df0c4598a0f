"""The processes of one run: who this is, what the others have, and what all agree on.

1. A run is started once (`overhaul run`) or several times over (`torchrun -m overhaul run`, `accelerate launch`). Alone,
   every function here returns at once.
2. Nothing that is exchanged is pickled: only tensors travel.
3. A process that fails ends; its launcher then ends the others. Which of them speaks is settled by `first_to_fail`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from overhaul import session
from overhaul.errors import RequestError, RunError

PATIENCE = timedelta(days=1)
"""How long a process waits for another, which may be judging a large model or saving it."""


def start() -> None:
    """Join the other processes if this one was launched as one of several; does nothing alone or a second time."""
    if "LOCAL_RANK" not in os.environ or _together():
        return
    from accelerate import PartialState

    # otherwise transformers fills all models but the first process's with noise, and every method may read its model
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    PartialState(cpu=not torch.accelerator.is_available(), timeout=PATIENCE)


def leave() -> None:
    """Part from the others at the end of the work, once all have come there."""
    if _together():
        wait()
        dist.destroy_process_group()


def device() -> torch.device:
    """Where models are worked on: what the session names, else the accelerator, else the processor.

    Raises:
        RequestError: torch sees no such device.
    """
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    here = torch.device("cpu") if found is None else found
    wanted = session.current().device
    if wanted is None:
        return here
    try:
        named = torch.device(wanted)
    except RuntimeError:
        raise RequestError(f"`device: {wanted}` is no device. Write cpu, cuda, cuda:1, mps, or auto.") from None
    there = named.type in ("cpu", here.type) and (named.index or 0) < max(1, torch.accelerator.device_count())
    if not there:
        seen = "the processor alone (cpu)" if found is None else f"cpu and {torch.accelerator.device_count()} of {here}"
        raise RequestError(f"`device: {wanted}` is not there: torch sees {seen}.")
    return named


def _together() -> bool:
    return dist.is_available() and dist.is_initialized()


def count() -> int:
    """How many processes there are."""
    return dist.get_world_size() if _together() else 1


def rank() -> int:
    """The number of this one, from 0."""
    return dist.get_rank() if _together() else 0


def is_main() -> bool:
    """Whether this is the process that writes files and shows progress."""
    return rank() == 0


def wait() -> None:
    """Go on when all processes have come here."""
    if count() > 1:
        total(torch.zeros(1))


def agreed(flag: bool) -> bool:
    """What the main process says, in all of them."""
    return flag if count() == 1 else bool(from_main(torch.tensor([float(flag)])))


def add_up(tensors: Sequence[Tensor]) -> None:
    """Replace every tensor by its sum over the processes, in place; each must lie on the process's device."""
    if count() > 1:
        with _among_others():
            for pending in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
                if pending is not None:
                    pending.wait()


def total(values: Tensor) -> Tensor:
    """The sum of `values` over the processes."""
    if count() == 1:
        return values
    summed = values.to(_device(), copy=True)
    add_up([summed])
    return summed.to(values.device)


def from_main(values: Tensor) -> Tensor:
    """The main process's `values`, which have one shape and dtype everywhere."""
    if count() == 1:
        return values
    sent = values.to(_device(), copy=True)
    with _among_others():
        dist.broadcast(sent, src=0)
    return sent.to(values.device)


def stacked(values: Tensor) -> Tensor:
    """The `values` of all processes along a new first dimension, [processes, ...]."""
    if count() == 1:
        return values[None]
    parts = [torch.empty_like(values, device=_device()) for _ in range(count())]
    with _among_others():
        dist.all_gather(parts, values.to(_device()))
    return torch.stack(parts).to(values.device)


@contextmanager
def _among_others() -> Iterator[None]:
    """Say in words that another process was ended, which its connection alone tells."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise RunError(
            f"Another process of this run has ended, or cannot be reached ({' '.join(str(error).split())[:200]}). Finished "
            "steps and checkpoints are kept; the same command goes on from there."
        ) from error


def _device() -> torch.device:
    """Where tensors must lie to be exchanged."""
    on_cpu = dist.get_backend() == "gloo"
    return torch.device("cpu") if on_cpu else torch.device(torch.accelerator.current_accelerator() or "cpu")


def first_to_fail() -> bool:
    """Whether this process is the first to fail, so that one of them alone says why; joins them if need be."""
    start()
    if count() == 1:
        return True
    try:
        return dist.distributed_c10d._get_default_store().add("overhaul/failures", 1) == 1
    except RuntimeError:  # the process that keeps the store has failed already
        return False
