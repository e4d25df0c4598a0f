"""What parties say to each other, and how it is handed over inside one process.

`Message` is all that is ever said. Whatever carries it is a `Transport`: `InProcess` here, Flower in `flower`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from overhaul.errors import RunError

Phase = Literal["look", "ask", "embeddings", "gradients", "ready", "commit", "abort", "save", "done"]
NOTHING = torch.empty(0, 0)
"""The values of a message that carries none."""


class Message(NamedTuple):
    """All that is ever said between parties.

    Attributes:
        round: number of the round it belongs to.
        phase: down: "look" (embed, nothing follows), "ask" (embed, a gradient follows), "gradients", "commit", "abort",
            "save" (to the party's own disk); up: "embeddings", "ready", "done".
        party: the passive party that it goes to or comes from.
        ids: [n] which samples, by their common number.
        values: [n, d_k] embeddings or gradients, or empty.
    """

    round: int
    phase: Phase
    party: int
    ids: Int[Tensor, " n"]
    values: Float[Tensor, "n d"]


class PartyLost(RunError):
    """A party did not answer; the round was taken back."""


class Transport(Protocol):
    """How messages reach the passive parties; `exchange` sends one to each and returns the replies in the same order."""

    @property
    def parties(self) -> int:
        """How many there are."""
        ...

    def exchange(self, messages: Sequence[Message]) -> list[Message]:
        """Raise `PartyLost` where a party does not answer."""
        ...


class Answers(Protocol):
    """A passive party, as far as messages know it."""

    def handle(self, message: Message) -> Message:
        """The reply."""
        ...


@dataclass
class InProcess:
    """Passive parties in this process.

    Attributes:
        passive: by number.
        recorded: every message that crossed, in order.
    """

    passive: Sequence[Answers]
    recorded: list[Message] = field(default_factory=list)

    @property
    def parties(self) -> int:
        """How many there are."""
        return len(self.passive)

    def exchange(self, messages: Sequence[Message]) -> list[Message]:
        """One message to each party and its reply; a party that raises ConnectionError is lost."""
        replies: list[Message] = []
        for message in messages:
            self.recorded.append(message)
            try:
                replies.append(self.passive[message.party].handle(message))
            except ConnectionError as error:
                raise lost(message, str(error)) from error
            self.recorded.append(replies[-1])
        return replies


def lost(message: Message, why: str) -> PartyLost:
    """The error for a party that did not answer a message."""
    return PartyLost(
        f"Party {message.party} did not answer {message.phase!r} in round {message.round} ({why}). The round was taken "
        "back: no party has moved. Going on without it is refused, as its columns of every sample would be missing. Bring "
        "it back, then go on."
    )
