"""Trace: see what flows through a stack, and step in, by hooks that are gone when the `with` ends, however it ends.

    with capture(stack, ["entering", "leaving.7"], statistics) as seen:      # h_0 .. h_8 of 8 blocks
        for batch in batches:
            invoke(model, batch)
    seen["leaving.7"].norm_mean

    turned = measure(stack, batches, windows(stack), turn)                    # ShortGPT's block influence

    with intervene(stack, {"leaving.3": Add(2.0 * direction)}):
        model.generate(...)

A *site* is written "entering.N" or "leaving.N" (the stream at block N), "entering" or "leaving" (at every block), or is
the name of any module: the first tensor that it returns; "into.NAME" is the first tensor that it is given. `sites.sites`
finds the modules whose outputs are the contributions of attention and MLP.

1. States are reduced as they pass, in float32, so nothing of the size [blocks, samples, positions, width] is held. For a
   pair of sites the first state waits for the second, within one forward.
2. Padding never counts: the attention mask is taken from the call of the innermost module around the stack that is given
   one ([b, t]); a decoder's stack so sees the decoder's mask. A recomputation for a backward pass does not count again.
3. A compiled model runs uncompiled inside: its graph would not see hooks that came later.
4. Hooks run in the order in which their `with` blocks were entered, so a capture inside an intervention sees its effect.
   Within one intervention, edits of one site are done in the order in which they are given.
5. Blocks are counted along the path in force when the `with` is entered (`LayerStack.following`).
6. Positions are counted in the sequence, also where a cache holds those before; a forward without them is left as it is.
7. Under activation checkpointing, what ran inside an intervention is recomputed with its edits, whenever the backward
   pass comes. A checkpoint of one's own around a forward (`torch.utils.checkpoint`) needs the backward inside.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from overhaul.errors import RequestError, RunError, did_you_mean
from overhaul.modes import at_rest, uncompiled
from overhaul.stack import LayerStack
from overhaul.stack.calls import invoke, map_tensors
from overhaul.trace import edits as primitives
from overhaul.trace.edits import Primitive
from overhaul.trace.streams import MAIN, Stream, argument
from overhaul.trace.watch import Shape, Watch

Result = TypeVar("Result")
Site = str | tuple[str, str]
"""A site, or two whose states are reduced together."""

_ENTERING, _LEAVING, _INTO = "entering", "leaving", "into."
_CHECKPOINT = "_gradient_checkpointing_func"
"""Where transformers and diffusers keep the function that runs something now and again in the backward pass."""


@contextmanager
def capture(
    stack: LayerStack,
    sites: Iterable[Site],
    reduce: Callable[..., Result | None],
    *,
    skip_first: int = 0,
    stream: Stream = MAIN,
    mask: Tensor | None = None,
) -> Iterator[dict[Any, Result]]:
    """Reduce the states that pass these sites in all forwards inside the `with`.

    Args:
        stack: the stack; its model runs as usual.
        sites: where to look: single sites, or pairs.
        reduce: (state [b, t, d], mask [b, t]) -> result, for a pair (first, second, mask) -> result; None adds nothing.
            Results are joined with `+` over the forwards. States come in float32, without gradient.
        skip_first: how many positions at the start of each sample do not count: those of a text's first token are so
            large that they hide the others.
        stream: the stream of a joint block that "entering" and "leaving" mean.
        mask: which positions are no padding, [b, t], where blocks are run by hand and no model says so.

    Yields:
        Site -> result, filled as forwards run; two of them are joined by `merged`. Sites at which `reduce` found nothing
        to add are left out.

    Raises:
        RequestError: an unknown site, or (at the end) no position counted.
        RunError: (at the end) nothing passed a site.
    """
    _check_stack(stack)
    watch = Watch(reduce, skip_first, list(dict.fromkeys(_expanded(stack, sites))), Shape(mask=mask))
    with ExitStack() as undo:
        undo.enter_context(uncompiled())
        for module in _around(stack):
            _hook(undo, module.register_forward_pre_hook, watch.note_mask)
        for block in stack.blocks:
            _hook(undo, block.register_forward_pre_hook, watch.shape.note)
        for name in watch.names:
            place, module = _located(stack, name)
            if name.startswith(_INTO):
                _hook(undo, module.register_forward_pre_hook, partial(watch.read_into, name))
            elif place is None:
                _hook(undo, module.register_forward_hook, partial(watch.read_module, name))
            elif name.startswith(_ENTERING):
                _hook(undo, module.register_forward_pre_hook, partial(watch.read_entering, name, stream))
            else:
                _hook(undo, module.register_forward_hook, partial(watch.read_leaving, name, stream))
        yield watch.seen
    watch.finish()


def measure(
    stack: LayerStack,
    batches: Iterable[Mapping[str, Any]] | Mapping[str, Any],
    sites: Iterable[Site],
    reduce: Callable[..., Result | None],
    *,
    skip_first: int = 0,
    stream: Stream = MAIN,
) -> dict[Any, Result]:
    """`capture` over one forward of each batch, in eval mode and without gradients; the mode is put back.

    Args:
        stack: the stack.
        batches: collated batches or one, or the model's own keyword arguments; moved to the model's device.
        sites: see `capture`.
        reduce: see `capture`.
        skip_first: see `capture`.
        stream: see `capture`.
    """
    _check_stack(stack)
    device = next(stack.model.parameters()).device
    kept = capture(stack, sites, reduce, skip_first=skip_first, stream=stream)
    with at_rest(stack.model), torch.no_grad(), kept as seen:
        for batch in [batches] if isinstance(batches, Mapping) else batches:
            invoke(stack.model, map_tensors(dict(batch), lambda tensor: tensor.to(device)))
    return seen


def merged(first: Mapping[Any, Result], second: Mapping[Any, Result]) -> dict[Any, Result]:
    """Two captures as one: what a capture of the forwards of the first and then of the second would have given."""
    before: dict[Any, Any] = dict(first)
    both = {site: before[site] + second[site] for site in first if site in second}
    return {**first, **second, **both}


def windows(stack: LayerStack, width: int = 1) -> list[tuple[str, str]]:
    """Each run of `width` neighbouring blocks as a pair: what enters the first of them and what leaves the last."""
    if not 1 <= width <= len(stack):
        raise RequestError(f"A window of {width} blocks does not fit {stack.path}, which has {len(stack)}.")
    return [(f"{_ENTERING}.{n}", f"{_LEAVING}.{n + width - 1}") for n in range(len(stack) - width + 1)]


@contextmanager
def intervene(
    stack: LayerStack, edits: Mapping[str, Primitive | Sequence[Primitive]], *, stream: Stream = MAIN
) -> Iterator[LayerStack]:
    """Inside the `with`, change the states that pass these sites; what was edited flows on.

    Args:
        stack: the stack; its model runs as usual.
        edits: site -> one primitive, or several that are done in their order. "leaving" and "leaving.3" may both be given:
            they too are done in their order.
        stream: the stream of a joint block that "entering" and "leaving" mean.

    Raises:
        RequestError: an unknown site, one that is only read ("into.NAME"), `Skip` at anything but "leaving", a value that
            is not finite or of the wrong width; from a forward, before its first block runs: a selection or value that
            does not fit the batch, or a result that the state's dtype cannot hold.
        RunError: (at the end) nothing passed a site, or none of the positions did, so nothing was edited there.
    """
    _check_stack(stack)
    width = getattr(stack.config, "hidden_size", None) if stream == MAIN else None
    chains: dict[str, list[Primitive]] = {}
    for site, given in edits.items():
        _check_written(site)
        if site.startswith(_INTO):
            raise RequestError(f"{site!r} can be captured and not edited: edit what the modules before it return.")
        for name in _expanded(stack, [site]):
            for edit in given if isinstance(given, Sequence) else [given]:
                primitives.check(edit, None if _located(stack, name)[0] is None else width, name)
                chains.setdefault(name, []).append(edit)
    reached, shape = set[tuple[str, int]](), Shape()
    install = partial(_install, stack, stream, chains, reached)
    with ExitStack() as undo:
        undo.enter_context(uncompiled())
        undo.enter_context(_recomputed_alike(stack.model, shape, install))
        install(undo, shape)
        yield stack
    missed = [name for name, chain in chains.items() if any((name, n) not in reached for n in range(len(chain)))]
    if missed:
        raise RunError(
            f"Nothing passed {missed[0]}, so nothing was edited: no forward ran inside, none reached it, or none held the "
            "positions."
        )


def _install(
    stack: LayerStack,
    stream: Stream,
    chains: Mapping[str, Sequence[Primitive]],
    reached: set[tuple[str, int]],
    undo: ExitStack,
    shape: Shape,
) -> None:
    """Put the hooks of an intervention on; `undo` takes them off."""
    of_stream = {name: chain for name, chain in chains.items() if _located(stack, name)[0] is not None}
    for module in _around(stack):
        _hook(undo, module.register_forward_pre_hook, partial(_call, shape.note_mask))
    _hook(undo, stack.blocks[0].register_forward_pre_hook, shape.note_start)
    _hook(undo, stack.blocks[0].register_forward_pre_hook, partial(_check_fits, of_stream, stream, shape))
    for block in stack.blocks:
        _hook(undo, block.register_forward_pre_hook, shape.note)
    for name, chain in chains.items():
        place, module = _located(stack, name)
        at = primitives.Site(name, shape, reached)
        if place is None:
            _hook(undo, module.register_forward_hook, partial(primitives.edit_module, chain, at))
        elif name.startswith(_ENTERING):
            _hook(undo, module.register_forward_pre_hook, partial(primitives.edit_entering, chain, at, stream))
        else:
            _hook(undo, module.register_forward_hook, partial(primitives.edit_leaving, chain, at, stream))


@contextmanager
def _recomputed_alike(model: nn.Module, shape: Shape, install: Callable[[ExitStack, Shape], None]) -> Iterator[None]:
    """Let what is checkpointed inside the `with` be recomputed as it ran, also in a backward pass that comes after it."""
    inside = [True]

    def edited(run: Callable[..., Any]) -> Callable[..., Any]:
        then = replace(shape)

        def again(*args: Any, **kwargs: Any) -> Any:
            if torch._C._current_graph_task_id() == -1:
                return run(*args, **kwargs)
            with ExitStack() as undo:
                if inside[0]:
                    undo.callback(vars(shape).update, vars(replace(shape)))
                    vars(shape).update(vars(then))
                else:
                    install(undo, replace(then))
                return run(*args, **kwargs)

        return again

    with ExitStack() as undo:
        for module in model.modules():
            checkpoint = vars(module).get(_CHECKPOINT)
            if checkpoint is not None:
                undo.callback(setattr, module, _CHECKPOINT, checkpoint)
                setattr(module, _CHECKPOINT, partial(_checkpointed, checkpoint, edited))
        try:
            yield
        finally:
            inside[0] = False


def _checkpointed(
    checkpoint: Callable[..., Any], edited: Callable[..., Any], run: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    return checkpoint(edited(run), *args, **kwargs)


# sites


def _expanded(stack: LayerStack, sites: Iterable[Site]) -> list[Any]:
    """The sites with "entering" and "leaving" written out for every block."""
    found: list[Site] = []
    for site in [sites] if isinstance(sites, str) else sites:
        if isinstance(site, tuple):
            for name in site:
                _located(stack, name)
            if len(site) != 2 or site[0] == site[1]:
                raise RequestError(f"A pair is two different sites, not {site}.")
            found.append(site)
        elif site in (_ENTERING, _LEAVING):
            found += [f"{site}.{n}" for n in range(len(stack))]
        else:
            _located(stack, site)
            found.append(site)
    return found


def _check_stack(stack: object) -> None:
    if not isinstance(stack, LayerStack):
        raise RequestError(f"A {type(stack).__name__} is no stack of blocks. Write `LayerStack.of(model)`.")


def _check_written(name: object) -> None:
    """Refuse a block's number, a pair that is edited, and whatever else is no text."""
    if not isinstance(name, str):
        hint = f' Write "leaving.{name}" for what block {name} returns.' if type(name) is int else ""
        raise RequestError(
            f'A site is a text such as "leaving.0", "entering" or the name of a module, not {name!r}.{hint}'
        )


def _located(stack: LayerStack, name: str) -> tuple[int | None, nn.Module]:
    """The block at a site of the stream with its place, or (None, module)."""
    blocks = stack.blocks
    _check_written(name)
    for kind in (_ENTERING, _LEAVING):
        number = name.removeprefix(f"{kind}.")
        if number != name and number.isdecimal() and int(number) < len(blocks):
            return int(number), blocks[int(number)]
    path = name.removeprefix(_INTO)
    try:
        if path:
            return None, stack.model.get_submodule(path)
    except AttributeError:
        pass
    known = [f"{kind}.{n}" for kind in (_ENTERING, _LEAVING) for n in range(len(blocks))]
    prefix = name[: len(name) - len(path)]
    modules = [f"{prefix}{module}" for module, _ in stack.model.named_modules() if module]
    near = difflib.get_close_matches(name, [*known, *modules], n=1)
    raise RequestError(
        f"There is no site {name!r}.{did_you_mean(name, near or [known[0], known[-1], stack.path])} A site is "
        f'"entering.N" or "leaving.N" with a block from 0 to {len(blocks) - 1}, the name of a module, or "into.NAME".'
    )


def _around(stack: LayerStack) -> list[nn.Module]:
    """The modules around the stack, the model itself first."""
    steps = stack.path.split(".")[:-1]
    return [stack.model.get_submodule(".".join(steps[:n])) for n in range(len(steps) + 1)]


# hooks


def _hook(undo: ExitStack, register: Callable[..., Any], hook: Callable[..., Any]) -> None:
    undo.callback(register(hook, with_kwargs=True).remove)


def _call(note: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any) -> None:
    note(module, args, kwargs)  # what a hook returns would take the place of the arguments


def _check_fits(
    chains: Mapping[str, Sequence[Primitive]], stream: Stream, shape: Shape, block: nn.Module, args: Any, kwargs: Any
) -> None:
    state = argument(block, stream, args, kwargs)
    # maps of images change their size from stage to stage: each is checked where it is edited
    if isinstance(state, Tensor) and state.ndim == 3:
        shape.note(block, args, kwargs)
        for name, chain in chains.items():
            for edit in chain:
                primitives.check_fit(edit, state.shape, primitives.Site(name, shape))
