"""The version of a piece of code: a hash of all of Overhaul's source that it can reach. And of the libraries beneath it.

Imports are read from the text, those inside functions too. A package whose entries are found by looking into its folder
counts as importing all of them, except the verbs: a method does not depend on its neighbours.
"""

from __future__ import annotations

import hashlib
import re
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).parent
_IMPORT = re.compile(
    r"^[ \t]*from[ \t]+(overhaul[\w.]*)[ \t]+import[ \t]+(\([^)]*\)|[^\n]+)|^[ \t]*import[ \t]+(overhaul[\w.]*)", re.M
)
_COMMENT = re.compile(r"#[^\n]*")
_FOUND_BY_LOOKING = "iter_modules("
LIBRARIES = (
    "torch", "transformers", "accelerate", "peft", "tokenizers", "safetensors", "datasets", "numpy", "diffusers",
)  # fmt: skip
"""What computes beneath Overhaul: another version may give other numbers."""


@cache
def libraries() -> dict[str, str]:
    """The versions of those that are installed; none of them is imported."""
    return {name: number for name in LIBRARIES if (number := installed(name)) is not None}


def installed(name: str) -> str | None:
    """The version of a package, which is not imported; None where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def version_of(module: str | Path, root: Path = ROOT) -> str:
    """A short hash of a module's source and of every module of Overhaul that it imports, directly or not.

    Args:
        module: its full name ("overhaul.forget.npo"), or the file of one that lies elsewhere.
        root: the folder of the package `overhaul`.
    """
    hasher = hashlib.sha256()
    for path in sorted(reached(module, root)):
        hasher.update(path.name.encode() + b"\0" + _source(path).encode() + b"\0")
    return hasher.hexdigest()[:12]


def package_version(root: Path = ROOT) -> str:
    """A short hash of all source of the package."""
    hasher = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        hasher.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return hasher.hexdigest()[:12]


def reached(module: str | Path, root: Path = ROOT) -> set[Path]:
    """The files of a module and of all that it imports. The top package's own file only names others and does not count."""
    found: set[Path] = set()
    ahead = [module] if isinstance(module, Path) else _files(module, root)
    while ahead:
        path = ahead.pop()
        if path in found:
            continue
        found.add(path)
        for name in _imports(_source(path)):
            ahead += [file for file in _files(name, root) if file not in found]
        if _FOUND_BY_LOOKING in _source(path) and path.name == "__init__.py":
            ahead += path.parent.glob("**/*.py")
    return found


def _files(module: str, root: Path) -> list[Path]:
    """A module's file and those of the packages around it, which are run before it; none for a name inside a module."""
    places = module.split(".")[1:]
    found: list[Path] = []
    for n in range(1, len(places) + 1):
        path = root.joinpath(*places[:n])
        own = [file for file in (path / "__init__.py", path.with_suffix(".py")) if file.is_file()]
        found += own
    return found


def _source(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def _imports(source: str) -> list[str]:
    """Full names of what is imported from Overhaul; some name a function and no module."""
    names: list[str] = []
    for package, what, plain in _IMPORT.findall(source):
        if plain:
            names.append(plain)
            continue
        parts = _COMMENT.sub("", what).strip("() \n").split(",")
        names += [package, *(f"{package}.{part.split()[0]}" for part in parts if part.split())]
    return names
