"""Which indices of which tensors are one unit, from what reaches what (`reach`)."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from overhaul.errors import RequestError, did_you_mean
from overhaul.groups.reach import Axis, Links, Reach
from overhaul.modes import at_rest, uncompiled
from overhaul.parts import is_norm, kind_of, probe
from overhaul.stack import LayerStack
from overhaul.stack.arrangement import is_hub_model
from overhaul.stack.calls import Calls, invoke
from overhaul.trace.sites import Contribution, sites

Unit = Literal["mlp.neuron", "attention.head", "residual.channel", "channel"]
UNITS: tuple[str, ...] = get_args(Unit)
_RESULT: Axis = ("", 0)
_PLANNED = 100_000_000
"""The largest network, in parameters, of which a plan makes one with random numbers."""


@dataclass(frozen=True)
class Slice:
    """What units own of one axis of one tensor.

    Attributes:
        tensor: its name; a tied one stands under its first name.
        axis: of the tensor.
        units: for each index along the axis the unit that it belongs to, -1 for none [size of the axis].
        reads: whether the tensor reads the units there: they are its inputs.
    """

    tensor: str
    axis: int
    units: Tensor = field(repr=False)
    reads: bool

    def kept(self, keep: Tensor) -> Tensor:
        """The indices that stay: those of units that stay, and those of none."""
        return (torch.cat([keep, keep.new_ones(1)])[self.units]).nonzero()[:, 0]


@dataclass(frozen=True, eq=False)
class Group:
    """The units of one place: what leaves is one of them, or several.

    Attributes:
        unit: what they are ("mlp.neuron").
        depth: the block that they lie in; None for what many blocks share.
        size: how many there are.
        slices: what they own, first what writes them.
        stack: the path of the stack whose units they are; "" without one.
    """

    unit: str
    depth: int | None
    size: int
    slices: tuple[Slice, ...]
    stack: str = ""

    @property
    def where(self) -> str:
        """What the units are and where they lie, in words."""
        return self.unit if self.depth is None else f"{self.unit} of block {self.depth}"

    def check_of(self, model: nn.Module) -> None:
        """Refuse a network that has not the tensors that the units own.

        Raises:
            RequestError: the group was found on another network, or before this one was cut.
        """
        for part in self.slices:
            try:
                shape = tuple(tensor_of(model, part.tensor).shape)
            except AttributeError:
                shape = ()
            if len(shape) <= part.axis or shape[part.axis] != len(part.units):
                here = f"is {list(shape)}" if shape else "is not there"
                raise RequestError(
                    f"These units ({self.where}) are of another {type(model).__name__}, or of this one before it was cut: "
                    f"{part.tensor} had {len(part.units)} along axis {part.axis}, and here it {here}. Find its own: "
                    f"groups(model, {self.unit!r})."
                )

    def sums(self, model: nn.Module, score: Callable[[str, Tensor], Tensor]) -> Tensor:
        """For each unit the sum of a score over all numbers that it owns.

        Args:
            model: the network.
            score: (name, tensor) -> a value for each of its numbers.

        Returns:
            The sums [size].

        Raises:
            RequestError: the group is of another network.
        """
        self.check_of(model)
        found = torch.zeros(self.size + 1, dtype=torch.float64)
        for part in self.slices:
            values = score(part.tensor, tensor_of(model, part.tensor).detach())
            sums = values.double().movedim(part.axis, 0).reshape(len(part.units), -1).sum(1)
            found.index_add_(0, part.units % (self.size + 1), sums.cpu())  # the last for those of none
        return found[:-1]


def tensor_of(model: nn.Module, name: str) -> Tensor:
    """A parameter or a buffer by its name."""
    module, _, own = name.rpartition(".")
    return getattr(model.get_submodule(module), own)


def groups(model: nn.Module | LayerStack, unit: Unit, *, inputs: Mapping[str, Any] | None = None) -> list[Group]:
    """Find what leaves together.

    Args:
        model: a network, or one of its stacks where it has several.
        unit: which units; see the package.
        inputs: what the network is run on, if random tokens or images will not do: its keyword arguments, two samples.
            Weights, modes and random state are as before afterwards.

    Returns:
        One group for every place: every block, or the residual stream, or a set of layers whose channels are added up.

    Raises:
        RequestError: the network has none, or what they are cannot be told.
    """
    if unit not in UNITS:
        raise RequestError(f"There is no unit {unit!r}.{did_you_mean(unit, UNITS)}")
    network = model.model if isinstance(model, LayerStack) else model
    network = _with_numbers(network)
    model = LayerStack.at(network, model.path) if isinstance(model, LayerStack) else network
    inputs = probe(network) if inputs is None else inputs
    with torch.no_grad(), at_rest(network), uncompiled(), torch.random.fork_rng(devices=[]):
        if unit == "channel":
            return _channels(network, inputs)
        stack = model if isinstance(model, LayerStack) else LayerStack.of(model)
        return _residual(stack, inputs) if unit == "residual.channel" else _in_blocks(stack, unit, inputs)


def _with_numbers(model: nn.Module) -> nn.Module:
    """A network of the same structure with random numbers, where it has none because a run is only planned."""
    parameters = list(model.parameters())
    fake = any(isinstance(parameter, FakeTensor) for parameter in parameters)
    if not fake or not is_hub_model(model) or sum(parameter.numel() for parameter in parameters) > _PLANNED:
        return model
    kind: Any = type(model)
    return kind(copy.deepcopy(model.config)).eval()


# what is asked for


def _in_blocks(stack: LayerStack, unit: str, inputs: Mapping[str, Any]) -> list[Group]:
    """Groups inside single blocks."""
    calls = Calls.record(stack, inputs)
    found: list[Group] = []
    state = calls.entering
    told: dict[Any, tuple[str, list[Group]]] = {}
    for place, (name, block) in enumerate(_blocks(stack)):
        kind = kind_of(block)
        if kind not in told:
            reach = Reach(block, lambda place=place, state=state: calls.run(place, state), _norms(block))
            told[kind] = name, _of_role(stack, inputs, place, unit, _joined(reach, list(reach.outputs), unit, place))
        _, known = told[kind]
        found += [_moved(group, f"{name}.", place, stack.path) for group in known]
        state = calls.run(place, state)
    return _or_refused(found, unit, stack.model)


def _of_role(stack: LayerStack, inputs: Mapping[str, Any], place: int, unit: str, found: list[Group]) -> list[Group]:
    """Those groups of a block that attention, or the MLP, writes from."""
    (known,) = sites(stack, inputs, [place])
    terms = [known.mlp] if unit == "mlp.neuron" else [known.attention, known.cross_attention]
    block = f"{known.block}."
    return [
        group
        for group in found
        if any(
            term and all(_writes(f"{block}{part.tensor}", term) for part in group.slices if part.reads)
            for term in terms
        )
    ]


def _writes(tensor: str, term: Contribution) -> bool:
    return tensor.startswith(f"{term.module}.") or (term.projection is not None and tensor == term.projection.parameter)


def _moved(group: Group, prefix: str, place: int, stack: str) -> Group:
    """The same group under the names of the whole model."""
    slices = tuple(Slice(f"{prefix}{s.tensor}", s.axis, s.units, s.reads) for s in group.slices)
    return Group(group.unit, place, group.size, slices, stack)


def _residual(stack: LayerStack, inputs: Mapping[str, Any]) -> list[Group]:
    """The stream that the blocks write into."""
    (known,) = sites(stack, inputs, [0])
    if known.mlp is None or known.mlp.projection is None:
        raise RequestError(
            f"What the blocks of {stack.path} add to their stream cannot be told, so neither can which tensors have its "
            'width. In a network of convolutions it is one of the groups of "channel".'
        )
    blocks = _blocks(stack)
    alike: dict[Any, list[str]] = {}
    for name, block in blocks:
        alike.setdefault(kind_of(block), []).append(f"{name}.")
    copies = {names[0]: names[1:] for names in alike.values()}
    inside, looked = tuple(f"{name}." for name, _ in blocks), tuple(copies)

    def looked_into(name: str) -> bool:
        return name.startswith(looked) or not name.startswith(inside)

    reach = Reach(stack.model, lambda: invoke(stack.model, inputs), _norms(stack.model))
    stream = known.mlp.projection
    width = reach.tensors[stream.parameter].shape[-2 if stream.orientation == "out, in" else -1]
    writers = [a for a in reach.outputs if looked_into(a[0]) and reach.tensors[a[0]].shape[a[1]] == width]
    found = _joined(reach, writers, "residual.channel", None, looked_into, copies)
    return _or_refused(
        [group for group in found if any(s.tensor == stream.parameter and not s.reads for s in group.slices)],
        "residual.channel",
        stack.model,
    )


def _channels(model: nn.Module, inputs: Mapping[str, Any]) -> list[Group]:
    """All groups of a network."""
    reach = Reach(model, lambda: invoke(model, inputs), _norms(model))
    return _or_refused(_joined(reach, list(reach.outputs), "channel", None), "channel", model)


def _or_refused(found: list[Group], unit: str, model: nn.Module) -> list[Group]:
    if not found:
        raise RequestError(
            f"No {unit} of {type(model).__name__} can leave on its own: there is none, every one is part of what the "
            "network returns, or something mixes all of them without being a linear layer, a convolution or a norm."
        )
    return found


def _blocks(stack: LayerStack) -> list[tuple[str, nn.Module]]:
    names = {module: name for name, module in stack.model.named_modules()}
    return [(names[block], block) for block in stack.blocks]


def _norms(model: nn.Module) -> set[str]:
    """Norms whose statistics go over channels: all but those that only scale in eval mode."""
    return {
        name
        for name, module in model.named_modules()
        if not isinstance(module, nn.modules.batchnorm._NormBase | nn.GroupNorm) and is_norm(module)
    }


# what belongs together


class _Nodes:
    """Indices of axes, and which of them are one unit."""

    def __init__(self, sizes: Callable[[Axis], int]) -> None:
        self.sizes, self.starts, self.count = sizes, dict[Axis, int](), 0
        self.edges: list[Tensor] = []

    def of(self, axis: Axis, indices: Tensor) -> Tensor:
        """The nodes of some indices."""
        if axis not in self.starts:
            self.starts[axis] = self.count
            self.count += 1 if axis == _RESULT else self.sizes(axis)
        return indices + self.starts[axis]

    def join(self, one: Axis, at: Tensor, other: Axis, there: Tensor) -> None:
        """Indices of two axes, pair by pair, are one."""
        self.edges.append(torch.stack([self.of(one, at), self.of(other, there)]))

    def labels(self) -> Tensor:
        """A number for each node, the same for those that are one."""
        pairs = torch.cat(self.edges, dim=1).numpy() if self.edges else numpy.zeros((2, 0), int)
        graph = coo_array((numpy.ones(pairs.shape[1], bool), tuple(pairs)), shape=(self.count, self.count))
        return torch.from_numpy(connected_components(graph, directed=False)[1]).long()


def _joined(
    reach: Reach,
    writers: Iterable[Axis],
    unit: str,
    place: int | None,
    looked_into: Callable[[str], bool] = lambda name: True,
    copies: Mapping[str, list[str]] | None = None,
) -> list[Group]:
    """The groups among what some axes reach.

    Args:
        reach: the passes.
        writers: outputs of weights that are looked at.
        unit: what the groups are of.
        place: of the block.
        looked_into: whether a tensor that multiplies nothing (a norm's, a position's) is looked at.
        copies: of each block that was looked into, those that are alike.
    """
    nodes = _Nodes(lambda axis: reach.tensors[axis[0]].shape[axis[1]])
    known: dict[Any, Axis] = {}
    writing: list[Axis] = []
    for axis in writers:
        # what is not one to one is no part of a stream; in a block, it may be a head
        links = reach.links(axis, "together" if unit == "residual.channel" else "halved")
        for one in _copied([axis], copies):
            writing += one
        _join(nodes, axis, links, known, copies)
    writing += list(_beside(reach, nodes, writing))
    labels = nodes.labels()
    for axes in _others(reach, looked_into):
        links = reach.links(axes[0], "halved" if _beside_a_weight(reach, axes[0]) else "nothing")
        if not links.out and (pairs := _one_each(nodes, labels, links)) is not None:
            key, at = pairs
            for alike in _copied(axes, copies):
                for axis in alike:
                    nodes.join(axis, at[1], key, at[0])
    return _groups(nodes, set(writing), set(reach.inputs), unit, place)


def _join(
    nodes: _Nodes, axis: Axis, links: Links, known: dict[Any, Axis], copies: Mapping[str, list[str]] | None
) -> None:
    """What an axis reaches, for it and the same one of other blocks; what was reached so before, through what reached it."""
    everything = torch.arange(nodes.sizes(axis))
    for key, pairs in links.pairs.items():
        first = known.setdefault((key, pairs.shape, pairs.numpy().tobytes()), axis) if links.exact else axis
        for one, other in _copied([axis, key if first == axis else first], copies):
            nodes.join(one, pairs[1], other, pairs[0] if first == axis else pairs[1])
    if links.out:
        for (one,) in _copied([axis], copies):
            nodes.join(one, everything, _RESULT, torch.zeros_like(everything))


def _copied(axes: list[Axis], copies: Mapping[str, list[str]] | None) -> Iterator[list[Axis]]:
    """The same axes, then those of other blocks that are alike, where the first is in a block."""
    yield axes
    block = next((name for name in copies or {} if axes[0][0].startswith(name)), None)
    for other in (copies or {}).get(block or "", ()):
        yield [(f"{other}{n.removeprefix(block or '')}" if n.startswith(block or "") else n, a) for n, a in axes]


def _beside(reach: Reach, nodes: _Nodes, writers: Iterable[Axis]) -> Iterator[Axis]:
    """Vectors that lie beside a weight and are as long as its outputs (a bias) go with them."""
    for name, axis in list(writers):
        module, size = name.rpartition(".")[0], reach.tensors[name].shape[axis]
        for other, tensor in reach.tensors.items():
            if other.rpartition(".")[0] == module and tuple(tensor.shape) == (size,):
                nodes.join((name, axis), torch.arange(size), (other, 0), torch.arange(size))
                yield other, 0


def _others(reach: Reach, looked_into: Callable[[str], bool]) -> Iterator[list[Axis]]:
    """Axes of what multiplies nothing: of a module's vectors of one length (a norm's) together, of anything else each."""
    products = {name for name, _ in reach.outputs}
    modules = {name.rpartition(".")[0] for name in products}
    vectors: dict[tuple[str, int], list[Axis]] = {}
    for name, tensor in reach.tensors.items():
        if name in products or not looked_into(name):
            continue
        module = name.rpartition(".")[0]
        if tensor.ndim == 1:
            if module not in modules or not any(
                tensor.shape[0] == reach.tensors[n].shape[a] for n, a in reach.outputs if n.rpartition(".")[0] == module
            ):
                vectors.setdefault((module, len(tensor)), []).append((name, 0))
        else:
            yield from ([(name, axis)] for axis, size in enumerate(tensor.shape) if size > 1)
    yield from vectors.values()


def _beside_a_weight(reach: Reach, axis: Axis) -> bool:
    """Whether a tensor is a vector, or lies in a module that has a weight (the biases of experts)."""
    module = axis[0].rpartition(".")[0]
    return reach.tensors[axis[0]].ndim == 1 or any(name.rpartition(".")[0] == module for name, _ in reach.outputs)


def _one_each(nodes: _Nodes, labels: Tensor, links: Links) -> tuple[Axis, Tensor] | None:
    """Where each index reaches one unit alone: inputs, and their pairs with the indices."""
    if not links.pairs or any(key not in nodes.starts for key in links.pairs):
        return None
    parts = [torch.stack([pairs[1], labels[nodes.of(key, pairs[0])]]) for key, pairs in links.pairs.items()]
    met = torch.cat(parts, dim=1).unique(dim=1)
    if len(met[0].unique()) < met.shape[1]:  # such as a norm of every head alike
        return None
    key, pairs = max(links.pairs.items(), key=lambda found: found[1].shape[1])
    return key, pairs


def _groups(nodes: _Nodes, writing: set[Axis], reading: set[Axis], unit: str, place: int | None) -> list[Group]:
    """Units that own something of the same tensors, as one group each; what nothing writes, or the result holds, is none."""
    labels = nodes.labels()
    spans = {axis: labels[start : start + nodes.sizes(axis)] for axis, start in nodes.starts.items() if axis != _RESULT}
    fixed = set(labels[nodes.starts[_RESULT]][None].tolist()) if _RESULT in nodes.starts else set[int]()
    owned: dict[int, list[Axis]] = {}
    for axis, span in spans.items():
        for label in span.unique().tolist():
            owned.setdefault(label, []).append(axis)
    alike: dict[tuple[Axis, ...], list[int]] = {}
    for label, axes in owned.items():
        if label not in fixed and writing & {*axes} and reading & {*axes}:
            alike.setdefault(tuple(axes), []).append(label)
    found: list[Group] = []
    for axes, members in alike.items():
        order = dict.fromkeys(itertools.chain.from_iterable(spans[axis].tolist() for axis in axes))
        number = torch.full((int(labels.max()) + 1,), -1)
        ordered = [label for label in order if label in set(members)]
        number[torch.tensor(ordered)] = torch.arange(len(ordered))
        slices = [Slice(name, axis, number[spans[name, axis]], (name, axis) in reading) for name, axis in axes]
        found.append(Group(unit, place, len(members), tuple(sorted(slices, key=lambda part: part.reads))))
    return found
