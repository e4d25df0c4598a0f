"""Files that are whole or not there: written beside their place, then renamed. And what JSON cannot hold, to be hashed."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Collection
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


def pattern_of(source: str, base: Path) -> str:
    """A pattern of files as it is looked for: what stands in `base` is no part of it."""
    named = Path(source).expanduser()
    return str(named) if named.is_absolute() else os.path.join(glob.escape(str(base)), named)


def matching(pattern: str) -> list[Path]:
    """The files that a pattern names, in order, also below folders by `**`."""
    return [path for each in sorted(glob.glob(pattern, recursive=True)) if not (path := Path(each)).is_dir()]


def remove(path: Path) -> None:
    """Take away a file, a link (not what it leads to) or a folder with all in it; nothing where there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def read_json(path: Path, kind: type = dict, holds: Collection[str] = ()) -> Any:
    """What a file of JSON holds; None where it is not there, or damaged or no `kind`, which a warning says.

    Args:
        path: of the file.
        kind: what it must be.
        holds: keys that it must have.
    """
    try:
        if path.exists() and not path.is_file():  # to read a pipe may never end
            raise OSError("it is no file")
        found = json.loads(path.read_text(encoding="utf-8"))
        lost = [name for name in holds if name not in found] if isinstance(found, kind) else []
        if isinstance(found, kind) and not lost:
            return found
        reason = f"it lacks {lost[0]!r}" if lost else f"it holds no {kind.__name__}"
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
