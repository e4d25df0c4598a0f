"""A network split between parties: K passive ones hold columns of every sample, an active one holds the labels.

    H_k = G_k(x_k)                    party k, up                  L = loss(F(H_1 .. H_K), y)    active
    g_k = dL/dH_k                     active party, down           theta_k <- SGD(d sum(g_k * H_k) / d theta_k)

1. Parties talk through `Message` alone (`_federated`): n x d_k embeddings and gradients, sample ids, a round number and a
   step of the protocol. Neither features nor labels cross, nor whether a round trains, forgets or recovers.
2. What the gradients themselves tell is not hidden: in a round on samples of one class all g_k point the same way, so a
   passive party can tell which samples are of that class. Rounds that mix classes tell less.
3. A round has two phases: parties prepare their step, and take it when all are ready. Where one does not answer, the others
   take it back, and so does that one when it is asked for the round again.
4. A round is never held without a party: a column of every sample would be missing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
import transformers
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import SequenceClassifierOutput

from overhaul.errors import RequestError, RunError
from overhaul.forget._messages import NOTHING, Message, PartyLost, Phase, Transport


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
        self.optimizer = torch.optim.SGD(
            self.named.values(), lr=rates.lr, momentum=rates.momentum, weight_decay=rates.weight_decay
        )
        self.staged: dict[str, Tensor] = {}
        self.before: dict[str, Tensor] = {}

    def mark(self) -> None:
        """Remember weights, statistics and momentum as they are."""
        self.before = {name: tensor.clone() for name, tensor in self.now().items()}

    def now(self) -> dict[str, Tensor]:
        """Weights, statistics and momentum; not copies."""
        momenta = {f"momentum/{name}": self.optimizer.state[p].get("momentum_buffer") for name, p in self.named.items()}
        state = {f"state/{name}": tensor.detach() for name, tensor in self.module.state_dict().items()}
        return state | {name: tensor for name, tensor in momenta.items() if tensor is not None}

    def put(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over weights, statistics and momentum."""
        own = self.module.state_dict()
        for name, tensor in tensors.items():
            kind, _, inner = name.partition("/")
            if kind == "state":
                own[inner].copy_(tensor)
        for name, parameter in self.named.items():
            momentum = tensors.get(f"momentum/{name}")
            self.optimizer.state[parameter] = {} if momentum is None else {"momentum_buffer": momentum.clone()}

    def prepare(self, gradients: Sequence[Tensor | None]) -> None:
        """Keep the gradient of every parameter (None where there is none) for `step`."""
        self.staged = {name: g for name, g in zip(self.named, gradients, strict=True) if g is not None}
        if bad := [name for name, gradient in self.staged.items() if not gradient.isfinite().all()]:
            raise RunError(f"The gradient of {bad[0]} is not finite; the round was not held. Use a lower rate.")

    def step(self) -> None:
        """Take the step that was prepared."""
        for name, parameter in self.named.items():
            parameter.grad = self.staged.get(name)
        nn.utils.clip_grad_norm_(self.named.values(), self.rates.clip or math.inf)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.staged = {}

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
    """

    def __init__(
        self, number: int, bottom: nn.Module, features: Tensor, rates: Rates, *, training: bool = False
    ) -> None:
        self.number, self.bottom, self.features, self.training = number, bottom, features, training
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
            self.learner.step()
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

    def _prepare(self, message: Message) -> None:
        if message.round != self.round or not torch.equal(message.ids, self.ids):
            raise RunError(f"Party {self.number} received gradients of a round it was not asked for ({message.round}).")
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


class PartConfig(PreTrainedConfig):
    """What config.json says of one party's network: a perceptron, or a transformers model without a head.

    Args:
        widths: of the perceptron: inputs, hidden units, outputs.
        last: what follows its last layer, "relu" (embeddings) or "none" (logits); a ReLU follows all others.
        inner: config of a transformers model, instead.
        inner_class: its class.
        kwargs: of every config.
    """

    model_type = "overhaul_part"

    def __init__(
        self,
        widths: Sequence[int] = (),
        last: Literal["relu", "none"] = "relu",
        inner: Mapping[str, Any] | None = None,
        inner_class: str = "",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.overhaul = "overhaul.forget._parties"
        self.widths, self.last, self.inner, self.inner_class = list(widths), last, dict(inner or {}), inner_class


class VerticalConfig(PreTrainedConfig):
    """What config.json says of a whole split network.

    Args:
        columns: [begin, end) of each passive party, along the last dimension of `pixel_values`.
        bottoms: the arguments of each one's `PartConfig`.
        top: `widths` of the active party's perceptron: all embeddings together, hidden units, classes.
        kwargs: of every config.
    """

    model_type = "overhaul_vertical"

    def __init__(
        self,
        columns: Sequence[Sequence[int]] = (),
        bottoms: Sequence[Mapping[str, Any]] = (),
        top: Sequence[int] = (),
        **kwargs: Any,
    ) -> None:
        kwargs = ({"num_labels": top[-1]} if top else {}) | kwargs
        super().__init__(**kwargs)
        self.overhaul = "overhaul.forget._parties"
        self.columns, self.bottoms = [list(span) for span in columns], [dict(bottom) for bottom in bottoms]
        self.top = list(top)


class _Ours(PreTrainedModel):
    """Starts perceptrons as torch does; what is inside of them starts as its own class says."""

    base_model_prefix = ""
    main_input_name = "pixel_values"

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            bound = 1 / math.sqrt(module.in_features)
            init.uniform_(module.bias, -bound, bound)


class Part(_Ours):
    """One party's network, which can be saved and opened without the others'.

    Args:
        config: what it is.
    """

    config_class = PartConfig  # pyright: ignore[reportAssignmentType]

    def __init__(self, config: PartConfig) -> None:
        super().__init__(config)
        self.network: nn.Module
        if config.inner_class:
            kind = getattr(transformers, config.inner_class)
            self.network = kind(kind.config_class.from_dict(config.inner))
        else:
            layers: list[nn.Module] = [nn.Flatten()]
            for inputs, outputs in pairwise(config.widths):
                layers += [nn.Linear(inputs, outputs), nn.ReLU()]
            self.network = nn.Sequential(*(layers if config.last == "relu" else layers[:-1]))
        self.post_init()

    def forward(self, pixel_values: Tensor, **_: Any) -> Float[Tensor, "n d"]:
        """Embeddings of a party's own columns, or logits of all embeddings.

        Of a transformers model: what it pools, else the mean of its last hidden states over places.
        """
        out: Any = self.network(pixel_values)
        if isinstance(out, Tensor):
            return out
        pooled = getattr(out, "pooler_output", None)
        return out.last_hidden_state.mean(dim=1) if pooled is None else pooled.flatten(1)


class VerticalModel(_Ours):
    """The whole split network, for judging and saving; while it changes, its parts talk through messages.

    Args:
        config: what it consists of.
    """

    config_class = VerticalConfig  # pyright: ignore[reportAssignmentType]

    def __init__(self, config: VerticalConfig) -> None:
        super().__init__(config)
        if len(config.columns) != len(config.bottoms):
            raise RequestError(f"{len(config.columns)} spans of columns for {len(config.bottoms)} passive parties.")
        self.bottoms = nn.ModuleList(Part(PartConfig(**bottom)) for bottom in config.bottoms)
        self.top = Part(PartConfig(widths=config.top, last="none"))
        self.post_init()

    def blocks(self, pixel_values: Tensor) -> list[Tensor]:
        """The columns of each passive party."""
        return [pixel_values[..., begin:end] for begin, end in self.config.columns]

    def forward(self, pixel_values: Float[Tensor, "n *shape columns"], **_: Any) -> SequenceClassifierOutput:
        """Logits [n, classes]."""
        parts = zip(self.bottoms, self.blocks(pixel_values), strict=True)
        logits: Any = self.top(torch.cat([bottom(block) for bottom, block in parts], dim=1))
        return SequenceClassifierOutput(logits=logits)
