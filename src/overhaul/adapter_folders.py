"""Adapters in folders of their own: whether one fits its base, told without weights, and how it becomes part of it.

What is known of a LoRA as products of matrices is `LowRank`, one for every layer that it adapts; peft says their scale.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor, nn

from overhaul.checkpoints import ADAPTER_CONFIG, Checkpoint, listed
from overhaul.errors import RequestError
from overhaul.stack.arrangement import skeleton


@dataclass(frozen=True)
class LowRank:
    """The change of a linear layer's weight [out, in] as a product: b diag(scale) a.

    Attributes:
        a: what reads the input.
        b: what writes the output.
        scale: one number for each rank; alpha / r, or alpha / sqrt(r), of an adapter as it is.
    """

    a: Float[Tensor, "r in"]
    b: Float[Tensor, "out r"]
    scale: Float[Tensor, " r"]

    @property
    def rank(self) -> int:
        """Rows of a."""
        return len(self.a)

    @property
    def dense(self) -> Float[Tensor, "out in"]:
        """The change itself."""
        return (self.b * self.scale) @ self.a

    def svd(self) -> tuple[Float[Tensor, "out k"], Float[Tensor, " k"], Float[Tensor, "k in"]]:
        """Its singular vectors and values, U diag(S) Vh, from factors of the rank's size; k is the least of r, out, in."""
        left, core = torch.linalg.qr(self.b * self.scale)
        right, other = torch.linalg.qr(self.a.T)
        u, s, vh = torch.linalg.svd(core @ other.T, full_matrices=False)
        return left @ u, s, vh @ right.T


def merged(known: Checkpoint, base: nn.Module) -> nn.Module:
    """A base with an adapter that became part of its weights: a plain model of the base's class, as peft merges it."""
    from peft import PeftModel

    check_fits(known, skeleton(base))
    with warnings.catch_warnings(), _fitting(known):  # peft asks transformers by a name that is about to go
        warnings.simplefilter("ignore", FutureWarning)
        wrapped: Any = PeftModel.from_pretrained(base, str(known.folder))  # pyright: ignore[reportArgumentType]
    return wrapped.merge_and_unload(safe_merge=True).requires_grad_(True).eval()


ALTERS = ("use_dora", "lora_bias", "modules_to_save", "alora_invocation_tokens", "layer_replication", "use_qalora",
          "target_parameters", "trainable_token_indices", "use_bdlora", "arrow_config", "kasa_config",
          "monteclora_config", "velora_config")  # fmt: skip
"""Entries of a LoRA's config with which it is more than products added to linear layers."""
PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")
"""How a LoRA may have been initialised; PiSSA and its like change the base too."""


def low_rank_scales(known: Checkpoint, base: nn.Module) -> dict[str, float]:
    """The scale of each layer that a LoRA adapts, by the layer's name in the base; no weight is read.

    Raises:
        RequestError: the folder holds no LoRA, one that does not fit, or one that is more than products added to linear
            layers: what it has beside them is named.
    """
    from peft import LoraConfig
    from peft.tuners.lora import LoraLayer

    if known.base is None:
        raise RequestError(f"{known.source} is a whole model and no adapter: give folders with {ADAPTER_CONFIG}.")
    wrapped = check_fits(known, skeleton(base))
    options: Any = wrapped.peft_config["default"]
    if not isinstance(options, LoraConfig):
        raise RequestError(f"{known.source} is an adapter of the kind {type(options).__name__}, and no LoRA.")
    more = [name for name in ALTERS if getattr(options, name, None)]
    more += [f"bias: {options.bias}"] * (options.bias != "none")
    if options.init_lora_weights not in PLAIN_STARTS:
        more.append(f"init_lora_weights: {options.init_lora_weights}")
    layers = {name: layer for name, layer in wrapped.named_modules() if isinstance(layer, LoraLayer)}
    odd = sorted({type(layer).__name__ for layer in layers.values()} - {"Linear"})
    more += [f"layers of the kind {kind}" for kind in odd]
    named = {f"{layer}.lora_{side}.weight" for layer in layers for side in "AB"}
    more += sorted(known.shapes.keys() - named)[:1]
    if more:
        raise RequestError(
            f"{known.source} is more than products added to linear layers: {', '.join(more)}. Merge it into a model of its "
            "own by opening it, and leave it out here."
        )
    return {name.removeprefix(_PREFIX): layer.scaling["default"] for name, layer in layers.items()}


def read_low_rank(known: Checkpoint, scales: Mapping[str, float]) -> dict[str, LowRank]:
    """The products of a LoRA's folder in float32, by the name of the layer in the base; scales from `low_rank_scales`.

    Raises:
        RequestError: a number is not finite.
    """
    held = {name: tensor.float() for path in known.weight_files for name, tensor in load_file(path).items()}
    for name, tensor in held.items():
        if not bool(tensor.isfinite().all()):
            raise RequestError(f"{known.source}: {name} is not finite (NaN or infinite). Leave this adapter out.")
    found: dict[str, LowRank] = {}
    for name, scale in scales.items():
        a, b = (held[f"{_PREFIX}{name}.lora_{side}.weight"] for side in "AB")
        found[name] = LowRank(a, b, torch.full((len(a),), scale))
    return found


_PREFIX = "base_model.model."


def check_fits(known: Checkpoint, base: Any) -> Any:
    """Wrap a base without weights as the adapter says, to see whether that gives the tensors that the adapter holds.

    Returns:
        The wrapped base, as peft makes it.

    Raises:
        RequestError: it does not; the adapter cannot become part of the weights, or would change more than it did.
    """
    from peft import PeftConfig, get_peft_model, get_peft_model_state_dict

    tied = getattr(base, "all_tied_weights_keys", None) or {}
    with warnings.catch_warnings(), _fitting(known):
        warnings.simplefilter("ignore")  # they come when it is opened
        options = PeftConfig.from_pretrained(str(known.folder))
        wrapped: Any = get_peft_model(base, options, low_cpu_mem_usage=True)
        made = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    if not hasattr(wrapped, "merge_and_unload"):
        kind = type(options).__name__
        raise RequestError(f"{known.source} is an adapter of the kind {kind}, which cannot become part of the weights.")
    unlike = f"{known.source} does not fit its base {known.base and known.base.source}:"
    wrong = sorted(made.keys() - known.shapes.keys() or {n for n in known.shapes.keys() - made.keys() if "lora_" in n})
    if wrong:
        raise RequestError(f"{unlike} {listed(wrong)} is on one side only.")
    for name, tensor in made.items():
        if tuple(tensor.shape) != known.shapes[name]:
            raise RequestError(
                f"{unlike} {name} has the shape {known.shapes[name]}, and {tuple(tensor.shape)} is what its base and "
                f"{ADAPTER_CONFIG} describe."
            )
    shared = {name.rpartition(".")[0] for pair in tied.items() for name in pair}
    for name in known.shapes:
        module = name.removeprefix(_PREFIX).partition(".lora_")[0]
        if ".lora_" in name and module in shared:
            raise RequestError(
                f"{known.source} adapts {module}, which its base ties to another module: merged, it would change both. "
                "Untie the base first: open it, set `config.tie_word_embeddings = False`, give the head its own copy, and "
                "save it."
            )
    return wrapped


@contextlib.contextmanager
def _fitting(known: Checkpoint) -> Iterator[None]:
    """What peft says of an adapter that it cannot put around a base, as one sentence."""
    try:
        yield
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        said = " ".join(str(error).split()) or type(error).__name__
        raise RequestError(
            f"{known.source} does not fit its base {known.base and known.base.source}: {said[:400].rstrip('.')}. Correct "
            f"{ADAPTER_CONFIG}, or name the base that it was made for."
        ) from error
