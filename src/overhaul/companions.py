"""What lies beside the weights and belongs to a model: it is saved with it, as the folder that it was opened from has it.

1. Of sentence-transformers: modules.json, its settings, and the modules' folders (pooling, normalisation).
2. Of a model whose code came with it, that code.
3. How large a file of weights may be: what was one file is one again, what was several has files as large as those were.
4. What is in float32 among smaller numbers (routers, decays of state spaces): it stays so.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from overhaul.errors import RequestError
from overhaul.weight_files import header, weight_files

MODULES = "modules.json"
_SETTINGS = (MODULES, "sentence_bert_config.json", "config_sentence_transformers.json")
_WITH_FILES = frozenset({"Dense", "Pooling", "WeightedLayerPooling", "LayerNorm", "LSTM", "CNN"})
"""Modules of sentence-transformers that read something from their folders."""
_CODE = "transformers_modules."
_NUMBERS = re.compile(r"\.\d+\.")
EXACT = "F32"
LARGEST = 50_000_000_000
"""The size in bytes up to which transformers saves one file."""


def opened_from(model: Any) -> Path | None:
    """The folder that a model of transformers was opened from, if it is still there."""
    named = getattr(model, "name_or_path", None)
    return Path(named) if isinstance(named, str) and named and Path(named).is_dir() else None


def copy_companions(model: Any, folder: Path) -> None:
    """Put what belongs to the model into a folder that it was saved in."""
    source = opened_from(model)
    if source is None:
        return
    if (source / MODULES).is_file():
        for name in _SETTINGS:
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
        for name in module_folders(source):
            shutil.copytree(source / name, folder / name, dirs_exist_ok=True)
    if type(model).__module__.startswith(_CODE):
        for path in sorted(source.rglob("*.py")):
            target = folder / path.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)


def module_folders(source: Path) -> list[str]:
    """The folders of sentence-transformers' modules beside the model in `source`, by its modules.json; none elsewhere.

    Raises:
        RequestError: the file is damaged, or names a module that cannot do without its folder, which is not there.
    """
    path = source / MODULES
    if not path.is_file():
        return []
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        named = {str(entry["path"]): str(entry.get("type")).rpartition(".")[2] for entry in entries}
    except (ValueError, TypeError, KeyError, AttributeError):
        raise RequestError(f"{path} is damaged: it must list modules, each with its path. Fetch it again.") from None
    inside = [name for name in named if name and not Path(name).is_absolute() and ".." not in Path(name).parts]
    for name in inside:
        if named[name] in _WITH_FILES and not (source / name).is_dir():
            raise RequestError(
                f"{path} names {name} ({named[name]}), which the folder lacks. Fetch the checkpoint again, or take that "
                "module out of modules.json."
            )
    return [name for name in inside if (source / name).is_dir()]


def cast(model: nn.Module, dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    """The state as it is stored, in another dtype if any; tied tensors stay one tensor, or they would be written twice.

    Each tensor is in one piece, as those of images with their channels last are not.
    """
    kept, made, state = _kept_exact(model), dict[int, torch.Tensor](), dict[str, torch.Tensor]()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in made:
            exact = dtype is None or not tensor.is_floating_point() or _NUMBERS.sub(".*.", name) in kept
            made[id(tensor)] = (tensor if exact else tensor.to(dtype)).detach().contiguous()
        state[name] = made[id(tensor)]
    return state


def _kept_exact(model: nn.Module) -> set[str]:
    """What the model's folder holds in float32 while most of it is smaller: names, without the numbers of blocks."""
    source = opened_from(model)
    numbers, exact = Counter[str](), set[str]()
    with suppress(RequestError):  # without weights, or changed since
        for path in weight_files(source) if source is not None else ():
            for name, entry in header(path).items():
                numbers[entry["dtype"]] += math.prod(entry["shape"])
                exact |= {_NUMBERS.sub(".*.", name)} if entry["dtype"] == EXACT else set()
    return exact if numbers and max(numbers, key=lambda kind: numbers[kind]) != EXACT else set()


def largest_file(model: Any) -> int:
    """Most bytes of one file of weights when the model is saved."""
    source = opened_from(model)
    sizes = [path.stat().st_size for path in source.glob("*.safetensors")] if source is not None else []
    return max(sizes) if len(sizes) > 1 else max([LARGEST, *sizes])
