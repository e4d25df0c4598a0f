"""Reach: which inputs of later weights an index of a tensor ends up in, found by letting it be NaN; never by name.

    reach = Reach(model, run)                         # `run` is a forward pass of a few positions
    reach.of(("fc1.weight", 0), torch.tensor([3]))    # {("fc2.weight", 1): only input 3}

1. What has NaN in it stays NaN, whatever it is added to or multiplied with (zero included), and nothing else becomes NaN: so
   what is NaN where a weight reads shows which inputs depend on the index, for any values of the weights.
2. A product with a weight (a linear layer, a convolution, one expert of several) is where a path ends: it is watched below
   the modules, reads zeros for what is NaN, and goes on clean.
3. A norm passes on which channels are NaN, though its statistics depend on all: what follows from that is for `groups`.
4. Indices by the bits of their numbers: 2 log2(n) passes tell all n where every input depends on one index at most.
   Elsewhere (a query reaches all outputs of its head) they are halved until each reaches what all of a part reach: a few of
   the part answer for it.
5. Tensors are written to in place, and are the same bits afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Axis = tuple[str, int]
"""An axis of a tensor of the model: its first name, and which."""

Reached = dict[Axis, Tensor]
"""Inputs of weights -> which of them, a boolean for each index."""

_aten: Any = torch.ops.aten
_PRODUCTS = {_aten.mm: 0, _aten.bmm: 0, _aten._grouped_mm: 0, _aten.addmm: 1, _aten.baddbmm: 1}
"""Products of two matrices -> where the first is among the arguments."""


@dataclass(frozen=True)
class Links:
    """What an axis reaches.

    Attributes:
        pairs: inputs of a weight -> (indices there, indices of the axis), one pair a column.
        out: whether it reaches what the model, or the block, returns.
        exact: whether no input depends on several indices.
    """

    pairs: Mapping[Axis, Tensor]
    out: bool
    exact: bool


class Reach:
    """One forward pass, run again and again.

    Attributes:
        outputs: of every weight that multiplies: the axes along which its outputs are counted.
        inputs: the axes along which it reads.
    """

    def __init__(self, model: nn.Module, run: Callable[[], Any], norms: set[str]) -> None:
        self.run, self.norms = run, [model.get_submodule(name) for name in sorted(norms)]
        named = [*model.named_parameters(), *model.named_buffers()]
        self.tensors = {name: tensor.data for name, tensor in named if tensor.is_floating_point() and tensor.numel()}
        watch = self._watched(None)
        self.outputs, self.inputs = watch.outputs, watch.inputs

    @torch.no_grad()
    def of(self, axis: Axis, indices: Tensor) -> tuple[Reached, bool]:
        """What some indices of an axis reach together, and whether the result is among it."""
        if not len(indices):
            return {}, False
        tensor, indices = self.tensors[axis[0]], indices.to(self.tensors[axis[0]].device)
        kept = tensor.index_select(axis[1], indices)
        try:
            tensor.index_fill_(axis[1], indices, torch.nan)
            watch = self._watched(axis)
        finally:
            tensor.index_copy_(axis[1], indices, kept)
        return watch.seen, watch.out

    def links(self, axis: Axis, otherwise: Literal["halved", "together", "nothing"] = "halved") -> Links:
        """What every index of an axis reaches.

        Args:
            axis: the axis.
            otherwise: what is done where an input depends on several indices: they are "halved" until it is known on which;
                or all that they reach is taken "together"; or there is "nothing" to say.
        """
        size = self.tensors[axis[0]].shape[axis[1]]
        every = torch.arange(size)
        seen, out = self.of(axis, every)
        if not seen:
            return Links({}, out, True)
        pairs = self._by_bits(axis, every)
        if pairs is not None or otherwise == "nothing":
            return Links(pairs or {}, out, pairs is not None)
        if otherwise == "together":
            return Links({key: _all_with_all(inputs, every) for key, inputs in seen.items()}, out, False)
        found: dict[Axis, list[Tensor]] = {}
        for key, some in self._halved(axis, every, seen):
            found.setdefault(key, []).append(some)
        return Links({key: torch.cat(parts, dim=1) for key, parts in found.items()}, out, False)

    def _by_bits(self, axis: Axis, indices: Tensor) -> dict[Axis, Tensor] | None:
        """What single indices reach; None where an input depends on several."""
        bits = range(max(1, (len(indices) - 1).bit_length()))
        order = torch.arange(len(indices))
        passes = [[self.of(axis, indices[(order >> bit & 1) == one])[0] for bit in bits] for one in (0, 1)]
        pairs: dict[Axis, Tensor] = {}
        for key in dict.fromkeys(key for half in passes for seen in half for key in seen):
            none = torch.zeros(self.tensors[key[0]].shape[key[1]], dtype=torch.bool)
            zeros, ones = (torch.stack([seen.get(key, none) for seen in half]) for half in passes)
            if bool((zeros & ones).any()) or not torch.equal((zeros | ones).any(0), (zeros | ones).all(0)):
                return None
            at = zeros[0] | ones[0]
            places = (ones.long() << torch.tensor(bits)[:, None]).sum(0)
            pairs[key] = torch.stack([at.nonzero()[:, 0], indices[places[at]]])
        return pairs

    def _halved(self, axis: Axis, indices: Tensor, seen: Reached) -> Iterator[tuple[Axis, Tensor]]:
        """Parts of some indices, told apart: each index with its own inputs, or all with all where each reaches all."""
        first, second, *others = (
            self.of(axis, indices[n : n + 1])[0]
            for n in (0, min(1, len(indices) - 1), len(indices) // 2, len(indices) - 1)
        )
        if all(_same(single, seen) for single in (first, second, *others)):
            for key, inputs in seen.items():
                yield key, _all_with_all(inputs, indices)
            return
        pairs = self._by_bits(axis, indices)
        if pairs is not None:
            yield from pairs.items()
            return
        alternating = _same(first, second) and all(int(inputs.sum()) == 1 for inputs in first.values())
        for half in (indices[::2], indices[1::2]) if alternating else indices.chunk(2):
            yield from self._halved(axis, half, self.of(axis, half)[0])

    def _watched(self, written: Axis | None) -> _Watch:
        # other kernels of attention leave out what is NaN
        with (
            torch.no_grad(),
            sdpa_kernel(SDPBackend.MATH),
            _passing(self.norms),
            _Watch(self.tensors, written) as watch,
        ):
            result = self.run()
        watch.out |= any(isinstance(leaf, Tensor) and _has_nan(leaf) for leaf in tree_leaves(_plain(result)))
        return watch


def _all_with_all(inputs: Tensor, indices: Tensor) -> Tensor:
    """As few pairs as connect them: each input with the first index, and each index with the first input."""
    at = inputs.nonzero()[:, 0]
    first = torch.stack([at, indices[:1].expand(len(at))])
    return torch.cat([first, torch.stack([at[:1].expand(len(indices)), indices])], dim=1)


def _same(one: Reached, other: Reached) -> bool:
    return one.keys() == other.keys() and all(torch.equal(seen, other[key]) for key, seen in one.items())


def _plain(result: Any) -> Any:
    """An output of transformers as a dict, which can be looked through."""
    return dict(result) if isinstance(result, Mapping) else result


def _has_nan(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and bool(tensor.isnan().any())


def _clean(tensor: Tensor) -> Tensor:
    return tensor.nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf)


@contextmanager
def _passing(norms: list[nn.Module]) -> Iterator[None]:
    """Inside it, norms hand on which channels are NaN, and nothing else of it."""

    def passing(forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(state: Tensor, *args: Any, **kwargs: Any) -> Any:
            given = forward(_clean(state), *args, **kwargs)
            return given.masked_fill(state.isnan(), torch.nan) if given.shape == state.shape else given

        return run

    own = [vars(norm).get("forward") for norm in norms]
    try:
        for norm in norms:
            norm.forward = passing(norm.forward)
        yield
    finally:
        for norm, forward in zip(norms, own, strict=True):
            vars(norm).pop("forward", None)
            if forward is not None:
                norm.forward = forward


@dataclass(frozen=True)
class _Weight:
    """A tensor of the model as it stands in an operation: itself, or a view of it."""

    name: str
    whole: Tensor
    view: Tensor

    def axis(self, of_view: int) -> tuple[Axis, int] | None:
        """Which axis of the tensor one of the view is, told by how far apart its indices lie; and where it starts there."""
        size, stride = self.view.shape[of_view], self.view.stride(of_view)
        for n in range(self.whole.ndim):
            if size > 1 and self.whole.stride(n) == stride and self.whole.shape[n] >= size:
                before = int(self.view.storage_offset() - self.whole.storage_offset())
                return (self.name, n), before // stride % self.whole.shape[n]
        return None


class _Watch(TorchDispatchMode):
    """Sees every product with a weight: what of its input is NaN; and lets it go on without."""

    def __init__(self, tensors: Mapping[str, Tensor], written: Axis | None) -> None:
        super().__init__()
        self.written = written
        self.by_storage = {tensor.untyped_storage().data_ptr(): (name, tensor) for name, tensor in tensors.items()}
        self.seen: Reached = {}
        self.outputs: dict[Axis, None] = {}
        self.inputs: dict[Axis, None] = {}
        self.out = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet, args = func.overloadpacket, list(args)
        if packet in _PRODUCTS:
            self._product(args, _PRODUCTS[packet], (-1, -2), (-2, -1))
        elif packet is _aten.linear:
            self._product(args, 0, (-1, -1), (-2, -2))
        elif packet is _aten.convolution:
            self._convolution(args)
        elif packet is _aten.embedding and (table := self._weight(args[0])):
            self._writes(table, 1)
        return func(*args, **(kwargs or {}))

    def _product(self, args: list[Any], first: int, read: tuple[int, int], written: tuple[int, int]) -> None:
        """A product of which one factor is a weight, whichever; each with the axis that is summed over, and its other."""
        for weight, other in ((first + 1, first), (first, first + 1)):
            if (known := self._weight(args[weight])) is not None:
                self._writes(known, written[weight - first])
                args[other], args[weight] = self._reads(known, read[weight - first], args[other], read[other - first])
                return

    def _convolution(self, args: list[Any]) -> None:
        state, kernel, groups = args[0], args[1], args[8]
        weight = self._weight(kernel)
        if weight is None or (groups > 1 and kernel.shape[1] == 1):  # each channel on its own: nothing is mixed
            return
        if groups > 1:  # channels leave in runs as wide as a group, which no group here is
            self.out |= _has_nan(state) or _has_nan(kernel)
            args[0], args[1] = _clean(state), _clean(kernel)
            return
        into, out = (0, 1) if args[6] else (1, 0)  # transposed
        self._writes(weight, out)
        args[0], args[1] = self._reads(weight, into, state, state.ndim - kernel.ndim + 1)

    def _weight(self, tensor: Tensor) -> _Weight | None:
        found = self.by_storage.get(tensor.untyped_storage().data_ptr())
        return None if found is None or found[1].ndim < 2 else _Weight(*found, tensor)

    def _writes(self, weight: _Weight, axis: int) -> None:
        if found := weight.axis(axis):
            self.outputs[found[0]] = None

    def _reads(self, weight: _Weight, axis: int, state: Tensor, along: int) -> tuple[Tensor, Tensor]:
        """Note what of a state is NaN along an axis; both without it, where the axis itself was written to.

        Where it is not known which inputs these are, NaN goes on into all that is computed from them.
        """
        found = weight.axis(axis)
        if found is None:
            return state, weight.view
        key, start = found
        self.inputs[key] = None
        if _has_nan(state):
            nan = state.isnan().movedim(along, 0).flatten(1).any(1).cpu()
            columns = self.seen.setdefault(key, torch.zeros(weight.whole.shape[key[1]], dtype=torch.bool))
            columns[start : start + len(nan)] |= nan
        return _clean(state), _clean(weight.view) if key == self.written else weight.view
