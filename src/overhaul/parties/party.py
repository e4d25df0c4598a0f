"""A network split between parties: K passive ones hold columns of every sample, an active one holds the labels.

    H_k = G_k(x_k)                    party k, up                  L = loss(F(H_1 .. H_K), y)    active
    g_k = dL/dH_k                     active party, down           theta_k <- SGD(d sum(g_k * H_k) / d theta_k)

1. Parties talk through `Message` alone (`messages`): n x d_k embeddings and gradients, sample ids, a round number and a
   step of the protocol. Neither features nor labels cross, nor whether a round trains, forgets or recovers.
2. What the gradients themselves tell is not hidden: in a round on samples of one class all g_k point the same way, so a
   passive party can tell which samples are of that class. Rounds that mix classes tell less.
3. A round has two phases: parties prepare their step, and take it when all are ready. Where one does not answer, the others
   take it back, and so does that one when it is asked for the round again.
4. A round is never held without a party: a column of every sample would be missing.
5. Nothing here needs transformers, which takes seconds to import: a party may be a process for every message.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from overhaul.errors import RequestError, RunError
from overhaul.parties.messages import NOTHING, Message, PartyLost, Phase, Transport


@dataclass(frozen=True)
class Rates:
    """How a party steps (SGD); agreed before the first round.

    Attributes:
        lr: learning rate.
        momentum: of SGD.
        weight_decay: of SGD.
        clip: largest norm of the party's own gradient, or None.
    """

    lr: float
    momentum: float = 0.0
    weight_decay: float = 0.0
    clip: float | None = None


class Learner:
    """One party's part of the network with its SGD: a step is prepared, taken when told, and can be taken back.

    Args:
        module: its part; changed in place.
        rates: how it steps.
    """

    def __init__(self, module: nn.Module, rates: Rates) -> None:
        self.module, self.rates = module, rates
        self.named = {name: p for name, p in module.named_parameters() if p.requires_grad}
        if not self.named:
            raise RequestError("A party has nothing to train: no parameter of its part requires gradients.")
        self.momenta: dict[str, Tensor] = {}
        self.staged: dict[str, Tensor] = {}
        self.before: dict[str, Tensor] = {}

    def mark(self) -> None:
        """Remember weights, statistics and momentum as they are."""
        self.before = {name: tensor.clone() for name, tensor in self.now().items()}

    def now(self) -> dict[str, Tensor]:
        """Weights, statistics and momentum; not copies."""
        state = {f"state/{name}": tensor.detach() for name, tensor in self.module.state_dict().items()}
        return state | {f"momentum/{name}": tensor for name, tensor in self.momenta.items()}

    def put(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over weights, statistics and momentum."""
        own, self.momenta = self.module.state_dict(), {}
        for name, tensor in tensors.items():
            kind, _, inner = name.partition("/")
            if kind == "state":
                own[inner].copy_(tensor)
            else:
                self.momenta[inner] = tensor.clone()

    def prepare(self, gradients: Sequence[Tensor | None]) -> None:
        """Keep the gradient of every parameter (None where there is none) for `step`."""
        self.staged = {name: g for name, g in zip(self.named, gradients, strict=True) if g is not None}
        if bad := [name for name, gradient in self.staged.items() if not gradient.isfinite().all()]:
            raise RunError(f"The gradient of {bad[0]} is not finite; the round was not held. Use a lower rate.")

    def step(self) -> None:
        """Take the step that was prepared."""
        # made here: torch takes seconds to import what an optimizer needs, and most messages need none
        rates = self.rates
        optimizer = torch.optim.SGD(
            self.named.values(), lr=rates.lr, momentum=rates.momentum, weight_decay=rates.weight_decay
        )
        for name, parameter in self.named.items():
            parameter.grad = self.staged.get(name)
            if name in self.momenta:
                optimizer.state[parameter]["momentum_buffer"] = self.momenta[name]
        nn.utils.clip_grad_norm_(self.named.values(), rates.clip or math.inf)
        optimizer.step()
        optimizer.zero_grad()
        momenta = {name: optimizer.state[p].get("momentum_buffer") for name, p in self.named.items()}
        self.momenta, self.staged = {name: tensor for name, tensor in momenta.items() if tensor is not None}, {}

    def back(self) -> None:
        """Be again as at `mark`."""
        self.staged = {}
        self.put(self.before)


class PassiveParty:
    """A party that holds columns of every sample and the part of the network that reads them.

    Args:
        number: which party it is, from 0.
        bottom: its network: [n, *block] -> [n, d_k].
        features: [N, *block] its columns of sample 0 to N - 1.
        rates: how it steps.
        training: run `bottom` in training mode (norms learn statistics, dropout is on).
        keep: saves `bottom` where it is asked to, beside its own files.
    """

    def __init__(
        self,
        number: int,
        bottom: nn.Module,
        features: Tensor,
        rates: Rates,
        *,
        training: bool = False,
        keep: Callable[[nn.Module], None] | None = None,
    ) -> None:
        self.number, self.bottom, self.features, self.training, self.keep = number, bottom, features, training, keep
        self.learner = Learner(bottom, rates)
        self.round = -1
        self.ids = torch.empty(0, dtype=torch.long)
        self.embedded: Tensor | None = None

    def handle(self, message: Message) -> Message:
        """Do what a message asks and answer it."""
        values, answer = NOTHING, "done"
        if message.phase == "look":
            with torch.no_grad():
                values, answer = self._embed(message.ids, training=False), "embeddings"
        elif message.phase == "ask":
            values, answer = self._ask(message), "embeddings"
        elif message.phase == "gradients":
            self._prepare(message)
            answer = "ready"
        elif message.phase == "commit":
            self._check(message, bool(self.learner.staged))
            self.learner.step()
        elif message.phase == "save":
            if self.keep is None:
                raise RequestError(f"Party {self.number} was given no way to save its part.")
            self.keep(self.bottom)
        elif message.round == self.round:  # abort; of a round it never heard of there is nothing to take back
            self.learner.back()
        return Message(message.round, answer, self.number, message.ids, values)

    def state(self) -> dict[str, Tensor]:
        """Its tensors between two messages, apart from the columns; see `resume`."""
        learner = self.learner
        kinds = {"now": learner.now(), "before": learner.before, "staged": learner.staged}
        tensors = {f"{kind}/{name}": tensor for kind, named in kinds.items() for name, tensor in named.items()}
        return tensors | {"ids": self.ids}

    def resume(self, tensors: Mapping[str, Tensor], round: int) -> None:
        """Be the party that had this `state` in this round."""
        kinds: dict[str, dict[str, Tensor]] = {"now": {}, "before": {}, "staged": {}}
        for full, tensor in tensors.items():
            kind, _, name = full.partition("/")
            if name:
                kinds[kind][name] = tensor
        self.learner.put(kinds["now"])
        self.learner.before, self.learner.staged = kinds["before"], kinds["staged"]
        self.round, self.ids, self.embedded = round, tensors["ids"], None

    def _embed(self, ids: Tensor, *, training: bool) -> Tensor:
        self.bottom.train(training)
        first = next(self.bottom.parameters())
        embedded = self.bottom(self.features[ids.to(self.features.device)].to(first.device, first.dtype))
        self.bottom.eval()
        return embedded.float()

    def _ask(self, message: Message) -> Tensor:
        if message.round == self.round:
            self.learner.back()
        self.learner.mark()
        self.round, self.ids = message.round, message.ids
        self.embedded = self._embed(message.ids, training=self.training)
        return self.embedded.detach()

    def _check(self, message: Message, prepared: bool = True) -> None:
        if message.round != self.round or not torch.equal(message.ids, self.ids) or not prepared:
            raise RunError(
                f"Party {self.number} was told {message.phase!r} in a round it was not asked for ({message.round})."
            )

    def _prepare(self, message: Message) -> None:
        self._check(message)
        # a party that was put together again from its state has no graph any more
        embedded = self._embed(self.ids, training=self.training) if self.embedded is None else self.embedded
        self.embedded = None
        if message.values.shape != embedded.shape:
            wrong, right = tuple(message.values.shape), tuple(embedded.shape)
            raise RunError(f"Party {self.number} received gradients {wrong} for embeddings {right}.")
        surrogate = (message.values.to(embedded.device) * embedded).sum()
        self.learner.prepare(torch.autograd.grad(surrogate, list(self.learner.named.values()), allow_unused=True))


Objective = Callable[[list[Tensor], Tensor], Tensor]
"""(embeddings [n, d_k] by party, labels [n]) -> loss."""


class ActiveParty:
    """The party that holds the labels and the part of the network above the embeddings.

    Args:
        top: the embeddings of all parties side by side, [n, sum of d_k] -> logits [n, classes].
        labels: [N] of samples 0 to N - 1.
        transport: reaches the passive parties.
        rates: how it steps.
        training: run `top` in training mode.
    """

    def __init__(
        self, top: nn.Module, labels: Tensor, transport: Transport, rates: Rates, *, training: bool = False
    ) -> None:
        self.top, self.labels, self.transport, self.training = top, labels, transport, training
        self.learner = Learner(top, rates)
        self.held = 0

    def _send(self, phase: Phase, ids: Tensor, values: Sequence[Tensor] | None = None) -> list[Message]:
        parts = values or [NOTHING] * self.transport.parties
        return self.transport.exchange([Message(self.held, phase, k, ids, part) for k, part in enumerate(parts)])

    @torch.no_grad()
    def logits(self, ids: Int[Tensor, " n"]) -> Float[Tensor, "n classes"]:
        """Of these samples, all in eval mode; nothing changes."""
        self.top.eval()
        return self.top(torch.cat(self._received(self._send("look", ids)), dim=1))

    def _received(self, replies: Sequence[Message]) -> list[Tensor]:
        first = next(self.top.parameters())
        return [reply.values.to(first.device, first.dtype) for reply in replies]

    def round(self, ids: Int[Tensor, " n"], objective: Objective) -> float:
        """All parties take one step down `objective` on these samples, or none does. Returns its value before the step.

        Raises:
            PartyLost: a party did not answer.
            RunError: the loss or a gradient is not finite.
        """
        try:
            value, gradients = self._prepare(ids, objective)
            self._send("commit", ids)
        except Exception:
            self._abort(ids)
            raise
        self.learner.prepare(gradients)
        self.learner.step()
        self.held += 1
        return value

    def _prepare(self, ids: Tensor, objective: Objective) -> tuple[float, tuple[Tensor | None, ...]]:
        leaves = [h.detach().requires_grad_() for h in self._received(self._send("ask", ids))]
        self.top.train(self.training)
        loss = objective(leaves, self.labels[ids].to(leaves[0].device))
        self.top.eval()
        parts = torch.autograd.grad(loss, [*leaves, *self.learner.named.values()], allow_unused=True)
        down = [torch.zeros_like(h) if g is None else g for h, g in zip(leaves, parts, strict=False)]
        if not all(part.isfinite().all() for part in parts if part is not None) or not loss.isfinite():
            raise RunError(
                f"The loss of round {self.held} is {float(loss.detach()):.3g}, or its gradient not finite; no party has "
                "moved in it. Use a lower learning rate or a smaller clip."
            )
        self._send("gradients", ids, [gradient.float() for gradient in down])
        return float(loss.detach()), parts[len(leaves) :]

    def _abort(self, ids: Tensor) -> None:
        """Tell every party that can be reached."""
        self.learner.staged = {}
        for k in range(self.transport.parties):
            try:
                self.transport.exchange([Message(self.held, "abort", k, ids, NOTHING)])
            except PartyLost:
                continue  # it takes the round back when it is asked for it again


def perceptron(widths: Sequence[int], last: str = "relu") -> nn.Sequential:
    """Inputs, hidden units, outputs; a ReLU follows every layer, the last one only if `last` says so."""
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*(layers if last == "relu" else layers[:-1]))
