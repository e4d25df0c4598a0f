"""Sites: which modules of a block add to the residual stream, found by running it and verified, never by name.

    found = sites(stack, inputs)
    found[3].attention.module             # "model.layers.3.self_attn": its first output is what attention adds
    found[3].mlp.projection               # ("model.layers.3.mlp.down_proj.weight", "out, in")

1. The contributions are the outputs whose sum is what the block adds: leaving - entering = attention (+ cross-attention)
   + MLP, element by element. In a post-norm block the sums end at the norms: norm(entering + attention), and so on. Where no
   sum fits (gates outside of modules, maps of images), a block is not `verified` and only its stream is known.
2. Attention is the contribution that carries from position to position: half of the positions of what enters the block are
   changed, all other contributions are held, and it changes at the others. Cross-attention changes with other inputs of
   the block, an MLP with neither.
3. An output projection is the weight of which one slice reaches one feature of the contribution and no other. Which axis
   the slice was taken from is its orientation. Weights are put back bit for bit.
4. A norm is a module without parts whose output does not grow with its input.
5. In a parallel block the MLP does not change when attention's contribution is set to zero.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from overhaul.errors import RequestError
from overhaul.modes import at_rest
from overhaul.stack import LayerStack
from overhaul.stack.calls import Calls
from overhaul.trace import Replace, Zero, intervene
from overhaul.trace.reruns import BlockRun, Run
from overhaul.trace.streams import first_tensor, parts

Orientation = Literal["out, in", "in, out"]
Placement = Literal["pre", "post", "sandwich", "output"]

_SAMPLED = 512
"""Elements of the stream on which a sum is searched."""


@dataclass(frozen=True)
class Projection:
    """The weight that writes a contribution.

    Attributes:
        parameter: its name in the model.
        orientation: of its last two axes; "out, in" for `nn.Linear`, "in, out" for `Conv1D`. Experts have one axis before.
    """

    parameter: str
    orientation: Orientation


@dataclass(frozen=True)
class Contribution:
    """What a part of a block adds to the stream.

    Attributes:
        module: the name of the module whose first output it is.
        projection: the weight that writes it, the largest where several do (shared experts, adapters); None if none does.
    """

    module: str
    projection: Projection | None


@dataclass(frozen=True)
class BlockSites:
    """What is known of one block.

    Attributes:
        block: its name.
        norms: its norms on the stream and on contributions, in the order in which they run; where the block is not
            verified, all that have the stream's shape.
        placement: "pre", norms on what parts of the block read; "output", on what they return; "sandwich", on both;
            "post", on the stream itself after each sum. None where the block is not verified or has no norms.
        attention: its contribution, or None.
        cross_attention: its contribution, or None.
        mlp: its contribution, or None.
        parallel: whether attention and MLP read the same state; None where the block is not verified.
        error: the largest |leaving - entering - sum| of an element, relative to |entering| + sum of |contributions|.
    """

    block: str
    norms: tuple[str, ...]
    placement: Placement | None = None
    attention: Contribution | None = None
    cross_attention: Contribution | None = None
    mlp: Contribution | None = None
    parallel: bool | None = None
    error: float | None = None

    @property
    def verified(self) -> bool:
        """Whether the contributions are known."""
        return self.error is not None


@torch.no_grad()
def sites(stack: LayerStack, inputs: Mapping[str, Any], places: Collection[int] | None = None) -> list[BlockSites]:
    """Map the blocks of a stack by running them on `inputs`.

    Args:
        stack: the stack. Its weights are the same bits afterwards; it is run in eval mode, which is put back.
        inputs: a small collated batch, or the model's own keyword arguments: a few real samples of 8 to 64 positions.
        places: which blocks; all if None. The blocks before them only run.

    Returns:
        One map for each of these blocks, in the order in which they run.

    Raises:
        RequestError: the inputs have a single position, or the blocks cannot be run by hand (see `Calls.record`).
    """
    with at_rest(stack.model):
        calls = Calls.record(stack, inputs)
        names = {block: name for name, block in stack.model.named_modules()}
        state, found = calls.entering, list[BlockSites]()
        last = max(range(len(stack)) if places is None else places)
        for place, block in enumerate(stack.blocks[: last + 1]):
            if places is not None and place not in places:
                state = calls.run(place, state)
                continue
            seen = BlockRun.watch(calls, place, names[block], state)
            found.append(_mapped(seen))
            state = seen.left
        return found


@dataclass(frozen=True)
class _Term:
    """A candidate for a contribution: an output of the stream's shape, in float64."""

    name: str
    value: Tensor


def _mapped(block: BlockRun) -> BlockSites:
    if block.entering.shape != block.leaving.shape or block.entering.ndim != 3:
        return BlockSites(block.name, ())
    if block.entering.shape[1] < 2:
        raise RequestError("The sites of a block show only on inputs of two positions or more; give a longer text.")
    norms = [run for run in block.runs if _is_norm(block, run)]
    terms = _terms(block)
    found = _sum(block, block.wide(block.entering), block.wide(block.leaving), terms, (2, 3))
    chain = None if found else _chain(block, norms, terms)
    chosen, error = found or chain or ([], 0.0)
    roles = _roles(block, chosen)
    if not roles:
        return BlockSites(block.name, tuple(run.name for run in norms))
    on_stream = norms if chain else [run for run in norms if _touches(block, run, chosen)]
    by_name = {run.name: run for run in on_stream}
    before = any(run.name not in {term.name for term in chosen} for run in on_stream)
    after = any(term.name in by_name for term in chosen)
    placement: Placement | None = "sandwich" if before and after else "output" if after else "pre" if before else None
    made = {role: Contribution(term.name, _projection(block, term, by_name, terms)) for role, term in roles.items()}
    with intervene(block.calls.stack, {roles["attention"].name: Zero()}):
        without = block.wide(block.value(roles["mlp"].name))
    return BlockSites(
        block.name,
        tuple(by_name),
        "post" if chain else placement,
        **made,
        parallel=torch.equal(without, block.wide(block.value(roles["mlp"].name))),
        error=error,
    )


# contributions


def _terms(block: BlockRun) -> list[_Term]:
    """The outputs of the stream's shape; of equal ones the outermost, which a reader would name."""
    found: list[_Term] = []
    for run in sorted(block.runs, key=lambda run: run.name.count(".")):
        index = first_tensor(run.output)
        if index is not None and block.is_stream(parts(run.output)[index]):
            value = block.wide(parts(run.output)[index])
            if not any(torch.equal(value, term.value) for term in found):
                found.append(_Term(run.name, value))
    order = [run.name for run in block.runs]
    return sorted(found, key=lambda term: order.index(term.name))


def _sum(
    block: BlockRun, start: Tensor, end: Tensor, terms: Sequence[_Term], sizes: Sequence[int]
) -> tuple[list[_Term], float] | None:
    """The fewest terms that lead from `start` to `end`, and their error; None if no number of them in `sizes` does.

    The choice is made on some of the elements and judged on all.
    """
    step = max(1, end.numel() // _SAMPLED)
    difference = (end - start).flatten()[::step]
    sampled = [term.value.flatten()[::step] for term in terms]
    for size in sizes:
        if len(terms) < size:
            break
        rows = torch.stack(sampled)
        best, chosen = torch.inf, ()
        for others in itertools.combinations(range(len(terms)), size - 1):
            first = others[-1] + 1 if others else 0
            if first < len(terms):
                rest = difference - sum((sampled[n] for n in others), torch.zeros_like(difference))
                apart, at = (rows[first:] - rest).abs().amax(dim=1).min(dim=0)
                if float(apart) < best:
                    best, chosen = float(apart), (*others, first + int(at))
        picked = [terms[n] for n in chosen]
        error = _error(start, end, picked)
        if error <= block.exact:
            return picked, error
    return None


def _error(start: Tensor, end: Tensor, terms: Sequence[_Term]) -> float:
    """The largest error of a sum, relative to the sizes of what is summed: rounding leads no further than a few eps."""
    values = [start, *(term.value for term in terms)]
    size = sum((value.abs() for value in values), torch.zeros_like(end))
    rest = (end - sum(values, torch.zeros_like(end))).abs()
    return float((rest / size.clamp_min(torch.finfo(end.dtype).tiny)).max())


def _chain(block: BlockRun, norms: Sequence[Run], terms: Sequence[_Term]) -> tuple[list[_Term], float] | None:
    """A post-norm block: from norm to norm one contribution is added, and the last norm gives what leaves."""
    at, found, worst = block.wide(block.entering), list[_Term](), 0.0
    for norm in norms:
        step = _sum(block, at, block.wide(norm.input), terms, (1,))
        if step is None:
            return None
        at, found, worst = block.wide(norm.output), [*found, *step[0]], max(worst, step[1])
    whole = len(found) in (2, 3) and torch.equal(at, block.wide(block.leaving))
    return (found, worst) if whole else None


def _roles(block: BlockRun, terms: Sequence[_Term]) -> dict[str, _Term]:
    """Which contribution is whose; empty if they cannot be told apart."""
    mixing = [term for term in terms if _mixes(block, term, terms)]
    others = [term for term in terms if term not in mixing]
    if len(mixing) != 1 or len(others) not in (1, 2):
        return {}
    if len(others) == 1:
        return {"attention": mixing[0], "mlp": others[0]}
    crossing = [term for term in others if _reads_others(block, term, terms)]
    if len(crossing) != 1:
        return {}
    mlp = next(term for term in others if term is not crossing[0])
    return {"attention": mixing[0], "cross_attention": crossing[0], "mlp": mlp}


def _mixes(block: BlockRun, term: _Term, terms: Sequence[_Term]) -> bool:
    """Whether a contribution changes at the later half of the positions when only the earlier half enters changed."""
    half = block.entering.shape[1] // 2
    entering = block.entering.clone()
    entering[:, :half] += _noise(entering[:, :half])
    with _holding(block, term, terms):
        moved = (block.wide(block.value(term.name, entering)) - term.value).abs()
    return float(moved[:, half:].max()) > block.changed * float(moved[:, :half].max())


def _reads_others(block: BlockRun, term: _Term, terms: Sequence[_Term]) -> bool:
    """Whether a contribution changes with other sequences that the block is given."""

    def disturbed(value: Tensor) -> Tensor:
        return value + _noise(value) if value.is_floating_point() and value.ndim == 3 else value

    call = block.calls.calls[block.place].map(disturbed)
    with _holding(block, term, terms):
        moved = (block.wide(block.value(term.name, call=call)) - term.value).abs().max()
    return float(moved) > block.changed * float(term.value.abs().max())


def _holding(block: BlockRun, term: _Term, terms: Sequence[_Term]) -> Any:
    """Inside it, all contributions but one are what they were."""
    dtype = block.entering.dtype
    return intervene(block.calls.stack, {o.name: Replace(o.value.to(dtype)) for o in terms if o is not term})


def _noise(value: Tensor) -> Tensor:
    """Normal noise as large as the value, the same at each call, drawn from no generator that others use."""
    draw = torch.randn(value.shape, generator=torch.Generator().manual_seed(0)).to(value)
    return draw * value.float().square().mean().sqrt().clamp_min(1e-3).to(value)


# norms and projections


def _is_norm(block: BlockRun, run: Run) -> bool:
    """Whether a module gives the same for an input and for twice the input, but not for its negative."""
    if next(run.module.children(), None) is not None or not block.is_stream(run.input):
        return False
    if not isinstance(run.output, Tensor) or run.output.shape != run.input.shape:
        return False
    size = run.input.float().square().mean(dim=-1, keepdim=True).sqrt().clamp_min(1e-6)
    unit = (run.input.float() / size).to(run.input.dtype)
    once, twice, negative = (run.again(unit * factor).float() for factor in (4, 8, -4))
    tolerance = 1e-2 * float(once.abs().max())
    return torch.allclose(once, twice, 0, tolerance) and not torch.allclose(once, negative, 0, tolerance)


def _touches(block: BlockRun, norm: Run, terms: Sequence[_Term]) -> bool:
    """Whether a norm reads the stream (with none, one or more contributions added), or gives a contribution."""
    at, given = block.wide(block.entering), block.wide(norm.input)
    reads = [_error(at, given, terms[:n]) <= block.exact for n in range(len(terms))]
    return any(reads) or any(term.name == norm.name for term in terms)


def _projection(block: BlockRun, term: _Term, norms: Mapping[str, Run], terms: Sequence[_Term]) -> Projection | None:
    """The weight of which one slice reaches one feature of a contribution, seen before a norm that follows."""
    watched = term.name
    if term.name in norms:
        source = block.wide(norms[term.name].input)
        watched = next((t.name for t in terms if torch.equal(t.value, source)), term.name)
    clean = block.wide(block.value(watched))
    for name, weight in _weights(block, watched):
        axes: list[tuple[int, Orientation]] = [(-2, "out, in"), (-1, "in, out")]
        for axis, orientation in axes:
            if weight.shape[axis] == clean.shape[2] and _reaches_one(
                block, weight.data.select(axis, 0), watched, clean
            ):
                return Projection(name, orientation)
    return None


def _weights(block: BlockRun, watched: str) -> Iterator[tuple[str, Tensor]]:
    """Matrices of the block, those inside the watched module first; large before small, so that an adapter comes last."""
    inside = [
        (f"{block.name}.{name}", weight)
        for name, weight in block.calls.stack.blocks[block.place].named_parameters()
        if weight.ndim in (2, 3) and weight.is_floating_point()
    ]
    order = {name: n for n, (name, _) in enumerate(inside)}
    yield from sorted(inside, key=lambda one: (not one[0].startswith(f"{watched}."), -one[1].numel(), -order[one[0]]))


def _reaches_one(block: BlockRun, part: Tensor, watched: str, clean: Tensor) -> bool:
    """Whether a change of one slice of a weight changes feature 0 of what is watched, and no other."""
    kept = part.clone()
    try:
        part.add_(_noise(part))
        moved = (block.wide(block.value(watched)) - clean).abs().amax(dim=(0, 1))
    finally:
        part.copy_(kept)
    return float(moved[0]) > 0 and float(moved[1:].max()) <= block.changed * float(moved[0])
