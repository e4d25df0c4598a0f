"""A new checkpoint, made of the tensors of others: written beside its place, a piece at a time, and renamed when complete.

1. A file is made at its full size with the header in front, so that threads can write its tensors in any order.
2. Files, their names and the order in them are the first input's, unless another size of file is asked for.
3. Integers and booleans are copied from the first input and have to agree, except the counters of batch norms.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypedDict

import torch
from safetensors import safe_open
from torch import Tensor

from overhaul.companions import module_folders
from overhaul.errors import RequestError, RunError, did_you_mean, writing
from overhaul.models import DTYPES
from overhaul.weight_files import names_of_files
from overhaul.weights.index import DTYPE_CODES, TensorFacts, TensorIndex
from overhaul.weights.pieces import Piece, Whole, Workspace, opened, run, write

Combine = Callable[[TensorFacts, list[Tensor]], Tensor]
"""(facts of the first model's tensor, the tensor in each model) -> the new one: pure, and of the same shape. The tensors
are float32 and must not be changed; they are flat pieces, or have their own shape or rows where `whole` was asked for."""

_CODES = {dtype: code for code, dtype in DTYPE_CODES.items()}
_COPIED = {".json", ".jinja", ".model", ".txt", ".tiktoken", ".py"}
_NOT_COPIED = {
    *(index for _, index in names_of_files()),
    "lineage.json",
    "adapter_config.json",
}  # they speak of the old weights, or of an adapter beside them
_COUNTER = "num_batches_tracked"


class Storage(TypedDict, total=False):
    """How a new folder is stored, and what is let pass.

    Attributes:
        dtype: "float32", "bfloat16" or "float16"; that of the first model's files if not given.
        shard_bytes: most bytes in a file; the first model's files, by name and content, if not given.
        any_words: also combine embeddings of tokenizers that number words differently.
    """

    dtype: str
    shard_bytes: int
    any_words: bool


def write_new(
    first: TensorIndex,
    inputs: Mapping[str, Sequence[TensorFacts]],
    combine: Combine,
    out: Path,
    whole: Whole,
    storage: Storage,
    described: Callable[[Path], None],
) -> Path:
    """Write a checkpoint beside its place, file by file, and rename it; whatever goes wrong, nothing is left.

    `described` writes the model card and the lineage.
    """
    check_new(out)
    name, most = storage.get("dtype"), storage.get("shard_bytes")
    if name is not None and name not in DTYPES:
        raise RequestError(f"dtype {name!r} is not possible.{did_you_mean(name, DTYPES)}")
    if most is not None and most <= 0:
        raise RequestError(f"shard_bytes is {most}; give the size of a file in bytes, such as 5_000_000_000.")
    dtype = DTYPES[name] if name is not None else None
    shards = lay_out(first, dtype, most)
    _check_room(out, sum(tensor.bytes for shard in shards for tensor in shard.tensors))
    partial = out.with_name(f".{out.name}.partial")
    with writing(out):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            for shard in shards:
                _write_shard(shard, inputs, combine, partial / shard.file, whole)
            copy_rest(first, partial, shards, dtype)
            described(partial)
            os.replace(partial, out)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    return out


def check_new(out: Path) -> None:
    """Refuse a place where no new folder can be written.

    Raises:
        RequestError: something is there, be it a link that leads nowhere; the system does not take the name, or that of what
            is written beside it before; or nothing may be written there.
    """
    for place in (out, out.with_name(f".{out.name}.adapters") if out.name else out):
        try:
            os.lstat(place)
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise RequestError(f"{str(out)[:80]!r} cannot be a new folder: {reason}. Choose another name.") from None
        if place is out:
            kind = " as a link" if out.is_symlink() else ""
            raise RequestError(
                f"{out} exists already{kind}; a checkpoint is never written over. Choose another folder."
            )
    parent = next(one for one in out.absolute().parents if one.is_dir())
    if not os.access(parent, os.W_OK | os.X_OK):
        raise RequestError(f"{out} cannot be written: nothing may be written in {parent}. Choose another folder.")


def _check_room(out: Path, needed: int) -> None:
    place = next((parent for parent in out.absolute().parents if parent.is_dir()), Path("/"))
    free = shutil.disk_usage(place).free
    if needed > free:
        raise RequestError(
            f"{out} needs {needed / 1e9:.1f} GB, but {place} has {free / 1e9:.1f} GB left. Make room or choose another disk."
        )


def _write_shard(
    shard: Shard, inputs: Mapping[str, Sequence[TensorFacts]], combine: Combine, path: Path, whole: Whole
) -> None:
    dtypes = {tensor.name: tensor.dtype for tensor in shard.tensors}
    starts = create(path, {tensor.name: (tensor.dtype, tensor.shape) for tensor in shard.tensors}, shard.metadata)
    with opened([path], os.O_WRONLY) as files:

        def work(piece: Piece, space: Workspace) -> None:
            tensor = piece.inputs[0]
            dtype = dtypes[tensor.name]
            if tensor.dtype.is_floating_point:
                made = checked(combine, tensor, space.floats(piece), dtype)
                result = space.take("result", dtype, piece.count).copy_(made.reshape(-1))
            else:
                result = agreed(piece.inputs, [space.stored(piece, n) for n in range(len(piece.inputs))])
            write(files[path], result, starts[tensor.name] + piece.start * dtype.itemsize)

        for _ in run([inputs[tensor.name] for tensor in shard.tensors], work, whole, f"writing {shard.file}"):
            pass


def checked(combine: Combine, tensor: TensorFacts, models: list[Tensor], dtype: torch.dtype) -> Tensor:
    """What `combine` makes, if it can be stored."""
    result = combine(tensor, models)
    if result.shape != models[0].shape:
        raise RunError(
            f"The combining function made {list(result.shape)} of {tensor.name}, which is {list(models[0].shape)}. It has "
            "to keep the shape; one that needs more than pieces is given whole tensors with whole=True."
        )
    # rounding keeps the order, so the extremes tell whether anything is too large for the dtype; NaN is an extreme too
    if result.numel() and not torch.stack(torch.aminmax(result)).to(dtype).isfinite().all():
        wider = " or a dtype with a wider range, such as bfloat16" if dtype == torch.float16 else ""
        raise RunError(
            f"The new {tensor.name} (depth {tensor.depth}) is not finite in {dtype}. Use smaller coefficients{wider}."
        )
    return result


def agreed(tensors: Sequence[TensorFacts], values: Sequence[Tensor]) -> Tensor:
    """The first of several integer or boolean tensors that have to be equal."""
    first = tensors[0]
    for tensor, theirs in zip(tensors[1:], values[1:], strict=True):
        if not first.name.endswith(_COUNTER) and not torch.equal(values[0], theirs):
            where = f"{first.file or 'the first model'} and {tensor.file or 'another'}"
            raise RunError(
                f"{first.name} ({first.dtype}) differs between {where}. Integers are not blended: dequantise the models if "
                "they are quantised. Functions of `weights` leave a tensor as the first model has it with `only`."
            )
    return values[0]


@dataclass(frozen=True)
class Shard:
    """One file of a new checkpoint: its name, what its header says beside the tensors, and the tensors to be in it."""

    file: str
    metadata: Mapping[str, str]
    tensors: Sequence[TensorFacts]


def lay_out(index: TensorIndex, dtype: torch.dtype | None, shard_bytes: int | None) -> list[Shard]:
    """The files of a new checkpoint: those of the first input, or new ones of at most `shard_bytes`.

    Args:
        index: the first input.
        dtype: of all floating-point tensors; as they are if None.
        shard_bytes: a tensor that is larger gets a file of its own.
    """
    wanted = [replace(t, dtype=dtype) if dtype and t.dtype.is_floating_point else t for t in index.tensors.values()]
    groups: dict[Any, list[TensorFacts]] = {}
    full = 0
    for tensor in wanted:
        if shard_bytes is None:
            groups.setdefault(tensor.file, []).append(tensor)
        else:
            if not groups or full + tensor.bytes > shard_bytes:
                groups[len(groups)], full = [], 0
            groups[len(groups) - 1].append(tensor)
            full += tensor.bytes
    shards: list[Shard] = []
    for number, tensors in enumerate(groups.values(), 1):
        with safe_open(str(tensors[0].file), framework="pt") as file:
            metadata = file.metadata() or {}
        name = tensors[0].file.name if tensors[0].file and shard_bytes is None else called(index)[0]
        if shard_bytes is not None and len(groups) > 1:
            name = f"{name.removesuffix('.safetensors')}-{number:05}-of-{len(groups):05}.safetensors"
        # wide numbers first, as the library orders them, keeps every tensor aligned to its own size
        tensors.sort(key=lambda tensor: -tensor.dtype.itemsize)
        shards.append(Shard(name, {"format": "pt", **metadata}, tensors))
    return shards


def called(index: TensorIndex) -> tuple[str, str]:
    """What the only file of a checkpoint and the index of several are called, told from the name of a file that it has."""
    file = next(iter(index.tensors.values())).file
    stem = re.sub(r"(-\d+-of-\d+)?\.safetensors$", "", file.name if file else "")
    known = {single: (single, names) for single, names in names_of_files()}
    return known.get(f"{stem}.safetensors", names_of_files()[0])


def create(
    path: Path, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]
) -> dict[str, int]:
    """Make a safetensors file of its full size, with its header written and its tensors still empty.

    Args:
        path: of the file.
        tensors: dtype and shape of each, in the order in which they are to lie.
        metadata: what the header says beside the tensors.

    Returns:
        For each tensor, bytes from the start of the file to its first number.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    starts: dict[str, int] = {}
    end = 0
    for name, (dtype, shape) in tensors.items():
        starts[name], end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [starts[name], end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return {name: 8 + len(text) + start for name, start in starts.items()}


def copy_rest(index: TensorIndex, folder: Path, shards: Sequence[Shard], dtype: torch.dtype | None) -> None:
    """Everything beside the weights: config, tokenizer and licence of the first input, and an index of the new files."""
    assert index.folder is not None
    for path in sorted(index.folder.iterdir()):
        wanted = path.suffix in _COPIED or path.stem in {"LICENSE", "NOTICE"}
        if path.is_file() and wanted and path.name not in _NOT_COPIED:
            shutil.copyfile(path, folder / path.name)
    for part in module_folders(index.folder):
        shutil.copytree(index.folder / part, folder / part)
    if dtype is not None:
        stored = str(dtype).removeprefix("torch.")
        key = "torch_dtype" if "torch_dtype" in index.config else "dtype"
        config = {**with_dtype(index.config, stored), key: stored}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    single, names = called(index)
    if [shard.file for shard in shards] != [single]:
        where = {tensor.name: shard.file for shard in shards for tensor in shard.tensors}
        total = sum(tensor.bytes for shard in shards for tensor in shard.tensors)
        content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        (folder / names).write_text(json.dumps(content, indent=2) + "\n")


def with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """A config whose models, also those inside it, are of another dtype."""
    changed: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, dict):
            changed[name] = with_dtype(value, dtype)
        else:
            changed[name] = dtype if name in {"dtype", "torch_dtype"} and value is not None else value
    return changed
