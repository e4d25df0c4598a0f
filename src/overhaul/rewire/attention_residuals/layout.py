"""Which modules of a pre-norm network read the residual stream, and which write to it: found by running it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from overhaul.conversions import made_up_inputs
from overhaul.errors import RequestError
from overhaul.modes import at_rest
from overhaul.stack import LayerStack
from overhaul.trace.sites import BlockSites, sites


def layout_of(stack: LayerStack, inputs: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The arguments of the conversion that depend on the network: which modules read the stream and which write to it.

    Args:
        stack: of a whole model.
        inputs: some of its inputs; made up if None.

    Raises:
        RequestError: the network is not pre-norm, or its blocks are laid out in different ways.
    """
    inputs = made_up_inputs(stack.model) if inputs is None else inputs
    if inputs is None:
        raise RequestError(f"No inputs could be made up for {type(stack.model).__name__}; give some.")
    device = next(stack.model.parameters()).device
    inputs = {name: value.to(device) for name, value in inputs.items()}
    found = {_in_block(block) for block in sites(stack, inputs)}
    (reads, writes), *others = found
    if others or len(reads) != 2:
        raise RequestError(
            f"The blocks of {type(stack.model).__name__} ({stack.path}) are not all pre-norm with one norm before attention "
            "and one before the MLP, so what a sublayer reads cannot be replaced."
        )
    return {"stack": stack.path, "reads": list(reads), "writes": list(writes), "last": _last_norm(stack, inputs)}


def _in_block(block: BlockSites) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The norms that read the stream and the modules that write to it, by their names in it; none if it is no such block."""
    attention, mlp = block.attention, block.mlp
    fits = block.placement in ("pre", "sandwich") and not block.parallel and block.cross_attention is None
    if attention is None or mlp is None or not fits:
        return (), ()
    writes = (attention.module, mlp.module)
    reads = [name for name in block.norms if name not in writes]
    short = len(block.block) + 1
    return tuple(name[short:] for name in reads), tuple(name[short:] for name in writes)


@torch.no_grad()
def _last_norm(stack: LayerStack, inputs: Mapping[str, Any]) -> str:
    """The first module without parts that is given what leaves the last block."""
    left: list[Tensor] = []
    found: list[str] = []

    def leaves(_: nn.Module, __: Any, out: Any) -> None:
        left[:] = [out[0] if isinstance(out, tuple) else out]

    def enters(name: str) -> Any:
        def seen(_: nn.Module, args: tuple[Any, ...]) -> None:
            if left and args and args[0] is left[0]:
                found.append(name)

        return seen

    model = stack.model
    inside = {module for block in stack.blocks for module in block.modules()}
    leaf = [
        (n, m) for n, m in model.named_modules() if m not in inside and not list(m.children()) and list(m.parameters())
    ]
    hooks = [stack.blocks[-1].register_forward_hook(leaves)]
    hooks += [module.register_forward_pre_hook(enters(name)) for name, module in leaf]
    try:
        with at_rest(model):
            model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    if not found:
        raise RequestError(
            f"No norm of {type(model).__name__} reads what leaves the last block of {stack.path}, so the head's reading "
            "cannot be replaced."
        )
    return found[0]
