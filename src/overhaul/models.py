"""Open checkpoints, and save so that they open again: as plain ones, or with what was built onto their class.

Nothing is filled at random and nothing is dropped: what the weights lack, and what the class has no place for, is refused
when it is opened and before it is saved. No code that comes with a model is run unless the caller says so.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping, Set
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from overhaul import finite, quantised, session
from overhaul.adapter_folders import check_fits, merged
from overhaul.architectures import build, check_code, check_counts, class_of, in_words, own_class, planned, pooling
from overhaul.architectures import refusal as refusal
from overhaul.checkpoints import ADAPTER_CONFIG, Checkpoint, facts, listed, read_json, saved_from_memory
from overhaul.checkpoints import locate as locate
from overhaul.checkpoints import starters as starters
from overhaul.companions import cast, copy_companions, largest_file, module_folders
from overhaul.conversions.classes import CONVERTED, apply_late, marked_with
from overhaul.conversions.records import records
from overhaul.errors import RequestError, RunError, did_you_mean, writing
from overhaul.processor import count_tokens as count_tokens
from overhaul.processor import load_processor as load_processor
from overhaul.processor import quiet_transformers
from overhaul.recomputed import check_recomputed
from overhaul.stack.arrangement import is_hub_model, skeleton, unlike_its_class
from overhaul.stack.paths import records_of, set_aside

DTYPES: Mapping[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def open_model(source: str | Path, *, dtype: str = "float32", trust_remote_code: bool = False) -> tuple[nn.Module, Any]:
    """Open a checkpoint folder, hub name, `starter:NAME` or `new:FOLDER`; an adapter opens merged into its base.

    Args:
        source: what to open.
        dtype: "float32", "bfloat16" or "float16": how weights are held while they are worked on.
        trust_remote_code: run Python code that comes with the model.

    Returns:
        The model in eval mode, and its tokenizer or image processor (None where the folder has none).
    """
    known = facts(source, trust_remote_code=trust_remote_code)
    return load_weights(known, dtype), load_processor(known)


def load_weights(known: Checkpoint, dtype: str, trust_remote_code: bool = False) -> nn.Module:
    """The model itself, on the CPU and in eval mode.

    Raises:
        RequestError: the dtype is not possible, the class is not known, a weight is not finite, or config and weights do
            not belong together: nothing is filled at random, nothing is dropped but heads that the class does not have
            (with a warning).
    """
    if dtype not in DTYPES:
        raise RequestError(f"dtype {dtype!r} is not possible.{did_you_mean(dtype, DTYPES)}")
    if trust_remote_code:
        known = replace(known, trusted=True)
    if known.base is not None:
        return merged(known, known.base.open(dtype, trust_remote_code=trust_remote_code))
    options = _options(known, dtype)
    kind = class_of(known)
    session.begins()
    if known.is_new:
        return drawn(known).to(DTYPES[dtype]).eval()
    if kind is None:
        kind, _ = own_class(known)
    with quiet_transformers(), in_words(known, "the weights cannot be read"):
        model, loading = kind.from_pretrained(known.folder, **options)
    missing = sorted(loading["missing_keys"])
    if missing:
        raise RequestError(f"{known.source}: the weights lack {len(missing)} tensors, such as {missing[0]!r}.")
    _check_unexpected(known, model, sorted(loading["unexpected_keys"]))
    finite.check_read(model, known)
    if "quantization_config" in options:
        model = quantised.forget_quantisation(model).to(DTYPES[dtype])
    if class_of(known) is not None and known.library == "transformers":
        vars(model.config).pop("auto_map", None)  # of code that was not run and is not saved
    # nn.Dropout and the like must be off until a training turns them on
    return model.eval()


def _options(known: Checkpoint, dtype: str) -> dict[str, Any]:
    """How `from_pretrained` is called, if the checkpoint can be opened at all.

    Raises:
        RequestError: it cannot.
    """
    check_code(known)
    check_counts(known)
    if not known.is_new:
        _refuse_what_lies_beside(known)
        _check_generation(known)
    options: dict[str, Any] = {"use_safetensors": True, "output_loading_info": True}
    if known.library == "diffusers":
        return {**options, "torch_dtype": DTYPES[dtype]}
    options |= {"dtype": DTYPES[dtype], "trust_remote_code": known.trusted}
    return options | quantised.loading(known) | pooling(known)


MASK = ".masked_bias"
"""What older versions of transformers stored beside attention: one number for all that is masked, and no weight."""


def _check_unexpected(known: Checkpoint, model: Any, names: list[str]) -> None:
    """Refuse tensors that the class has no place for, but for the heads of other tasks; transformers left out its own."""
    names = [name for name in names if not name.endswith(MASK)]
    ours = bool(records(model)) or saved_from_memory(known.folder)
    modules = {name for name, _ in model.named_modules()}
    prefix = getattr(model, "base_model_prefix", "")

    def is_another_head(name: str) -> bool:
        parent = name.rpartition(".")[0]
        nested = any(part.isdigit() for part in name.split("."))
        return not nested and bool(parent) and not {parent, f"{prefix}.{parent}"} & modules

    wrong = [name for name in names if ours or not is_another_head(name)]
    if wrong:
        raise RequestError(
            f"{known.source}: the weights hold {len(wrong)} tensors that {known.architecture} has no place for, such as "
            f"{wrong[0]!r}. Opened so, they would be lost: config.json and the weights do not belong together (a number of "
            "layers, a class), or the model was changed and saved without a record of the change."
        )
    if names:
        warnings.warn(
            f"{known.source} also holds {listed(names)}: heads of other tasks, which {known.architecture} does not have and "
            "which what is saved from it will not have either.",
            stacklevel=3,
        )


def _refuse_what_lies_beside(known: Checkpoint) -> None:
    """An adapter, which transformers would add without merging it, a path as it was recorded once, and modules of
    sentence-transformers that are not there.
    """
    module_folders(known.folder)
    if (known.folder / "overhaul_path.json").exists():
        raise RequestError(
            f"{known.folder} holds overhaul_path.json, in which paths are no longer kept. Without that file it opens as the "
            "plain model; follow the path (`LayerStack.following`) and save again to have it in config.json."
        )
    if (known.folder / ADAPTER_CONFIG).exists():
        raise RequestError(
            f"{known.folder} holds a whole model and an adapter ({ADAPTER_CONFIG}) beside it, so it is not certain which of "
            "the two is meant. Move the adapter to a folder of its own; its base_model_name_or_path names this one."
        )


def _check_generation(known: Checkpoint) -> None:
    """Whether generation_config.json can be read: transformers passes over a damaged one, and then generates otherwise.

    Raises:
        RequestError: it cannot.
    """
    if (path := known.folder / "generation_config.json").exists():
        from transformers import GenerationConfig

        with (
            in_words(known, "generation_config.json cannot be read", " Correct it, or remove it."),
            quiet_transformers(),
        ):
            GenerationConfig.from_dict(read_json(path))


def drawn(known: Checkpoint) -> nn.Module:
    """A model with the weights that its library gives to a new one, drawn from the checkpoint's seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(known.seed)
        with in_words(known, f"no {known.architecture} can be built from config.json"):
            model = build(known)
    apply_late(model)
    return model


def check_shapes(known: Checkpoint) -> nn.Module:
    """Compare the headers with the model that config.json describes, built without memory on torch's meta device.

    Names may differ (transformers renames tensors of older checkpoints); a shape or a number of blocks may not.

    Returns:
        That model.

    Raises:
        RequestError: a tensor has another shape than the config says, a block is one too many, or an adapter lies beside.
    """
    if known.base is not None:
        model = check_shapes(known.base)
        if known.base.base is None:  # else it is the first adapter's base that is known, not what both made
            check_fits(known, copy.deepcopy(model))
        return model
    _options(known, "float32")
    if (model := planned(known)) is None:
        raise refusal(known)
    if known.is_new:
        return model
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name, shape in known.shapes.items():
        if expected.get(name, shape) != shape:
            raise RequestError(
                f"{known.source}: {name} has the shape {shape} in the weights, but config.json describes {expected[name]}. "
                "Config and weights do not belong together."
            )
    _check_missing(known, model, expected.keys() - known.shapes.keys())
    patterns = {_NUMBERS.sub(".*.", name) for name in expected}
    left_out = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    for name in known.shapes.keys() - expected.keys():
        # the same tensor of another block
        if _NUMBERS.sub(".*.", name) in patterns and not any(re.search(pattern, name) for pattern in left_out):
            raise RequestError(
                f"{known.source}: the weights hold {name}, but config.json describes a model without that block, which "
                "would be lost. Config and weights do not belong together."
            )
    return model


def _check_missing(known: Checkpoint, model: Any, names: Set[str]) -> None:
    """Refuse weights that lack what the class would fill at random.

    Where they hold names that the class does not have, these may be what is missing, by a name of old: that is seen when
    they are read.
    """
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    ignored = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    may_lack = {name for pair in tied.items() if known.shapes.keys() & {*pair} for name in pair}
    missing = sorted(name for name in names - may_lack if not any(re.search(pattern, name) for pattern in ignored))
    if missing and known.shapes.keys() <= model.state_dict().keys():
        raise RequestError(
            f"{known.source}: the weights lack {len(missing)} tensors, such as {missing[0]!r}, which config.json describes. "
            "Config and weights do not belong together, or the weights were fetched in part."
        )


_NUMBERS = re.compile(r"\.\d+\.")


def save(model: nn.Module, processor: Any, folder: str | Path, *, dtype: str | None = None) -> Path:
    """Save a checkpoint that opens as what it is: written beside its place and renamed when complete.

    Args:
        model: a transformers or diffusers model. It stays as it is; only the files are in `dtype`. What was built onto its
            class and the paths that it follows are recorded in config.json.
        processor: its tokenizer or image processor, or None.
        folder: must not exist yet.
        dtype: of the files; the model's own if None. What its folder held in float32 among smaller numbers stays so.

    Raises:
        RequestError: the folder exists, or a path leads through another model.
        RunError: a weight is not finite, the class would not load back what the model holds, or the disk is full or
            read-only.
    """
    folder = Path(folder)
    if folder.exists():
        raise RequestError(f"{folder} exists already; saving never replaces a folder. Choose another name.")
    finite.check_saved(model, DTYPES.get(dtype or ""))
    partial = folder.with_name(f".{folder.name}.partial")
    with _not_compiled(model) as plain, set_aside(plain) as paths:
        _check_loads_back(plain)
        with marked_with(plain, records_of(paths)), writing(folder):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            write_checkpoint(plain, processor, partial, dtype)
            os.replace(partial, folder)
    return folder


def _check_loads_back(model: nn.Module) -> None:
    """Refuse what the class would drop or fill at random when it is loaded."""
    if hasattr(model, "merge_and_unload"):
        raise RunError(
            f"{type(model).__name__} is an adapter around a model, of which the adapter alone would be saved. Merge it "
            "first (`model = model.merge_and_unload()`), or keep it with peft's own `save_pretrained`; nothing was saved."
        )
    if not is_hub_model(model):
        raise RunError(
            f"{type(model).__name__} is no model of transformers or diffusers, so no `from_pretrained` would load it; "
            "nothing was saved."
        )
    if shared := _stored_once(model):
        raise RunError(
            f"{shared[0]!r} and {shared[1]!r} are one tensor here, and {type(model).__name__} does not tie them by its "
            "config: only one would be saved, and the folder would not open. Tie them in the config "
            "(`tie_word_embeddings`), or give each its own; nothing was saved."
        )
    wrong = unlike_its_class(model)
    if wrong:
        raise RunError(
            f"{type(model).__name__} would not load back what this model holds: {len(wrong)} tensors are not those that its "
            f"config describes, such as {wrong[0]!r}; nothing was saved. Merge adapters first; build other modules as a "
            "conversion (overhaul.conversions), which is recorded and loads again."
        )
    if not hasattr(model, "register_to_config"):
        check_recomputed(model)


def _stored_once(model: Any) -> tuple[str, str] | None:
    """Two names of one parameter that its class, built from the config, has under either."""
    tied = getattr(model, "all_tied_weights_keys", None)
    if not isinstance(tied, Mapping):
        return None
    first: dict[int, str] = {}
    names = [(name, first.setdefault(id(p), name)) for name, p in model.named_parameters(remove_duplicate=False)]
    pairs = [(other, name) for name, other in names if other != name and not {name, other} <= {*tied, *tied.values()}]
    if not pairs:
        return None
    built = dict(skeleton(model).named_parameters(remove_duplicate=False))
    return next(((a, b) for a, b in pairs if built.get(a) is not built.get(b)), None)


@contextlib.contextmanager
def _not_compiled(model: nn.Module) -> Iterator[nn.Module]:
    """The model with every compiled module as it was before `torch.compile`, so that its tensors have plain names."""
    inner = getattr(model, "_orig_mod", model)
    found = [
        (module, name, child)
        for module in inner.modules()
        for name, child in module.named_children()
        if hasattr(child, "_orig_mod")
    ]
    for module, name, child in found:
        module._modules[name] = child._orig_mod  # pyright: ignore[reportArgumentType]
    try:
        yield inner
    finally:
        for module, name, child in found:
            module._modules[name] = child


def write_checkpoint(model: Any, processor: Any, folder: Path, dtype: str | None) -> None:
    """`save_pretrained` in `dtype` without changing the model that is held."""
    if (wanted := DTYPES.get(dtype or "")) is None:
        with quiet_transformers():
            state = {} if hasattr(model, "register_to_config") else {"state_dict": cast(model, None)}
            model.save_pretrained(folder, **state, **_sized(model))
    elif hasattr(model, "register_to_config"):  # diffusers saves only what the model holds
        from huggingface_hub import save_torch_state_dict

        model.save_config(folder)
        # diffusers names the index of several files otherwise where there is a variant
        variant, size = (f".{CONVERTED}", "10TB") if records(model) else ("", "10GB")
        pattern = f"diffusion_pytorch_model{variant}{{suffix}}.safetensors"
        save_torch_state_dict(cast(model, wanted), folder, filename_pattern=pattern, max_shard_size=size)
    else:
        with quiet_transformers():
            model.save_pretrained(folder, state_dict=cast(model, wanted), **_sized(model))
        _say_dtype(folder / "config.json", str(wanted).removeprefix("torch."))
    copy_companions(model, folder)
    if processor is not None:
        processor.save_pretrained(folder)


def _say_dtype(path: Path, name: str) -> None:
    """Let a config say the dtype of the files: transformers writes that of the model which is held."""

    def said(content: dict[str, Any]) -> dict[str, Any]:
        parts = {key: said(value) for key, value in content.items() if isinstance(value, dict)}
        return {**content, **parts, **({"dtype": name} if "dtype" in content else {})}

    path.write_text(json.dumps(said(read_json(path)), indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _sized(model: nn.Module) -> dict[str, Any]:
    """How large a file of weights may be; diffusers has a rule of its own."""
    return {} if hasattr(model, "register_to_config") else {"max_shard_size": largest_file(model)}
