"""A classifier whose classes are unlocked by prompts of their own.

    logits = head( encoder( [P_k1, ..., P_kn, x_CLS, x_1, ..., x_N] )_CLS )        P in R^{C x D}, without positions

1. Prompts are put before what enters the first block and taken off what leaves the last one, so every model reads its own
   CLS token, patches and final norm as ever. Without prompts the logits are those of the plain model.
2. Blocks are found by structure. Blocks that depend on the number of tokens (windows, relative positions) are refused.
3. A forgotten class has no row in the bank: its vector is in no tensor of the model. Copies saved before still hold it.
4. Prompts gate and do not erase: the weights keep what they learnt. `_gating` measures how much.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.modeling_outputs import ImageClassifierOutput

from overhaul.conversions.within import build_within, class_within, describe
from overhaul.data.examples import Batch
from overhaul.errors import RequestError
from overhaul.stack import LayerStack

CLOSED = -1e4
"""The bias of a hardened class: far below every logit, and still a number in half precision."""

_OF_THE_INNER = ("image_size", "num_channels")
"""What others read in a model's config, taken over from the wrapped one."""


class PromptsConfig(PreTrainedConfig):
    """What config.json says of a prompted classifier.

    Args:
        inner: the wrapped model's config.
        inner_class: its class in transformers.
        stack: where its blocks lie.
        width: of a token.
        prompts_per_class: tokens that each class has.
        available: the classes that have not been forgotten, in order.
        kwargs: of every config.
    """

    model_type = "overhaul_prompted_classifier"

    def __init__(
        self,
        inner: Mapping[str, Any] | None = None,
        inner_class: str = "",
        stack: str = "",
        width: int = 0,
        prompts_per_class: int = 1,
        available: Sequence[int] = (),
        **kwargs: Any,
    ) -> None:
        known = dict(inner or {})
        super().__init__(**{name: known[name] for name in ("id2label", "label2id") if name in known} | kwargs)
        describe(self, "overhaul.forget.prompt_tokens.prompts", known, inner_class, _OF_THE_INNER)
        self.stack, self.width = stack, width
        self.prompts_per_class, self.available = prompts_per_class, list(available)


class PromptedClassifier(PreTrainedModel):
    """A transformer classifier with a bank of prompts, a row for each class that it has not forgotten.

    Args:
        config: what it consists of; weights are random until they are loaded.
    """

    config_class = PromptsConfig  # pyright: ignore[reportAssignmentType]
    base_model_prefix = ""

    def __init__(self, config: PromptsConfig) -> None:
        super().__init__(config)
        self.inner: nn.Module = build_within(config)
        self.bank = nn.Parameter(torch.randn(len(config.available), config.prompts_per_class, config.width))
        self.main_input_name = class_within(config).main_input_name
        self.post_init()

    @classmethod
    def around(cls, inner: nn.Module, batch: Batch, prompts_per_class: int = 1) -> PromptedClassifier:
        """A classifier with a fresh bank, drawn from N(0, 1), around a model, which becomes part of it.

        Args:
            inner: an image or audio classifier of transformers; one token sequence runs through its blocks.
            batch: some of its inputs, on which the prompts are tried.
            prompts_per_class: tokens of each class.

        Raises:
            RequestError: the model cannot be prompted.
        """
        kind: Any = type(inner)
        if getattr(transformers, kind.__name__, None) is not kind:
            raise RequestError(f"Only classes of transformers can be prompted; {kind.__name__} is none.")
        if kind.main_input_name == "input_ids":
            raise RequestError(
                f"{kind.__name__} reads text, whose padding the prompts would shift. Class prompts are for classifiers of "
                "images or spectrograms."
            )
        known: Any = inner.config
        stack = LayerStack.of(inner)
        width = _width(inner, stack, inputs_of(batch, inner))
        config = PromptsConfig(
            known.to_dict(), kind.__name__, stack.path, width, prompts_per_class, range(known.num_labels)
        )
        with torch.device("meta"), no_init_weights():
            prompted = cls(config)
        first = next(inner.parameters())
        prompted.inner = inner
        bank = torch.randn(known.num_labels, prompts_per_class, width)
        prompted.bank = nn.Parameter(bank.to(first.device, first.dtype))
        prompted.train(inner.training)
        try:
            with torch.no_grad():
                prompted(**inputs_of(batch, prompted))
        except (RuntimeError, ValueError, IndexError) as error:
            raise RequestError(
                f"The blocks of {kind.__name__} ({stack.path}) do not run with more tokens than the image has: {error} Take "
                "a model whose attention is over all tokens, without windows or relative positions (ViT, DeiT, DINOv2)."
            ) from error
        return prompted

    @property
    def classes(self) -> int:
        """How many classes the head tells apart, forgotten ones among them."""
        return len(self.config.id2label)  # pyright: ignore[reportArgumentType]

    @property
    def available(self) -> list[int]:
        """The classes that have a prompt, in order."""
        return self.config.available

    def rows(self, prompts: Sequence[int] | Int[Tensor, "... n"]) -> Int[Tensor, "... n"]:
        """Which rows of the bank are the prompts of these classes.

        Raises:
            RequestError: a class has no prompt.
        """
        wanted = torch.as_tensor(prompts, dtype=torch.long, device=self.bank.device)
        table = torch.full((self.classes,), -1, device=self.bank.device)
        table[self.available] = torch.arange(len(self.available), device=self.bank.device)
        known = (wanted >= 0) & (wanted < self.classes)
        found = torch.where(known, table[wanted.clamp(0, self.classes - 1)], -1)
        if (found < 0).any():
            raise RequestError(
                f"There are no prompts of the classes {sorted(set(wanted[found < 0].tolist()))}; those that have one are "
                f"{self.available}."
            )
        return found

    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_values: Tensor | None = None,
        prompts: Sequence[int] | Int[Tensor, "b n"] | None = None,
        **_: Any,
    ) -> ImageClassifierOutput:
        """Logits [b, classes] under some prompts.

        Args:
            pixel_values: images [b, c, h, w].
            input_values: or spectrograms [b, t, bins].
            prompts: classes whose prompts are given, in order: the same for all examples, or a row for each; all that
                are left if None.
        """
        given = {"pixel_values": pixel_values, "input_values": input_values}
        inputs = {name: value for name, value in given.items() if value is not None}
        rows = self.rows(self.available if prompts is None else prompts)
        return ImageClassifierOutput(logits=self.with_tokens(self.bank[rows].flatten(-3, -2), **inputs))  # pyright: ignore[reportArgumentType]

    def with_tokens(self, tokens: Float[Tensor, "*b n d"], **inputs: Tensor) -> Float[Tensor, "b classes"]:
        """Logits under prompts given as vectors: the same [n, d] for all examples, or [b, n, d]."""
        if not tokens.shape[-2]:
            return self.inner(**inputs).logits
        if tokens.ndim == 2:
            count = next(iter(inputs.values())).shape[0]
            tokens = tokens.expand(count, *tokens.shape)
        with _inserted(self.inner.get_submodule(self.config.stack), tokens):
            return self.inner(**inputs).logits

    def heads(self) -> list[nn.Linear]:
        """The linear layers behind the blocks that give a logit for each class (DeiT with a teacher has two)."""
        stack = LayerStack.at(self.inner, self.config.stack)
        return [
            module
            for name, module in self.inner.named_modules()
            if isinstance(module, nn.Linear) and module.out_features == self.classes and stack.depth(name) == len(stack)
        ]

    @torch.no_grad()
    def forget(self, classes: Collection[int], harden: bool = False) -> None:
        """Remove the prompts of some classes, in place.

        Args:
            classes: each has a prompt; at least one other class stays.
            harden: also zero their rows of the head and close them by their bias.

        Raises:
            RequestError: a class is unknown or forgotten already, none would stay, or a head has no bias to close.
        """
        self.check(classes, harden)
        left = [name for name in self.available if name not in classes]
        self.bank = nn.Parameter(self.bank[self.rows(left)].clone(), self.bank.requires_grad)
        self.config.available = left
        for head in self.heads() if harden else []:
            head.weight[list(classes)] = 0
            head.bias[list(classes)] = CLOSED

    def check(self, classes: Collection[int], harden: bool = False) -> None:
        """Refuse what `forget` cannot do; see there."""
        if unknown := sorted(set(classes) - set(range(self.classes))):
            raise RequestError(f"There are no classes {unknown}. Those that can be forgotten are {self.available}.")
        if gone := sorted(set(classes) - set(self.available)):
            raise RequestError(f"The classes {gone} are forgotten already. Those that are left are {self.available}.")
        if not set(self.available) - set(classes):
            raise RequestError(
                f"All classes that are left, {self.available}, would be forgotten; at least one must stay."
            )
        if harden and (not self.heads() or any(head.bias is None for head in self.heads())):
            raise RequestError(
                f"{self.config.inner_class} has no linear head with a bias by which a class could be closed. "
                "Write harden: false."
            )


def inputs_of(batch: Batch, model: nn.Module) -> Batch:
    """What a classifier reads of a batch, on its device."""
    device = next(model.parameters()).device
    return {name: batch[name].to(device) for name in ("pixel_values", "input_values") if name in batch}


def _width(inner: nn.Module, stack: LayerStack, inputs: Batch) -> int:
    """Of the tokens that enter the first block."""
    seen: list[Any] = []
    hook = stack.blocks[0].register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(_entering(args, kwargs)), with_kwargs=True
    )
    try:
        with torch.no_grad():
            inner(**inputs)
    finally:
        hook.remove()
    if seen[0].ndim != 3:
        raise RequestError(
            f"What enters the blocks of {type(inner).__name__} ({stack.path}) has the shape {tuple(seen[0].shape)}: these "
            "are no tokens [b, t, d], before which a prompt could stand. Take a transformer (ViT, DeiT, DINOv2)."
        )
    return seen[0].shape[-1]


def _entering(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]


@contextmanager
def _inserted(blocks: Any, tokens: Float[Tensor, "b n d"]) -> Iterator[None]:
    """Tokens before what enters the first block, and gone from what leaves the last."""

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        state = _entering(args, kwargs)
        wide = torch.cat([tokens.to(state.dtype), state], dim=1)
        return ((wide, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": wide})

    def after(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        count = tokens.shape[1]
        return (output[0][:, count:], *output[1:]) if isinstance(output, tuple) else output[:, count:]

    hooks = [blocks[0].register_forward_pre_hook(before, with_kwargs=True), blocks[-1].register_forward_hook(after)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
