"""Whether models can have come from the base that they are merged with, seen in the pass that merges them.

    r = ||theta_t - theta_0|| / ||theta_0||        of every matrix, and of all matrices together

Two matrices that have nothing to do with each other are at right angles, so that r >= 1, and sqrt 2 where they are of one
length. Measured on the matrices of `starter:docs-llama`: 0.07 to 0.32 after trainings at rates of 1e-3 and 3e-3, 0.37 to
0.75 at 1e-2, which spoils the model; at least 1.02 to a network that was not made of it. Vectors are left out, since gains
of norms are alike in all models.
"""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from overhaul.errors import MaterialWarning

FAR = 0.8
"""A matrix whose r is larger was hardly tuned from the base's."""
MOST = 0.5
"""From this share of far matrices on the user is asked; a new head and a new embedding are two of many."""


@dataclass
class Kinship:
    """How far some models are from a base, as far as their tensors were shown."""

    _sums: dict[str, tuple[bool, Tensor]] = field(default_factory=dict)
    _lock: Any = field(default_factory=threading.Lock, repr=False)

    def note(self, name: str, is_matrix: bool, base: Tensor, *tuned: Tensor) -> None:
        """Add a tensor, or a piece of it, in floating point; it may be called in several threads."""
        own = base.reshape(-1)
        changes = [one.reshape(-1) - own for one in tuned]
        sums = torch.stack([one.dot(one) for one in (*changes, own)]).double().cpu()
        with self._lock:
            known = self._sums.get(name)
            self._sums[name] = is_matrix, sums if known is None else known[1] + sums

    def facts(self, method: str, tuned: Sequence[str], told: Sequence[str] = ()) -> dict[str, Any]:
        """How far each model is, the share of far matrices, and a warning for each that is the base, or no child of it.

        Args:
            method: for the warning.
            tuned: what the models are called; facts name no folder, and are the same wherever these lie.
            told: what else there is to warn of.
        """
        matrices = [sums for is_matrix, sums in self._sums.values() if is_matrix and sums[-1]]
        total = torch.stack([sums for _, sums in self._sums.values()]).sum(0)
        changes, far, said = [], [], list(told)
        for n, name in enumerate(tuned):
            ratios = [math.sqrt(sums[n] / sums[-1]) for sums in matrices]
            size = math.sqrt(sum(float(sums[-1]) for sums in matrices))
            changes.append(math.sqrt(sum(float(sums[n]) for sums in matrices)) / size if matrices else None)
            far.append(sum(one >= FAR for one in ratios) / len(ratios) if ratios else None)
            if not total[n]:
                said.append(f"{name} is the base, number for number, in all that is merged, and has no change to add.")
            elif far[n] is not None and far[n] >= MOST:
                said.append(
                    f"{name} may not have come from the base: what lies between them is {changes[n]:.2f} times as long as "
                    f"the base's weights, and {far[n]:.0%} of the matrices differ by more than {FAR:g} times. Fine-tuning "
                    "moves them by about 0.1 to 0.3; models that have nothing in common differ by 1.4. Name the checkpoint "
                    "that it was tuned from, or the sum of such changes means nothing."
                )
        for one in said:
            warnings.warn(f"{method}: {one}", MaterialWarning, stacklevel=2)
        return {"relative_change": changes, "far_share": far, **({"advice": " ".join(said)} if said else {})}
