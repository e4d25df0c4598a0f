"""Feed calibration data through a stack one block at a time, so that each block can be changed on what really enters it.

    for site in blockwise(stack, batches, inputs="changed"):
        for sample, target in zip(site.inputs, site.targets):
            loss = F.mse_loss(site.run(sample)[0], target[0])      # site.block is changed in place, here by gradients

1. With `inputs="uncut"` every block sees what the model fed it before anything was changed, so that blocks do not depend on
   each other. With "changed" it sees what its already changed predecessors make of the data. Targets are always what the
   unchanged block returned in the unchanged model; no copy of the model is needed for that.
2. Each block runs once on each batch in each of the two streams, and nothing else runs but what lies before the stack.
3. Only one block lies on the device. States rest in main memory up to a budget and beyond it in safetensors files; masks,
   rotary tables and conditioning are kept once for all blocks and batches that share their values.
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from overhaul import session
from overhaul.errors import RequestError, RunError, writing
from overhaul.modes import at_rest
from overhaul.stack import LayerStack
from overhaul.stack.calls import Call, Calls, State, map_tensors, state_bytes
from overhaul.trace import capture, merged

Result = TypeVar("Result")

BUDGET = 2**32
"""Bytes of main memory for states and arguments of blocks: 4 GiB."""


@dataclass(frozen=True)
class Sample:
    """One batch at one block.

    Attributes:
        state: what enters the block; its first part is the hidden states, [b, t, d] or [b, c, h, w].
        call: the block's other arguments: masks, rotary tables, conditioning.
        calls: all that was recorded of this batch.
    """

    state: State
    call: Call
    calls: Calls

    @property
    def mask(self) -> Tensor | None:
        """Which positions are no padding, [b, t], where the batch says so of the sequences that pass this stack."""
        mask, state = self.calls.inputs.get("attention_mask"), self.state[0]
        fits = isinstance(mask, Tensor) and state is not None and mask.shape == state.shape[:2]
        return mask if fits else None

    def finish(self, state: State) -> Any:
        """What the model makes of a state that left its last block: logits for a batch, else the model's own output."""
        home = next(self.calls.stack.model.parameters()).device
        inputs = map_tensors(dict(self.calls.inputs), lambda value: value.to(home))
        return replace(self.calls, inputs=inputs).finish(_moved(state, home))


class Site:
    """One block with the data that flows through it, for as long as the loop stays at it."""

    def __init__(self, flow: _Flow, place: int) -> None:
        self._flow = flow
        self.place = place

    @property
    def block(self) -> nn.Module:
        """The block as it is now, on the device."""
        return self._flow.stack.blocks[self.place]

    @property
    def inputs(self) -> Iterator[Sample]:
        """What enters the block, one sample for each batch, read again each time."""
        return self._flow.samples(self.place)

    @property
    def targets(self) -> Iterator[State]:
        """What the unchanged block of the unchanged model returned for each batch.

        Raises:
            RequestError: they were not asked for.
        """
        return self._flow.targets(self.place)

    @torch.no_grad()
    def measure(self, names: Iterable[str], reduce: Callable[..., Result | None]) -> dict[str, Result]:
        """What passes modules inside the block as it is now, reduced and joined over all samples as in `trace.measure`.

        Args:
            names: sites inside the block: modules by their names in it ("mlp.up_proj"), or "into.NAME" for what enters one.
            reduce: (state [b, t, d], mask [b, t]) -> result; padding is not in the mask.

        Raises:
            RequestError: the block has no such module.
        """
        stack = self._flow.stack
        prefix = next(name for name, module in stack.model.named_modules() if module is self.block)
        sites = {_inside(prefix, name): name for name in names}
        seen: dict[str, Result] = {}
        with at_rest(self.block):
            for sample in self.inputs:
                with capture(stack, sites, reduce, mask=sample.mask) as found:
                    self.run(sample)
                seen = merged(seen, found)
        return {sites[site]: result for site, result in seen.items()}

    def run(self, sample: Sample) -> State:
        """The block as it is now on a sample, with gradients where they are on, in the mode it is in."""
        return sample.calls.run(self.place, sample.state, call=sample.call)


def blockwise(
    stack: LayerStack,
    batches: Iterable[Mapping[str, Any]],
    inputs: Literal["uncut", "changed"] = "changed",
    *,
    targets: bool = True,
    device: str | torch.device | None = None,
    budget: int = BUDGET,
) -> Generator[Site, None, None]:
    """Visit every block in order with its inputs and targets.

    The block may be changed in place, or replaced in the stack, while the loop stays at it; where the loop goes on, the
    data moves one block further. States are computed in eval mode without gradients.

    Args:
        stack: the stack.
        batches: collated batches, or mappings of the model's own keyword arguments; read once and kept.
        inputs: whether a block gets what its predecessors made of the data before they were changed, or after.
        targets: whether targets are needed. Without them, "changed" runs each block once and not twice on each batch.
        device: where the block at hand lies, its inputs and targets with it; None for where it is. It is moved back after.
        budget: most bytes of states and arguments that rest in main memory. What goes beyond it lies in a temporary
            folder, in the session's scratch if there is one, until the loop ends.

    Yields:
        A `Site` for each block. Who stops before the last one closes the loop.

    Raises:
        RequestError: there is no batch, the budget does not hold the arguments of all blocks and one state, or the blocks
            cannot be run by hand.
        RunError: a state is not finite, or a file cannot be written.
    """
    if inputs not in ("uncut", "changed"):
        raise RequestError(f'blockwise: inputs={inputs!r} is neither "uncut" nor "changed".')
    flow = _Flow(stack, inputs == "changed", targets, None if device is None else torch.device(device), _Store(budget))
    return flow.sites(batches)


class _Flow:
    """Both streams of states, at one block."""

    def __init__(
        self, stack: LayerStack, changed: bool, targets: bool, device: torch.device | None, store: _Store
    ) -> None:
        self.stack, self.changed, self.wanted, self.device, self.store = stack, changed, targets, device, store
        self.place = 0
        self.here = self.home = next(stack.model.parameters()).device
        self.calls: list[Calls] = []
        self.entering: list[_Kept] = []
        self.uncut: list[_Kept] = []

    def sites(self, batches: Iterable[Mapping[str, Any]]) -> Generator[Site, None, None]:
        count = len(self.stack)
        try:
            for place in session.progress(range(count), "blocks", count):
                self.place = place
                with self._on_device():
                    self._arrive(batches)
                    yield Site(self, place)
                    if self.changed and place < count - 1:
                        self._step(self.entering, "with the changes made so far")
        finally:
            self.store.close()

    def samples(self, place: int) -> Iterator[Sample]:
        """What enters the block at hand, on its device."""
        for calls, kept in zip(self.calls, self.entering, strict=True):
            self._check(place)
            yield self._sample(calls, kept)

    def targets(self, place: int) -> Iterator[State]:
        """What left the unchanged block at hand, on its device."""
        if not self.wanted:
            raise RequestError("blockwise: this loop was started with targets=False; leave that out to have targets.")
        for kept in self.uncut:
            self._check(place)
            yield _moved(kept.load(), self.here)

    def _check(self, place: int) -> None:
        if place != self.place or self.store.closed:
            raise RequestError(f"blockwise: the loop has left block {place}, and what entered it is gone.")

    def _sample(self, calls: Calls, kept: _Kept) -> Sample:
        call = calls.calls[self.place].map(lambda value: value.to(self.here))
        return Sample(_moved(kept.load(), self.here), call, calls)

    def _arrive(self, batches: Iterable[Mapping[str, Any]]) -> None:
        """Both streams at the block at hand, which nobody has changed yet."""
        if self.place == 0:
            self._record(batches)
        elif self.changed:
            if self.wanted:
                self._step(self.uncut, "though nothing was changed")
        else:
            for kept in self.entering:
                self.store.drop(kept)
            self.entering = list(self.uncut)
            self._step(self.uncut, "though nothing was changed", keep_old=True)

    def _record(self, batches: Iterable[Mapping[str, Any]]) -> None:
        """How each batch enters the stack and how it leaves the first block."""
        for batch in batches:
            inputs = map_tensors(dict(batch), lambda value: value.to(self.home))
            with at_rest(self.stack.model):
                calls = Calls.record(self.stack, inputs, self.here)
            known: dict[int, Tensor] = {}
            shared = tuple(call.map(lambda value, known=known: self.store.share(value, known)) for call in calls.calls)
            self.entering.append(self._keep(calls.entering, f"What enters block 0 of {self.stack.path}"))
            if self.wanted or not self.changed:
                self.uncut.append(
                    self._keep(calls.after_first, f"What leaves block 0 of {self.stack.path}, unchanged,")
                )
            self.calls.append(replace(calls, inputs=batch, entering=(), after_first=(), calls=shared, before=()))
        if not self.calls:
            raise RequestError("blockwise: there is no batch to feed through the blocks.")

    @torch.no_grad()
    def _step(self, stream: list[_Kept], when: str, *, keep_old: bool = False) -> None:
        """Take a stream through the block at hand, as it is now."""
        with at_rest(self.stack.blocks[self.place]):
            for n, (calls, kept) in enumerate(zip(self.calls, stream, strict=True)):
                sample = self._sample(calls, kept)
                state = calls.run(self.place, sample.state, call=sample.call)
                if not keep_old:
                    self.store.drop(kept)
                stream[n] = self._keep(state, f"What leaves block {self.place} of {self.stack.path}, {when},")

    def _keep(self, state: State, what: str) -> _Kept:
        for part in state:
            # minus infinity is what a position bias holds where a mask was added to it
            if part is not None and part.is_floating_point() and not bool((part < math.inf).all()):
                raise RunError(
                    f"{what} is not finite (NaN or infinite), so nothing behind it can be measured. Look at what was done "
                    "to this block and those before it; in float16 a larger range may be needed: take bfloat16."
                )
        return self.store.keep(state)

    @contextmanager
    def _on_device(self) -> Iterator[None]:
        """The block at hand on the device, and where it was again afterwards, also if another has taken its place."""
        first = next(self.stack.blocks[self.place].parameters(), None)
        before = self.home if first is None else first.device
        self.here = self.device or before
        self.stack.blocks[self.place].to(self.here)
        try:
            yield
        finally:
            self.stack.blocks[self.place].to(before)


class _Store:
    """Tensors in main memory up to a budget of bytes; states beyond it in files."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.used = 0
        self.shared = 0
        self.closed = False
        self.folder: Path | None = None
        self.files = 0
        self.resting: list[_Kept] = []
        self.arguments: dict[Any, Tensor] = {}

    def keep(self, state: State) -> _Kept:
        """Put a state away, in memory if it fits."""
        rested = map_tensors(state, _rested)
        size = state_bytes(rested)
        self._check(size)
        kept = _Kept(rested, size)
        if self.used + size > self.budget:
            self._write(kept)
        else:
            self.resting.append(kept)
            self.used += size
        return kept

    def share(self, tensor: Tensor, known: dict[int, Tensor]) -> Tensor:
        """The one tensor in memory that holds these values; `known` has those that this batch has met, by identity."""
        if id(tensor) not in known:
            rested = _rested(tensor)
            digest = hashlib.blake2b(rested.reshape(-1).view(torch.uint8).numpy().data).digest()
            key = (rested.shape, rested.dtype, digest)
            if key not in self.arguments:
                self.arguments[key] = rested
                self.used += rested.nbytes
                self.shared += rested.nbytes
                while self.used > self.budget and self.resting:
                    kept = self.resting.pop()
                    self.used -= kept.size
                    self._write(kept)
                self._check(0)
            known[id(tensor)] = self.arguments[key]
        return known[id(tensor)]

    def drop(self, kept: _Kept) -> None:
        """Forget a state."""
        if kept.file is not None:
            kept.file.unlink()
        else:
            self.resting.remove(kept)
            self.used -= kept.size

    def close(self) -> None:
        """Forget all, files included."""
        self.closed = True
        self.resting, self.arguments = [], {}
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _check(self, size: int) -> None:
        if self.shared + size > self.budget:
            raise RequestError(
                f"blockwise: the budget of {self.budget:,} bytes cannot hold one state ({size:,} bytes) beside what blocks "
                f"are called with ({self.shared:,} bytes: masks and the like). Give a larger budget, or smaller batches."
            )

    def _write(self, kept: _Kept) -> None:
        if self.folder is None:
            scratch = session.current().scratch
            if scratch is not None:
                scratch.mkdir(parents=True, exist_ok=True)
            self.folder = Path(tempfile.mkdtemp(prefix="blockwise-", dir=scratch))
        self.files += 1
        place = self.folder / f"{self.files}.safetensors"
        kept.write(place)


class _Kept:
    """A state at rest, in memory or in a file."""

    def __init__(self, state: State, size: int) -> None:
        self.state: State | None = state
        self.parts = len(state)
        self.size = size
        self.file: Path | None = None

    def load(self) -> State:
        """The state, in main memory."""
        if self.file is None:
            assert self.state is not None
            return self.state
        stored = load_file(self.file)
        return tuple(stored.get(str(n)) for n in range(self.parts))

    def write(self, file: Path) -> None:
        """Move the state from memory to a file."""
        assert self.state is not None
        partial = file.with_suffix(".partial")
        with writing(file):
            save_file({str(n): part for n, part in enumerate(self.state) if part is not None}, partial)
            os.replace(partial, file)
        self.file, self.state = file, None


def _inside(prefix: str, name: str) -> str:
    """A site inside a block, as the model names it."""
    path = name.removeprefix("into.")
    return f"{name[: len(name) - len(path)]}{prefix}.{path}"


def _rested(tensor: Tensor) -> Tensor:
    """In main memory, without a larger tensor that it is a part of."""
    host = tensor.detach().to("cpu").contiguous()
    return host.clone() if host.untyped_storage().nbytes() > host.nbytes else host


def _moved(state: State, device: torch.device) -> State:
    return map_tensors(state, lambda part: part.to(device))
