"""The null control of what trains: the original, trained on what is to stay and never told what to forget.

It shares data, optimizer and cost with the methods it stands beside and lacks the one thing on trial, the signal to forget.
What it seems to forget is plain drift.
"""

from __future__ import annotations

from torch import nn

from overhaul import session
from overhaul.data.examples import Examples
from overhaul.fit import fit
from overhaul.objectives import cross_entropy

NULL = "fine-tuned on retain"


def retain_only(
    model: nn.Module, retain: Examples, *, steps: int = 60, lr: float = 1e-4, batch_size: int = 16
) -> nn.Module:
    """Train a model on `retain` alone, as long and at such a rate as the methods it stands beside.

    Args:
        model: the original; changed in place and returned.
        retain: examples of what is to stay.
        steps: optimizer steps.
        lr: learning rate of AdamW.
        batch_size: examples in a step.
    """
    with session.using(scratch=None):  # a training of another model must not go on from this one's checkpoint
        fit(model, [cross_entropy("retain")], {"retain": retain}, steps=steps, lr=lr, batch_size=batch_size, name=NULL)
    return model
