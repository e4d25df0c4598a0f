"""Files that are whole or not there: written beside their place, then renamed. And what JSON cannot hold, to be hashed."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from pathlib import Path
from typing import Any

from overhaul.errors import writing


def write_text(path: Path, text: str) -> None:
    """Write beside the place, to the disk, then rename. A link beside or at the place is replaced, not followed.

    Raises:
        RunError: the place cannot be written.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        partial.unlink(missing_ok=True)
        with partial.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)


def write_json(path: Path, value: Any) -> None:
    """`write_text` of indented JSON; NaN is refused."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_json(path: Path, kind: type = dict) -> Any:
    """What a file of JSON holds; None where it is not there, or damaged or no `kind`, which a warning says."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, kind):
            return found
        reason = f"it holds no {kind.__name__}"
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        reason = str(error)
    warnings.warn(f"{path} is damaged ({reason}); what it said is found out again.", stacklevel=2)
    return None


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
