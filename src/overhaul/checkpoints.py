"""Checkpoint folders, known from config.json and safetensors headers alone.

Four kinds are one thing here: a model with its weights, a model that modules were built onto (`conversions`), one that does
not exist yet (`new:FOLDER`, a config and a seed), and an adapter (a folder that names its base).

1. What counts is what `from_pretrained` would read: model.safetensors, or the files that its index names. A second copy of
   the weights beside them (consolidated.safetensors, model.fp16.safetensors) does not. What could be read in two ways is
   refused.
2. Only safetensors are read.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from overhaul.errors import RequestError, did_you_mean, reading

STARTERS = Path(__file__).parent / "data" / "starters"
NEW = "new:"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LINEAGE, MADE_OF = "lineage.json", "made_of"
"""What a folder says of its making, and where it names the folders whose tensors it was made of."""
CONVERTED = "converted"
"""The variant under which the weights of a converted model are stored, so that no class opens half of them."""

_NOT_BUILT = {"transformers_version", "dtype", "torch_dtype", "_name_or_path", "_diffusers_version"}
_HEADER_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}
_ANOTHER_COPY = re.compile(r"consolidated|adapter_model|[^.]+\.[^.]+\.safetensors$")
_STEMS = ("model", "diffusion_pytorch_model")


@dataclass(frozen=True)
class Checkpoint:
    """A folder that holds a model, and what is known of it before any weight is read.

    Attributes:
        source: as the user wrote it.
        folder: where its files lie.
        config: config.json; of an adapter, its base's.
        shapes: every tensor's shape, from the safetensors headers; of an adapter, the adapter's own.
        dtype: the dtype of most of its numbers, as torch names it.
        bytes: size of the weights on disk; of an adapter, with its base's.
        weight_files: the safetensors files that count, in order; none of a model that does not exist yet.
        base: what an adapter belongs to; None where the folder holds a model.
        seed: from which a model that does not exist yet is drawn.
    """

    source: str
    folder: Path
    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    dtype: str
    bytes: int
    weight_files: tuple[Path, ...] = ()
    base: Checkpoint | None = None
    seed: int = 0

    @property
    def architecture(self) -> str:
        """The model class that config.json names: as transformers writes it, or as diffusers does."""
        return self.config["architectures"][0] if self.config.get("architectures") else self.config["_class_name"]

    @property
    def library(self) -> Literal["transformers", "diffusers"]:
        """The library that the class belongs to."""
        return "diffusers" if "_class_name" in self.config else "transformers"

    @property
    def parameters(self) -> int:
        """Number of stored scalars; tied tensors count once, and an adapter's base with the adapter."""
        own = sum(math.prod(shape) for shape in self.shapes.values())
        return own + (self.base.parameters if self.base else 0)

    @property
    def built(self) -> dict[str, Any]:
        """What the model is apart from its weights: its config, with what was built onto it."""
        return {key: value for key, value in self.config.items() if key not in _NOT_BUILT}

    @property
    def is_adapter(self) -> bool:
        """Whether the folder holds an adapter, which opens merged into its base."""
        return self.base is not None

    @property
    def is_new(self) -> bool:
        """Whether it is a config alone, whose weights are drawn when it is opened."""
        return not self.weight_files

    def open(self, dtype: str = "float32", *, trust_remote_code: bool = False) -> nn.Module:
        """The model itself, in eval mode, as `open_model` gives it."""
        from overhaul import models

        return models.load_weights(self, dtype, trust_remote_code)

    def digest(self) -> str:
        """SHA-256 of config and weights; of an adapter, also of its base's; of what is new, of config and seed."""
        files = (self.folder / (ADAPTER_CONFIG if self.base else "config.json"), *self.weight_files)
        own = _digest(tuple((path, path.stat().st_mtime_ns) for path in files))
        if self.base is None and not self.is_new:
            return own
        more = self.base.digest() if self.base else f"{NEW}{self.seed}"
        return hashlib.sha256(f"{own} {more}".encode()).hexdigest()


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


def locate(source: str | Path, *, weights: bool = True) -> Path:
    """The folder behind a path, `starter:NAME`, or a hub name (which is fetched: config, tokenizer and safetensors).

    Args:
        source: as the user wrote it.
        weights: fetch safetensors too.

    Raises:
        RequestError: there is none, or it could not be fetched.
    """
    text = str(source)
    if text.startswith("starter:"):
        known = starters()
        name = text.removeprefix("starter:")
        if name not in known:
            raise RequestError(f"There is no starter model {name!r}.{did_you_mean(name, known)}")
        return known[name]
    with reading(f"The model folder {text!r}"):
        folder = Path(text).expanduser()
        if folder.is_dir():
            return folder
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", text):
        raise RequestError(
            f"The model folder {text!r} does not exist. A model is a folder with config.json and *.safetensors, "
            f"a hub name (owner/name), or a starter: {', '.join(f'starter:{name}' for name in starters())}. "
            f"{NEW}FOLDER starts from the folder's config alone."
        )
    from huggingface_hub import snapshot_download

    allowed = ["*.json", "*.model", "*.txt", "*.jinja", *["*.safetensors"] * weights]
    try:
        return Path(snapshot_download(text, allow_patterns=allowed, ignore_patterns=["consolidated*.safetensors"]))
    except Exception as error:  # the hub client raises many kinds; the user needs one message
        raise RequestError(f"{text!r} is no folder here, and it could not be fetched from the hub: {error}") from error


def facts(source: str | Path, *, seed: int = 0) -> Checkpoint:
    """Read config and safetensors headers; refuse what could not be opened later.

    Args:
        source: a folder with a model or an adapter, a hub name, `starter:NAME`, or `new:` before one of these.
        seed: from which `new:` is drawn.

    Raises:
        RequestError: no config.json, pickle-only weights, no weights, weights that could be read in two ways, a damaged
            header, or an adapter whose base is not there.
    """
    text = str(source)
    if text.startswith(NEW):
        return _facts_of_new(text, seed)
    folder = locate(source)
    if (folder / ADAPTER_CONFIG).exists() and not any((folder / f"{stem}.safetensors").exists() for stem in _STEMS):
        return _facts_of_adapter(text, folder)
    config = _config(folder)
    files = weight_files(folder)
    shapes, dtype = _shapes(files)
    return Checkpoint(text, folder, config, shapes, dtype, _size(files), tuple(files))


def _facts_of_new(source: str, seed: int) -> Checkpoint:
    """A model that does not exist yet: its tensors are those that the class builds from the config, tied ones once."""
    from overhaul import models

    folder = locate(source.removeprefix(NEW), weights=False)
    empty = Checkpoint(source, folder, _config(folder), {}, "float32", 0, seed=seed)
    built = models.planned(empty)
    if built is None:
        raise RequestError(f"{source}: the {empty.library} that is installed has no class {empty.architecture!r}.")
    tied = getattr(built, "all_tied_weights_keys", None) or {}
    shapes = {name: tuple(tensor.shape) for name, tensor in built.state_dict().items() if name not in tied}
    dtype = empty.config.get("dtype") or empty.config.get("torch_dtype") or "float32"
    size = getattr(torch, dtype).itemsize * sum(math.prod(shape) for shape in shapes.values())
    return Checkpoint(source, folder, empty.config, shapes, dtype, size, seed=seed)


def _facts_of_adapter(source: str, folder: Path) -> Checkpoint:
    """An adapter, with its base's config, since what it opens as is a model of the base's class."""
    options = _read_json(folder / ADAPTER_CONFIG)
    weights = folder / ADAPTER_WEIGHTS
    if not weights.exists():
        raise RequestError(
            f"{folder} holds {ADAPTER_CONFIG} but no {ADAPTER_WEIGHTS}; save the adapter as safetensors."
        )
    named = options.get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        raise RequestError(f"{folder / ADAPTER_CONFIG} does not name its base: write base_model_name_or_path.")
    beside = folder / named
    try:
        base = facts(beside if not Path(named).is_dir() and beside.is_dir() else named)
    except RequestError as error:
        raise RequestError(
            f"{source} is an adapter for {named!r} (base_model_name_or_path in {ADAPTER_CONFIG}), which cannot be opened: "
            f"{error}"
        ) from error
    shapes, _ = _shapes([weights])
    return Checkpoint(
        source, folder, base.config, shapes, base.dtype, base.bytes + _size([weights]), (weights,), base, base.seed
    )


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.exists():
        raise RequestError(f"{folder} has no config.json, so it is not a Hugging Face checkpoint.")
    config = _read_json(path)
    named = config.get("architectures")
    if not named and "_class_name" not in config:
        raise RequestError(f"{path} names no `architectures`, so the model class is not known.")
    if named and not (isinstance(named, list) and isinstance(named[0], str)):
        raise RequestError(f"{path}: `architectures` must be a list with the name of a class, not {named!r}.")
    return config


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # no JSON, or no text
        raise RequestError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(found, dict):
        raise RequestError(f"{path} is not valid JSON: it holds a {type(found).__name__}, not an object.")
    return found


def _size(files: Sequence[Path]) -> int:
    return sum(path.stat().st_size for path in files)


def _shapes(files: Sequence[Path]) -> tuple[dict[str, tuple[int, ...]], str]:
    """Every tensor's shape, and the dtype of most numbers."""
    shapes: dict[str, tuple[int, ...]] = {}
    numbers: dict[str, int] = {}
    for path in files:
        for name, entry in header(path).items():
            shapes[name] = tuple(entry["shape"])
            numbers[entry["dtype"]] = numbers.get(entry["dtype"], 0) + math.prod(entry["shape"])
    main = max(numbers, key=lambda k: numbers[k])
    return shapes, _HEADER_NAMES.get(main, main.lower())


def header(path: Path) -> dict[str, Any]:
    """Names, dtypes and shapes of one safetensors file: 8 bytes of length, then JSON.

    Raises:
        RequestError: the file is damaged, cut short or empty.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= size - 8:
            raise RequestError(f"{path} is damaged or cut short: its header says {length} bytes, the file has {size}.")
        try:
            found = json.loads(file.read(length))
        except ValueError as error:  # no JSON, or no text
            raise RequestError(
                f"{path} is damaged: its header is not JSON ({error}). Fetch or save it again."
            ) from None
    try:
        found.pop("__metadata__", None)
        if not found:
            raise RequestError(f"{path} holds no tensors.")
        end = max(entry["data_offsets"][1] for entry in found.values())
        _ = [(entry["dtype"], math.prod(entry["shape"])) for entry in found.values()]
    except (TypeError, KeyError, AttributeError, IndexError):
        raise RequestError(f"{path} is damaged: its header describes no tensors. Fetch or save it again.") from None
    if 8 + length + end != size:
        raise RequestError(f"{path} is cut short: its header promises {8 + length + end} bytes, the file has {size}.")
    return found


def weight_files(folder: Path) -> list[Path]:
    """The files that make up the model: those that `from_pretrained` would read, if that is certain.

    Raises:
        RequestError: there are none, only pickled ones, or it is not certain.
    """
    held = sorted(folder.glob("*.safetensors"))
    found = [(folder / single, folder / index) for single, index in _names()]
    present = [(single, index) for single, index in found if single.exists() or index.exists()]
    if not present:
        raise RequestError(_none(folder, held))
    if len(present) > 1:
        names = [next(path.name for path in pair if path.exists()) for pair in present]
        raise RequestError(f"{folder} holds {' and '.join(names)}, and it is not certain which one counts. Remove one.")
    single, index = present[0]
    named = _named_files(index, held) if index.exists() else [single]
    if single.exists() and named != [single]:
        raise RequestError(
            f"{folder} holds {single.name} and {index.name}, which names other files, so it is not certain which ones "
            "count. Remove what does not belong to the model."
        )
    owner: dict[str, Path] = {}
    for path in held:  # a shard may be one that an earlier save left behind
        if path not in named and _ANOTHER_COPY.match(path.name):
            continue
        for name in sorted(header(path)):
            if name in owner:
                raise RequestError(
                    f"{folder}: {name} lies in both {owner[name].name} and {path.name}, so it is not certain which "
                    "one counts. Remove the file that does not belong to the model."
                )
            owner[name] = path
    return named


def _names() -> list[tuple[str, str]]:
    """What a file of all weights, and the index of several, may be called."""
    plain = [(f"{stem}.safetensors", f"{stem}.safetensors.index.json") for stem in _STEMS]
    ours = [(f"{s}.{CONVERTED}.safetensors", f"{s}.safetensors.index.{CONVERTED}.json") for s in _STEMS]
    return plain + ours


def _none(folder: Path, held: Sequence[Path]) -> str:
    """Why a folder has no weights to read."""
    if held:
        return (
            f"{folder} holds {', '.join(path.name for path in held[:3])}, but neither model.safetensors nor its index, "
            "which are what is read. Save the model with `save_pretrained`, or fetch those files too."
        )
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in {".bin", ".pt", ".pth", ".ckpt"})
    if pickles:
        return (
            f"{folder} holds only pickled weights ({', '.join(pickles[:3])}), which can run code when opened. Convert "
            "them once with `model.save_pretrained(folder)` in an environment you trust, which writes safetensors."
        )
    return f"{folder} holds no *.safetensors weights. {NEW}{folder} starts from its config alone."


def _named_files(index: Path, held: Sequence[Path]) -> list[Path]:
    """The files that an index names, if it tells the truth."""
    where: Any = _read_json(index).get("weight_map")
    if not isinstance(where, dict) or not where or not all(isinstance(file, str) for file in where.values()):
        raise RequestError(f"{index} is no index of weights: it has no `weight_map`. Save the model again.")
    names = sorted(set(where.values()))
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise RequestError(f"{index} names {listed(outside)}, which lies outside of the folder. Save the model again.")
    named = [index.parent / file for file in names]
    missing = [path.name for path in named if path not in held]
    if missing:
        raise RequestError(f"{index} names {listed(missing)}, which the folder lacks. Fetch the checkpoint again.")
    holds = {path.name: header(path) for path in named}
    wrong = [name for name, file in where.items() if name not in holds[file]]
    if wrong:
        raise RequestError(
            f"{index} says that {where[wrong[0]]} holds {listed(wrong)}, which it does not. Index and files are of "
            "different models or states: fetch or save the checkpoint again."
        )
    return named


def saved_from_memory(folder: Path) -> bool:
    """Whether Overhaul saved a model here, with what its class has; what is made of files holds all that they held."""
    return (folder / LINEAGE).exists() and MADE_OF not in _read_json(folder / LINEAGE)


def listed(names: Sequence[str]) -> str:
    """The first four names and how many more there are."""
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more
