"""The reads, what they read from, and the conversion that builds them onto a network.

    h_l = sum_i a_i k_i,      a = softmax_i( w_l . RMSNorm(k_i) )

Norms are given h_l instead of the stream, and what the sublayers return is kept: hooks do both, so the blocks stay what they
are. The hooks are methods of modules, so a copy of the model has its own.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from overhaul.conversions import conversion
from overhaul.errors import RequestError
from overhaul.stack import LayerStack

Stream = Float[Tensor, "b t d"]


class Read(nn.Module):
    """One reader's mixture over what was written before it.

    Args:
        width: of the stream.
        routing: what was written in the forward that runs.
    """

    eps = 1e-6
    routing: Routing

    def __init__(self, width: int, routing: Routing) -> None:
        super().__init__()
        self.query, self.gain = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.ones(width))
        self.__dict__["routing"] = routing  # not a part of this module

    def weights(self, sources: list[Stream]) -> Float[Tensor, "n b t"]:
        """a_i for each source and token, float32."""
        key = (self.query * self.gain).float()
        wide = [source.float() for source in sources]
        scores = [(one @ key) * (one.square().mean(dim=-1) + self.eps).rsqrt() for one in wide]
        return torch.stack(scores).softmax(dim=0)

    def forward(self, sources: list[Stream]) -> Stream:
        """sum_i a_i k_i, times n if the routing is scaled."""
        weights = self.weights(sources)
        self.routing.note(weights)
        if self.routing.scaled:
            weights = weights * len(sources)
        mixed = sum((a.unsqueeze(-1) * source for a, source in zip(weights, sources, strict=True)), torch.zeros(()))
        return mixed.to(sources[0].dtype)

    def before(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """A norm is given the mixture instead of the stream."""
        # some networks flatten [b, t, d] to [b * t, d] before their MLP
        return (self(self.routing.sources(args[0])).reshape(args[0].shape), *args[1:])


class Routing(nn.Module):
    """What the sublayers of one forward have written so far, in blocks.

    Args:
        size: sublayers in a block.
        scaled: multiply each read by its number of sources.
        blocks: name of the list of blocks in the module that is called.
    """

    def __init__(self, size: int, scaled: bool, blocks: str) -> None:
        super().__init__()
        self.size, self.scaled, self.blocks = size, scaled, blocks
        self.finished, self.partial, self.written = list[Tensor](), None, 0
        self.running = False
        self.noted: list[Tensor] | None = None

    def begin(self, body: nn.Module, _: Any) -> None:
        """Before the first block."""
        blocks: Any = body.get_submodule(self.blocks)
        if body.training and any(getattr(block, "gradient_checkpointing", False) for block in blocks):
            raise RequestError("Attention residuals keep what every sublayer wrote: switch gradient checkpointing off.")
        self.finished, self.partial, self.written, self.running = [], None, 0, True

    def end(self, *_: Any) -> None:
        """After the last read, also one that failed: nothing of the forward is held."""
        self.finished, self.partial, self.written, self.running = [], None, 0, False

    def sources(self, stream: Stream) -> list[Stream]:
        """k_0 .. k_{n-1}; the first reader meets the embedding."""
        if not self.running:
            raise RequestError(
                "A block with attention residuals reads what all blocks before it wrote, so it cannot be run by itself."
            )
        if not self.finished:
            self.finished = [stream]
        return self.finished if self.partial is None else [*self.finished, self.partial]

    def after(self, _: nn.Module, __: Any, output: Any) -> None:
        """A sublayer wrote."""
        value = (output[0] if isinstance(output, tuple) else output).reshape(self.finished[0].shape)
        self.partial = value if self.partial is None else self.partial + value
        self.written += 1
        if self.written % self.size == 0:
            self.finished, self.partial = [*self.finished, self.partial], None

    def note(self, weights: Float[Tensor, "n b t"]) -> None:
        """Keep the mean over tokens of each read's weights, if somebody wants to know."""
        if self.noted is not None:
            self.noted.append(weights.detach().mean(dim=(1, 2)))


@conversion(alone=False)
def attention_residuals(
    model: nn.Module, *, size: int, scaled: bool, stack: str, reads: list[str], writes: list[str], last: str
) -> None:
    """Build the reads onto a pre-norm network.

    Args:
        model: changed in place.
        size: sublayers in a block.
        scaled: multiply reads by their number of sources.
        stack: where the blocks lie.
        reads: in each block, the norms on the stream, in order.
        writes: in each block, the modules whose first output is added to the stream, in order.
        last: the norm before the head.
    """
    where, _, blocks = stack.rpartition(".")
    body = model.get_submodule(where)
    body.depth_routing = routing = Routing(size, scaled, blocks)
    body.register_forward_pre_hook(routing.begin)
    body.register_forward_hook(routing.end, always_call=True)
    for block in LayerStack.at(model, stack).blocks:
        for number, name in enumerate(reads, 1):
            _build(block, f"depth_read_{number}", block.get_submodule(name), routing)
        for name in writes:
            block.get_submodule(name).register_forward_hook(routing.after)
    _build(body, "depth_read", model.get_submodule(last), routing)


def _build(owner: nn.Module, name: str, norm: nn.Module, routing: Routing) -> None:
    like = next(norm.parameters())
    read = Read(like.shape[-1], routing).to(like.device, like.dtype)
    owner.add_module(name, read)
    norm.register_forward_pre_hook(read.before)
