"""States on their way through a forward, as they are: with their gradients, for a loss that reads them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from overhaul.errors import RunError
from overhaul.stack import LayerStack
from overhaul.trace import hooks
from overhaul.trace.streams import MAIN, argument, first_tensor, leaving, parts


@contextmanager
def passing(model: nn.Module, sites: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Inside the `with`, the state at each site of the last forward, part of its graph.

    Args:
        model: the model whose main stack the sites belong to.
        sites: "entering.N", "leaving.N" or the name of a module (its first tensor), see `capture`.

    Raises:
        RequestError: an unknown site.
        RunError: (at the end) a site that no tensor passed.
    """
    stack, seen = LayerStack.of(model), dict[str, Tensor]()
    with ExitStack() as undo:
        for site in sites:
            place, module = hooks._located(stack, site)  # pyright: ignore[reportPrivateUsage]
            if place is not None and site.startswith("entering"):
                handle = module.register_forward_pre_hook(partial(_entering, seen, site), with_kwargs=True)
            else:
                kind = _passed if place is None else _leaving
                handle = module.register_forward_hook(partial(kind, seen, site), with_kwargs=True)
            undo.callback(handle.remove)
        yield seen
    missed = [site for site in sites if site not in seen]
    if missed:
        raise RunError(f"No state passed {missed[0]}, which a term reads.")


def _entering(seen: dict[str, Tensor], site: str, block: nn.Module, args: Any, kwargs: Any) -> None:
    _keep(seen, site, argument(block, MAIN, args, kwargs))


def _leaving(seen: dict[str, Tensor], site: str, block: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
    index = leaving(block, args, kwargs, output).get(MAIN)
    _keep(seen, site, None if index is None else parts(output)[index])


def _passed(seen: dict[str, Tensor], site: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
    index = first_tensor(output)
    _keep(seen, site, None if index is None else parts(output)[index])


def _keep(seen: dict[str, Tensor], site: str, value: Any) -> None:
    # a backward pass recomputes what was seen before
    if isinstance(value, Tensor) and torch._C._current_graph_task_id() == -1:
        seen[site] = value
