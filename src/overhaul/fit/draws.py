"""In what order a role's examples are drawn, how they are counted, and how a batch is split so that little is padded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from overhaul.data.examples import Encoded


@dataclass
class Ledger:
    """What a training consumed and how it went: examples and tokens per role, and one value a step for every curve."""

    step: int = 0
    examples: dict[str, int] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    curves: dict[str, list[float]] = field(default_factory=dict)
    seconds: float = 0.0

    def record(self, values: Mapping[str, float]) -> None:
        """Append one value to each named curve."""
        for name, value in values.items():
            self.curves.setdefault(name, []).append(value)


class Draw:
    """The order in which a role's examples are drawn: the n-th draw depends on the seed and n alone."""

    def __init__(self, role: str, size: int, seed: int, earlier: int = 0) -> None:
        self.size, self.earlier = size, earlier
        self.seed = seed * 1_000_003 + sum(role.encode())
        self.epoch, self.order = -1, list[int]()

    def indices(self, start: int, count: int) -> list[int]:
        """Places of draws number `start` to `start + count - 1`, counted after the `earlier` ones."""
        chosen: list[int] = []
        for n in range(self.earlier + start, self.earlier + start + count):
            epoch, place = divmod(n, self.size)
            if epoch != self.epoch:
                generator = torch.Generator().manual_seed((self.seed + 7919 * epoch) % 2**63)
                self.order = torch.randperm(self.size, generator=generator).tolist()
                self.epoch = epoch
            chosen.append(self.order[place])
        return chosen


def by_length(items: Sequence[Encoded]) -> list[list[Encoded]]:
    """Split examples so that none is padded to more than twice its length: exact, since terms are sums and counts."""
    if not items or "input_ids" not in items[0]:
        return [list(items)] if items else []
    groups: list[list[Encoded]] = []
    for item in sorted(items, key=lambda item: -item["input_ids"].shape[0]):
        if not groups or 2 * item["input_ids"].shape[0] < groups[-1][0]["input_ids"].shape[0]:
            groups.append([])
        groups[-1].append(item)
    return groups
