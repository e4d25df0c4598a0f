"""Checkpoint folders: find one, know it from its headers alone, open it, and save so that plain transformers loads it.

Only safetensors are read. No code that comes with a model is run unless the caller says so.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from overhaul.errors import RequestError, RunError, did_you_mean, writing
from overhaul.stack.paths import FILE as PATHS
from overhaul.stack.paths import follow_saved_paths, set_aside, write_paths

STARTERS = Path(__file__).parent / "data" / "starters"
DTYPES: Mapping[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_NOT_BUILT = {"transformers_version", "dtype", "torch_dtype", "_name_or_path", "_diffusers_version"}
_HEADER_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}


@dataclass(frozen=True)
class Checkpoint:
    """A folder that holds a model, and what is known of it before any weight is read.

    Attributes:
        source: as the user wrote it.
        folder: where its files lie.
        config: config.json.
        shapes: every tensor's shape, from the safetensors headers.
        dtype: the dtype of most of its numbers, as torch names it.
        bytes: size of the weights on disk.
    """

    source: str
    folder: Path
    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    dtype: str
    bytes: int

    @property
    def architecture(self) -> str:
        """The model class that config.json names: as transformers writes it, or as diffusers does."""
        return self.config["architectures"][0] if "architectures" in self.config else self.config["_class_name"]

    @property
    def library(self) -> Literal["transformers", "diffusers"]:
        """The library that the class belongs to."""
        return "diffusers" if "_class_name" in self.config else "transformers"

    @property
    def parameters(self) -> int:
        """Number of stored scalars; tied tensors count once."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    @property
    def built(self) -> Any:
        """What the model is apart from its weights: its config, and paths over its blocks."""
        paths = self.folder / PATHS
        told = {key: value for key, value in self.config.items() if key not in _NOT_BUILT}
        return told, paths.read_text() if paths.exists() else None

    @property
    def weight_files(self) -> list[Path]:
        """The safetensors files, in order."""
        return sorted(self.folder.glob("*.safetensors"))

    def open(self, dtype: str = "float32", *, trust_remote_code: bool = False) -> nn.Module:
        """The model itself, in eval mode, as `open_model` gives it."""
        return load_weights(self, dtype, trust_remote_code)

    def digest(self) -> str:
        """SHA-256 of config and weights."""
        return _digest(
            tuple((path, path.stat().st_mtime_ns) for path in (self.folder / "config.json", *self.weight_files))
        )


@functools.cache
def _digest(files: tuple[tuple[Path, int], ...]) -> str:
    """Of the files' contents; each is read once as long as it is not written again."""
    hasher = hashlib.sha256()
    for path, _ in files:
        with path.open("rb") as file:
            while chunk := file.read(1 << 24):
                hasher.update(chunk)
    return hasher.hexdigest()


def starters() -> dict[str, Path]:
    """The starter models that ship with the package, by name."""
    return {path.parent.name: path.parent for path in sorted(STARTERS.glob("*/config.json"))}


def locate(source: str | Path) -> Path:
    """The folder behind a path, `starter:NAME`, or a hub name (which is fetched: config, tokenizer and safetensors)."""
    text = str(source)
    if text.startswith("starter:"):
        known = starters()
        name = text.removeprefix("starter:")
        if name not in known:
            raise RequestError(f"There is no starter model {name!r}.{did_you_mean(name, known)}")
        return known[name]
    folder = Path(text).expanduser()
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", text):
        raise RequestError(
            f"The model folder {text!r} does not exist. A model is a folder with config.json and *.safetensors, "
            f"a hub name (owner/name), or a starter: {', '.join(f'starter:{name}' for name in starters())}."
        )
    from huggingface_hub import snapshot_download

    allowed = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    try:
        return Path(snapshot_download(text, allow_patterns=allowed))
    except Exception as error:  # the hub client raises many kinds; the user needs one message
        raise RequestError(f"{text!r} is no folder here, and it could not be fetched from the hub: {error}") from error


def facts(source: str | Path) -> Checkpoint:
    """Read config and safetensors headers; refuse what could not be opened later.

    Raises:
        RequestError: no config.json, pickle-only weights, no weights, or a damaged header.
    """
    folder = locate(source)
    if not (folder / "config.json").exists():
        raise RequestError(
            f"{folder} has no config.json, so it is not a Hugging Face checkpoint. If it holds an adapter, merge it into "
            "its base model first and give that folder."
        )
    try:
        config = json.loads((folder / "config.json").read_text())
    except json.JSONDecodeError as error:
        raise RequestError(f"{folder / 'config.json'} is not valid JSON: {error}.") from error
    if not config.get("architectures") and "_class_name" not in config:
        raise RequestError(f"{folder / 'config.json'} names no `architectures`, so the model class is not known.")
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in {".bin", ".pt", ".pth", ".ckpt"})
        if pickles:
            raise RequestError(
                f"{folder} holds only pickled weights ({', '.join(pickles[:3])}), which can run code when opened. Convert "
                "them once with `model.save_pretrained(folder)` in an environment you trust, which writes safetensors."
            )
        raise RequestError(f"{folder} holds no *.safetensors weights.")
    shapes: dict[str, tuple[int, ...]] = {}
    numbers: dict[str, int] = {}
    for path in files:
        for name, entry in _header(path).items():
            shapes[name] = tuple(entry["shape"])
            numbers[entry["dtype"]] = numbers.get(entry["dtype"], 0) + math.prod(entry["shape"])
    main = max(numbers, key=lambda k: numbers[k])
    total = sum(path.stat().st_size for path in files)
    return Checkpoint(str(source), folder, config, shapes, _HEADER_NAMES.get(main, main.lower()), total)


def _header(path: Path) -> dict[str, Any]:
    """Names, dtypes and shapes of one safetensors file: 8 bytes of length, then JSON."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= size - 8:
            raise RequestError(f"{path} is damaged or cut short: its header says {length} bytes, the file has {size}.")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:  # no JSON, or no text
            raise RequestError(
                f"{path} is damaged: its header is not JSON ({error}). Fetch or save it again."
            ) from None
    header.pop("__metadata__", None)
    if not header:
        raise RequestError(f"{path} holds no tensors.")
    end = max(entry["data_offsets"][1] for entry in header.values())
    if 8 + length + end != size:
        raise RequestError(f"{path} is cut short: its header promises {8 + length + end} bytes, the file has {size}.")
    return header


def open_model(source: str | Path, *, dtype: str = "float32", trust_remote_code: bool = False) -> tuple[nn.Module, Any]:
    """Open a checkpoint folder, hub name or `starter:NAME`.

    Args:
        source: what to open.
        dtype: "float32", "bfloat16" or "float16": how weights are held while they are worked on.
        trust_remote_code: run Python code that comes with the model.

    Returns:
        The model in eval mode, and its tokenizer or image processor (None where the folder has none).
    """
    known = facts(source)
    return load_weights(known, dtype, trust_remote_code), load_processor(known)


def load_weights(known: Checkpoint, dtype: str, trust_remote_code: bool = False) -> nn.Module:
    """The model itself. Tensors that the checkpoint lacks are an error, never filled at random."""
    if dtype not in DTYPES:
        raise RequestError(f"dtype {dtype!r} is not possible.{did_you_mean(dtype, DTYPES)}")
    kind = class_of(known)
    options: dict[str, Any] = {"dtype": DTYPES[dtype], "use_safetensors": True, "output_loading_info": True}
    if known.library == "diffusers":
        options["torch_dtype"] = options.pop("dtype")
    if kind is None:
        if not trust_remote_code:
            raise RequestError(
                f"{known.source}: the {known.library} that is installed has no class {known.architecture!r}. If the folder "
                "brings its own code and you trust it, say `trust_remote_code: true`."
            )
        from transformers import AutoModel

        kind, options["trust_remote_code"] = AutoModel, True
    with _quiet_transformers():
        model, loading = kind.from_pretrained(known.folder, **options)
    missing = sorted(loading["missing_keys"])
    if missing:
        raise RequestError(f"{known.source}: the weights lack {len(missing)} tensors, such as {missing[0]!r}.")
    follow_saved_paths(model, known.folder)
    # nn.Dropout and the like must be off until a training turns them on
    return model.eval()


def class_of(known: Checkpoint) -> Any:
    """The class that config.json names, or None where its library has none of that name.

    A model that no library can hold (an ensemble, a bank of prompts) is a `PreTrainedModel` of ours: its config names the
    module under `overhaul`.

    Raises:
        RequestError: the class belongs to diffusers, which is not installed.
    """
    if str(known.config.get("overhaul")).startswith("overhaul."):
        return getattr(import_module(known.config["overhaul"]), known.architecture, None)
    if known.library == "diffusers" and find_spec("diffusers") is None:
        raise RequestError(
            f"{known.source} is a diffusers model ({known.architecture}); install it with `pip install overhaul[diffusion]`."
        )
    return getattr(import_module(known.library), known.architecture, None)


def planned(known: Checkpoint) -> nn.Module | None:
    """What config.json describes, built without memory on torch's meta device; None where the folder brings its own code.

    Raises:
        RequestError: nothing can be built from the config.
    """
    kind = class_of(known)
    if kind is None:
        return None
    try:
        if known.library == "diffusers":
            with torch.device("meta"):
                return kind.from_config(kind.load_config(known.folder))
        from transformers.initialization import no_init_weights

        config = kind.config_class.from_pretrained(known.folder)
        with torch.device("meta"), no_init_weights():
            return kind(config)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise RequestError(
            f"{known.source}: no {known.architecture} can be built from config.json: {error}. Correct config.json; "
            "`overhaul plan` checks it without reading weights."
        ) from error


def check_shapes(known: Checkpoint) -> None:
    """Compare the headers with the model that config.json describes, built without memory on torch's meta device.

    Names may differ (transformers renames tensors of older checkpoints); a shape may not.

    Raises:
        RequestError: a tensor has another shape than the config says.
    """
    model = planned(known)
    if model is None:
        return
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name, shape in known.shapes.items():
        if expected.get(name, shape) != shape:
            raise RequestError(
                f"{known.source}: {name} has the shape {shape} in the weights, but config.json describes {expected[name]}. "
                "Config and weights do not belong together."
            )


def load_processor(known: Checkpoint) -> Any:
    """The folder's tokenizer, else its image processor, else None."""
    from transformers import AutoImageProcessor, AutoTokenizer

    with _quiet_transformers():
        if any(
            (known.folder / name).exists() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
        ):
            tokenizer = AutoTokenizer.from_pretrained(known.folder)
            rows = known.config.get("vocab_size")
            if rows is not None and len(tokenizer) > rows:
                raise RequestError(
                    f"{known.source}: the tokenizer has {len(tokenizer)} tokens but the model only {rows} (vocab_size). "
                    "They do not belong together, or tokens were added without resizing the embeddings."
                )
            return tokenizer
        if (known.folder / "preprocessor_config.json").exists():
            return AutoImageProcessor.from_pretrained(known.folder)
    return None


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Hide loading bars: a run shows its own progress."""
    from transformers.utils import logging

    was_shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_shown:
            logging.enable_progress_bar()


def save(model: nn.Module, processor: Any, folder: str | Path, *, dtype: str | None = None) -> Path:
    """Save as a plain checkpoint: written beside its place and renamed when complete.

    Args:
        model: a transformers or diffusers model. It stays as it is; only the files are in `dtype`. The paths that it
            follows are saved beside its weights.
        processor: its tokenizer or image processor, or None.
        folder: must not exist yet.
        dtype: of the files; the model's own if None.

    Raises:
        RequestError: the folder exists, or a weight is not finite.
        RunError: the disk is full or read-only.
    """
    folder = Path(folder)
    if folder.exists():
        raise RequestError(f"{folder} exists already; saving never replaces a folder. Choose another name.")
    bad = [name for name, p in model.named_parameters() if not torch.isfinite(p).all()]
    if bad:
        raise RunError(f"{len(bad)} tensors hold values that are not finite, such as {bad[0]!r}; nothing was saved.")
    partial = folder.with_name(f".{folder.name}.partial")
    with set_aside(model) as paths, writing(folder):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write_checkpoint(model, processor, partial, dtype)
        if paths:
            write_paths(partial, paths)
        os.replace(partial, folder)
    return folder


def write_checkpoint(model: Any, processor: Any, folder: Path, dtype: str | None) -> None:
    """`save_pretrained` in `dtype` without changing the model that is held."""
    if (wanted := DTYPES.get(dtype or "")) is None:
        with _quiet_transformers():
            model.save_pretrained(folder)
    elif hasattr(model, "register_to_config"):  # diffusers saves only what the model holds
        from huggingface_hub import save_torch_state_dict

        model.save_config(folder)
        pattern = "diffusion_pytorch_model{suffix}.safetensors"
        save_torch_state_dict(_cast(model, wanted), folder, filename_pattern=pattern)
    else:
        config_dtype, model.config.dtype = model.config.dtype, wanted
        try:
            with _quiet_transformers():
                model.save_pretrained(folder, state_dict=_cast(model, wanted))
        finally:
            model.config.dtype = config_dtype
    if processor is not None:
        processor.save_pretrained(folder)


def _cast(model: nn.Module, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The state in another dtype; tied tensors stay one tensor, or they would be written twice."""
    cast: dict[int, torch.Tensor] = {}
    state: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in cast:
            cast[id(tensor)] = tensor.detach().to(dtype) if tensor.is_floating_point() else tensor.detach()
        state[name] = cast[id(tensor)]
    return state
