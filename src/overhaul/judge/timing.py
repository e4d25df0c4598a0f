"""How long calls take: several of them in turn, so that what disturbs the machine disturbs each of them alike.

Two models of equal shape that were timed minutes apart have differed by a third; in turn, they are equal.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

WARM_UPS = 2
ENOUGH_SECONDS = 20.0
"""Of each call; after so long, fewer rounds have to do: a large model on a CPU would be timed for hours."""


@torch.no_grad()
def in_turn(calls: Mapping[str, Callable[[], Any]], times: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of warm runs of every call; each round runs all of them, every second one in reverse.

    Args:
        calls: what is timed, by name.
        times: rounds that count, or as many as fit into `ENOUGH_SECONDS` a call; at least one.
        device: where they run, waited for after each.
    """
    spent: dict[str, list[float]] = {name: [] for name in calls}
    rounds = 0
    while not rounds or (rounds < WARM_UPS + times and max(map(sum, spent.values())) < ENOUGH_SECONDS):
        order = list(calls) if rounds % 2 == 0 else list(calls)[::-1]
        for name in order:
            started = time.perf_counter()
            calls[name]()
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
            spent[name].append(time.perf_counter() - started)
        rounds += 1
    return {name: seconds[WARM_UPS:] or seconds[-1:] for name, seconds in spent.items()}
