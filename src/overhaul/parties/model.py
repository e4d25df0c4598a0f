"""The models of a split network: each party's part, and all of them together.

    logits = top(H_1 .. H_K side by side),   H_k = bottom_k(columns of party k)

A part is saved by itself, so that no party needs another's. No plain checkpoint holds either: their configs name
this module.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import SequenceClassifierOutput

from overhaul.conversions.within import build_within, describe
from overhaul.errors import RequestError
from overhaul.parties.party import perceptron


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
        describe(self, "overhaul.parties.model", inner, inner_class)
        self.widths, self.last = list(widths), last


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
        self.overhaul = "overhaul.parties.model"
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
            self.network = build_within(config)
        else:
            self.network = perceptron(config.widths, config.last)
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
