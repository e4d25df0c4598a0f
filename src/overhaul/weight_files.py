"""The files of weights in a folder: which of them count, and what their headers say, without reading any weight.

A header is checked as far as its library would when it reads the weights, so that what is damaged is refused at once.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from overhaul.errors import RequestError, reading

NEW = "new:"
CONVERTED = "converted"
"""The variant under which the weights of a converted model are stored, so that no class opens half of them."""

STEMS = ("model", "diffusion_pytorch_model")
_ANOTHER_COPY = re.compile(r"consolidated|adapter_model|[^.]+\.[^.]+\.safetensors$")

BITS: Mapping[str, int] = {
    **{name: 8 for name in ("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ")},
    **{name: 16 for name in ("I16", "U16", "F16", "BF16")},
    **{name: 32 for name in ("I32", "U32", "F32")},
    **{name: 64 for name in ("I64", "U64", "F64", "C64")},
    **{"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6},
}
"""The dtypes of safetensors, in bits."""

MOST_HEADER = 100_000_000
"""Bytes of a header; the library reads no larger one."""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds one object.

    Raises:
        RequestError: it holds something else, or is damaged.
    """
    with reading(path):
        text = path.read_bytes()
    try:
        found = json.loads(text.decode("utf-8"), parse_constant=_constant)
    except (ValueError, RecursionError) as error:  # no JSON, or no text
        raise RequestError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(found, dict):
        raise RequestError(f"{path} is not valid JSON: it holds a {type(found).__name__}, not an object.")
    return found


def _constant(name: str) -> float:
    """What Python reads besides JSON: configs of hybrids hold Infinity; nothing holds NaN."""
    if name == "NaN":
        raise ValueError("it holds NaN")
    return float(name.replace("Infinity", "inf"))


def header(path: Path) -> dict[str, Any]:
    """Names, dtypes and shapes of one safetensors file: 8 bytes of length, then JSON.

    Raises:
        RequestError: the file is damaged, cut short or empty.
    """
    with reading(path):
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= min(size - 8, MOST_HEADER):
                raise RequestError(
                    f"{path} is damaged or cut short: its header says {length} bytes, the file has {size}."
                )
            text = file.read(length)
    try:
        found = json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:  # no JSON, or no text
        raise RequestError(f"{path} is damaged: its header is not JSON ({error}). Fetch or save it again.") from None
    if not isinstance(found, dict) or not all(isinstance(entry, dict) for entry in found.values()):
        raise RequestError(f"{path} is damaged: its header describes no tensors. Fetch or save it again.")
    found.pop("__metadata__", None)
    if not found:
        raise RequestError(f"{path} holds no tensors.")
    end = _end(path, found)
    if 8 + length + end != size:
        raise RequestError(f"{path} is cut short: its header promises {8 + length + end} bytes, the file has {size}.")
    return found


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} stands twice")
    return found


def _end(path: Path, found: Mapping[str, Mapping[str, Any]]) -> int:
    """Where the last tensor ends, if tensors lie one behind the other and each is as large as its shape and dtype say."""
    try:
        offsets = {name: tuple(entry["data_offsets"]) for name, entry in found.items()}
        places = sorted((begins, ends, name) for name, (begins, ends) in offsets.items())
        shapes = {name: [*entry["shape"]] for name, entry in found.items()}
        bits = {name: BITS[entry["dtype"]] * math.prod(shapes[name]) for name, entry in found.items()}
    except (TypeError, KeyError, ValueError):
        raise RequestError(f"{path} is damaged: its header describes no tensors. Fetch or save it again.") from None
    end = 0
    for begins, ends, name in places:
        whole = all(type(number) is int and number >= 0 for number in (begins, ends, *shapes[name]))
        if not whole or begins != end or 8 * (ends - begins) != bits[name]:
            raise RequestError(
                f"{path} is damaged: {name!r} is said to be {found[name]['dtype']} {shapes[name]} and to lie at bytes "
                f"{begins} to {ends}, which does not fit. Fetch or save it again."
            )
        end = ends
    return end


def weight_files(folder: Path) -> list[Path]:
    """The files that make up the model: those that `from_pretrained` would read, if that is certain.

    Raises:
        RequestError: there are none, only pickled ones, or it is not certain.
    """
    held = sorted(folder.glob("*.safetensors"))
    found = [(folder / single, folder / index) for single, index in names_of_files()]
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


def names_of_files() -> list[tuple[str, str]]:
    """What a file of all weights, and the index of several, may be called; the plain ones first."""
    plain = [(f"{stem}.safetensors", f"{stem}.safetensors.index.json") for stem in STEMS]
    ours = [(f"{s}.{CONVERTED}.safetensors", f"{s}.safetensors.index.{CONVERTED}.json") for s in STEMS]
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
    below = next(iter(sorted(folder.glob("*/*.safetensors"))), None)
    if below is not None:
        return f"{folder} holds no weights, but {below.parent} does ({below.name}): move them beside config.json."
    return f"{folder} holds no *.safetensors weights. {NEW}{folder} starts from its config alone."


def _named_files(index: Path, held: Sequence[Path]) -> list[Path]:
    """The files that an index names, if it tells the truth."""
    content = read_json(index)
    where: Any = content.get("weight_map")
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
    if not isinstance(content.get("metadata"), dict):
        raise RequestError(
            f"{index} has no `metadata`, without which transformers does not read it. Add {{}} under that name, or save the "
            "model again."
        )
    return named


def listed(names: Sequence[str]) -> str:
    """The first four names and how many more there are."""
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more
