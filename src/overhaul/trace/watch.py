"""What a capture knows while forwards run: which positions count, what waits for its partner, what was reduced so far."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from overhaul.errors import RequestError, RunError
from overhaul.trace.streams import MAIN, Stream, argument, as_rows, first_of, leaving, parts, takes

Result = TypeVar("Result")


@dataclass
class Shape:
    """The stream in the forward that runs: its shape, and where it lies in its sequences.

    Attributes:
        value: its shape.
        start: how many positions a cache holds before it.
        cached: whether a cache is filled, so that what comes later runs in forwards of its own.
        mask: the mask that the model was given, if it was, [b, positions so far].
    """

    value: torch.Size | None = None
    start: int = 0
    cached: bool = False
    mask: Tensor | None = None

    def note(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A hook before each block."""
        entering = argument(block, MAIN, args, kwargs)
        self.value = entering.shape if isinstance(entering, Tensor) else None

    def note_start(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A hook before the first block."""
        cache = next((value for value in (*args, *kwargs.values()) if hasattr(value, "get_seq_length")), None)
        self.cached, self.start = cache is not None, 0
        if cache is None:
            return
        try:
            self.start = int(cache.get_seq_length())
        except ValueError:  # a cache of states alone counts nothing; the mask does
            length = argument(block, MAIN, args, kwargs).shape[1]
            self.start = 0 if self.mask is None else max(self.mask.shape[1] - length, 0)

    def note_mask(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """A hook before the modules around the stack: the innermost runs last and so has the last word.

        Returns:
            Whether the module says something of padding.
        """
        if not takes(module, "attention_mask"):
            return False
        mask = argument(module, "attention_mask", args, kwargs)
        # masks that were made ready for attention, [b, 1, t, t], say the same in another form
        told = mask is None or (isinstance(mask, Tensor) and mask.ndim == 2)
        if told:
            self.mask = mask
        return told


@dataclass
class Watch(Generic[Result]):
    """One capture.

    Attributes:
        reduce: the reduction.
        skip_first: how many positions at the start of each sample do not count.
        wanted: the sites and pairs of sites.
        shape: of the stream, with the mask.
        seen: site -> result so far.
    """

    reduce: Callable[..., Result | None]
    skip_first: int
    wanted: Sequence[str | tuple[str, str]]
    shape: Shape = field(default_factory=Shape)
    seen: dict[Any, Result] = field(default_factory=dict)
    _users: dict[str, list[Any]] = field(default_factory=dict)
    _passed: dict[Any, bool] = field(default_factory=dict)  # whether any position counted
    _waiting: dict[Any, tuple[str, Tensor]] = field(default_factory=dict)
    _mask: tuple[Any, Tensor, bool] | None = None

    def __post_init__(self) -> None:
        for site in self.wanted:
            for name in [site] if isinstance(site, str) else site:
                self._users.setdefault(name, []).append(site)

    @property
    def names(self) -> list[str]:
        """Every single site that is looked at."""
        return list(self._users)

    def note_mask(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A hook before the modules around the stack."""
        if self.shape.note_mask(module, args, kwargs):
            self._mask = None

    def read_module(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """A hook after a module."""
        self._arrive(name, first_of(name, "returned", output))

    def read_into(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A hook before a module that is no block."""
        self._arrive(name, first_of(name, "was given", (*args, *kwargs.values())))

    def read_entering(self, name: str, stream: Stream, block: nn.Module, args: Any, kwargs: Any) -> None:
        """A hook before a block."""
        self._arrive(name, argument(block, stream, args, kwargs))

    def read_leaving(self, name: str, stream: Stream, block: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """A hook after a block."""
        index = leaving(block, args, kwargs, output).get(stream)
        self._arrive(name, None if index is None else parts(output)[index])

    def finish(self) -> None:
        """Refuse a capture that saw nothing.

        Raises:
            RunError: nothing passed a site.
            RequestError: no position counted.
        """
        missed = [site for site in self.wanted if site not in self._passed]
        if missed:
            raise RunError(f"Nothing passed {missed[0]}: no forward ran inside the `with`, or none reached it.")
        empty = [site for site in self.wanted if not self._passed[site]]
        if empty:
            raise RequestError(
                f"No position counted at {empty[0]}: all were padding, or among the first {self.skip_first} of their "
                "sample. Give longer samples, or a smaller skip_first."
            )

    def _arrive(self, name: str, value: Any) -> None:
        if torch._C._current_graph_task_id() != -1:  # a backward pass recomputes what was seen before
            return
        if not isinstance(value, Tensor):  # the last block of SD3 returns no text
            self._passed |= dict.fromkeys(self._users[name], True)
            return
        state = as_rows(value.detach(), self.shape.value, name).float()
        kept: Tensor | None = None
        for site in self._users[name]:
            if site == name:
                self._add(site, name, state)
                continue
            other, waited = self._waiting.pop(site, (name, state))
            if other == name:
                # the model may go on working in what it handed over
                kept = state.clone() if kept is None else kept
                self._waiting[site] = (name, kept)
            else:
                self._add(site, name, *((waited, state) if site[1] == name else (state, waited)))

    def _add(self, site: Any, name: str, *states: Tensor) -> None:
        mask, counts = self._counting(states[0], name)
        self._passed[site] = self._passed.get(site, False) or counts
        value: Any = self.reduce(*states, mask) if counts else None
        if value is not None:
            self.seen[site] = self.seen[site] + value if site in self.seen else value

    def _counting(self, state: Tensor, name: str) -> tuple[Tensor, bool]:
        """The positions of a state that count, [b, t], and whether there are any."""
        batch, length = state.shape[:2]
        key = (batch, length, state.device)
        if self._mask is None or self._mask[0] != key:
            mask = torch.ones(batch, length, dtype=torch.bool, device=state.device)
            if self.shape.mask is not None:
                mask = self.shape.mask.to(state.device).bool()
                if len(mask) != batch or mask.shape[1] < length or length != (self.shape.value or (0, length))[1]:
                    raise RequestError(
                        f"{name} gives a state of {batch} samples with {length} positions, to which the attention mask "
                        f"{list(mask.shape)} does not belong: which of them are padding cannot be told."
                    )
            mask = mask & (mask.cumsum(1) > self.skip_first)
            mask = mask[:, mask.shape[1] - length :]  # with a cache, the last positions are the new ones
            self._mask = (key, mask, bool(mask.any()))
        return self._mask[1], self._mask[2]
