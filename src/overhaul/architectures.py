"""The class behind a checkpoint: its library's, a converted one, or one whose Python code comes with the folder.

1. A class of the installed library goes before the folder's own code, which is needed only where the library has no such
   class. Without trust nothing of that code runs: transformers would ask at the terminal, and a "y" is no consent.
2. What other kinds of files can make transformers run or fetch (a kernel in place of attention) needs the same trust.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from overhaul.checkpoints import Checkpoint
from overhaul.conversions.classes import class_in
from overhaul.errors import OverhaulError, RequestError
from overhaul.stack.arrangement import without_pooler

CUSTOM_GENERATE = Path("custom_generate") / "generate.py"
_KERNELS = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")


def class_of(known: Checkpoint) -> Any:
    """The class that config.json names, or None where its library has no model class of that name.

    A model that modules were built onto is of a class derived from that one (`conversions`). One that no library can hold
    (an ensemble, a bank of prompts) is a `PreTrainedModel` of ours: its config names the module under `overhaul`.

    Raises:
        RequestError: the class belongs to diffusers, which is not installed.
    """
    if known.library == "diffusers" and find_spec("diffusers") is None:
        raise RequestError(
            f"{known.source} is a diffusers model ({known.architecture}); install it with `pip install overhaul[diffusion]`."
        )
    try:
        if (converted := class_in(known.config)) is not None:
            return converted
    except RequestError as error:
        raise RequestError(f"{known.source}: {error}") from None
    if str(known.config.get("overhaul")).startswith("overhaul."):
        try:
            return getattr(import_module(known.config["overhaul"]), known.architecture, None)
        except ModuleNotFoundError:
            raise RequestError(
                f"{known.source}: config.json names {known.config['overhaul']}, which this Overhaul has not; another "
                "version made this folder."
            ) from None
    base = "ModelMixin" if known.library == "diffusers" else "PreTrainedModel"
    library = import_module(known.library)
    kind = getattr(library, known.architecture, None)
    # pipelines and Auto classes are no models: they look for code themselves
    return kind if isinstance(kind, type) and issubclass(kind, getattr(library, base)) else None


def own_class(known: Checkpoint) -> tuple[Any, str]:
    """The Auto class of transformers for a class that the folder brings, and what `auto_map` says of it.

    The entry of the class that `architectures` names, else the one for causal language models, else the first of a model.

    Raises:
        RequestError: running its code is not trusted, or there is none.
    """
    if not known.trusted:
        raise refusal(known)
    given = known.config.get("auto_map")
    entries = {name: ref for name, ref in given.items() if isinstance(ref, str)} if isinstance(given, Mapping) else {}
    models = [name for name in entries if name.startswith("AutoModel")]
    named = [name for name in models if entries[name].rpartition(".")[2] == known.architecture]
    found = next(iter([*named, *(name for name in models if name == "AutoModelForCausalLM"), *models]), None)
    auto = getattr(import_module("transformers"), found, None) if found and known.library == "transformers" else None
    if found is None or auto is None:
        raise RequestError(
            f"{_no_class(known)} The folder brings no code for it either: `auto_map` of config.json names no model."
        )
    return auto, entries[found]


def check_code(known: Checkpoint) -> None:
    """Refuse what would run code of others when the model is built, unless it is trusted.

    Raises:
        RequestError: config.json asks for a kernel from the hub.
    """
    if known.trusted:
        return
    for name, value in _entries(known.config):
        if name in _KERNELS and any("/" in one for one in _texts(value)):
            raise RequestError(
                f"{known.folder / 'config.json'}: `{name}` names {value!r}, a kernel that would be fetched and run. Remove "
                "the entry, or say `trust_remote_code: true` if you trust it."
            )


def _entries(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        yield name, value
        if isinstance(value, Mapping):
            yield from _entries(value)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        yield from (one for one in value.values() if isinstance(one, str))
    elif isinstance(value, str):
        yield value


def _no_class(known: Checkpoint) -> str:
    return f"{known.source}: the {known.library} that is installed has no model class {known.architecture!r}."


def refusal(known: Checkpoint) -> RequestError:
    """What is said of a class that the library lacks and whose own code is not trusted."""
    if not known.config.get("auto_map"):
        return RequestError(f"{_no_class(known)} A newer version of it may have.")
    return RequestError(
        f"{_no_class(known)} `auto_map` in its config.json names Python code that comes with the model, which was not run. "
        "If you have read that code and trust it, say `trust_remote_code: true`."
    )


MOST_BLOCKS = 1000
"""How many blocks or experts a config may ask for in any case; beyond it, no more than there are tensors to fill them."""

_COUNTS = re.compile(r"(^|_)layers?$|(^|_)depth$|^n(um)?_.*(blocks|experts)$")


def check_counts(known: Checkpoint) -> None:
    """Refuse a config that asks for more blocks or experts than any weights could fill: building them takes hours.

    Raises:
        RequestError: with the entry.
    """
    most = max(MOST_BLOCKS, len(known.shapes))
    for name, value in _entries(known.config):
        if type(value) is int and value > most and _COUNTS.search(name):
            held = f", but the weights hold {len(known.shapes)} tensors" if known.shapes else ""
            raise RequestError(
                f"{known.folder / 'config.json'}: `{name}` is {value}{held}; more than {most} are not built. Correct it."
            )


def planned(known: Checkpoint) -> nn.Module | None:
    """What config.json describes, built without memory on torch's meta device; None where that is code that is not trusted.

    An adapter's is that of its base, into which it opens.

    Raises:
        RequestError: nothing can be built from the config.
    """
    known = known.base or known
    if class_of(known) is None and not known.trusted:
        return None
    from transformers.initialization import no_init_weights

    check_code(known)
    check_counts(known)
    what = f"no {known.architecture} can be built from config.json"
    more = " Correct config.json; `overhaul plan` checks it without reading weights."
    with in_words(known, what, more), torch.device("meta"), no_init_weights():
        return build(known)


def build(known: Checkpoint) -> nn.Module:
    """What the class makes of config.json."""
    kind = class_of(known)
    if kind is None:
        from transformers import AutoConfig

        auto, _ = own_class(known)
        config = AutoConfig.from_pretrained(known.folder, trust_remote_code=True)
        return auto.from_config(config, trust_remote_code=True)
    if known.library == "diffusers":
        return kind.from_config(kind.load_config(known.folder))
    read = getattr(kind, "plain_config", kind.config_class.from_pretrained)  # a converted class has its own
    return kind(read(known.folder), **pooling(known))


def pooling(known: Checkpoint) -> dict[str, bool]:
    """How a model is built whose pooler is not among its weights: without one, where its class can do that."""
    held = known.is_new or any(re.search(r"(^|\.)pooler\.", name) for name in known.shapes)
    kind = class_of(known)
    return {} if kind is None else without_pooler(kind, held)


@contextmanager
def in_words(known: Checkpoint, what: str, more: str = "") -> Iterator[None]:
    """Whatever a library raises at a damaged file becomes one sentence about the checkpoint."""
    try:
        yield
    except (OverhaulError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # libraries raise whatever they come across: a damaged file may be damaged anywhere
        said = " ".join(str(error).split()) or type(error).__name__
        raise RequestError(f"{known.source}: {what}: {said[:400].rstrip('.')}.{more}") from error
