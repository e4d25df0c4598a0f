"""Files that are whole or not there: written beside their place, then renamed. And what JSON cannot hold, to be hashed."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from overhaul.errors import writing


def write_text(path: Path, text: str) -> None:
    """Write beside the place, then rename.

    Raises:
        RunError: the place cannot be written.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)


def write_json(path: Path, value: Any) -> None:
    """`write_text` of indented JSON; NaN is refused."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def contents(value: Any) -> Any:
    """`default` of a `json.dumps` whose text is hashed: all of an array or picture, of which `str` shows a part."""
    if hasattr(value, "detach"):  # a tensor, of any dtype
        return [str(value.dtype), value.tolist()]
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    if getattr(getattr(value, "dtype", None), "hasobject", False):
        return value.tolist()
    if hasattr(value, "tobytes"):
        about = [str(getattr(value, name, "")) for name in ("dtype", "shape", "mode", "size")]
        return [*about, hashlib.sha256(value.tobytes()).hexdigest()]
    return str(value)
