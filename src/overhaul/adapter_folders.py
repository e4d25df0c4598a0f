"""Adapters in folders of their own: whether one fits its base, told without weights, and how it becomes part of it."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

from torch import nn

from overhaul.checkpoints import ADAPTER_CONFIG, Checkpoint, listed
from overhaul.errors import RequestError
from overhaul.stack.arrangement import skeleton


def merged(known: Checkpoint, base: nn.Module) -> nn.Module:
    """A base with an adapter that became part of its weights: a plain model of the base's class, as peft merges it."""
    from peft import PeftModel

    check_fits(known, skeleton(base))
    with warnings.catch_warnings(), _fitting(known):  # peft asks transformers by a name that is about to go
        warnings.simplefilter("ignore", FutureWarning)
        wrapped: Any = PeftModel.from_pretrained(base, str(known.folder))  # pyright: ignore[reportArgumentType]
    return wrapped.merge_and_unload(safe_merge=True).requires_grad_(True).eval()


def check_fits(known: Checkpoint, base: Any) -> None:
    """Wrap a base without weights as the adapter says, to see whether that gives the tensors that the adapter holds.

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
        module = name.removeprefix("base_model.model.").partition(".lora_")[0]
        if ".lora_" in name and module in shared:
            raise RequestError(
                f"{known.source} adapts {module}, which its base ties to another module: merged, it would change both. "
                "Untie the base first: open it, set `config.tie_word_embeddings = False`, give the head its own copy, and "
                "save it."
            )


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
