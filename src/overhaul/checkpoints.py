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
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from overhaul.errors import RequestError, did_you_mean, reading
from overhaul.weight_files import CONVERTED as CONVERTED
from overhaul.weight_files import NEW, STEMS, header, read_json, weight_files
from overhaul.weight_files import listed as listed

STARTERS = Path(__file__).parent / "data" / "starters"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LINEAGE, MADE_OF = "lineage.json", "made_of"
"""What a folder says of its making, and where it names the folders whose tensors it was made of."""

_NOT_BUILT = {"transformers_version", "dtype", "torch_dtype", "_name_or_path", "_diffusers_version"}
_WHOLE = ("bool", "u8", "i8", "u16", "i16", "u32", "i32", "u64", "i64")
_HEADER_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}


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
        trusted: whether Python code that comes with it may run.
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
    trusted: bool = False

    @property
    def architecture(self) -> str:
        """The model class that config.json names: as transformers writes it, as diffusers does, or in `auto_map` alone."""
        if self.config.get("architectures"):
            return self.config["architectures"][0]
        return self.config.get("_class_name") or _class_in_map(self.config) or ""

    @property
    def library(self) -> Literal["transformers", "diffusers"]:
        """The library that the class belongs to."""
        return "diffusers" if "_class_name" in self.config else "transformers"

    @property
    def parameters(self) -> int:
        """Number of weights; tied tensors count once, an adapter's base with the adapter, statistics of batch norms not."""
        own = sum(math.prod(shape) for name, shape in self.shapes.items() if not name.endswith(STATISTICS))
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
        code = sorted(self.folder.rglob("*.py")) if self.trusted else []
        files = (self.folder / (ADAPTER_CONFIG if self.base else "config.json"), *self.weight_files, *code)
        own = _digest(tuple((path, path.stat().st_mtime_ns) for path in files))
        if self.base is None and not self.is_new:
            return own
        more = self.base.digest() if self.base else f"{NEW}{self.seed}"
        return hashlib.sha256(f"{own} {more}".encode()).hexdigest()


STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
"""What a batch norm stores beside its weights."""


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
    """The starter models that ship with the package, and adapters for them, by name."""
    known = [*STARTERS.glob("*/config.json"), *STARTERS.glob(f"*/{ADAPTER_CONFIG}")]
    return {path.parent.name: path.parent for path in sorted(known)}


def locate(source: str | Path, *, weights: bool = True, code: bool = False) -> Path:
    """The folder behind a path, `starter:NAME`, or a hub name, with `@revision` or without.

    From the hub, config, tokenizer and safetensors are fetched.

    Args:
        source: as the user wrote it.
        weights: fetch safetensors too.
        code: fetch Python files too.

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
    hub = re.fullmatch(r"(\w[\w.-]*/[\w.-]+)(?:@([\w./-]+))?", text)
    if hub is None:
        raise RequestError(
            f"The model folder {text!r} does not exist. A model is a folder with config.json and *.safetensors, "
            f"a hub name (owner/name, or owner/name@revision), or a starter: "
            f"{', '.join(f'starter:{name}' for name in starters())}. "
            f"{NEW}FOLDER starts from the folder's config alone."
        )
    from huggingface_hub import snapshot_download

    allowed = ["*.json", "*.model", "*.txt", "*.jinja", *["*.safetensors"] * weights, *["*.py"] * code]
    name, revision = hub.groups()
    ignored = ["consolidated*.safetensors"]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=allowed, ignore_patterns=ignored))
    except Exception as error:  # the hub client raises many kinds; the user needs one message
        raise RequestError(f"{text!r} is no folder here, and it could not be fetched from the hub: {error}") from error


def facts(
    source: str | Path,
    *,
    seed: int = 0,
    trust_remote_code: bool = False,
    base: Checkpoint | None = None,
    otherwise: str | None = None,
) -> Checkpoint:
    """Read config and safetensors headers; refuse what could not be opened later.

    Args:
        source: a folder with a model or an adapter, a hub name, `starter:NAME`, or `new:` before one of these.
        seed: from which `new:` is drawn.
        trust_remote_code: Python code that comes with the model may be fetched, and run when it is opened.
        base: what an adapter is put on, in place of the model that it names.
        otherwise: the source of what an adapter is put on that names none, as peft writes it from a base in memory.

    Raises:
        RequestError: no config.json, pickle-only weights, no weights, weights that could be read in two ways, a damaged
            header, or an adapter whose base is not there.
    """
    text = str(source)
    if text.startswith(NEW):
        return _facts_of_new(text, seed, trust_remote_code)
    folder = locate(source, code=trust_remote_code)
    _check_plain(folder)
    if (folder / ADAPTER_CONFIG).exists() and not any((folder / f"{stem}.safetensors").exists() for stem in STEMS):
        return _facts_of_adapter(text, folder, trust_remote_code, base, otherwise)
    config = _config(folder)
    files = weight_files(folder)
    shapes, dtype = _shapes(files)
    if dtype in _WHOLE and not config.get("quantization_config"):
        raise RequestError(
            f"{folder}: most of the weights are whole numbers ({dtype}), and config.json has no `quantization_config` that "
            "says what they stand for. Take the checkpoint that was quantised, or the config that was saved with this one."
        )
    if config.get("quantization_config"):  # it is opened, and saved again, in the dtype that was quantised
        dtype = _dtype_in(config, "bfloat16")
    return Checkpoint(text, folder, config, shapes, dtype, _size(files), tuple(files), trusted=trust_remote_code)


def _check_plain(folder: Path) -> None:
    """Refuse what is neither file nor folder: reading a pipe would wait for ever."""
    with reading(folder):
        odd = [path for path in folder.iterdir() if path.exists() and not (path.is_file() or path.is_dir())]
    if odd:
        raise RequestError(f"{odd[0]} is no plain file, so the folder cannot be read. Remove it.")


def _dtype_in(config: Mapping[str, Any], otherwise: str) -> str:
    """The dtype that a config names, as torch names it."""
    named = config.get("dtype") or config.get("torch_dtype") or otherwise
    return named if named in _HEADER_NAMES.values() else otherwise


def _facts_of_new(source: str, seed: int, trusted: bool) -> Checkpoint:
    """A model that does not exist yet: its tensors are those that the class builds from the config, tied ones once."""
    from overhaul import models

    folder = locate(source.removeprefix(NEW), weights=False, code=trusted)
    _check_plain(folder)
    empty = Checkpoint(source, folder, _config(folder), {}, "float32", 0, seed=seed, trusted=trusted)
    built = models.planned(empty)
    if built is None:
        raise models.refusal(empty)
    tied = getattr(built, "all_tied_weights_keys", None) or {}
    shapes = {name: tuple(tensor.shape) for name, tensor in built.state_dict().items() if name not in tied}
    dtype = _dtype_in(empty.config, "float32")
    size = getattr(torch, dtype).itemsize * sum(math.prod(shape) for shape in shapes.values())
    return replace(empty, shapes=shapes, dtype=dtype, bytes=size)


def _facts_of_adapter(
    source: str, folder: Path, trusted: bool, base: Checkpoint | None, otherwise: str | None
) -> Checkpoint:
    """An adapter, with its base's config, since what it opens as is a model of the base's class."""
    options = read_json(folder / ADAPTER_CONFIG)
    weights = folder / ADAPTER_WEIGHTS
    if not weights.exists():
        raise RequestError(
            f"{folder} holds {ADAPTER_CONFIG} but no {ADAPTER_WEIGHTS}; save the adapter as safetensors."
        )
    if options.get("megatron_config") and not trusted:
        raise RequestError(
            f"{folder / ADAPTER_CONFIG}: `megatron_config` lets peft import the module {options.get('megatron_core')!r}. "
            "Remove the entry, or say `trust_remote_code: true` if you trust it."
        )
    if base is None and otherwise is not None and not options.get("base_model_name_or_path"):
        base = facts(otherwise, trust_remote_code=trusted)
    base = base or _named_base(source, folder, options, trusted)
    shapes, _ = _shapes([weights])
    return Checkpoint(
        source,
        folder,
        base.config,
        shapes,
        base.dtype,
        base.bytes + _size([weights]),
        (weights,),
        base,
        base.seed,
        trusted,
    )


def _named_base(source: str, folder: Path, options: Mapping[str, Any], trusted: bool) -> Checkpoint:
    """The model that an adapter says it belongs to."""
    named = options.get("base_model_name_or_path")
    if isinstance(named, str) and Path(named).is_dir() and Path(named).samefile(folder):
        raise RequestError(f"{folder / ADAPTER_CONFIG} names its own folder as its base (base_model_name_or_path).")
    if not isinstance(named, str) or not named:
        raise RequestError(f"{folder / ADAPTER_CONFIG} does not name its base: write base_model_name_or_path.")
    beside = folder / named
    try:
        place = beside if not Path(named).is_dir() and beside.is_dir() else named
        return facts(place, trust_remote_code=trusted)
    except RequestError as error:
        raise RequestError(
            f"{source} is an adapter for {named!r} (base_model_name_or_path in {ADAPTER_CONFIG}), which cannot be opened: "
            f"{error}"
        ) from error


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.exists():
        below = sorted(folder.glob("*/config.json"), key=lambda path: not path.parent.name.endswith("Transformer"))
        inside = next((f" {one.parent} has one: open that." for one in below), "")
        raise RequestError(f"{folder} has no config.json, so it is not a Hugging Face checkpoint.{inside}")
    config = read_json(path)
    named = config.get("architectures")
    if not named and "_class_name" not in config and _class_in_map(config) is None:
        raise RequestError(
            f"{path} names no `architectures`, so the model class is not known. Add it, such as "
            '`"architectures": ["LlamaForCausalLM"]`.'
        )
    if named and not (isinstance(named, list) and isinstance(named[0], str)):
        raise RequestError(f"{path}: `architectures` must be a list with the name of a class, not {named!r}.")
    if not isinstance(config.get("_class_name", ""), str):
        raise RequestError(f"{path}: `_class_name` must be the name of a class, not {config['_class_name']!r}.")
    return config


def _class_in_map(config: Mapping[str, Any]) -> str | None:
    """A class of the folder's own, where `auto_map` alone names it."""
    given = config.get("auto_map")
    entries = given.items() if isinstance(given, Mapping) else ()
    named = {name: ref for name, ref in entries if name.startswith("AutoModel") and isinstance(ref, str)}
    found = named.get("AutoModelForCausalLM") or next(iter(named.values()), None)
    return found and found.rpartition(".")[2]


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


def saved_from_memory(folder: Path) -> bool:
    """Whether Overhaul saved a model here, with what its class has; what is made of files holds all that they held."""
    return (folder / LINEAGE).exists() and MADE_OF not in read_json(folder / LINEAGE)
