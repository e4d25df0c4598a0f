"""Steering a model towards another at one layer: the arms, and what the model says under each.

    features       h + alpha W_d[:, E] (z' - z)[E]                     at positions that carry features
    what is read   h + alpha (h' - h)                                  at class tokens, or where answers are predicted

z and z' are the codes of the model's own state h and of the goal h'. With alpha 0, with no features, and where h' = h,
the state keeps its bits. The official form decodes the whole code instead: W_d s + b_pre with s = z + alpha (z' - z)[E].
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from overhaul.errors import RequestError
from overhaul.inspect.restoration.states import NAME, Places
from overhaul.sae import SparseAutoencoder

Codes = Literal["linear", "topk"]
Form = Literal["delta", "replace"]


@dataclass(frozen=True)
class Arm:
    """What is steered.

    Attributes:
        features: the selected ones, as many random ones, or none.
        read: whether what the head reads directly moves too.
    """

    features: Literal["selected", "random"] | None
    read: bool

    def name(self, read: str) -> str:
        """For a reader; `read` is what the head reads directly, "" where there is nothing."""
        features = {"selected": "features", "random": "random", None: read}[self.features]
        return features + (f" + {read}" if self.read and self.features else " alone" if read else "")


PAPER, READ, SELECTED = Arm("selected", True), Arm(None, True), Arm("selected", False)
RANDOM, RANDOM_ALONE = Arm("random", True), Arm("random", False)


def arms(read: str) -> tuple[Arm, ...]:
    """All arms, the paper's first."""
    return (PAPER, READ, SELECTED, RANDOM, RANDOM_ALONE) if read else (SELECTED, RANDOM_ALONE)


@dataclass(frozen=True)
class Features:
    """The latents of one layer that are steered.

    Attributes:
        autoencoder: float32.
        selected: those of the group.
        random: sets of others, of equal size.
        codes: whether codes are linear or what the autoencoder encodes.
        form: whether a state is moved, or replaced by a decoded code.
    """

    autoencoder: SparseAutoencoder
    selected: list[int]
    random: Sequence[list[int]]
    codes: Codes = "linear"
    form: Form = "delta"

    @torch.no_grad()
    def pushes(self, own: Float[Tensor, "b t d"], goal: Float[Tensor, "b t d"], places: Places) -> Pushes:
        """What the selected features, and random ones, add at alpha 1; these are as long as those in every sample."""
        encode = self.autoencoder.linear if self.codes == "linear" else self.autoencoder.encode
        mine, theirs = encode(own), encode(goal)
        rest = places.rest[..., None]
        selected = self.autoencoder.push(mine, theirs, self.selected) * rest
        length = selected.flatten(1).norm(dim=1)
        random: list[Tensor] = []
        for chosen in self.random:
            other = self.autoencoder.push(mine, theirs, chosen) * rest
            size = other.flatten(1).norm(dim=1)
            scale = torch.where(size > 0, length / size.clamp_min(torch.finfo(size.dtype).tiny), 0.0)
            random.append(other * scale[:, None, None])
        decoded = self.autoencoder.decode(mine) if self.form == "replace" else own
        return Pushes(own, goal, places, torch.where(rest, decoded, own), selected, random)


@dataclass(frozen=True)
class Pushes:
    """A batch at one layer, ready to be steered: the states [b, t, d] and what is added to them at alpha 1."""

    own: Tensor
    goal: Tensor
    places: Places
    start: Tensor
    selected: Tensor
    random: Sequence[Tensor]

    def states(self, arm: Arm, alpha: float) -> Iterator[Float[Tensor, "b t d"]]:
        """The steered states: one, or one for each random set."""
        added = {"selected": [self.selected], "random": self.random, None: [None]}[arm.features]
        for push in added:
            found = self.own if push is None else self.start + alpha * push
            if arm.read:
                # exact at alpha 0 and 1, and where both are equal
                found = torch.where(self.places.read[..., None], torch.lerp(self.own, self.goal, alpha), found)
            yield found


def random_sets(
    autoencoder: SparseAutoencoder, selected: Sequence[int], sets: int, draw: torch.Generator
) -> list[list[int]]:
    """Living latents that were not selected, as many in each set.

    Raises:
        RequestError: there are not so many.
    """
    alive = (autoencoder.neuron_activity > 0).nonzero().flatten().tolist()
    others = [latent for latent in alive if latent not in set(selected)]
    if len(others) < len(selected):
        raise RequestError(
            f"{NAME}: {len(selected)} features are steered, and the autoencoder has only {len(others)} other living latents "
            "for the random control. Choose fewer `experts`, or a larger `expansion`."
        )
    return [
        [others[n] for n in torch.randperm(len(others), generator=draw)[: len(selected)].tolist()] for _ in range(sets)
    ]


def rate(steered: float, own: float, original: float) -> float | None:
    """RR = (A_steered - A_unlearned) / (A_original - A_unlearned): 0 at the unlearned model, 1 at the original one.

    None where the original is not better, so that there is nothing to restore.
    """
    return (steered - own) / (original - own) if original > own else None
